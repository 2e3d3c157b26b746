"""``python -m masked_loss inspect``: which positions of a saved batch count, what each costs, what the rest would."""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from .functional import cross_entropy

KEYS = "logits, targets, mask; and if you like names (of the sequences), loss (that you computed), ignore_index"


class BatchError(Exception):
    """A file that is no batch; the message says why."""


@dataclass
class Batch:
    """A saved batch as rows of positions, and what each of them costs."""

    described: str
    names: List[str]
    target: Tensor  # [B, T]
    inside: Tensor  # [B, T], what the mask says
    kept: Tensor  # [B, T], inside and not ignored
    real: Tensor  # [B, T], the target is a class
    cost: Tensor  # [B, T], 0 where it is not
    finite: Tensor  # [B, T], all logits are
    classes: int
    ignore_index: int
    loss: Optional[float]  # that was saved

    @property
    def outside(self) -> Tensor:
        """[B, T], the target is neither a class nor ignored."""
        return ~self.real & (self.target != self.ignore_index)


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
        raise BatchError(f"expected a dict of {KEYS}; got {type(saved).__name__}")
    if missing := [key for key in ("logits", "targets", "mask") if key not in saved]:
        raise BatchError(f"expected a dict of {KEYS}; {', '.join(missing)} missing, got {list(saved)}")
    for key in ("logits", "targets", "mask"):
        if not isinstance(saved[key], Tensor):
            raise BatchError(f"expected {key} to be a tensor, got {type(saved[key]).__name__}")
    return saved


def _class_dim(logits: Tensor, target: Tensor, dim: Optional[int]) -> int:
    shape = list(logits.shape)
    if dim is not None and not -logits.dim() <= dim < logits.dim():
        raise BatchError(f"expected --dim to be a dimension of logits {shape}, got {dim}")
    candidates = {0} if logits.dim() == 1 else {1, logits.dim() - 1} if dim is None else {dim % logits.dim()}
    fitting = [d for d in sorted(candidates) if logits.dim() > 0 and shape[:d] + shape[d + 1 :] == list(target.shape)]
    if not fitting:
        raise BatchError(f"expected targets of logits' shape {shape} without the classes, got {list(target.shape)}")
    if len(fitting) > 1:
        raise BatchError(f"expected --dim: the classes of logits {shape} may lie in dim 1 or {logits.dim() - 1}")
    return fitting[0]


def _rows(tensor: Tensor) -> Tensor:
    """[B, T]: a sequence for each index of the first dimension; one dimension alone is one sequence."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def read(path: Path, dim: Optional[int] = None) -> Batch:
    """The batch, checked, with the cost of each position."""
    saved = _load(path)
    logits, target, mask = saved["logits"].detach(), saved["targets"], saved["mask"]
    if not logits.is_floating_point():
        raise BatchError(f"expected logits of a floating dtype, got {logits.dtype}")
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise BatchError(f"expected targets to be class indices (int64, int32 or uint8), got {target.dtype}")
    if mask.is_floating_point() or mask.is_complex():
        raise BatchError(f"expected mask of bool or integers (nonzero = keep), got {mask.dtype}")
    class_dim = _class_dim(logits, target, dim)
    fits = mask.dim() == target.dim() and all(m in (1, t) for m, t in zip(mask.shape, target.shape, strict=True))
    if not fits:
        raise BatchError(f"expected mask of targets' shape {list(target.shape)}, or 1s, got {list(mask.shape)}")
    ignore_index, loss, names = saved.get("ignore_index", -100), saved.get("loss"), saved.get("names")
    if not isinstance(ignore_index, int):
        raise BatchError(f"expected ignore_index to be an int, got {ignore_index!r}")
    if isinstance(loss, Tensor) and loss.numel() == 1:
        loss = loss.item()
    if loss is not None and not isinstance(loss, (int, float)):
        raise BatchError(f"expected loss to be one number, got {type(loss).__name__}")

    logits = logits.movedim(class_dim, -1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    classes = logits.shape[-1]
    rows = _rows(target.long())
    inside = _rows((mask != 0).expand(target.shape))
    real = (rows >= 0) & (rows < classes) & (rows != ignore_index)
    logits = logits.reshape(*rows.shape, classes)
    if names is None:
        names = [str(row) for row in range(len(rows))]
    if not isinstance(names, (list, tuple)) or len(names) != len(rows):
        raise BatchError(f"expected names to be a list of {len(rows)}, one for each sequence, got {names!r}")
    described = (
        f"logits {list(saved['logits'].shape)} {saved['logits'].dtype}, {classes} classes in dim {class_dim}; "
        f"targets {list(target.shape)} {target.dtype}; mask {list(mask.shape)} {mask.dtype}"
    ).replace("torch.", "")
    return Batch(
        described=described,
        names=[str(name) for name in names],
        target=rows,
        inside=inside,
        kept=inside & (rows != ignore_index),
        real=real,
        cost=cross_entropy(logits, rows, real, dim=-1, reduction="none"),
        finite=logits.isfinite().all(-1),
        classes=classes,
        ignore_index=ignore_index,
        loss=loss,
    )


def _mean(cost: Tensor, of: Tensor) -> float:
    return cost[of].double().mean().item() if of.any() else 0.0


def means(batch: Batch) -> Dict[str, Optional[float]]:
    """The loss, and what the usual mistakes would make of it; None where that is an IndexError."""
    whole = batch.kept & batch.real
    each = [_mean(cost, of) for cost, of in zip(batch.cost, whole, strict=True) if of.any()]
    count = max(batch.cost.numel(), 1)
    values: Dict[str, Optional[float]] = {
        "mean over what counts": _mean(batch.cost, whole),
        "mean over everything, loss.mean()": batch.cost.double().sum().item() / count,
        "(loss * mask).mean()": (batch.cost.double() * batch.inside).sum().item() / count,
        "mean of the sequences' means": sum(each) / max(len(each), 1),
    }
    here, anywhere = bool((batch.outside & batch.kept).any()), bool(batch.outside.any())
    # What multiplies has computed the loss of the padding before.
    errors = dict(zip(values, (here, anywhere, anywhere, here), strict=True))
    return {name: None if errors[name] else value for name, value in values.items()}


def warnings(batch: Batch) -> List[str]:
    """What looks like a mistake."""
    found = []
    kept, padding = batch.kept, ~batch.inside
    if kept.numel() and not kept.any():
        found.append("nothing is kept: the loss is 0, with a zero gradient, and this batch teaches nothing")
    elif empty := [name for name, row in zip(batch.names, kept, strict=True) if not row.any()]:
        listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        found.append(f"{len(empty)} of {len(batch.names)} sequences have no position that counts: {listed}")
    held = batch.target[batch.inside & batch.real].unique()
    left_out = batch.target[padding & batch.real].unique()
    if batch.inside.any() and len(held) <= 1 and len(left_out) > 1:
        what = f"are all {held.item()}" if len(held) else "hold no class"
        found.append(
            f"the mask looks inverted: targets that count {what}, those in the padding hold {len(left_out)} classes. "
            "True means keep: try ~mask"
        )
    outside = (kept & batch.outside).nonzero()
    if len(outside):
        row, position = outside[0].tolist()
        found.append(
            f"{len(outside)} targets that count are no class of the {batch.classes}: the first is "
            f"{batch.target[row, position].item()}, sequence {batch.names[row]}, position {position}; "
            "cross_entropy raises an IndexError"
        )
    for of, what in ((kept, "count: the loss is not finite"), (padding, "are padding: loss * mask would be NaN")):
        if count := int((~batch.finite & of).sum()):
            found.append(f"{count} positions with NaN or inf in their logits {what}")
    return found + _of_saved_loss(batch)


def _of_saved_loss(batch: Batch) -> List[str]:
    if batch.loss is None:
        return []
    candidates = means(batch)
    (right, value), *others = candidates.items()
    if value is None or math.isnan(value) or math.isclose(batch.loss, value, rel_tol=1e-3, abs_tol=1e-6):
        return []
    others.append(("mean over the padding", _mean(batch.cost, ~batch.inside & batch.real)))
    for name, other in others:
        if other is not None and math.isclose(batch.loss, other, rel_tol=1e-3, abs_tol=1e-6):
            return [f"the loss that was saved, {batch.loss:.6g}, is the {name}; the {right} is {value:.6g}"]
    return [f"the loss that was saved, {batch.loss:.6g}, is not the {right}, {value:.6g}"]


def _shown(cost: float, inside: bool, ignored: bool, real: bool) -> str:
    text = "ignored" if ignored else f"{cost:.3g}" if real else "error"
    return text if inside else f"({text})"


def _table(batch: Batch, limit: int) -> List[str]:
    lines = [["sequence", "counts", "mean", "padding's", "positions"]]
    for row, name in enumerate(batch.names[:limit]):
        kept, real, cost = batch.kept[row], batch.real[row], batch.cost[row]
        padding = ~batch.inside[row]
        ignored = batch.target[row] == batch.ignore_index
        columns = zip(cost.tolist(), batch.inside[row].tolist(), ignored.tolist(), real.tolist(), strict=True)
        positions = [_shown(*column) for column in list(columns)[:limit]]
        more = len(cost) - len(positions)
        lines.append(
            [
                name,
                f"{int(kept.sum())} of {len(kept)}",
                f"{_mean(cost, kept & real):.4g}" if kept.any() else "-",
                f"{_mean(cost, padding & real):.4g}" if (padding & real).any() else "-",
                " ".join(positions) + (f" ... {more} more" if more else ""),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    if len(batch.names) > limit:
        table.append(f"... {len(batch.names) - limit} more")
    return table


def report(batch: Batch, limit: int) -> str:
    """All that is printed of a batch, but its warnings."""
    total, counting = batch.kept.numel(), int(batch.kept.sum())
    padding, ignored = int((~batch.inside).sum()), int((batch.inside & ~batch.kept).sum())
    values = means(batch)
    lines = [batch.described, "", *_table(batch, limit), "", "(in brackets: padding, and what it would have cost)", ""]
    lines.append(
        f"{total} positions: {counting} count, {padding} are padding ({padding / max(total, 1):.1%}), "
        f"{ignored} hold ignore_index {batch.ignore_index}"
    )
    lines.append(f"effective normalizer: {counting}")
    for name, value in values.items():
        lines.append(f"{name}: {'an IndexError' if value is None else f'{value:.6g}'}")
    return "\n".join(lines)


def draw(batch: Batch, path: Path) -> None:
    """What each position costs, and what the padding would have cost, on one scale."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    cost = batch.cost.double()
    finite = cost[batch.real & cost.isfinite()]
    colors = colormaps["viridis_r"].with_extremes(bad="#e4e6e9")
    titles = {"what counts": batch.kept & batch.real, "what the padding would have cost": ~batch.inside & batch.real}
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for axis, (title, of) in zip(axes, titles.items(), strict=True):
        shown = cost.where(of, math.nan).numpy()
        image = axis.imshow(
            shown,
            cmap=colors,
            vmin=0,
            vmax=finite.max().item() if len(finite) else 1,
            aspect="auto",
            interpolation="none",
        )
        axis.set_title(f"{title}: mean {_mean(cost, of):.4g} over {int(of.sum())} positions", loc="left")
        axis.set_ylabel("sequence")
        if len(batch.names) <= 24:
            axis.set_yticks(range(len(batch.names)), batch.names)
    axes[-1].set_xlabel("position")
    figure.colorbar(image, ax=axes, label="loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run(path: Path, dim: Optional[int], limit: int, picture: Optional[Path]) -> int:
    """Prints the report of a batch, and draws it; 2 is the exit status where there is none."""
    try:
        batch = read(path, dim)
    except BatchError as error:
        print(f"inspect: {path}: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {report(batch, limit)}")
    for warning in warnings(batch):
        print(f"warning: {warning}")
    if picture is not None:
        try:
            draw(batch, picture)
        except ImportError:
            print("no picture: matplotlib is not installed (pip install matplotlib, or --no-picture)", file=sys.stderr)
        except (OSError, ValueError) as error:
            print(f"no picture: {error}", file=sys.stderr)
        else:
            print(f"picture: {picture}")
    return 0
