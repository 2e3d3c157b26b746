"""Where the kernels under test run: those of the CPU, of a GPU, or those of a GPU emulated on the CPU."""

import ctypes
import os
import random
import sys
import zlib
from pathlib import Path

import pytest
import torch

import masked_loss  # registers the kernels that the emulated ones replace

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path("tests", "cuda_emulation", "libmasked_loss_emulated.so")


def require(device):
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: this torch finds no GPU")


def library():
    """Ours, as ctypes has it."""
    (path,) = Path(masked_loss.__file__).parent.glob("lib*/libmasked_loss.so")
    return ctypes.CDLL(str(path))


class Emulation:
    """The library of emulated kernels, loaded in the place of the CPU's."""

    def __init__(self, seed):
        self.seed = seed
        path = Path(os.environ.get("MASKED_LOSS_EMULATED", ROOT / "build" / "package" / LIBRARY))
        if not path.exists():
            raise pytest.UsageError(f"--emulated: there is no {path}: `make emulated` builds it")
        sys.stderr.flush()
        stderr, silence = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)  # torch warns that kernels are replaced, which is the point
        try:
            self.library = ctypes.CDLL(str(path))
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(silence)
        self.library.masked_loss_emulated_set.argtypes = (ctypes.c_uint, ctypes.c_uint, ctypes.c_int, ctypes.c_int)
        self.library.masked_loss_emulated_write_launches.argtypes = (ctypes.c_char_p,)

    def begin(self, test):
        """A schedule and a device for a test, the same ones each time that it runs with this seed."""
        if self.seed == 0:
            self.library.masked_loss_emulated_set(0, 1, 3, 90)
            return
        draw = random.Random(zlib.crc32(f"{self.seed} {test}".encode()))
        schedule, resident_blocks = draw.randrange(1, 2**32), draw.choice((1, 2, 4))
        # Compiled for GPUs with clusters, or without.
        ptx_version = 90 if draw.random() < 0.7 else 80
        self.library.masked_loss_emulated_set(schedule, resident_blocks, draw.choice((1, 3, 8)), ptx_version)

    def write_launches(self):
        """A file for each process: pytest-xdist's workers end at the same time."""
        if path := os.environ.get("MASKED_LOSS_LAUNCHES"):
            self.library.masked_loss_emulated_write_launches(f"{path}.{os.getpid()}".encode())


# The beginnings of names of tests that cannot apply, and why.
CPU_ALONE = {
    "test_cross_entropy.py::test_every_instruction_set": "of the CPU's kernels",
    "test_cross_entropy.py::test_huge_pages": "of the CPU's memory",
    "test_pointwise.py::test_every_instruction_set": "of the CPU's kernels",
    "test_softmax.py::test_every_instruction_set": "of the CPU's kernels",
    "test_softmax.py::test_huge_pages": "of the CPU's memory",
    "test_reductions.py::test_every_instruction_set": "of the CPU's kernels",
    "test_threads.py::test_other_threads_run_during_a_call": "takes calls that take the CPU long",
}


def left_out(kernels):
    return {} if kernels == "cpu" else CPU_ALONE
