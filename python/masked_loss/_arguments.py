"""What the functions' arguments become before an op takes them."""

import operator
from typing import List, Optional, Union

import torch
from torch import Tensor

__all__ = ["divergence_number", "id_list", "normalizer_tensor", "reduction_number"]


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


def divergence_number(op: str, kind: str) -> int:
    if kind == "forward":
        return 0
    if kind == "reverse":
        return 1
    if kind == "jsd":
        return 2
    raise ValueError(f"{op}: expected kind to be 'forward', 'reverse' or 'jsd', got '{kind}'")


def shown(value: object) -> str:
    """A number or a string as it is; of anything else, which can be large, the type."""
    return repr(value) if value is None or isinstance(value, (str, int, float, complex)) else type(value).__name__


@torch.jit.unused
def _checked_ids(op: str, argument: str, ids: Union[int, List[int]]) -> List[int]:
    try:
        # numpy's integers and tuples too, as torch takes them
        return [operator.index(ids)] if hasattr(ids, "__index__") else [operator.index(i) for i in ids]
    except TypeError:
        raise TypeError(f"{op}: expected {argument} to be an int or a list of ints, got {shown(ids)}") from None


def id_list(op: str, argument: str, ids: Union[int, List[int]]) -> List[int]:
    if isinstance(ids, int):
        return [ids]
    if not torch.jit.is_scripting():
        return _checked_ids(op, argument, ids)
    return ids


@torch.jit.unused
def _is_number(op: str, normalizer: object, input: object) -> bool:
    """Whether a normalizer can be a tensor beside the input; an error if it is none for any."""
    if isinstance(normalizer, (str, bytes, complex)) or not hasattr(normalizer, "__float__"):
        raise TypeError(f"{op}: expected normalizer to be a number or a 0-d Tensor, got {shown(normalizer)}")
    return isinstance(input, Tensor)


def normalizer_tensor(op: str, normalizer: Optional[Union[int, float, Tensor]], input: Tensor) -> Optional[Tensor]:
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        return normalizer
    if not torch.jit.is_scripting():
        if not torch.compiler.is_compiling() and not _is_number(op, normalizer, input):
            return None  # what is wrong with the input is said where it is looked at
    # A fill on the device, where torch.tensor would be a copy from the host.
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return torch.full([], normalizer, dtype=dtype, device=input.device)
