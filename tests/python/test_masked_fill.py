"""masked_fill and masked_fill_: torch's own, for integer masks too, with gradients that never see what was filled."""

import math

import pytest
import torch

from grid import in_bytes
from masked_loss import masked_fill, masked_fill_
from reference import assert_near, assert_positive_zero, assert_same_bits

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*FLOATS, *COMPLEX, *INTEGERS, torch.bool)
# torch stores these but does not fill them
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)

# 0-d; one element; shorter than a SIMD register; with a tail; enough to be split over threads
SHAPES = [(), (1,), (3, 5), (7, 67), (300, 401)]


def some(shape, dtype):
    return torch.randint(0, 100, shape).to(dtype) if dtype != torch.bool else torch.rand(shape) < 0.5


def both_ways(x, mask, value):
    """Out of place and in place, which must agree; `x` is left alone by the first."""
    before = x.clone()
    result = masked_fill(x, mask, value)
    assert_same_bits(x, before)
    other = x.clone()
    assert masked_fill_(other, mask, value) is other
    assert_same_bits(other, result)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_is_filled_as_by_torch(shape, dtype):
    x, mask = some(shape, dtype), torch.rand(shape) < 0.4
    assert_same_bits(both_ways(x, mask, 3), torch.masked_fill(x, mask, 3))
    assert_same_bits(both_ways(x, mask, torch.tensor(3)), torch.masked_fill(x, mask, 3))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.complex32, *UNSIGNED, *EIGHT_BIT], ids=str)
def test_dtypes_that_torch_barely_has(dtype):
    x, mask = torch.arange(1, 8).float().to(dtype), torch.tensor([1, 0, 0, 1, 0, 1, 0])
    filled = both_ways(x, mask, 2).to(torch.complex64)
    assert filled.tolist() == [2, 2, 3, 2, 5, 2, 7]


VALUES = [0, 1, -1, 3.7, 300, 1e10, 1e40, -math.inf, math.nan, True, 1 + 2j, 2**40, -(2**63)]


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except RuntimeError as error:
        return type(error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_are_converted_or_refused_as_by_torch(value, dtype):
    x, mask = some((5,), dtype), torch.tensor([True, False, True, True, False])
    for given in (value, torch.tensor(value)):
        expected = outcome(torch.masked_fill, x, mask, given)
        actual = outcome(masked_fill, x, mask, given)
        in_place = x.clone()
        actual_in_place = outcome(masked_fill_, in_place, mask, given)
        if isinstance(expected, torch.Tensor):
            assert_same_bits(actual, expected)
            assert_same_bits(in_place, expected)
        else:
            assert actual == actual_in_place == expected
            assert_same_bits(in_place, x)  # refused before anything was written
            assert in_place._version == 0


@pytest.mark.parametrize(
    "value_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tensor_values_of_other_dtypes(dtype, value_dtype):
    x, mask = some((4, 9), dtype), torch.rand(4, 9) < 0.5
    value = torch.tensor(1.2).to(value_dtype)
    assert_same_bits(both_ways(x, mask, value), torch.masked_fill(x, mask, value))


@pytest.mark.parametrize("mask_dtype", INTEGERS, ids=str)
def test_integer_masks_fill_where_they_are_1(mask_dtype):
    x, mask = torch.randn(8, 33), torch.randint(0, 2, (8, 33)).to(mask_dtype)
    assert_same_bits(both_ways(x, mask, -1.0), torch.masked_fill(x, mask != 0, -1.0))
    assert_same_bits(both_ways(x, mask[:, :1], 5), torch.masked_fill(x, mask[:, :1] != 0, 5))


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("mask_shape", [(8, 33), (8, 1), (33,), ()], ids=str)
def test_bytes_of_masks_are_not_numbers(mask_shape, dtype):
    """By the kernels, and by the plain ops that batches go through."""
    x, mask = some((8, 33), dtype), torch.rand(mask_shape) < 0.4
    assert_same_bits(both_ways(x, in_bytes(mask), 3), torch.masked_fill(x, mask, 3))
    mapped = torch.vmap(lambda x: masked_fill(x, in_bytes(mask), 3))(x[None])[0]
    assert_same_bits(mapped, torch.masked_fill(x, mask, 3))
    if not dtype.is_complex and dtype != torch.bool:
        upstream = torch.randn(8, 33).to(dtype)
        ours = gradients(masked_fill, x, in_bytes(mask), torch.tensor(3, dtype=dtype), upstream)
        plain = gradients(masked_fill, x, mask, torch.tensor(3, dtype=dtype), upstream)
        for a, b in zip(ours, plain, strict=True):
            assert_same_bits(a, b)


# (input, mask): the masks of attention and of padded batches, and sizes of 1 and missing dimensions everywhere
BROADCASTS = [
    ((5, 7), (5, 1)),
    ((2, 3, 6, 6), (6, 6)),
    ((2, 3, 6, 6), (2, 1, 1, 6)),
    ((2, 3, 6, 6), (2, 1, 6, 1)),
    ((2, 3, 50, 120), (50, 120)),  # enough to be split over threads
    ((4, 3), ()),
    ((4, 3), (1,)),
    ((), ()),
    ((0, 3), (1, 3)),
    ((3, 0), (3, 1)),
]
GROWING = [((5, 1), (1, 7)), ((3,), (4, 3)), ((), (2, 3)), ((1, 3), (0, 3)), ((2, 1, 3), (5, 1))]


@pytest.mark.parametrize(("shape", "mask_shape"), BROADCASTS, ids=str)
def test_masks_broadcast_to_the_input(shape, mask_shape):
    x, mask = torch.randn(shape), torch.rand(mask_shape) < 0.5
    assert_same_bits(both_ways(x, mask, -1), torch.masked_fill(x, mask, -1))


@pytest.mark.parametrize(("shape", "mask_shape"), GROWING, ids=str)
def test_only_out_of_place_may_the_input_grow(shape, mask_shape):
    x, mask = torch.randn(shape), torch.rand(mask_shape) < 0.5
    assert_same_bits(masked_fill(x, mask, -1), torch.masked_fill(x, mask, -1))
    before = x.clone()
    with pytest.raises(RuntimeError, match=r"^masked_fill_: expected mask"):
        masked_fill_(x, mask, -1)
    assert_same_bits(x, before)
    assert x._version == 0


def make_views():
    x = torch.randn(4, 6, 8, 10)
    return {
        "transposed": x.transpose(1, 3),
        "slice": x[:, 1:4, ::2],
        "stride 2": x[..., ::2],
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2),
        "diagonal": x.diagonal(dim1=1, dim2=2),
        "flat": x.view(-1)[3:],
    }


@pytest.mark.parametrize("view", make_views())
@pytest.mark.parametrize("mask_view", ["same", "transposed", "expanded"])
def test_strided_inputs_and_masks(view, mask_view):
    x = make_views()[view]
    mask = torch.rand(x.shape) < 0.5
    if mask_view == "transposed":
        mask = (torch.rand(x.shape[::-1]) < 0.5).permute(*reversed(range(x.dim())))
    elif mask_view == "expanded":
        mask = (torch.rand(x.shape[-1]) < 0.5).expand(x.shape)
    expected = torch.masked_fill(x, mask, 7.0)
    result = masked_fill(x, mask, 7.0)
    assert_same_bits(result, expected)
    assert result.stride() == expected.stride()
    strides = x.stride()
    masked_fill_(x, mask, 7.0)
    assert_same_bits(x, expected)
    assert x.stride() == strides


def test_an_expanded_input_is_filled_out_of_place():
    x, mask = torch.randn(1, 5).expand(4, 5), torch.rand(4, 5) < 0.5
    assert_same_bits(masked_fill(x, mask, 2.0), torch.masked_fill(x, mask, 2.0))


def test_lazily_conjugated_and_negated_inputs():
    mask = torch.tensor([True, False, True])
    for view in (torch.Tensor.conj, lambda x: x.conj().imag):  # have the bits of a conjugate and of a negation
        ours, theirs = torch.tensor([1 + 2j, 3 - 4j, 5j]), torch.tensor([1 + 2j, 3 - 4j, 5j])
        assert masked_fill(view(ours), mask, 7).tolist() == torch.masked_fill(view(theirs), mask, 7).tolist()
        masked_fill_(view(ours), mask, 7)
        view(theirs).masked_fill_(mask, 7)
        assert ours.tolist() == theirs.tolist()


def test_in_place_on_a_view_leaves_the_rest_of_the_base():
    base = torch.randn(6, 8)
    expected, mask = base.clone(), torch.rand(4, 3) < 0.5
    masked_fill_(base[1:5, 2:8:2], mask, 9.0)
    expected[1:5, 2:8:2].masked_fill_(mask, 9.0)
    assert_same_bits(base, expected)


def test_a_bool_tensor_can_be_its_own_mask():
    x = torch.tensor([True, False, True])
    assert masked_fill_(x, x, False).tolist() == [False, False, False]
    x = in_bytes(torch.tensor([True, False, True]))
    assert masked_fill_(x, x, False).tolist() == [False, False, False]


def test_two_thread_counts_give_the_same_bits(threads):
    for shape, mask_shape in [((700, 801), (700, 801)), ((3, 200_001), (1, 200_001)), ((4, 4, 300, 300), (300, 300))]:
        x, mask = torch.randn(shape), torch.rand(mask_shape) < 0.5
        results = []
        for count in (1, 2):
            with threads(count):
                results.append(both_ways(x, mask, 0.5))
        assert_same_bits(*results)


def gradients(function, x, mask, value, upstream):
    """Of the input and of a tensor value, through the op out of place or in place."""
    leaf, leaf_value = x.clone().requires_grad_(), value.clone().requires_grad_()
    result = function(leaf * 1, mask, leaf_value)
    return torch.autograd.grad(result, [leaf, leaf_value], upstream)


@pytest.mark.parametrize("function", [masked_fill, masked_fill_])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64], ids=str)
@pytest.mark.parametrize(("shape", "mask_shape"), [s for s in BROADCASTS if s[0]], ids=str)
def test_gradients_are_torchs(shape, mask_shape, dtype, function):
    x, value = torch.randn(shape).to(dtype), torch.tensor(0.3).to(dtype)
    mask, upstream = torch.rand(mask_shape) < 0.5, torch.randn(shape).to(dtype)
    of_input, of_value = gradients(function, x, mask, value, upstream)
    exact = torch.complex128 if dtype.is_complex else torch.float64
    expected = gradients(torch.masked_fill, x.to(exact), mask, value.to(exact), upstream.to(exact))
    assert_same_bits(of_input, expected[0].to(dtype))
    assert of_value.shape == ()
    assert of_value.dtype == dtype
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 8e-2}.get(dtype, 1e-5)  # a sum of rounded terms
    torch.testing.assert_close(of_value.to(exact), expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("shape", "mask_shape"), GROWING, ids=str)
def test_gradients_of_an_input_that_grows(shape, mask_shape):
    x, value, mask = torch.randn(shape), torch.tensor(0.3), torch.rand(mask_shape) < 0.5
    upstream = torch.randn(torch.broadcast_shapes(shape, mask_shape))
    for ours, theirs in zip(
        gradients(masked_fill, x, mask, value, upstream),
        gradients(torch.masked_fill, x.double(), mask, value.double(), upstream.double()),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        assert_near(ours, theirs)


def test_the_value_alone_may_be_differentiated():
    x, mask = torch.zeros(3, 4), torch.rand(3, 4) < 0.5
    for dtype in (torch.float32, torch.float64):
        value = torch.tensor(2.0, dtype=dtype, requires_grad=True)
        masked_fill(x, mask, value).sum().backward()
        assert value.grad.dtype == dtype
        assert value.grad.item() == mask.sum().item()


@pytest.mark.parametrize("function", [masked_fill, masked_fill_])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64], ids=str)
def test_upstream_garbage_stays_where_it_belongs(function, mask_dtype):
    x, value = torch.randn(4, 40), torch.tensor(1.0)
    mask = torch.rand(4, 40) < 0.5
    at_filled = torch.where(mask, torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]).repeat(10), 2.0)
    of_input, _ = gradients(function, x, mask.to(mask_dtype), value, at_filled)
    assert_positive_zero(of_input[mask])
    assert of_input[~mask].eq(2).all()
    _, of_value = gradients(function, x, mask.to(mask_dtype), value, torch.where(mask, 1.0, torch.nan))
    assert of_value.item() == mask.sum().item()


def test_garbage_that_is_filled_is_gone():
    x = torch.full((3, 30), torch.nan)
    assert both_ways(x, torch.ones(3, 1, dtype=torch.bool), 0.0).eq(0).all()
    assert both_ways(x, torch.zeros(3, 1, dtype=torch.bool), 0.0).isnan().all()


@pytest.mark.parametrize("function", [masked_fill, masked_fill_])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derivatives(function, dtype):
    x, value = torch.randn(2, 3, dtype=dtype, requires_grad=True), torch.tensor(0.5, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True, False, True]])

    def filled(x, value):
        return function(x * x, mask, value * value)

    assert torch.autograd.gradcheck(filled, (x, value))
    assert torch.autograd.gradgradcheck(filled, (x, value))


class TestInPlaceAndAutograd:
    def test_a_leaf_is_refused(self):
        leaf, mask = torch.randn(4, requires_grad=True), torch.ones(4, dtype=torch.bool)
        before = leaf.detach().clone()
        for target in (leaf, leaf[:]):
            with pytest.raises(RuntimeError, match="leaf"):
                masked_fill_(target, mask, 0.0)
        assert_same_bits(leaf, before)
        with torch.no_grad():
            assert masked_fill_(leaf, mask, 0.0) is leaf
        assert leaf.requires_grad
        assert leaf.eq(0).all()

    def test_the_version_is_bumped(self):
        x, mask = torch.randn(4), torch.tensor([True, False, True, False])
        masked_fill_(x, mask, 1.0)
        assert x._version == 1
        masked_fill_(x, mask, torch.tensor(2.0))
        assert x._version == 2

    def test_a_saved_tensor_that_was_filled_is_noticed(self):
        x = torch.randn(4, requires_grad=True)
        y = x.exp()  # saves its result
        masked_fill_(y, torch.tensor([True, False, False, True]), 1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_a_mask_that_was_changed_is_noticed(self):
        x, mask = torch.randn(4, requires_grad=True), torch.tensor([True, False, False, True])
        y = masked_fill(x, mask, 0.0)
        mask.logical_not_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("value", [3.0, "tensor"])
    def test_filling_a_view_reaches_the_graph_of_its_base(self, value):
        mask = torch.tensor([True, False, True])
        results = []
        for fill in (masked_fill_, torch.Tensor.masked_fill_):
            torch.manual_seed(1)
            x, v = torch.randn(2, 5, requires_grad=True), torch.tensor(3.0, requires_grad=True)
            base = x * 2
            fill(base[:, 1:4], mask, v if value == "tensor" else value)
            total = (base * torch.arange(10.0).view(2, 5)).sum()
            total.backward()
            results.append((base.detach(), x.grad, v.grad if value == "tensor" else x.grad))
        for ours, theirs in zip(*results, strict=True):
            assert_same_bits(ours, theirs)

    def test_the_value_may_bring_the_gradient(self):
        x, value = torch.zeros(3), torch.tensor(2.0, requires_grad=True)
        masked_fill_(x, torch.tensor([True, True, False]), value)
        (x * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
        assert value.grad.item() == 11

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_modes_without_a_graph(self, mode):
        x, mask = torch.randn(3, requires_grad=True), torch.tensor([True, False, True])
        with mode():
            result = masked_fill(x, mask, 1.0)
            in_place = masked_fill_(x * 1, mask, 1.0)
        assert not result.requires_grad
        assert_same_bits(in_place, result)


def test_inference_mode_counts_its_writes():
    x, w = torch.randn(4), torch.randn(4, requires_grad=True)
    loss = (x * w).sum()
    with torch.inference_mode():
        masked_fill_(x, torch.ones(4, dtype=torch.bool), 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_are_not_written_outside_inference_mode():
    with torch.inference_mode():
        x = torch.ones(4)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        masked_fill_(x, torch.ones(4, dtype=torch.bool), 0)


def test_a_mask_in_the_memory_of_the_input():
    x = torch.tensor([1, 0, 1, 0], dtype=torch.uint8)
    masked_fill_(x, x.view(torch.int8), 7)
    assert x.tolist() == [7, 0, 7, 0]
