"""Elementwise losses with a mask: regression, binary and count targets, divergences."""

import warnings
from typing import List, Optional, Union

import torch
from torch import Tensor

from ._arguments import normalizer_tensor, reduction_number
from ._dispatch import bound, scriptable, use_bound

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "gaussian_nll_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "poisson_nll_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]


def __dir__() -> List[str]:
    return __all__


def _variance(var: Union[int, float, Tensor], input: Tensor, target: Tensor) -> Tensor:
    if isinstance(var, Tensor):
        return var
    if not torch.jit.is_scripting():
        known = isinstance(input, Tensor) and isinstance(target, Tensor)
        if not torch.compiler.is_compiling() and not (known and hasattr(var, "__float__")):
            return var  # an error that is told where they are looked at
    # One number for all elements, of the rank that a variance has.
    sizes: List[int] = [1] * max(input.dim(), target.dim())
    dtype = input.dtype if input.is_floating_point() else target.dtype
    return torch.full(sizes, var, dtype=dtype, device=input.device)


def _warn_of_sizes(input: Tensor, target: Tensor) -> None:
    """torch's warning of a target that broadcasts, in its words, at the call of the loss."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return  # Dynamo cannot trace a warning, and a trace warns of the comparison
        if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
            return  # an error that is told where they are looked at
    if target.size() != input.size():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )


def _warn_of_mean() -> None:
    """The same of a mean of a divergence."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_compiling():
            return
    warnings.warn(
        "reduction: 'mean' divides the total loss by both the batch size and the support size."
        "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
        "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
        stacklevel=3,
    )


@scriptable
def mse_loss(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Squared error over the elements that ``mask`` keeps.

    The loss of an element is

    .. math:: \ell = w\, (x - t)^2

    with its ``weight`` :math:`w`, times its ``sample_weight`` :math:`s`; ``'mean'`` is :math:`\sum s \ell / \sum s w`
    over what is kept. Without a mask this is :func:`torch.nn.functional.mse_loss`, but for one point: where nothing is
    kept, the loss is 0 with a zero gradient instead of NaN.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        target: broadcasts with ``input``; differentiable. As in torch, sizes that differ give a warning.
        mask: True (1) = keep. bool, or an integer dtype that holds 0 and 1; the rank of the unreduced loss, each size
            equal or 1. What lies at a masked position (NaN, inf, ...) changes nothing, and its gradient is exactly 0.
        weight: weights of the elements, as the namesake's; the rank of the unreduced loss, each size equal or 1;
            differentiable.
        sample_weight: weights of the elements, of the same sizes; differentiable. 0 masks, unless it requires grad.
        reduction: ``'none'``, ``'mean'``, ``'sum'``, or ``'sequence_mean'``: the mean over the sequences (dim 0) with
            something kept of each one's weighted mean.
        normalizer: number or 0-d tensor that ``'mean'`` divides by instead (a global count); with
            ``'sequence_mean'``, instead of the number of sequences.
        dtype: of the result: float32 for half types costs no copy of them, float64 is what the loss is computed in.
            By default what ``input`` and ``target`` promote to, or float32 for half types under autocast.

    Returns:
        the shape that ``input`` and ``target`` broadcast to for ``'none'``, else 0-d; in ``dtype``.

    Raises:
        TypeError: a wrong dtype, such as a float mask.
        ValueError: an argument outside its range.
        RuntimeError: a wrong shape or device.

    >>> mse_loss(torch.tensor([1.0, 2.0, float("nan")]), torch.zeros(3), torch.tensor([True, True, False]))
    tensor(2.5000)
    """
    number = reduction_number("mse_loss", reduction)
    _warn_of_sizes(input, target)
    divisor = normalizer_tensor("mse_loss", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, weight, sample_weight, divisor):
            return bound.mse_loss(input, target, mask, number, weight, sample_weight, divisor, dtype)
    return torch.ops.masked_loss.mse_loss(input, target, mask, number, weight, sample_weight, divisor, dtype)


@scriptable
def l1_loss(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Absolute error over the elements that ``mask`` keeps.

    The loss of an element is

    .. math:: \ell = w\, |x - t|

    with its ``weight`` :math:`w`, times its ``sample_weight`` :math:`s`; ``'mean'`` is :math:`\sum s \ell / \sum s w`
    over what is kept. Without a mask this is :func:`torch.nn.functional.l1_loss`, but where nothing is kept the loss
    is 0 with a zero gradient instead of NaN.

    Args:
        input, target, weight: as in :func:`mse_loss`.
        mask, sample_weight, reduction, normalizer, dtype: as in :func:`mse_loss`.

    Returns, raises:
        as :func:`mse_loss`.

    >>> l1_loss(torch.tensor([1.0, -2.0, float("nan")]), torch.zeros(3), torch.tensor([True, True, False]))
    tensor(1.5000)
    """
    number = reduction_number("l1_loss", reduction)
    _warn_of_sizes(input, target)
    divisor = normalizer_tensor("l1_loss", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, weight, sample_weight, divisor):
            return bound.l1_loss(input, target, mask, number, weight, sample_weight, divisor, dtype)
    return torch.ops.masked_loss.l1_loss(input, target, mask, number, weight, sample_weight, divisor, dtype)


@scriptable
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    beta: float = 1.0,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Squared error below ``beta`` and absolute error above, over the elements that ``mask`` keeps.

    With :math:`z = |x - t|` the loss of an element is

    .. math:: \ell = \begin{cases} z^2 / (2 \beta) & z < \beta \\ z - \beta / 2 & \text{otherwise} \end{cases}

    times its ``sample_weight``, whose kept sum ``'mean'`` divides by. Without a mask this is
    :func:`torch.nn.functional.smooth_l1_loss`, but where nothing is kept the loss is 0 with a zero gradient instead of
    NaN.

    Args:
        input, target: as in :func:`mse_loss`.
        beta: where the two meet, at least 0; at 0 this is :func:`l1_loss`.
        mask, sample_weight, reduction, normalizer, dtype: as in :func:`mse_loss`.

    Returns, raises:
        as :func:`mse_loss`.

    Source: Girshick 2015.

    >>> smooth_l1_loss(torch.tensor([1.0, -3.0, float("nan")]), torch.zeros(3), torch.tensor([True, True, False]))
    tensor(1.5000)
    """
    number = reduction_number("smooth_l1_loss", reduction)
    _warn_of_sizes(input, target)
    divisor = normalizer_tensor("smooth_l1_loss", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, sample_weight, divisor):
            return bound.smooth_l1_loss(input, target, mask, number, beta, sample_weight, divisor, dtype)
    return torch.ops.masked_loss.smooth_l1_loss(input, target, mask, number, beta, sample_weight, divisor, dtype)


@scriptable
def huber_loss(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    weight: Optional[Tensor] = None,
    delta: float = 1.0,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Squared error below ``delta`` and absolute error above, over the elements that ``mask`` keeps.

    With :math:`z = |x - t|` the loss of an element is

    .. math:: \ell = \begin{cases} w\, z^2 / 2 & z < \delta \\ w\, \delta (z - \delta / 2) & \text{otherwise}
              \end{cases}

    times its ``sample_weight``, whose kept sum ``'mean'`` divides by. Without a mask this is
    :func:`torch.nn.functional.huber_loss`, but where nothing is kept the loss is 0 with a zero gradient instead of NaN.

    Args:
        input, target: as in :func:`mse_loss`.
        delta: where the two meet, above 0.
        weight: as in :func:`mse_loss`, but ``'mean'`` does not divide by it, as the namesake's does not.
        mask, sample_weight, reduction, normalizer, dtype: as in :func:`mse_loss`.

    Returns, raises:
        as :func:`mse_loss`.

    Source: Huber 1964.

    >>> huber_loss(torch.tensor([1.0, -3.0, float("nan")]), torch.zeros(3), torch.tensor([True, True, False]))
    tensor(1.5000)
    """
    number = reduction_number("huber_loss", reduction)
    _warn_of_sizes(input, target)
    divisor = normalizer_tensor("huber_loss", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, weight, sample_weight, divisor):
            return bound.huber_loss(input, target, mask, number, delta, weight, sample_weight, divisor, dtype)
    return torch.ops.masked_loss.huber_loss(input, target, mask, number, delta, weight, sample_weight, divisor, dtype)


@scriptable
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    weight: Optional[Tensor] = None,
    pos_weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Binary cross entropy of logits over the elements that ``mask`` keeps.

    With :math:`\sigma` the logistic function, ``weight`` :math:`w` and ``pos_weight`` :math:`p` the loss of an element
    is

    .. math:: \ell = -w \left( p\, t \log \sigma(x) + (1 - t) \log(1 - \sigma(x)) \right)

    times its ``sample_weight``, whose kept sum ``'mean'`` divides by. Without a mask this is
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`, but where nothing is kept the loss is 0 with a zero
    gradient instead of NaN.

    Args:
        input: logits, any shape; float32, float64, bfloat16 or float16.
        target: probabilities, ``input``'s shape; differentiable.
        weight: weights of the elements, such as ``(C,)``; broadcasts to ``target``; differentiable. ``'mean'`` does not
            divide by it, as the namesake's does not.
        pos_weight: weights of positive targets, such as ``(C,)``; broadcasts to ``target``.
        mask, sample_weight, reduction, normalizer, dtype: as in :func:`mse_loss`.

    Returns, raises:
        as :func:`mse_loss`.

    >>> logits, labels = torch.tensor([[2.0, -1.0, 5.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    >>> binary_cross_entropy_with_logits(logits, labels, labels >= 0)
    tensor(0.2201)
    """
    number = reduction_number("binary_cross_entropy_with_logits", reduction)
    divisor = normalizer_tensor("binary_cross_entropy_with_logits", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, weight, pos_weight, sample_weight, divisor):
            return bound.binary_cross_entropy_with_logits(
                input, target, mask, number, weight, pos_weight, sample_weight, divisor, dtype
            )
    return torch.ops.masked_loss.binary_cross_entropy_with_logits(
        input, target, mask, number, weight, pos_weight, sample_weight, divisor, dtype
    )


@scriptable
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Binary cross entropy of probabilities over the elements that ``mask`` keeps.

    With ``weight`` :math:`w`, and logarithms of at least -100, the loss of an element is

    .. math:: \ell = -w \left( t \log x + (1 - t) \log(1 - x) \right)

    times its ``sample_weight``, whose kept sum ``'mean'`` divides by. Without a mask this is
    :func:`torch.nn.functional.binary_cross_entropy`, but where nothing is kept the loss is 0 with a zero gradient
    instead of NaN. :func:`binary_cross_entropy_with_logits` is the more exact one.

    Args:
        input: probabilities, any shape; float32, float64, bfloat16 or float16.
        target: probabilities, ``input``'s shape; differentiable.
        weight: weights of the elements, such as ``(C,)``; broadcasts to ``target``; differentiable. ``'mean'`` does not
            divide by it, as the namesake's does not.
        mask, sample_weight, reduction, normalizer, dtype: as in :func:`mse_loss`.

    Returns:
        as :func:`mse_loss`.

    Raises:
        ValueError: a kept ``input`` or ``target`` outside [0, 1]; the message names its position. Where values cannot
            be read its loss is NaN instead: under ``torch.vmap``, and on a GPU without ``MASKED_LOSS_CHECK=1`` in the
            environment.
        TypeError, ValueError, RuntimeError: as :func:`mse_loss`.

    >>> binary_cross_entropy(torch.tensor([0.5, 7.0]), torch.tensor([1.0, 1.0]), torch.tensor([True, False]))
    tensor(0.6931)
    """
    number = reduction_number("binary_cross_entropy", reduction)
    divisor = normalizer_tensor("binary_cross_entropy", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, weight, sample_weight, divisor):
            return bound.binary_cross_entropy(input, target, mask, number, weight, sample_weight, divisor, dtype)
    return torch.ops.masked_loss.binary_cross_entropy(
        input, target, mask, number, weight, sample_weight, divisor, dtype
    )


@scriptable
def kl_div(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    log_target: bool = False,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of log-probabilities from targets, over the elements that ``mask`` keeps.

    The loss of an element is

    .. math:: \ell = t\, (\log t - x)

    (0 where :math:`t = 0`) times its ``sample_weight``, whose kept sum ``'mean'`` divides by. Without a mask this is
    :func:`torch.nn.functional.kl_div`, but where nothing is kept the loss is 0 with a zero gradient instead of NaN.

    Args:
        input: log-probabilities, any shape; float32, float64, bfloat16 or float16.
        target: probabilities, or with ``log_target`` their logarithms; broadcasts with ``input``; differentiable.
        log_target: whether ``target`` holds logarithms.
        mask, sample_weight: as in :func:`mse_loss`.
        reduction: as in :func:`mse_loss`, or ``'batchmean'``: the weighted sum, divided by the number of slices along
            dim 0 with something kept, which is the divergence itself where a slice is a distribution.
        normalizer, dtype: as in :func:`mse_loss`; with ``'batchmean'`` the normalizer stands for the number of slices.

    Returns, raises:
        as :func:`mse_loss`.

    Source: Kullback and Leibler 1951.

    >>> log_p, q = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0], [9.0, 9.0]])
    >>> kl_div(log_p, q, torch.tensor([[True], [False]]), reduction="batchmean")
    tensor(0.6931)
    """
    number = reduction_number("kl_div", reduction, batchmean=True)
    if reduction == "mean" and normalizer is None:
        _warn_of_mean()
    divisor = normalizer_tensor("kl_div", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, sample_weight, divisor):
            return bound.kl_div(input, target, mask, number, log_target, sample_weight, divisor, dtype)
    return torch.ops.masked_loss.kl_div(input, target, mask, number, log_target, sample_weight, divisor, dtype)


@scriptable
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Negative log-likelihood of counts from Poisson distributions, over the elements that ``mask`` keeps.

    The loss of an element is

    .. math:: \ell = \begin{cases} e^x - t\, x & \text{with log\_input} \\ x - t \log(x + \varepsilon) &
              \text{without} \end{cases}

    plus, with ``full``, Stirling's formula for :math:`\log t!` where :math:`t > 1`; times its ``sample_weight``, whose
    kept sum ``'mean'`` divides by. Without a mask this is :func:`torch.nn.functional.poisson_nll_loss`, but where
    nothing is kept the loss is 0 with a zero gradient instead of NaN.

    Args:
        input: rates, or with ``log_input`` their logarithms; any shape; float32, float64, bfloat16 or float16.
        target: counts; broadcasts with ``input``; differentiable.
        log_input: whether ``input`` holds logarithms.
        full: whether to add Stirling's term, :math:`t \log t - t + \log(2 \pi t) / 2`.
        eps: added to a rate before its logarithm is taken.
        mask, sample_weight, reduction, normalizer, dtype: as in :func:`mse_loss`.

    Returns, raises:
        as :func:`mse_loss`.

    >>> poisson_nll_loss(torch.zeros(2), torch.tensor([3.0, float("nan")]), torch.tensor([True, False]))
    tensor(1.)
    """
    number = reduction_number("poisson_nll_loss", reduction)
    divisor = normalizer_tensor("poisson_nll_loss", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, sample_weight, divisor):
            return bound.poisson_nll_loss(
                input, target, mask, number, log_input, full, eps, sample_weight, divisor, dtype
            )
    return torch.ops.masked_loss.poisson_nll_loss(
        input, target, mask, number, log_input, full, eps, sample_weight, divisor, dtype
    )


@scriptable
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Union[int, float, Tensor],
    mask: Optional[Tensor] = None,
    *,
    full: bool = False,
    eps: float = 1e-6,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Negative log-likelihood of normal distributions, over the elements that ``mask`` keeps.

    With variance :math:`v = \max(\mathit{var}, \varepsilon)` the loss of an element is

    .. math:: \ell = \frac{1}{2} \left( \log v + \frac{(x - t)^2}{v} \right)

    plus, with ``full``, :math:`\log(2 \pi) / 2`; times its ``sample_weight``, whose kept sum ``'mean'`` divides by.
    Without a mask this is :func:`torch.nn.functional.gaussian_nll_loss`, but where nothing is kept the loss is 0 with a
    zero gradient instead of NaN.

    Args:
        input: means, any shape; float32, float64, bfloat16 or float16.
        target: broadcasts with ``input``; differentiable.
        var: variances: a number, or a tensor of the shape of the unreduced loss, each size equal or 1, or of that
            shape without its last dimension; differentiable, as if ``eps`` were not.
        full: whether to add the constant.
        eps: the least variance, above 0.
        mask, sample_weight, reduction, normalizer, dtype: as in :func:`mse_loss`.

    Returns:
        as :func:`mse_loss`.

    Raises:
        ValueError: a kept variance below 0; the message names its position. Where values cannot be read its loss is NaN
            instead: under ``torch.vmap``, and on a GPU without ``MASKED_LOSS_CHECK=1`` in the environment.
        TypeError, ValueError, RuntimeError: as :func:`mse_loss`.

    Source: Nix and Weigend 1994.

    >>> mean, var = torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0])
    >>> gaussian_nll_loss(mean, torch.zeros(2), var, torch.tensor([True, False]))
    tensor(0.5000)
    """
    number = reduction_number("gaussian_nll_loss", reduction)
    divisor = normalizer_tensor("gaussian_nll_loss", normalizer, input)
    variance = _variance(var, input, target)
    if not torch.jit.is_scripting():
        if use_bound(input, target, variance, mask, sample_weight, divisor):
            return bound.gaussian_nll_loss(
                input, target, variance, mask, number, full, eps, sample_weight, divisor, dtype
            )
    return torch.ops.masked_loss.gaussian_nll_loss(
        input, target, variance, mask, number, full, eps, sample_weight, divisor, dtype
    )


@scriptable
def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    sample_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[int, float, Tensor]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    r"""Binary cross entropy of logits that counts easy elements less, over the elements that ``mask`` keeps.

    With :math:`p_t = t\, \sigma(x) + (1 - t)(1 - \sigma(x))` and :math:`\alpha_t = \alpha t + (1 - \alpha)(1 - t)` the
    loss of an element is

    .. math:: \ell = -\alpha_t\, (1 - p_t)^\gamma \left( t \log \sigma(x) + (1 - t) \log(1 - \sigma(x)) \right)

    times its ``sample_weight``, whose kept sum ``'mean'`` divides by. Without a mask this is torchvision's
    ``sigmoid_focal_loss``, whose ``reduction`` is ``'none'`` by default; where nothing is kept the loss is 0 with a
    zero gradient instead of NaN.

    Args:
        input: logits, any shape; float32, float64, bfloat16 or float16.
        target: probabilities, ``input``'s shape; differentiable.
        alpha: the weight of positive targets, in [0, 1]; below 0 there are no such weights.
        gamma: the power, at least 0; at 0 nothing counts less.
        mask, sample_weight, reduction, normalizer, dtype: as in :func:`mse_loss`.

    Returns, raises:
        as :func:`mse_loss`.

    Source: Lin et al. 2017.

    >>> sigmoid_focal_loss(torch.tensor([0.0, 9.0]), torch.tensor([1.0, -1.0]), torch.tensor([True, False]))
    tensor(0.0433)
    """
    number = reduction_number("sigmoid_focal_loss", reduction)
    divisor = normalizer_tensor("sigmoid_focal_loss", normalizer, input)
    if not torch.jit.is_scripting():
        if use_bound(input, target, mask, sample_weight, divisor):
            return bound.sigmoid_focal_loss(input, target, mask, number, alpha, gamma, sample_weight, divisor, dtype)
    return torch.ops.masked_loss.sigmoid_focal_loss(
        input, target, mask, number, alpha, gamma, sample_weight, divisor, dtype
    )
