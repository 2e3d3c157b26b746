"""Softmax, log-softmax and log-sum-exp of unmasked elements."""

from typing import List, Optional, Union

import torch
from torch import Tensor

from ._arguments import id_list
from ._dispatch import bound, scriptable, use_bound
from ._docstrings import share_text

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

    Without a mask this is :func:`torch.nn.functional.softmax`. A fully masked slice is 0 with a zero gradient, where
    ``masked_fill`` with -inf and torch's softmax give NaN.

    Args:
        input: float32, float64, bfloat16 or float16.
        {mask}
        dim: the dimension that sums to 1.
        {causal}
        {dtype}

    {shape}

    Returns:
        The softmax, exactly 0 where masked; in ``dtype``.

    Raises:
        {raises}

    With NaN at a masked element:

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

    Without a mask this is :func:`torch.nn.functional.log_softmax`. A fully masked slice is -inf with a zero gradient.

    Args:
        input: float32, float64, bfloat16 or float16.
        {mask}
        dim: the dimension whose exponentials sum to 1.
        {causal}
        {dtype}

    {shape}

    Returns:
        The log-softmax, exactly -inf where masked; in ``dtype``.

    Raises:
        {raises}

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
    r"""Log-sum-exp over the elements that ``mask`` keeps: :math:`\log \sum_{j \text{ kept}} e^{x_j}`.

    Without a mask this is :func:`torch.logsumexp`. A fully masked slice is -inf with a zero gradient.

    Args:
        input: float32, float64, bfloat16 or float16.
        {mask}
        dim: the dimension, or the list of dimensions, to reduce. An empty list means all.
        keepdim: whether reduced dimensions are kept with size 1.
        {causal}
        {dtype}

    Shape:
        - ``input``: any shape.
        - ``mask``: broadcasts to ``input``, aligned at the last dimension as in torch. It is not expanded in memory.
        - Output: ``input``'s shape without ``dim``.

    Returns:
        The logarithms, in ``dtype``.

    Raises:
        {raises}

    With NaN at a masked element:

    >>> logsumexp(torch.tensor([[0.0, 0.0], [5.0, float("nan")]]), torch.tensor([[1, 1], [1, 0]]))
    tensor([0.6931, 5.0000])
    """
    dims = id_list("logsumexp", "dim", dim)
    if not torch.jit.is_scripting():
        if use_bound(input, mask):
            return bound.logsumexp(input, mask, dims, keepdim, causal, dtype)
    return torch.ops.masked_loss.logsumexp(input, mask, dims, keepdim, causal, dtype)


share_text(
    [softmax, log_softmax, logsumexp],
    mask="""
        mask: bool, or integers 0 and 1. True (1) = keep. Masked elements are not read: NaN or inf there changes
            nothing, and their gradient is exactly 0.
    """,
    causal="""
        causal: query q attends to keys 0 to q, where the last two dimensions are queries and keys ``(T, S)``. No mask
            tensor is built. With ``mask``, elements that both keep are kept. Only for the last ``dim``. Queries and
            keys are aligned at the top left, as ``is_causal`` of
            :func:`torch.nn.functional.scaled_dot_product_attention`.
    """,
    dtype="""
        dtype: the dtype that ``input`` is converted to first, and of the result.
    """,
    shape="""
        Shape:
            - ``input``: any shape.
            - ``mask``: broadcasts to ``input``, aligned at the last dimension as in torch: ``(B, 1, 1, S)`` for
              padding, ``(T, S)``. It is not expanded in memory.
            - Output: ``input``'s shape.
    """,
    raises="""
        IndexError: ``input`` does not have the dimension ``dim``.
        TypeError: an argument has a wrong type or dtype, such as a float mask or a ``DTensor``.
        ValueError: ``causal`` with a ``dim`` other than the last, or an integer mask with values other than 0 and 1.
        RuntimeError: an argument has a wrong shape or is on a wrong device.
    """,
)
