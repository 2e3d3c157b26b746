"""softmax and its relatives against what a user writes without a mask: filled with -inf, and zeroed where all is."""

from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from common import COMPILE, EAGER, HUGE_EAGER, OURS, Call, Case, compiled
from torch import Tensor

import masked_loss

INFINITY = float("inf")


def filled_softmax(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    return F.softmax(x.masked_fill(~mask, -INFINITY), dim).masked_fill(~mask, 0.0)


def filled_log_softmax(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    return F.log_softmax(x.masked_fill(~mask, -INFINITY), dim).masked_fill(~mask, -INFINITY)


def filled_logsumexp(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(x.masked_fill(~mask, -INFINITY), dim)


THEIRS = {"softmax": filled_softmax, "log_softmax": filled_log_softmax, "logsumexp": filled_logsumexp}


@dataclass
class Softmax:
    """A dense mask that keeps half, one of padding `(B, 1, 1, T)`, or a causal one, which ours makes no tensor of."""

    function: str
    shape: Tuple[int, ...]
    mask: str = "dense"
    dtype: torch.dtype = torch.float32
    backward: bool = True
    dim: int = -1
    peers: Tuple[str, ...] = (EAGER,)

    def __str__(self) -> str:
        size, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        dim = "" if self.dim == -1 else f", dim={self.dim}"
        return f"{self.function} {size}{dim}, {dtype}, {self.mask} mask, forward{'+backward' * self.backward}"

    def make_mask(self, device: torch.device) -> Tensor:
        if self.mask == "causal":
            return masked_loss.causal_mask(self.shape[-2], self.shape[-1], device=device)
        if self.mask == "padding":
            lengths = torch.randint(1, self.shape[-1] + 1, (self.shape[0], 1, 1), device=device)
            return masked_loss.sequence_mask(lengths, self.shape[-1])
        return torch.rand(self.shape, device=device) < 0.5

    def __call__(self, device: torch.device) -> Dict[str, Call]:
        torch._dynamo.reset()  # it compiles one function no more than a few times
        x = torch.randn(self.shape, device=device).to(self.dtype).requires_grad_(self.backward)
        mask = self.make_mask(device)
        ours, theirs = getattr(masked_loss, self.function), THEIRS[self.function]
        if self.mask == "causal":
            functions = {OURS: lambda x: ours(x, dim=self.dim, causal=True)}
        else:
            functions = {OURS: lambda x: ours(x, mask, self.dim)}
        functions[EAGER] = partial(theirs, mask=mask, dim=self.dim)
        functions[COMPILE] = compiled(functions[EAGER])
        upstream = torch.randn_like(theirs(x, mask, self.dim).detach()) if self.backward else None
        return {
            name: partial(self.step, function, x, upstream)
            for name, function in functions.items()
            if name in (OURS, *self.peers)
        }

    @staticmethod
    def step(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Optional[Tensor]) -> None:
        result = function(x)
        if upstream is not None:
            result.backward(upstream)
            x.grad = None


def case(group: str, goals: Dict[str, float], *arguments: object, others: Tuple[str, ...] = (), **kind: object) -> Case:
    """Against the peers that `goals` names, and `others` without a goal; the rest is what Softmax takes."""
    problem = Softmax(*arguments, peers=tuple({*goals, *others} - {HUGE_EAGER}), **kind)
    itemsize, forward = problem.dtype.itemsize, 2.0 if problem.function != "logsumexp" else 1.0
    # A causal mask leaves out half of what is read, and nothing of what is written.
    read = 0.5 if problem.mask == "causal" else 1.0
    backward = 1 + 2 * read if problem.function != "logsumexp" else 1 + read
    passes = forward - 1 + read + backward * problem.backward
    moved = passes + (1 + problem.backward) / itemsize * (problem.mask == "dense")
    return Case(
        str(problem),
        problem,
        group=group,
        goals=goals,
        input_bytes=torch.Size(problem.shape).numel() * itemsize,
        moved=0 if group == "small" else moved,
        most_memory=1.05 + problem.backward if group == "goals" else None,
        huge_pages=HUGE_EAGER in goals,
    )


def cases(tiny: bool) -> List[Case]:
    def against(eager: float, compiler: float, huge_pages: float) -> Dict[str, float]:
        return {EAGER: eager} if tiny else {EAGER: eager, COMPILE: compiler, HUGE_EAGER: huge_pages}

    rows, scores = (8, 200) if tiny else (8192, 2048), (1, 2, 8, 8) if tiny else (8, 16, 512, 512)
    inner = (2, 50, 64) if tiny else (32, 1000, 512)
    half = {"dtype": torch.bfloat16}
    found = []
    for function in ("softmax", "log_softmax"):
        found.append(case("goals", against(8, 8, 4), function, rows, backward=False))
        found.append(case("goals", against(7, 6, 3.5), function, rows))
        found.append(case("goals", against(6, 8, 4), function, rows, **half, backward=False))
        found.append(case("goals", against(6, 5, 3), function, rows, **half))
    found.append(case("goals", against(9, 7, 3.5), "softmax", scores, "causal", backward=False))
    found.append(case("goals", against(8, 6, 3.5), "softmax", scores, "causal"))
    eager = {EAGER: 1.0}
    for backward in (False, True):
        found.append(case("others", eager, "softmax", scores, "padding", backward=backward))
        found.append(case("others", eager, "softmax", inner, dim=1, backward=backward))
        found.append(case("others", eager, "logsumexp", rows, backward=backward))
        for function in THEIRS:
            found.append(case("small", eager, function, (8, 10), backward=backward))
            found.append(case("small", eager, function, (32, 100), backward=backward))
    return found
