"""Builds with CMake, which holds the list of sources, and installs into the package."""

import os
import shlex
import subprocess
import sys
import sysconfig
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
            subprocess.run(["cmake", *map(str, arguments)], check=True, env=environment)

        # --fresh: what was found for another interpreter must not be used for this one.
        cmake("--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", *flags)
        cmake("--build", build, "--target", "install", "-j", os.environ.get("MAX_JOBS", os.cpu_count()))


setup(
    ext_modules=[Extension("masked_loss._C", [])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=requirements(),
)
