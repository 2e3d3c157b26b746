"""A batch saved for ``python -m masked_loss inspect``: which positions count, what each costs, and their means."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import cross_entropy
from .masks import sequence_mask

INPUTS, TARGETS = ("logits", "input", "output", "predictions"), ("targets", "labels", "target")
MASKS = ("mask", "attention_mask")
EXPECTED = (
    "expected a dict of logits (or input) and targets (or labels), and optionally mask (or attention_mask), "
    "names (of the sequences), loss (that you computed), ignore_index"
)
RIGHT = "mean over what counts"


def counted(count: int, one: str, many: Optional[str] = None) -> str:
    """A number of things, in words."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


class BatchError(Exception):
    """A file that is no batch; the message says why."""


@dataclass
class Batch:
    """A saved batch as rows of positions, and what each of them costs."""

    described: str
    unit: str  # what a row is: a sequence, a sample, or "" where the batch is one row
    names: List[str]
    input_key: str
    target_key: str
    mask_key: str
    target: Tensor  # [B, T]
    mask: Optional[Tensor]  # as it was saved
    mask_holds: str  # "a mask", "lengths", "weights" or "numbers"
    positions: int  # of a sequence, as it was saved
    inside: Tensor  # [B, T], what the mask says
    weight: Tensor  # [B, T], 1 unless the mask holds weights
    ignore_index: int
    classes: int  # 0 for a regression
    loss: Optional[float]  # that was saved
    ignored: Tensor  # [B, T], the target is ignore_index
    real: Tensor  # [B, T], the target is a class, or a number of a regression
    cost: Tensor  # [B, T], float64; 0 where the target is not real
    finite: Tensor  # [B, T], what the cost is made of
    shifted: bool = False  # the targets, by one
    other: Optional["Batch"] = field(default=None, repr=False)  # the same, shifted or not

    @property
    def kept(self) -> Tensor:
        """[B, T], inside and not ignored."""
        return self.inside & ~self.ignored

    @property
    def outside(self) -> Tensor:
        """[B, T], the target is neither a class nor ignored."""
        return ~self.real & ~self.ignored

    def mean(self, of: Tensor, dim: Optional[int] = None) -> Tensor:
        """The weighted mean cost of some positions, of all of them or of each row; 0 of none."""
        of = of & self.real
        weight = self.weight.where(of, 0).sum(dim)
        return ((self.cost * self.weight).where(of, 0).sum(dim) / weight).where(weight != 0, 0)


def _load(path: Path) -> Dict[str, Any]:
    if not path.is_file():
        raise BatchError("there is no such file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a file that is none of its own
        # torch's message goes on to tell how to load what it refuses.
        reason = re.search(r"Unsupported \w+: \w+ \S+|PytorchStreamReader[^.;]*", str(error))
        raise BatchError(
            f"expected a file of torch.save that torch.load(..., weights_only=True) takes, got "
            f"{type(error).__name__}{f' ({reason[0]})' if reason else ''}"
        ) from None
    if not isinstance(saved, dict):
        raise BatchError(f"{EXPECTED}; got {type(saved).__name__}")
    return saved


def _tensor(saved: Dict[str, Any], keys: Tuple[str, ...]) -> Tuple[str, Optional[Tensor]]:
    """The first of the keys that is there, and its tensor."""
    for key in keys:
        if saved.get(key) is not None:
            if not isinstance(saved[key], Tensor):
                raise BatchError(f"expected {key} to be a tensor, got {type(saved[key]).__name__}")
            return key, saved[key].detach()
    return keys[0], None


def _class_dim(input: Tensor, target: Tensor, dim: Optional[int], key: str, target_key: str) -> int:
    shape = list(input.shape)
    if dim is not None and not -input.dim() <= dim < input.dim():
        raise BatchError(f"expected --dim to be a dimension of {key} {shape}, got {dim}")
    candidates = {0} if input.dim() == 1 else {1, input.dim() - 1} if dim is None else {dim % input.dim()}
    fitting = [d for d in sorted(candidates) if input.dim() > 0 and shape[:d] + shape[d + 1 :] == list(target.shape)]
    if not fitting:
        raise BatchError(f"expected {target_key} of {key}' shape {shape} without the classes, got {list(target.shape)}")
    if len(fitting) > 1:
        raise BatchError(f"expected --dim: the classes of {key} {shape} may lie in dim 1 or {input.dim() - 1}")
    return fitting[0]


def _rows(tensor: Tensor) -> Tensor:
    """[B, T]: a row for each index of the first dimension; one dimension alone is one row."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def _content(mask: Tensor, shape: List[int]) -> str:
    """What a tensor in the place of a mask holds: a mask, lengths, weights, or other numbers."""
    if bool(((mask == 0) | (mask == 1)).all()):
        return "a mask"
    if len(shape) > 1 and mask.numel() == shape[0] and mask.shape[0] == shape[0]:
        if bool((mask == mask.long()).all() & (mask >= 0).all()):
            return "lengths"
    return "weights" if mask.is_floating_point() else "numbers"


def _read_mask(key: str, mask: Tensor, shape: List[int], target_key: str) -> Tuple[str, Tensor, Tensor]:
    """What it holds, what it keeps, and with what weight, in the target's shape."""
    if mask.is_complex():
        raise BatchError(f"expected {key} of bool, integers or floats, got {mask.dtype}")
    holds = _content(mask, shape)
    if holds == "lengths":
        inside = sequence_mask(mask.flatten().long(), shape[1])
        return holds, inside.reshape(shape[:2] + [1] * (len(shape) - 2)).expand(shape), torch.ones(shape)
    if mask.dim() != len(shape) or any(m not in (1, t) for m, t in zip(mask.shape, shape, strict=True)):
        raise BatchError(f"expected {key} of {target_key}' shape {shape}, or 1s, got {list(mask.shape)}")
    weight = mask.where(mask != 0, 1) if holds == "weights" else torch.tensor(1.0)
    return holds, (mask != 0).expand(shape), weight.expand(shape)


def _numbers(saved: Dict[str, Any]) -> Tuple[int, Optional[float]]:
    """``ignore_index`` and the loss that was saved."""
    ignore_index, loss = saved.get("ignore_index", -100), saved.get("loss")
    if not isinstance(ignore_index, int):
        raise BatchError(f"expected ignore_index to be an int, got {ignore_index!r}")
    if isinstance(loss, Tensor) and loss.numel() == 1:
        loss = loss.item()
    if loss is not None and not isinstance(loss, (int, float)):
        raise BatchError(f"expected loss to be one number, got {type(loss).__name__}")
    return ignore_index, loss


def read(path: Path, dim: Optional[int] = None) -> Batch:
    """The batch, checked, with the cost of each position."""
    saved = _load(path)
    (input_key, input), (target_key, target), (mask_key, mask) = (_tensor(saved, k) for k in (INPUTS, TARGETS, MASKS))
    if input is None or target is None:
        missing = [key for key, tensor in ((input_key, input), (target_key, target)) if tensor is None]
        raise BatchError(f"{EXPECTED}; {', '.join(missing)} missing, got {list(saved)}")
    if not input.is_floating_point():
        raise BatchError(f"expected {input_key} of a floating dtype, got {input.dtype}")
    # Floating targets of logits would be probabilities.
    regression = target.is_floating_point() and input_key != "logits"
    if not regression and target.dtype not in (torch.int64, torch.int32, torch.uint8):
        dtypes = "int64, int32 or uint8; those of a regression go with input instead of logits"
        raise BatchError(f"expected {target_key} to be class indices ({dtypes}), got {target.dtype}")
    shape = list(target.shape)
    if regression and shape != list(input.shape):
        raise BatchError(f"expected {target_key} of {input_key}'s shape {list(input.shape)}, got {shape}")
    class_dim = None if regression else _class_dim(input, target, dim, input_key, target_key)
    everywhere = torch.ones(shape, dtype=torch.bool)
    holds, inside, weight = _read_mask(mask_key, everywhere if mask is None else mask, shape, target_key)
    ignore_index, loss = _numbers(saved)
    unit = "" if len(shape) < 2 else "sequence" if len(shape) == 2 and not regression else "sample"
    rows = _rows(target if regression else target.long())
    names = saved.get("names")
    if names is None:
        names = [str(row) for row in range(len(rows))]
    if not isinstance(names, (list, tuple)) or len(names) != len(rows):
        raise BatchError(f"expected names to be a list of {len(rows)}, one for each {unit or 'batch'}, got {names!r}")
    described = [f"{input_key} {list(input.shape)} {input.dtype}", f"{target_key} {shape} {target.dtype}"]
    described.append("no mask" if mask is None else f"{mask_key} {list(mask.shape)} {mask.dtype}")
    if not regression:
        described[0] += f", {input.shape[class_dim]} classes in dim {class_dim}"
    batch = Batch(
        described="; ".join(described).replace("torch.", ""),
        unit=unit,
        names=[str(name) for name in names],
        input_key=input_key,
        target_key=target_key,
        mask_key=mask_key,
        target=rows,
        mask=mask,
        mask_holds=holds,
        positions=shape[1] if unit else target.numel(),
        inside=_rows(inside),
        weight=_rows(weight).double(),
        ignore_index=ignore_index,
        classes=0 if regression else input.shape[class_dim],
        loss=loss,
        ignored=_rows(~everywhere) if regression else rows == ignore_index,
        real=_rows(everywhere),
        cost=torch.zeros(rows.shape, dtype=torch.float64),
        finite=_rows(everywhere),
    )
    if regression:
        return _with_differences(batch, _rows(input))
    return _with_cross_entropy(batch, input.movedim(class_dim, -1).reshape(*rows.shape, batch.classes))


def _with_differences(batch: Batch, input: Tensor) -> Batch:
    """Squares, unless the loss that was saved is one of absolute differences."""
    each = [
        replace(
            batch,
            described=f"{batch.described}; {name} differences",
            cost=loss(input.double(), batch.target.double(), reduction="none"),
            finite=input.isfinite() & (batch.inside | batch.target.isfinite()),
        )
        for name, loss in (("squared", F.mse_loss), ("absolute", F.l1_loss))
    ]
    return next((one for one in each if name_of_loss(one)), each[0])


def _with_cross_entropy(batch: Batch, logits: Tensor) -> Batch:
    """Of the targets as they are, or of a causal model's that are not yet shifted, shifted by one."""
    logits = logits if logits.dtype == torch.float64 else logits.float()

    def of(batch: Batch, logits: Tensor) -> Batch:
        real = (batch.target >= 0) & (batch.target < batch.classes) & ~batch.ignored
        cost = cross_entropy(logits, batch.target, real, dim=-1, reduction="none").double()
        return replace(batch, real=real, cost=cost, finite=logits.isfinite().all(-1))

    plain = of(batch, logits)
    if batch.unit != "sequence" or batch.target.shape[1] < 2:
        return plain
    later = {name: getattr(batch, name)[:, 1:] for name in ("target", "inside", "weight", "ignored")}
    described = f"{batch.described}; {batch.target_key} shifted by one"
    shifted = of(replace(batch, **later, described=described, shifted=True), logits[:, :-1])
    plain.other, shifted.other = shifted, plain
    # The loss that a script computed tells whether it shifts.
    for one in (plain, shifted):
        if is_close(batch.loss, means(one)[RIGHT]):
            return one
    return shifted if batch.target_key == "labels" and shift_fits(plain) else plain


def fits_better(one: Tensor, other: Tensor, classes: int) -> bool:
    """Whether costs are below those of a guess, and by three standard errors below others."""
    if min(len(one), len(other)) < 4:
        return False
    error = (one.var() / len(one) + other.var() / len(other)).sqrt()
    return bool((one.mean() < math.log(classes)) & (other.mean() - one.mean() > 3 * error))


def shift_fits(plain: Batch) -> bool:
    shifted, cost = plain.other, plain.cost[plain.kept & plain.real]
    return fits_better(shifted.cost[shifted.kept & shifted.real], cost, plain.classes)


def means(batch: Batch) -> Dict[str, Optional[float]]:
    """The loss, and what the usual mistakes would make of it; None where that is an IndexError."""
    here, anywhere = bool((batch.outside & batch.kept).any()), bool(batch.outside.any())
    whole, count = batch.kept & batch.real, max(batch.cost.numel(), 1)
    # What multiplies has computed the loss of the padding before.
    values = {
        RIGHT: (here, batch.mean(whole)),
        "mean over everything, loss.mean()": (anywhere, batch.cost.sum() / count),
        "(loss * mask).mean()": (anywhere, (batch.cost * batch.weight * batch.inside).sum() / count),
    }
    if batch.unit:
        of_rows = batch.mean(whole, 1)[whole.any(1)]
        values[f"mean of the {batch.unit}s' means"] = (here, of_rows.sum() / max(len(of_rows), 1))
    return {name: None if error else value.item() for name, (error, value) in values.items()}


def _other_losses(batch: Batch) -> Dict[str, float]:
    """What a saved loss may be besides."""
    whole = batch.kept & batch.real
    total = (batch.cost * batch.weight).where(whole, 0).sum()
    values = {
        "mean over the padding": batch.mean(~batch.inside),
        "sum over what counts": total,
        f"half of the {RIGHT}": batch.mean(whole) / 2,
    }
    if batch.unit:
        rows = max(len(batch.names), 1)
        values[f"sum over what counts, divided by the {counted(rows, batch.unit)}"] = total / rows
        values[f"mean of the {batch.unit}s' means, 0 for the empty ones"] = batch.mean(whole, 1).sum() / rows
    if batch.mask_holds == "weights":
        values[f"{RIGHT}, without the weights"] = batch.cost[whole].mean()
        values["weighted sum, divided by the number of what counts"] = total / whole.sum()
    return {name: value.item() for name, value in values.items()}


def is_close(loss: Optional[float], value: Optional[float]) -> bool:
    if loss is None or value is None:
        return False
    return math.isclose(loss, value, rel_tol=1e-3, abs_tol=1e-6) or (math.isnan(loss) and math.isnan(value))


def name_of_loss(batch: Batch) -> Optional[str]:
    """Which mean the saved loss is: the right one, else the nearest."""
    candidates = means(batch)
    if is_close(batch.loss, candidates[RIGHT]):
        return RIGHT
    candidates |= _other_losses(batch)
    near = [name for name, value in candidates.items() if is_close(batch.loss, value)]
    return min(near, key=lambda name: abs(candidates[name] - batch.loss), default=None)
