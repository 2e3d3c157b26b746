"""Losses and log-probabilities from hidden states and the weights of a head, whose logits are never whole in memory."""

from typing import List, Optional, Tuple, Union

import torch
from torch import Tensor

from ._arguments import divergence_number, id_list, normalizer_tensor, reduction_number
from ._dispatch import bound, scriptable, use_bound
from ._docstrings import share_text

__all__ = ["linear_cross_entropy", "linear_kl", "linear_log_prob", "linear_log_prob_and_entropy"]


def __dir__() -> List[str]:
    return __all__


@scriptable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    linear_bias: Optional[Tensor] = None,
    softcap: Optional[float] = None,
    temperature: float = 1.0,
    chunk_size: Optional[int] = None,
    max_kept: Optional[int] = None,
    weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    class_mask: Optional[Tensor] = None,
    ignore_index: Union[int, List[int]] = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Cross entropy of the logits ``input @ linear_weight.T + linear_bias``, over the positions that ``mask`` keeps.

    It is :func:`cross_entropy` of these logits with ``dim=-1``, which describes the loss. The logits are made in chunks
    and are never whole in memory. Only unmasked positions are multiplied: if 20 % of them are unmasked, the matrix
    products take 20 % of the time. Only the products are computed that a gradient is wanted of.

    Logits of float16 and bfloat16 are made, softened and summed in float32, and the gradient of ``linear_weight`` is
    summed in float32 over chunks. If every position is masked, the loss is 0 with zero gradients.

    A scalar loss computes its gradients in the forward pass. For ``'none'``, float16 and saved-tensor hooks the
    backward pass computes the logits again.

    Args:
        {input}
        {linear_weight}
        target: class indices of dtype int64, int32 or uint8.
        {mask}
        {linear_bias}
        {softcap}
        {temperature}
        {chunk_size}
        {max_kept}
        weight: weights of the classes, as in torch.
        sample_weight: weights of the positions, of any sign; differentiable. A weight of 0 masks, unless it requires
            grad.
        {class_mask}
        ignore_index: one class index, or a list of them. Positions with these targets are masked.
        reduction: ``'none'``, ``'sum'``, ``'mean'``, or ``'sequence_mean'``, as in :func:`cross_entropy`.
        label_smoothing: in [0, 1]; spread over the allowed classes.
        z_loss: coefficient of the squared log-sum-exp that is added to the loss; at least 0.
        normalizer: the means divide by it instead of by the sum of the weights: a number, or a 0-d tensor.
        {dtype}

    Shape:
        - ``input``: ``(..., H)``.
        - ``linear_weight``: ``(C, H)``; ``linear_bias``, ``weight``: ``(C,)``.
        - ``target``: ``(...)``.
        - ``mask``, ``sample_weight``: the rank of ``target``, each size equal or 1.
        - ``class_mask``: ``(C,)``, or the rank of the logits ``(..., C)`` with each size equal or 1.
        - Output: ``(...)`` for ``'none'``, otherwise 0-d.

    Returns:
        The loss of each position for ``'none'``, otherwise a 0-d tensor; in ``dtype``.

    Raises:
        {index_error}
        {raises}

    >>> hidden, head = torch.ones(3, 2), torch.zeros(4, 2)
    >>> linear_cross_entropy(hidden, head, torch.tensor([3, 1, 9]), torch.tensor([True, True, False]))
    tensor(1.3863)
    """
    number = reduction_number("linear_cross_entropy", reduction)
    ids = id_list("linear_cross_entropy", "ignore_index", ignore_index)
    divisor = normalizer_tensor("linear_cross_entropy", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, linear_weight, target, mask, linear_bias, weight, sample_weight, class_mask, divisor):
            return bound.linear_cross_entropy(
                input,
                linear_weight,
                target,
                mask,
                number,
                linear_bias,
                weight,
                sample_weight,
                class_mask,
                divisor,
                ids,
                label_smoothing,
                z_loss,
                softcap,
                temperature,
                chunk_size,
                max_kept,
                dtype,
            )
    return torch.ops.masked_loss.linear_cross_entropy(
        input,
        linear_weight,
        target,
        mask,
        number,
        linear_bias,
        weight,
        sample_weight,
        class_mask,
        divisor,
        ids,
        label_smoothing,
        z_loss,
        softcap,
        temperature,
        chunk_size,
        max_kept,
        dtype,
    )


@scriptable
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    mask: Optional[Tensor] = None,
    *,
    linear_bias: Optional[Tensor] = None,
    class_mask: Optional[Tensor] = None,
    softcap: Optional[float] = None,
    temperature: float = 1.0,
    chunk_size: Optional[int] = None,
    max_kept: Optional[int] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""The log-probability of one class of each position, by the logits ``input @ linear_weight.T + linear_bias``.

    The logits are made in blocks of classes and are never whole in memory, and only unmasked positions are multiplied.
    The backward pass computes them again.

    Args:
        {input}
        {linear_weight}
        index: class indices of dtype int64, int32 or uint8.
        {mask}
        {linear_bias}
        {class_mask}
        {softcap}
        {temperature}
        {chunk_size}
        {max_kept}
        {dtype}

    {shape}

    Returns:
        :math:`\log p_y` of each position, 0 where masked, -inf of a class that is not allowed; in ``dtype``.

    Raises:
        {index_error}
        {raises}

    >>> hidden, head = torch.ones(2, 2), torch.zeros(4, 2)
    >>> linear_log_prob(hidden, head, torch.tensor([3, 9]), torch.tensor([True, False]))
    tensor([-1.3863,  0.0000])
    """
    if not torch.jit.is_scripting():
        if use_bound(input, linear_weight, index, mask, linear_bias, class_mask):
            return bound.linear_log_prob(
                input,
                linear_weight,
                index,
                mask,
                linear_bias,
                class_mask,
                softcap,
                temperature,
                chunk_size,
                max_kept,
                dtype,
            )
    return torch.ops.masked_loss.linear_log_prob(
        input, linear_weight, index, mask, linear_bias, class_mask, softcap, temperature, chunk_size, max_kept, dtype
    )


@scriptable
def linear_log_prob_and_entropy(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    mask: Optional[Tensor] = None,
    *,
    linear_bias: Optional[Tensor] = None,
    class_mask: Optional[Tensor] = None,
    softcap: Optional[float] = None,
    temperature: float = 1.0,
    chunk_size: Optional[int] = None,
    max_kept: Optional[int] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tuple[Tensor, Tensor]:
    r""":func:`linear_log_prob`, and the entropy :math:`-\sum_c p_c \log p_c` of each position, in one pass.

    Both are differentiable.

    Args:
        {input}
        {linear_weight}
        index: class indices of dtype int64, int32 or uint8.
        {mask}
        {linear_bias}
        {class_mask}
        {softcap}
        {temperature}
        {chunk_size}
        {max_kept}
        {dtype}

    {shape}

    Returns:
        Log-probabilities and entropies, 0 where masked; in ``dtype``.

    Raises:
        {index_error}
        {raises}

    >>> hidden, head = torch.ones(2, 2), torch.zeros(4, 2)
    >>> linear_log_prob_and_entropy(hidden, head, torch.tensor([3, 9]), torch.tensor([True, False]))
    (tensor([-1.3863,  0.0000]), tensor([1.3863, 0.0000]))
    """
    if not torch.jit.is_scripting():
        if use_bound(input, linear_weight, index, mask, linear_bias, class_mask):
            return bound.linear_log_prob_and_entropy(
                input,
                linear_weight,
                index,
                mask,
                linear_bias,
                class_mask,
                softcap,
                temperature,
                chunk_size,
                max_kept,
                dtype,
            )
    return torch.ops.masked_loss.linear_log_prob_and_entropy(
        input, linear_weight, index, mask, linear_bias, class_mask, softcap, temperature, chunk_size, max_kept, dtype
    )


@scriptable
def linear_kl(
    input: Tensor,
    linear_weight: Tensor,
    target_input: Tensor,
    target_linear_weight: Tensor,
    mask: Optional[Tensor] = None,
    *,
    linear_bias: Optional[Tensor] = None,
    target_linear_bias: Optional[Tensor] = None,
    class_mask: Optional[Tensor] = None,
    softcap: Optional[float] = None,
    temperature: float = 1.0,
    chunk_size: Optional[int] = None,
    max_kept: Optional[int] = None,
    kind: str = "forward",
    beta: float = 0.5,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""The divergence between the probabilities :math:`p` and :math:`q` of the classes by two heads.

    :math:`p` is the softmax of ``input @ linear_weight.T + linear_bias``, such as a student's, and :math:`q` that of
    ``target_input @ target_linear_weight.T + target_linear_bias``, such as a teacher's. Both logits are made in chunks
    and are never whole in memory, and only unmasked positions are multiplied. Only the products are computed that a
    gradient is wanted of.

    ==============  ====================================================================================
    ``kind``        divergence
    ==============  ====================================================================================
    ``'forward'``   :math:`\operatorname{KL}(q \| p) = \sum_c q_c (\log q_c - \log p_c)`
    ``'reverse'``   :math:`\operatorname{KL}(p \| q)`
    ``'jsd'``       :math:`\beta \operatorname{KL}(q \| m) + (1 - \beta) \operatorname{KL}(p \| m)` with
                    :math:`m = \beta q + (1 - \beta) p`; with a ``beta`` of 0 and 1 the KL of ``'forward'`` and
                    ``'reverse'``
    ==============  ====================================================================================

    A divergence is never negative, and 0 where both are equal. A class that has no probability by the first of the two
    adds 0, and one that has none by the second alone makes it inf. There is no factor of the squared temperature.
    The generalized Jensen-Shannon divergence is that of `On-Policy Distillation of Language Models
    <https://arxiv.org/abs/2306.13649>`__.

    A scalar computes its gradients in the forward pass. For ``'none'``, float16 and saved-tensor hooks the backward
    pass computes the logits again.

    Args:
        {input}
        {linear_weight}
        target_input: hidden states of the other head, of ``input``'s dtype; differentiable.
        target_linear_weight: its weights; differentiable.
        {mask}
        {linear_bias}
        target_linear_bias: added to the other logits; differentiable.
        {class_mask}
        softcap: both logits :math:`z` become :math:`c \tanh(z / c)`, before ``temperature``; above 0.
        temperature: both logits are divided by it; above 0.
        chunk_size: how many rows of both logits are held at once. By default as many as fit in 512 MiB, and at least
            1024.
        {max_kept}
        kind: ``'forward'``, ``'reverse'`` or ``'jsd'``.
        beta: the share of :math:`q` in the mixture of ``'jsd'``, in [0, 1].
        sample_weight: weights of the positions, of any sign; differentiable. A weight of 0 masks, unless it requires
            grad.
        reduction: ``'none'``, ``'sum'``, ``'mean'``, or ``'sequence_mean'``, as in :func:`cross_entropy`.
        normalizer: the means divide by it instead of by the sum of the weights: a number, or a 0-d tensor.
        {dtype}

    Shape:
        - ``input``: ``(..., H)``; ``linear_weight``: ``(C, H)``.
        - ``target_input``: ``(..., H')``; ``target_linear_weight``: ``(C, H')``.
        - ``linear_bias``, ``target_linear_bias``: ``(C,)``.
        - ``mask``, ``sample_weight``: the rank of ``(...)``, each size equal or 1.
        - ``class_mask``: ``(C,)``, or the rank of the logits ``(..., C)`` with each size equal or 1.
        - Output: ``(...)`` for ``'none'``, otherwise 0-d.

    Returns:
        The divergence of each position for ``'none'``, otherwise a 0-d tensor; in ``dtype``.

    Raises:
        {raises}

    >>> hidden, head = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> linear_kl(hidden, head, 2 * hidden, head, reduction="none")
    tensor([0.0989, 0.0989])
    >>> linear_kl(hidden, head, hidden, head)
    tensor(0.)
    """
    number = reduction_number("linear_kl", reduction)
    divergence = divergence_number("linear_kl", kind)
    divisor = normalizer_tensor("linear_kl", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(
            input,
            linear_weight,
            target_input,
            target_linear_weight,
            mask,
            linear_bias,
            target_linear_bias,
            sample_weight,
            class_mask,
            divisor,
        ):
            return bound.linear_kl(
                input,
                linear_weight,
                target_input,
                target_linear_weight,
                mask,
                number,
                linear_bias,
                target_linear_bias,
                sample_weight,
                class_mask,
                divisor,
                divergence,
                beta,
                softcap,
                temperature,
                chunk_size,
                max_kept,
                dtype,
            )
    return torch.ops.masked_loss.linear_kl(
        input,
        linear_weight,
        target_input,
        target_linear_weight,
        mask,
        number,
        linear_bias,
        target_linear_bias,
        sample_weight,
        class_mask,
        divisor,
        divergence,
        beta,
        softcap,
        temperature,
        chunk_size,
        max_kept,
        dtype,
    )


share_text(
    [linear_cross_entropy, linear_kl, linear_log_prob, linear_log_prob_and_entropy],
    input="input: hidden states; float32, float64, bfloat16 or float16; differentiable.",
    linear_weight="""
        linear_weight: weights of the head, of ``input``'s dtype; differentiable. Under autocast both, and
            ``linear_bias``, are cast to its dtype, as by :func:`torch.nn.functional.linear`.
    """,
    mask="""
        mask: bool, or integers 0 and 1. True (1) = keep. Masked positions are not read: NaN or an index out of range
            there changes nothing, and their gradient is exactly 0.
    """,
    linear_bias="linear_bias: added to the logits; differentiable.",
    class_mask="""
        class_mask: bool, or integers 0 and 1. True (1) = the class is allowed. Disallowed classes get probability 0.
            Their weights are multiplied all the same and have to be finite. A position without allowed classes is
            masked.
    """,
    softcap=r"softcap: logits :math:`z` become :math:`c \tanh(z / c)`, before ``temperature``; above 0.",
    temperature="temperature: logits are divided by it; above 0.",
    chunk_size="""
        chunk_size: how many rows of logits are held at once; blocks of classes have as many elements. By default as
            many as fit in 512 MiB, and at least 1024.
    """,
    max_kept="""
        max_kept: a bound of the number of unmasked positions. Without it the number is read, which waits for a GPU.
            More unmasked positions than this are an error on the CPU; on a GPU results are NaN then.
    """,
    dtype="dtype: dtype of the result. By default float32, or float64 for float64.",
    shape="""
        Shape:
            - ``input``: ``(..., H)``.
            - ``linear_weight``: ``(C, H)``; ``linear_bias``: ``(C,)``.
            - ``index``: ``(...)``.
            - ``mask``: the rank of ``index``, each size equal or 1.
            - ``class_mask``: ``(C,)``, or the rank of the logits ``(..., C)`` with each size equal or 1.
            - Output: ``(...)``.
    """,
    index_error="""
        IndexError: an unmasked class index is outside ``[0, C)``; the message names its position. On a GPU the result
            of the position is NaN instead, unless ``MASKED_LOSS_CHECK=1`` is in the environment.
    """,
    raises="""
        TypeError: an argument has a wrong type or dtype, such as a float mask or a ``DTensor``.
        ValueError: a value is out of range, such as an integer mask with values other than 0 and 1.
        RuntimeError: an argument has a wrong shape or is on a wrong device.
    """,
)
