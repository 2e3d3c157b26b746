"""``python -m masked_loss inspect``: which positions of a saved batch count, what each costs, what the rest would."""

import math
import sys
from pathlib import Path
from typing import List, Optional

from torch import Tensor

from ._batch import (
    RIGHT,
    Batch,
    BatchError,
    counted,
    fits_better,
    means,
    name_of_loss,
    read,
    shift_fits,
)


def _values(tensor: Tensor) -> str:
    listed = [f"{value:g}" for value in tensor.unique().tolist()]
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")


def _inputs(batch: Batch) -> str:
    return "logits" if batch.classes else "input or target"


# Each of these functions says what looks like one mistake, or None.


def nothing_kept(batch: Batch) -> Optional[str]:
    if batch.kept.any() or not batch.kept.numel():
        return None
    return "nothing is kept: the loss is 0, with a zero gradient, and this batch teaches nothing"


def empty_rows(batch: Batch) -> Optional[str]:
    empty = [name for name, row in zip(batch.names, batch.kept, strict=True) if not row.any()]
    if not batch.kept.any() or not empty:
        return None
    listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
    have = "has" if len(empty) == 1 else "have"
    return f"{len(empty)} of {counted(len(batch.names), batch.unit)} {have} no position that counts: {listed}"


def lengths_for_a_mask(batch: Batch) -> Optional[str]:
    if batch.mask_holds != "lengths":
        return None
    mask = f"masked_loss.sequence_mask(lengths, {batch.positions})"
    return f"{batch.mask_key} holds lengths ({_values(batch.mask)}) instead of True and False: {mask} is what is shown"


def weights_for_a_mask(batch: Batch) -> Optional[str]:
    if batch.mask_holds != "weights":
        return None
    return f"{batch.mask_key} holds weights ({_values(batch.mask)}) instead of True and False: pass it as sample_weight"


def numbers_for_a_mask(batch: Batch) -> Optional[str]:
    if batch.mask_holds != "numbers":
        return None
    inverted = bool((batch.mask < 0).all())
    what = "~ of an integer mask is -1 and -2, try mask == 0" if inverted else "shown is what nonzero keeps"
    return f"{batch.mask_key} holds other integers than 0 and 1 ({_values(batch.mask)}): {what}"


def inverted_mask(batch: Batch) -> Optional[str]:
    """By the targets, by what they cost, and by the side on which the padding lies."""
    known = batch.real & ~batch.target.isnan()
    (held, cost), (left_out, cost_outside) = (
        (batch.target[of & known], batch.cost[of & known]) for of in (batch.kept, ~batch.inside)
    )
    different = len(left_out.unique())
    if batch.inside.any() and len(held.unique()) <= 1 < different and len(held) not in (1, 2):
        what = f"are all {held[0].item()}" if len(held) else "hold no class" if batch.classes else "are all NaN"
        others = f"{different} {'classes' if batch.classes else 'numbers'}"
        why = f"looks inverted: targets that count {what}, those in the padding hold {others}"
    elif batch.classes and cost.mean() > math.log(batch.classes) and fits_better(cost_outside, cost, batch.classes):
        why = f"looks inverted: what counts costs {cost.mean():.4g}, more than the padding's {cost_outside.mean():.4g}"
    elif batch.unit == "sequence" and different > 1 and _keeps_the_ends(batch.inside):
        # Padding on the left holds one value.
        why = (
            "may be inverted: it leaves out the beginning of sequences and keeps their end, as is right after a prompt"
        )
    else:
        return None
    return f"the mask {why}. True means keep: try ~mask"


def _keeps_the_ends(inside: Tensor) -> bool:
    """Whether what it leaves out lies at the beginning of sequences alone."""
    begins, ends = inside[:, 1:] & ~inside[:, :-1], ~inside[:, 1:] & inside[:, :-1]
    return bool(begins.any()) and not ends.any()


def targets_outside(batch: Batch) -> Optional[str]:
    outside = (batch.kept & batch.outside).nonzero()
    if not len(outside):
        return None
    row, position = outside[0].tolist()
    where = f"{batch.unit} {batch.names[row]}, position" if batch.unit else "position"
    return (
        f"{counted(len(outside), 'target that counts is', 'targets that count are')} no class of the {batch.classes}: "
        f"the first is {batch.target[row, position].item()}, {where} {position}; cross_entropy raises an IndexError"
    )


def targets_not_finite(batch: Batch) -> Optional[str]:
    missing = batch.kept & ~batch.target.isfinite()
    if not missing.any():
        return None
    found = counted(int(missing.sum()), "target that counts is", "targets that count are")
    mask = "target.isfinite()" if batch.mask is None else "mask & target.isfinite()"
    mean = batch.mean(batch.kept & ~missing).item()
    return f"{found} NaN or inf, and so is the loss: with {mask} for a mask it is {mean:.6g}"


def input_not_finite(batch: Batch) -> Optional[str]:
    if not (count := int((batch.kept & ~batch.finite).sum())):
        return None
    what = counted(count, "position with NaN or inf in its", "positions with NaN or inf in their")
    return f"{what} {_inputs(batch)} {'counts' if count == 1 else 'count'}: the loss is not finite"


def padding_not_finite(batch: Batch) -> Optional[str]:
    if not (count := int((~batch.inside & ~batch.finite).sum())):
        return None
    what = counted(count, "position with NaN or inf in its", "positions with NaN or inf in their")
    return f"{what} {_inputs(batch)} {'is' if count == 1 else 'are'} padding: loss * mask would be NaN"


def labels_of_padding(batch: Batch) -> Optional[str]:
    """An attention mask does not reach a loss that takes logits and labels alone."""
    count = int((~batch.inside & ~batch.ignored).sum())
    if batch.mask_key != "attention_mask" or batch.target_key != "labels" or not count:
        return None
    found = counted(count, "label in the padding is", "labels in the padding are")
    return f"{found} not {batch.ignore_index}: a loss without the mask, such as Hugging Face's own, counts them"


def missing_shift(batch: Batch) -> Optional[str]:
    plain, shifted = (batch.other, batch) if batch.shifted else (batch, batch.other)
    if shifted is None or not shift_fits(plain) or (batch.shifted and name_of_loss(batch) == RIGHT):
        return None
    costs = [one.mean(one.kept).item() for one in (shifted, plain)]
    return (
        f"{batch.target_key} look unshifted: logits fit the next one ({costs[0]:.4g}) better than the one beside them "
        f"({costs[1]:.4g}). For a causal model, F.pad({batch.target_key}, (0, 1), value={batch.ignore_index})[:, 1:] "
        "shifts them"
    )


def another_loss(batch: Batch) -> Optional[str]:
    right, name = means(batch)[RIGHT], name_of_loss(batch)
    if batch.loss is None or right is None or math.isnan(right) or name == RIGHT:
        return None
    what = f"is {'' if name.startswith('half') else 'the '}{name}" if name else f"is not the {RIGHT}"
    return f"the loss that was saved, {batch.loss:.6g}, {what}; the {RIGHT} is {right:.6g}"


MISTAKES = [
    lengths_for_a_mask,
    weights_for_a_mask,
    numbers_for_a_mask,
    nothing_kept,
    empty_rows,
    inverted_mask,
    targets_outside,
    targets_not_finite,
    input_not_finite,
    padding_not_finite,
    labels_of_padding,
    missing_shift,
    another_loss,
]


def warnings(batch: Batch) -> List[str]:
    """What looks like a mistake."""
    return [found for mistake in MISTAKES if (found := mistake(batch))]


def _shown(cost: float, inside: bool, ignored: bool, real: bool) -> str:
    text = "ignored" if ignored else f"{cost:.3g}" if real else "error"
    return text if inside else f"({text})"


def _table(batch: Batch, limit: int) -> List[str]:
    lines = [[batch.unit or "batch", "counts", "mean", "padding's", "positions"]]
    kept, padding = (of & batch.real for of in (batch.kept, ~batch.inside))
    of_kept, of_padding = batch.mean(kept, 1), batch.mean(padding, 1)
    for row, name in enumerate(batch.names[:limit]):
        columns = [of[row, :limit].tolist() for of in (batch.cost, batch.inside, batch.ignored, batch.real)]
        positions = [_shown(*column) for column in zip(*columns, strict=True)]
        more = batch.cost.shape[1] - len(positions)
        lines.append(
            [
                name,
                f"{int(batch.kept[row].sum())} of {batch.cost.shape[1]}",
                f"{of_kept[row]:.4g}" if batch.kept[row].any() else "-",
                f"{of_padding[row]:.4g}" if padding[row].any() else "-",
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
    total, counting, padding = batch.kept.numel(), int(batch.kept.sum()), int((~batch.inside).sum())
    parts = [
        counted(counting, "counts", "count"),
        f"{counted(padding, 'is', 'are')} padding ({padding / max(total, 1):.1%})",
    ]
    if batch.classes:
        ignored = counted(int((batch.inside & batch.ignored).sum()), "holds", "hold")
        parts.append(f"{ignored} ignore_index {batch.ignore_index}")
    values = means(batch)
    if batch.other and batch.target_key == "labels":
        values[f"{RIGHT}, labels {'as they are' if batch.shifted else 'shifted by one'}"] = means(batch.other)[RIGHT]
    lines = [
        batch.described,
        "",
        *_table(batch, limit),
        "",
        "(in brackets: padding, and what it would have cost)",
        "",
        f"{counted(total, 'position')}: {', '.join(parts)}",
        f"effective normalizer: {batch.weight[batch.kept].sum().item():.10g}",
        *(f"{name}: {'an IndexError' if value is None else f'{value:.6g}'}" for name, value in values.items()),
    ]
    return "\n".join(lines)


def draw(batch: Batch, path: Path) -> None:
    """What each position costs, and what the padding would have cost, on one scale."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    cost = batch.cost
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
        axis.set_title(f"{title}: mean {batch.mean(of):.4g} over {counted(int(of.sum()), 'position')}", loc="left")
        axis.set_ylabel(batch.unit)
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
