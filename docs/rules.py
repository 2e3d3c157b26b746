"""Draws the four rules with computed numbers: `python docs/rules.py` writes docs/rules/*.svg."""

import math
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import masked_loss

KEPT, PADDING, BAD = "#c6dbef", "#e4e6e9", "#fdae6b"
LENGTHS = torch.tensor([5, 2, 3])
MASK = masked_loss.sequence_mask(LENGTHS)  # [3, 5]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(*MASK.shape, 4, generator=generator)
    return logits.requires_grad_(), torch.randint(4, MASK.shape, generator=generator)


def each(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none")


CELL = 0.52  # inches, in every picture


def cells(axes: Axes, title: str, values: Tensor, mask: Tensor, below: str, places: int = 2) -> None:
    """A grid of numbers: unmasked positions in blue, padding in grey, NaN in orange."""
    for (row, column), value in zip(
        torch.cartesian_prod(*map(torch.arange, values.shape)), values.flatten(), strict=True
    ):
        color = BAD if value.isnan() else KEPT if mask[row, column] else PADDING
        axes.add_patch(Rectangle((column, row), 0.94, 0.9, color=color, linewidth=0))
        text = "NaN" if value.isnan() else f"{value:.{places}f}" if value != 0 else "0"
        axes.text(column + 0.47, row + 0.48, text, ha="center", va="center", fontsize=9)
    # The same limits for all grids of a picture, and so the same cells.
    axes.set(xlim=(-0.02, MASK.shape[1]), ylim=(MASK.shape[0] + 0.45, -0.02), aspect="equal")
    axes.axis("off")
    axes.set_title(title if "\n" in title else f"\n{title}", fontsize=9, family="monospace")
    middle, bottom = values.shape[1] / 2 - 0.03, values.shape[0] + 0.12
    axes.text(middle, bottom, below, ha="center", va="top", fontsize=9)


def panels(count: int, *kinds: str) -> tuple[Figure, list[Axes]]:
    """Axes side by side, over a legend of the kinds of cells."""
    size = (count * (MASK.shape[1] + 1.5) * CELL, (MASK.shape[0] + 2.6) * CELL)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    colors = {"unmasked": KEPT, "masked": PADDING, "NaN": BAD}
    handles = [Rectangle((0, 0), 1, 1, color=colors[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=9)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def no_mask() -> Figure:
    logits, target = batch()
    everything = torch.ones_like(MASK)
    ours = {
        "cross_entropy(logits, target)": None,
        "cross_entropy(…, mask=all True)": everything,
    }
    figure, axes = panels(3, "unmasked")
    theirs = each(logits, target)
    cells(axes[0], "F.cross_entropy", theirs, everything, f"mean {theirs.mean():.4f}")
    for axis, (title, mask) in zip(axes[1:], ours.items(), strict=True):
        losses = masked_loss.cross_entropy(logits, target, mask, dim=-1, reduction="none")
        mean = masked_loss.cross_entropy(logits, target, mask, dim=-1)
        assert torch.allclose(losses, theirs) and torch.allclose(mean, theirs.mean())
        cells(axis, f"masked_loss.\n{title}", losses, everything, f"mean {mean:.4f}")
    return figure


def absent() -> Figure:
    logits, target = batch()
    ours = masked_loss.cross_entropy(logits, target, MASK, dim=-1, reduction="none")
    alone = F.cross_entropy(logits[MASK], target[MASK], reduction="none").unflatten(0, (2, 5))
    figure, (left, right) = panels(2, "unmasked", "masked")
    mean = masked_loss.cross_entropy(logits, target, MASK, dim=-1)
    cells(left, "masked_loss.cross_entropy(…, mask)", ours, MASK, f"mean {mean:.4f} of 10 unmasked positions")
    title = "F.cross_entropy(x[mask], target[mask])"
    cells(right, title, alone, torch.ones(2, 5, dtype=torch.bool), f"mean {alone.mean():.4f}")
    return figure


def never_read() -> Figure:
    logits, target = batch()
    garbage = logits.detach().where(MASK[..., None], math.nan).requires_grad_()
    figure, axes = panels(3, "unmasked", "masked", "NaN")
    cells(axes[0], "one logit of each position", garbage.detach()[..., 0], MASK, "NaN in the padding")
    losses = {
        "its gradient:\n(loss * mask).sum() / mask.sum()": (each(garbage, target) * MASK).sum() / MASK.sum(),
        "its gradient:\nmasked_loss.cross_entropy": masked_loss.cross_entropy(garbage, target, MASK, dim=-1),
    }
    for axis, (title, loss) in zip(axes[1:], losses.items(), strict=True):
        (gradient,) = torch.autograd.grad(loss, garbage)
        if loss.isnan():
            shown = "NaN"
        else:
            assert loss == masked_loss.cross_entropy(logits, target, MASK, dim=-1)
            shown = f"{loss:.4f}, the same as without NaN"
        cells(axis, title, gradient[..., 0], MASK, f"loss {shown}", places=3)
    return figure


def nothing_kept() -> Figure:
    logits, target = batch()
    nothing = torch.zeros_like(MASK)
    losses = {
        "gradient of\n(loss * mask).sum() / mask.sum()": (each(logits, target) * nothing).sum() / nothing.sum(),
        "gradient of\nmasked_loss.cross_entropy": masked_loss.cross_entropy(logits, target, nothing, dim=-1),
    }
    figure, axes = panels(2, "masked", "NaN")
    for axis, (title, loss) in zip(axes, losses.items(), strict=True):
        (gradient,) = torch.autograd.grad(loss, logits)
        cells(axis, title, gradient[..., 0], nothing, f"loss {'NaN' if loss.isnan() else f'{loss:.0f}'}")
    return figure


PICTURES = {"1-no-mask": no_mask, "2-absent": absent, "3-never-read": never_read, "4-nothing-kept": nothing_kept}


def draw(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Text stays text, and nothing depends on when it was drawn.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "masked_loss"}):
        for name, picture in PICTURES.items():
            picture().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("rules"))
