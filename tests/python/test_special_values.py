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


ROWS = [pointwise_row(name, options) for name in LOSSES for options in OPTIONS[name]]

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
