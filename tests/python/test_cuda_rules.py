"""What CUDA kernels do otherwise than those of the CPU: a target out of range makes its row NaN, and nothing waits."""

import pytest
import torch

from masked_loss import (
    binary_cross_entropy,
    check_targets,
    cross_entropy,
    gaussian_nll_loss,
    loss_normalizer,
    masked_fill,
    masked_mean,
    mse_loss,
    softmax,
)
from reference import FLOAT_TYPES, assert_near, assert_positive_zero, assert_same_bits, loss_and_gradient


@pytest.fixture(autouse=True)
def unchecked(kernels, monkeypatch):
    if kernels == "cpu":
        pytest.skip("needs CUDA kernels: --device cuda, or --emulated")
    monkeypatch.delenv("MASKED_LOSS_CHECK")


@pytest.mark.parametrize("wrong", [5, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
# As rows of few and of many classes, and with the classes apart.
@pytest.mark.parametrize(("shape", "dim"), [((9, 5), 1), ((9, 3000), 1), ((3, 5, 3), 1), ((3, 700, 3), 1)], ids=str)
def test_a_target_out_of_range_is_nan_in_its_row_alone(shape, dim, dtype, wrong):
    x = torch.randn(shape).to(dtype)
    target = torch.randint(5, shape[:1] + shape[2:])
    right = target.clone()
    target.view(-1)[4] = wrong if wrong != 5 else shape[1]
    upstream = torch.randn(target.shape).to(dtype)
    loss, gradient = loss_and_gradient(cross_entropy, x, target, upstream=upstream, reduction="none", dim=dim)
    expected, expected_gradient = loss_and_gradient(
        cross_entropy, x, right, upstream=upstream, reduction="none", dim=dim
    )
    others = torch.arange(target.numel()).view(target.shape) != 4
    assert loss[~others].isnan().all()
    assert_same_bits(loss[others], expected[others])
    of_rows, expected_of_rows = gradient.movedim(dim, -1), expected_gradient.movedim(dim, -1)
    assert of_rows[~others].isnan().all()
    assert_same_bits(of_rows[others], expected_of_rows[others])


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
def test_the_reduced_loss_is_nan(reduction):
    x, target = torch.randn(6, 5), torch.tensor([0, 1, 9, 3, 4, 0])
    loss, gradient = loss_and_gradient(cross_entropy, x, target, reduction=reduction)
    assert loss.isnan()
    assert gradient[2].isnan().all()
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    loss, gradient = loss_and_gradient(cross_entropy, x, target, mask, reduction=reduction)
    assert loss.isfinite()
    assert_positive_zero(gradient[2])
    target[2] = 0
    assert_near(loss, loss_and_gradient(cross_entropy, x, target, mask, reduction=reduction)[0])


@pytest.mark.parametrize("chunk", [1, 3000])
def test_check_targets_raises_at_any_time(chunk):
    target = torch.randint(5, (2 * chunk,))
    target[chunk] = 7
    with pytest.raises(IndexError, match=rf"7 .*\[{chunk}\]"):
        check_targets(target, 5)
    check_targets(target, 5, torch.arange(2 * chunk) != chunk)


def test_the_environment_asks_for_checks(monkeypatch):
    x, target = torch.randn(3, 5), torch.tensor([0, 5, 1])
    assert cross_entropy(x, target).isnan()
    monkeypatch.setenv("MASKED_LOSS_CHECK", "1")
    with pytest.raises(IndexError, match=r"5 .*\[1\]"):
        cross_entropy(x, target)
    monkeypatch.setenv("MASKED_LOSS_CHECK", "0")
    assert cross_entropy(x, target).isnan()


def test_a_negative_normalizer_is_nan():
    x, target = torch.randn(3, 5), torch.tensor([0, 4, 1])
    assert cross_entropy(x, target, normalizer=torch.tensor(-1.0)).isnan()


def test_the_normalizer_counts_on_the_device():
    target = torch.arange(10_000) % 7
    assert loss_normalizer(target, target != 3) == (target != 3).sum()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence_mean"])
def test_a_value_that_does_not_fit_is_nan(reduction, monkeypatch):
    x, target, var = torch.full((3, 700), 0.5), torch.rand(3, 700), torch.ones(3, 700)
    x[1, 500], var[2, 9] = 1.5, -0.25
    calls = (
        (binary_cross_entropy, (x, target), (1, 500), r"input in \[0, 1\], got 1\.5 at position \[1, 500\]"),
        (gaussian_nll_loss, (x, target, var), (2, 9), r"var of at least 0, got -0\.25 at position \[2, 9\]"),
    )
    for function, operands, wrong, message in calls:
        monkeypatch.delenv("MASKED_LOSS_CHECK", raising=False)
        kept = torch.ones(3, 700, dtype=torch.bool)
        upstream = torch.ones(3, 700) if reduction == "none" else None
        loss, gradient = loss_and_gradient(function, *operands, kept, reduction=reduction, upstream=upstream)
        assert (loss if reduction != "none" else loss[wrong]).isnan()
        assert gradient.isnan().nonzero().tolist() == [list(wrong)]
        monkeypatch.setenv("MASKED_LOSS_CHECK", "1")
        with pytest.raises(ValueError, match=rf"^{function.__name__}: expected kept {message}"):
            function(*operands, kept, reduction=reduction)
        kept[wrong] = False
        loss, gradient = loss_and_gradient(function, *operands, kept, reduction=reduction, upstream=upstream)
        assert loss.isfinite().all()
        assert_positive_zero(gradient[wrong])


def test_a_negative_normalizer_of_elements_is_nan():
    assert mse_loss(torch.ones(5), torch.zeros(5), normalizer=torch.tensor(-1.0)).isnan()


@pytest.mark.parametrize("value", [2, 256, -2, 2**40, -(2**63)])
def test_an_integer_mask_keeps_where_it_is_not_0(value):
    """Its values are not waited for."""
    x, target, keep = torch.randn(6, 300), torch.randint(300, (6,)), torch.rand(6, 300) < 0.6
    functions = {
        "cross_entropy": lambda mask: cross_entropy(x, target, mask[:, 0]),
        "class_mask": lambda mask: cross_entropy(x, target, class_mask=mask, reduction="none"),
        "mse_loss": lambda mask: mse_loss(x, torch.zeros_like(x), mask),
        "softmax": lambda mask: softmax(x, mask),
        "masked_mean": lambda mask: masked_mean(x, mask, 0),
        "masked_fill": lambda mask: masked_fill(x, mask, 7.0),
    }
    for function in functions.values():
        assert_same_bits(function(keep * torch.tensor(value)), function(keep))
