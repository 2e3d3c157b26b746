"""Softmax and its relatives of what a mask keeps."""

from typing import List, Optional, Union

import torch
from torch import Tensor

from ._arguments import id_list
from ._dispatch import bound, scriptable, use_bound

__all__ = ["log_softmax", "logsumexp", "softmax"]


def __dir__() -> List[str]:
    return __all__


@scriptable
def softmax(
    input: Tensor,
    mask: Optional[Tensor] = None,
    dim: int = -1,
    *,
    causal: bool = False,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Softmax along ``dim`` over the elements that ``mask`` keeps: :math:`e^{x_i} / \sum_{j \text{ kept}} e^{x_j}`.

    Without a mask this is :func:`torch.nn.functional.softmax`. A slice with nothing kept is 0, with a zero gradient,
    where ``masked_fill`` with -inf before torch's gives NaN.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        mask: True (1) = keep. bool, or an integer dtype that holds 0 and 1; its shape broadcasts to ``input``'s from
            the last dimension on, as ``(B, 1, 1, T)`` for padding or ``(T, T)`` do. It is read by its strides, never
            expanded. What lies at a masked element (NaN, inf) changes nothing, and its gradient is exactly 0.
        dim: the dimension that sums to 1.
        causal: keep of row q of the last two dimensions ``(T, S)`` the first q + 1 elements, without a mask that says
            so; with ``mask``, what both keep. Only for the last ``dim``; aligned at the top left, as ``is_causal`` of
            :func:`torch.nn.functional.scaled_dot_product_attention`. What it drops is written, and not computed.
        dtype: what ``input`` is converted to first.

    Returns:
        ``input``'s shape; exactly 0 where masked.

    Raises:
        IndexError: a dimension that ``input`` does not have.
        TypeError: a wrong dtype, such as a float mask.
        ValueError: ``causal`` with another ``dim`` than the last.
        RuntimeError: a wrong shape or device.

    >>> softmax(torch.tensor([[1.0, 1.0, float("nan")], [3.0, 4.0, 5.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    >>> softmax(torch.zeros(3, 3), causal=True)
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    """
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.softmax(input, mask, dim, causal, dtype)
    return torch.ops.masked_loss.softmax(input, mask, dim, causal, dtype)


@scriptable
def log_softmax(
    input: Tensor,
    mask: Optional[Tensor] = None,
    dim: int = -1,
    *,
    causal: bool = False,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""The logarithm of :func:`softmax`: :math:`x_i - \log \sum_{j \text{ kept}} e^{x_j}`, and -inf where masked.

    Without a mask this is :func:`torch.nn.functional.log_softmax`. A slice with nothing kept is -inf, with a zero
    gradient.

    Args:
        input, mask, dim, causal, dtype: as in :func:`softmax`.

    Returns:
        ``input``'s shape; exactly -inf where masked.

    Raises:
        IndexError, TypeError, ValueError, RuntimeError: as :func:`softmax`.

    >>> log_softmax(torch.tensor([1.0, 1.0, 7.0]), torch.tensor([True, True, False]))
    tensor([-0.6931, -0.6931,    -inf])
    """
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.log_softmax(input, mask, dim, causal, dtype)
    return torch.ops.masked_loss.log_softmax(input, mask, dim, causal, dtype)


@scriptable
def logsumexp(
    input: Tensor,
    mask: Optional[Tensor] = None,
    dim: Union[int, List[int]] = -1,
    *,
    keepdim: bool = False,
    causal: bool = False,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""The logarithm of the sum of exponentials over what ``mask`` keeps: :math:`\log \sum_{j \text{ kept}} e^{x_j}`.

    Without a mask this is :func:`torch.logsumexp`. Where nothing is kept it is -inf, with a zero gradient.

    Args:
        input, mask, causal, dtype: as in :func:`softmax`.
        dim: one dimension, or several that are reduced together; an empty list means all of them.
        keepdim: whether what is reduced stays as a dimension of size 1.

    Returns:
        ``input``'s shape without ``dim``.

    Raises:
        IndexError, TypeError, ValueError, RuntimeError: as :func:`softmax`.

    >>> logsumexp(torch.tensor([[0.0, 0.0], [5.0, float("nan")]]), torch.tensor([[1, 1], [1, 0]]))
    tensor([0.6931, 5.0000])
    """
    dims = id_list("logsumexp", "dim", dim)
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.logsumexp(input, mask, dims, keepdim, causal, dtype)
    return torch.ops.masked_loss.logsumexp(input, mask, dims, keepdim, causal, dtype)
