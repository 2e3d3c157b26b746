"""Sums, means and variances of what a mask keeps."""

from typing import List, Optional, Union

import torch
from torch import Tensor

from ._arguments import id_list
from ._dispatch import bound, scriptable, use_bound

__all__ = ["masked_mean", "masked_std", "masked_sum", "masked_var", "masked_whiten"]


def __dir__() -> List[str]:
    return __all__


def _dims(op: str, dim: Optional[Union[int, List[int]]]) -> List[int]:
    if dim is None:
        return []
    return id_list(op, "dim", dim)


@scriptable
def masked_sum(
    input: Tensor,
    mask: Optional[Tensor] = None,
    dim: Optional[Union[int, List[int]]] = None,
    keepdim: bool = False,
    *,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """The sum of the elements that ``mask`` keeps; 0 where it keeps none.

    Args:
        input: any shape; float32, float64, bfloat16, float16, or integers, which are added as int64.
        mask: True (1) = keep. bool, or an integer dtype that holds 0 and 1; ``input``'s rank, each size equal or 1;
            read by its strides. For ``[B, T, D]`` a mask ``[B, T]`` of positions is ``mask[..., None]``. What lies at a
            masked element (NaN, inf) changes nothing, and its gradient is exactly 0.
        dim: one dimension, or several; by default all of them.
        keepdim: whether what is reduced stays as a dimension of size 1.
        dtype: the dtype of the result, by default ``input``'s. What is added in float32 (float64 for float64) is
            converted to it once, without a copy of ``input``; with float64, ``input`` becomes float64 before, and with
            an integer dtype an integer, as in torch.

    Returns:
        ``input``'s shape without ``dim``.

    Raises:
        IndexError: a dimension that ``input`` does not have.
        TypeError: a wrong dtype, such as a float mask.
        RuntimeError: a wrong shape or device.

    >>> masked_sum(torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), torch.tensor([[1, 1], [1, 0]]), dim=1)
    tensor([3., 3.])
    """
    dims = _dims("masked_sum", dim)
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.masked_sum(input, mask, dims, keepdim, dtype)
    return torch.ops.masked_loss.masked_sum(input, mask, dims, keepdim, dtype)


@scriptable
def masked_mean(
    input: Tensor,
    mask: Optional[Tensor] = None,
    dim: Optional[Union[int, List[int]]] = None,
    keepdim: bool = False,
    *,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """The mean of the elements that ``mask`` keeps; 0 where it keeps none, where torch's is NaN.

    Args:
        input: any shape; float32, float64, bfloat16, float16, or bool and integers (whose mean torch refuses).
        mask, dim, keepdim: as in :func:`masked_sum`.
        dtype: as in :func:`masked_sum`, but floating; of bool and integers by default torch's default dtype.

    Returns:
        ``input``'s shape without ``dim``.

    Raises:
        IndexError, TypeError, RuntimeError: as :func:`masked_sum`.

    >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    >>> masked_mean(torch.tensor([1, 2, 0]) == torch.tensor([1, 1, 0]), torch.tensor([1, 1, 0]))  # an accuracy
    tensor(0.5000)
    """
    dims = _dims("masked_mean", dim)
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.masked_mean(input, mask, dims, keepdim, dtype)
    return torch.ops.masked_loss.masked_mean(input, mask, dims, keepdim, dtype)


@scriptable
def masked_var(
    input: Tensor,
    mask: Optional[Tensor] = None,
    dim: Optional[Union[int, List[int]]] = None,
    keepdim: bool = False,
    *,
    correction: float = 1.0,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""The variance of the elements that ``mask`` keeps: :math:`\sum (x - \bar x)^2 / (n - \text{correction})`.

    It is 0, with a zero gradient, where nothing is kept, and NaN of as many elements as the correction, as torch's.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        mask, dim, keepdim: as in :func:`masked_sum`.
        correction: what the number of kept elements is lessened by.
        dtype: as in :func:`masked_sum`, but floating.

    Returns:
        ``input``'s shape without ``dim``.

    Raises:
        IndexError, TypeError, RuntimeError: as :func:`masked_sum`.

    Source: Chan, Golub and LeVeque 1979 (means and squares of parts are merged).

    >>> masked_var(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    dims = _dims("masked_var", dim)
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.masked_var(input, mask, dims, keepdim, correction, dtype)
    return torch.ops.masked_loss.masked_var(input, mask, dims, keepdim, correction, dtype)


@scriptable
def masked_std(
    input: Tensor,
    mask: Optional[Tensor] = None,
    dim: Optional[Union[int, List[int]]] = None,
    keepdim: bool = False,
    *,
    correction: float = 1.0,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """The square root of :func:`masked_var`. Where it is 0, so is its gradient, as in torch.

    Args:
        input, mask, dim, keepdim, correction, dtype: as in :func:`masked_var`.

    Returns:
        ``input``'s shape without ``dim``.

    Raises:
        IndexError, TypeError, RuntimeError: as :func:`masked_sum`.

    >>> masked_std(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]), correction=0)
    tensor(1.)
    """
    dims = _dims("masked_std", dim)
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.masked_std(input, mask, dims, keepdim, correction, dtype)
    return torch.ops.masked_loss.masked_std(input, mask, dims, keepdim, correction, dtype)


@scriptable
def masked_whiten(
    input: Tensor,
    mask: Optional[Tensor] = None,
    dim: Optional[Union[int, List[int]]] = None,
    *,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""What ``mask`` keeps, with mean 0 and variance 1: :math:`(x - \bar x) / \sqrt{\mathrm{var} + 10^{-8}}`.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        mask: as in :func:`masked_sum`.
        dim: the dimensions that mean and variance (with a correction of 1) are taken over; by default all of them.
        dtype: as in :func:`masked_sum`, but floating.

    Returns:
        ``input``'s shape; exactly 0 where masked.

    Raises:
        IndexError, TypeError, RuntimeError: as :func:`masked_sum`.

    >>> masked_whiten(torch.tensor([1.0, 2.0, 3.0, float("nan")]), torch.tensor([1, 1, 1, 0]))
    tensor([-1.,  0.,  1.,  0.])
    """
    dims = _dims("masked_whiten", dim)
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.masked_whiten(input, mask, dims, dtype)
    return torch.ops.masked_loss.masked_whiten(input, mask, dims, dtype)
