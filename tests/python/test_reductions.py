"""The masked reductions and masked_whiten: torch's of what is kept, whatever lies elsewhere."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from masked_loss import masked_mean, masked_std, masked_sum, masked_var, masked_whiten
from reference import (
    FLOAT_TYPES,
    HALF_TYPES,
    allocations_of,
    assert_near,
    assert_positive_zero,
    assert_same_bits,
)

REDUCTIONS = (masked_sum, masked_mean, masked_var, masked_std)
THEIRS = {masked_sum: torch.sum, masked_mean: torch.mean, masked_var: torch.var, masked_std: torch.std}

every_reduction = pytest.mark.parametrize("function", REDUCTIONS, ids=lambda f: f.__name__)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)


def reduced_dims(rank, dim):
    return sorted({d % rank for d in ([dim] if isinstance(dim, int) else dim or range(rank))}) if rank else []


def expected_of(function, x, keep, dim, keepdim=False, **options):
    """torch's, in float64, of the kept elements of each slice alone; 0 of none."""
    rank, dims = x.dim(), reduced_dims(x.dim(), dim)
    others = [d for d in range(rank) if d not in dims]
    count = math.prod(x.shape[d] for d in dims)
    sizes = [x.shape[d] for d in others]
    lines, kept = (t.permute([*others, *dims]).reshape(math.prod(sizes), count) for t in (x.double(), keep))
    counts, order, results = kept.sum(1), [], []
    for number in counts.unique().tolist():  # slices that keep as many are reduced together
        rows = (counts == number).nonzero().squeeze(1)
        chosen = lines[rows][kept[rows]].view(len(rows), number)
        order.append(rows)
        results.append(THEIRS[function](chosen, 1, **options) if number else chosen.sum(1))
    result = torch.cat(results)[torch.cat(order).argsort()] if results else lines.sum(-1)
    return result.view([1 if d in dims else n for d, n in enumerate(x.shape)] if keepdim else sizes)


def value_and_gradient(function, x, upstream, *arguments, **options):
    leaf = x.detach().requires_grad_()
    result = function(leaf, *arguments, **options)
    return result.detach(), torch.autograd.grad(result, leaf, upstream.to(result.dtype))[0]


def assert_right(function, x, mask=None, dim=None, **options):
    keep = torch.ones(x.shape, dtype=torch.bool) if mask is None else (mask != 0).expand(x.shape)
    safe = x.masked_fill(~keep, 0.0).double().requires_grad_()
    expected = expected_of(function, safe, keep, dim, **options)
    upstream = torch.randn(expected.shape).to(x.dtype)
    value, gradient = value_and_gradient(function, x.masked_fill(~keep, math.nan), upstream, mask, dim, **options)
    (wanted,) = torch.autograd.grad(expected, safe, upstream.double(), materialize_grads=True)
    assert value.dtype == gradient.dtype == x.dtype
    terms = x.numel() / max(value.numel(), 1)
    size = safe.detach().abs().max().item() if x.numel() else 0.0
    assert_near(value, expected, largest=size * (terms**0.5 if function is masked_sum else 1.0))
    finite, largest = wanted.isfinite(), upstream.abs().max().item() if upstream.numel() else 0.0
    if function is masked_std:  # a deviation over their root mean square: rounding is large where all of them are small
        spread = expected_of(function, safe.detach(), keep, dim, **{**options, "keepdim": True})
        ill = (size / spread).nan_to_num(1.0, 1.0).clamp(min=1.0).expand(x.shape)[finite]
        assert_near(gradient[finite] / ill, wanted[finite] / ill, x.dtype, largest)
    else:
        assert_near(gradient[finite], wanted[finite], largest=largest)
    assert not gradient[~finite].isfinite().any()
    assert_positive_zero(gradient[~keep])


# (shape, dim): what path of the kernels
PROBLEMS = [
    ((), None),  # 0-d
    ((1,), 0),
    ((7,), None),  # shorter than a vector
    ((3, 17), -1),  # lines
    ((3, 17), 0),  # lanes
    ((3, 17), None),  # one line
    ((5, 5000), 1),  # several blocks, the last of them a part
    ((2, 70000), 1),  # lines in parts
    ((100, 700), 0),  # several blocks of lanes, and of rows
    ((3000, 40), 0),  # lanes in parts
    ((4, 5, 6, 7), (1, 3)),
    ((4, 5, 6, 70), (0, 2)),
    ((4, 5, 6, 70), (0, 1, 2)),
    ((4, 5, 6), (0, -1)),
    ((40, 5, 3), (0, 1)),  # a few results beside one another
    # Tiles of short lines: parts of a vector, whole ones, several tiles of one, and the longest that there are.
    ((3000, 4), 1),
    ((700, 1), 1),
    ((130, 17), 1),
    ((70, 32), 1),
    ((70, 33), 1),
    # And of elements elsewhere: with results beside one another or not, in short runs and in long ones.
    ((90, 4, 3), 1),
    ((30, 64, 20), 1),
    ((4, 3000), 0),
    ((7, 6, 5, 4), (0, 2)),
    ((300, 5, 100), 1),  # runs of lanes that share a task
]


def masks_of(shape):
    yield None
    yield torch.rand(shape) < 0.6
    yield torch.zeros(shape, dtype=torch.bool)
    yield torch.randint(0, 2, shape)
    if shape:
        yield torch.rand([*[1] * (len(shape) - 1), shape[-1]]) < 0.6
        yield torch.rand([*shape[:-1], 1]) < 0.6
        yield (torch.rand(shape[::-1]) < 0.6).permute(*reversed(range(len(shape))))


@every_reduction
@every_dtype
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize(("shape", "dim"), PROBLEMS, ids=str)
def test_is_torchs_of_what_is_kept(function, dtype, shape, dim, kernels):
    if kernels == "emulated" and math.prod(shape) > 50_000 and function in (masked_sum, masked_std):
        pytest.skip("masked_mean and masked_var launch the same kernels, which takes the emulation long")
    # Deviations that cancel leave the gradient of a root few digits: a few elements lie apart.
    count = shape[dim] if isinstance(dim, int) else 0
    apart = (
        4 * torch.arange(count).view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))])
        if 0 < count < 8
        else 0
    )
    for mask in masks_of(shape):
        x = (torch.randn(shape).clamp(-1.9, 1.9) + 0.5 + apart).to(dtype)
        assert_right(function, x, mask, list(dim) if isinstance(dim, tuple) else dim)
    assert_right(function, x, torch.rand(shape) < 0.6, list(dim) if isinstance(dim, tuple) else dim, keepdim=True)


@pytest.mark.parametrize("function", [masked_var, masked_std])
@pytest.mark.parametrize("correction", [0, 0.5, 2])
def test_correction(function, correction):
    assert_right(function, torch.randn(6, 40), torch.rand(6, 40) < 0.6, 1, correction=correction)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_variances_of_few():
    x = torch.tensor([3.0, 5.0, 7.0], requires_grad=True)
    for kept, of_var in [(0, 0.0), (1, math.nan), (2, 2.0), (3, 4.0)]:
        mask = torch.arange(3) < kept
        for function in (masked_var, masked_std):
            value = function(x, mask)
            torch.testing.assert_close(
                value.item(), of_var if function is masked_var else math.sqrt(of_var), equal_nan=True
            )
            (gradient,) = torch.autograd.grad(value, x)
            assert_positive_zero(gradient[kept:])
    same = torch.ones(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(masked_std(same), same)
    assert_positive_zero(gradient)  # as torch's


def test_variance_is_stable():
    """Around a mean that is large, in parts whose means differ."""
    for shape in ((3, 200_000), (200_000, 20)):
        dim = 1 if shape[0] == 3 else 0
        x = torch.randn(shape) + torch.linspace(4000, 4010, shape[dim]).view([-1 if d == dim else 1 for d in (0, 1)])
        mask = torch.rand(shape) < 0.6
        expected = expected_of(masked_var, x.t() if dim == 0 else x, mask.t() if dim == 0 else mask, 1)
        torch.testing.assert_close(masked_var(x, mask, dim).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((3, 5), 1), ((3, 500), 1), ((500, 90), 0), ((40, 3, 20), 1)], ids=str)
def test_variances_of_the_largest_numbers(shape, dim, dtype, kernels):
    """As torch's: infinite, and never NaN, with the gradient of deviations that are finite."""
    if kernels != "cpu":
        pytest.skip("of double precision, which a GPU does not merge parts in")
    x = torch.randn(shape, dtype=dtype)
    x.select(dim, 1).fill_(torch.finfo(dtype).max)
    expected, wanted = value_and_gradient(torch.var, x, torch.ones(x.select(dim, 0).shape), dim)
    assert (expected == math.inf).all()
    value, gradient = value_and_gradient(masked_var, x, torch.ones_like(expected), None, dim)
    by_composite = torch.func.grad(lambda x: masked_var(x, None, dim).sum())(x)
    assert_same_bits(value, expected)
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(by_composite, wanted)
    x.select(dim, 2).fill_(-torch.finfo(dtype).max)
    assert (masked_var(x, None, dim) == math.inf).all()
    if dtype == torch.float32:  # their sum is infinite, and their mean is not
        assert (masked_var(torch.full(shape, torch.finfo(dtype).max), None, dim) == 0).all()


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_types_are_added_in_float32(dtype):
    x = torch.ones(5000, dtype=dtype)
    assert masked_sum(x, torch.arange(5000) < 4096).item() == 4096
    assert masked_mean(x, torch.arange(5000) < 4097).item() == 1


def test_integers():
    x, mask = torch.randint(-9, 9, (4, 50), dtype=torch.int32), torch.rand(4, 50) < 0.5
    assert_same_bits(masked_sum(x, mask, 1), x.masked_fill(~mask, 0).sum(1))
    assert_same_bits(masked_sum(mask, mask), mask.sum())
    for function in (masked_var, masked_std, masked_whiten):
        with pytest.raises(TypeError, match=rf"^{function.__name__}: expected input of dtype float32, .* got Int"):
            function(x, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_means_of_integers(dtype):
    x, mask = torch.randint(0, 2 if dtype == torch.bool else 100, (40, 50)).to(dtype), torch.rand(40, 50) < 0.5
    mask[3] = False
    for dim in (None, 0, 1):
        expected = expected_of(masked_mean, x, mask, dim)
        for given in (x, x.t().contiguous().t(), x.masked_fill(~mask, 1)):
            value = masked_mean(given, mask, dim)
            assert value.dtype == torch.float32
            assert_near(value, expected)
        assert_near(masked_mean(x, mask, dim, dtype=torch.float64), expected)
    assert_near(masked_mean(x), x.double().mean())
    big = torch.full((3,), 2**53 + 1, dtype=torch.int64)
    assert masked_mean(big, dtype=torch.float64).item() == 2.0**53


class TestDtype:
    """`dtype=` is the result's: what is computed in the accumulation dtype is rounded to it once."""

    X, MASK = torch.randn(30, 50) + 0.5, torch.rand(30, 50) < 0.6

    @pytest.mark.parametrize("function", [*REDUCTIONS, masked_whiten], ids=lambda f: f.__name__)
    @pytest.mark.parametrize("given", FLOAT_TYPES, ids=str)
    @pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
    @pytest.mark.parametrize("dim", [None, 0, 1])
    def test_is_the_results(self, function, given, dtype, dim):
        x, wide = self.X.to(given), torch.promote_types(torch.promote_types(given, dtype), torch.float32)
        upstream = torch.randn(function(x, self.MASK, dim).shape).to(dtype)
        found, gradient = value_and_gradient(function, x, upstream, self.MASK, dim, dtype=dtype)
        value, wanted = value_and_gradient(function, x.to(wide), upstream, self.MASK, dim)
        assert found.dtype == dtype
        assert gradient.dtype == given
        assert_near(found, value.double(), largest=10.0)
        assert_near(gradient, wanted.double(), largest=upstream.abs().max().item() * 3)
        assert_same_bits(function(x, self.MASK, dim, dtype=dtype), found)
        if given == dtype:
            assert_same_bits(function(x, self.MASK, dim), found)
        assert_positive_zero(gradient[~self.MASK])

    def test_half_types_keep_what_float32_holds(self):
        x = torch.full((100_000,), 1.0078125, dtype=torch.bfloat16)
        assert masked_sum(x, dtype=torch.float32).item() == 100_781.25
        assert masked_mean(x, dtype=torch.float32).item() == 1.0078125

    @pytest.mark.parametrize("function", [*REDUCTIONS, masked_whiten], ids=lambda f: f.__name__)
    def test_float32_of_half_types_takes_no_copy(self, function, kernels):
        x, mask = torch.randn(400, 1000).bfloat16(), torch.rand(400, 1000) < 0.5
        with torch.no_grad():
            allocated = allocations_of(lambda: function(x, mask, dtype=torch.float32), x.nbytes // 2)
        assert allocated == (function is masked_whiten)  # its result

    def test_sums_as_torchs(self):
        x, integers = torch.randn(40, 50) * 20, torch.randint(-100, 100, (40, 50), dtype=torch.int16)
        types = [torch.bool, torch.int8, torch.int32, torch.int64]
        for given in (x, integers, integers > 0, x.bfloat16()):
            for dtype in types:
                safe = given.masked_fill(~self.keep(given), 0)
                ours, theirs = masked_sum(given, self.keep(given), 1, dtype=dtype), safe.sum(1, dtype=dtype)
                assert_same_bits(ours, theirs)
        assert_near(masked_sum(integers, dtype=torch.float32), integers.sum().double())
        assert_near(masked_sum(x, dtype=torch.float64), x.double().sum(), largest=1000.0)

    @staticmethod
    def keep(x):
        return torch.arange(x.numel()).view(x.shape) % 3 > 0

    def test_wins_over_autocast(self):
        x = torch.randn(5, 7).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            for function in (*REDUCTIONS, masked_whiten):
                for dtype in (torch.float32, torch.float16):
                    assert function(x, dtype=dtype).dtype == dtype

    @pytest.mark.parametrize("function", [*REDUCTIONS, masked_whiten], ids=lambda f: f.__name__)
    def test_is_real_and_floating(self, function):
        refused = [torch.complex64] if function is masked_sum else [torch.complex64, torch.int64, torch.bool]
        for dtype in refused:
            with pytest.raises(TypeError, match=rf"^{function.__name__}: expected dtype to be float32, .* got "):
                function(self.X, dtype=dtype)


BYTES = torch.tensor([0, 255, 254, 2, 1, 128], dtype=torch.uint8)


@pytest.mark.parametrize("function", [*REDUCTIONS, masked_whiten], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(60, 700), (300, 6), (300, 20)], ids=str)
def test_masks_of_any_bytes(function, shape):
    """A byte that is not 0 keeps, whatever it is, as in a mask that a tensor of uint8 is viewed as."""
    bytes = BYTES[torch.randint(len(BYTES), shape)]
    dirty, clean = bytes.view(torch.bool), bytes != 0
    x, dims = torch.randn(shape).masked_fill(~clean, math.nan), (None, 0, 1)
    for dim in dims:
        upstream = torch.randn(function(x, clean, dim).shape)
        for a, b in zip(
            *(value_and_gradient(function, x, upstream, mask, dim) for mask in (dirty, clean)), strict=True
        ):
            assert_same_bits(a, b)
        assert_same_bits(function(x, dirty, dim), function(x, clean, dim))
        second = []
        for mask in (dirty, clean):
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((function(leaf, mask, dim) ** 2).sum(), leaf, create_graph=True)
            second.append(torch.autograd.grad((gradient**2).sum(), leaf)[0])
        assert_same_bits(*second)
    batched = torch.vmap(lambda x, mask: function(x, mask))
    assert_same_bits(batched(x, dirty), batched(x, clean))


def test_memory_of_many_short_lines(kernels):
    """What a result takes beside itself is its count, whatever the number of lines."""
    if kernels != "cpu":
        pytest.skip("of the CPU's memory")
    x, mask = torch.randn(200_000, 4), torch.rand(200_000, 4) < 0.5
    for function, blocks in ((masked_sum, 1), (masked_mean, 2)):
        # The allocator is not all: scratch memory of the kernels' own counts too.
        assert allocations_of(lambda f=function: f(x, mask, 1), 400_000) == blocks


@every_dtype
@pytest.mark.parametrize(("shape", "dim"), [((7, 50), None), ((7, 50), 1), ((70, 50), 0), ((4, 5, 60), [0, 2])])
def test_whiten(dtype, shape, dim):
    x, mask = (torch.randn(shape) * 2 + 3).to(dtype), torch.rand(shape) < 0.6
    upstream = torch.randn(shape)
    wide = x.double().requires_grad_()
    mean = expected_of(masked_mean, wide, mask, dim, keepdim=True)
    var = expected_of(masked_var, wide, mask, dim, keepdim=True)
    expected = ((wide - mean) / (var + 1e-8).sqrt()).masked_fill(~mask, 0.0)
    (wanted,) = torch.autograd.grad(expected, wide, upstream.to(dtype).double())
    given, garbage = x.masked_fill(~mask, math.nan), upstream.masked_fill(~mask, math.nan)
    value, gradient = value_and_gradient(masked_whiten, given, garbage, mask, dim)
    assert_near(value, expected, largest=3.0)
    assert_near(gradient, wanted.masked_fill(~mask, 0.0), largest=3.0)
    assert_near(masked_whiten(given, mask, dim), expected, largest=3.0)  # fused, where there is no gradient
    for tensor in (value, gradient, masked_whiten(given, mask, dim)):
        assert tensor.dtype == dtype
        assert_positive_zero(tensor[~mask])


@every_reduction
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_masked_changes_no_bit(function, garbage):
    x, mask = torch.randn(30, 40, 50), torch.rand(30, 40, 50) < 0.6
    mask[1], mask[:, 3] = False, False
    for dim in (None, 0, 1, 2, [0, 2]):
        value = function(x, mask, dim)
        upstream, empty = torch.randn(value.shape), ~mask.flatten() if dim is None else None
        if dim is not None:
            kept = mask.long().sum(dim) > 0
            upstream_given = upstream.masked_fill(~kept, garbage)
        else:
            upstream_given = upstream
        clean = value_and_gradient(function, x, upstream, mask, dim)
        dirty = value_and_gradient(function, x.masked_fill(~mask, garbage), upstream_given, mask, dim)
        for a, b in zip(clean, dirty, strict=True):
            assert_same_bits(a, b)
        assert_positive_zero(dirty[1][~mask])
        assert empty is None or empty.any()


@every_reduction
def test_what_is_kept_propagates(function):
    for special in (math.nan, math.inf):
        x = torch.randn(4, 50)
        x[1, 7] = special
        mask = torch.ones(4, 50, dtype=torch.bool)
        for dim in (1, 0):
            expected = THEIRS[function](x, dim)
            torch.testing.assert_close(function(x, mask, dim), expected, equal_nan=True)


@every_reduction
def test_threads_change_no_bit(function, threads):
    for shape, dim in [
        ((300_000,), None),
        ((3, 200_001), 1),
        ((4000, 90), 0),
        ((70, 80, 90), [0, 2]),
        ((50_001, 5), 1),
        ((40_001, 3, 11), 1),
        ((600, 40, 90), 1),
    ]:
        x, mask = torch.randn(shape), torch.rand(shape) < 0.6
        results = []
        for count in (1, 3):
            with threads(count):
                results.append(value_and_gradient(function, x, torch.ones_like(function(x, mask, dim)), mask, dim))
        for one, three in zip(*results, strict=True):
            assert_same_bits(one, three)


@every_reduction
def test_strides(function):
    x, mask = torch.randn(12, 20, 30), torch.rand(12, 20, 30) < 0.6
    views = [x.transpose(0, 2), x[:, ::2], x[..., ::3], x[:1].expand(12, 20, 30), x.permute(2, 0, 1)]
    masks = [mask.transpose(0, 2), mask[:, ::2], mask[..., ::3], mask, mask.permute(2, 0, 1)]
    for view, chosen in zip(views, masks, strict=True):
        for dim in (None, 0, 1, 2, [0, 1], [1, 2], [0, 2]):
            assert_right(function, view.contiguous(), chosen, dim)
            torch.testing.assert_close(
                function(view, chosen, dim),
                function(view.contiguous(), chosen.contiguous(), dim),
                equal_nan=True,  # variances of one element
            )


@every_reduction
def test_nothing_to_reduce(function):
    for shape, dim in [((0,), None), ((3, 0), 1), ((0, 3), 1), ((3, 0), 0), ((2, 0, 4), 1)]:
        leaf = torch.randn(shape, requires_grad=True)
        value = function(leaf, torch.ones(shape, dtype=torch.bool), dim)
        assert value.shape == THEIRS[masked_sum](leaf, dim).shape
        assert_positive_zero(value)
        value.sum().backward()
        assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("function", [*REDUCTIONS, masked_whiten])
def test_derivatives(function):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 1, 5) < 0.7
    mask[1, :, :3] = True
    mask[2] = True
    for dim in (None, 1, [0, 2]):

        def curved(x, dim=dim):
            return function(x * x, mask, dim)

        if function is masked_sum or dim != 1:
            assert torch.autograd.gradcheck(curved, x, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(curved, x, check_fwd_over_rev=True)


def test_a_sum_does_not_keep_its_input():
    x, packed = torch.randn(5, 5, requires_grad=True) * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.data_ptr()) or t, lambda t: t):
        masked_mean(x, torch.rand(5, 5) < 0.5)
    assert x.data_ptr() not in packed


class TestErrors:
    X = torch.zeros(2, 3, 4)

    @pytest.mark.parametrize("function", [*REDUCTIONS, masked_whiten], ids=lambda f: f.__name__)
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                dict(mask=torch.ones(2, 3, 4)),
                TypeError,
                "expected mask of dtype bool or an integer dtype, got Float; a mean by weights is masked_sum",
            ),
            # Of positions, of the last dimension alone, and of a rank beyond the input's.
            (dict(mask=torch.ones(2, 3).bool()), RuntimeError, r"expected mask .*\[2, 3, 4\], got .*\[2, 3\]"),
            (dict(mask=torch.ones(4).bool()), RuntimeError, r"expected mask .*\[2, 3, 4\], got .*\[4\]"),
            (dict(mask=torch.ones(1, 2, 3, 4).bool()), RuntimeError, r"expected mask .*\[1, 2, 3, 4\]"),
            (dict(mask=torch.ones(2, 1, 3).bool()), RuntimeError, "expected mask with each size 1 or that of input"),
            (
                dict(input=torch.zeros(4, 4, 4), mask=torch.ones(4, 4).bool()),
                RuntimeError,
                r"expected mask .*\[4, 4, 4\], got .*\[4, 4\]",
            ),
            (dict(dim=3), IndexError, r"expected dim in \[-3, 2\], got 3"),
            (dict(dim=[0, -3]), RuntimeError, "expected dim to name each dimension once"),
            (dict(input=X.cfloat()), TypeError, "expected real input, got ComplexFloat"),
            (dict(input=X.to_sparse()), TypeError, "expected input to be a dense tensor, got a sparse one"),
            (dict(mask=torch.ones(2, 3, 4, device="meta").bool()), RuntimeError, "expected mask on the device of"),
        ],
    )
    def test_messages(self, function, change, error, message):
        for way in (function, getattr(torch.ops.masked_loss, function.__name__)):
            with pytest.raises(error, match=f"^{function.__name__}: {message}"):
                way(**(dict(input=self.X) | change))


IN_A_CHILD = """
import sys, torch, masked_loss
problems = torch.load(sys.argv[1])
results = []
for x, mask, dim in problems:
    for name in ("masked_sum", "masked_mean", "masked_var", "masked_std"):
        leaf = x.clone().requires_grad_()
        result = getattr(masked_loss, name)(leaf, mask, dim)
        result.sum().backward()
        results.append((result.detach(), leaf.grad))
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability, tmp_path):
    """Which kernels run is chosen once in a process, by torch's own variable; what the machine lacks falls back."""
    problems = [
        ((torch.randn(60, n) + 4 * (torch.arange(n) % 7)).to(dtype), torch.rand(60, n) < 0.6, dim)
        for dtype, n, dim in itertools.product(FLOAT_TYPES, (70, 7), (0, 1))
    ]
    torch.save(problems, tmp_path / "problems.pt")
    command = [sys.executable, "-c", IN_A_CHILD, tmp_path / "problems.pt", tmp_path / "results.pt"]
    subprocess.run(command, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": capability})
    results = iter(torch.load(tmp_path / "results.pt"))
    for x, mask, dim in problems:
        for function in REDUCTIONS:
            value, gradient = next(results)
            exact = x.double().requires_grad_()
            expected = expected_of(function, exact, mask, dim)
            (wanted,) = torch.autograd.grad(expected.sum(), exact)
            assert_near(value, expected, largest=10.0)
            assert_near(gradient, wanted, largest=1.0)
