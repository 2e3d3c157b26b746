"""PyTorch's losses with a mask. Masked positions are left out of the loss, its mean and its gradient."""

import torch

from ._build import built_for_torch
from ._build import version as __version__

if torch.__version__.split(".")[:2] != built_for_torch.split(".")[:2]:
    raise ImportError(
        f"masked_loss {__version__} was built for torch {built_for_torch} and cannot be loaded by torch "
        f"{torch.__version__}: rebuild it with `pip install --no-build-isolation .` in this environment"
    )

from . import distributed
from .functional import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    check_targets,
    cross_entropy,
    gaussian_nll_loss,
    huber_loss,
    kl_div,
    l1_loss,
    linear_cross_entropy,
    linear_kl,
    linear_log_prob,
    linear_log_prob_and_entropy,
    log_softmax,
    logsumexp,
    loss_normalizer,
    masked_fill,
    masked_fill_,
    masked_mean,
    masked_std,
    masked_sum,
    masked_var,
    masked_whiten,
    mse_loss,
    poisson_nll_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
    softmax,
)
from .masks import causal_mask, mask_from_ids, sequence_mask
from .memory import empty_cache
from .modules import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    GaussianNLLLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    LinearCrossEntropyLoss,
    MSELoss,
    PoissonNLLLoss,
    SigmoidFocalLoss,
    SmoothL1Loss,
)
from .paths import cmake_prefix_path

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
    "__version__",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "causal_mask",
    "check_targets",
    "cmake_prefix_path",
    "cross_entropy",
    "distributed",
    "empty_cache",
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
    "mask_from_ids",
    "masked_fill",
    "masked_fill_",
    "masked_mean",
    "masked_std",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "mse_loss",
    "poisson_nll_loss",
    "sequence_mask",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "softmax",
]


def __dir__() -> list[str]:
    return __all__
