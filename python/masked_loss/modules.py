"""The losses as ``nn.Module``."""

from inspect import signature
from typing import List, Optional, Union

import torch
from torch import Tensor, nn

from . import functional
from ._arguments import id_list, reduction_number
from ._docstrings import share_text

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "GaussianNLLLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "MSELoss",
    "PoissonNLLLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
]


def __dir__() -> List[str]:
    return __all__


OptionalTensor = Optional[Tensor]
Divisor = Optional[Union[int, float, Tensor]]


class CrossEntropyLoss(nn.Module):
    """:func:`masked_loss.cross_entropy` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        weight: weights of the classes ``(C,)``; a buffer.
        class_mask: True (1) = the class is allowed, ``(C,)``; a buffer.
        ignore_index: one class index, or a list of them. Positions with these targets are masked.
        {reduction}
        label_smoothing: in [0, 1]; spread over the allowed classes.
        z_loss: coefficient of the squared log-sum-exp that is added to the loss; at least 0.
        dim: the class dimension.
        {dtype}

    >>> import torch
    >>> loss = CrossEntropyLoss(dim=-1)
    >>> loss(torch.zeros(1, 2, 4), torch.tensor([[3, 9]]), torch.tensor([[True, False]]))
    tensor(1.3863)
    """

    weight: Optional[Tensor]
    class_mask: Optional[Tensor]

    def __init__(
        self,
        weight: Optional[Tensor] = None,
        *,
        class_mask: Optional[Tensor] = None,
        ignore_index: Union[int, List[int]] = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        dim: int = 1,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        reduction_number("CrossEntropyLoss", reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("class_mask", class_mask)
        self.ignore_index: List[int] = id_list("CrossEntropyLoss", "ignore_index", ignore_index)
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.dim = dim
        self.dtype = dtype

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: Optional[Tensor] = None,
        sample_weight: Optional[Tensor] = None,
        normalizer: Optional[Union[int, float, Tensor]] = None,
    ) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            mask,
            weight=self.weight,
            sample_weight=sample_weight,
            class_mask=self.class_mask,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            normalizer=normalizer,
            dim=self.dim,
            dtype=self.dtype,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, "
            f"z_loss={self.z_loss}, dim={self.dim}, dtype={self.dtype}"
        )


class LinearCrossEntropyLoss(nn.Module):
    """:func:`masked_loss.linear_cross_entropy` as a module.

    ``forward`` takes ``(input, linear_weight, target, mask=None, linear_bias=None, sample_weight=None,
    normalizer=None)``. The function describes all arguments, their shapes and the errors.

    The module holds no weights of a head: those of the model's own are passed at each call, so that they stay tied to
    whatever they are tied to, ``loss(model.backbone(x), model.head.weight, labels, mask)``.

    Args:
        weight: weights of the classes ``(C,)``; a buffer.
        class_mask: True (1) = the class is allowed, ``(C,)``; a buffer.
        ignore_index: one class index, or a list of them. Positions with these targets are masked.
        {reduction}
        label_smoothing: in [0, 1]; spread over the allowed classes.
        z_loss: coefficient of the squared log-sum-exp that is added to the loss; at least 0.
        softcap: logits :math:`z` become :math:`c \\tanh(z / c)`.
        temperature: which logits are divided by; above 0.
        chunk_size: how many rows of logits are held at once; by default as many as fit in 512 MiB.
        max_kept: a bound of the number of unmasked positions.
        dtype: dtype of the result; by default float32, or float64 for float64.

    >>> import torch
    >>> loss = LinearCrossEntropyLoss()
    >>> loss(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([3, 9]), torch.tensor([True, False]))
    tensor(1.3863)
    """

    weight: Optional[Tensor]
    class_mask: Optional[Tensor]

    def __init__(
        self,
        weight: Optional[Tensor] = None,
        *,
        class_mask: Optional[Tensor] = None,
        ignore_index: Union[int, List[int]] = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: Optional[float] = None,
        temperature: float = 1.0,
        chunk_size: Optional[int] = None,
        max_kept: Optional[int] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        reduction_number("LinearCrossEntropyLoss", reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("class_mask", class_mask)
        self.ignore_index: List[int] = id_list("LinearCrossEntropyLoss", "ignore_index", ignore_index)
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.max_kept = max_kept
        self.dtype = dtype

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        mask: Optional[Tensor] = None,
        linear_bias: Optional[Tensor] = None,
        sample_weight: Optional[Tensor] = None,
        normalizer: Optional[Union[int, float, Tensor]] = None,
    ) -> Tensor:
        return functional.linear_cross_entropy(
            input,
            linear_weight,
            target,
            mask,
            linear_bias=linear_bias,
            softcap=self.softcap,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
            max_kept=self.max_kept,
            weight=self.weight,
            sample_weight=sample_weight,
            class_mask=self.class_mask,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            normalizer=normalizer,
            dtype=self.dtype,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, "
            f"z_loss={self.z_loss}, softcap={self.softcap}, temperature={self.temperature}, "
            f"chunk_size={self.chunk_size}, max_kept={self.max_kept}, dtype={self.dtype}"
        )


class _PointwiseLoss(nn.Module):
    """What the modules of elementwise losses share: arguments are stored by name, tensors as buffers."""

    dtype: Optional[torch.dtype]

    def __init__(self, reduction: str, dtype: Optional[torch.dtype], **arguments: Union[float, OptionalTensor]) -> None:
        super().__init__()
        reduction_number(type(self).__name__, reduction, batchmean=isinstance(self, KLDivLoss))
        self.reduction = reduction
        self.dtype = dtype
        for name, value in arguments.items():
            if value is None or isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value if isinstance(value, bool) else float(value))

    def extra_repr(self) -> str:
        arguments = {name: value for name, value in vars(self).items() if name in signature(type(self)).parameters}
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


class MSELoss(_PointwiseLoss):
    """:func:`masked_loss.mse_loss` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        {reduction}
        {dtype}

    >>> import torch
    >>> MSELoss()(torch.zeros(2), torch.tensor([2.0, 9.0]), torch.tensor([True, False]))
    tensor(4.)
    """

    def __init__(self, *, reduction: str = "mean", dtype: Optional[torch.dtype] = None) -> None:
        super().__init__(reduction, dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.mse_loss(
            input,
            target,
            mask,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


class L1Loss(_PointwiseLoss):
    """:func:`masked_loss.l1_loss` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        {reduction}
        {dtype}

    >>> import torch
    >>> L1Loss()(torch.zeros(2), torch.tensor([2.0, 9.0]), torch.tensor([True, False]))
    tensor(2.)
    """

    def __init__(self, *, reduction: str = "mean", dtype: Optional[torch.dtype] = None) -> None:
        super().__init__(reduction, dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.l1_loss(
            input,
            target,
            mask,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


class SmoothL1Loss(_PointwiseLoss):
    """:func:`masked_loss.smooth_l1_loss` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        beta: the error at which the loss changes from quadratic to linear, at least 0.
        {reduction}
        {dtype}

    >>> import torch
    >>> SmoothL1Loss(beta=2.0)(torch.zeros(2), torch.tensor([1.0, 9.0]), torch.tensor([True, False]))
    tensor(0.2500)
    """

    def __init__(self, *, beta: float = 1.0, reduction: str = "mean", dtype: Optional[torch.dtype] = None) -> None:
        super().__init__(reduction, dtype, beta=beta)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.smooth_l1_loss(
            input,
            target,
            mask,
            beta=self.beta,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


class HuberLoss(_PointwiseLoss):
    """:func:`masked_loss.huber_loss` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        delta: the error at which the loss changes from quadratic to linear, above 0.
        {reduction}
        {dtype}

    >>> import torch
    >>> HuberLoss(delta=2.0)(torch.zeros(2), torch.tensor([3.0, 9.0]), torch.tensor([True, False]))
    tensor(4.)
    """

    def __init__(self, *, delta: float = 1.0, reduction: str = "mean", dtype: Optional[torch.dtype] = None) -> None:
        super().__init__(reduction, dtype, delta=delta)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.huber_loss(
            input,
            target,
            mask,
            delta=self.delta,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


class BCEWithLogitsLoss(_PointwiseLoss):
    """:func:`masked_loss.binary_cross_entropy_with_logits` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        weight: weights of the elements, broadcast to ``target``; a buffer.
        pos_weight: weights of the positive part of the loss, broadcast to ``target``; a buffer.
        {reduction}
        {dtype}

    >>> import torch
    >>> BCEWithLogitsLoss()(torch.zeros(2), torch.tensor([1.0, 9.0]), torch.tensor([True, False]))
    tensor(0.6931)
    """

    weight: OptionalTensor
    pos_weight: OptionalTensor

    def __init__(
        self,
        weight: OptionalTensor = None,
        *,
        pos_weight: OptionalTensor = None,
        reduction: str = "mean",
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(reduction, dtype, weight=weight, pos_weight=pos_weight)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input,
            target,
            mask,
            weight=self.weight,
            pos_weight=self.pos_weight,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


class BCELoss(_PointwiseLoss):
    """:func:`masked_loss.binary_cross_entropy` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        weight: weights of the elements, broadcast to ``target``; a buffer.
        {reduction}
        {dtype}

    >>> import torch
    >>> BCELoss()(torch.tensor([0.5, 9.0]), torch.ones(2), torch.tensor([True, False]))
    tensor(0.6931)
    """

    weight: OptionalTensor

    def __init__(
        self, weight: OptionalTensor = None, *, reduction: str = "mean", dtype: Optional[torch.dtype] = None
    ) -> None:
        super().__init__(reduction, dtype, weight=weight)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.binary_cross_entropy(
            input,
            target,
            mask,
            weight=self.weight,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


class KLDivLoss(_PointwiseLoss):
    """:func:`masked_loss.kl_div` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        log_target: whether ``target`` holds log-probabilities.
        reduction: ``'none'``, ``'mean'``, ``'sum'``, ``'sequence_mean'`` or ``'batchmean'``.
        {dtype}

    >>> import torch
    >>> KLDivLoss(reduction="batchmean")(torch.tensor([-1.0, 9.0]), torch.ones(2), torch.tensor([True, False]))
    tensor(1.)
    """

    def __init__(
        self, *, log_target: bool = False, reduction: str = "mean", dtype: Optional[torch.dtype] = None
    ) -> None:
        super().__init__(reduction, dtype, log_target=log_target)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.kl_div(
            input,
            target,
            mask,
            log_target=self.log_target,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


class PoissonNLLLoss(_PointwiseLoss):
    """:func:`masked_loss.poisson_nll_loss` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        log_input: whether ``input`` holds logarithms of rates.
        full: whether to add Stirling's approximation.
        eps: added to a rate before its logarithm is taken; used only without ``log_input``.
        {reduction}
        {dtype}

    >>> import torch
    >>> PoissonNLLLoss()(torch.zeros(2), torch.tensor([3.0, 9.0]), torch.tensor([True, False]))
    tensor(1.)
    """

    def __init__(
        self,
        log_input: bool = True,
        full: bool = False,
        *,
        eps: float = 1e-8,
        reduction: str = "mean",
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(reduction, dtype, log_input=log_input, full=full, eps=eps)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.poisson_nll_loss(
            input,
            target,
            mask,
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


class GaussianNLLLoss(_PointwiseLoss):
    """:func:`masked_loss.gaussian_nll_loss` as a module.

    ``forward`` takes ``(input, target, var, mask=None, sample_weight=None, normalizer=None)``. The function describes
    all arguments, their shapes and the errors.

    Args:
        full: whether to add the constant.
        eps: lower bound of the variances, above 0.
        {reduction}
        {dtype}

    >>> import torch
    >>> GaussianNLLLoss()(torch.zeros(2), torch.tensor([2.0, 9.0]), 1.0, torch.tensor([True, False]))
    tensor(2.)
    """

    def __init__(
        self, *, full: bool = False, eps: float = 1e-6, reduction: str = "mean", dtype: Optional[torch.dtype] = None
    ) -> None:
        super().__init__(reduction, dtype, full=full, eps=eps)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        var: Union[int, float, Tensor],
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.gaussian_nll_loss(
            input,
            target,
            var,
            mask,
            full=self.full,
            eps=self.eps,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


class SigmoidFocalLoss(_PointwiseLoss):
    """:func:`masked_loss.sigmoid_focal_loss` as a module.

    ``forward`` takes ``(input, target, mask=None, sample_weight=None, normalizer=None)``. The function describes all
    arguments, their shapes and the errors.

    Args:
        alpha: the weight of positive labels, in [0, 1]. If it is negative, both weights are 1.
        gamma: the exponent, at least 0.
        {reduction}
        {dtype}

    >>> import torch
    >>> SigmoidFocalLoss()(torch.zeros(2), torch.tensor([1.0, 9.0]), torch.tensor([True, False]))
    tensor(0.0433)
    """

    def __init__(
        self, *, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "mean", dtype: Optional[torch.dtype] = None
    ) -> None:
        super().__init__(reduction, dtype, alpha=alpha, gamma=gamma)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: OptionalTensor = None,
        sample_weight: OptionalTensor = None,
        normalizer: Divisor = None,
    ) -> Tensor:
        return functional.sigmoid_focal_loss(
            input,
            target,
            mask,
            alpha=self.alpha,
            gamma=self.gamma,
            sample_weight=sample_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dtype=self.dtype,
        )


share_text(
    [
        CrossEntropyLoss,
        LinearCrossEntropyLoss,
        MSELoss,
        L1Loss,
        SmoothL1Loss,
        HuberLoss,
        BCEWithLogitsLoss,
        BCELoss,
        SigmoidFocalLoss,
        KLDivLoss,
        PoissonNLLLoss,
        GaussianNLLLoss,
    ],
    reduction="""
        reduction: ``'none'``, ``'mean'``, ``'sum'`` or ``'sequence_mean'``.
    """,
    dtype="""
        dtype: dtype of the result; by default that of the operands, or float32 for float16 and bfloat16 under autocast.
    """,
)
