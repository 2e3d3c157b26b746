"""Cross entropy against torch's: forward, and forward with backward, unmasked and with half of the rows masked."""

from typing import Callable, List

import torch
import torch.nn.functional as F
from common import Row, arguments, compare, report
from torch import Tensor

import masked_loss

SHAPES = [(2048, 32000), (16384, 1000), (64, 10), (8, 10)]
TINY = [(8, 100), (8, 10)]


def backward(loss: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    logits.grad = None
    loss(logits).backward()


def rows_of(rows: int, classes: int, dtype: torch.dtype, seconds: float) -> List[Row]:
    logits = torch.randn(rows, classes).to(dtype)
    leaf = logits.clone().requires_grad_()
    target = torch.randint(classes, (rows,))
    mask = torch.arange(rows) % 2 == 0
    ignored = torch.where(mask, target, -100)
    name = f"{rows}x{classes} {str(dtype).removeprefix('torch.')}"

    def ours(x: Tensor) -> Tensor:
        return masked_loss.cross_entropy(x, target)

    def theirs(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target)

    def ours_masked(x: Tensor) -> Tensor:
        return masked_loss.cross_entropy(x, target, mask)

    def theirs_masked(x: Tensor) -> Tensor:
        return F.cross_entropy(x, ignored)

    def timed(case: str, a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor]) -> List[Row]:
        return [
            compare(f"{name} {case}forward", "eager", lambda: a(logits), lambda: b(logits), seconds),
            compare(
                f"{name} {case}forward+backward", "eager", lambda: backward(a, leaf), lambda: backward(b, leaf), seconds
            ),
        ]

    return timed("", ours, theirs) + timed("half masked, ", ours_masked, theirs_masked)


def main() -> None:
    chosen = arguments(__doc__)
    rows = []
    for n, c in TINY if chosen.tiny else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            rows += rows_of(n, c, dtype, 0.01 if chosen.tiny else chosen.seconds)
    report(rows, chosen)


if __name__ == "__main__":
    main()
