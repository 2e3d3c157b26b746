#!/usr/bin/env python3
"""Runs the tests in steps, all of them whatever one says, and ends with what each said and how long it took.

fast   what tells in minutes whether a change is right: `make test`
all    everything that can be known on this machine: `make test-all`

PYTEST_ARGS in the environment: more arguments for pytest.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
FAST = "not slow and not thorough"


class Step(NamedTuple):
    name: str
    what: str
    command: list
    is_fast: bool = False


def tool(name, *arguments):
    return [sys.executable, ROOT / "tools" / name, *arguments]


def steps(only_fast, pytest_arguments):
    # A scope (a class, or the functions of a file) stays on one core. More threads would only wait for one another on
    # tensors as small as theirs.
    pytest = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadscope", "--no-loadscope-reorder"]
    marks = ["-m", FAST] if only_fast else []
    program = BUILD / "package" / "tests" / "cpp" / "masked_loss_tests"
    return [
        Step("GoogleTest", "the C++ API", [program, "--gtest_brief=1"], is_fast=True),
        Step("pytest", "the Python tests", [*pytest, *marks, *pytest_arguments], is_fast=True),
        Step("CUDA", "its kernels compiled by nvcc, and emulated on the CPU", tool("check_cuda.py")),
        Step("sanitizers", "the CPU's library under ASAN and UBSAN", tool("check_cpu.py", "sanitize")),
        Step("clang", "each source by itself", tool("check_cpu.py", "clang")),
        Step("oldest torch", "built with CUDA, imported and tested", tool("cuda_link.py")),
    ]


def run(step):
    """The step, whether it passed, the seconds it took, and its last line that says so; what it prints is printed."""
    print(f"== {step.name}: {step.what}", flush=True)
    start, summary, printed = time.monotonic(), "", [f"== {step.name} printed:\n"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if step.name == "pytest" else os.environ
    process = subprocess.Popen(
        [str(word) for word in step.command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", cwd=ROOT, env=environment,
    )  # fmt: skip
    for line in process.stdout:
        if step.is_fast:
            print(line, end="", flush=True)
        else:  # another one prints at the same time
            printed.append(line)
        if re.search(r"\b(passed|PASSED|failed|FAILED|skipped|compiled)\b", line):
            summary = line.strip(" =\n")
    passed = process.wait() == 0
    if not step.is_fast:
        print("".join(printed), end="", flush=True)
    return step, passed, time.monotonic() - start, summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=["fast", "all"])
    only_fast = parser.parse_args().tier == "fast"
    every = steps(only_fast, shlex.split(os.environ.get("PYTEST_ARGS", "")))
    left = [step for step in every if not step.is_fast]
    results = [run(step) for step in every if step.is_fast]
    if not only_fast:
        # Each has parts that keep but one core busy, or the network.
        with ThreadPoolExecutor(2) as pool:
            results += pool.map(run, left)
    print("== Summary")
    for step, passed, seconds, summary in results:
        print(f"{step.name:13}{'passed' if passed else 'FAILED'} in {seconds:.0f} s  {summary}")
    if only_fast:
        names = ", ".join(f"{step.name} ({step.what})" for step in left)
        print(f"Left to `make test-all`: the tests that pytest named above; {names}")
    return not all(passed for _, passed, *_ in results)


if __name__ == "__main__":
    sys.exit(main())
