"""cross_entropy among autograd's machinery: graphs, hooks, modes, autocast, and the gradient of sample_weight."""

import functools

import pytest
import torch
import torch.nn.functional as F

import reference
from masked_loss import cross_entropy
from reference import HALF_TYPES, assert_near, assert_positive_zero, assert_same_bits, loss_and_gradient

REDUCTIONS = ("none", "mean", "sum", "sequence_mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sample_weight_gradient(reduction, dtype):
    x, target = torch.randn(3, 6, 4).to(dtype), torch.randint(6, (3, 4))
    mask = torch.rand(3, 4) < 0.7
    options = dict(reduction=reduction, weight=torch.rand(6), label_smoothing=0.1, z_loss=0.01)
    upstream = torch.randn(3, 4).to(dtype) if reduction == "none" else torch.tensor(-2.0).to(dtype)
    for shape in [(3, 4), (3, 1), (1, 4), (1, 1)]:
        weights = torch.rand(shape) + 0.2
        weights[0, 0] = 0.0  # differentiated, so that it is read
        ours, theirs = weights.requires_grad_(), weights.detach().double().requires_grad_()
        loss = cross_entropy(x, target, mask, sample_weight=ours, **options)
        expected = reference.cross_entropy(x, target, mask, sample_weight=theirs, **options)
        assert_near(loss, expected)
        (gradient,) = torch.autograd.grad(loss, ours, upstream)
        (wanted,) = torch.autograd.grad(expected, theirs, upstream.double())
        assert gradient.shape == shape
        # The mean of a sequence does not change with a weight that its positions share: 0, by cancellation.
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_zero_sample_weight_is_the_loss():
    x, target = torch.randn(4, 5), torch.randint(5, (4,))
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0], requires_grad=True)
    loss = cross_entropy(x, target, sample_weight=weights, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weights)
    assert_near(gradient, F.cross_entropy(x.double(), target, reduction="none"))


@pytest.mark.parametrize("by", ["mask", "ignore_index", "class_mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sample_weight_has_no_gradient_where_masked(reduction, by):
    x, target = torch.randn(4, 5), torch.randint(4, (4,))
    x[2] = torch.nan
    weights = torch.tensor([1.0, 2.0, torch.nan, 0.5], requires_grad=True)
    options = {"mask": None, "class_mask": None}
    if by == "mask":
        options["mask"] = torch.tensor([True, True, False, True])
    elif by == "class_mask":
        options["class_mask"] = torch.ones(4, 5, dtype=torch.bool).index_fill(0, torch.tensor(2), False)
    else:
        target[2] = -100
    loss = cross_entropy(x, target, sample_weight=weights, reduction=reduction, **options)
    upstream = torch.ones_like(loss)
    if reduction == "none":
        upstream[2] = torch.nan
    (gradient,) = torch.autograd.grad(loss, weights, upstream)
    assert gradient.isfinite().all()
    assert_positive_zero(gradient[2])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [*HALF_TYPES, torch.float32, torch.float64], ids=str)
def test_autocast_returns_float32_as_torch(dtype, reduction):
    x, target = torch.randn(6, 40).to(dtype), torch.randint(40, (6,))
    upstream = torch.randn(6) if reduction == "none" else None
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(leaf, target, reduction=reduction)
        plain = cross_entropy(x, target, reduction=reduction)
        assert loss.dtype == plain.dtype == F.cross_entropy(x, target).dtype
    (gradient,) = torch.autograd.grad(loss, leaf, None if upstream is None else upstream.to(loss.dtype))
    exact = x.double().requires_grad_()
    expected = reference.cross_entropy(exact, target, reduction=reduction)
    assert_near(loss, expected)
    assert_near(plain, expected)
    assert gradient.dtype == dtype
    assert_near(gradient, torch.autograd.grad(expected, exact, None if upstream is None else upstream.double())[0])


def problem():
    x, target = torch.randn(4, 6, requires_grad=True), torch.randint(6, (4,))
    return x, target, torch.tensor([True, True, False, True])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_on_a_kept_graph(reduction):
    x, target, mask = problem()
    loss = cross_entropy(x, target, mask, reduction=reduction).sum()
    first = torch.autograd.grad(3 * loss, x, retain_graph=True)[0]
    copy_of_first = first.clone()
    first.mul_(7)  # whoever receives a gradient may write into it
    second = torch.autograd.grad(3 * loss, x, retain_graph=True)[0]
    third = torch.autograd.grad(loss, x)[0]
    assert_same_bits(second, copy_of_first)
    assert_near(3 * third, copy_of_first)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_accumulated_gradients_do_not_alias_what_is_kept(reduction):
    x, target, mask = problem()
    loss = cross_entropy(x, target, mask, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    x.grad.zero_()
    loss.backward(retain_graph=True)
    assert_same_bits(x.grad, once)
    loss.backward()
    assert_near(x.grad, 2 * once.double())


def test_a_freed_graph_says_so():
    x, target, mask = problem()
    loss = cross_entropy(x, target, mask)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("upstream", [3.0, -1.0, 0.0, 1e-30])
def test_upstream_gradient(upstream):
    x, target, mask = problem()
    (gradient,) = torch.autograd.grad(cross_entropy(x, target, mask) * upstream, x)
    expected = loss_and_gradient(F.cross_entropy, x.detach()[mask].double(), target[mask])[1]
    assert_near(gradient[mask], expected * upstream)
    assert_positive_zero(gradient[~mask])


def test_hooks_see_the_gradient():
    x, target, mask = problem()
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    loss = cross_entropy(x, target, mask)
    loss.register_hook(lambda g: 5 * g)
    loss.backward()
    expected = loss_and_gradient(cross_entropy, x, target, mask)[1]
    assert_near(seen[0], 5 * expected.double())
    assert_near(x.grad, 10 * expected.double())


def test_a_changed_input_is_noticed():
    x, target, mask = problem()
    logits = x * 1
    loss = cross_entropy(logits, target, mask, reduction="none")
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_modes_without_a_graph(mode, reduction):
    x, target, mask = problem()
    with mode():
        loss = cross_entropy(x, target, mask, reduction=reduction)
    assert not loss.requires_grad
    assert_near(loss, cross_entropy(x, target, mask, reduction=reduction).double())


def test_two_losses_of_one_input():
    x, target, mask = problem()
    both = cross_entropy(x, target, mask) + 2 * cross_entropy(x, target, ~mask, reduction="sum")
    (gradient,) = torch.autograd.grad(both, x)
    for part, reduction, factor in ((mask, "mean", 1), (~mask, "sum", 2)):
        expected = loss_and_gradient(F.cross_entropy, x.double()[part], target[part], reduction=reduction)[1]
        assert_near(gradient[part], factor * expected)


def test_functions_take_tensor_subclasses():
    class Logged(torch.Tensor):
        pass

    x, target, mask = problem()
    loss = cross_entropy(x.detach().as_subclass(Logged), target, mask)
    assert isinstance(loss, Logged)
    assert_same_bits(loss.as_subclass(torch.Tensor), cross_entropy(x.detach(), target, mask))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_activation_checkpointing(reduction):
    x, target, mask = problem()
    function = functools.partial(cross_entropy, reduction=reduction)
    expected = loss_and_gradient(function, x, target, mask)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False)
    again = loss_and_gradient(checkpointed, x, target, mask)
    assert_same_bits(again[0], expected[0])
    assert_same_bits(again[1], expected[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_saved_tensors_may_be_packed(reduction):
    x, target, mask = problem()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        loss = cross_entropy(x, target, mask, reduction=reduction)
    for _ in range(2):  # what is unpacked is not ours to change
        (gradient,) = torch.autograd.grad(loss.sum() * 3, x, retain_graph=True)
        expected = loss_and_gradient(cross_entropy, x, target, mask, reduction=reduction)[1]
        assert_near(gradient, 3 * expected.double())
