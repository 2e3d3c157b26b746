"""Builds with CMake, which holds the list of sources, and installs into the package."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def requirements() -> list[str]:
    """A build is for the minor version of the torch that it is compiled against: another one cannot load it."""
    try:
        minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        if "dist_info" in sys.argv:  # what pip asks for before it fetches requirements
            sys.exit(
                "masked_loss: expected torch in the environment that builds, which pip's own isolated one has not: "
                "install torch, then `pip install --no-build-isolation .`"
            )
        return ["torch>=2.11"]
    return ["torch=={}.{}.*".format(*minor)]


class Progress:
    """A line on the terminal that tells how far the build is, which takes minutes: pip hides what it prints.

    MASKED_LOSS_PROGRESS=0 in the environment, or no terminal: nothing.
    """

    def __enter__(self) -> "Progress":
        self.start, self.terminal = time.monotonic(), None
        if os.environ.get("MASKED_LOSS_PROGRESS") != "0":
            with contextlib.suppress(OSError):
                self.terminal = open("/dev/tty", "w")
        return self

    def show(self, line: str) -> None:
        found = re.match(r"\[(\d+)/(\d+)\]", line)
        if self.terminal and found:
            seconds = time.monotonic() - self.start
            self.terminal.write("\r\033[K  masked_loss: {}/{} compiled, {:.0f} s".format(*found.groups(), seconds))
            self.terminal.flush()

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            self.terminal.write("\n")
            self.terminal.close()


class CMakeBuild(build_ext):
    """Runs CMake's install: _C, lib/, include/ and the CMake package all go into masked_loss/."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT / "python" if in_place else Path(self.build_lib).resolve()) / "masked_loss"
        # One build tree for both kinds: only install paths differ, so nothing is compiled twice.
        build = ROOT / "build" / "package"
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_INSTALL_PREFIX": package,
            "CMAKE_INSTALL_LIBDIR": "lib",
            # A wheel is installed beside torch; an editable package is not.
            "MASKED_LOSS_WHEEL": "OFF" if in_place else "ON",
            "Python_EXECUTABLE": sys.executable,
        }
        flags = [f"-D{name}={value}" for name, value in options.items()]
        flags += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # cmake and ninja may be this environment's without its being activated.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "PATH": path}

        def cmake(*arguments: object) -> None:
            command = ["cmake", *map(str, arguments)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  errors="replace", env=environment) as process:  # fmt: skip
                for line in process.stdout:
                    print(line, end="", flush=True)
                    progress.show(line)
            if process.returncode != 0:
                raise subprocess.CalledProcessError(process.returncode, command)

        with Progress() as progress:
            # What was found for another interpreter must not be used for this one; --fresh would compile all again.
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            cmake("-S", ROOT, "-B", build, "-G", "Ninja", *flags)
            cmake("--build", build, "--target", "install", "-j", os.environ.get("MAX_JOBS", os.cpu_count()))


setup(
    ext_modules=[Extension("masked_loss._C", [])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=requirements(),
)
