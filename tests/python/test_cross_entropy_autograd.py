"""cross_entropy among autograd's machinery: graphs, hooks, modes, autocast, and the gradient of sample_weight."""

import pytest
import torch
import torch.nn.functional as F

import reference
from masked_loss import cross_entropy
from reference import assert_near, assert_positive_zero, assert_same_bits, loss_and_gradient

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


def problem():
    x, target = torch.randn(4, 6, requires_grad=True), torch.randint(6, (4,))
    return x, target, torch.tensor([True, True, False, True])


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


@pytest.mark.parametrize("upstream", [3.0, -1.0, 0.0, 1e-30])
def test_upstream_gradient(upstream):
    x, target, mask = problem()
    (gradient,) = torch.autograd.grad(cross_entropy(x, target, mask) * upstream, x)
    expected = loss_and_gradient(F.cross_entropy, x.detach()[mask].double(), target[mask])[1]
    assert_near(gradient[mask], expected * upstream)
    assert_positive_zero(gradient[~mask])


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


def test_float16_gradients_survive_a_loss_scale():
    # Divided by the rows and rounded to float16 before they are scaled, most of these would be 0.
    torch.manual_seed(0)
    logits = torch.randn(4096, 200).half().requires_grad_()
    target = torch.randint(200, (4096,))
    with torch.autocast(logits.device.type, torch.float16):
        loss = cross_entropy(logits, target)  # float32
    (loss * 65536).backward()
    exact = logits.detach().double().requires_grad_()
    (F.cross_entropy(exact, target) * 65536).backward()
    assert (logits.grad != 0).all()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-2, atol=0)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_hook_on_the_logits_runs_once(reduction, create_graph):
    leaf = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target, calls = torch.tensor([0, 1, 2]), []
    logits = leaf * 1
    logits.retain_grad()
    logits.register_hook(lambda gradient: calls.append(gradient) or gradient * 2)
    loss = cross_entropy(logits, target, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=create_graph)
    (plain,) = torch.autograd.grad(cross_entropy(leaf, target, reduction=reduction).sum(), leaf)
    assert len(calls) == 1
    torch.testing.assert_close(gradient, 2 * plain)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [10, 1000])  # rows beside one another; rows one by one
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_large_logits_keep_their_digits(reduction, classes, label_smoothing):
    torch.manual_seed(0)
    logits, target = torch.randn(16, classes) + 1e5, torch.randint(classes, (16,))
    options = dict(reduction=reduction, label_smoothing=label_smoothing)
    loss, gradient = loss_and_gradient(lambda x: cross_entropy(x, target, **options), logits)
    exact, exact_gradient = loss_and_gradient(lambda x: F.cross_entropy(x, target, **options), logits.double())
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=2e-7)
    batched = torch.vmap(lambda x, t: cross_entropy(x, t, **options))(logits, target)  # by the composite
    torch.testing.assert_close(batched.sum().double(), exact.sum(), rtol=2e-6, atol=0)


def test_saved_tensors_that_hooks_share_stay_as_they_are():
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append((t, t.clone())) or t, lambda t: t):
        loss = cross_entropy(torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2]))
    (loss * 3).backward()
    assert packed
    for tensor, copy in packed:
        assert_same_bits(tensor, copy)


def test_a_zero_sample_weight_has_its_gradient_through_vmap():
    logits, target = torch.randn(2, 3, 4), torch.randint(4, (2, 3))
    weights = torch.tensor([[0.0, 1, 1], [0, 1, 0]])

    def total(weights):
        return torch.vmap(lambda x, t, w: cross_entropy(x, t, sample_weight=w, reduction="sum"))(
            logits, target, weights
        ).sum()

    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(torch.func.grad(total)(weights), expected)


def test_rows_without_a_divisor_are_not_read():
    logits = torch.randn(2, 4)
    logits[0] = float("nan")
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([1, 2]), sample_weight=torch.zeros(2, requires_grad=True))
    loss.backward()
    assert loss == 0
    assert_positive_zero(logits.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_per_example_gradients_drop_garbage(reduction):
    x, target = torch.randn(3, 4, 5), torch.randint(3, (3, 4))
    mask = torch.rand(3, 4) < 0.7
    dirty = torch.where(mask.unsqueeze(-1), x, torch.nan)

    def gradient(x, target, mask):
        return torch.func.grad(lambda x: cross_entropy(x, target, mask, reduction=reduction).sum())(x)

    gradients = torch.vmap(gradient)(dirty, target, mask)
    assert gradients[mask].isfinite().all()
    assert_positive_zero(gradients[~mask].abs())
    torch.testing.assert_close(gradients, torch.vmap(gradient)(x, target, mask))
