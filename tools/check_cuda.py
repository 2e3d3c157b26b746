#!/usr/bin/env python3
"""What can be known of the CUDA backend without a GPU; what cannot be run here says why.

compile   nvcc compiles every kernel, none of which spills registers or has a stack frame, and g++ the host code against
          this interpreter's torch, be it built without CUDA. The machine code of sm_90 is looked at: rows move by bulk
          copies, elements 16 bytes at a time, and registers leave room for the threads that keep the memory busy.
emulate   The same kernels run on the CPU: their own tests with sanitizers, the kernel bench with small shapes, and the
          Python tests of everything that has CUDA kernels. Every kernel that nvcc compiled has to be among those that
          were launched.
bench     Builds the kernel bench (benchmarks/kernels) for sm_90: one program, to be carried to a GPU.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda"
KERNELS = BUILD / "kernels.txt"
CCACHE = [shutil.which("ccache")] if shutil.which("ccache") else []

# What the kernels are tuned for. Others have to compile, which need not take long.
TUNED = ("sm_80", "sm_90")

# Kernels of N-sized work, for which a few bytes of stack do not show.
COLD = {"plan_few_rows", "read_many_rows", "finish_many_rows", "weigh_sequences"}

# What the machine code of kernels whose names begin so has to have, and must not have. The losses of elements differ in
# their arithmetic alone.
WIDE_LOAD, WIDE_STORE = r"LDG\.E\S*\.128", r"STG\.E\S*\.128"
INSTRUCTIONS = {
    "row_ring": ([r"UBLKCP\.S\.G"], [WIDE_STORE]),
    "row_packs": ([WIDE_LOAD], []),
    "scale_elements": ([WIDE_LOAD, WIDE_STORE], []),
    "fill_lines": ([WIDE_LOAD, WIDE_STORE], []),
    "pointwise_elements<formula::Mse": ([WIDE_LOAD, WIDE_STORE], []),
    "moments_of_lines": ([WIDE_LOAD], []),
    "moments_of_columns": ([r"LDG\.E\S*\.(64|128)"], []),
    "affine_elements": ([WIDE_LOAD, WIDE_STORE], []),
}
# How many threads a multiprocessor has to hold at least, of its 65536 registers, so that enough loads are under way.
THREADS = {
    "scale_elements": 2048,
    "fill_lines": 1536,
    "fill_elements": 1536,
    "affine_elements": 1024,
    "pointwise_elements": 512,
    "moments_of_lines": 512,
    "moments_of_columns": 512,
}
DISASSEMBLER = ("nvidia-cuda-cuobjdump==13.5.37", "nvidia-cuda-nvdisasm==13.5.37")


def sources(name):
    """A list of CMakeLists.txt, which is where sources are named."""
    text = (ROOT / "CMakeLists.txt").read_text()
    return [ROOT / line for line in re.search(rf"set\({name}\n(.*?)\)", text, re.S)[1].split()]


def nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))


def toolkit(compiler):
    """The folder of CUDA's headers: nvcc itself knows, should the one on the PATH be a script."""
    dry = subprocess.run([compiler, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = Path(re.search(r"^#\$ TOP=(.*)$", dry, re.M)[1].strip())
    return next(path for path in (top / "include", *top.glob("targets/*/include")) if (path / "cuda_bf16.h").exists())


def run(command):
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    if result.returncode != 0:
        print(" ".join(map(str, command)), result.stdout, result.stderr, sep="\n")
    return result


def demangled(names):
    shown = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(short, shown.stdout.splitlines()), strict=True))


def short(name):
    """`cross_entropy_packs<float, 1, 32, 4, false>`: without return type, namespaces and arguments."""
    name = name.replace("(anonymous namespace)::", "").replace("masked_loss::cuda::", "").replace("masked_loss::", "")
    name = re.sub(r"\((\w+)\)(-?\d+)", r"\2", name)
    depth = 0
    for end, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:end]
            break
    return name.removeprefix("void ")


def read_resources(output):
    """(kernel, architecture) -> registers, stack frame, spilled bytes and static shared memory, from ptxas -v."""
    found = {}
    for part in re.split(r"ptxas info\s+: Compiling entry function ", output)[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+)", part).groups())
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        found[name, architecture] = (registers, stack, stores + loads, int(shared[1]) if shared else 0)
    return found


def print_table(rows, architectures):
    """A line a kernel and dtype: the registers of all its instances."""
    table = defaultdict(lambda: defaultdict(list))
    for (name, architecture), resources in rows.items():
        kernel, _, arguments = name.partition("<")
        table[kernel, arguments.partition(",")[0].rstrip(">")][architecture].append(resources)
    print(
        f"{'kernel':24}{'of':16}{'instances':>10}"
        + "".join(f"{a + ' registers':>18}" for a in architectures)
        + f"{'shared':>10}"
    )
    for (kernel, dtype), by in sorted(table.items()):
        ranges = [sorted({r[0] for r in by[a]}) for a in architectures]
        cells = "".join(f"{f'{r[0]} to {r[-1]}' if len(r) > 1 else r[0]:>18}" for r in ranges)
        shared = max(r[3] for resources in by.values() for r in resources)
        print(f"{kernel:24}{dtype:16}{len(by[architectures[0]]):>10}{cells}{shared:>10}")


def kernel_command(source, architecture, folder=BUILD, options=()):
    """The command that compiles one file of kernels, and the object that it makes."""
    number = architecture.removeprefix("sm_")
    to = folder / f"{source.stem}.{architecture}.o"
    return [*CCACHE, nvcc(), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-I", "csrc", *options,
            *([] if architecture in TUNED else ["--Ofast-compile=max"]),
            "-gencode", f"arch=compute_{number},code={architecture}", "-c", source, "-o", to], to  # fmt: skip


def run_all(commands):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, commands))


def cuobjdump():
    """It comes with a toolkit that is whole; else from PyPI, into the build's folder."""
    beside = shutil.which("cuobjdump", path=str(Path(os.path.realpath(nvcc())).parent))
    found = beside or shutil.which("cuobjdump")
    if found and shutil.which("nvdisasm", path=str(Path(found).parent)):
        return found
    folder = BUILD / "disassembler"
    if not any(folder.glob("**/bin/nvdisasm")):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", folder, *DISASSEMBLER], check=True)
    found = next(folder.glob("**/bin/cuobjdump"))
    for program in found.parent.iterdir():
        program.chmod(0o755)
    return str(found)


def read_accesses(program, outputs, names):
    """Kernel -> its instructions that access global memory, of those that INSTRUCTIONS asks for.

    `outputs` are what ptxas has said of each object, `names` are by symbols.
    """
    commands = []
    for path, output in outputs.items():
        symbols = {symbol for symbol, _ in read_resources(output)}
        asked = [symbol for symbol in sorted(symbols) if names[symbol].startswith(tuple(INSTRUCTIONS))]
        few = ["--function", ",".join(asked)] if len(asked) < 10 else []  # many by name take longer than all
        commands += [[program, "--dump-sass", *few, path]] if asked else []
    accesses = defaultdict(set)
    for line in "".join(dump.stdout for dump in run_all(commands)).splitlines():
        if "Function : " in line:
            name = names[line.partition("Function : ")[2].strip()]
        elif ("LDG" in line or "STG" in line or "UBLKCP" in line) and name.startswith(tuple(INSTRUCTIONS)):
            accesses[name].add(re.search(r"(LDG|STG|UBLKCP)\S*", line)[0])
    return accesses


def check_accesses(accesses):
    wrong = []
    for kernel, (needed, forbidden) in INSTRUCTIONS.items():
        instances = {name: found for name, found in accesses.items() if name.startswith(kernel)}
        wrong += [] if instances else [f"{kernel} is not there"]
        for name, found in instances.items():
            has = {pattern: any(re.fullmatch(pattern, one) for one in found) for pattern in needed + forbidden}
            wrong += [f"{name} lacks {pattern}" for pattern in needed if not has[pattern]]
            wrong += [f"{name} has {pattern}" for pattern in forbidden if has[pattern]]
    print(*(f"FAILED: {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    print(f"machine code: how {len(accesses)} kernels access memory {'FAILED' if wrong else 'is as it should be'}")
    return not wrong


def check_registers(rows):
    passed = True
    for (name, architecture), (registers, *_) in sorted(rows.items()):
        threads = THREADS.get(name.partition("<")[0], 0)
        if -(-registers // 8) * 8 * threads > 65536:
            passed = False
            print(f"FAILED: {name} for {architecture}: {registers} registers, too many for {threads} threads")
    return passed


def compile_all(architectures):
    if nvcc() is None:
        print("skipped: nvcc is not found")
        return True
    BUILD.mkdir(parents=True, exist_ok=True)
    import torch.utils.cpp_extension as extension

    def host(source):
        folders = [ROOT / "csrc", ROOT / "csrc" / "include", *extension.include_paths(), toolkit(nvcc())]
        # The wheels without CUDA lack one generated header.
        return [*CCACHE, os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-DAT_PER_OPERATOR_HEADERS",
                "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-fPIC",
                *(word for folder in folders for word in ("-isystem", folder)),
                "-c", source, "-o", BUILD / f"{source.stem}.o"]  # fmt: skip

    kernels = sources("MASKED_LOSS_CUDA_KERNELS")
    commands = [kernel_command(source, architecture) for source in kernels for architecture in architectures]
    results = run_all([c for c, _ in commands] + [host(source) for source in sources("MASKED_LOSS_CUDA_HOST")])
    failed = any(result.returncode != 0 for result in results)
    resources = read_resources("".join(result.stderr for result in results))
    names = demangled(sorted({name for name, _ in resources}))
    rows = {(names[name], architecture): of for (name, architecture), of in resources.items()}
    KERNELS.write_text("".join(f"{name}\n" for name in sorted(set(names.values()))))
    rows = {(name, architecture): of for (name, architecture), of in rows.items() if architecture in TUNED}
    if rows:
        print_table(rows, [architecture for architecture in architectures if architecture in TUNED])
    for (name, architecture), (_, stack, spilled, _) in sorted(rows.items()):
        if stack or spilled:
            cold = name.partition("<")[0] in COLD
            failed |= not cold
            print(
                f"{'cold' if cold else 'FAILED'}: {name} for {architecture}: {stack} bytes of stack, {spilled} spilled"
            )
    failed |= not check_registers(rows)
    if not failed and "sm_90" in architectures:
        said = {path: result.stderr for (_, path), result in zip(commands, results, strict=False)}
        outputs = {path: output for path, output in said.items() if ".sm_90." in path.name}
        failed |= not check_accesses(read_accesses(cuobjdump(), outputs, names))
    print(f"{len(set(names.values()))} kernels for {', '.join(architectures)}: {'FAILED' if failed else 'compiled'}")
    return not failed


def build_bench(architecture="sm_90"):
    if nvcc() is None:
        print("nvcc is not found")
        return False
    folder = ROOT / "build" / "kernel_bench"
    folder.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    kernels = [kernel_command(source, architecture) for source in sources("MASKED_LOSS_CUDA_KERNELS")]
    here = ROOT / "benchmarks" / "kernels"
    bench = [kernel_command(source, architecture, folder, ["-I", here]) for source in sorted(here.glob("*.cu"))]
    if any(result.returncode != 0 for result in run_all([command for command, _ in kernels + bench])):
        return False
    program = folder / "kernels"
    # What is not on every machine goes into the program: CUDA's runtime already does.
    link = [nvcc(), "-Xcompiler", "-static-libstdc++,-static-libgcc", "-o", program, *(o for _, o in kernels + bench)]
    if run(link).returncode != 0:
        return False
    print(f"{program}: carry this one file to a GPU of {architecture}; benchmarks/kernels/main.cu has its options")
    return True


# What has CUDA kernels behind it; what compiles, builds or starts other processes is the same for every kernel.
PYTHON_TESTS = (
    "test_composition.py",
    "test_cross_entropy.py",
    "test_cross_entropy_autograd.py",
    "test_cross_entropy_grid.py",
    "test_cross_entropy_masked.py",
    "test_cuda_rules.py",
    "test_errors.py",
    "test_linear.py",
    "test_loss_normalizer.py",
    "test_mask_arguments.py",
    "test_masked_fill.py",
    "test_masks.py",
    "test_opinfo.py",
    "test_pointwise.py",
    "test_pointwise_errors.py",
    "test_softmax.py",
    "test_reductions.py",
    "test_threads.py",
)


def launched_kernels(files):
    """Name -> how often, from what emulation::write_launches wrote."""
    counts, by_object = defaultdict(int), defaultdict(list)
    for file in files:
        for line in file.read_text().splitlines():
            path, offset, count = line.rsplit(" ", 2)
            by_object[path].append((int(offset, 16), int(count)))
    for path, offsets in by_object.items():
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        at = {int(line.split()[0], 16): line.split()[2] for line in symbols.splitlines() if len(line.split()) == 3}
        names = demangled([at[offset] for offset, _ in offsets])
        for offset, count in offsets:
            counts[names[at[offset]]] += count
    return counts


def check_launched(files):
    if not KERNELS.exists():
        print("skipped: nvcc has not said which kernels there are")
        return True
    counts = launched_kernels(files)
    kernels = KERNELS.read_text().splitlines()
    missing = [name for name in kernels if name not in counts]
    print(f"{len(kernels)} kernels, launched {sum(counts[name] for name in kernels)} times under the emulation")
    for name in missing:
        print(f"FAILED: never launched: {name}")
    return not missing


def emulate(build, pytest_arguments):
    tests = build / "tests" / "cuda_emulation"
    reason = tests / "skipped.txt"
    if reason.exists():
        print(f"skipped: {reason.read_text()}")
        return True
    # Without a sanitizer (masked_loss_kernel_tests) the same tests can tell nothing more.
    asan, tsan = programs = ["masked_loss_kernel_tests_asan", "masked_loss_kernel_tests_tsan"]
    bench = "masked_loss_kernel_bench"
    built = subprocess.run(["cmake", "--build", build, "--target", "masked_loss_emulated", bench, *programs])
    if built.returncode != 0:
        return False
    BUILD.mkdir(parents=True, exist_ok=True)
    for file in BUILD.glob("launches_*"):
        file.unlink()
    # ThreadSanitizer wants the addresses where it expects them.
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    python_tests = [ROOT / "tests" / "python" / name for name in PYTHON_TESTS]
    # The longest first, and on all cores: the others run beside it, one after the other.
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--emulated"]
    commands = {
        "pytest": [*pytest, *(pytest_arguments or python_tests)],
        tsan: [*fixed, tests / tsan, "--gtest_brief=1"],
        asan: [tests / asan, "--gtest_brief=1"],
        f"{bench} --shapes": [tests / bench, "--shapes", " fp32 "],
        bench: [tests / bench],
        f"{bench} --spoil": [tests / bench, "--spoil"],
    }
    environments = {
        "pytest": {
            "MASKED_LOSS_EMULATED": tests / "libmasked_loss_emulated.so",
            "MASKED_LOSS_LAUNCHES": BUILD / "launches_python",
            "OMP_NUM_THREADS": 1,
        },
        asan: {
            "ASAN_OPTIONS": "detect_stack_use_after_return=0",  # or it is 25 times slower
            "MASKED_LOSS_LAUNCHES": BUILD / "launches_cpp",
        },
    }

    def test(name):
        environment = {**os.environ, **{key: str(value) for key, value in environments.get(name, {}).items()}}
        start = time.monotonic()
        result = subprocess.run(
            list(map(str, commands[name])), capture_output=True, text=True, cwd=ROOT, env=environment
        )
        passed = result.returncode == 0
        output = (result.stdout + result.stderr).splitlines()
        (BUILD / f"{name}.log").write_text("\n".join(output))
        summary = next((line for line in reversed(output) if re.search(r"passed|PASSED|FAILED|failed|wrong", line)), "")
        print(f"{name}: {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s  {summary}", flush=True)
        if not passed:
            print("\n".join(output[-120:]), flush=True)
        return passed

    with ThreadPoolExecutor(2) as pool:
        passed = all(list(pool.map(test, commands)))
    return check_launched(BUILD.glob("launches_*")) and passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="*", default=["compile", "emulate"], help="compile, emulate, bench; the first two by default"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "package", help="CMake's build tree, configured")
    parser.add_argument("--architectures", default="sm_80,sm_90,sm_120")
    parser.add_argument("--pytest", default="", help="arguments for pytest, instead of the files that it runs else")
    arguments = parser.parse_args()
    passed = True
    if "compile" in arguments.what:
        print("== CUDA kernels, compiled by nvcc", flush=True)
        passed &= compile_all(arguments.architectures.split(","))
    if "emulate" in arguments.what:
        print("== CUDA kernels, emulated on the CPU", flush=True)
        passed &= emulate(arguments.build.resolve(), shlex.split(arguments.pytest))
    if "bench" in arguments.what:
        passed &= build_bench()
    return not passed


if __name__ == "__main__":
    sys.exit(main())
