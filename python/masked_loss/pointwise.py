"""Elementwise losses with a mask: regression, binary and count targets, divergences."""

import warnings
from typing import List, Optional, Union

import torch
from torch import Tensor

from ._arguments import normalizer_tensor, reduction_number
from ._dispatch import bound, scriptable, use_bound
from ._docstrings import share_text

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

    The loss of an element with ``weight`` :math:`w` is

    .. math:: \ell = w\, (x - t)^2

    It is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is :math:`\sum s \ell / \sum s w` over the unmasked
    elements. Without a mask this is :func:`torch.nn.functional.mse_loss`. If every element is masked, the loss is 0
    with a zero gradient instead of NaN.

    Args:
        input: float32, float64, bfloat16 or float16.
        target: the true values; differentiable. As in torch, a shape other than ``input``'s gives a warning.
        {mask}
        weight: weights of the elements, in the loss and in its mean; differentiable.
        {sample_weight}
        {reduction}
        {normalizer}
        {dtype}

    Shape:
        - ``input``, ``target``: any shapes that broadcast to a common shape S.
        - ``mask``, ``weight``, ``sample_weight``: the rank of S, each size equal or 1.
        - Output: S for ``'none'``, otherwise 0-d.

    Returns:
        {returns}

    Raises:
        {raises}

    With NaN at a masked element:

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

    The loss of an element with ``weight`` :math:`w` is

    .. math:: \ell = w\, |x - t|

    It is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is :math:`\sum s \ell / \sum s w` over the unmasked
    elements. Without a mask this is :func:`torch.nn.functional.l1_loss`. If every element is masked, the loss is 0 with
    a zero gradient instead of NaN.

    Args:
        input: float32, float64, bfloat16 or float16.
        target: the true values; differentiable. As in torch, a shape other than ``input``'s gives a warning.
        {mask}
        weight: weights of the elements, in the loss and in its mean; differentiable.
        {sample_weight}
        {reduction}
        {normalizer}
        {dtype}

    Shape:
        - ``input``, ``target``: any shapes that broadcast to a common shape S.
        - ``mask``, ``weight``, ``sample_weight``: the rank of S, each size equal or 1.
        - Output: S for ``'none'``, otherwise 0-d.

    Returns:
        {returns}

    Raises:
        {raises}

    With NaN at a masked element:

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

    It is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is :math:`\sum s \ell / \sum s` over the unmasked
    elements. Without a mask this is :func:`torch.nn.functional.smooth_l1_loss`. If every element is masked, the loss is
    0 with a zero gradient instead of NaN.

    Args:
        input: float32, float64, bfloat16 or float16.
        target: the true values; differentiable. As in torch, a shape other than ``input``'s gives a warning.
        {mask}
        beta: the error at which the loss changes from quadratic to linear, at least 0. With 0 this is :func:`l1_loss`.
        {sample_weight}
        {reduction}
        {normalizer}
        {dtype}

    {shape}

    Returns:
        {returns}

    Raises:
        {raises}

    Source: `Girshick 2015 <https://arxiv.org/abs/1504.08083>`__.

    With NaN at a masked element:

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

    With :math:`z = |x - t|` the loss of an element with ``weight`` :math:`w` is

    .. math:: \ell = \begin{cases} w\, z^2 / 2 & z < \delta \\ w\, \delta (z - \delta / 2) & \text{otherwise}
              \end{cases}

    It is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is :math:`\sum s \ell / \sum s` over the unmasked
    elements. Without a mask this is :func:`torch.nn.functional.huber_loss`. If every element is masked, the loss is 0
    with a zero gradient instead of NaN.

    Args:
        input: float32, float64, bfloat16 or float16.
        target: the true values; differentiable. As in torch, a shape other than ``input``'s gives a warning.
        {mask}
        weight: weights of the elements; differentiable. As in torch, ``'mean'`` does not divide by them.
        delta: the error at which the loss changes from quadratic to linear, above 0.
        {sample_weight}
        {reduction}
        {normalizer}
        {dtype}

    Shape:
        - ``input``, ``target``: any shapes that broadcast to a common shape S.
        - ``mask``, ``weight``, ``sample_weight``: the rank of S, each size equal or 1.
        - Output: S for ``'none'``, otherwise 0-d.

    Returns:
        {returns}

    Raises:
        {raises}

    Source: `Huber 1964 <https://doi.org/10.1214/aoms/1177703732>`__.

    With NaN at a masked element:

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

    With the logistic function :math:`\sigma`, ``weight`` :math:`w` and ``pos_weight`` :math:`p` the loss of an element
    is

    .. math:: \ell = -w \left( p\, t \log \sigma(x) + (1 - t) \log(1 - \sigma(x)) \right)

    It is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is :math:`\sum s \ell / \sum s` over the unmasked
    elements. Without a mask this is :func:`torch.nn.functional.binary_cross_entropy_with_logits`. If every element is
    masked, the loss is 0 with a zero gradient instead of NaN.

    Args:
        input: logits; float32, float64, bfloat16 or float16.
        target: labels in [0, 1]; differentiable.
        {mask}
        weight: weights of the elements; differentiable. As in torch, ``'mean'`` does not divide by them.
        pos_weight: weights of the positive part of the loss; they must not require grad.
        {sample_weight}
        {reduction}
        {normalizer}
        {dtype}

    Shape:
        - ``input``, ``target``: the same shape S.
        - ``mask``, ``sample_weight``: the rank of S, each size equal or 1.
        - ``weight``, ``pos_weight``: any shape that broadcasts to S, such as ``(C,)``.
        - Output: S for ``'none'``, otherwise 0-d.

    Returns:
        {returns}

    Raises:
        {raises}

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

    The loss of an element with ``weight`` :math:`w` is

    .. math:: \ell = -w \left( t \log x + (1 - t) \log(1 - x) \right)

    where each logarithm is at least -100. It is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is
    :math:`\sum s \ell / \sum s` over the unmasked elements. Without a mask this is
    :func:`torch.nn.functional.binary_cross_entropy`. If every element is masked, the loss is 0 with a zero gradient
    instead of NaN. :func:`binary_cross_entropy_with_logits` is numerically more accurate.

    Args:
        input: probabilities; float32, float64, bfloat16 or float16.
        target: labels in [0, 1]; differentiable.
        {mask}
        weight: weights of the elements; differentiable. As in torch, ``'mean'`` does not divide by them.
        {sample_weight}
        {reduction}
        {normalizer}
        {dtype}

    Shape:
        - ``input``, ``target``: the same shape S.
        - ``mask``, ``sample_weight``: the rank of S, each size equal or 1.
        - ``weight``: any shape that broadcasts to S, such as ``(C,)``.
        - Output: S for ``'none'``, otherwise 0-d.

    Returns:
        {returns}

    Raises:
        ValueError: an unmasked ``input`` or ``target`` is outside [0, 1]; the message names its position. If values
            cannot be read, its loss is NaN instead: under ``torch.vmap``, and on a GPU without ``MASKED_LOSS_CHECK=1``
            in the environment.
        {raises}

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
    r"""Kullback-Leibler divergence, element by element, over the elements that ``mask`` keeps.

    The loss of an element is

    .. math:: \ell = t\, (\log t - x)

    and 0 where :math:`t = 0`. It is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is
    :math:`\sum s \ell / \sum s` over the unmasked elements. It counts classes as well as positions, and gives torch's
    warning. For the divergence of each distribution ``[B, T, C]``, averaged over unmasked positions ``mask``
    ``[B, T]``, pass ``mask[..., None]`` and ``normalizer=mask.sum()``. Without a mask this is
    :func:`torch.nn.functional.kl_div`. If every element is masked, the loss is 0 with a zero gradient instead of NaN.

    Args:
        input: log-probabilities; float32, float64, bfloat16 or float16.
        target: probabilities, or log-probabilities if ``log_target``; differentiable.
        {mask}
        log_target: whether ``target`` holds log-probabilities.
        {sample_weight}
        reduction: ``'none'``, ``'mean'``, ``'sum'``, ``'sequence_mean'`` or ``'batchmean'``. ``'sequence_mean'`` takes
            the weighted mean of each sequence (each index of dim 0), then the mean over the sequences that have
            unmasked elements. ``'batchmean'`` divides the weighted sum by the number of indices of dim 0 that have
            unmasked elements.
        normalizer: a number or a 0-d tensor without gradient, at least 0. ``'mean'`` divides by it instead of the sum
            of the weights, ``'sequence_mean'`` and ``'batchmean'`` instead of the number of indices of dim 0. Use it
            for a count over several micro-batches or processes.
        {dtype}

    {shape}

    Returns:
        {returns}

    Raises:
        {raises}

    Source: `Kullback and Leibler 1951 <https://doi.org/10.1214/aoms/1177729694>`__.

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
    r"""Negative log-likelihood of counts under Poisson distributions, over the elements that ``mask`` keeps.

    The loss of an element is

    .. math:: \ell = \begin{cases} e^x - t\, x & \text{with log\_input} \\ x - t \log(x + \varepsilon) &
              \text{without} \end{cases}

    With ``full``, Stirling's approximation of :math:`\log t!`, which is :math:`t \log t - t + \log(2 \pi t) / 2`, is
    added where :math:`t > 1`. The sum is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is
    :math:`\sum s \ell / \sum s` over the unmasked elements. Without a mask this is
    :func:`torch.nn.functional.poisson_nll_loss`. If every element is masked, the loss is 0 with a zero gradient instead
    of NaN.

    Args:
        input: rates, or their logarithms if ``log_input``; float32, float64, bfloat16 or float16.
        target: counts; differentiable.
        {mask}
        log_input: whether ``input`` holds logarithms of rates.
        full: whether to add Stirling's approximation.
        eps: added to a rate before its logarithm is taken; used only without ``log_input``.
        {sample_weight}
        {reduction}
        {normalizer}
        {dtype}

    {shape}

    Returns:
        {returns}

    Raises:
        {raises}

    With NaN at a masked element:

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
    r"""Negative log-likelihood under normal distributions, over the elements that ``mask`` keeps.

    With the variance :math:`v = \max(\mathit{var}, \varepsilon)` the loss of an element is

    .. math:: \ell = \frac{1}{2} \left( \log v + \frac{(x - t)^2}{v} \right)

    With ``full``, :math:`\log(2 \pi) / 2` is added. The sum is multiplied by its ``sample_weight`` :math:`s`.
    ``'mean'`` is :math:`\sum s \ell / \sum s` over the unmasked elements. Without a mask this is
    :func:`torch.nn.functional.gaussian_nll_loss`. If every element is masked, the loss is 0 with a zero gradient
    instead of NaN.

    Args:
        input: means; float32, float64, bfloat16 or float16.
        target: the true values; differentiable.
        var: variances, at least 0: a tensor, or a number for all elements; differentiable.
        {mask}
        full: whether to add the constant.
        eps: lower bound of the variances, above 0. The gradient of ``var`` ignores it, as in torch.
        {sample_weight}
        {reduction}
        {normalizer}
        {dtype}

    Shape:
        - ``input``, ``target``: any shapes that broadcast to a common shape S.
        - ``var``: a number; or the rank of S, each size equal or 1; or S without its last dimension.
        - ``mask``, ``sample_weight``: the rank of S, each size equal or 1.
        - Output: S for ``'none'``, otherwise 0-d.

    Returns:
        {returns}

    Raises:
        ValueError: an unmasked variance is negative; the message names its position. If values cannot be read, its loss
            is NaN instead: under ``torch.vmap``, and on a GPU without ``MASKED_LOSS_CHECK=1`` in the environment.
        {raises}

    Source: `Nix and Weigend 1994 <https://doi.org/10.1109/ICNN.1994.374138>`__.

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
    r"""Binary cross entropy of logits that gives easy elements less weight, over the elements that ``mask`` keeps.

    With :math:`p_t = t\, \sigma(x) + (1 - t)(1 - \sigma(x))` and :math:`\alpha_t = \alpha t + (1 - \alpha)(1 - t)` the
    loss of an element is

    .. math:: \ell = -\alpha_t\, (1 - p_t)^\gamma \left( t \log \sigma(x) + (1 - t) \log(1 - \sigma(x)) \right)

    It is multiplied by its ``sample_weight`` :math:`s`. ``'mean'`` is :math:`\sum s \ell / \sum s` over the unmasked
    elements. Without a mask this is torchvision's ``sigmoid_focal_loss``, except that ``reduction`` is ``'mean'`` by
    default. If every element is masked, the loss is 0 with a zero gradient instead of NaN.

    Args:
        input: logits; float32, float64, bfloat16 or float16.
        target: labels in [0, 1]; differentiable.
        {mask}
        alpha: the weight of positive labels, in [0, 1]; negative labels have 1 - alpha. If it is negative, both weights
            are 1.
        gamma: the exponent, at least 0. With 0 easy elements have full weight.
        {sample_weight}
        {reduction}
        {normalizer}
        {dtype}

    Shape:
        - ``input``, ``target``: the same shape S.
        - ``mask``, ``sample_weight``: the rank of S, each size equal or 1.
        - Output: S for ``'none'``, otherwise 0-d.

    Returns:
        {returns}

    Raises:
        {raises}

    Source: `Lin et al. 2017 <https://arxiv.org/abs/1708.02002>`__.

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


share_text(
    [
        mse_loss,
        l1_loss,
        smooth_l1_loss,
        huber_loss,
        binary_cross_entropy_with_logits,
        binary_cross_entropy,
        kl_div,
        poisson_nll_loss,
        gaussian_nll_loss,
        sigmoid_focal_loss,
    ],
    mask="""
        mask: bool, or integers 0 and 1. True (1) = keep. Masked elements are not read: NaN or inf there changes
            nothing, and their gradient is exactly 0.
    """,
    sample_weight="""
        sample_weight: weights of the elements, in the loss and in its mean; differentiable. An element with weight 0
            is masked, unless ``sample_weight`` requires grad.
    """,
    reduction="""
        reduction: ``'none'``, ``'mean'``, ``'sum'`` or ``'sequence_mean'``. ``'sequence_mean'`` takes the weighted
            mean of each sequence (each index of dim 0), then the mean over the sequences that have unmasked elements.
    """,
    normalizer="""
        normalizer: a number or a 0-d tensor without gradient, at least 0. ``'mean'`` divides by it instead of the sum
            of the weights, ``'sequence_mean'`` instead of the number of sequences. Use it for a count over several
            micro-batches or processes.
    """,
    dtype="""
        dtype: dtype of the result. By default what ``input`` and ``target`` promote to, or float32 for float16 and
            bfloat16 under autocast. With ``torch.float32``, inputs of these dtypes are not copied. With
            ``torch.float64``, the loss is computed in float64.
    """,
    shape="""
        Shape:
            - ``input``, ``target``: any shapes that broadcast to a common shape S.
            - ``mask``, ``sample_weight``: the rank of S, each size equal or 1. For ``[B, T, D]``, a mask of
              positions ``[B, T]`` becomes ``mask[..., None]``.
            - Output: S for ``'none'``, otherwise 0-d.
    """,
    returns="""
        The loss of each element for ``'none'``, otherwise a 0-d tensor; in ``dtype``.
    """,
    raises="""
        TypeError: an argument has a wrong type or dtype, such as a float mask or a ``DTensor``.
        ValueError: a value is out of range, such as an integer mask with values other than 0 and 1.
        RuntimeError: an argument has a wrong shape or is on a wrong device.
    """,
)
