"""``torch.nn.functional``'s losses, and ``masked_fill``, with a mask.

A mask says which positions to *keep*: True (or the integer 1) counts. Masked positions are left out of the loss, of its
mean and of the gradient. Only in ``masked_fill`` does True mean *fill*. Integers other than 0 and 1 are an error on the
CPU. On other devices they are one with ``MASKED_LOSS_CHECK=1`` in the environment; otherwise nonzero keeps.
"""

from typing import List, Optional, Union

import torch
from torch import Tensor

from ._arguments import id_list, normalizer_tensor, reduction_number
from ._dispatch import bound, scriptable, use_bound
from ._docstrings import share_text
from .linear import linear_cross_entropy, linear_kl, linear_log_prob, linear_log_prob_and_entropy
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
    "linear_cross_entropy",
    "linear_kl",
    "linear_log_prob",
    "linear_log_prob_and_entropy",
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

    With allowed classes :math:`A`, logits :math:`x`, target :math:`y`, class weights :math:`w`, label smoothing
    :math:`\varepsilon`, z-loss coefficient :math:`z` and :math:`\mathrm{lse} = \log \sum_{c \in A} e^{x_c}`, the loss
    of a position is

    .. math:: \ell = (1-\varepsilon)\, w_y (\mathrm{lse} - x_y)
              + \frac{\varepsilon}{|A|} \sum_{c \in A} w_c (\mathrm{lse} - x_c) + z\, w_y\, \mathrm{lse}^2

    It is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is :math:`\sum s \ell / \sum s w_y` over the
    unmasked positions. With class probabilities :math:`q` the loss of a position is

    .. math:: \ell = \sum_{c \in A} \Big((1-\varepsilon)\, q_c + \frac{\varepsilon}{|A|}\Big)\, w_c (\mathrm{lse} - x_c)
              + z\, \mathrm{lse}^2

    and ``'mean'`` is :math:`\sum s \ell / \sum s`. Without a mask this is :func:`torch.nn.functional.cross_entropy`. If
    every position is masked, the loss is 0 with a zero gradient instead of NaN.

    Args:
        input: logits; float32, float64, bfloat16 or float16.
        target: class indices of dtype int64, int32 or uint8; or class probabilities of a floating dtype, which are
            differentiable.
        mask: bool, or integers 0 and 1. True (1) = keep. Masked positions are not read: NaN or an index out of range
            there changes nothing, and their gradient is exactly 0.
        weight: weights of the classes, as in torch; differentiable with class probabilities.
        {sample_weight}
        class_mask: bool, or integers 0 and 1. True (1) = the class is allowed. Disallowed classes get probability 0 and
            no gradient, and are excluded from label smoothing. A position without allowed classes is masked. If an
            unmasked position has its target, or a probability above 0, on a disallowed class, its loss is +inf.
        ignore_index: one class index, or a list of them. Positions with these targets are masked. Only for class
            indices.
        {reduction}
        label_smoothing: in [0, 1]; spread over the allowed classes.
        z_loss: coefficient of the squared log-sum-exp that is added to the loss; at least 0.
        {normalizer}
        dim: the class dimension. ``dim=-1`` takes ``(B, T, C)`` without a transpose and without a copy.
        dtype: dtype of the result. By default ``input``'s dtype, or what it and class probabilities promote to; float32
            for float16 and bfloat16 under autocast. Losses are summed in float32 in any case (in float64 for float64),
            so ``torch.float32`` makes no copy of bfloat16 logits.

    Shape:
        - ``input``: ``(N, C, d1, ...)`` or ``(C,)``. The classes are in dimension ``dim``.
        - ``target``: ``input``'s shape without ``dim`` for class indices, ``input``'s shape for class probabilities.
        - ``mask``, ``sample_weight``: the rank of ``input`` without ``dim``, each size equal or 1.
        - ``weight``: ``(C,)``.
        - ``class_mask``: ``(C,)``, or the rank of ``input`` with each size equal or 1.
        - Output: ``input``'s shape without ``dim`` for ``'none'``, otherwise 0-d.

    Returns:
        The loss of each position for ``'none'``, otherwise a 0-d tensor; in ``dtype``.

    Raises:
        IndexError: an unmasked target is outside ``[0, C)``; the message names its position. On a GPU the loss of the
            position is NaN instead, unless ``MASKED_LOSS_CHECK=1`` is in the environment.
        {raises}

    Source: `Szegedy et al. 2016 <https://arxiv.org/abs/1512.00567>`__ (label smoothing),
    `Chowdhery et al. 2022 <https://arxiv.org/abs/2204.02311>`__ (z-loss).

    With NaN at a masked position:

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
    r"""The divisor of ``cross_entropy(reduction='mean')``: the sum of the unmasked weights, :math:`\sum s\, w_y`.

    Add it over micro-batches or processes and pass the sum as ``normalizer``. It is 0 for an empty batch, which has
    loss 0 like a perfect prediction.

    It is for class indices. For elementwise losses the divisor is the number of unmasked elements,
    ``mask.expand(shape).sum()``, or the sum of their weights, ``masked_sum(sample_weight.expand(shape), mask)``.
    ``shape`` is that of the unreduced loss.

    Args:
        target: class indices of dtype int64, int32 or uint8.
        mask: bool, or integers 0 and 1. True (1) = keep.
        weight: weights of the classes.
        sample_weight: weights of the positions.
        class_mask: bool, or integers 0 and 1. True (1) = the class is allowed. A position without allowed classes is
            masked.
        ignore_index: one class index, or a list of them. Positions with these targets are masked.
        dim: the class dimension of a ``class_mask`` with the rank of the logits.

    Shape:
        - ``target``: any shape.
        - ``mask``, ``sample_weight``: the rank of ``target``, each size equal or 1.
        - ``weight``: ``(C,)``.
        - ``class_mask``: ``(C,)``, or the rank of the logits with each size equal or 1.
        - Output: 0-d.

    Returns:
        float32, or float64 if a weight is float64; without a gradient.

    Raises:
        IndexError: an unmasked target is negative, or too large for ``weight`` or ``class_mask``.
        {raises}

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
    """Checks that unmasked class indices are in ``[0, num_classes)`` and returns a copy of ``target``.

    Losses on the CPU check their targets themselves. On a GPU this waits for the device. Use the result: if it is
    unused, a compiler may drop the check.

    Args:
        target: class indices of dtype int64, int32 or uint8.
        num_classes: the number of classes.
        mask: bool, or integers 0 and 1. True (1) = keep.
        ignore_index: one class index, or a list of them, that is not checked.

    Shape:
        - ``target``: any shape.
        - ``mask``: the rank of ``target``, each size equal or 1.
        - Output: ``target``'s shape.

    Returns:
        A copy of ``target``.

    Raises:
        IndexError: an unmasked target is outside ``[0, num_classes)``; the message names it and its position.
        {raises}

    >>> check_targets(torch.tensor([1, 7, 0]), 3, torch.tensor([True, False, True]))
    tensor([1, 7, 0])
    """
    ids = id_list("check_targets", "ignore_index", ignore_index)
    if not torch.jit.is_scripting():
        if use_bound(target, mask):
            return bound.check_targets(target, num_classes, mask, ids)
    return torch.ops.masked_loss.check_targets(target, num_classes, mask, ids)


def masked_fill(input: Tensor, mask: Tensor, value: Union[int, float, Tensor]) -> Tensor:
    """``input`` with ``value`` where ``mask`` is True. Here, as in torch, True means *fill*.

    Args:
        input: any dtype.
        mask: bool, or integers 0 and 1. True (1) = fill.
        value: a number or a 0-d tensor; a tensor is differentiable.

    Shape:
        - ``input``, ``mask``: any shapes that broadcast to a common shape S. ``mask`` is not expanded in memory.
        - Output: S.

    Returns:
        A new tensor of ``input``'s dtype. The gradient of ``input`` is exactly 0 where it is filled.

    Raises:
        TypeError: an argument has a wrong type or dtype, such as a float mask or a ``DTensor``.
        RuntimeError: shapes do not broadcast, or ``input``'s dtype cannot hold ``value``.

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
    """:func:`masked_fill` in place. Here, as in torch, True means *fill*.

    Args:
        input: any dtype. No two of its elements may share memory.
        mask: bool, or integers 0 and 1. True (1) = fill.
        value: a number or a 0-d tensor; a tensor is differentiable.

    Shape:
        - ``input``: any shape.
        - ``mask``: broadcasts to ``input``.
        - Output: ``input``'s shape.

    Returns:
        ``input``.

    Raises:
        TypeError: an argument has a wrong type or dtype, such as a float mask or a ``DTensor``.
        RuntimeError: ``mask`` does not broadcast to ``input``, ``input``'s dtype cannot hold ``value``, or elements of
            ``input`` share memory with each other or with ``mask``.

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


share_text(
    [cross_entropy, loss_normalizer, check_targets],
    sample_weight="""
        sample_weight: weights of the positions, in the loss and in its mean; differentiable. A position with weight 0
            is masked, unless ``sample_weight`` requires grad.
    """,
    reduction="""
        reduction: ``'none'``, ``'mean'``, ``'sum'`` or ``'sequence_mean'``. ``'sequence_mean'`` takes the weighted
            mean of each sequence (each index of dim 0), then the mean over the sequences that have unmasked positions.
    """,
    normalizer="""
        normalizer: a number or a 0-d tensor without gradient, at least 0. ``'mean'`` divides by it instead of the sum
            of the weights, ``'sequence_mean'`` instead of the number of sequences. Use it for a token count over
            several micro-batches or processes.
    """,
    raises="""
        TypeError: an argument has a wrong type or dtype, such as a float mask or a ``DTensor``.
        ValueError: a value is out of range, such as an integer mask with values other than 0 and 1.
        RuntimeError: an argument has a wrong shape or is on a wrong device.
    """,
)
