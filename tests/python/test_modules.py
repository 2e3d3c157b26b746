"""What the modules have beyond their functions."""

import torch

from masked_loss import CrossEntropyLoss


def test_weights_are_buffers():
    module = CrossEntropyLoss(torch.rand(5), class_mask=torch.ones(5, dtype=torch.bool))
    assert set(module.state_dict()) == {"weight", "class_mask"}
    assert not list(module.parameters())
    assert module.double().weight.dtype == torch.float64
    assert module.class_mask.dtype == torch.bool
    assert CrossEntropyLoss().state_dict() == {}
