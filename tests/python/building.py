"""Runs CMake, pip and what they build."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "consumer"  # kept from run to run, so that a second one compiles only what has changed


def attempt(*command, **environment):
    """Runs a command with the environment's own cmake and ninja first on the PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=BUILD,
        env={**inherited, "PATH": path, **{name: str(value) for name, value in environment.items()}},
    )


def run(*command, **environment):
    """The standard output of a command that succeeds."""
    result = attempt(*command, **environment)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-8000:]}\n{result.stderr[-8000:]}"
    return result.stdout


def configure(source, build, **options):
    """The command that configures a CMake project from nothing; what is compiled stays, unlike with --fresh."""
    (Path(build) / "CMakeCache.txt").unlink(missing_ok=True)
    launcher = shutil.which("ccache")
    if launcher:
        options.setdefault("CMAKE_CXX_COMPILER_LAUNCHER", launcher)
    flags = [f"-D{name}={value}" for name, value in options.items()]
    return ["cmake", "-S", source, "-B", build, "-G", "Ninja", *flags]


def build_project(source, build, *targets, **options):
    """Configures a CMake project and builds it."""
    run(*configure(source, build, **options))
    run("cmake", "--build", build, "-j", os.cpu_count(), *(["--target", *targets] if targets else []))


BUILD.mkdir(parents=True, exist_ok=True)
