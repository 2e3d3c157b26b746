"""``torch.nn.functional``'s losses, and ``masked_fill``, with a mask.

Everywhere but in ``masked_fill`` a mask says what to *keep*: True (or the integer 1) counts; False is left out of the
loss, of its mean and of the gradient, whatever lies there. Integers other than 0 and 1 are an error where values are
read: on the CPU, and with ``MASKED_LOSS_CHECK=1`` in the environment on other devices, where nonzero keeps otherwise.
"""

from typing import List, Optional, Union

import torch
from torch import Tensor

from ._arguments import id_list, normalizer_tensor, reduction_number
from ._dispatch import bound, scriptable, use_bound
from .pointwise import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    gaussian_nll_loss,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    poisson_nll_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from .reductions import masked_mean, masked_std, masked_sum, masked_var, masked_whiten
from .softmaxes import log_softmax, logsumexp, softmax

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "check_targets",
    "cross_entropy",
    "gaussian_nll_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "log_softmax",
    "logsumexp",
    "loss_normalizer",
    "masked_fill",
    "masked_fill_",
    "masked_mean",
    "masked_std",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "mse_loss",
    "poisson_nll_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "softmax",
]


def __dir__() -> List[str]:
    return __all__


@scriptable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    class_mask: Optional[Tensor] = None,
    ignore_index: Union[int, List[int]] = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dim: int = 1,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Cross entropy of class indices, or of class probabilities, over the positions that ``mask`` keeps.

    With allowed classes :math:`A`, logits :math:`x`, target :math:`y`, class weights :math:`w`, smoothing
    :math:`\varepsilon`, z-loss coefficient :math:`z` and :math:`\mathrm{lse} = \log \sum_{c \in A} e^{x_c}`, the loss
    of a position is

    .. math:: \ell = (1-\varepsilon)\, w_y (\mathrm{lse} - x_y)
              + \frac{\varepsilon}{|A|} \sum_{c \in A} w_c (\mathrm{lse} - x_c) + z\, w_y\, \mathrm{lse}^2

    times its ``sample_weight`` :math:`s`; ``'mean'`` is :math:`\sum s \ell / \sum s w_y` over what is kept. With
    probabilities :math:`q` instead of a class it is

    .. math:: \ell = \sum_{c \in A} \Big((1-\varepsilon)\, q_c + \frac{\varepsilon}{|A|}\Big)\, w_c (\mathrm{lse} - x_c)
              + z\, \mathrm{lse}^2

    and ``'mean'`` divides by :math:`\sum s`. Without a mask this is :func:`torch.nn.functional.cross_entropy`, but for
    one point: where nothing is kept, the loss is 0 with a zero gradient instead of NaN.

    Args:
        input: logits ``(N, C, d1, ...)``, or ``(C,)``; float32, float64, bfloat16 or float16.
        target: class indices, ``input``'s shape without ``dim``; int64, int32 or uint8. Or class probabilities,
            ``input``'s shape, of a floating dtype; differentiable.
        mask: True (1) = keep. bool, or an integer dtype that holds 0 and 1; the rank of ``input`` without ``dim``, each
            size equal or 1. What lies at a masked position (NaN, an index out of range, ...) changes nothing, and its
            gradient is exactly 0.
        weight: weights of the classes ``(C,)``; differentiable with class probabilities.
        sample_weight: weights of the positions, as ``mask`` in rank and sizes; differentiable. 0 masks, unless it
            requires grad.
        class_mask: True = the class is allowed. ``(C,)`` along ``dim``, or ``input``'s rank with each size equal or 1.
            Other classes take no probability, no gradient and no label smoothing. A row without an allowed class is
            masked; a kept target on a class that is not allowed, or a probability above 0 there, costs +inf.
        ignore_index: one target, or several, that mask the positions where they stand.
        reduction: ``'none'``, ``'mean'``, ``'sum'``, or ``'sequence_mean'``: the mean over the sequences (the first
            dimension of the mask) with something kept of each one's weighted mean.
        label_smoothing: in [0, 1]; spread over the allowed classes.
        z_loss: coefficient, of at least 0, of the squared log-sum-exp that is added to the loss.
        normalizer: number or 0-d tensor that ``'mean'`` divides by instead (a global token count); with
            ``'sequence_mean'``, instead of the number of sequences.
        dim: the class dimension; ``dim=-1`` takes ``(B, T, C)`` without a transpose and without a copy.
        dtype: of the result. Losses are summed in float32 (in float64 for float64) whatever it is, so that
            ``torch.float32`` of bfloat16 logits costs no copy of them.

    Returns:
        ``input``'s shape without ``dim`` for ``'none'``, else 0-d; of ``dtype``, by default ``input``'s dtype, or what
        it and probabilities promote to (float32 for half types under autocast).

    Raises:
        IndexError: a kept target is outside ``[0, C)``; on a GPU its loss is NaN instead, unless
            ``MASKED_LOSS_CHECK=1`` is in the environment.
        TypeError: a wrong dtype, such as a float mask.
        ValueError: an argument outside its range.
        RuntimeError: a wrong shape or device.

    Source: Szegedy et al. 2016 (label smoothing), Chowdhery et al. 2022 (z-loss).

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [float("nan"), 5.0]])
    >>> cross_entropy(logits, torch.tensor([0, 0, 1]), torch.tensor([True, True, False]))
    tensor(0.7201)
    """
    number = reduction_number("cross_entropy", reduction)
    ids = id_list("cross_entropy", "ignore_index", ignore_index)
    divisor = normalizer_tensor("cross_entropy", normalizer, input)
    smooth = label_smoothing
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, weight, sample_weight, class_mask, divisor):
            return bound.cross_entropy(
                input, target, mask, number, weight, sample_weight, class_mask, divisor, ids, smooth, z_loss, dim, dtype
            )
    return torch.ops.masked_loss.cross_entropy(
        input, target, mask, number, weight, sample_weight, class_mask, divisor, ids, smooth, z_loss, dim, dtype
    )


@scriptable
def loss_normalizer(
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    class_mask: Optional[Tensor] = None,
    ignore_index: Union[int, List[int]] = -100,
    dim: int = 1,
) -> Tensor:
    r"""The sum of the kept weights, :math:`\sum s\, w_y`, that ``cross_entropy(reduction='mean')`` divides by.

    Sum it over micro-batches or processes and hand it back as ``normalizer``. It also tells an empty batch (0) from a
    perfect one. It is for class indices. The mean of a loss of elements, or of class probabilities, divides by the
    number of kept ones, ``mask.expand(shape).sum()`` for losses of that shape, or by the sum of their weights,
    ``torch.where(mask, sample_weight, 0).expand(shape).sum()``.

    Args:
        target: class indices, any shape; int64, int32 or uint8.
        mask: True (1) = keep; ``target``'s rank, each size equal or 1.
        weight, sample_weight, class_mask, ignore_index, dim: as in :func:`cross_entropy`.

    Returns:
        0-d, float32 (float64 if a weight is), without a gradient; 0 when nothing is kept.

    Raises:
        IndexError: a kept target is negative, or not below the number of classes where ``weight`` or ``class_mask``
            tells it.
        TypeError, RuntimeError: as :func:`cross_entropy`.

    >>> loss_normalizer(torch.tensor([[0, 1], [2, -100]]), torch.tensor([[True], [True]]))
    tensor(3.)
    """
    ids = id_list("loss_normalizer", "ignore_index", ignore_index)
    if not torch.jit.is_scripting():
        if use_bound(target, mask, weight, sample_weight, class_mask):
            return bound.loss_normalizer(target, mask, weight, sample_weight, class_mask, ids, dim)
    return torch.ops.masked_loss.loss_normalizer(target, mask, weight, sample_weight, class_mask, ids, dim)


@scriptable
def check_targets(
    target: Tensor, num_classes: int, mask: Optional[Tensor] = None, *, ignore_index: Union[int, List[int]] = -100
) -> Tensor:
    """A copy of ``target``, once every kept class index is seen to lie in ``[0, num_classes)``.

    Losses on the CPU check their targets themselves. It returns what it checked so that no compiler drops the check:
    use the result.

    Args:
        target: class indices, any shape; int64, int32 or uint8.
        num_classes: the number of classes.
        mask: True (1) = keep; ``target``'s rank, each size equal or 1.
        ignore_index: one index, or several, that are not checked.

    Returns:
        ``target``'s shape and dtype.

    Raises:
        IndexError: a kept target is outside ``[0, num_classes)``; the message names it and its position.

    >>> check_targets(torch.tensor([1, 7, 0]), 3, torch.tensor([True, False, True]))
    tensor([1, 7, 0])
    """
    ids = id_list("check_targets", "ignore_index", ignore_index)
    if not torch.jit.is_scripting():
        if use_bound(target, mask):
            return bound.check_targets(target, num_classes, mask, ids)
    return torch.ops.masked_loss.check_targets(target, num_classes, mask, ids)


def masked_fill(input: Tensor, mask: Tensor, value: Union[int, float, Tensor]) -> Tensor:
    """``input`` with ``value`` where ``mask`` is True: here, as in torch, True means *fill*.

    Args:
        input: any shape and dtype; broadcasts with ``mask``.
        mask: True (1) = fill; bool, or an integer dtype that holds 0 and 1. It is read by its strides, never expanded.
        value: a number or a 0-d tensor; differentiable as a tensor.

    Returns:
        the broadcast shape, ``input``'s dtype. Where filled the gradient of ``input`` is exactly 0.

    Raises:
        TypeError: a float mask.
        RuntimeError: shapes that do not broadcast, or a value that ``input``'s dtype cannot hold.

    >>> masked_fill(torch.tensor([1.0, 2.0]), torch.tensor([False, True]), -1)
    tensor([ 1., -1.])
    """
    if not torch.jit.is_scripting():
        if use_bound(input, mask, value):
            return bound.masked_fill(input, mask, value)
    # TorchScript picks the overload by the type that it knows in each branch.
    if isinstance(value, Tensor):
        return torch.ops.masked_loss.masked_fill(input, mask, value)
    return torch.ops.masked_loss.masked_fill(input, mask, value)


def masked_fill_(input: Tensor, mask: Tensor, value: Union[int, float, Tensor]) -> Tensor:
    """:func:`masked_fill` in place: writes ``value`` into ``input`` where ``mask`` is True, and returns ``input``.

    Args:
        input: any shape and dtype; no two of its elements may share memory.
        mask: True (1) = fill; broadcasts to ``input``, which never grows. bool, or integers 0 and 1.
        value: a number or a 0-d tensor; differentiable as a tensor.

    Returns:
        ``input``.

    Raises:
        TypeError: a float mask.
        RuntimeError: as :func:`masked_fill`, or ``input``'s elements share memory with each other or with ``mask``.

    >>> x = torch.tensor([1, 2])
    >>> masked_fill_(x, torch.tensor([False, True]), -1)
    tensor([ 1, -1])
    """
    if not torch.jit.is_scripting():
        if use_bound(input, mask, value):
            bound.masked_fill_(input, mask, value)
            return input
    if isinstance(value, Tensor):
        torch.ops.masked_loss.masked_fill_(input, mask, value)
    else:
        torch.ops.masked_loss.masked_fill_(input, mask, value)
    return input
