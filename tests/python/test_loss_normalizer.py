"""loss_normalizer: the divisor of 'mean'."""

import pytest
import torch

import reference
from masked_loss import cross_entropy, loss_normalizer
from reference import assert_near, assert_positive_zero, assert_same_bits, loss_and_gradient

REDUCTIONS = ("none", "mean", "sum", "sequence_mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_is_what_mean_divides_by(target_dtype, dtype):
    x, target = torch.randn(3, 7, 50, dtype=dtype), torch.randint(7, (3, 50)).to(target_dtype)
    options = dict(
        weight=torch.rand(7, dtype=dtype), sample_weight=torch.rand(3, 1, dtype=dtype) - 0.2, ignore_index=[3, 5]
    )
    mask = torch.rand(3, 50) < 0.5
    divisor = loss_normalizer(target, mask, **options)
    assert divisor.dtype == dtype
    assert_near(divisor, reference.loss_normalizer(target, 7, mask, **options))
    mean = cross_entropy(x, target, mask, **options)
    total = cross_entropy(x, target, mask, reduction="sum", **options)
    assert_near(mean, total.double() / divisor)
    assert_near(cross_entropy(x, target, mask, normalizer=divisor, **options), mean.double())


@pytest.mark.parametrize("dim", [1, -1, 0])
def test_class_mask_drops_rows_that_allow_nothing(dim):
    class_mask = torch.ones(3, 5, 4, dtype=torch.bool)
    class_mask[1, :, 2:] = False
    target = torch.zeros(3, 4, dtype=torch.long)
    target[1, 2:] = 99  # masked, so out of range is no error
    assert loss_normalizer(target, class_mask=class_mask.movedim(1, dim), dim=dim).item() == 10
    assert loss_normalizer(target, class_mask=torch.zeros(5, dtype=torch.bool)).item() == 0


def test_counts_in_integers():
    target = torch.zeros(1, dtype=torch.uint8).expand(2**24 + 1, 1)  # one more than float32 counts to
    assert loss_normalizer(target, dim=-1).dtype == torch.float32
    assert loss_normalizer(target, torch.ones(1, 1, dtype=torch.bool)).item() in (2**24, 2**24 + 2)


def test_has_no_gradient_and_counts_nothing_as_zero():
    weights = torch.ones(3, requires_grad=True)
    target = torch.tensor([0, 1, -100])
    divisor = loss_normalizer(target, sample_weight=weights)
    assert not divisor.requires_grad
    assert divisor.item() == 2
    assert_positive_zero(loss_normalizer(target, torch.zeros(3, dtype=torch.bool)))
    assert_positive_zero(loss_normalizer(torch.zeros(0, 3, dtype=torch.long)))
    assert loss_normalizer(torch.tensor(1)).item() == 1


def test_micro_batches_add_up_to_the_batch():
    x, target = torch.randn(7, 11, dtype=torch.float64), torch.randint(11, (7,))
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    weight = torch.rand(11, dtype=torch.float64)
    whole = loss_and_gradient(cross_entropy, x, target, mask, weight=weight)
    parts = [slice(0, 4), slice(4, 6), slice(6, 7)]  # 3, 0 and 1 kept
    total = sum(loss_normalizer(target[part], mask[part], weight=weight) for part in parts)
    leaf = x.clone().requires_grad_()
    losses = [cross_entropy(leaf[p], target[p], mask[p], weight=weight, normalizer=total) for p in parts]
    for loss in losses:
        loss.backward()
    assert_near(sum(losses), whole[0])
    assert_near(leaf.grad, whole[1])


def test_divisors_are_the_same_on_any_number_of_threads(threads):
    target, weights = torch.randint(9, (1_000_000,)), torch.rand(1_000_000)
    divisors = []
    for count in (1, 2):
        with threads(count):
            divisors.append(loss_normalizer(target, sample_weight=weights))
    assert_same_bits(*divisors)
    assert_near(divisors[0], weights.double().sum())


def test_a_class_mask_for_any_number_of_classes():
    target = torch.tensor([0, 3, 2])
    assert loss_normalizer(target, class_mask=torch.tensor([[True], [True], [False]])) == 2
