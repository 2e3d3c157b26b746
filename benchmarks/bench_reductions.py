"""Sums, means and variances of what is kept against what a user writes: the input times the mask, summed, divided."""

from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, List, Optional, Tuple

import torch
from common import COMPILE, COPY, EAGER, HUGE_EAGER, OURS, READ, Call, Case, compiled
from torch import Tensor

import masked_loss


def times_sum(x: Tensor, mask: Tensor, dim: Optional[int]) -> Tensor:
    return (x * mask).sum(dim)


def times_mean(x: Tensor, mask: Tensor, dim: Optional[int]) -> Tensor:
    return (x * mask).sum(dim) / mask.sum(dim)


def times_var(x: Tensor, mask: Tensor, dim: Optional[int]) -> Tensor:
    count = mask.sum(dim, keepdim=True)
    mean = (x * mask).sum(dim, keepdim=True) / count
    return (((x - mean) * mask) ** 2).sum(dim, keepdim=True) / (count - 1)


def times_whiten(x: Tensor, mask: Tensor, dim: Optional[int]) -> Tensor:
    mean = (x * mask).sum() / mask.sum()
    var = (((x - mean) * mask) ** 2).sum() / (mask.sum() - 1)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


THEIRS = {
    "masked_sum": times_sum,
    "masked_mean": times_mean,
    "masked_var": times_var,
    "masked_whiten": times_whiten,
}


@dataclass
class Reduction:
    """A dense mask that keeps half."""

    function: str
    shape: Tuple[int, ...]
    dim: Optional[int] = None
    dtype: torch.dtype = torch.float32
    backward: bool = False
    peers: Tuple[str, ...] = (EAGER,)

    def __str__(self) -> str:
        size, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        dim = "" if self.dim is None else f", dim={self.dim}"
        return f"{self.function} {size}{dim}, {dtype}, forward{'+backward' * self.backward}"

    def __call__(self, device: torch.device) -> Dict[str, Call]:
        torch._dynamo.reset()  # it compiles one function no more than a few times
        x = torch.randn(self.shape, device=device).to(self.dtype).requires_grad_(self.backward)
        mask = torch.rand(self.shape, device=device) < 0.5
        ours = getattr(masked_loss, self.function)
        theirs = partial(THEIRS[self.function], mask=mask, dim=self.dim)
        functions = {OURS: lambda x: ours(x, mask, self.dim), EAGER: theirs, COMPILE: compiled(theirs)}
        return {
            name: partial(self.step, function, x) for name, function in functions.items() if name in (OURS, *self.peers)
        }

    def step(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        result = function(x)
        if self.backward:
            result.sum().backward()
            x.grad = None


def case(
    group: str, goals: Dict[str, float], *arguments: object, most_memory: Optional[float] = None, **kind: object
) -> Case:
    """Against the peers that `goals` names; the rest is what Reduction takes."""
    problem = Reduction(*arguments, peers=tuple(goals.keys() - {HUGE_EAGER}), **kind)
    itemsize, written = problem.dtype.itemsize, problem.backward or problem.function == "masked_whiten"
    passes = 1 + (2 if problem.function == "masked_whiten" else 1 if problem.backward else 0)
    return Case(
        str(problem),
        problem,
        group=group,
        goals=goals,
        input_bytes=torch.Size(problem.shape).numel() * itemsize,
        moved=0 if group == "small" else passes + (1 + written) / itemsize,
        floor=COPY if written else READ,
        huge_pages=HUGE_EAGER in goals,
        most_memory=most_memory,
    )


def cases(tiny: bool) -> List[Case]:
    def against(eager: float, compiler: float, huge_pages: float) -> Dict[str, float]:
        return {EAGER: eager} if tiny else {EAGER: eager, COMPILE: compiler, HUGE_EAGER: huge_pages}

    large, rows = ((1 << (10 if tiny else 24)),), (16, 64) if tiny else (8192, 2048)
    found = [
        case("goals", against(18, 2, 5), "masked_mean", large),
        case("goals", against(10, 2, 3), "masked_sum", large),
    ]
    eager = {EAGER: 1.0}
    for function in THEIRS:
        found.append(case("others", eager, function, large, backward=function != "masked_whiten"))
        found += [case("small", eager, function, (32, 100), backward=backward) for backward in (False, True)]
    for dim in (0, 1):
        found.append(case("others", eager, "masked_mean", rows, dim))
        found.append(case("others", eager, "masked_mean", rows, dim, torch.bfloat16))
        found.append(case("others", eager, "masked_var", rows, dim))
    for length in (4, 32):
        short = (((1 << 10) if tiny else (1 << 24)) // length, length)
        # Beside a result a count, of eight bytes.
        found.append(case("others", eager, "masked_mean", short, 1, most_memory=None if tiny else 3.5 / length))
        found.append(case("others", eager, "masked_mean", short, 1, torch.bfloat16))
        found.append(case("others", eager, "masked_var", short, 1))
    return found
