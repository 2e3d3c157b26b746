"""What only a GPU can show: the CPU's results, graphs, streams, memory, and sizes beyond 32 bits."""

import pytest
import torch
import torch.nn.functional as F

import grid
from masked_loss import cross_entropy, masked_fill, masked_fill_
from reference import FLOAT_TYPES, assert_near, assert_positive_zero, assert_same_bits, loss_and_gradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Bytes of a row: lanes, tiles of 32 to 512 threads, clusters, more than fits on chip
ROW_BYTES = (16, 120, 2000, 8000, 16000, 32000, 64000, 131072, 262144, 1_048_576)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Tensors say their device; no default device, so that calls take the way that users' calls take."""
    monkeypatch.delenv("MASKED_LOSS_CHECK", raising=False)
    before = torch.get_default_device()
    torch.set_default_device(None)
    yield
    torch.set_default_device(before)


def problem(rows, classes, dtype=torch.float32, device="cuda"):
    x = torch.randn(rows, classes, device=device).to(dtype)
    return x, torch.randint(classes, (rows,), device=device), torch.rand(rows, device=device) < 0.7


def on(device, value):
    """A leaf there, where `value` is one."""
    return value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


CASES = grid.covering_grid({**grid.LEVELS, "target": (torch.int64, torch.int32)})


@pytest.mark.parametrize("seed", range(len(CASES)), ids=[grid.case_id(case) for case in CASES])
def test_grid_is_as_on_the_cpu(seed):
    call = grid.build(CASES[seed], seed)
    outcomes = []
    for device in ("cpu", "cuda"):
        x = on(device, call.input)
        arguments = {name: on(device, value) for name, value in call.arguments.items()}
        loss = cross_entropy(x, call.target.to(device), **arguments)
        leaves = [x, *(v for v in arguments.values() if isinstance(v, torch.Tensor))]
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        upstream = None if call.upstream is None else call.upstream.to(device)
        if upstream is None and loss.dim() > 0:
            upstream = torch.ones_like(loss)
        gradients = torch.autograd.grad(loss, leaves, upstream) if leaves else ()
        outcomes.append([value.detach().cpu() for value in (loss, *gradients)])
    for expected, actual in zip(*outcomes, strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_regime(row_bytes, rows, dtype):
    classes = row_bytes // dtype.itemsize - 1
    if rows * row_bytes > 2**28:
        pytest.skip("one size of the longest rows is enough")
    x, target, mask = problem(rows, classes, dtype)
    mask[0] = True
    loss, gradient = loss_and_gradient(cross_entropy, x, target, mask)
    expected = loss_and_gradient(F.cross_entropy, x[mask].double(), target[mask])
    assert_near(loss, expected[0], dtype)
    assert_near(gradient[mask], expected[1])
    assert_positive_zero(gradient[~mask])
    again = loss_and_gradient(cross_entropy, x, target, mask)
    assert_same_bits(loss, again[0])
    assert_same_bits(gradient, again[1])
    each = cross_entropy(x, target, mask, reduction="none")
    assert_near(each[mask], F.cross_entropy(x[mask].double(), target[mask], reduction="none"), dtype)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_regime_of_inner_classes(dtype):
    x = torch.randn(4, 100, 700, device="cuda").to(dtype)
    target = torch.randint(100, (4, 700), device="cuda")
    loss, gradient = loss_and_gradient(cross_entropy, x, target)
    expected = loss_and_gradient(F.cross_entropy, x.double(), target)
    assert_near(loss, expected[0], dtype)
    assert_near(gradient, expected[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128], ids=str)
@pytest.mark.parametrize("mask_shape", [(300, 1000), (300, 1), (1, 1000)], ids=str)
def test_masked_fill_forms(mask_shape, dtype):
    x = (9 * torch.randn(300, 1000, device="cuda")).to(dtype)
    mask = torch.rand(mask_shape, device="cuda") < 0.5
    for tensor in (x, x.t().contiguous().t(), x[:, 1:].clone()[:, :-1]):
        m = mask.expand(x.shape)[:, : tensor.shape[1]]
        assert_same_bits(masked_fill(tensor, m, 3), tensor.masked_fill(m, 3))
        assert_same_bits(masked_fill_(tensor.clone(), m, 3), tensor.masked_fill(m, 3))


@pytest.mark.parametrize("classes", [50, 5000])
def test_a_graph_captures_a_training_step(classes):
    x, target, mask = problem(256, classes)
    x.requires_grad_()

    def step():
        x.grad = None
        loss = cross_entropy(x, target, mask, label_smoothing=0.1)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = x.grad
    for _ in range(2):  # with other data, and another number of kept rows
        with torch.no_grad():
            x.normal_()
        target.random_(0, classes)
        mask.copy_(torch.rand(256, device="cuda") < 0.5)
        graph.replay()
        expected = loss_and_gradient(cross_entropy, x.detach(), target, mask, label_smoothing=0.1)
        assert_same_bits(loss.detach(), expected[0])
        assert_same_bits(captured, expected[1])


def test_two_streams():
    problems = [problem(2000, 3000) for _ in range(2)]
    expected = [loss_and_gradient(cross_entropy, *each) for each in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(10):
        for stream, each, outcomes in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                outcomes.append(loss_and_gradient(cross_entropy, *each))
    torch.cuda.synchronize()
    for outcomes, (loss, gradient) in zip(results, expected, strict=True):
        for outcome in outcomes:
            assert_same_bits(outcome[0], loss)
            assert_same_bits(outcome[1], gradient)


def test_nothing_waits_for_the_device():
    x, target, mask = problem(100, 1000)
    loss_and_gradient(cross_entropy, x, target, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaf = x.requires_grad_()
        for reduction in ("mean", "sum", "sequence_mean"):
            cross_entropy(leaf, target, mask, reduction=reduction).backward()
        cross_entropy(leaf, target, mask, reduction="none").backward(torch.ones(100, device="cuda"))
        masked_fill(leaf, mask[:, None], 1.0).backward(x.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_one_gradient():
    x, target, mask = problem(2048, 32000, torch.bfloat16)
    x.requires_grad_()
    cross_entropy(x, target, mask).backward()
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cross_entropy(x, target, mask).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.05 * x.nbytes


@pytest.mark.parametrize(("rows", "classes"), [(2**15 + 1, 2**16), (3, 2**30)], ids=str)
def test_more_than_2_to_the_31_elements(rows, classes):
    needed = 2 * 2 * rows * classes
    if torch.cuda.mem_get_info()[0] < 1.3 * needed:
        pytest.skip(f"needs {1.3 * needed / 2**30:.0f} GiB of free memory")
    x = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(classes, (rows,), device="cuda")
    leaf = x.requires_grad_()
    loss = cross_entropy(leaf, target, reduction="sum")
    loss.backward()
    few = [0, rows // 2, rows - 1]
    for r in few:
        row = x.detach()[r : r + 1].float().requires_grad_()
        F.cross_entropy(row, target[r : r + 1]).backward()
        assert_near(leaf.grad[r : r + 1], row.grad.double())


def test_the_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, target, mask = problem(50, 100, device="cuda:1")
    loss = cross_entropy(x, target, mask)
    assert loss.device == x.device
    assert_near(loss.cpu(), cross_entropy(x.cpu(), target.cpu(), mask.cpu()))
