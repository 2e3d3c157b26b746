"""Calls of the elementwise losses: what each one takes, and a grid that covers every pair of levels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import grid

# name: options beside the defaults, in several ways
OPTIONS = {
    "mse_loss": [{}],
    "l1_loss": [{}],
    "smooth_l1_loss": [{}, {"beta": 0.3}, {"beta": 0.0}],
    "huber_loss": [{}, {"delta": 0.3}],
    "binary_cross_entropy_with_logits": [{}],
    "binary_cross_entropy": [{}],
    "kl_div": [{}, {"log_target": True}],
    "poisson_nll_loss": [{}, {"full": True}, {"log_input": False}, {"log_input": False, "full": True, "eps": 1e-3}],
    "gaussian_nll_loss": [{}, {"full": True}, {"eps": 0.5}],
    "sigmoid_focal_loss": [{}, {"alpha": -1.0}, {"gamma": 0.0}, {"alpha": 0.6, "gamma": 1.5}, {"gamma": 0.5}],
}
LOSSES = tuple(OPTIONS)
WEIGHTED = ("mse_loss", "l1_loss", "huber_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy")
BROADCASTING = tuple(name for name in LOSSES if "cross_entropy" not in name and "focal" not in name)

# Short ones are one task and partly less than a register; the last is two chunks of 65536, of blocks of 1024.
SHAPES = {
    "[]": (),
    "[7]": (7,),
    "[3, 5]": (3, 5),
    "[2, 3, 4, 5]": (2, 3, 4, 5),
    "[0, 3]": (0, 3),
    "[3, 0]": (3, 0),
    "[5, 1031]": (5, 1031),
    "[70, 1000]": (70, 1000),
}

LEVELS = {
    "loss": LOSSES,
    "options": (0, 1, 2, 3),  # modulo their number
    "shape": tuple(SHAPES),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "target_dtype": ("input", "other"),
    "storage": ("contiguous", "transposed", "channels_last", "sliced", "strided", "expanded"),
    "target_storage": ("contiguous", "transposed", "strided", "broadcast"),
    "mask": ("none", "bool", "bytes", "int64", "int8", "broadcast", "nothing"),
    "weight": ("none", "full", "broadcast", "zeros", "differentiable"),
    "pos_weight": ("none", "last", "number"),
    "sample_weight": ("none", "full", "broadcast", "negative", "zeros", "differentiable"),
    "weight_dtype": ("input", "other"),
    "reduction": ("mean", "sum", "none", "sequence_mean", "batchmean"),
    "normalizer": ("none", "number", "tensor", "count"),
    "requires_grad": ("input", "everything", "nothing"),
    "upstream": ("one", "any"),
}


class Call(NamedTuple):
    """A loss, its arguments and the gradient that comes back to its result."""

    name: str
    arguments: dict[str, Any]
    upstream: Tensor | None


def stored(values: Tensor, storage: str) -> Tensor:
    """The same values, or some of them repeated, that lie in memory as `storage` says."""
    shape = values.shape
    if storage == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if storage == "expanded" and values.dim() and len(values):
        return values[:1].expand(shape)
    if storage == "broadcast" and values.dim():
        return values[..., :1].clone()
    if storage == "transposed" and values.dim():
        return values.permute(*reversed(range(values.dim()))).contiguous().permute(*reversed(range(values.dim())))
    if storage in ("sliced", "strided") and values.dim():
        larger = values.new_full([2 * size for size in shape], torch.nan)
        at = (slice(None, None, 2),) * values.dim()
        if storage == "sliced":
            at = tuple(slice(size // 2, size // 2 + size) for size in shape)
        larger[at] = values
        return larger[at]
    return values.clone()


def operands(name: str, shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, Tensor]:
    """Input and target, and var where there is one, that fit the loss; not at a kink of it."""
    x, u = 2 * torch.randn(shape), torch.rand(shape)
    if name == "binary_cross_entropy":
        return dict(input=0.05 + 0.9 * torch.rand(shape), target=u)
    if name in ("binary_cross_entropy_with_logits", "sigmoid_focal_loss"):
        return dict(input=x, target=u)
    if name == "kl_div":
        return dict(input=-x.abs(), target=u.log() if options.get("log_target") else u * (u > 0.2))
    if name == "poisson_nll_loss":
        counts = torch.randint(5, shape).float()
        return dict(input=x if options.get("log_input", True) else 0.1 + x.abs(), target=counts)
    if name == "gaussian_nll_loss":
        return dict(input=x, target=torch.randn(shape), var=0.2 + torch.rand(shape))
    return dict(input=x, target=torch.randn(shape))


def build(case: dict[str, Any], seed: int) -> Call:
    """The call that a case stands for."""
    torch.manual_seed(seed)
    name, shape, dtype = case["loss"], SHAPES[case["shape"]], case["dtype"]
    other = torch.float32 if dtype != torch.float32 else torch.float64
    options = OPTIONS[name][case["options"] % len(OPTIONS[name])]
    tensors = operands(name, shape, options)
    target_storage = case["target_storage"]
    if target_storage == "broadcast" and name not in BROADCASTING:
        target_storage = "contiguous"
    target_dtype = dtype if case["target_dtype"] == "input" else other
    every, some = case["requires_grad"] == "everything", case["requires_grad"] != "nothing"
    arguments: dict[str, Any] = dict(
        input=stored(tensors["input"].to(dtype), case["storage"]).requires_grad_(some),
        target=stored(tensors["target"].to(target_dtype), target_storage).requires_grad_(every),
        mask=None if case["mask"] == "none" else grid._mask(case["mask"], shape),
        reduction=case["reduction"] if case["reduction"] != "batchmean" or name == "kl_div" else "mean",
        **options,
    )
    if "var" in tensors:
        arguments["var"] = stored(tensors["var"].to(dtype), case["target_storage"]).requires_grad_(some)
    weight_dtype = dtype if case["weight_dtype"] == "input" else other
    for argument in ("weight", "sample_weight"):
        kind = case[argument]
        if kind == "none" or (argument == "weight" and name not in WEIGHTED):
            continue
        weight = grid._sample_weight(kind, shape, weight_dtype)
        arguments[argument] = weight.requires_grad_(kind == "differentiable" and some)
    if name == "binary_cross_entropy_with_logits" and case["pos_weight"] != "none":
        sizes = shape[-1:] if case["pos_weight"] == "last" else ()
        arguments["pos_weight"] = (0.5 + torch.rand(sizes)).to(weight_dtype)
    normalizer = {"none": None, "number": 7.5, "tensor": torch.tensor(7.5), "count": torch.tensor(9)}
    arguments["normalizer"] = normalizer[case["normalizer"]]
    upstream = None
    result = torch.promote_types(dtype, target_dtype)
    if "pos_weight" in arguments:
        result = torch.promote_types(result, arguments["pos_weight"].dtype)
    if case["upstream"] == "any" or arguments["reduction"] == "none":
        upstream = torch.randn(shape if arguments["reduction"] == "none" else ()).to(result)
    return Call(name, arguments, upstream)


def leaves(call: Call) -> dict[str, Tensor]:
    return {n: t for n, t in call.arguments.items() if isinstance(t, Tensor) and t.requires_grad}


def in_double(call: Call) -> Call:
    """The same call for the float64 reference: the same numbers, with leaves of its own."""

    def wide(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    upstream = None if call.upstream is None else call.upstream.double()
    return Call(call.name, {n: wide(value) for n, value in call.arguments.items()}, upstream)


def run(function, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of what requires one."""
    loss, wanted = function(**call.arguments), leaves(call)
    gradients = torch.autograd.grad(loss, list(wanted.values()), call.upstream) if wanted else ()
    return loss, dict(zip(wanted, gradients, strict=True))
