#!/usr/bin/env python3
"""What the tests of an optimised build by g++ cannot tell of the CPU's library; what cannot be run here says why.

sanitize   The library and its Python module with the address and the undefined-behaviour sanitizer: the C++ tests, and
           the Python tests of what reads and writes memory by itself. Without vector instructions, whose masked loads
           a sanitizer does not see.
clang      clang reads every source by itself, for every instruction set; a warning is an error.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
# One of each family, with every layout, dtype and mask. Derivatives of other kinds are made of torch's ops, which the
# sanitizers do not see.
PYTHON_TESTS = (
    "test_special_values.py::test_kernels",
    "test_special_values.py::test_composite",
    "test_cross_entropy_grid.py",
    "test_linear.py::test_every_traversal",
    "test_masked_fill.py",
    "test_masks.py",
    "test_softmax.py",
    "test_reductions.py",
)


def configure(build, *options):
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *options)


def run(*command, **environment):
    """Without its output, unless it fails."""
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, errors="replace", cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip
    if result.returncode != 0:
        print(shlex.join(map(str, command)), result.stdout[-8000:], result.stderr[-8000:], sep="\n")
        sys.exit(1)
    return result.stdout


def sanitize():
    build, site = BUILD / "asan", BUILD / "asan-site"
    package = site / "masked_loss"
    shutil.copytree(ROOT / "python" / "masked_loss", package, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("lib", "include", "_C*.so", "_build.py", "__pycache__"))  # fmt: skip
    configure(
        build, "--preset", "asan", "-DMASKED_LOSS_PYTHON=ON", f"-DCMAKE_INSTALL_PREFIX={package}",
        "-DCMAKE_INSTALL_LIBDIR=lib",
    )  # fmt: skip
    run("cmake", "--build", build, "--target", "masked_loss_tests", "install")
    preloaded = [
        run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    options = {"ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0", "OMP_NUM_THREADS": "2"}
    output = run(build / "tests" / "cpp" / "masked_loss_tests", "--gtest_brief=1", **options)
    print("C++:", *re.findall(r"\[  PASSED  \].*", output), flush=True)
    output = run(
        sys.executable, "-m", "pytest", "-q", "-n", "auto", "-m", "not slow and not thorough",
        *(ROOT / "tests" / "python" / name for name in PYTHON_TESTS),
        **options | {"LD_PRELOAD": " ".join(preloaded), "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    print("Python:", output.splitlines()[-1])


def clang():
    compiler = os.environ.get("CLANG") or shutil.which("clang++")
    if compiler is None:
        print("skipped: clang++ is not found, which CLANG may name")
        return
    build = BUILD / "clang"
    configure(build, f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_UNITY_BUILD=OFF", "-DMASKED_LOSS_CUDA=off")
    commands = json.loads((build / "compile_commands.json").read_text())

    def read(entry):
        words = shlex.split(entry["command"])
        words = [word for word in words[: words.index("-o")] if "ccache" not in word]
        return subprocess.run(
            [*words, "-Werror", "-fsyntax-only", entry["file"]], capture_output=True, text=True, cwd=entry["directory"]
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(read, commands))
    failed = [(e["output"], r.stderr) for e, r in zip(commands, results, strict=True) if r.returncode != 0]
    for name, errors in failed:
        print(f"{name}\n{errors[:3000]}")
    version = subprocess.check_output([compiler, "--version"], text=True).splitlines()[0]
    print(f"{len(commands)} sources, {len(failed)} failed: {version}" if failed else
          f"{len(commands)} sources passed: {version}")  # fmt: skip
    sys.exit(bool(failed))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sanitize", "clang"])
    {"sanitize": sanitize, "clang": clang}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
