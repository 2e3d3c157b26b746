"""masked_fill and masked_fill_ against torch's, with a mask of rows and with a full one."""

from dataclasses import dataclass
from functools import partial
from typing import Dict, List, Tuple

import torch
from common import EAGER, FRESH_COPY, OURS, Call, Case, fresh_copy

import masked_loss


@dataclass
class MaskedFill:
    """Half of the rows, or of the elements, are filled."""

    shape: Tuple[int, int]
    full: bool
    in_place: bool
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        dtype, mask = str(self.dtype).removeprefix("torch."), "full" if self.full else "row"
        return f"masked_fill{'_' * self.in_place} {size}, {dtype}, {mask} mask"

    def __call__(self, device: torch.device) -> Dict[str, Call]:
        x = torch.randn(self.shape, device=device).to(self.dtype)
        mask = torch.rand(self.shape if self.full else (self.shape[0], 1), device=device) < 0.5
        if self.in_place:
            return {OURS: partial(masked_loss.masked_fill_, x, mask, -1.0), EAGER: partial(x.masked_fill_, mask, -1.0)}
        return {
            OURS: partial(masked_loss.masked_fill, x, mask, -1.0),
            EAGER: partial(x.masked_fill, mask, -1.0),
            FRESH_COPY: partial(fresh_copy, x),
        }


def cases(tiny: bool) -> List[Case]:
    # The mask, the input where it is kept (for the most part all of its cache lines), and what is written.
    found = []
    for full, in_place, goal in [(False, False, 5), (True, False, 8), (False, True, 4), (True, True, 10)]:
        problem = MaskedFill((8, 320) if tiny else (2048, 32000), full, in_place)
        mask = 0.25 if full else 0
        moved = mask + (0.5 if not full else 2) if in_place else mask + (1.5 if not full else 2)
        size = torch.Size(problem.shape).numel() * problem.dtype.itemsize
        found.append(Case(str(problem), problem, goals={EAGER: goal}, input_bytes=size, moved=moved))
    return found
