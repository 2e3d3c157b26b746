"""The table of ops that the harness, test_composability.py, runs through everything torch can do with one.

An op joins by one row: it is differentiated, batched, compiled, exported, scripted, ... with each of its samples.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, List, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grid
import masked_loss
import pointwise_grid
import reference

T, C, H = 4, 5, 6
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """One row: a public function, and what the harness cannot find out about it."""

    name: str
    function: Callable[..., Tensor]
    # The same from ATen ops, differentiable by plain autograd.
    reference: Callable[..., Tensor]
    # name: from the size of the batch to the arguments, new random ones each time. What requires grad is
    # differentiated; every tensor is batched by vmap.
    samples: dict[str, Callable[[int], Arguments]]
    # Floating arguments that torch does not differentiate: an error if they require grad.
    refuses_grad: tuple[str, ...] = ()
    # An argument that is written to, which therefore needs a batch wherever another one has one.
    written: str | None = None
    # torch's function whose dtype it has under autocast.
    namesake: Callable[..., Tensor] | None = None
    module: type[nn.Module] | None = None
    # torch's loss that a model of C outputs trains with beside ours, what these become before, and their targets.
    trained: Callable[..., Tensor] | None = None
    head: Callable[[Tensor], Tensor] = lambda outputs: outputs
    targets: Callable[[int], Tensor] = lambda size: torch.randint(C, (size,))
    # Arguments whose derivatives are the composite's: graphs have plain ops instead of ours.
    composed: tuple[str, ...] = ()
    # How many ops of ours the graphs have, forward and backward.
    parts: tuple[int, int] = (1, 1)
    # What a bug of torch blocks, and which.
    blocked: dict[str, str] = field(default_factory=dict)
    # More arguments for opcheck, which cover every pair of levels of two of them.
    grid: Callable[[], Iterator[Arguments]] | None = None


def leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()


def keep(size: int, *shape: int) -> Tensor:
    """Random, with something masked and something not."""
    mask = torch.rand(size, *shape) < 0.7
    mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


def cross_entropy_samples() -> dict[str, Callable[[int], Arguments]]:
    """Every reduction with options that together take every branch of the autograd kernels and of the composite."""

    def batch(size: int) -> Arguments:
        return dict(input=leaf(torch.randn(size, T, C)), target=torch.randint(3, (size, T)), dim=-1)

    options = {
        "mask": lambda size: dict(batch(size), mask=keep(size, T)),
        "weights": lambda size: dict(
            batch(size), mask=keep(size, 1).long(), weight=torch.rand(C), sample_weight=torch.rand(size, T) + 0.1
        ),
        "differentiated weights": lambda size: dict(
            batch(size), sample_weight=leaf(torch.rand(size, 1) + 0.1), ignore_index=[1, -100], label_smoothing=0.1
        ),
        "inner classes": lambda size: dict(
            batch(size),
            input=leaf(torch.randn(size, C, T)),
            mask=keep(size, T),
            class_mask=torch.tensor([1, 1, 1, 0, 1]),
            label_smoothing=0.2,
            z_loss=0.1,
            dim=1,
        ),
        "dense classes": lambda size: dict(
            batch(size),
            weight=torch.rand(C),
            sample_weight=leaf(torch.rand(size, T) + 0.1),
            class_mask=torch.rand(size, T, C) < torch.tensor([2, 2, 2, 0.5, 0.5]),
            z_loss=0.1,
        ),
    }
    number = lambda size: dict(batch(size), mask=keep(size, T), normalizer=7.5)  # noqa: E731
    count = lambda size: dict(batch(size), mask=keep(size, T), normalizer=torch.tensor(3.0))  # noqa: E731

    def reduced(sample: Callable[[int], Arguments], reduction: str) -> Callable[[int], Arguments]:
        return lambda size: dict(sample(size), reduction=reduction)

    samples = {
        f"{reduction} {name}": reduced(sample, reduction)
        for reduction in ("mean", "none", "sum", "sequence_mean")
        for name, sample in options.items()
    }
    return {
        **samples,
        "mean number": reduced(number, "mean"),
        "mean count": reduced(count, "mean"),
        "mean dtype": lambda size: dict(number(size), dtype=torch.float64),
        "sequence_mean count": reduced(count, "sequence_mean"),
    }


def linear_samples() -> dict[str, Callable[[int], Arguments]]:
    """Every reduction, in chunks or blocks and whole."""

    def batch(size: int) -> Arguments:
        return dict(
            input=leaf(torch.randn(size, T, H)),
            linear_weight=leaf(torch.randn(C, H)),
            target=torch.randint(3, (size, T)),
            mask=keep(size, T),
        )

    samples = {
        "mean": lambda size: dict(batch(size), linear_bias=leaf(torch.randn(C)), chunk_size=5),
        "none": lambda size: dict(batch(size), linear_bias=leaf(torch.randn(C)), chunk_size=3, reduction="none"),
        "sum weights": lambda size: dict(
            batch(size),
            weight=torch.rand(C),
            sample_weight=torch.rand(size, T) + 0.1,
            class_mask=torch.tensor([1, 1, 1, 0, 1]),
            label_smoothing=0.2,
            z_loss=0.1,
            reduction="sum",
        ),
        "none softcap": lambda size: dict(
            batch(size),
            weight=torch.rand(C),
            class_mask=torch.rand(size, T, C) < torch.tensor([2, 2, 2, 0.5, 0.5]),
            label_smoothing=0.2,
            softcap=3.0,
            temperature=0.7,
            chunk_size=4,
            reduction="none",
        ),
        "sequence_mean differentiated weights": lambda size: dict(
            batch(size),
            sample_weight=leaf(torch.rand(size, 1) + 0.1),
            ignore_index=[1, -100],
            reduction="sequence_mean",
        ),
        "mean frozen head": lambda size: dict(
            batch(size), linear_weight=torch.randn(C, H), softcap=5.0, normalizer=torch.tensor(3.0)
        ),
        "mean frozen input": lambda size: dict(batch(size), input=torch.randn(size, T, H), temperature=2.0),
        "mean dtype": lambda size: dict(batch(size), dtype=torch.float64),
    }
    return samples


def log_prob_samples() -> dict[str, Callable[[int], Arguments]]:
    def batch(size: int) -> Arguments:
        return dict(
            input=leaf(torch.randn(size, T, H)),
            linear_weight=leaf(torch.randn(C, H)),
            index=torch.randint(3, (size, T)),
            mask=keep(size, T),
        )

    return {
        "bias": lambda size: dict(batch(size), linear_bias=leaf(torch.randn(C)), chunk_size=3),
        "softcap": lambda size: dict(
            batch(size), class_mask=torch.tensor([1, 1, 1, 0, 1]), softcap=3.0, temperature=0.7, chunk_size=5
        ),
        "frozen head": lambda size: dict(batch(size), linear_weight=torch.randn(C, H)),
    }


def linear_kl_samples() -> dict[str, Callable[[int], Arguments]]:
    """Every kind and reduction, in chunks and whole."""

    def batch(size: int) -> Arguments:
        return dict(
            input=leaf(torch.randn(size, T, H)),
            linear_weight=leaf(torch.randn(C, H)),
            target_input=leaf(torch.randn(size, T, H + 1)),
            target_linear_weight=leaf(torch.randn(C, H + 1)),
            mask=keep(size, T),
        )

    return {
        "mean": lambda size: dict(
            batch(size), linear_bias=leaf(torch.randn(C)), target_linear_bias=leaf(torch.randn(C)), chunk_size=5
        ),
        "none jsd": lambda size: dict(batch(size), kind="jsd", beta=0.3, temperature=0.7, reduction="none"),
        "sum reverse classes": lambda size: dict(
            batch(size),
            sample_weight=torch.rand(size, T) + 0.1,
            class_mask=torch.tensor([1, 1, 1, 0, 1]),
            softcap=3.0,
            kind="reverse",
            reduction="sum",
        ),
        "sequence_mean differentiated weights": lambda size: dict(
            batch(size), sample_weight=leaf(torch.rand(size, 1) + 0.1), kind="jsd", reduction="sequence_mean"
        ),
        "mean frozen teacher": lambda size: dict(
            batch(size),
            target_input=torch.randn(size, T, H + 1),
            target_linear_weight=torch.randn(C, H + 1),
            class_mask=torch.rand(size, T, C) < torch.tensor([2, 2, 2, 0.5, 0.5]),
            normalizer=torch.tensor(3.0),
            dtype=torch.float64,
        ),
    }


# One tensor of two, for the harness.
def log_prob_and_half_entropy(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    mask: Optional[Tensor] = None,
    linear_bias: Optional[Tensor] = None,
    class_mask: Optional[Tensor] = None,
    softcap: Optional[float] = None,
    temperature: float = 1.0,
    chunk_size: Optional[int] = None,
) -> Tensor:
    log_prob, entropy = masked_loss.linear_log_prob_and_entropy(
        input,
        linear_weight,
        index,
        mask,
        linear_bias=linear_bias,
        class_mask=class_mask,
        softcap=softcap,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    return log_prob + 0.5 * entropy


def cross_entropy_grid() -> Iterator[Arguments]:
    levels = {
        **grid.LEVELS,
        "dtype": (torch.float32, torch.bfloat16),
        "layout": ("N,C", "C", "B,C,T", "B,T,C"),
        "storage": ("contiguous", "transposed", "strided"),
        "classes": (3, 65),
        "target": (torch.int64, torch.uint8, "probabilities"),
        "mask": ("none", "bool", "int8", "broadcast", "nothing"),
        "weight": ("none", "positive"),
        "sample_weight": ("none", "full", "broadcast", "differentiable"),
        "class_mask": ("none", "[C]", "dense"),
        "ignore_index": ("default", "several"),
        "label_smoothing": (0.0, 0.1),
        "normalizer": ("none", "tensor"),
        "upstream": ("any",),
    }
    for seed, case in enumerate(grid.covering_grid(levels)):
        call = grid.build(case, seed)
        yield dict(input=call.input, target=call.target, **call.arguments)


def torch_cross_entropy(
    input: Tensor, target: Tensor, dim: int = 1, dtype: torch.dtype | None = None, **_: object
) -> Tensor:
    if dim == -1:
        input, target = input.flatten(0, -2), target.flatten()
    loss = F.cross_entropy(input, target)
    return loss if dtype is None else loss.to(dtype)


def torch_masked_fill(input: Tensor, mask: Tensor, value: float | Tensor) -> Tensor:
    return torch.masked_fill(input, mask != 0, value)


def filled_in_place(input: Tensor, mask: Tensor, value: Union[int, float, Tensor]) -> Tensor:
    return masked_loss.masked_fill_(input.clone(), mask, value)


def pointwise_samples(name: str, *variants: Arguments) -> dict[str, Callable[[int], Arguments]]:
    """Every reduction, with all of the loss's arguments; `variants`: options in turns."""
    options = (variants or ({},)) * 4

    def batch(size: int, variant: Arguments) -> Arguments:
        tensors = pointwise_grid.operands(name, (size, T), variant)
        if name in ("kl_div", "poisson_nll_loss") and not variant.get("log_target"):
            tensors["target"] += 0.1  # away from where t log t and Stirling's formula have a kink
        differentiated = ("input", "var")
        return {n: leaf(t) if n in differentiated else t for n, t in tensors.items()} | variant

    def weights(size: int) -> Arguments:
        arguments = batch(size, options[1])
        if name in pointwise_grid.WEIGHTED:
            arguments["weight"] = torch.rand(size, 1) + 0.1
        if name == "binary_cross_entropy_with_logits":
            arguments["pos_weight"] = torch.rand(T) + 0.5
        return arguments | dict(mask=keep(size, 1).long(), sample_weight=torch.rand(size, T) + 0.1, reduction="none")

    def differentiated_weights(size: int) -> Arguments:
        arguments = batch(size, options[2])
        leaf(arguments["target"])
        if name in pointwise_grid.WEIGHTED:
            arguments["weight"] = leaf(torch.rand(size, T) + 0.1)
        return arguments | dict(mask=keep(size, T), sample_weight=leaf(torch.rand(size, 1) + 0.1), reduction="sum")

    samples = {
        "mean": lambda size: dict(batch(size, options[0]), mask=keep(size, T)),
        "none weights": weights,
        "sum differentiated weights": differentiated_weights,
        "sequence_mean count": lambda size: dict(
            batch(size, options[3]), mask=keep(size, T), reduction="sequence_mean", normalizer=torch.tensor(3.0)
        ),
        "mean dtype": lambda size: dict(batch(size, options[0]), mask=keep(size, T), dtype=torch.float64),
    }
    if name == "kl_div":
        samples["batchmean"] = lambda size: dict(batch(size, {}), mask=keep(size, T), reduction="batchmean")
    return samples


def pointwise_grid_of(name: str) -> Iterator[Arguments]:
    levels = {
        **pointwise_grid.LEVELS,
        "loss": (name,),
        "dtype": (torch.float32, torch.bfloat16),
        "shape": ("[]", "[7]", "[2, 3, 4, 5]", "[0, 3]"),
        "mask": ("none", "bool", "int8", "broadcast"),
        "weight": ("none", "full", "differentiable"),
        "sample_weight": ("none", "broadcast", "differentiable"),
        "normalizer": ("none", "tensor"),
    }
    for seed, case in enumerate(grid.covering_grid(levels)):
        yield pointwise_grid.build(case, seed).arguments


def in_dtype(loss: Tensor, dtype: torch.dtype | None) -> Tensor:
    return loss if dtype is None else loss.to(dtype)


def pointwise_op(
    name: str,
    module: type[nn.Module],
    *variants: Arguments,
    namesake: Callable[..., Tensor] = F.mse_loss,
    trained: Callable[..., Tensor] | None = None,
    head: Callable[[Tensor], Tensor] = torch.clone,
    grid: Callable[[], Iterator[Arguments]] | None = None,
) -> Op:
    """`namesake` is by default one that autocasts as all of these do; torch's own binary_cross_entropy refuses to on
    CUDA, and its gaussian_nll_loss is made of several ops.
    """
    return Op(
        name,
        getattr(masked_loss, name),
        functools.partial(reference.pointwise, name),
        pointwise_samples(name, *variants),
        refuses_grad=("pos_weight", "normalizer"),
        namesake=lambda input, target, dtype=None, **_: in_dtype(namesake(input, target), dtype),
        module=module,
        composed=("target", "weight", "sample_weight"),
        trained=trained,
        head=head,
        targets=lambda size: torch.rand(size, C),
        grid=grid,
    )


def uncast_binary_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    """torch's, which refuses to autocast on CUDA."""
    with torch.autocast(input.device.type, enabled=False):
        return F.binary_cross_entropy(input.float(), target)


def finite(result: Tensor) -> Tensor:
    """0 where it is -inf, which finite differences do not know."""
    return result.masked_fill(result == float("-inf"), 0.0)


def finite_log_softmax(input: Tensor, mask: Optional[Tensor] = None, dim: int = -1, causal: bool = False) -> Tensor:
    return finite(masked_loss.log_softmax(input, mask, dim, causal=causal))


def finite_logsumexp(
    input: Tensor,
    mask: Optional[Tensor] = None,
    dim: Union[int, List[int]] = -1,
    keepdim: bool = False,
    causal: bool = False,
) -> Tensor:
    return finite(masked_loss.logsumexp(input, mask, dim, keepdim=keepdim, causal=causal))


def composed(function: Callable[..., Tensor], outside: float = 0.0) -> Callable[..., Tensor]:
    """torch's function of what is filled with -inf, and `outside` where a slice, or an element, is masked."""

    def reference(input: Tensor, mask: Tensor, dim: Any = -1, causal: bool = False, **options: Any) -> Tensor:
        kept = (mask != 0).expand(input.shape)
        if causal:
            kept = kept & causal_mask(*input.shape[-2:], input.device)
        some = kept
        for d in dim if isinstance(dim, list) else [dim]:
            some = some.any(d, keepdim=True)
        filled = torch.where(kept, input, torch.where(some, -torch.inf, 0.0))
        result = function(filled, dim, **options)
        shown = kept if result.shape == input.shape else some.view(result.shape)
        return torch.where(shown, result, outside)

    return reference


def softmax_samples() -> dict[str, Callable[[int], Arguments]]:
    return {
        "mask": lambda size: dict(input=leaf(torch.randn(size, T, C)), mask=keep(size, T, C)),
        "padding, causal": lambda size: dict(
            input=leaf(torch.randn(size, T, C)), mask=keep(size, 1, C).long(), causal=True
        ),
        "inner": lambda size: dict(input=leaf(torch.randn(size, T, C)), mask=keep(size, 1, 1), dim=1),
    }


def moments(input: Tensor, mask: Tensor, dim: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is kept, the number, mean and squared deviations of it; what is reduced stays."""
    kept, input = (mask != 0).expand(input.shape), input if input.is_floating_point() else input.float()
    dims = list(range(input.dim())) if dim is None else dim
    count = kept.sum(dims, keepdim=True)
    mean = torch.where(kept, input, 0.0).sum(dims, keepdim=True) / count.clamp(min=1)
    return kept, count, mean, torch.where(kept, input - mean, 0.0).square().sum(dims, keepdim=True)


def reduced(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reduction from count, mean, squared deviations and correction."""

    def reference(
        input: Tensor, mask: Tensor, dim: Any = None, keepdim: bool = False, correction: float = 1.0, dtype: Any = None
    ) -> Tensor:
        _, count, mean, squares = moments(input, mask, dim)
        result = value(count, mean, squares, correction).to(dtype)
        if keepdim:
            return result
        return result.sum() if dim is None else result.sum(dim)

    return reference


def whitened(input: Tensor, mask: Tensor, dim: Any = None, dtype: Any = None) -> Tensor:
    kept, count, mean, squares = moments(input, mask, dim)
    return torch.where(kept, (input - mean) / (squares / (count - 1) + 1e-8).sqrt(), 0.0).to(dtype)


def reduction_samples(**options: Any) -> dict[str, Callable[[int], Arguments]]:
    def sample(size: int, mask: Tensor, **arguments: Any) -> Arguments:
        mask[..., :2] = True  # variances of one are NaN
        return dict(input=leaf(torch.randn(size, T, C)), mask=mask, **arguments)

    return {
        "all": lambda size: sample(size, keep(size, T, C)),
        "rows": lambda size: sample(size, keep(1, T, C).long(), dim=-1, **options),
        "several": lambda size: sample(size, keep(size, 1, C), dim=[0, 1]),
        "dtype": lambda size: sample(size, keep(size, T, C), dim=-1, dtype=torch.float64),
    }


def reduction_op(function: Callable[..., Tensor], theirs: Callable[..., Tensor], value: Callable[..., Tensor]) -> Op:
    options = dict(correction=0.5) if theirs in (torch.var, torch.std) else {}
    samples = reduction_samples(keepdim=True, **options)
    if theirs in (torch.sum, torch.mean):
        samples["integers"] = lambda size: dict(input=torch.randint(9, (size, T, C)), mask=keep(size, 1, C), dim=-1)
        samples["bool"] = lambda size: dict(input=torch.rand(size, T) < 0.5, mask=keep(size, T))
    return Op(
        function.__name__,
        function,
        reduced(value),
        samples,
        namesake=lambda input, mask, dtype=None, **_: theirs(
            input if input.is_floating_point() or theirs is torch.sum else input.float()
        ).to(dtype),
    )


def loss_normalizer(target: Tensor, mask: Optional[Tensor] = None, **options: Any) -> Tensor:
    return reference.loss_normalizer(target, C, mask, **options).float()


def sequence_mask(lengths: Tensor, maxlen: int, padding_side: str = "right") -> Tensor:
    kept = torch.arange(maxlen) < lengths.unsqueeze(-1)
    return kept if padding_side == "right" else kept.flip(-1)


def causal_mask(query_len: int, key_len: int, device: torch.device) -> Tensor:
    return torch.ones(query_len, key_len, dtype=torch.bool, device=device).tril()


FILLS: dict[str, Callable[[int], Arguments]] = {
    "number": lambda size: dict(input=leaf(torch.randn(size, T, C)), mask=keep(size, T, 1), value=2.0),
    "integer mask": lambda size: dict(input=leaf(torch.randn(size, T)), mask=keep(T).long(), value=-1.0),
    "integers": lambda size: dict(input=torch.randint(9, (size, T)), mask=keep(size, T), value=3),
    "tensor": lambda size: dict(
        input=leaf(torch.randn(size, T)), mask=keep(size, 1), value=leaf(torch.tensor(0.5) + torch.rand([]))
    ),
    "tensor alone": lambda size: dict(input=torch.randn(size, T), mask=keep(size, T), value=leaf(torch.rand([]))),
}

OPS = (
    Op(
        "cross_entropy",
        masked_loss.cross_entropy,
        reference.cross_entropy,
        cross_entropy_samples(),
        refuses_grad=("weight", "normalizer"),
        namesake=torch_cross_entropy,
        trained=F.cross_entropy,
        module=masked_loss.CrossEntropyLoss,
        grid=cross_entropy_grid,
    ),
    Op(
        "linear_cross_entropy",
        masked_loss.linear_cross_entropy,
        reference.linear_cross_entropy,
        linear_samples(),
        refuses_grad=("weight", "normalizer"),
        module=masked_loss.LinearCrossEntropyLoss,
    ),
    Op("linear_log_prob", masked_loss.linear_log_prob, reference.linear_log_prob, log_prob_samples()),
    Op(
        "linear_log_prob_and_entropy",
        log_prob_and_half_entropy,
        lambda *arguments, **options: (
            reference.linear_log_prob(*arguments, **options) + 0.5 * reference.linear_entropy(*arguments, **options)
        ),
        log_prob_samples(),
    ),
    Op("linear_kl", masked_loss.linear_kl, reference.linear_kl, linear_kl_samples(), refuses_grad=("normalizer",)),
    pointwise_op("mse_loss", masked_loss.MSELoss, trained=F.mse_loss),
    pointwise_op("l1_loss", masked_loss.L1Loss, namesake=F.l1_loss, trained=F.l1_loss),
    pointwise_op(
        "smooth_l1_loss",
        masked_loss.SmoothL1Loss,
        {},
        {"beta": 0.5},
        namesake=F.smooth_l1_loss,
        trained=F.smooth_l1_loss,
    ),
    pointwise_op("huber_loss", masked_loss.HuberLoss, {}, {"delta": 0.5}, namesake=F.huber_loss, trained=F.huber_loss),
    pointwise_op(
        "binary_cross_entropy_with_logits",
        masked_loss.BCEWithLogitsLoss,
        namesake=F.binary_cross_entropy_with_logits,
        trained=F.binary_cross_entropy_with_logits,
        grid=functools.partial(pointwise_grid_of, "binary_cross_entropy_with_logits"),
    ),
    pointwise_op("binary_cross_entropy", masked_loss.BCELoss, trained=uncast_binary_cross_entropy, head=torch.sigmoid),
    pointwise_op(
        "kl_div",
        masked_loss.KLDivLoss,
        {},
        {"log_target": True},
        namesake=F.kl_div,
        trained=F.kl_div,
        head=F.logsigmoid,
    ),
    pointwise_op(
        "poisson_nll_loss",
        masked_loss.PoissonNLLLoss,
        {},
        {"full": True},
        {"log_input": False, "eps": 0.01},
        namesake=F.poisson_nll_loss,
        trained=F.poisson_nll_loss,
        head=F.softplus,
    ),
    pointwise_op(
        "gaussian_nll_loss",
        masked_loss.GaussianNLLLoss,
        {},
        {"full": True},
        {"eps": 0.01},
        grid=functools.partial(pointwise_grid_of, "gaussian_nll_loss"),
    ),
    pointwise_op("sigmoid_focal_loss", masked_loss.SigmoidFocalLoss, {}, {"alpha": -1.0}, {"alpha": 0.5, "gamma": 1.5}),
    Op(
        "softmax",
        masked_loss.softmax,
        composed(torch.softmax),
        {
            **softmax_samples(),
            "dtype": lambda size: dict(
                input=leaf(torch.randn(size, C)), mask=keep(size, C), dim=0, dtype=torch.float64
            ),
        },
        namesake=lambda input, mask, dim=-1, causal=False, **dtype: torch.softmax(input, dim, **dtype),
    ),
    Op(
        "log_softmax",
        finite_log_softmax,
        composed(torch.log_softmax),
        softmax_samples(),
        namesake=lambda input, mask, dim=-1, causal=False: torch.log_softmax(input, dim),
    ),
    Op(
        "logsumexp",
        finite_logsumexp,
        composed(torch.logsumexp),
        {
            **softmax_samples(),
            "several": lambda size: dict(
                input=leaf(torch.randn(size, T, C)), mask=keep(size, T, 1), dim=[0, -1], keepdim=True
            ),
        },
        namesake=lambda input, mask, dim=-1, **_: torch.logsumexp(input, dim),
    ),
    reduction_op(masked_loss.masked_sum, torch.sum, lambda count, mean, squares, correction: mean * count),
    reduction_op(masked_loss.masked_mean, torch.mean, lambda count, mean, squares, correction: mean),
    reduction_op(
        masked_loss.masked_var, torch.var, lambda count, mean, squares, correction: squares / (count - correction)
    ),
    reduction_op(
        masked_loss.masked_std,
        torch.std,
        lambda count, mean, squares, correction: (squares / (count - correction)).sqrt(),
    ),
    Op(
        "masked_whiten",
        masked_loss.masked_whiten,
        whitened,
        reduction_samples(),
        namesake=lambda input, dtype=None, **_: torch.nn.functional.layer_norm(input, input.shape[-1:]).to(
            dtype or input.dtype
        ),
        parts=(2, 5),  # moments and spreads
    ),
    Op(
        "loss_normalizer",
        masked_loss.loss_normalizer,
        loss_normalizer,
        {
            "mask": lambda size: dict(target=torch.randint(C, (size, T)), mask=keep(size, T)),
            "weights": lambda size: dict(
                target=torch.randint(C, (size, T)),
                weight=torch.rand(C),
                sample_weight=torch.rand(size, 1),
                ignore_index=[1, -100],
            ),
        },
    ),
    Op(
        "check_targets",
        masked_loss.check_targets,
        lambda target, **_: target,
        {"mask": lambda size: dict(target=torch.randint(C, (size, T)), num_classes=C, mask=keep(size, T))},
    ),
    Op(
        "masked_fill",
        masked_loss.masked_fill,
        torch_masked_fill,
        {
            **FILLS,
            "growing": lambda size: dict(
                input=leaf(torch.randn(T, 1)), mask=keep(size, 1, C), value=leaf(torch.rand([]))
            ),
        },
        namesake=torch_masked_fill,
    ),
    Op(
        "masked_fill_",
        filled_in_place,
        torch_masked_fill,
        FILLS,
        written="input",
        blocked={"compiled autograd": "torch asserts that no C++ autograd function of a compiled backward is in place"},
        namesake=torch_masked_fill,
    ),
    Op(
        "sequence_mask",
        masked_loss.sequence_mask,
        sequence_mask,
        {
            "right": lambda size: dict(lengths=torch.randint(T + 1, (size,)), maxlen=T),
            "left": lambda size: dict(lengths=torch.randint(T + 1, (size, 2)), maxlen=size + 1, padding_side="left"),
        },
    ),
    Op(
        "causal_mask",
        masked_loss.causal_mask,
        causal_mask,
        # Scripted code knows no default device.
        {"": lambda size: dict(query_len=size + 1, key_len=size + 3, device=torch.get_default_device())},
    ),
    Op(
        "mask_from_ids",
        masked_loss.mask_from_ids,
        lambda tokens, ids: torch.stack([tokens != i for i in ids]).all(0),
        {"": lambda size: dict(tokens=torch.randint(C, (size, T)), ids=[0, 2])},
    ),
)
