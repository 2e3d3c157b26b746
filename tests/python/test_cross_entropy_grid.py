"""cross_entropy: every argument with every other, against the float64 reference, by both ways in."""

import pytest
import torch

import grid
import masked_loss
import reference
from reference import RELATIVE, assert_near, assert_positive_zero, assert_same_bits

CASES = list(enumerate(grid.covering_grid(grid.LEVELS)))
IDS = [grid.case_id(case) for _, case in CASES]

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2, "sequence_mean": 3}

# Few and short levels, for what differentiates by finite differences.
SMALL_LEVELS = {
    **grid.LEVELS,
    "dtype": (torch.float64,),
    "layout": ("N,C", "C", "B,C,T", "B,T,C"),
    "storage": ("contiguous", "transposed"),
    "classes": (1, 2, 3),
    "target": (torch.int64,),
    "mask": ("none", "bool", "nothing"),
    "sample_weight": ("none", "negative", "zeros", "smooth"),
    "weight_dtype": ("input",),
    "requires_grad": (True,),
    "upstream": ("one",),
    "normalizer": ("none", "number"),
}
SMALL_CASES = list(enumerate(grid.covering_grid(SMALL_LEVELS)))
SMALL_IDS = [grid.case_id(case) for _, case in SMALL_CASES]


def by_torch_ops(input, target, mask=None, **arguments):
    """masked_loss.cross_entropy's arguments handed to the dispatcher."""
    ids = arguments.pop("ignore_index", -100)
    normalizer = arguments.pop("normalizer", None)
    if isinstance(normalizer, float):
        accumulation = torch.float64 if input.dtype == torch.float64 else torch.float32
        normalizer = torch.tensor(normalizer, dtype=accumulation)
    return torch.ops.masked_loss.cross_entropy(
        input,
        target,
        mask,
        REDUCTIONS[arguments.pop("reduction", "mean")],
        ignore_index=[ids] if isinstance(ids, int) else ids,
        normalizer=normalizer,
        **arguments,
    )


def test_reference_formula_is_torch_where_every_class_is_allowed():
    x, y = torch.randn(5, 7, dtype=torch.float64), torch.randint(7, (5,))
    arguments = dict(weight=torch.rand(7), label_smoothing=0.2, z_loss=0.1)
    everything = torch.ones(7, dtype=torch.bool)
    formula = reference.cross_entropy(x, y, class_mask=everything, **arguments)
    assert_near(formula, reference.cross_entropy(x, y, **arguments))


@pytest.mark.parametrize(("seed", "case"), CASES, ids=IDS)
def test_against_reference(seed, case):
    call = grid.build(case, seed)
    loss, gradients = grid.run(masked_loss.cross_entropy, call)
    expected, expected_gradients = grid.run(reference.cross_entropy, grid.in_double(call))
    assert loss.dtype == call.input.dtype
    assert_near(loss, expected)
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves(call)]
    for leaf, gradient, wanted in zip(leaves(call), gradients, expected_gradients, strict=True):
        assert_near(gradient, wanted, coarser(call.input.dtype, leaf.dtype), largest_term(leaf, call, case))


def coarser(*dtypes):
    return max(dtypes, key=RELATIVE.get)


def largest_term(leaf, call, case):
    """Where a gradient can be 0 by cancellation: a weight that its sequence shares, one class, classes all alike."""
    alike = case["classes"] <= 2 or (case["storage"] == "expanded" and grid.LAYOUTS[case["layout"]][1] == 0)
    return 1.0 if leaf is not call.input or alike else 0.0


def leaves(call):
    return [t for t in (call.input, call.arguments["sample_weight"]) if t is not None and t.requires_grad]


@pytest.mark.parametrize(("seed", "case"), CASES, ids=IDS)
def test_torch_ops_and_bound_function_are_one(seed, case):
    call = grid.build(case, seed)
    loss, gradients = grid.run(masked_loss.cross_entropy, call)
    other, other_gradients = grid.run(by_torch_ops, call)
    assert_same_bits(loss, other)
    for gradient, other_gradient in zip(gradients, other_gradients, strict=True):
        assert_same_bits(gradient, other_gradient)


def poison(call, case):
    """Overwrites whatever must not be read: logits of masked rows and classes, targets and weights under the mask."""
    options = {name: call.arguments[name] for name in ("mask", "sample_weight", "class_mask", "ignore_index", "dim")}
    keep, allowed = reference.kept_rows(call.input, call.target, **options)
    at = grid.LAYOUTS[case["layout"]][1]
    read = (keep[:, None] & allowed).reshape(*call.target.shape, -1).movedim(-1, at)
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with torch.no_grad():
        call.input[~read] = garbage.repeat(read.numel())[: (~read).sum()].to(call.input.dtype)
    mask, weight = call.arguments["mask"], call.arguments["sample_weight"]
    if mask is None:
        return read
    masked = (mask == 0).expand(call.target.shape)
    call.target[masked] = torch.iinfo(call.target.dtype).max - 1
    if weight is not None and weight.shape == masked.shape:
        weight.data[masked] = torch.nan
    return read


# An expanded tensor has no place for garbage of its own.
OVERWRITABLE = [(seed, case) for seed, case in CASES if case["storage"] != "expanded"]


@pytest.mark.parametrize(("seed", "case"), OVERWRITABLE, ids=[grid.case_id(case) for _, case in OVERWRITABLE])
def test_what_is_masked_is_never_read(seed, case):
    clean, dirty = grid.build(case, seed), grid.build(case, seed)
    read = poison(dirty, case)
    loss, gradients = grid.run(masked_loss.cross_entropy, clean)
    other, other_gradients = grid.run(masked_loss.cross_entropy, dirty)
    assert_same_bits(other, loss)
    for gradient, other_gradient in zip(gradients, other_gradients, strict=True):
        assert_same_bits(other_gradient, gradient)
    if case["requires_grad"]:
        assert_positive_zero(other_gradients[0][~read])


def as_function(call):
    """The loss as a function of what is differentiated, for gradcheck."""

    def function(input, sample_weight=None):
        arguments = dict(call.arguments)
        if sample_weight is not None:
            arguments["sample_weight"] = sample_weight
        return masked_loss.cross_entropy(input, call.target, **arguments)

    return function, leaves(call)


@pytest.mark.parametrize(("seed", "case"), SMALL_CASES, ids=SMALL_IDS)
def test_derivatives(seed, case):
    function, inputs = as_function(grid.build(case, seed))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
