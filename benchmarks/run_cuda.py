"""Losses, softmax, masked_fill on a GPU against torch eager, torch.compile, and Liger and quack where they are there.

`make bench-cuda` runs it. Every case is timed in turns in one process, beside a copy of as many bytes. Prints a table,
and writes JSON and a picture, named after the GPU, into benchmarks/results.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Callable, Dict, List, Optional

import torch
import torch.nn.functional as F
from bench_pointwise import LOSSES
from bench_pointwise import case as pointwise
from bench_reductions import THEIRS as REDUCTIONS
from bench_reductions import case as reduction
from bench_softmax import case as softmax
from common import COMPILE, EAGER, OURS, Call, Case, Result, compiled, measure, start
from matplotlib.figure import Figure
from report import machine, report, write_json
from torch import Tensor

import masked_loss

LIGER, QUACK = "Liger", "quack"
PEERS = (EAGER, COMPILE)
RESULTS = Path(__file__).parent / "results"

Loss = Callable[[Tensor, Tensor], Tensor]


def liger() -> Optional[Loss]:
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return None
    return liger_cross_entropy


def quack() -> Optional[Loss]:
    try:
        from quack.cross_entropy import cross_entropy
    except ImportError:
        return None
    return partial(cross_entropy, reduction="mean", ignore_index=-100)


@dataclass
class CrossEntropy:
    rows: int
    classes: int
    dtype: torch.dtype
    backward: bool = True
    kept: float = 1.0
    probabilities: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        masked = "" if self.kept == 1 else f", {self.kept:.0%} kept"
        targets = ", class probabilities" * self.probabilities
        return f"{self.rows}x{self.classes}, {dtype}, forward{'+backward' * self.backward}{masked}{targets}"

    @property
    def input_bytes(self) -> int:
        return self.rows * self.classes * self.dtype.itemsize

    def __call__(self, device: torch.device) -> Dict[str, Call]:
        logits = torch.randn(self.rows, self.classes, device=device).to(self.dtype).requires_grad_(self.backward)
        if self.probabilities:
            target = torch.randn_like(logits).softmax(1).detach()
        else:
            target = torch.randint(self.classes, (self.rows,), device=device)
        mask = torch.rand(self.rows, device=device) < self.kept if self.kept < 1 else None
        ignored = target if mask is None else torch.where(mask, target, -100)

        def step(loss: Loss, x: Tensor, *arguments: Optional[Tensor]) -> None:
            value = loss(x, *arguments)
            if self.backward:
                x.grad = None
                value.backward()

        calls = {
            OURS: partial(step, masked_loss.cross_entropy, logits, target, mask),
            EAGER: partial(step, F.cross_entropy, logits, ignored),
            COMPILE: partial(step, compiled(F.cross_entropy), logits, ignored),
        }
        if self.probabilities:  # which the others do not take
            return calls
        if loss := liger():  # it writes the gradient over its input
            calls[LIGER] = partial(step, loss, logits.detach().clone().requires_grad_(self.backward), ignored)
        if loss := quack():
            calls[QUACK] = partial(step, loss, logits, ignored)
        return calls

    def case(self, group: str) -> Case:
        moved = self.kept * (1 + self.probabilities) + (1 if self.backward else 0)
        memory = 1.05 if self.backward else None
        return Case(str(self), self, group, self.classes, input_bytes=self.input_bytes, moved=moved, most_memory=memory)


@dataclass
class MaskedFill:
    size: int
    dtype: torch.dtype

    def __call__(self, device: torch.device) -> Dict[str, Call]:
        x = torch.randn(self.size, self.size, device=device).to(self.dtype)
        mask = torch.rand(x.shape, device=device) < 0.5
        return {
            OURS: lambda: masked_loss.masked_fill(x, mask, 1.0),
            EAGER: lambda: x.masked_fill(mask, 1.0),
            COMPILE: partial(compiled(lambda x: x.masked_fill(mask, 1.0)), x),
        }

    def case(self) -> Case:
        dtype, itemsize = str(self.dtype).removeprefix("torch."), self.dtype.itemsize
        name, bytes = f"masked_fill {self.size}x{self.size}, {dtype}", self.size**2 * itemsize
        return Case(name, self, "masked_fill", self.size, input_bytes=bytes, moved=2 + 1 / itemsize)


def cases(tiny: bool) -> List[Case]:
    """The shapes that quack, Liger and NeMo publish."""
    peers = {EAGER: 1.0, COMPILE: 1.0}
    if tiny:
        losses = [
            pointwise("pointwise", loss, 1 << 10, {}, EAGER, COMPILE) for loss in ("mse_loss", "gaussian_nll_loss")
        ]
        return [
            CrossEntropy(16, 64, torch.bfloat16, kept=0.5).case("tiny"),
            CrossEntropy(16, 64, torch.float32, probabilities=True).case("tiny"),
            MaskedFill(64, torch.float32).case(),
            *losses,
            *(softmax("softmax", {}, "softmax", (8, 16, 16), mask, others=PEERS) for mask in ("dense", "causal")),
            reduction("reductions", peers, "masked_mean", (1 << 10,), backward=True),
        ]
    pairs = [(32768, 2**n) for n in range(8, 17)] + [(16384, 131072), (8192, 262144)]
    result = []
    for backward in (False, True):
        group = "bfloat16, forward" + "+backward" * backward
        result += [CrossEntropy(rows, v, torch.bfloat16, backward).case(group) for rows, v in pairs]
    result += [CrossEntropy(16384, 2**n, torch.float32).case("float32, forward+backward") for n in range(12, 18)]
    for kept in (1, 0.8, 0.5, 0.2, 0.05):
        result.append(CrossEntropy(4096, 32000, torch.bfloat16, kept=kept).case("kept"))
    for dtype in (torch.bfloat16, torch.float32):
        result.append(CrossEntropy(2048, 32000, dtype, probabilities=True).case("class probabilities"))
    result += [MaskedFill(size, dtype).case() for size in (1024, 8192) for dtype in (torch.bfloat16, torch.float32)]
    for loss in LOSSES:
        for dtype, backward in product((torch.bfloat16, torch.float32), (False, True)):
            kind = {"dtype": dtype, "backward": backward}
            result.append(pointwise("pointwise", loss, 1 << 26, {}, EAGER, COMPILE, **kind))
        result.append(pointwise("small", loss, 1000, {}, EAGER))
    rows, scores = (8192, 2048), (8, 16, 512, 512)
    for dtype, backward in product((torch.float32, torch.bfloat16), (False, True)):
        kind = {"dtype": dtype, "backward": backward, "others": PEERS}
        result += [
            softmax("softmax", {}, function, rows, **kind) for function in ("softmax", "log_softmax", "logsumexp")
        ]
        result += [softmax("softmax", {}, "softmax", scores, mask, **kind) for mask in ("causal", "padding")]
        result.append(softmax("softmax", {}, "softmax", (32, 1000, 512), dim=1, **kind))
    for function, backward in product(REDUCTIONS, (False, True)):
        for dtype in (torch.bfloat16, torch.float32):
            result.append(reduction("reductions", peers, function, (1 << 24,), dtype=dtype, backward=backward))
        result.append(reduction("small", {EAGER: 1.0}, function, (32, 100), backward=backward))
    for function, dim in product(("masked_mean", "masked_var"), (0, 1)):
        result.append(reduction("reductions", peers, function, (8192, 2048), dim))
    return result


def fits(case: Case, device: torch.device) -> bool:
    """Eager makes three or four more tensors of the size of the logits, some of them in float32."""
    return device.type != "cuda" or 8 * case.input_bytes < torch.cuda.mem_get_info()[0]


def draw(results: List[Result], device: str) -> Figure:
    """Everybody's share of the copy's bandwidth, by the number of classes."""
    groups = [g for g in dict.fromkeys(r.case.group for r in results) if "forward" in g]
    figure = Figure(figsize=(5 * max(1, len(groups)), 4), layout="constrained")
    for index, group in enumerate(groups):
        axes = figure.add_subplot(1, len(groups), index + 1)
        of_group = [r for r in results if r.case.group == group]
        for name in dict.fromkeys(name for r in of_group for name in (OURS, *r.peers())):
            there = [r for r in of_group if name in r.seconds]
            shares = [r.bandwidth() * r.median(OURS) / r.median(name) for r in there]
            axes.plot([r.case.x for r in there], shares, marker="o", label=name)
        axes.set(title=group, xlabel="classes", xscale="log", ylim=(0, 1.1))
        axes.axhline(1, color="gray", linewidth=0.5)
    if groups:
        figure.axes[0].set_ylabel("share of a copy's bandwidth")
        figure.axes[0].legend()
    figure.suptitle(device)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--filter", default="", help="only cases with this in their names")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the benchmark runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder for JSON and picture")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no GPU")
    start(1)
    for name, found in ((LIGER, liger()), (QUACK, quack())):
        if found is None:
            print(f"{name} is not installed: left out")
    results = []
    for case in cases(chosen.tiny):
        if chosen.filter not in case.name:
            continue
        if not fits(case, device):
            print(f"{case.name}: not enough free memory, left out")
            continue
        print(case.name, flush=True)
        results.append(measure(case, device, 0.0 if chosen.tiny else chosen.seconds, 1))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    described = machine(device, 1)
    print(*(f"{key}: {value}" for key, value in described.items()), "", report(results), sep="\n")
    name = str(described.get("device", "cpu"))
    file = "_".join(name.lower().split())
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / f"cuda_{file}.json", results, described)
    draw(results, name).savefig(chosen.output / f"cuda_{file}.png", dpi=110)


if __name__ == "__main__":
    main()
