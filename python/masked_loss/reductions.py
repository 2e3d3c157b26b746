"""Sums, means and variances of unmasked elements."""

from typing import List, Optional, Union

import torch
from torch import Tensor

from ._arguments import id_list
from ._dispatch import bound, scriptable, use_bound
from ._docstrings import share_text

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
    """The sum of the elements that ``mask`` keeps; 0 if every element is masked.

    Args:
        input: float32, float64, bfloat16 or float16; or bool and integers, which are added as int64.
        {mask}
        {dim}
        {keepdim}
        dtype: dtype of the result; by default ``input``'s. Floating-point elements are added in float32 (float64 for
            float64), and the sum is converted once, so no copy of ``input`` is made. With ``torch.float64`` or an
            integer dtype, ``input`` is converted first, as in torch.

    {shape}

    Returns:
        The sums, in ``dtype``.

    Raises:
        {raises}

    With NaN at a masked element:

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
    """The mean of the elements that ``mask`` keeps; 0 if every element is masked, where torch returns NaN.

    Args:
        input: float32, float64, bfloat16 or float16; or bool and integers, which torch's mean does not take.
        {mask}
        {dim}
        {keepdim}
        dtype: floating dtype of the result; by default ``input``'s, or torch's default dtype for bool and integers. No
            copy of float16 or bfloat16 input is made for ``torch.float32``.

    {shape}

    Returns:
        The means, in ``dtype``.

    Raises:
        {raises}

    With NaN at a masked element:

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

    It is 0 with a zero gradient if every element is masked. Otherwise it is NaN or inf if at most ``correction``
    elements are unmasked, as in torch.

    Args:
        input: float32, float64, bfloat16 or float16.
        {mask}
        {dim}
        {keepdim}
        correction: degrees-of-freedom correction. The divisor is the number of unmasked elements minus it.
        {dtype}

    {shape}

    Returns:
        The variances, in ``dtype``.

    Raises:
        {raises}

    Source: `Chan, Golub and LeVeque 1982 <https://doi.org/10.1007/978-3-642-51461-6_3>`__ (how partial means and sums
    of squares are merged).

    With NaN at a masked element:

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
    """The square root of :func:`masked_var`. Where it is 0, its gradient is 0, as in torch.

    Args:
        input: float32, float64, bfloat16 or float16.
        {mask}
        {dim}
        {keepdim}
        correction: degrees-of-freedom correction. The divisor is the number of unmasked elements minus it.
        {dtype}

    {shape}

    Returns:
        The standard deviations, in ``dtype``.

    Raises:
        {raises}

    With NaN at a masked element:

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
    r"""Normalizes the unmasked elements to mean 0 and variance 1: :math:`(x - \bar x) / \sqrt{\mathrm{var} + 10^{-8}}`.

    The variance has a correction of 1: with a single unmasked element the result is NaN.

    Args:
        input: float32, float64, bfloat16 or float16.
        {mask}
        dim: the dimension, or the list of dimensions, over which mean and variance are taken; by default all.
        {dtype}

    Shape:
        - ``input``: any shape.
        - ``mask``: the rank of ``input``, each size equal or 1.
        - Output: ``input``'s shape.

    Returns:
        The normalized elements, exactly 0 where masked; in ``dtype``.

    Raises:
        {raises}

    With NaN at a masked element:

    >>> masked_whiten(torch.tensor([1.0, 2.0, 3.0, float("nan")]), torch.tensor([1, 1, 1, 0]))
    tensor([-1.,  0.,  1.,  0.])
    """
    dims = _dims("masked_whiten", dim)
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.masked_whiten(input, mask, dims, dtype)
    return torch.ops.masked_loss.masked_whiten(input, mask, dims, dtype)


share_text(
    [masked_sum, masked_mean, masked_var, masked_std, masked_whiten],
    mask="""
        mask: bool, or integers 0 and 1. True (1) = keep. Masked elements are not read: NaN or inf there changes
            nothing, and their gradient is exactly 0.
    """,
    dim="""
        dim: the dimension, or the list of dimensions, to reduce; by default all.
    """,
    keepdim="""
        keepdim: whether reduced dimensions are kept with size 1.
    """,
    dtype="""
        dtype: floating dtype of the result; by default ``input``'s. No copy of float16 or bfloat16 input is made for
            ``torch.float32``.
    """,
    shape="""
        Shape:
            - ``input``: any shape.
            - ``mask``: the rank of ``input``, each size equal or 1. For ``[B, T, D]``, a mask of positions ``[B, T]``
              becomes ``mask[..., None]``.
            - Output: ``input``'s shape without ``dim``.
    """,
    raises="""
        IndexError: ``input`` does not have the dimension ``dim``.
        TypeError: an argument has a wrong type or dtype, such as a float mask or a ``DTensor``.
        ValueError: an integer mask has values other than 0 and 1.
        RuntimeError: an argument has a wrong shape or is on a wrong device.
    """,
)
