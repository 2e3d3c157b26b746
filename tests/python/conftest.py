"""Fixtures that every test module shares, and where the kernels run: on the CPU, on a GPU or under the emulation."""

import ctypes
import os
import tempfile
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import backends


def pytest_addoption(parser):
    group = parser.getgroup("masked_loss")
    group.addoption("--device", default="cpu", help="where the tests make their tensors, as cuda")
    group.addoption("--emulated", action="store_true", help="run the CUDA kernels, emulated on the CPU")
    group.addoption("--emulated-seed", type=int, default=1, help="of the order of threads; 0: that of their indices")


def kernels_of(config):
    return "emulated" if config.getoption("--emulated") else config.getoption("--device").partition(":")[0]


def pytest_configure(config):
    device = config.getoption("--device")
    if kernels_of(config) != "cpu":
        os.environ["MASKED_LOSS_CHECK"] = "1"  # the same IndexErrors as on the CPU; test_cuda_rules.py goes without
    # torch finds a compiled program by the ops it was traced from, whatever these did when it was compiled: programs of
    # another build of this library are none of ours. pytest-xdist's workers inherit it.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        config.programs = tempfile.TemporaryDirectory(prefix="masked_loss_inductor_", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.programs.name
    # A compiler that starts processes of its own would only wait for pytest-xdist's.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if device != "cpu":
        backends.require(device)
        torch.set_default_device(device)
    if config.getoption("--emulated"):
        config.emulation = backends.Emulation(config.getoption("--emulated-seed"))


def pytest_collection_modifyitems(config, items):
    # What takes longest begins first, so that no core ends with it alone.
    first = ("TestCompiler", "test_composability.py")
    items.sort(
        key=lambda item: (item.get_closest_marker("slow") is None, *(name not in item.nodeid for name in first)),
    )
    left_out = backends.left_out(kernels_of(config))
    for item in items:
        reason = next(
            (reason for name, reason in left_out.items() if item.nodeid.split("/")[-1].startswith(name)), None
        )
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


LEFT = pytest.StashKey[Counter]()


def pytest_deselected(items):
    """Counts the tests that -m leaves out; of workers (pytest-xdist) each says the same."""
    left = items[0].config.stash.setdefault(LEFT, Counter())
    left.update(next((name for name in ("slow", "thorough") if item.get_closest_marker(name)), "") for item in items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT] = Counter(getattr(node, "workeroutput", {}).get("left", {}))


def pytest_terminal_summary(terminalreporter, config):
    left = {name: count for name, count in config.stash.get(LEFT, Counter()).items() if name}
    if left and config.option.markexpr:
        counts = " and ".join(f"{count} {name}" for name, count in sorted(left.items()))
        terminalreporter.write_line(f"Left to `make test-all`: {counts} tests.")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = dict(session.config.stash.get(LEFT, Counter()))
    emulation = getattr(session.config, "emulation", None)
    if emulation is not None:
        emulation.write_launches()


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(0)
    emulation = getattr(request.config, "emulation", None)
    if emulation is not None:
        emulation.begin(request.node.nodeid)


@pytest.fixture(scope="session")
def kernels(request):
    """Whose kernels run: cpu, cuda or emulated, which are those of cuda."""
    return kernels_of(request.config)


@pytest.fixture
def check_values(request):
    """`check_values(on)` is for a test what MASKED_LOSS_CHECK, which is read once, is for a process."""
    emulation = getattr(request.config, "emulation", None)
    library = backends.library() if emulation is None else emulation.library

    def check(on):
        library.masked_loss_check_values(ctypes.c_bool(on))

    yield check
    check(os.environ.get("MASKED_LOSS_CHECK") == "1")


@pytest.fixture
def threads():
    """`with threads(n):` runs its block on n threads."""

    @contextmanager
    def use(count):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return use


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
