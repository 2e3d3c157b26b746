"""A pairwise covering grid: few cases in which every level of an argument meets every level of every other one."""

import itertools
import random
from typing import Any, NamedTuple

import torch

from reference import is_kept

# name: (target's shape, where the class dimension is inserted, the `dim` that is passed)
LAYOUTS = {
    "N,C": ((7,), 1, 1),
    "C": ((), 0, 1),  # unbatched: the default dim
    "C dim=0": ((), 0, 0),
    "B,C,T": ((3, 4), 1, 1),  # classes strided in a dense tensor
    "B,C,H,W": ((2, 3, 2), 1, -3),
    "B,T,C": ((3, 4), 2, -1),  # classes contiguous
    "C,B,T": ((3, 4), 0, 0),  # classes outermost
    "B,T,C,H": ((2, 3, 2), 2, 2),  # classes between row dimensions
}

LEVELS = {
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "layout": tuple(LAYOUTS),
    "storage": ("contiguous", "transposed", "sliced", "strided", "expanded"),
    # 1: no choice; up to 64 (2, 10, 63, 64): tiles of rows beside one another, whatever the layout; above (65, 1000,
    # 5000): a row at a time where the classes are contiguous, with a tail of the registers, and at 5000 in blocks of
    # 2048; where they are strided tiles of 64 rows, or of 16 above 1024 classes
    "classes": (1, 2, 10, 63, 64, 65, 1000, 5000),
    "target": (torch.int64, torch.int32, torch.uint8, "probabilities", "learned probabilities"),
    "mask": ("none", "bool", "bytes", "int64", "int8", "broadcast", "nothing"),
    "weight": ("none", "positive", "zeros"),
    "sample_weight": ("none", "full", "broadcast", "negative", "zeros", "differentiable"),
    "weight_dtype": ("input", "other"),
    "class_mask": ("none", "[C]", "dense", "bytes", "broadcast", "rows"),
    "ignore_index": ("default", "one", "several"),
    "label_smoothing": (0.0, 0.1, 1.0),
    "z_loss": (0.0, 0.01),
    "reduction": ("mean", "sum", "none", "sequence_mean"),
    "normalizer": ("none", "number", "tensor", "count"),
    "requires_grad": (True, False),
    "upstream": ("one", "any"),
}


def _allowed(case):
    """A normalizer goes with the two means only, ignore_index with class indices; known once both are chosen."""
    if case.get("normalizer", "none") != "none" and case.get("reduction", "mean") not in ("mean", "sequence_mean"):
        return False
    return case.get("ignore_index", "default") == "default" or isinstance(case.get("target", torch.int64), torch.dtype)


def _fill(partial, levels, uncovered, rng):
    """Completes a case, at each factor with the level that covers the most pairs not covered so far."""
    case = dict(partial)
    for name in rng.sample(list(levels), len(levels)):
        if name in case:
            continue
        options = [level for level in levels[name] if _allowed({**case, name: level})]
        rng.shuffle(options)
        pairs = {level: sum(_pair(name, level, n, v) in uncovered for n, v in case.items()) for level in options}
        case[name] = max(options, key=pairs.get)
    return case


def _pair(a, x, b, y):
    return frozenset(((a, x), (b, y)))


def covering_grid(levels, seed=0):
    """Cases, as dicts, that together cover every allowed pair of levels of two factors."""
    rng = random.Random(seed)
    uncovered = {}  # a dict, for its order
    for (a, xs), (b, ys) in itertools.combinations(levels.items(), 2):
        uncovered.update({_pair(a, x, b, y): {a: x, b: y} for x in xs for y in ys if _allowed({a: x, b: y})})
    cases = []
    while uncovered:
        case = _fill(next(iter(uncovered.values())), levels, uncovered, rng)
        for (a, x), (b, y) in itertools.combinations(case.items(), 2):
            uncovered.pop(_pair(a, x, b, y), None)
        cases.append(case)
    return cases


def case_id(case):
    return "-".join(str(level).replace("torch.", "").replace(",", "") for level in case.values())


class Call(NamedTuple):
    """The arguments of one call of cross_entropy, and the gradient that comes back to its result."""

    input: torch.Tensor
    target: torch.Tensor
    arguments: dict[str, Any]
    upstream: torch.Tensor | None


def stored(shape, storage, scale=3.0):
    """Random logits that lie in memory as `storage` says."""
    if storage == "transposed":
        return scale * torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    if storage == "sliced":  # starts inside its storage, and leaves a gap after each slice
        larger = [size + 1 if d == min(1, len(shape) - 1) else size for d, size in enumerate(shape)]
        return (scale * torch.randn(larger)).narrow(min(1, len(shape) - 1), 1, shape[min(1, len(shape) - 1)])
    if storage == "strided":
        return (scale * torch.randn([2 * size for size in shape]))[(slice(None, None, 2),) * len(shape)]
    if storage == "expanded":
        return (scale * torch.randn([1, *shape[1:]])).expand(shape)
    return scale * torch.randn(shape)


def _as(tensor, dtype):
    """`tensor` in another dtype with the same strides, stride 0 included."""
    if 0 in tensor.stride():
        return tensor[:1].to(dtype).expand(tensor.shape)
    return tensor.to(dtype)


def in_bytes(keep):
    """The same mask of bytes that are not 0 and 1, as ``tensor.view(torch.bool)`` makes of those of an image."""
    kept = torch.tensor([255, 254, 2], dtype=torch.uint8)
    return torch.where(keep, kept[torch.arange(keep.numel()).view(keep.shape) % len(kept)], 0).view(torch.bool)


def _mask(kind, shape):
    broadcast = [1 if d == len(shape) - 1 else size for d, size in enumerate(shape)]
    keep = torch.rand(broadcast if kind == "broadcast" else shape) < 0.7
    if kind == "bytes":
        return in_bytes(keep)
    if kind in ("int64", "int8"):
        return keep.to(getattr(torch, kind))
    return torch.zeros_like(keep) if kind == "nothing" else keep


def _sample_weight(kind, shape, dtype):
    """Negative weights are small, so that no divisor is near 0 by cancellation.

    A mean is not continuous where the differentiated weights add up to 0: 'smooth' is 'differentiable' without zeros.
    """
    sizes = [1 if d == 0 else size for d, size in enumerate(shape)] if kind == "broadcast" else shape
    weight = 0.5 + torch.rand(sizes)
    if kind in ("zeros", "differentiable"):
        weight[torch.rand(sizes) < 0.3] = 0.0
    elif kind == "negative":
        weight[torch.rand(sizes) < 0.3] *= -0.1
    return weight.to(dtype)


def _class_mask(kind, rows, classes, at):
    """Class 0 is allowed everywhere but in one row of the dense kind, which allows nothing, and in those that 'rows',
    of size 1 along the classes, drops whole.
    """
    if kind == "rows":
        return (torch.rand(*rows, 1) < 0.7).movedim(-1, at)
    if kind == "[C]":
        mask = torch.rand(classes) < 0.6
        mask[0] = True
        return mask
    dense = kind in ("dense", "bytes")
    sizes = list(rows) if dense else [size if d == 0 else 1 for d, size in enumerate(rows)]
    mask = torch.rand([*sizes, classes]) < 0.6
    mask[..., 0] = True
    if dense and rows:
        mask.view(-1, classes)[-1] = False
    mask = mask.movedim(-1, at)
    if kind == "bytes":
        return in_bytes(mask)
    return mask.long() if kind == "broadcast" else mask


def _target(shape, classes, dtype, class_mask, at):
    """A class that its row allows."""
    allowed = torch.ones(*shape, classes)
    if class_mask is not None:
        over = class_mask if class_mask.dim() == 1 else class_mask.movedim(at, -1)
        allowed *= is_kept(over)
        allowed[..., 0] += allowed.sum(-1) == 0
    limit = min(classes, 256 if dtype == torch.uint8 else classes)
    return torch.multinomial(allowed[..., :limit].reshape(-1, limit), 1).reshape(shape).to(dtype)


def _probabilities(shape, classes, dtype, class_mask, at):
    """Of the classes that its row allows; some are 0."""
    scores = 2 * torch.randn(*shape, classes)
    scores[torch.rand(scores.shape) < 0.2] = -torch.inf
    scores[..., 0] = 0.0
    scores = scores.movedim(-1, at)
    if class_mask is not None:
        over = class_mask if class_mask.dim() == scores.dim() else class_mask.reshape(-1, *[1] * (len(shape) - at))
        scores = scores.masked_fill(~is_kept(over), -torch.inf)
    return scores.softmax(at).nan_to_num().to(dtype)


def build(case, seed):
    """The call that a case stands for."""
    torch.manual_seed(seed)
    shape, at, dim = LAYOUTS[case["layout"]]
    classes, dtype = case["classes"], case["dtype"]
    other = torch.float32 if dtype != torch.float32 else torch.float64
    weight_dtype = dtype if case["weight_dtype"] == "input" else other
    logits = _as(stored([*shape[:at], classes, *shape[at:]], case["storage"]), dtype)
    class_mask = None if case["class_mask"] == "none" else _class_mask(case["class_mask"], shape, classes, at)
    if isinstance(case["target"], torch.dtype):
        target = _target(shape, classes, case["target"], class_mask, at)
    else:
        target = _probabilities(shape, classes, dtype, class_mask, at)
        target.requires_grad_(case["requires_grad"] and case["target"] == "learned probabilities")
    ignore_index = {"default": -100, "one": classes // 2, "several": [-100, 0, classes // 3]}[case["ignore_index"]]
    if case["ignore_index"] != "one" and target.dtype in (torch.int64, torch.int32) and shape:
        target[torch.rand(shape) < 0.2] = -100
    weight = None if case["weight"] == "none" else (0.5 + torch.rand(classes)).to(weight_dtype)
    if case["weight"] == "zeros":
        weight[::3] = 0.0
    sample_weight = None
    if case["sample_weight"] != "none":
        sample_weight = _sample_weight(case["sample_weight"], shape, weight_dtype)
        sample_weight.requires_grad_(case["sample_weight"] in ("differentiable", "smooth") and case["requires_grad"])
    normalizer = {"none": None, "number": 7.5, "tensor": torch.tensor(7.5), "count": torch.tensor(9)}
    arguments = dict(
        mask=None if case["mask"] == "none" else _mask(case["mask"], shape),
        weight=weight,
        sample_weight=sample_weight,
        class_mask=class_mask,
        ignore_index=ignore_index,
        reduction=case["reduction"],
        label_smoothing=case["label_smoothing"],
        z_loss=case["z_loss"],
        normalizer=normalizer[case["normalizer"]],
        dim=dim,
    )
    upstream = None
    if case["upstream"] == "any" or case["reduction"] == "none":
        upstream = torch.randn(shape if case["reduction"] == "none" else ()).to(dtype)
    return Call(logits.requires_grad_(case["requires_grad"]), target, arguments, upstream)


def with_plain_masks(arguments):
    """The same with masks of bytes 0 and 1."""
    masks = {name: arguments.get(name) for name in ("mask", "class_mask")}
    return {**arguments, **{name: is_kept(mask) for name, mask in masks.items() if mask is not None}}


def in_double(call):
    """The same call for the float64 reference: the same numbers, with leaves of its own."""

    def leaf(tensor):
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    arguments = dict(call.arguments)
    if arguments["sample_weight"] is not None:
        arguments["sample_weight"] = leaf(arguments["sample_weight"])
    target = leaf(call.target) if call.target.is_floating_point() else call.target
    return Call(leaf(call.input), target, arguments, None if call.upstream is None else call.upstream.double())


def leaves(call):
    """What requires a gradient."""
    candidates = (call.input, call.target, call.arguments["sample_weight"])
    return [tensor for tensor in candidates if tensor is not None and tensor.requires_grad]


def largest_term(leaf, call, case):
    """Where a gradient can be 0 by cancellation: a weight that its sequence shares, one class, classes all alike, and a
    probability that is the softmax's.
    """
    alike = case["classes"] <= 2 or (case["storage"] == "expanded" and LAYOUTS[case["layout"]][1] == 0)
    return 1.0 if leaf is not call.input or alike or call.target.is_floating_point() else 0.0


def run(function, call):
    """The loss and the gradients of what requires one."""
    loss = function(call.input, call.target, **call.arguments)
    wanted = leaves(call)
    return loss, torch.autograd.grad(loss, wanted, call.upstream) if wanted else ()
