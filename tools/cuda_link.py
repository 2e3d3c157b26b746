#!/usr/bin/env python3
"""Builds the package against a CUDA build of the oldest torch, on a machine without a GPU, imports it and tests it.

That torch goes into an environment of its own, without the CUDA libraries that it depends on: empty stand-ins take
their places, which is enough to import it. No kernel runs; every op is shown to have its CUDA kernel. What depends on
torch's version is tested with the CPU's kernels.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

from check_cuda import nvcc, toolkit

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda-link"
VENV = BUILD / "venv"
PYTHON = VENV / "bin" / "python"
TORCH = "torch==2.11.0"
ARCHITECTURES = "9.0"
# Errors and special values of each op, and what autograd and the compiler do with one.
TESTS = ("test_special_values.py", "test_errors.py", "test_composability.py")
CHOSEN = (
    "test_special_values or test_errors or test_value or test_gradients or test_export"
    " or (test_another_size and automatic)"
)

# What the symbols of a library that is not there begin with.
PREFIXES = {
    "libcublas": r"cublas(?!Lt)",
    "libcublasLt": "cublasLt",
    "libcudnn": "cudnn",
    "libcufft": "cufft",
    "libcufile": "cuFile|cufile",
    "libcupti": "cupti",
    "libcurand": "curand",
    "libcusolver": "cusolver",
    "libcusparse": r"cusparse(?!Lt)",
    "libcusparseLt": "cusparseLt",
    "libnccl": "nccl",
    "libnvJitLink": "nvJit|__nvJit",
    "libnvrtc": "nvrtc",
    "libnvshmem_host": "nvshmem",
}

SHOW_OPS = """
import torch, masked_loss
from masked_loss import _build

x, target = torch.randn(3, 5), torch.tensor([0, 1, 9])
loss = masked_loss.cross_entropy(x, target, torch.tensor([1, 1, 0]))
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x[:2], target[:2]))
schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("masked_loss::")]
names = sorted({".".join(filter(None, (s.name, s.overload_name))) for s in schemas})
missing = []
for name in names:
    own = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    composite = torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA")
    print(f"{name:45}", "CUDA kernel" if own else "of other ops" if composite else "MISSING")
    if not own and not composite:
        missing.append(name)
assert names and not missing, missing
print(f"torch {torch.__version__}, kernels for {_build.cuda_architectures}: imported, the CPU's ops run")
"""


def skip(reason):
    print(f"skipped: {reason}")
    sys.exit(0)


def run(*command, **options):
    subprocess.run([str(word) for word in command], check=True, **options)


def install_torch():
    """The folder of a torch with CUDA, kept from run to run."""
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", VENV)
    packages = Path(
        subprocess.check_output(
            [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    if not (packages / "torch").exists():
        print(f"installing {TORCH} into {VENV.relative_to(ROOT)}", flush=True)
        command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", TORCH]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if result.returncode != 0:
            skip(f"{TORCH} cannot be installed: {result.stderr.strip().splitlines()[-1]}")
    # Behind its own packages, those of this interpreter: what torch imports, and what builds.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not (packages / "torch" / "lib" / "libtorch_cuda.so").exists():
        skip(f"the {TORCH} of the package index is built without CUDA")
    return packages / "torch"


def symbols_of(libraries):
    """Version -> undefined symbols."""
    undefined = defaultdict(set)
    for library in libraries:
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout
        for line in listed.splitlines():
            symbol, _, version = line.split()[-1].partition("@")
            undefined[version.lstrip("@")].add(symbol)
    return undefined


def make_stand_ins(torch, there):
    """Libraries for those that torch needs and this machine lacks, with functions that abort."""
    folder = BUILD / "stand-ins"
    folder.mkdir(parents=True, exist_ok=True)
    libraries = list((torch / "lib").glob("*.so"))
    have = {path.name for path in [*libraries, *there.iterdir()]} | {path.name for path in (torch / "lib").iterdir()}
    needed = set()
    for library in libraries:
        listed = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True).stdout
        needed |= set(re.findall(r"NEEDED.*\[(.*?)\]", listed))
    undefined = symbols_of(libraries)
    for name in sorted(needed - have):
        prefix = PREFIXES.get(name.partition(".so")[0])
        if prefix is None or (folder / name).exists():
            continue
        versions = {v: {s for s in symbols if re.match(prefix, s)} for v, symbols in undefined.items()}
        versions = {
            v: symbols for v, symbols in versions.items() if symbols and (v in ("", name) or not v.startswith("lib"))
        }
        source, script = folder / "stand_in.c", folder / "stand_in.map"
        functions = sorted(set().union(*versions.values()))
        source.write_text("#include <stdlib.h>\n" + "".join(f"void {f}(void) {{ abort(); }}\n" for f in functions))
        flags = [f"-Wl,-soname,{name}"]
        if any(versions):
            exports = (
                f"{v} {{ global: {' '.join(s + ';' for s in sorted(of))} }};\n" for v, of in versions.items() if v
            )
            script.write_text("".join(exports))
            flags.append(f"-Wl,--version-script={script}")
        run("gcc", "-shared", "-fPIC", "-w", "-fno-builtin", *flags, "-o", folder / name, source)
    return folder


def build_package(compiler):
    package = BUILD / "package" / "masked_loss"
    shutil.copytree(ROOT / "python" / "masked_loss", package, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("lib", "include", "_C*.so", "_build.py", "__pycache__"))  # fmt: skip
    options = {
        "MASKED_LOSS_CUDA": "on",
        # How fast it is does not matter.
        "CMAKE_BUILD_TYPE": "Check",
        "CMAKE_CXX_FLAGS_CHECK": "-O1 -DNDEBUG",
        "Python_EXECUTABLE": PYTHON,
        "CMAKE_INSTALL_PREFIX": package,
        "CMAKE_INSTALL_LIBDIR": "lib",
        "TORCH_CUDA_ARCH_LIST": ARCHITECTURES,
    }
    # No kernel of this build runs: what nvcc makes of them when it optimises is for check_cuda.py to see.
    if "--Ofast-compile" in subprocess.run([compiler, "--help"], capture_output=True, text=True).stdout:
        options["CMAKE_CUDA_FLAGS"] = "--Ofast-compile=max"
    flags = [f"-D{name}={value}" for name, value in options.items()]
    (BUILD / "build" / "CMakeCache.txt").unlink(missing_ok=True)
    with (BUILD / "build.log").open("w") as log:
        configure = ["cmake", "-S", ROOT, "-B", BUILD / "build", "-G", "Ninja", *flags]
        make = ["cmake", "--build", BUILD / "build", "--target", "install", "-j", os.cpu_count()]
        environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
        for command in (configure, make):
            result = subprocess.run(list(map(str, command)), stdout=log, stderr=log, env=environment)
            if result.returncode != 0:
                print("\n".join((BUILD / "build.log").read_text().splitlines()[-60:]))
                sys.exit(1)
    return package.parent


def main():
    compiler = nvcc()
    if compiler is None:
        skip("nvcc is not found")
    BUILD.mkdir(parents=True, exist_ok=True)
    torch = install_torch()
    headers = toolkit(compiler)
    libraries = next(path for path in (headers.parent / "lib64", headers.parent / "lib") if path.exists())
    stand_ins = make_stand_ins(torch, libraries)
    path = build_package(compiler)
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{stand_ins}:{libraries}", "PYTHONPATH": str(path)}
    run(PYTHON, "-c", SHOW_OPS, env=environment, cwd=BUILD)
    tests = [ROOT / "tests" / "python" / name for name in TESTS]
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", "-m", "not slow and not thorough"]
    run(*pytest, *tests, "-k", CHOSEN, env=environment | {"OMP_NUM_THREADS": "1"}, cwd=BUILD)


if __name__ == "__main__":
    main()
