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
    "target": (torch.int64, "probabilities"),
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
    assert [g.dtype for g in gradients] == [t.dtype for t in grid.leaves(call)]
    for leaf, gradient, wanted in zip(grid.leaves(call), gradients, expected_gradients, strict=True):
        assert_near(gradient, wanted, coarser(call.input.dtype, leaf.dtype), grid.largest_term(leaf, call, case))


def coarser(*dtypes):
    return max(dtypes, key=RELATIVE.get)


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
    rows = reference.row_shape(call.input, options["dim"])
    read = (keep[:, None] & allowed).reshape(*rows, -1).movedim(-1, at)
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with torch.no_grad():
        call.input[~read] = garbage.repeat(read.numel())[: (~read).sum()].to(call.input.dtype)
    mask, weight = call.arguments["mask"], call.arguments["sample_weight"]
    if mask is None:
        return read
    masked = (~reference.is_kept(mask)).expand(rows)
    with torch.no_grad():
        if call.target.is_floating_point():
            call.target.movedim(at, -1)[masked] = torch.nan
        else:
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


IN_BYTES = [(seed, case) for seed, case in CASES if "bytes" in (case["mask"], case["class_mask"])]


@pytest.mark.parametrize(("seed", "case"), IN_BYTES, ids=[grid.case_id(case) for _, case in IN_BYTES])
def test_bytes_of_masks_are_not_numbers(seed, case):
    call = grid.build(case, seed)
    loss, gradients = grid.run(masked_loss.cross_entropy, call)
    plain = call._replace(arguments=grid.with_plain_masks(call.arguments))
    other, other_gradients = grid.run(masked_loss.cross_entropy, plain)
    assert_same_bits(loss, other)
    for gradient, other_gradient in zip(gradients, other_gradients, strict=True):
        assert_same_bits(gradient, other_gradient)


def as_function(call):
    """The loss as a function of what is differentiated, for gradcheck."""

    def function(*given):
        given = dict(zip(map(id, grid.leaves(call)), given, strict=True))
        arguments = {name: given.get(id(value), value) for name, value in call.arguments.items()}
        input, target = (given.get(id(tensor), tensor) for tensor in (call.input, call.target))
        return masked_loss.cross_entropy(input, target, **arguments)

    return function, grid.leaves(call)


@pytest.mark.parametrize(("seed", "case"), SMALL_CASES, ids=SMALL_IDS)
def test_derivatives(seed, case):
    function, inputs = as_function(grid.build(case, seed))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_for_probabilities_and_weights(reduction, smoothing):
    """Without a class mask: more than 0 on a class that is not allowed costs inf, which is no derivative."""
    x, sample_weight = torch.randn(3, 4, 2, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64) + 0.5
    probabilities, weight = torch.rand_like(x), torch.rand(4, dtype=torch.float64) + 0.5
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    inputs = [tensor.requires_grad_() for tensor in (x, probabilities, weight, sample_weight)]

    def function(x, probabilities, weight, sample_weight):
        options = dict(weight=weight, sample_weight=sample_weight, label_smoothing=smoothing, z_loss=0.1)
        return masked_loss.cross_entropy(x, probabilities, mask, reduction=reduction, **options)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_probability_on_a_class_that_is_not_allowed(requires_grad):
    x = torch.randn(3, 4, requires_grad=requires_grad)
    probabilities = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.4, 0.3, 0.3, 0.0], [0.0, 0.0, 0.0, 1.0]])
    class_mask = torch.tensor([True, True, False, True])
    loss = masked_loss.cross_entropy(x, probabilities, class_mask=class_mask, reduction="none")
    assert loss.isposinf().tolist() == [False, True, False]
    if requires_grad:
        (gradient,) = torch.autograd.grad(loss, x, torch.ones(3))
        assert gradient.isfinite().all()
        assert_positive_zero(gradient[:, 2])


def test_dtypes_of_probabilities_promote():
    x, probabilities = torch.randn(5, 7), torch.rand(5, 7)
    for a in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for b in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            loss = masked_loss.cross_entropy(x.to(a).requires_grad_(), probabilities.to(b))
            assert loss.dtype == torch.promote_types(a, b)
            assert_near(loss, reference.cross_entropy(x.to(a), probabilities.to(b)))


def test_probabilities_below_autograd():
    """In inference mode the dispatcher goes straight to the backend."""
    x, probabilities, mask = torch.randn(5, 7), torch.rand(5, 7), torch.tensor([1, 0, 1, 1, 0])
    with torch.inference_mode():
        loss = masked_loss.cross_entropy(x.clone(), probabilities.clone(), mask)
    assert_same_bits(loss, masked_loss.cross_entropy(x, probabilities, mask))
    with pytest.raises(TypeError, match="expected class probabilities of the input's dtype, Float, got Double"):
        torch.ops.masked_loss._cross_entropy_forward(x, probabilities.double())


def test_probabilities_of_no_class():
    x = torch.randn(3, 0, requires_grad=True)
    for targets in (torch.rand(3, 0), torch.rand(3, 0, requires_grad=True)):
        loss = masked_loss.cross_entropy(x, targets, reduction="none")
        assert_same_bits(loss, torch.zeros(3))
        leaves = [tensor for tensor in (x, targets) if tensor.requires_grad]
        for gradient in torch.autograd.grad(loss.sum(), leaves, create_graph=True):
            assert gradient.shape == (3, 0)


@pytest.mark.parametrize("classes", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_on_a_class_that_is_not_allowed_hides_no_probability(dtype, classes):
    q, class_mask = torch.zeros(1, classes, dtype=dtype), torch.zeros(classes, dtype=torch.bool)
    q[0, 0], q[0, 1], class_mask[0] = 1.0, torch.nan, True
    assert masked_loss.cross_entropy(torch.zeros(1, classes, dtype=dtype), q, class_mask=class_mask) == 0
    q[0, 2] = 0.5
    assert masked_loss.cross_entropy(torch.zeros(1, classes, dtype=dtype), q, class_mask=class_mask) == torch.inf


def test_error_of_other_floating_probabilities():
    with pytest.raises(TypeError, match="expected target of a floating dtype, got Float8_e4m3fn"):
        masked_loss.cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3).to(torch.float8_e4m3fn))
