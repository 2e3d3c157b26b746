"""Cross entropy against torch's: the goals, what options cost, shares of masked rows, numbers of classes."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from common import (
    COMPILE,
    COPY,
    EAGER,
    FRESH_COPY,
    HUGE_EAGER,
    OURS,
    READ,
    Call,
    Case,
    Result,
    compiled,
    fresh_copy,
)
from matplotlib.figure import Figure
from report import Line, draw_lines
from torch import Tensor

import masked_loss

INDEXED = "eager, boolean indexing"
FILLED = "eager, masked_fill of the classes"
PLAIN = "ours without it"

Loss = Callable[[Tensor], Tensor]


OPTIONS: Dict[str, Callable[[Tensor], Dict[str, Any]]] = {
    "class_mask [C]": lambda x: {"class_mask": torch.rand(x.size(1), device=x.device) < 0.9},
    "class_mask [N, C]": lambda x: {"class_mask": torch.rand(x.shape, device=x.device) < 0.9},
    "weight": lambda x: {"weight": torch.rand(x.size(1), device=x.device)},
    "label_smoothing": lambda x: {"label_smoothing": 0.1},
    "z_loss": lambda x: {"z_loss": 1e-4},
    "normalizer": lambda x: {"normalizer": torch.tensor(1000.0, device=x.device)},
    "reduction='none'": lambda x: {"reduction": "none"},
}


@dataclass
class CrossEntropy:
    """Logits with the classes in dim 1, and a share of the rows masked."""

    shape: Tuple[int, ...]
    dtype: torch.dtype = torch.float32
    backward: bool = True
    masked: Optional[float] = None
    option: str = ""
    probabilities: bool = False
    peers: Tuple[str, ...] = (EAGER,)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) + ", dim=1" * (len(self.shape) > 2)
        parts = [shape, str(self.dtype).removeprefix("torch."), "forward" + "+backward" * self.backward]
        if self.masked is not None:
            parts.append(f"{self.masked:.0%} masked")
        return ", ".join(parts + [self.option] * bool(self.option) + ["class probabilities"] * self.probabilities)

    @property
    def input_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __call__(self, device: torch.device) -> Dict[str, Call]:
        classes, rows = self.shape[1], (self.shape[0], *self.shape[2:])
        logits = torch.randn(self.shape, device=device).to(self.dtype).requires_grad_(self.backward)
        if self.probabilities:
            target = torch.randn(self.shape, device=device).softmax(1).to(self.dtype)
        else:
            target = torch.randint(classes, rows, device=device)
        mask = torch.rand(rows, device=device) >= self.masked if self.masked is not None else None
        ignored = target if mask is None else torch.where(mask, target, -100)
        option = OPTIONS[self.option](logits) if self.option else {}

        def eager(x: Tensor) -> Tensor:
            return F.cross_entropy(x, ignored)

        def indexed(x: Tensor) -> Tensor:
            return F.cross_entropy(x.movedim(1, -1).reshape(-1, classes)[mask.flatten()], target[mask])

        def filled(x: Tensor) -> Tensor:
            return F.cross_entropy(x.masked_fill(~option["class_mask"], -torch.inf), ignored)

        losses = {
            OURS: lambda x: masked_loss.cross_entropy(x, target, mask, **option),
            PLAIN: lambda x: masked_loss.cross_entropy(x, target, mask),
            EAGER: eager,
            COMPILE: compiled(eager),
            INDEXED: indexed,
            FILLED: filled,
        }
        calls = {name: partial(self.step, loss, logits) for name, loss in losses.items() if name in (OURS, *self.peers)}
        if FRESH_COPY in self.peers:
            calls[FRESH_COPY] = lambda: fresh_copy(logits.detach())
        return calls

    def step(self, loss: Loss, logits: Tensor) -> None:
        result = loss(logits)
        if self.backward:
            (result if result.dim() == 0 else result.sum()).backward()
            logits.grad = None


def case(group: str, shape: Tuple[int, ...], goals: Dict[str, float], *others: str, x: float = 0, **kind: Any) -> Case:
    """Against the peers that `goals` names, and `others` without a goal; `kind` is what CrossEntropy takes."""
    peers = {*goals, *others}
    problem = CrossEntropy(shape, peers=tuple(peers - {HUGE_EAGER}), **kind)
    share = 1 - (problem.masked or 0)
    moved = 0 if group == "small" else share * (1 + problem.probabilities) + problem.backward
    return Case(
        f"cross_entropy {problem}",
        problem,
        group=group,
        x=x,
        goals=goals,
        input_bytes=problem.input_bytes,
        moved=moved,
        floor=COPY if problem.backward else READ,
        most_memory=1.05 if group == "goals" and problem.backward and len(shape) == 2 else None,
        huge_pages=HUGE_EAGER in peers,
    )


def cases(tiny: bool) -> List[Case]:
    large, long, many = [(8, 320), (4, 700), (64, 100)] if tiny else [(2048, 32000), (512, 128256), (16384, 1000)]
    inner, image = [(2, 100, 5), (2, 21, 4, 4)] if tiny else [(32, 1000, 512), (64, 21, 64, 64)]
    compiles = [] if tiny else [COMPILE]
    half = {"dtype": torch.bfloat16}
    goals = [
        case("goals", large, {EAGER: 9}, *compiles, HUGE_EAGER, backward=False),
        case("goals", large, {EAGER: 11, **dict.fromkeys(compiles, 6), HUGE_EAGER: 2.5, FRESH_COPY: 0.75}),
        case("goals", large, {EAGER: 18}, INDEXED, masked=0.5),
        case("goals", large, {EAGER: 8}, *compiles, **half),
        case("goals", long, {EAGER: 11}),
        case("goals", long, {EAGER: 8}, **half),
        case("goals", many, {EAGER: 10}),
        case("goals", inner, {EAGER: 8}),
        case("goals", image, {EAGER: 4}),
        case("goals", large, {EAGER: 8, **dict.fromkeys(compiles, 5), HUGE_EAGER: 2.5}, probabilities=True),
    ]
    small = [
        case("small", shape, {EAGER: goal}, backward=backward, probabilities=probabilities)
        for probabilities, goal in ((False, 1.2), (True, 1.0))
        for shape in [(8, 10), (32, 100)]
        for backward in (False, True)
    ]
    # At most a quarter more; a dense class mask is a byte for each element beside the eight that are moved anyway.
    most = {option: 0.8 for option in OPTIONS} | {"class_mask [N, C]": 1 / (1.25 + 1 / 8), "reduction='none'": 2 / 3}
    middle = (8, 200) if tiny else (1024, 32000)
    options = [
        case("options", middle, {PLAIN: most[o]}, *([FILLED] if "class_mask" in o else []), option=o) for o in OPTIONS
    ]
    shares = [0.0, 0.5] if tiny else [0.0, 0.2, 0.5, 0.8, 0.95]
    masked = [case("masked", middle, {}, EAGER, INDEXED, masked=share, x=share) for share in shares]
    elements, sizes = (1 << 10, [8, 128]) if tiny else (1 << 24, [2**power for power in range(3, 18, 2)])
    classes = [
        case("classes", (elements // c, c), {}, EAGER, x=c, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for c in sizes
    ]
    return goals + small + options + masked + classes


def draw(results: List[Result]) -> Figure:
    """Times over the number of classes, and over the share of masked rows."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    faster, time, share = figure.subplots(1, 3)
    classes, masked = ([r for r in results if r.case.group == group] for group in ("classes", "masked"))
    single, half = ([r for r in classes if dtype in r.case.name] for dtype in ("float32", "bfloat16"))

    def milliseconds(name: str) -> Callable[[Result], float]:
        return lambda result: 1e3 * result.median(name)

    lines = [Line("float32", single, lambda r: r.ratio(EAGER)), Line("bfloat16", half, lambda r: r.ratio(EAGER))]
    draw_lines(faster, "Forward and backward", "classes", "speedup over eager", lines, doubling=True)
    lines = [
        Line("masked_loss", single, milliseconds(OURS)),
        Line("a copy of the logits", single, milliseconds(COPY)),
    ]
    draw_lines(time, f"{single[0].case.input_bytes >> 20} MB of float32 logits", "classes", "ms", lines, doubling=True)
    lines = [
        Line("masked_loss", masked, milliseconds(OURS)),
        Line("eager with ignore_index", masked, milliseconds(EAGER)),
        Line(INDEXED, masked, milliseconds(INDEXED)),
    ]
    draw_lines(share, f"{masked[0].case.input_bytes >> 20} MB, masked rows", "share of masked rows", "ms", lines)
    return figure
