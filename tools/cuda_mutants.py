#!/usr/bin/env python3
"""Takes the barriers of the CUDA kernels away, one at a time, or lets a comparison hold once too often, and tells which
test under the emulation notices: in the order of the threads, in random ones, ThreadSanitizer or AddressSanitizer.

Not part of the tests: it compiles every mutant by itself. A barrier that nobody notices may be one that is not needed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from check_cuda import CCACHE, nvcc, sources, toolkit

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "mutants"
FLAVOURS = {
    "masked_loss_kernel_tests": ["-O1"],
    "masked_loss_kernel_tests_tsan": ["-O1", "-g1", "-fsanitize=thread"],
    "masked_loss_kernel_tests_asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
BARRIER = re.compile(r"^\s*(__syncthreads|__syncwarp|\w*cluster\w*(\(\))?\.sync)\(.*\);")
COMPARISON = re.compile(r"(?<=[\w)\]]) < (?=[\w(])")


def mutants(every):
    """(file, number of the line, what was done, the line instead)"""
    for path in [*sources("MASKED_LOSS_CUDA_KERNELS"), *sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))]:
        compared = 0
        for number, line in enumerate(path.read_text().splitlines()):
            if BARRIER.match(line):
                yield path, number, "without its barrier", re.sub(r"\S.*?;", ";", line, count=1)
            elif every and COMPARISON.search(line):
                compared += 1
                if compared % every == 0:
                    yield path, number, "<= for <", COMPARISON.sub(" <= ", line, count=1)


def try_mutant(index, mutant, tests, include):
    path, number, what, instead = mutant
    folder = BUILD / str(index)
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    copy = folder / path.relative_to(ROOT)
    lines = copy.read_text().splitlines()
    shown = lines[number].strip()
    lines[number] = instead
    copy.write_text("\n".join(lines) + "\n")
    noticed = []
    for program, flags in FLAVOURS.items():
        objects = []
        for source in sources("MASKED_LOSS_CUDA_KERNELS"):
            changed = path == source or path.suffix == ".cuh"
            objects.append(
                folder / f"{source.stem}.o" if changed else next(tests.glob(f"**/{program}.dir/**/{source.name}.o"))
            )
            if not changed:
                continue
            folders = ["-I", ROOT / "tests" / "cuda_emulation", "-I", folder / "csrc", "-isystem", include]
            source = folder / source.relative_to(ROOT)
            command = [
                *CCACHE,
                "g++",
                "-std=c++20",
                *flags,
                "-w",
                *folders,
                "-x",
                "c++",
                "-c",
                source,
                "-o",
                objects[-1],
            ]
            if subprocess.run(list(map(str, command)), capture_output=True).returncode != 0:
                return f"{path.name}:{number + 1}: {what}: does not compile: {shown}", True
        objects += [
            p
            for p in tests.glob(f"**/{program}.dir/*.cpp.o")
            if p.name not in ("defects_test.cpp.o", "device_test.cpp.o")
        ]
        linked = folder / program
        subprocess.run(["g++", *flags, *map(str, objects), "-lgtest", "-o", str(linked)], check=True)
        fixed = ["setarch", "-R"] if "tsan" in program else []
        environment = {
            **os.environ,
            "ASAN_OPTIONS": "detect_stack_use_after_return=0",
            "TSAN_OPTIONS": "halt_on_error=1",
        }
        name = {
            "cross_entropy_kernel": "CrossEntropy*",
            "row_plan_kernel": "RowPlan*",
            "masked_fill_kernel": "MaskedFill*",
            "pointwise_kernel": "Pointwise*",
            "reductions_kernel": "Moments*:Spread*",
            "softmax_kernel": "Softmax*",
        }
        command = [*fixed, str(linked), "--gtest_brief=1", f"--gtest_filter={name.get(path.stem, '*')}"]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=environment, timeout=300
            )
            failed, output = result.returncode != 0, result.stdout + result.stderr
        except subprocess.TimeoutExpired:
            failed, output = True, "does not end"
        if failed:
            test = re.search(r"FAILED  \] (\S+?)[ ,]", output)
            schedule = re.search(r"schedule (\d+)", output)
            by = {"masked_loss_kernel_tests": "a wrong result", "masked_loss_kernel_tests_tsan": "ThreadSanitizer"}
            how = by.get(program, "AddressSanitizer")
            if schedule and program == "masked_loss_kernel_tests":
                how += " in the order of threads" if schedule[1] == "0" else " in a random order"
            noticed.append(how + (f" ({test[1]})" if test else ""))
        if noticed and ("barrier" not in what or len(noticed) == 2 or "asan" in program):
            break
    shutil.rmtree(folder)
    return f"{path.name}:{number + 1}: {what}: {'; '.join(noticed) or 'NOT NOTICED'}: {shown}", bool(noticed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--every", type=int, default=5, help="take every so-many-th comparison, 0: none; barriers are all taken"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "package", help="CMake's build tree, configured")
    arguments = parser.parse_args()
    compiler = nvcc()
    if compiler is None:
        print("skipped: nvcc, which knows where CUDA's headers are, is not found")
        return 0
    subprocess.run(["cmake", "--build", arguments.build, "--target", *FLAVOURS], check=True)
    tests = arguments.build.resolve() / "tests" / "cuda_emulation"
    include = toolkit(compiler)
    found = list(mutants(arguments.every))
    print(f"{len(found)} mutants", flush=True)
    unnoticed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for text, noticed in pool.map(lambda item: try_mutant(*item, tests, include), enumerate(found)):
            print(text, flush=True)
            unnoticed += not noticed
    print(f"{len(found) - unnoticed} of {len(found)} were noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
