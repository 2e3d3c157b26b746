"""softmax, log_softmax and logsumexp: torch's of what is kept, whatever lies elsewhere."""

import functools
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from grid import in_bytes
from masked_loss import causal_mask, log_softmax, logsumexp, sequence_mask, softmax
from reference import ABSOLUTE, FLOAT_TYPES, assert_near, assert_positive_zero, assert_same_bits, is_kept

FUNCTIONS = (softmax, log_softmax, logsumexp)
THEIRS = {softmax: torch.softmax, log_softmax: torch.log_softmax, logsumexp: torch.logsumexp}
# What a slice with nothing kept, and a masked element, are.
MASKED = {softmax: 0.0, log_softmax: -math.inf, logsumexp: -math.inf}

every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)


def kept_by(shape, mask, causal):
    keep = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        keep &= is_kept(mask)
    return keep & causal_mask(*shape[-2:]) if causal else keep


def expected_of(function, x, keep, dim):
    """torch's, in float64, of the kept elements of each slice alone."""
    if x.dim() == 0:
        return expected_of(function, x.view(1), keep.view(1), 0).view(())
    lines, kept = x.double().movedim(dim, -1), keep.movedim(dim, -1)
    rows = []
    for line, chosen in zip(lines.reshape(-1, lines.shape[-1]), kept.reshape(-1, kept.shape[-1]), strict=True):
        result = THEIRS[function](line[chosen], 0)
        if function is not logsumexp:
            result = torch.full(line.shape, MASKED[function], dtype=torch.float64).masked_scatter(chosen, result)
        rows.append(result)
    if function is logsumexp:
        return torch.stack(rows).view(lines.shape[:-1])
    return torch.stack(rows).view(lines.shape).movedim(-1, dim)


def value_and_gradient(function, x, upstream, *arguments, **options):
    leaf = x.detach().requires_grad_()
    result = function(leaf, *arguments, **options)
    return result.detach(), torch.autograd.grad(result, leaf, upstream.to(result.dtype))[0]


def assert_right(function, x, mask=None, dim=-1, causal=False):
    """Values and gradients, with NaN wherever nothing may be read; the numbers."""
    keep = kept_by(x.shape, mask, causal)
    given = x.masked_fill(~keep, math.nan)
    shape = [size for d, size in enumerate(x.shape) if function is not logsumexp or d != dim % len(x.shape)]
    upstream = torch.randn(shape).to(x.dtype)
    upstream_given = upstream if function is logsumexp else upstream.masked_fill(~keep, math.nan)
    value, gradient = value_and_gradient(function, given, upstream_given, mask, dim, causal=causal)
    safe = x.masked_fill(~keep, 0.0).double().requires_grad_()
    expected = expected_of(function, safe, keep, dim)
    (wanted,) = torch.autograd.grad(expected, safe, upstream.double(), materialize_grads=True, allow_unused=True)
    wanted = wanted.masked_fill(~keep, 0.0)
    assert value.dtype == gradient.dtype == x.dtype
    assert_near(value, expected)
    assert_near(gradient, wanted, largest=upstream.abs().max().item() * rounding_of(function, x, dim))
    if function is not logsumexp:
        assert (value[~keep] == MASKED[function]).all()
    assert_positive_zero(gradient[~keep])
    return value, gradient


def rounding_of(function, x, dim):
    """The gradients are made from a result that was rounded: how many times larger their error may be."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    per_term = torch.finfo(x.dtype).eps / ABSOLUTE[x.dtype] if half else 1.0
    terms = x.shape[dim] if x.dim() > 0 else 1
    return per_term * (terms**0.5 if function is log_softmax else 1.0)


# (shape, dim): what path of the kernels
SHAPES = [
    ((), 0),  # 0-d
    ((1,), 0),  # a single class
    ((7,), -1),  # shorter than a vector
    ((3, 17), -1),  # a vector and a part
    ((2, 3, 33), -1),  # rows that begin anywhere in a line
    ((3, 4500), -1),  # several blocks, the last of them a part
    ((3, 6, 5), 1),  # lanes of several parts
    ((5, 40, 70), 0),  # lanes beside one another
    ((2, 3, 4, 50), 2),
    ((2, 300, 1200), 1),  # lanes fill the L2 cache
]


def masks_of(shape, dim):
    """None, dense ones, some that broadcast, integers, bytes, strided ones, and one that keeps nothing."""
    yield "none", None
    yield "dense", torch.rand(shape) < 0.6
    yield "nothing", torch.zeros(shape, dtype=torch.bool)
    yield "everything", torch.ones(shape, dtype=torch.bool)
    if len(shape) > 0:
        yield "last dimension", torch.rand(shape[-1:]) < 0.6
        yield "slices", torch.rand([1 if d == dim % len(shape) else size for d, size in enumerate(shape)]) < 0.6
        yield "int64", torch.randint(0, 2, shape)
        yield "bytes", in_bytes(torch.rand(shape) < 0.6)
        yield (
            "runs",
            torch.arange(shape[dim])
            .sub(shape[dim] // 2)
            .abs()
            .lt(shape[dim] // 4 + 1)
            .view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]),
        )
    if len(shape) > 1:
        yield "transposed", (torch.rand(shape[::-1]) < 0.6).permute(*reversed(range(len(shape))))
        yield "rank of rows", torch.rand(1, *shape[1:]) < 0.6


@every_function
@every_dtype
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_is_torchs_of_what_is_kept(function, dtype, shape, dim):
    slow = math.prod(shape) > 100_000
    for name, mask in masks_of(shape, dim):
        if slow and name not in ("none", "dense", "slices"):
            continue
        assert_right(function, (torch.randn(shape) * 3).to(dtype), mask, dim)


@every_function
@every_dtype
def test_causal(function, dtype):
    for shape in [(5, 5), (2, 40, 37), (2, 3, 8, 70), (1, 1), (3, 1), (4, 2100)]:
        x = torch.randn(shape).to(dtype)
        alone = assert_right(function, x, causal=True)
        upstream = torch.randn(alone[0].shape).to(dtype)
        without = value_and_gradient(function, x, upstream, causal=True)
        with_mask = value_and_gradient(function, x, upstream, causal_mask(*shape[-2:]))
        for ours, theirs in zip(without, with_mask, strict=True):
            assert_same_bits(ours, theirs)  # the mask says the same
        assert_right(function, x, torch.rand(shape) < 0.6, causal=True)
        assert_right(function, x, torch.rand(1, shape[-1]) < 0.6, causal=True)


@every_function
@pytest.mark.parametrize(("shape", "dim"), SHAPES[:-1], ids=str)
def test_bytes_of_masks_are_not_numbers(function, shape, dim):
    """By the kernels, and by the plain ops of forward mode."""
    x, keep = torch.randn(shape), torch.rand(shape) < 0.6
    upstream = torch.randn(function(x, None, dim).shape)
    for causal in (False, True) if len(shape) > 1 and dim == -1 else (False,):
        results = []
        for mask in (keep, in_bytes(keep)):
            of = functools.partial(function, mask=mask, dim=dim, causal=causal)
            results.append((*value_and_gradient(of, x, upstream), *torch.func.jvp(of, (x,), (x + 1,))))
        for plain, in_bytes_of_it in zip(*results, strict=True):
            assert_same_bits(in_bytes_of_it, plain)


def views(x):
    wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return {
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "every second": wide[..., ::2],
        "middle last": x.transpose(1, -1).contiguous().transpose(1, -1),
        "one row": x[:1].expand(x.shape),
    }


@every_function
@pytest.mark.parametrize("view", ["transposed", "every second", "middle last", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(function, view, dtype):
    x = torch.randn(4, 37, 50).to(dtype)
    strided = views(x)[view]
    mask = torch.rand(4, 37, 50) < 0.6
    for dim, chosen, causal in [(0, mask, False), (1, mask, False), (-1, views(mask)[view], False), (-1, None, True)]:
        shape = [n for d, n in enumerate(x.shape) if function is not logsumexp or d != dim % 3]
        for upstream in (torch.randn(shape).to(dtype), torch.randn(()).to(dtype).expand(shape)):
            ours = value_and_gradient(function, strided, upstream, chosen, dim, causal=causal)
            dense = value_and_gradient(
                function,
                strided.contiguous(),
                upstream.contiguous(),
                None if chosen is None else chosen.contiguous(),
                dim,
                causal=causal,
            )
            for a, b in zip(ours, dense, strict=True):
                assert_near(a, b.double(), largest=1.0)  # constant gradients cancel
            if function is not logsumexp:
                assert ours[0].stride() == torch.empty_like(strided).stride()


@every_function
@pytest.mark.parametrize("shape", [(700, 3001), (2, 700, 2000), (4, 3, 300, 300)], ids=str)
def test_threads_change_no_bit(function, shape, threads):
    x, mask = torch.randn(shape), torch.rand(shape) < 0.6
    for dim in (-1, 1):
        upstream = torch.randn(function(x, mask, dim).shape)
        results = []
        for count in (1, 3):
            with threads(count):
                results.append(value_and_gradient(function, x, upstream, mask, dim))
        for one, three in zip(*results, strict=True):
            assert_same_bits(one, three)


@every_function
@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_masked_changes_no_bit(function, dim, garbage):
    x, mask = torch.randn(3, 40, 50), torch.rand(3, 40, 50) < 0.6
    mask[1], mask[:, 3], mask[..., 2] = False, False, False
    upstream = torch.randn(function(x, mask, dim).shape)
    clean = value_and_gradient(function, x, upstream, mask, dim)
    dirty_upstream = upstream
    if function is not logsumexp:
        dirty_upstream = upstream.masked_fill(~mask, garbage)
    dirty = value_and_gradient(function, x.masked_fill(~mask, garbage), dirty_upstream, mask, dim)
    for a, b in zip(clean, dirty, strict=True):
        assert_same_bits(a, b)
    assert_positive_zero(dirty[1][~mask])
    if function is logsumexp:  # of slices with nothing kept
        empty = ~mask.any(dim)
        upstream[empty] = garbage
        assert_same_bits(value_and_gradient(function, x, upstream, mask, dim)[1], clean[1])


SPECIAL = [
    [math.nan, 1.0, 2.0],
    [math.inf, 1.0, 2.0],
    [math.inf, math.nan, 2.0],
    [-math.inf, 1.0, 2.0],
    [-math.inf, -math.inf, -math.inf],
    [3e38, -3e38, 0.0],
    [1000.0, 999.0, -1000.0],
]


@every_function
@every_dtype
@pytest.mark.parametrize("values", SPECIAL, ids=str)
@pytest.mark.parametrize("dim", [-1, 1])
def test_what_is_kept_propagates_as_in_torch(function, dtype, values, dim):
    """Alone, and with something masked beside it that stays what it is."""
    x = torch.tensor(values).to(dtype).repeat(4, 20, 1)  # [4, 20, 3]
    if dim == 1:
        x = x.transpose(1, 2).contiguous()
    along = torch.cat([x, torch.zeros_like(x)], dim)
    mask = torch.cat([torch.ones_like(x), torch.zeros_like(x)], dim).bool()
    mask[1] = False
    upstream = torch.randn(function(x, None, dim).shape).to(dtype)
    both = upstream if function is logsumexp else torch.cat([upstream, upstream], dim)
    value, gradient = value_and_gradient(function, along, both, mask, dim)
    theirs = functools.partial(THEIRS[function], dim=dim)
    expected, wanted = value_and_gradient(theirs, x[0].double()[None], upstream[0].double()[None])
    near = functools.partial(torch.testing.assert_close, equal_nan=True, rtol=2e-2, atol=2e-2)
    near(gradient[0].narrow(dim % 3 - 1, 0, x.shape[dim]).double(), wanted[0])
    if function is logsumexp:
        near(value[0].double(), expected[0].to(dtype).double())
        assert (value[1] == -math.inf).all()
    else:
        near(value[0].narrow(dim % 3 - 1, 0, x.shape[dim]).double(), expected[0].to(dtype).double())
        assert (value[~mask] == MASKED[function]).all()
    assert_positive_zero(gradient[~mask])


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_a_causal_row_of_nan_stops_where_it_ends(function):
    x = torch.randn(40, 40)
    x[7, 2] = math.nan
    value, gradient = value_and_gradient(function, x, torch.ones(40, 40), causal=True)
    assert value[7, :8].isnan().all()
    assert (value[7, 8:] == MASKED[function]).all()
    assert value[6].isfinite().any()
    assert gradient[7, :8].isnan().all()
    assert_positive_zero(gradient[7, 8:])


@pytest.mark.parametrize("dims", [(0, 1), (0, 2), (-1, 1), (2, 1, 0), ()], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
@every_dtype
def test_logsumexp_over_several_dimensions(dims, keepdim, dtype):
    x, mask = torch.randn(3, 40, 50).to(dtype), torch.rand(40, 50) < 0.4
    mask[3] = False
    given = x.masked_fill(~mask, math.nan)
    reduced = dims or (0, 1, 2)
    filled = x.double().masked_fill(~mask, -math.inf).requires_grad_()
    expected = torch.logsumexp(filled, reduced, keepdim)
    upstream = torch.randn(expected.shape)
    value, gradient = value_and_gradient(logsumexp, given, upstream, mask, list(dims), keepdim=keepdim)
    assert_near(value, expected)
    (wanted,) = torch.autograd.grad(expected, filled, upstream.to(dtype).double())
    wanted = wanted.nan_to_num(0.0).masked_fill(~mask, 0.0)
    assert_near(gradient, wanted, largest=rounding_of(logsumexp, x, 0))
    assert_positive_zero(gradient.masked_select(~mask))


@every_function
def test_empty_slices_and_no_slices(function):
    for shape, dim in [((0,), 0), ((3, 0), 1), ((0, 3), 1), ((3, 0), 0), ((2, 0, 4), 1)]:
        x = torch.randn(shape)
        mask = torch.ones(shape, dtype=torch.bool)
        for chosen in (None, mask):
            value, gradient = value_and_gradient(function, x, function(x, None, dim), chosen, dim)
            assert_same_bits(value, THEIRS[function](x, dim))
            assert gradient.shape == x.shape


@every_function
def test_dtype_is_what_the_input_becomes_first(function):
    x = torch.randn(3, 50).bfloat16()
    value, gradient = value_and_gradient(function, x, function(x).float(), dtype=torch.float32)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert_near(value, THEIRS[function](x.double(), -1))
    integers = torch.randint(9, (3, 5))
    assert_near(function(integers, dtype=torch.float64), THEIRS[function](integers.double(), -1))


def test_logsumexp_takes_integers_as_torch_does():
    integers = torch.randint(9, (3, 5))
    assert_near(logsumexp(integers), torch.logsumexp(integers, -1).double())


def test_a_mask_in_attention():
    """Padding and causality together, against torch's attention with the same mask."""
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    keep = sequence_mask(torch.tensor([9, 5]).view(2, 1, 1), 9)  # [2, 1, 1, 9]
    ours = softmax(q @ k.transpose(-1, -2) / math.sqrt(8), keep, causal=True) @ v
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, keep & causal_mask(9))
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(result, (q, k, v), upstream) for result in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@every_function
def test_derivatives(function):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 1, 5) < 0.6
    mask[1], mask[2] = False, True
    for options in (dict(mask=mask), dict(causal=True), dict(mask=mask, causal=True), dict(mask=mask, dim=1)):

        def kept(x, options=options):
            result = function(x, **options)
            return result.masked_fill(result == -math.inf, 0.0)  # finite differences know no infinities

        assert torch.autograd.gradcheck(kept, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(kept, x, check_fwd_over_rev=True)


def test_the_input_is_not_kept():
    """Softmax saves what it gives, as torch's does: of attention's scores nothing else stays in memory."""
    x = torch.randn(5, 5, requires_grad=True)
    scores, packed = x * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.data_ptr()) or t, lambda t: t):
        softmax(scores, causal=True)
    assert scores.data_ptr() not in packed


class TestErrors:
    X = torch.zeros(2, 3, 4)

    @every_function
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(mask=torch.ones(4)), TypeError, "expected mask of dtype bool or an integer dtype, got Float"),
            (dict(mask=torch.ones(3, dtype=torch.bool)), RuntimeError, r"expected mask to broadcast to input.*\[3\]"),
            (dict(mask=torch.ones(1, 2, 3, 4).bool()), RuntimeError, "expected mask to broadcast to input"),
            (dict(dim=3), IndexError, r"expected dim in \[-3, 2\], got 3"),
            (dict(causal=True, dim=1), ValueError, "expected dim to be the last one with causal, got"),
            (dict(input=X[0, 0], causal=True), RuntimeError, r"expected input of rank 2 or more with causal.*\[4\]"),
            (dict(input=X.cfloat()), TypeError, "expected real input, got ComplexFloat"),
            (dict(input=X.to_sparse()), TypeError, "expected input to be a dense tensor, got a sparse one"),
            (dict(dtype=torch.int64), TypeError, "expected dtype to be float32.*, got Long"),
            (dict(input=X.to(torch.float8_e5m2)), TypeError, "expected input of dtype float32, float64"),
            (dict(mask=torch.ones(4, dtype=torch.bool, device="meta")), RuntimeError, "expected mask on the device of"),
        ],
    )
    def test_messages(self, function, change, error, message):
        arguments = dict(input=self.X) | change
        for way in (function, getattr(torch.ops.masked_loss, function.__name__)):
            with pytest.raises(error, match=f"^{function.__name__}: {message}"):
                way(**arguments)

    def test_integers_and_dims(self):
        for function in (softmax, log_softmax):
            with pytest.raises(TypeError, match=r"expected input of dtype float32, .* got Long"):
                function(torch.zeros(3, dtype=torch.long))
        with pytest.raises(RuntimeError, match="logsumexp: expected dim to name each dimension once"):
            logsumexp(self.X, dim=[0, -3])


IN_A_CHILD = """
import sys, torch, masked_loss
problems = torch.load(sys.argv[1])
results = []
for x, mask, dim in problems:
    for name in ("softmax", "log_softmax", "logsumexp"):
        leaf = x.clone().requires_grad_()
        result = getattr(masked_loss, name)(leaf, mask, dim)
        result.backward(torch.ones_like(result) * torch.arange(1.0, 1 + result.shape[-1]).to(result.dtype))
        results.append((result.detach(), leaf.grad))
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability, tmp_path):
    """Which kernels run is chosen once in a process, by torch's own variable; what the machine lacks falls back."""
    problems = [
        (torch.randn(3, classes, 30).to(dtype), torch.rand(3, classes, 30) < 0.6, dim)
        for dtype, classes, dim in itertools.product(FLOAT_TYPES, (10, 70), (1, -1))
    ]
    torch.save(problems, tmp_path / "problems.pt")
    command = [sys.executable, "-c", IN_A_CHILD, tmp_path / "problems.pt", tmp_path / "results.pt"]
    subprocess.run(command, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": capability})
    results = iter(torch.load(tmp_path / "results.pt"))
    for x, mask, dim in problems:
        for function in FUNCTIONS:
            value, gradient = next(results)
            exact = x.double().requires_grad_()
            expected = expected_of(function, exact, mask, dim)
            upstream = torch.ones_like(expected) * torch.arange(1.0, 1 + expected.shape[-1])
            (wanted,) = torch.autograd.grad(expected, exact, upstream)
            assert_near(value, expected)
            assert_near(gradient, wanted, largest=upstream.max().item() * rounding_of(function, x, dim))


def test_huge_pages_and_their_threshold():
    """A result of 16 MB lies in memory that is used again, and is stored past the cache."""
    x, mask = torch.randn(2000, 2100), torch.rand(2000, 2100) < 0.5
    for _ in range(3):
        torch.testing.assert_close(
            softmax(x, mask), torch.softmax(x.masked_fill(~mask, -math.inf), -1), rtol=1e-5, atol=1e-7
        )
