"""CrossEntropyLoss is cross_entropy, as a module."""

import copy
import io
import pickle

import pytest
import torch

from masked_loss import CrossEntropyLoss, cross_entropy
from reference import assert_same_bits

REDUCTIONS = ("none", "mean", "sum", "sequence_mean")


def make(**options):
    options = dict(weight=torch.rand(5), ignore_index=[2, -100], label_smoothing=0.1, z_loss=0.01, **options)
    return CrossEntropyLoss(**options)




def test_weights_are_buffers():
    module = make(class_mask=torch.ones(5, dtype=torch.bool))
    assert set(module.state_dict()) == {"weight", "class_mask"}
    assert not list(module.parameters())
    assert module.double().weight.dtype == torch.float64
    assert module.class_mask.dtype == torch.bool
    assert CrossEntropyLoss().state_dict() == {}




