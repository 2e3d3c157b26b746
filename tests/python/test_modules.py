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


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_is_the_function(reduction):
    module = make(reduction=reduction, class_mask=torch.tensor([True, True, True, False, True]), dim=-1)
    x, target = torch.randn(3, 4, 5), torch.randint(3, (3, 4))
    mask, sample_weight = torch.rand(3, 4) < 0.5, torch.rand(3, 1)
    names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "dim", "weight", "class_mask")
    options = {name: getattr(module, name) for name in names}
    expected = cross_entropy(x, target, mask, sample_weight=sample_weight, **options)
    assert_same_bits(module(x, target, mask, sample_weight), expected)
    if reduction == "mean":
        with_normalizer = module(x, target, mask, normalizer=4.0)
        assert_same_bits(with_normalizer, cross_entropy(x, target, mask, normalizer=4.0, **options))


def test_weights_are_buffers():
    module = make(class_mask=torch.ones(5, dtype=torch.bool))
    assert set(module.state_dict()) == {"weight", "class_mask"}
    assert not list(module.parameters())
    assert module.double().weight.dtype == torch.float64
    assert module.class_mask.dtype == torch.bool
    assert CrossEntropyLoss().state_dict() == {}


def test_repr_names_the_arguments():
    text = repr(make(reduction="sum", dim=-1))
    for part in ("[2, -100]", "'sum'", "0.1", "0.01", "dim=-1"):
        assert part in text


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies_are_equal(copied):
    module = make(dim=-1)
    if copied == "deepcopy":
        other = copy.deepcopy(module)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif copied == "save":
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = make(dim=-1)
        other.load_state_dict(module.state_dict())
    x, target = torch.randn(3, 5), torch.randint(5, (3,))
    assert_same_bits(module(x, target), other(x, target))
