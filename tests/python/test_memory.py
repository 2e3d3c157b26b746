"""The memory that is kept of freed outputs: how much at most, and that it is given back."""

import os
import subprocess
import sys

import pytest

import masked_loss

MEBI = 1 << 20

# Sizes of the process in MiB, of outputs that are made and freed.
TOOLS = """
import resource, sys
import masked_loss, torch

torch.set_num_threads(1)
mask = torch.zeros(1, dtype=torch.bool)

def output(mebi):
    return masked_loss.masked_fill(torch.zeros(1).expand(mebi << 18), mask, 0.0)

def size(of="VmSize"):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(of)) / 1024

output(1)
"""


@pytest.fixture(autouse=True)
def of_the_cpu(kernels):
    if kernels != "cpu":
        pytest.skip("of the CPU's memory")


def in_a_child(script, **environment):
    """What a script prints, as numbers, and what it warns of."""
    # Few arenas of malloc's, which count in the size.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-c", TOOLS + script], capture_output=True, encoding="utf-8", timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr
    return [float(word) for word in result.stdout.split()], result.stderr


def test_empty_cache():
    script = """
before = size(), size("VmRSS")
del (outputs := [output(100) for _ in range(3)])[:]
kept = size(), size("VmRSS")
masked_loss.empty_cache()
print(*before, *kept, size(), size("VmRSS"))
masked_loss.empty_cache()
output(100)
"""
    (size, resident, kept, resident_kept, after, resident_after), _ = in_a_child(script)
    assert kept > size + 290
    assert abs(after - size) < 10
    assert resident_kept > resident + 290
    assert abs(resident_after - resident) < 20


def test_without_anything_kept():
    assert masked_loss.empty_cache() is None


FREED = """
before = size()
outputs = [output({mebi}) for _ in range({count})]
del outputs
print(size() - before)
"""


@pytest.mark.parametrize(
    ("count", "mebi", "bound", "kept"),
    [
        (5, 300, None, 900),  # 1 GiB
        (5, 30, 100 * MEBI, 90),
        (3, 30, 0, 0),
        (5, 300, "much", 900),
        *(
            pytest.param(*row, marks=pytest.mark.thorough)  # a process each
            for row in (
                (7, 20, None, 80),  # four blocks
                (1, 1100, None, 0),  # larger than the bound
                (5, 30, 10**30, 120),
                (3, 30, 29 * MEBI, 0),
                (5, 300, "100MB", 900),
            )
        ),
    ],
)
def test_the_bound(count, mebi, bound, kept):
    environment = {} if bound is None else {"MASKED_LOSS_CACHE_BYTES": str(bound)}
    (grown,), warnings = in_a_child(FREED.format(count=count, mebi=mebi), **environment)
    assert abs(grown - kept) < 12
    invalid = bound is not None and not (isinstance(bound, int) and bound < 2**64)
    assert ("Ignoring invalid value for MASKED_LOSS_CACHE_BYTES" in warnings) == invalid


def test_the_last_freed_blocks_are_kept():
    script = """
del (large := [output(200) for _ in range(4)])[:]
before = size()
for _ in range(4):
    small = [output(10) for _ in range(4)]
    del small
print(size() - before)
"""
    (grown,), _ = in_a_child(script)
    assert grown < -4 * 190 + 40


def test_what_is_kept_makes_room():
    """Where the process may grow no further, its own outputs take the place of what is kept, and others after it is
    released.
    """
    script = """
del (outputs := [output(150) for _ in range(4)])[:]
limit = int((size() + 100) * 2**20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
large = output(400)
print(large.sum().item())
del large
try:
    torch.empty(350 << 18)
except RuntimeError:
    print(1)
masked_loss.empty_cache()
print(torch.zeros(350 << 18).sum().item())
"""
    printed, _ = in_a_child(script)
    assert [value for value in printed if value == 1] == [1.0]
    assert len(printed) == 3
