"""Losses of elements against what a user writes without a mask: losses that are chosen, summed and divided."""

from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, List, Tuple

import torch
import torch.nn.functional as F
from common import COMPILE, COPY, EAGER, HUGE_EAGER, OURS, READ, Call, Case, compiled
from torch import Tensor

import masked_loss

TIMES = "eager, times the mask"

Loss = Callable[..., Tensor]


def focal(x: Tensor, t: Tensor, reduction: str) -> Tensor:
    """As torchvision's, without a reduction."""
    p = torch.sigmoid(x)
    wrong = 1 - (p * t + (1 - p) * (1 - t))
    loss = F.binary_cross_entropy_with_logits(x, t, reduction="none") * wrong**2
    return (0.25 * t + 0.75 * (1 - t)) * loss


def noise(x: Tensor) -> Tensor:
    return torch.randn_like(x)


def labels(x: Tensor) -> Tensor:
    return torch.bernoulli(torch.full_like(x, 0.3))


def counts(x: Tensor) -> Tensor:
    return torch.poisson(torch.full_like(x, 2.0))


def one(x: Tensor) -> Tensor:
    return torch.rand_like(x)


# name: torch's function, the input made of noise, the target made beside it
LOSSES: Dict[str, Tuple[Loss, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mse_loss": (F.mse_loss, Tensor.clone, noise),
    "huber_loss": (F.huber_loss, Tensor.clone, noise),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, Tensor.clone, labels),
    "l1_loss": (F.l1_loss, Tensor.clone, noise),
    "smooth_l1_loss": (F.smooth_l1_loss, Tensor.clone, noise),
    "binary_cross_entropy": (F.binary_cross_entropy, torch.sigmoid, labels),
    "kl_div": (F.kl_div, F.logsigmoid, one),
    "poisson_nll_loss": (F.poisson_nll_loss, Tensor.clone, counts),
    "gaussian_nll_loss": (F.gaussian_nll_loss, Tensor.clone, noise),
    "sigmoid_focal_loss": (focal, Tensor.clone, labels),
}
GOALS = ("mse_loss", "huber_loss", "binary_cross_entropy_with_logits")


@dataclass
class Pointwise:
    """The mean loss of elements, half of them masked."""

    loss: str
    elements: int
    dtype: torch.dtype = torch.float32
    backward: bool = True
    peers: Tuple[str, ...] = (EAGER,)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.loss} {self.elements}, {dtype}, forward{'+backward' * self.backward}"

    def __call__(self, device: torch.device) -> Dict[str, Call]:
        torch._dynamo.reset()  # it compiles one function no more than a few times
        theirs, make_input, make_target = LOSSES[self.loss]
        raw = torch.randn(self.elements, device=device)
        target = make_target(raw).to(self.dtype)
        x = make_input(raw).to(self.dtype).requires_grad_(self.backward)
        mask = torch.rand(self.elements, device=device) < 0.5
        operands = (x, target)
        if self.loss == "gaussian_nll_loss":
            operands = (*operands, (torch.rand_like(raw) + 0.5).to(self.dtype).requires_grad_(self.backward))
        ours = getattr(masked_loss, self.loss)

        def chosen(*operands: Tensor) -> Tensor:
            losses = theirs(*operands, reduction="none")
            return torch.where(mask, losses, 0).sum() / mask.sum()

        def multiplied(*operands: Tensor) -> Tensor:
            return (theirs(*operands, reduction="none") * mask).sum() / mask.sum()

        losses = {
            OURS: lambda *operands: ours(*operands, mask),
            EAGER: chosen,
            TIMES: multiplied,
            COMPILE: compiled(chosen),
        }
        step = partial(self.step, operands=operands)
        return {name: partial(step, loss) for name, loss in losses.items() if name in (OURS, *self.peers)}

    def step(self, loss: Loss, operands: Tuple[Tensor, ...]) -> None:
        result = loss(*operands)
        if self.backward:
            result.backward()
            for operand in operands:
                operand.grad = None


def case(group: str, loss: str, elements: int, goals: Dict[str, float], *others: str, **kind: object) -> Case:
    """Against the peers that `goals` names, and `others` without a goal; `kind` is what Pointwise takes."""
    peers = {*goals, *others}
    problem = Pointwise(loss, elements, peers=tuple(peers - {HUGE_EAGER}), **kind)
    # Operands are read and their gradients written; half masked at random, every cache line has something kept.
    with_var = loss == "gaussian_nll_loss"
    moved = 2 + with_var + 1 / problem.dtype.itemsize + problem.backward * (1 + with_var)
    return Case(
        str(problem),
        problem,
        group=group,
        goals=goals,
        input_bytes=elements * problem.dtype.itemsize,
        moved=0 if group == "small" else moved,
        floor=COPY if problem.backward else READ,
        most_memory=(1 + with_var) * problem.backward + 0.05 if group == "goals" else None,
        huge_pages=HUGE_EAGER in peers,
    )


def cases(tiny: bool) -> List[Case]:
    large, half = 1 << (10 if tiny else 24), {"dtype": torch.bfloat16}
    found = []
    for loss in GOALS:
        logits = loss == "binary_cross_entropy_with_logits"

        def against(eager: float, compiler: float) -> Dict[str, float]:
            return {EAGER: eager, **({} if tiny else {COMPILE: compiler, HUGE_EAGER: 3})}

        goals = against(12, 5) if logits else against(14, 7)
        found.append(case("goals", loss, large, goals, TIMES))
        found.append(case("goals", loss, large, against(10, 6), **half))
        found.append(case("goals", loss, large, against(14, 4), TIMES, backward=False))
        found.append(case("goals", loss, large, {}, EAGER, backward=False, **half))
    for loss in LOSSES:
        if loss not in GOALS:
            found += [case("others", loss, large, {}, EAGER, backward=backward) for backward in (True, False)]
            found.append(case("others", loss, large, {}, EAGER, **half))
    found += [case("small", loss, 1000, {EAGER: 1}, backward=b) for loss in LOSSES for b in (False, True)]
    return found
