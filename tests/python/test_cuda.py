"""What only a GPU can show: the CPU's results, graphs, streams, memory, and sizes beyond 32 bits."""

import functools

import pytest
import torch
import torch.nn.functional as F

import grid
import masked_loss
import pointwise_grid
from masked_loss import causal_mask, cross_entropy, log_softmax, logsumexp, masked_fill, masked_fill_, softmax
from pointwise_grid import LOSSES, OPTIONS, WEIGHTED
from reference import FLOAT_TYPES, assert_near, assert_positive_zero, assert_same_bits, loss_and_gradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Bytes of a row: lanes, tiles of 32 to 512 threads, clusters, more than fits on chip
ROW_BYTES = (16, 120, 2000, 8000, 16000, 32000, 64000, 131072, 262144, 1_048_576)


@pytest.fixture(autouse=True)
def plain(check_values):
    """Tensors say their device; no default device, so that calls take the way that users' calls take."""
    check_values(False)
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


CASES = grid.covering_grid(grid.LEVELS)


@pytest.mark.parametrize("seed", range(len(CASES)), ids=[grid.case_id(case) for case in CASES])
def test_grid_is_as_on_the_cpu(seed):
    call = grid.build(CASES[seed], seed)
    arguments = {name: on("cuda", value) for name, value in call.arguments.items()}
    there = grid.Call(on("cuda", call.input), on("cuda", call.target), arguments, on("cuda", call.upstream))
    expected, gradients = grid.run(cross_entropy, call)
    loss, gradients_there = grid.run(cross_entropy, there)
    assert_near(loss.detach().cpu(), expected.detach())
    for leaf, gradient, gradient_there in zip(grid.leaves(call), gradients, gradients_there, strict=True):
        assert_near(gradient_there.cpu(), gradient, largest=grid.largest_term(leaf, call, CASES[seed]))


POINTWISE_CASES = grid.covering_grid(pointwise_grid.LEVELS)


@pytest.mark.parametrize("seed", range(len(POINTWISE_CASES)), ids=[grid.case_id(case) for case in POINTWISE_CASES])
def test_pointwise_grid_is_as_on_the_cpu(seed):
    call = pointwise_grid.build(POINTWISE_CASES[seed], seed)
    there = pointwise_grid.Call(
        call.name, {name: on("cuda", value) for name, value in call.arguments.items()}, on("cuda", call.upstream)
    )
    function = getattr(masked_loss, call.name)
    expected, gradients = pointwise_grid.run(function, call)
    loss, gradients_there = pointwise_grid.run(function, there)
    assert_near(loss.detach().cpu(), expected.detach(), largest=1.0)
    for name, gradient in gradients.items():
        assert_near(gradients_there[name].cpu(), gradient, largest=1.0 if name != "input" else 0.0)


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


# One block, several; lines of a whole number of 16 bytes and others; more chunks than there may be
@pytest.mark.parametrize("shape", [(3, 7), (70, 1000), (333, 1001), (5000, 4099)], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_pointwise_forms(name, dtype, shape):
    operands = {n: t.to("cuda", dtype) for n, t in pointwise_grid.operands(name, shape, OPTIONS[name][0]).items()}
    kept = torch.rand(shape, device="cuda") < 0.5
    for mask in (None, kept, kept[:, :1], kept[:1], kept.t().contiguous().t()):
        for shifted in (False, True):
            of = {n: unaligned(t) if shifted else t for n, t in operands.items()}
            arguments = {"mask": mask, "sample_weight": torch.rand(shape[0], 1, device="cuda") + 0.1}
            if name in WEIGHTED:
                arguments["weight"] = torch.rand(1, shape[1], device="cuda") + 0.1
            results = [pointwise_step(name, of, arguments) for _ in range(2)]
            for once, again in zip(*results, strict=True):
                assert_same_bits(once, again)
            wide = {n: t.double() for n, t in of.items()}
            expected = pointwise_step(name, wide, arguments)
            assert_near(results[0][0], expected[0], dtype, largest=1.0)
            assert_near(results[0][1], expected[1])
            if mask is not None:
                assert_positive_zero(results[0][1][~mask.expand(shape)])


SOFTMAXES = {softmax: torch.softmax, log_softmax: torch.log_softmax, logsumexp: torch.logsumexp}
# Classes: lanes; a warp, blocks of 128 to 512 threads, tiles of a row; not a multiple of 16 bytes
SOFTMAX_CLASSES = (7, 32, 300, 512, 1001, 2048, 4096, 8000, 16384, 50001, 1_000_000)

every_softmax = pytest.mark.parametrize("function", SOFTMAXES, ids=lambda f: f.__name__)


def softmax_step(function, x, upstream, *arguments, **options):
    """What the function gives, and the gradient."""
    leaf = x.detach().requires_grad_()
    result = function(leaf, *arguments, **options)
    return result.detach(), torch.autograd.grad(result, leaf, upstream.to(result.dtype))[0]


def upstream_of(function, x, dim=-1):
    return torch.randn_like(x if function is not logsumexp else x.select(dim, 0))


def assert_softmax(function, x, mask, dim=-1, **options):
    """As torch in float64 of the kept elements, twice the same bits, whatever lies at the masked ones."""
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    if options.get("causal"):
        keep = keep & causal_mask(*x.shape[-2:], device="cuda")
    upstream = upstream_of(function, x, dim)
    exact = x.double().masked_fill(~keep, -torch.inf).requires_grad_()
    expected = SOFTMAXES[function](exact, dim)
    some = keep.any(dim, keepdim=True)
    if function is softmax:
        expected = expected.masked_fill(~some, 0.0)
    elif function is log_softmax:
        expected = expected.masked_fill(~keep, 0.0)
    (wanted,) = torch.autograd.grad(expected, exact, upstream.double())
    wanted = wanted.masked_fill(~(keep & some), 0.0)
    outcomes = []
    for garbage in (torch.nan, torch.inf):
        given = upstream if function is logsumexp else upstream.masked_fill(~keep, garbage)
        outcomes.append(softmax_step(function, x.masked_fill(~keep, garbage), given, mask, dim, **options))
    for once, again in zip(*outcomes, strict=True):
        assert_same_bits(once, again)
    value, gradient = outcomes[0]
    if function is log_softmax:
        assert (value[~keep] == -torch.inf).all()
        value = value.masked_fill(~keep, 0.0)
    assert_near(value, expected)
    half = x.dtype in (torch.bfloat16, torch.float16)  # results are rounded before gradients are made of them
    terms = x.shape[dim] ** 0.5 if function is log_softmax else 1.0
    rounding = torch.finfo(x.dtype).eps / 2e-6 if half else 1.0
    assert_near(gradient, wanted, largest=upstream.abs().max().item() * rounding * terms)
    assert_positive_zero(gradient[~keep])


@every_softmax
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("classes", SOFTMAX_CLASSES)
def test_softmax_regime(function, classes, dtype):
    rows = max(2, min(3000, 2**22 // classes))
    x = (3 * torch.randn(rows, classes, device="cuda")).to(dtype)
    kept = torch.rand(rows, classes, device="cuda") < 0.6
    kept[1] = False
    for mask in (None, kept, kept[:, :1], kept[:1], kept.t().contiguous().t()):
        assert_softmax(function, x, mask)
    assert_softmax(function, unaligned(x), kept)


@every_softmax
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 40, 37), (2, 3, 600, 600), (2100, 2100), (10, 40000)], ids=str)
def test_softmax_causal(function, dtype, shape):
    x = torch.randn(shape, device="cuda").to(dtype)
    assert_softmax(function, x, None, causal=True)
    assert_softmax(function, x, torch.rand(shape[-1], device="cuda") < 0.6, causal=True)


@every_softmax
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((4, 100, 700), 1), ((300, 70), 0), ((2, 9, 5, 6), 2)], ids=str)
def test_softmax_of_inner_classes(function, dtype, shape, dim):
    x = torch.randn(shape, device="cuda").to(dtype)
    for mask in (None, torch.rand(shape, device="cuda") < 0.6, torch.rand(shape[-1:], device="cuda") < 0.6):
        assert_softmax(function, x, mask, dim)
        assert_softmax(function, x.transpose(0, -1).contiguous().transpose(0, -1), mask, dim)


def masked_product(function):
    """A loss of what a softmax gives, as graphs and streams are tested with."""

    def loss(x, target, mask):
        result = function(x, mask)
        return (result * target[:, 0] if function is logsumexp else masked_fill(result, ~mask, 0.0) * target).sum()

    return loss


REDUCTIONS = ("masked_sum", "masked_mean", "masked_var", "masked_std", "masked_whiten")
# Lines by one to 32 threads, by a block, in parts; columns by few threads and by many, in parts; both in several runs
REDUCED = [
    ((5, 16), 1),
    ((1000, 70), 1),
    ((3, 5001), 1),
    ((2, 300_000), 1),
    ((1_000_003,), None),
    ((5000, 3), 0),
    ((400, 130), 0),
    ((3000, 4096), 0),
    ((9, 50, 33), 1),
    ((8, 20, 7, 9), [0, 2, 3]),
]


@pytest.mark.parametrize(("shape", "dim"), REDUCED, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_forms(name, dtype, shape, dim):
    function = getattr(masked_loss, name)
    x = (torch.randn(shape, device="cuda") + 0.5).to(dtype)
    kept = torch.rand(shape, device="cuda") < 0.5
    kept.view(-1)[: kept.numel() // 4] = False
    for mask in (None, kept, kept[..., :1], kept[:1], kept.t().contiguous().t() if kept.dim() == 2 else kept):
        for tensor in (x, unaligned(x)):
            garbage = tensor if mask is None else tensor.masked_fill(~mask, float("nan"))
            upstream = torch.randn_like(function(x, mask, dim))
            results = [reduction_step(function, garbage, mask, dim, upstream) for _ in range(2)]
            for once, again in zip(*results, strict=True):
                assert_same_bits(once, again)
            on_cpu = [None if t is None else t.cpu() for t in (tensor.double(), mask, upstream.double())]
            expected = reduction_step(function, on_cpu[0], on_cpu[1], dim, on_cpu[2])
            size = 10.0 if name != "masked_sum" else 10.0 * (x.numel() / max(upstream.numel(), 1)) ** 0.5
            assert_near(results[0][0].cpu(), expected[0], largest=size)
            assert_near(results[0][1].cpu(), expected[1], largest=10.0)
            if mask is not None:
                assert_positive_zero(results[0][1][~mask.expand(shape)])


def reduction_step(function, x, mask, dim, upstream):
    leaf = x.detach().requires_grad_()
    value = function(leaf, mask, dim)
    return value.detach(), *torch.autograd.grad(value, leaf, upstream)


def unaligned(tensor):
    """The same values one element behind a multiple of 16 bytes."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def pointwise_step(name, operands, arguments):
    leaf = operands["input"].detach().requires_grad_()
    loss = getattr(masked_loss, name)(**{**operands, "input": leaf}, **arguments)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("classes", [50, 5000])
def test_a_graph_captures_a_training_step(classes):
    x, target, mask = problem(256, classes)
    refill = functools.partial(target.random_, 0, classes)
    check_graph(functools.partial(cross_entropy, label_smoothing=0.1), x, target, mask, refill)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_captures_a_training_step_of(name, reduction):
    operands = {n: t.to("cuda") for n, t in pointwise_grid.operands(name, (256, 300), {}).items()}
    var = {"var": operands["var"]} if "var" in operands else {}
    function = functools.partial(getattr(masked_loss, name), **var, reduction=reduction)
    mask = torch.rand(256, 1, device="cuda") < 0.7

    def refill():
        for n, t in pointwise_grid.operands(name, (256, 300), {}).items():
            operands[n].copy_(t)

    check_graph(function, operands["input"], operands["target"], mask, refill)


@every_softmax
def test_a_graph_captures_a_step_of_softmax(function):
    x, target = torch.randn(2, 256, 300, device="cuda")
    mask = torch.rand(256, 300, device="cuda") < 0.7
    mask[:, 0] = True

    def loss(x, target, mask):
        return masked_product(function)(x, target, torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1))

    check_graph(loss, x, target, mask, target.normal_)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_graph_captures_a_training_step_of_a_reduction(name):
    def function(x, target, mask):
        return (getattr(masked_loss, name)(x, mask, 1) * target).sum()

    x, target = torch.randn(256, 300, device="cuda"), torch.randn((), device="cuda")
    check_graph(function, x, target, torch.rand(256, 300, device="cuda") < 0.7, lambda: target.fill_(0.5))


def check_graph(function, x, target, mask, refill):
    """A step that was captured, replayed on other data, does what a call does."""
    x.requires_grad_()

    def step():
        x.grad = None
        loss = function(x, target, mask)
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
    for _ in range(2):  # another number of rows is kept
        with torch.no_grad():
            x.copy_(x[torch.randperm(len(x), device="cuda")])
            refill()
        mask.copy_(torch.rand(mask.shape, device="cuda") < 0.5)
        graph.replay()
        expected = loss_and_gradient(function, x.detach(), target, mask)
        assert_same_bits(loss.detach(), expected[0])
        assert_same_bits(captured, expected[1])


@pytest.mark.parametrize(
    "function",
    [cross_entropy, masked_loss.mse_loss, masked_loss.huber_loss, masked_product(softmax), masked_product(log_softmax)],
)
def test_two_streams(function):
    if function is cross_entropy:
        problems = [problem(2000, 3000) for _ in range(2)]
    else:
        problems = [(*torch.randn(2, 2000, 3000, device="cuda"), problem(2000, 1)[2][:, None]) for _ in range(2)]
    expected = [loss_and_gradient(function, *each) for each in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(10):
        for stream, each, outcomes in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                outcomes.append(loss_and_gradient(function, *each))
    torch.cuda.synchronize()
    for outcomes, (loss, gradient) in zip(results, expected, strict=True):
        for outcome in outcomes:
            assert_same_bits(outcome[0], loss)
            assert_same_bits(outcome[1], gradient)


def test_nothing_waits_for_the_device():
    x, target, mask = problem(100, 1000)
    loss_and_gradient(cross_entropy, x, target, mask)
    pointwise = {}
    for name in LOSSES:
        pointwise[name] = {n: t.to("cuda") for n, t in pointwise_grid.operands(name, (100, 1000), {}).items()}
        pointwise[name]["input"].requires_grad_()
    upstream, normalizer = torch.ones(100, 1000, device="cuda"), torch.tensor(9.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaf = x.requires_grad_()
        for reduction in ("mean", "sum", "sequence_mean"):
            cross_entropy(leaf, target, mask, reduction=reduction).backward()
        cross_entropy(leaf, target, mask, reduction="none").backward(torch.ones(100, device="cuda"))
        masked_fill(leaf, mask[:, None], 1.0).backward(x.detach())
        for function in SOFTMAXES:
            for options in (dict(mask=mask[:, None]), dict(causal=True), dict(dim=0)):
                dim = options.get("dim", -1)
                function(leaf, **options).backward(upstream if function is not logsumexp else upstream.select(dim, 0))
        for name, arguments in pointwise.items():
            function = functools.partial(getattr(masked_loss, name), **arguments, mask=mask[:, None])
            for reduction in ("mean", "sum", "sequence_mean"):
                function(reduction=reduction).backward()
            function(reduction="none").backward(upstream)
            function(normalizer=normalizer).backward()
        for name in REDUCTIONS:
            for dim in (None, 0, 1):
                getattr(masked_loss, name)(leaf, mask[:, None], dim).sum().backward()
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


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_the_gradients(name, reduction):
    operands = {n: t.to("cuda", torch.bfloat16) for n, t in pointwise_grid.operands(name, (2000, 8000), {}).items()}
    leaves = [operands[n].requires_grad_() for n in ("input", "var") if n in operands]
    masks = [torch.rand(sizes, device="cuda") < 0.5 for sizes in ((2000, 8000), (2000, 1))]
    for mask in masks:
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(masked_loss, name)(**operands, mask=mask, reduction=reduction).backward()
        extra = torch.cuda.max_memory_allocated() - before
        assert extra < 1.05 * sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["mask", "causal"])
@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_memory_of_softmax_is_the_result_and_the_gradient(function, options):
    x = torch.randn(4, 2000, 2000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    mask = None if options else torch.rand(4, 1, 2000, device="cuda") < 0.5
    function(x, mask, **options).backward(upstream)
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(x, mask, **options).backward(upstream)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 2.05 * x.nbytes


@pytest.mark.parametrize(("shape", "dim"), [((2**15 + 1, 2**16), 1), ((2**15 + 1, 2**16), 0), ((3, 2**30 - 1), 1)])
def test_softmax_of_more_than_2_to_the_31_elements(shape, dim):
    needed = 4 * 2 * shape[0] * shape[1]
    if torch.cuda.mem_get_info()[0] < 1.3 * needed:
        pytest.skip(f"needs {1.3 * needed / 2**30:.0f} GiB of free memory")
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    result = log_softmax(x, None, dim)
    result.backward(upstream)
    lines = [tensor.detach().movedim(dim, -1) for tensor in (x, upstream, result, x.grad)]
    for r in (0, len(lines[0]) - 1):
        given, of_upstream, value, gradient = (line[r] for line in lines)
        at = torch.randint(len(given), (1000,), device="cuda")
        at[0] = len(given) - 1
        lse = torch.logsumexp(given.float(), 0).double()
        assert_near(value[at], given[at].double() - lse)
        total = of_upstream.sum(dtype=torch.float64)
        expected = of_upstream[at].double() - value[at].double().exp() * total
        assert_near(gradient[at], expected, largest=len(given) ** 0.5)


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_memory_of_a_sum_is_its_gradient(dim):
    x = torch.randn(4000, 8000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.rand(x.shape, device="cuda") < 0.5
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masked_loss.masked_sum(x, mask, dim).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.15 * x.nbytes


@pytest.mark.parametrize("shape", [(2**31 + 77,), (2**16 + 1, 2**15 + 3)], ids=str)
def test_reductions_of_more_than_2_to_the_31_elements(shape):
    n = torch.Size(shape).numel()
    if torch.cuda.mem_get_info()[0] < 1.3 * 5 * n:
        pytest.skip(f"needs {1.3 * 5 * n / 2**30:.0f} GiB of free memory")
    x = torch.ones(shape, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(shape, device="cuda", dtype=torch.bool)
    mask.view(-1)[[0, 5, 2**31 - 1, 2**31, n - 1]] = True
    leaf = x.requires_grad_()
    masked_loss.masked_mean(leaf, mask).backward()
    assert leaf.grad.count_nonzero() == 5
    assert masked_loss.masked_sum(x.detach(), mask, 0).sum() == 5
    assert masked_loss.masked_var(x.detach(), mask) == 0


def test_pointwise_of_more_than_2_to_the_31_elements():
    n = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 1.3 * 7 * n:
        pytest.skip(f"needs {1.3 * 7 * n / 2**30:.0f} GiB of free memory")
    x = torch.ones(n, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(n, device="cuda", dtype=torch.bool)
    at = torch.tensor([0, 5, 2**31 - 1, 2**31, n - 1], device="cuda")
    mask[at] = True
    x[at] = torch.arange(1.0, 6.0, device="cuda", dtype=torch.bfloat16)
    leaf = x.requires_grad_()
    loss = masked_loss.mse_loss(leaf, torch.zeros((), device="cuda", dtype=torch.bfloat16).expand(n), mask)
    loss.backward()
    assert loss == 11  # (1 + 4 + 9 + 16 + 25) / 5
    assert_near(leaf.grad[at], 2 * torch.arange(1.0, 6.0, device="cuda", dtype=torch.float64) / 5)
    assert leaf.grad.count_nonzero() == 5


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


def test_a_target_out_of_range_is_nan_by_torchs_ops_too():
    x = torch.randn(3, 5, device="cuda", requires_grad=True)
    target = torch.tensor([0, 99, 2], device="cuda")
    weight = torch.rand(3, device="cuda", requires_grad=True)
    for options in ({}, {"sample_weight": weight, "weight": torch.rand(5, device="cuda")}):
        loss = cross_entropy(x, target, **options)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.cuda.synchronize()
        assert loss.isnan()
        assert gradient[1].isnan().all()
