"""What the functions' arguments become before an op takes them."""

import operator
from typing import List, Optional, Union

import torch
from torch import Tensor

__all__ = ["id_list", "normalizer_tensor", "reduction_number"]


def reduction_number(op: str, reduction: str, batchmean: bool = False) -> int:
    if reduction == "none":
        return 0
    if reduction == "mean":
        return 1
    if reduction == "sum":
        return 2
    if reduction == "sequence_mean":
        return 3
    if reduction == "batchmean" and batchmean:
        return 4
    names = "'none', 'mean', 'sum', 'batchmean'" if batchmean else "'none', 'mean', 'sum'"
    raise ValueError(f"{op}: expected reduction to be {names} or 'sequence_mean', got '{reduction}'")


@torch.jit.unused
def _checked_ids(op: str, argument: str, ids: Union[int, List[int]]) -> List[int]:
    try:
        # numpy's integers and tuples too, as torch takes them
        return [operator.index(ids)] if hasattr(ids, "__index__") else [operator.index(i) for i in ids]
    except TypeError:
        raise TypeError(f"{op}: expected {argument} to be an int or a list of ints, got {ids!r}") from None


def id_list(op: str, argument: str, ids: Union[int, List[int]]) -> List[int]:
    if isinstance(ids, int):
        return [ids]
    if not torch.jit.is_scripting():
        return _checked_ids(op, argument, ids)
    return ids


def normalizer_tensor(normalizer: Optional[Union[int, float, Tensor]], input: Tensor) -> Optional[Tensor]:
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        return normalizer
    # A fill on the device, where torch.tensor would be a copy from the host.
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return torch.full([], normalizer, dtype=dtype, device=input.device)
