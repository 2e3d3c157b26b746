#!/usr/bin/env python3
"""The tests on a GPU, of a package that has been built for it; `make test-cuda` does both.

--require alone says what is missing on this machine, or prints the GPU's architecture as TORCH_CUDA_ARCH_LIST has it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from check_cuda import PYTHON_TESTS, nvcc

ROOT = Path(__file__).resolve().parents[1]
PYTHON_DIR = ROOT / "tests" / "python"
TESTS = ("test_cuda.py", "test_composability.py", "test_modules.py", *PYTHON_TESTS)
# What the sanitizers run: every kind of kernel once.
SHORT = ("test_cuda.py", "-k", "regime or masked_fill_forms or pointwise_forms or reduction_forms")


def require():
    import torch

    missing = []
    if torch.version.cuda is None:
        missing.append(f"a CUDA build of torch: torch {torch.__version__} is built without")
    elif not torch.cuda.is_available():
        missing.append("a GPU that torch can use: torch.cuda.is_available() is False")
    if nvcc() is None:
        missing.append("nvcc: put it on the PATH, or set CUDA_HOME")
    if missing:
        print("\n".join(f"missing: {what}" for what in missing), file=sys.stderr)
        sys.exit(1)
    return "{}.{}".format(*torch.cuda.get_device_capability())


def sanitize(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(nvcc()).parent))
    if sanitizer is None:
        print(f"skipped: compute-sanitizer {tool}: it is not found")
        return True
    print(f"== compute-sanitizer {tool}", flush=True)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "--device", "cuda", str(PYTHON_DIR / SHORT[0]), *SHORT[1:]]
    # So that it sees each tensor's end, instead of torch's large blocks.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=environment).returncode == 0


def main():
    architecture = require()
    if "--require" in sys.argv:
        print(architecture)
        return 0
    print("== GoogleTest", flush=True)
    program = ROOT / "build" / "package" / "tests" / "cpp" / "masked_loss_tests"
    passed = subprocess.run([program, "--gtest_brief=1"]).returncode == 0
    print("== pytest --device cuda", flush=True)
    chosen = sys.argv[1:] or [str(PYTHON_DIR / name) for name in TESTS]
    passed &= subprocess.run([sys.executable, "-m", "pytest", "--device", "cuda", *chosen]).returncode == 0
    if len(sys.argv) == 1:
        passed &= sanitize("memcheck")
        passed &= sanitize("racecheck")
    return not passed


if __name__ == "__main__":
    sys.exit(main())
