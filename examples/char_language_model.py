"""Trains a character-level language model on lines of different lengths, with a masked loss.

The text is the source code of Python's standard library, so nothing is downloaded. Its lines are padded to batches
``[B, T]``. ``sequence_mask`` marks the real characters, and ``cross_entropy`` takes logits ``[B, T, V]`` without
flattening, and targets without ``ignore_index``. It takes about two minutes on one CPU core:

    python examples/char_language_model.py [--seconds 100] [--output out/demo.png]
"""

import argparse
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import masked_loss

# The newline starts a line and ends it, and it pads: a mask needs no class of its own for padding.
VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
CLASS_OF = {character: index for index, character in enumerate(VOCABULARY)}
MAX_LENGTH = 80
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}
PROMPTS = ["import ", "class ", "def ", "        if not ", "        self.", "        return ", "    # The "]


class Batch(NamedTuple):
    inputs: Tensor  # [B, T]
    targets: Tensor  # [B, T]
    mask: Tensor  # [B, T], True = a character of the line


class LineModel(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(VOCABULARY))

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features, state = self.gru(self.embedding(tokens), state)
        return self.head(features), state  # [B, T, V], [1, B, H]


def usable_lines(path: Path) -> list[str]:
    lines = (line.rstrip() for line in path.read_text("utf-8", errors="replace").splitlines())
    return [line for line in lines if 0 < len(line) <= MAX_LENGTH and CLASS_OF.keys() >= set(line)]


def library_files() -> list[list[str]]:
    """The lines of each source file of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    return [usable_lines(path) for path in paths]


def make_batch(lines: list[str]) -> Batch:
    tokens = [torch.tensor([CLASS_OF[character] for character in f"\n{line}\n"]) for line in lines]
    lengths = torch.tensor([len(line) + 1 for line in lines])  # the newline at the end is predicted too
    padded = pad_sequence(tokens, batch_first=True, padding_value=CLASS_OF["\n"])  # [B, T + 1]
    inputs, targets = padded[:, :-1], padded[:, 1:]
    return Batch(inputs, targets, masked_loss.sequence_mask(lengths, targets.shape[1]))


def training_batches(lines: list[str], batch_size: int, rng: random.Random) -> Iterator[Batch]:
    while True:
        # Lines of similar length go together, so that less time is spent on padding.
        pool = sorted(rng.sample(lines, 4 * batch_size), key=len)
        batches = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        rng.shuffle(batches)
        yield from map(make_batch, batches)


def bits(nats: Tensor | float) -> float:
    return float(nats) / math.log(2)


@torch.no_grad()
def held_out_bits(model: LineModel, batches: list[Batch]) -> float:
    total = sum(
        masked_loss.cross_entropy(model(b.inputs)[0], b.targets, b.mask, reduction="sum", dim=-1) for b in batches
    )
    return bits(total / sum(b.mask.sum() for b in batches))


class History(NamedTuple):
    training: list[float]  # bits per character over the latest steps
    held_out: dict[int, float]  # bits per character before that step


def train(model: LineModel, lines: list[str], held_out: list[Batch], options: argparse.Namespace) -> History:
    history = History([], {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    batches = training_batches(lines, options.batch_size, random.Random(options.seed))
    totals, characters = [], []
    start, step, progress = time.monotonic(), 1, 0.0
    with tqdm(total=options.steps, desc="training", unit="step", mininterval=0.5) as bar:
        while progress < 1:
            if step & (step - 1) == 0:  # a power of two: evenly spaced on a logarithmic axis
                history.held_out[step] = held_out_bits(model, held_out)
            optimizer.param_groups[0]["lr"] = options.lr * min(1, step / 50) * math.cos(progress * math.pi / 2)
            batch = next(batches)
            logits, _ = model(batch.inputs)
            loss = masked_loss.cross_entropy(logits, batch.targets, batch.mask, dim=-1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

            # Averaged over characters, as the held-out loss is: batches of short lines count for less.
            characters.append(int(batch.mask.sum()))
            totals.append(bits(loss.detach()) * characters[-1])
            latest = -min(40, 1 + step // 4)
            history.training.append(sum(totals[latest:]) / sum(characters[latest:]))
            bar.set_postfix_str(f"{history.training[-1]:.3f} bits/char", refresh=False)
            bar.update()
            # A busy or slow machine runs out of time before it runs out of steps.
            progress = max(step / options.steps, (time.monotonic() - start) / options.seconds)
            step += 1
        bar.total = bar.n
    history.held_out[step] = held_out_bits(model, held_out)
    return history


@torch.no_grad()
def compare_losses(model: LineModel, batches: list[Batch]) -> None:
    """Prints the held-out loss of one model, computed in three ways."""
    padding_counted, flattened, ours, characters, positions = 0.0, 0.0, 0.0, 0, 0
    for inputs, targets, mask in batches:
        logits, _ = model(inputs)
        rows = logits.flatten(0, 1)
        padding_counted += F.cross_entropy(rows, targets.flatten(), reduction="sum").item()
        ignored = targets.masked_fill(~mask, -100)
        flattened += F.cross_entropy(rows, ignored.flatten(), ignore_index=-100, reduction="sum").item()
        ours += masked_loss.cross_entropy(logits, targets, mask, reduction="sum", dim=-1).item()
        characters += int(mask.sum())
        positions += mask.numel()
    rows = {
        "padding counted as text": bits(padding_counted / positions),
        "F.cross_entropy, flattened, ignore_index": bits(flattened / characters),
        "masked_loss.cross_entropy, mask": bits(ours / characters),
    }
    print(f"One model, the same held-out lines; {1 - characters / positions:.0%} of the positions are padding.\n")
    print(f"  {'':<42}{'bits/char':>10}{'difference':>13}")
    for name, value in rows.items():
        print(f"  {name:<42}{value:>10.6f}{value - bits(ours / characters):>+13.3g}")
    print("\nCounting padding reports how well the model guesses padding; the mask reports the text alone.\n")


def compare_gradients(model: LineModel, batch: Batch) -> None:
    """Prints the difference of the gradient from that of ``ignore_index``, and the effect of NaN in the padding."""
    inputs, targets, mask = batch
    logits = model(inputs)[0].detach().requires_grad_()
    loss = masked_loss.cross_entropy(logits, targets, mask, dim=-1)
    (ours,) = torch.autograd.grad(loss, logits)
    theirs_loss = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(~mask, -100).flatten())
    (theirs,) = torch.autograd.grad(theirs_loss, logits)
    print(f"Gradient, largest difference to ignore_index: {(ours - theirs).abs().max():.1e}")

    poisoned = logits.detach().masked_fill(~mask[..., None], math.nan)
    same = torch.equal(masked_loss.cross_entropy(poisoned, targets, mask, dim=-1), loss)
    multiplied = (F.cross_entropy(poisoned.mT, targets, reduction="none") * mask).sum() / mask.sum()
    print(f"NaN logits at padding: masked_loss {'stays bitwise the same' if same else 'CHANGES'}", end="; ")
    print(f"loss * mask gives {multiplied:.3f}\n")


@torch.no_grad()
def complete(model: LineModel, prompt: str, temperature: float = 0.7) -> str:
    """The line that the model makes of its beginning."""
    line, state = prompt, None
    tokens = make_batch([prompt]).inputs
    while len(line) < MAX_LENGTH:
        logits, state = model(tokens, state)
        tokens = torch.multinomial((logits[:, -1] / temperature).softmax(-1), 1)
        if (character := VOCABULARY[tokens.item()]) == "\n":
            break
        line += character
    return line


def draw_curves(axes: Axes, history: History) -> None:
    last_step = max(history.held_out)
    axes.plot(range(1, last_step), history.training, color="#4292c6", label="training, running mean")
    axes.plot(*zip(*history.held_out.items(), strict=True), "o-", color="#d94801", markersize=4, label="held-out files")
    last = history.held_out[last_step]
    axes.annotate(f"{last:.2f}", (last_step, last), (8, -3), textcoords="offset points", color="#d94801", weight="bold")
    axes.set(xscale="log", xlabel="step", ylabel="bits per character", xlim=(0.9, last_step * 1.25))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_losses(figure: Figure, axes: Axes, model: LineModel, batch: Batch) -> None:
    """A cell for each character, coloured by its loss."""
    with torch.no_grad():
        logits, _ = model(batch.inputs)
        losses = masked_loss.cross_entropy(logits, batch.targets, batch.mask, reduction="none", dim=-1) / math.log(2)
    colors = colormaps["YlOrRd"].with_extremes(bad="#e4e6e9")
    image = axes.imshow(losses.masked_fill(~batch.mask, math.nan), cmap=colors, vmin=0, vmax=8, aspect="auto")
    for row, column in batch.mask.nonzero().tolist():
        character = VOCABULARY[batch.targets[row, column]].replace("\n", "↵")
        color = "white" if losses[row, column] > 5 else "black"
        axes.text(column, row, character, color=color, family="monospace", ha="center", va="center", fontsize=8.5)
    rows, columns = losses.shape
    axes.set_xticks([column - 0.5 for column in range(1, columns)], minor=True)
    axes.set_yticks([row - 0.5 for row in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)
    axes.set_title("Loss of each character in a held-out batch; padding is grey: no loss, no gradient", loc="left")
    figure.colorbar(image, ax=axes, label="bits", extend="max", pad=0.01, fraction=0.03)


def draw(path: Path, history: History, model: LineModel, batch: Batch) -> None:
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.7))
    top.set_title("A character model of Python's standard library, trained with masked_loss", loc="left")
    draw_curves(top, history)
    draw_losses(figure, bottom, model, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="stop after so many steps")
    parser.add_argument("--seconds", type=float, default=100, help="or after so many seconds of training")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/demo.png"), help="where the picture goes")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # a GRU's steps are too small to share: threads would mostly wait for each other
    files = library_files()
    training_lines = [line for index, file in enumerate(files) if index % 10 for line in file]
    held_out_lines = [line for file in files[::10] for line in file]
    print(f"Python's standard library: {len(training_lines)} lines to train on, {len(held_out_lines)} held out")
    chosen = random.Random(options.seed).sample(held_out_lines, 512)
    held_out = [make_batch(chosen[start : start + 64]) for start in range(0, len(chosen), 64)]

    model = LineModel(options.hidden)
    history = train(model, training_lines, held_out, options)
    before, *_, after = history.held_out.values()
    print(f"Held-out loss: {before:.3f} bits/char before training, {after:.3f} after {len(history.training)} steps\n")
    compare_losses(model, held_out)
    compare_gradients(model, held_out[0])
    print("Lines that the model made of their beginnings:\n")
    print(*(f"  {complete(model, prompt)}" for prompt in PROMPTS), sep="\n", end="\n\n")

    excerpt = len(held_out_lines) // 3
    draw(options.output, history, model, make_batch(held_out_lines[excerpt : excerpt + 18]))
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    main()
