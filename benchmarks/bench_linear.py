"""linear_cross_entropy against a linear layer and cross entropy, and against the products that it needs alone."""

from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, List, Tuple

import torch
import torch.nn.functional as F
from common import COMPILE, EAGER, OURS, Call, Case, compiled
from torch import Tensor

import masked_loss

CHUNKED = "F.linear_cross_entropy"  # torch's own, where it has one
PRODUCTS = "its products alone"


def eager(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target)


def chunked(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, w, target)


@dataclass
class Linear:
    """A training step of a head, of which a share of the rows is kept. Peers are told by ignore_index."""

    rows: int
    hidden: int
    classes: int
    kept: float
    dtype: torch.dtype = torch.float32
    peers: Tuple[str, ...] = (EAGER,)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"linear_cross_entropy {self.rows}x{self.hidden}x{self.classes}, {dtype}, {self.kept:.0%} kept"

    def __call__(self, device: torch.device) -> Dict[str, Call]:
        torch._dynamo.reset()  # it compiles one function no more than a few times
        x = torch.randn(self.rows, self.hidden, device=device).to(self.dtype).requires_grad_()
        w = (torch.randn(self.classes, self.hidden, device=device) * 0.02).to(self.dtype).requires_grad_()
        target = torch.randint(self.classes, (self.rows,), device=device)
        kept = max(1, int(self.rows * self.kept))
        target[torch.randperm(self.rows, device=device)[kept:]] = -100
        functions = {OURS: masked_loss.linear_cross_entropy, EAGER: eager, COMPILE: compiled(eager)}
        if hasattr(F, "linear_cross_entropy"):
            functions[CHUNKED] = chunked
        calls: Dict[str, Call] = {
            name: partial(self.step, function, x, w, target)
            for name, function in functions.items()
            if name in (OURS, *self.peers)
        }
        calls[PRODUCTS] = self.products(x.detach()[:kept], w.detach())
        return calls

    def products(self, x: Tensor, w: Tensor) -> Call:
        """Of float logits, as ours makes them, and of gradients in the dtype of the operands."""
        logits = torch.empty(len(x), len(w), device=x.device)
        wide_x, wide_w = (x.float(), w.float()) if x.device.type == "cpu" else (x, w)
        gradient = torch.randn(len(x), len(w), device=x.device).to(x.dtype)
        of_x, of_w = torch.empty_like(x), torch.empty_like(w)

        def run() -> None:
            if wide_x.dtype == torch.float32:
                torch.mm(wide_x, wide_w.t(), out=logits)
            else:
                torch.mm(wide_x, wide_w.t(), out_dtype=torch.float32, out=logits)
            torch.mm(gradient, w, out=of_x)
            torch.mm(gradient.t(), x, out=of_w)

        return run

    @staticmethod
    def step(function: Callable[..., Tensor], x: Tensor, w: Tensor, target: Tensor) -> None:
        function(x, w, target=target).backward()
        x.grad = w.grad = None


def case(problem: Linear, goals: Dict[str, float]) -> Case:
    bytes_of = problem.dtype.itemsize
    logits = problem.rows * problem.classes
    gradients = (problem.rows + problem.classes) * problem.hidden
    # A chunk of logits, which all of the kept ones are here, and the gradients of the operands.
    held = problem.kept * logits * (4 if bytes_of == 4 else 6) * 1.1 + gradients * bytes_of
    return Case(
        str(problem),
        problem,
        goals={**goals, PRODUCTS: 1 / 1.05},
        input_bytes=logits * bytes_of,
        most_memory=held / (logits * bytes_of),
    )


def cases(tiny: bool) -> List[Case]:
    sizes = (8, 16, 200) if tiny else (1024, 1024, 32000)
    peers = (EAGER,) if tiny else (EAGER, COMPILE, CHUNKED)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for kept, goal in ((1.0, 1.0), (0.5, 1.8), (0.2, 4.0)):
            found.append(case(Linear(*sizes, kept, dtype, peers), {EAGER: goal}))
    return found
