"""Kept special values: zeros of both signs, denormals, the largest numbers, inf, NaN, saturated probabilities.

The kernels, the composite in every mode of differentiation and torch agree there, in value and derivatives. An op joins
by rows of the table.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import masked_loss
import reference
from pointwise_grid import LOSSES, OPTIONS

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """An op, and arguments that together hold the special values."""

    id: str
    ours: Callable[..., Tensor]
    # The same by torch, whose answer is the right one.
    torchs: Callable[..., Tensor]
    # Of a dtype: the arguments that are differentiated, the first one by the kernels.
    arguments: Callable[[torch.dtype], Tensors]
    # The others, which are not.
    others: Callable[[torch.dtype], Tensors] = lambda dtype: {}
    # The arguments of which the kernels have the gradients.
    fused: tuple[str, ...] = ("input",)
    # Whether an element of the result depends on one element of each argument: then vmap goes over the elements.
    elementwise: bool = True
    # What torch's is computed in, where it is a formula that is less exact than an op.
    wide: bool = False
    # By argument: where torch's derivatives are those of a formula that has none there, and ours are finite.
    smooth: Callable[[Tensors], Tensor] | None = None


def special(dtype: torch.dtype) -> Tensor:
    """Of every kind of number, both signs."""
    info = torch.finfo(dtype)
    positive = [0.0, info.tiny * info.eps, info.tiny, 1e-4, 0.5, 1.0, 3.0, 20.0, 120.0, 1e4, info.max, math.inf]
    return torch.tensor([*positive, *(-x for x in positive), math.nan], dtype=dtype)


def probabilities(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    positive = [0.0, info.tiny * info.eps, info.tiny, 1e-20, 1e-4, 0.25, 0.5, 0.75, 1 - info.eps, 1 - info.eps / 2, 1.0]
    return torch.tensor([-0.0, *positive], dtype=dtype)


def product(**values: Tensor) -> Tensors:
    """Every value of one argument beside every value of the others."""
    return dict(zip(values, (v.flatten() for v in torch.meshgrid(*values.values(), indexing="ij")), strict=True))


def pointwise_arguments(name: str, dtype: torch.dtype) -> Tensors:
    if name == "binary_cross_entropy":
        return product(input=probabilities(dtype), target=probabilities(dtype))
    if name == "binary_cross_entropy_with_logits":
        return product(input=special(dtype), target=probabilities(dtype))
    if name == "sigmoid_focal_loss":
        targets = probabilities(dtype)  # of the smallest ones the terms cancel
        return product(input=special(dtype), target=targets[(targets == 0) | (targets > 0.2)])
    if name == "gaussian_nll_loss":
        values = special(dtype)
        return product(input=values, target=values, var=values[~(values < 0)])
    return product(input=special(dtype), target=special(dtype))


def saturated(arguments: Tensors) -> Tensor:
    """Where logits are finite, however large, sigmoid_focal_loss has derivatives."""
    return arguments["input"].isfinite() & (arguments["input"].abs() <= 1e4)


def focal(input: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> Tensor:
    """torchvision's formula, but for what cancels in it: 1 - p where p is next to 1, and small losses."""
    losses = F.binary_cross_entropy_with_logits(input, target, reduction=reduction)
    exact = target * F.softplus(-input, 1, 40) + (1 - target) * F.softplus(input, 1, 40)
    losses = torch.where(input.isfinite(), exact, losses)
    wrong = target * torch.sigmoid(-input) + (1 - target) * torch.sigmoid(input)
    losses = losses * wrong**gamma
    return losses * (alpha * target + (1 - alpha) * (1 - target)) if alpha >= 0 else losses


def pointwise_row(name: str, options: dict[str, float]) -> Row:
    torchs = focal if name == "sigmoid_focal_loss" else reference.POINTWISE[name][0]
    return Row(
        " ".join([name, *(f"{n}={value}" for n, value in options.items())]),
        functools.partial(getattr(masked_loss, name), **options),
        functools.partial(torchs, **options),
        functools.partial(pointwise_arguments, name),
        fused=("input", "var") if name == "gaussian_nll_loss" else ("input",),
        wide=name == "sigmoid_focal_loss",
        smooth=saturated if name == "sigmoid_focal_loss" else None,
    )


def lines(dtype: torch.dtype, largest: float = math.inf) -> Tensors:
    """Lines of five numbers, one of which is special: of the finite ones those up to `largest`."""
    values = special(dtype)
    values = values[~(values.abs() > largest) | values.isinf()]
    input = torch.tensor([0.25, -1.5, 0.75, 2.0, 0.5], dtype=dtype).repeat(len(values), 1)
    input[:, 2] = values
    return dict(input=input)


def of_lines(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of each line, and of them all; what is whitened, with weights, as its sum is 0."""

    def function(input: Tensor, reduction: str) -> Tensor:
        results = reduce(input, dim=-1)
        if results.shape == input.shape:
            results = (results * torch.tensor([1.0, 3.0, -2.0, 0.5, 4.0], dtype=results.dtype)).sum(-1)
        return results if reduction == "none" else results.sum()

    return function


def whitened(input: Tensor, dim: int) -> Tensor:
    mean, var = input.mean(dim, keepdim=True), input.var(dim, keepdim=True)
    return (input - mean) / (var + 1e-8).sqrt()


# Squares, or a tangent, beyond what the dtype holds: torch's ops take them in double, or scale them first.
LARGEST = {"masked_var": 1e5, "masked_std": 1e5, "masked_whiten": 1e5}


def reduction_row(name: str, torchs: Callable[..., Tensor]) -> Row:
    kept = torch.ones(1, 5, dtype=torch.bool)
    return Row(
        name,
        of_lines(functools.partial(getattr(masked_loss, name), mask=kept)),
        of_lines(torchs),
        functools.partial(lines, largest=LARGEST.get(name, math.inf)),
        elementwise=False,
        wide=name == "masked_whiten",
    )


ROWS = [pointwise_row(name, options) for name in LOSSES for options in OPTIONS[name]]
ROWS += [
    reduction_row("masked_sum", torch.sum),
    reduction_row("masked_mean", torch.mean),
    reduction_row("masked_var", torch.var),
    reduction_row("masked_std", torch.std),
    reduction_row("masked_whiten", whitened),
]

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def leaves(tensors: Tensors, names=None) -> Tensors:
    return {n: t.detach().clone().requires_grad_(names is None or n in names) for n, t in tensors.items()}


def expected(row: Row, dtype: torch.dtype) -> tuple[Tensor, Tensors, dict[tuple[str, str], Tensor]]:
    """torch's losses, gradients and, by pairs of arguments, second derivatives along ones."""
    wide = torch.float64 if row.wide else dtype
    given = leaves({n: t.to(wide) for n, t in row.arguments(dtype).items()})
    losses = row.torchs(**given, **row.others(wide), reduction="none")
    gradients = gradients_of(losses, given, create_graph=True)
    second = {}
    for name, gradient in gradients.items():
        found = gradients_of(gradient, given) if gradient.requires_grad else {n: None for n in given}
        second |= {(name, n): torch.zeros_like(t) if found[n] is None else found[n] for n, t in given.items()}
    to = lambda tensors: {n: t.detach().to(dtype) for n, t in tensors.items()}  # noqa: E731
    return losses.detach().to(dtype), to(gradients), to(second)


def gradients_of(losses: Tensor, given: Tensors, create_graph: bool = False) -> Tensors:
    wanted = {n: t for n, t in given.items() if t.requires_grad}
    ones = torch.ones_like(losses)
    options = dict(create_graph=create_graph, retain_graph=True, allow_unused=True)
    return dict(zip(wanted, torch.autograd.grad(losses, list(wanted.values()), ones, **options), strict=True))


def assert_agree(actual: Tensor, wanted: Tensor, arguments: Tensors, where: Tensor | None = None) -> None:
    """`where`: of what agrees, by default everything; NaN and inf agree with themselves."""
    tolerance = dict(rtol=4e-6, atol=1e-6) if actual.dtype == torch.float32 else dict(rtol=1e-12, atol=1e-14)
    alike = torch.isclose(actual, wanted, **tolerance, equal_nan=True)
    wrong = ~alike if where is None else ~alike & where
    found = [
        f"{actual[at].item():.9g} instead of {wanted[at].item():.9g} at "
        + ", ".join(f"{n} {t[at].tolist() if t.dim() else t.item()}" for n, t in arguments.items())
        for at in map(tuple, wrong.nonzero()[:8].tolist())
    ]
    assert not found, f"{wrong.sum()} of {wrong.numel()}:\n" + "\n".join(found)


def assert_derivatives(actual: Tensor, wanted: Tensor, row: Row, arguments: Tensors) -> None:
    """As torch's; where torch's formula has none and there is one, finite."""
    if row.smooth is None:
        return assert_agree(actual, wanted, arguments)
    smooth = row.smooth(arguments)
    assert_agree(actual, wanted, arguments, where=smooth & wanted.isfinite())
    assert_agree(actual.isfinite(), smooth | actual.isfinite(), arguments)


@every_dtype
@every_row
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_kernels(row, dtype, reduction):
    """Losses, and gradients from a backward pass of their own or made in the forward pass."""
    losses, gradients, _ = expected(row, dtype)
    given = leaves(row.arguments(dtype), row.fused)
    with torch.no_grad():
        assert_agree(row.ours(**given, **row.others(dtype), reduction="none"), losses, given)
    found = gradients_of(row.ours(**given, **row.others(dtype), reduction=reduction), given)
    for name in row.fused:
        assert_derivatives(found[name], gradients[name], row, given)


@every_dtype
@every_row
def test_composite(row, dtype):
    """The same where every argument is differentiated."""
    losses, gradients, _ = expected(row, dtype)
    given = leaves(row.arguments(dtype))
    actual = row.ours(**given, **row.others(dtype), reduction="none")
    assert_agree(actual, losses, given)
    for name, gradient in gradients_of(actual, given).items():
        if name in row.fused or not row.wide:  # terms of the others cancel in a formula
            assert_derivatives(gradient, gradients[name], row, given)


@every_dtype
@every_row
@pytest.mark.parametrize("mode", ["create_graph", "jvp", "grad", "vmap", "vmap of grad"])
def test_every_mode(row, dtype, mode):
    """Of the arguments that the kernels differentiate."""
    losses, gradients, _ = expected(row, dtype)
    arguments, others = row.arguments(dtype), row.others(dtype)
    if mode.startswith("vmap") and not row.elementwise:
        pytest.skip("there is nothing to batch")
    if mode == "vmap":
        names = list(arguments)
        each = torch.vmap(lambda *values: row.ours(**dict(zip(names, values, strict=True)), **others, reduction="none"))
        return assert_agree(each(*arguments.values()), losses, arguments)
    for name in row.fused:
        rest = {n: t for n, t in arguments.items() if n != name} | others

        def of(x, name=name, rest=rest):
            return row.ours(**{name: x}, **rest, reduction="none")

        x = arguments[name]
        if mode == "create_graph":
            leaf = {name: x.clone().requires_grad_()}
            found = gradients_of(of(leaf[name]), leaf, create_graph=True)[name]
        elif mode == "grad":
            found = torch.func.grad(lambda x: of(x).sum())(x)
        elif mode == "jvp" and row.elementwise:
            found = torch.func.jvp(of, (x,), (torch.ones_like(x),))[1]
        elif mode == "jvp":
            theirs = lambda x: row.torchs(**{name: x}, **rest, reduction="none")  # noqa: B023, E731
            found, wanted = (torch.func.jvp(f, (x,), (torch.ones_like(x),))[1] for f in (of, theirs))
            assert_agree(found, wanted, {}, where=wanted.isfinite())
            continue
        else:
            names = [name, *(n for n in arguments if n != name)]

            def one(*values, names=names):
                return row.ours(**dict(zip(names, values, strict=True)), **others, reduction="none")

            found = torch.vmap(torch.func.grad(one))(*(arguments[n] for n in names))
        assert_derivatives(found, gradients[name], row, arguments)


@every_dtype
@every_row
def test_second_derivatives(row, dtype):
    """Where torch's are finite."""
    _, _, second = expected(row, dtype)
    given = leaves(row.arguments(dtype))
    losses = row.ours(**given, **row.others(dtype), reduction="none")
    gradients = gradients_of(losses, given, create_graph=True)
    for name in row.fused:
        if not gradients[name].requires_grad:
            continue
        for other, found in gradients_of(gradients[name], given).items():
            found = torch.zeros_like(given[other]) if found is None else found
            wanted = second[name, other]
            smooth = torch.ones_like(wanted, dtype=torch.bool) if row.smooth is None else row.smooth(given)
            assert_agree(found, wanted, given, where=smooth & wanted.isfinite())
            if row.smooth is not None and other == name:
                assert_agree(found.isfinite(), row.smooth(given) | found.isfinite(), given)


@dataclass(frozen=True)
class RowOp:
    """An op of rows of three classes, and the same by torch; of rows in any batch."""

    ours: Callable[..., Tensor]
    torchs: Callable[[Tensor], Tensor]
    # What the largest number is divided by, where torch's own sums overflow sooner or later than ours.
    below: float = 1.0
    # Whether torch has the derivatives from a rounded log-sum-exp, which says nothing of large logits that are equal.
    rounded: bool = False


def first_class(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:-1], dtype=torch.long)


def probable(*numbers: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tensor(numbers, dtype=x.dtype).expand(x.shape)


def cross_entropy_rows(target=first_class, z_loss=0.0, weighted=False, below=1.0, **options: float) -> RowOp:
    weight = torch.tensor([0.5, 2.0, 1.0])

    def ours(x: Tensor, reduction: str = "none") -> Tensor:
        given = dict(weight=weight.to(x.dtype)) if weighted else {}
        return masked_loss.cross_entropy(x, target(x), reduction=reduction, dim=-1, z_loss=z_loss, **given, **options)

    def torchs(x: Tensor) -> Tensor:
        given = dict(weight=weight.to(x.dtype)) if weighted else {}
        rows = x.reshape(-1, x.shape[-1])
        losses = F.cross_entropy(rows, target(rows), reduction="none", **given, **options).view(x.shape[:-1])
        if z_loss == 0:
            return losses
        of_target = weight[0] if weighted and target is first_class else 1.0
        return losses + z_loss * of_target * torch.logsumexp(x, -1) ** 2

    return RowOp(ours, torchs, below, rounded=z_loss != 0)


OUTER = torch.tensor([True, False, True])


def of_outer(function: Callable[[Tensor, int], Tensor], outside: float) -> Callable[[Tensor], Tensor]:
    def torchs(x: Tensor) -> Tensor:
        result = function(x[..., ::2], -1)
        return torch.stack([result[..., 0], torch.full_like(result[..., 0], outside), result[..., 1]], -1)

    return torchs


ROW_OPS = {
    "cross_entropy": cross_entropy_rows(),
    "cross_entropy smoothing": cross_entropy_rows(label_smoothing=0.1, below=8),
    "cross_entropy weight": cross_entropy_rows(weighted=True),
    "cross_entropy weight, smoothing": cross_entropy_rows(label_smoothing=0.1, weighted=True, below=8),
    "cross_entropy z_loss": cross_entropy_rows(z_loss=0.1, below=8),
    "cross_entropy probabilities": cross_entropy_rows(probable(0.2, 0.5, 0.3)),
    "cross_entropy one-hot": cross_entropy_rows(probable(1.0, 0.0, 0.0)),
    "cross_entropy one-hot, smoothing": cross_entropy_rows(probable(1.0, 0.0, 0.0), label_smoothing=0.1, below=8),
    "cross_entropy probabilities, weight, z_loss": cross_entropy_rows(
        probable(0.2, 0.5, 0.3), z_loss=0.1, weighted=True, below=8
    ),
    "cross_entropy class_mask": RowOp(
        lambda x, reduction="none": masked_loss.cross_entropy(
            x, first_class(x), class_mask=OUTER, reduction=reduction, dim=-1
        ),
        lambda x: -torch.log_softmax(x[..., ::2], -1)[..., 0],
    ),
    "softmax": RowOp(lambda x: masked_loss.softmax(x), lambda x: torch.softmax(x, -1)),
    "softmax mask": RowOp(lambda x: masked_loss.softmax(x, OUTER), of_outer(torch.softmax, 0.0)),
    "log_softmax": RowOp(lambda x: masked_loss.log_softmax(x), lambda x: torch.log_softmax(x, -1)),
    "log_softmax mask": RowOp(lambda x: masked_loss.log_softmax(x, OUTER), of_outer(torch.log_softmax, -math.inf)),
    "logsumexp": RowOp(lambda x: masked_loss.logsumexp(x), lambda x: torch.logsumexp(x, -1), rounded=True),
    "logsumexp mask": RowOp(
        lambda x: masked_loss.logsumexp(x, OUTER), lambda x: torch.logsumexp(x[..., ::2], -1), rounded=True
    ),
}


def special_rows(op: RowOp, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    largest = info.max / op.below
    numbers = [0.0, -0.0, info.tiny * info.eps, 1e-4, 1.0, -20.0, 120.0, 1e4, -1e4, largest, -largest]
    values = torch.tensor([*numbers, math.inf, -math.inf, math.nan], dtype=dtype)
    rows = torch.cartesian_prod(values, values, values)
    if not op.rounded:
        return rows
    # Of any two of the classes, as a mask may leave them.
    equal = torch.stack([rows[:, i] == rows[:, j] for i, j in ((0, 1), (0, 2), (1, 2))], -1)
    return rows[~(equal.any(-1) & (rows.nan_to_num().abs() > 1e2).any(-1))]


def directions(rows: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
    """What arrives from upstream, and a direction of the rows, alike for every row."""
    numbers = torch.tensor([1.5, -0.5, 0.75], dtype=rows.dtype)
    upstream = numbers if result.dim() == rows.dim() else numbers[0]
    return upstream.expand(result.shape), torch.tensor([-0.25, 1.0, 0.5], dtype=rows.dtype).expand(rows.shape)


def derivatives(function: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and second derivative, by autograd twice."""
    leaf = rows.clone().requires_grad_()
    result = function(leaf)
    upstream, along = directions(rows, result)
    (gradient,) = torch.autograd.grad(result, leaf, upstream, create_graph=True)
    (second,) = torch.autograd.grad((gradient * along).sum(), leaf)
    return result.detach(), gradient.detach(), second


@every_dtype
@pytest.mark.parametrize("name", ROW_OPS)
def test_rows_of_classes(name, dtype):
    op = ROW_OPS[name]
    rows = special_rows(op, dtype)
    value, gradient, second = derivatives(op.torchs, rows)
    upstream, along = directions(rows, value)
    found = {f"class {c}": rows[:, c] for c in range(3)}

    def agree(actual: Tensor, wanted: Tensor, where: Tensor | None = None) -> None:
        for c in range(3) if actual.dim() == 2 else (...,):
            each = (slice(None), c) if actual.dim() == 2 else c
            assert_agree(actual[each], wanted[each], found, None if where is None else where[each])

    def weighed(x: Tensor) -> Tensor:
        return (op.ours(x) * upstream[0]).sum()

    agree(op.ours(rows), value)
    leaf = rows.clone().requires_grad_()
    agree(torch.autograd.grad(op.ours(leaf), leaf, upstream)[0], gradient)
    again = derivatives(op.ours, rows)
    agree(again[1], gradient)
    agree(again[2], second, where=second.isfinite())
    agree(torch.vmap(op.ours)(rows), value)
    agree(torch.func.grad(weighed)(rows), gradient)
    agree(torch.vmap(torch.func.grad(weighed))(rows), gradient)
    ours, theirs = (torch.func.jvp(f, (rows,), (along,)) for f in (op.ours, op.torchs))
    agree(ours[0], value)
    agree(ours[1], theirs[1])
    over = torch.func.jvp(torch.func.grad(weighed), (rows,), (along,))[1]
    agree(over, second, where=second.isfinite())


@every_dtype
@pytest.mark.parametrize("name", [name for name in ROW_OPS if name.startswith("cross_entropy")])
def test_gradients_of_rows_that_are_made_with_the_loss(name, dtype):
    op = ROW_OPS[name]
    rows = special_rows(op, dtype)
    _, gradient, _ = derivatives(op.torchs, rows)
    leaf = rows.clone().requires_grad_()
    (actual,) = torch.autograd.grad(1.5 * op.ours(leaf, "sum"), leaf)
    for c in range(3):
        assert_agree(actual[:, c], gradient[:, c], {f"class {k}": rows[:, k] for k in range(3)})
