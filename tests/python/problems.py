"""A small batch and the options that composition is tested with."""

import pytest
import torch

REDUCTIONS = ("none", "mean", "sum", "sequence_mean")
B, T, C = 3, 4, 5

torch.manual_seed(1)
# Together they take every branch of the autograd kernels and of the composite.
OPTIONS = {
    "plain": dict(),
    "weights": dict(weight=torch.rand(C), sample_weight=torch.rand(B, T) - 0.2),
    "broadcast": dict(sample_weight=torch.rand(B, 1), ignore_index=[1, -100], label_smoothing=0.1),
    "classes": dict(class_mask=torch.tensor([1, 1, 1, 0, 1]), label_smoothing=0.2, z_loss=0.1),
    "dense classes": dict(class_mask=torch.rand(B, T, C) < torch.tensor([2, 2, 2, 0.5, 0.5]), z_loss=0.1),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def batch(dtype=torch.float32, size=B, time=T):
    x, target = torch.randn(size, time, C, dtype=dtype), torch.randint(3, (size, time))
    mask = torch.rand(size, time) < 0.7
    mask[0, 0] = True
    return x, target, mask
