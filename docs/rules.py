"""Draws the four rules, with numbers computed as they are drawn: `python docs/rules.py` writes docs/rules/*.svg."""

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


def cells(axes: Axes, title: str, values: Tensor, mask: Tensor, below: str, places: int = 2) -> None:
    """A grid of numbers: what is kept in blue, padding in grey, NaN in orange."""
    for (row, column), value in zip(
        torch.cartesian_prod(*map(torch.arange, values.shape)), values.flatten(), strict=True
    ):
        color = BAD if value.isnan() else KEPT if mask[row, column] else PADDING
        axes.add_patch(Rectangle((column, row), 0.94, 0.9, color=color, linewidth=0))
        text = "NaN" if value.isnan() else f"{value:.{places}f}" if value != 0 else "0"
        axes.text(column + 0.47, row + 0.48, text, ha="center", va="center", fontsize=9)
    axes.set(xlim=(-0.02, values.shape[1]), ylim=(values.shape[0], -0.02), aspect="equal")
    axes.axis("off")
    axes.set_title(title, fontsize=10, family="monospace")
    axes.text(values.shape[1] / 2 - 0.03, values.shape[0] + 0.12, below, ha="center", va="top", fontsize=9)


def panels(count: int, width: float = 9.0, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def no_mask() -> Figure:
    logits, target = batch()
    theirs = each(logits, target)
    ours = masked_loss.cross_entropy(logits, target, dim=-1, reduction="none")
    figure, (left, right) = panels(2)
    everything = torch.ones_like(MASK)
    cells(left, "F.cross_entropy", theirs, everything, f"mean {theirs.mean():.4f}")
    mean = masked_loss.cross_entropy(logits, target, dim=-1)
    cells(right, "masked_loss.cross_entropy", ours, everything, f"mean {mean:.4f}")
    return figure


def absent() -> Figure:
    logits, target = batch()
    ours = masked_loss.cross_entropy(logits, target, MASK, dim=-1, reduction="none")
    alone = F.cross_entropy(logits[MASK], target[MASK], reduction="none").unflatten(0, (2, 5))
    figure, (left, right) = panels(2)
    mean = masked_loss.cross_entropy(logits, target, MASK, dim=-1)
    cells(left, "masked_loss.cross_entropy(…, mask)", ours, MASK, f"mean {mean:.4f}, of the 10 that are kept")
    title = "F.cross_entropy(logits[mask], target[mask])"
    cells(right, title, alone, torch.ones(2, 5, dtype=torch.bool), f"mean {alone.mean():.4f}")
    return figure


def never_read() -> Figure:
    logits, target = batch()
    garbage = logits.detach().where(MASK[..., None], math.nan).requires_grad_()
    figure, axes = panels(3, width=10.5)
    cells(axes[0], "one logit of each position", garbage.detach()[..., 0], MASK, "NaN in the padding")
    losses = {
        "gradient of (loss * mask).mean()": (each(garbage, target) * MASK).mean(),
        "gradient of masked_loss": masked_loss.cross_entropy(garbage, target, MASK, dim=-1),
    }
    for axis, (title, loss) in zip(axes[1:], losses.items(), strict=True):
        (gradient,) = torch.autograd.grad(loss, garbage)
        if loss.isnan():
            shown = "NaN"
        else:
            assert loss == masked_loss.cross_entropy(logits, target, MASK, dim=-1)
            shown = f"{loss:.4f}, as without the NaN"
        cells(axis, title, gradient[..., 0], MASK, f"loss {shown}", places=3)
    return figure


def nothing_kept() -> Figure:
    logits, target = batch()
    nothing = torch.zeros_like(MASK)
    losses = {
        "gradient of (loss * mask).sum() / mask.sum()": (each(logits, target) * nothing).sum() / nothing.sum(),
        "gradient of masked_loss": masked_loss.cross_entropy(logits, target, nothing, dim=-1),
    }
    figure, axes = panels(2)
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
