"""cross_entropy among autograd's machinery: graphs, hooks, modes, autocast, and the gradient of sample_weight."""

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import masked_loss
import reference
from masked_loss import cross_entropy
from reference import allocations_of, assert_near, assert_positive_zero, assert_same_bits, loss_and_gradient

REDUCTIONS = ("none", "mean", "sum", "sequence_mean")


def test_a_graph_names_its_functions():
    x = torch.randn(2, 3, requires_grad=True)
    assert "grad_fn=<CrossEntropyBackward>" in repr(cross_entropy(x, torch.tensor([0, 1])))
    assert masked_loss.mse_loss(x, x.detach()).grad_fn.name() == "masked_loss::PointwiseBackward"


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("hooks", ["none", "save_on_cpu", "the tensors themselves"])
def test_logits_may_change_between_the_loss_and_its_backward_pass(kind, dtype, reduction, hooks):
    """As torch's, which keeps their log-softmax."""
    kept = {
        "none": contextlib.nullcontext(),
        "save_on_cpu": torch.autograd.graph.save_on_cpu(),
        "the tensors themselves": torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    }
    values = torch.randn(6, 5).to(dtype)
    target = torch.randint(5, (6,)) if kind == "indices" else torch.rand(6, 5).softmax(1).to(dtype)
    gradients = []
    for function in (cross_entropy, F.cross_entropy):
        leaf = values.clone().requires_grad_()
        logits = leaf * 1
        with kept[hooks]:
            loss = function(logits, target, reduction=reduction)
        with torch.no_grad():
            logits.div_(0.3)
        loss.backward()
        gradients.append(leaf.grad)
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", ["create_graph", "forward over reverse"])
def test_logits_that_changed_have_no_second_derivative(way):
    leaf = torch.randn(3, 4, requires_grad=True)
    logits = leaf * 1
    loss = cross_entropy(logits, torch.tensor([0, 1, 2]))
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0))
        if way == "create_graph":
            torch.autograd.grad(loss, leaf, create_graph=True)
        else:
            torch.autograd.grad(loss, leaf, upstream)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_logits_are_let_go_with_the_graph(retain_graph):
    leaf = torch.randn(3, 4, requires_grad=True)
    logits = leaf * 1
    kept = weakref.ref(logits)
    loss = cross_entropy(logits, torch.tensor([0, 1, 2]))
    del logits
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)  # which keeps them
    assert kept() is not None
    del first
    torch.autograd.grad(loss, leaf, retain_graph=retain_graph)
    assert (kept() is not None) == retain_graph


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_hooks_take_one_tensor_of_the_size_of_the_logits_and_never_them(reduction):
    logits, target = torch.randn(30, 40, requires_grad=True), torch.randint(40, (30,))
    packed, unpacked = [], []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: unpacked.append(t) or t)
    with hooks:
        loss = cross_entropy(logits, target, reduction=reduction).sum()
    assert sum(tensor.numel() == logits.numel() for tensor in packed) == 1
    loss.backward()
    assert all(tensor.data_ptr() != logits.data_ptr() for tensor in packed + unpacked)


def test_a_checkpoint_keeps_no_logits():
    hidden, weight = torch.randn(30, 8), torch.randn(40, 8, requires_grad=True)
    target, seen = torch.randint(40, (30,)), []

    def loss(weight):
        logits = hidden @ weight.t()
        seen.append(weakref.ref(logits))
        return cross_entropy(logits, target)

    result = checkpoint(loss, weight, use_reentrant=False)
    assert seen[0]() is None
    (gradient,) = torch.autograd.grad(result, weight, create_graph=True)
    (expected,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
    torch.testing.assert_close(gradient, expected)
    again, wanted = (torch.autograd.grad(g.square().sum(), weight)[0] for g in (gradient, expected))
    torch.testing.assert_close(again, wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_that_of_the_result(given, dtype, reduction):
    x, target, mask = problem()
    x = x.detach().to(given)
    options = dict(dtype=dtype, reduction=reduction)
    expected, wanted = loss_and_gradient(reference.cross_entropy, x.double(), target, mask, reduction=reduction)
    loss, gradient = loss_and_gradient(cross_entropy, x, target, mask, **options)
    assert loss.dtype == dtype and gradient.dtype == given
    # What it is summed in: no digit more than float32 has, and none less.
    assert_near(loss, expected, torch.float32 if dtype == torch.float64 else dtype)
    assert_near(gradient, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(x, target, mask, **options).dtype == dtype
    module = masked_loss.CrossEntropyLoss(**options)
    assert_same_bits(module(x, target, mask), loss)


def test_a_loss_of_half_logits_in_float32_copies_no_logits():
    logits, target = torch.randn(64, 1000).bfloat16().requires_grad_(), torch.randint(1000, (64,))
    for dtype in (None, torch.float32):
        blocks = allocations_of(lambda: cross_entropy(logits, target, dtype=dtype), logits.nbytes)  # noqa: B023
        assert blocks == 1  # the gradient
