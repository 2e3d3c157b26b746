"""The ops under forward-mode AD, functorch, batched and second derivatives, in float64."""

import pytest
import torch
from torch import Tensor

import reference
from masked_loss import cross_entropy, loss_normalizer, mask_from_ids, masked_fill, masked_fill_, sequence_mask
from problems import OPTIONS, B, C, T, batch, every_option, every_reduction
from reference import assert_near, assert_positive_zero

# vmap loops, with this warning, over an op that it has no rule for.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


def doubled(options):
    """Floating options in float64, for finite differences."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}


def problem(options, reduction):
    x, target, mask = batch(torch.float64)
    options = dict(doubled(options), reduction=reduction, dim=-1)
    weights = options.pop("sample_weight", None)
    weights = torch.rand(B, T, dtype=torch.float64) + 0.1 if weights is None else weights.abs() + 0.1

    def function(x, weights):
        return cross_entropy(x, target, mask, sample_weight=weights, **options)

    def slow(x, weights):
        return reference.cross_entropy(x, target, mask, sample_weight=weights, **options)

    return function, slow, x, weights


@every_reduction
@every_option
def test_finite_differences_of_every_order(options, reduction):
    function, _, x, weights = problem(options, reduction)
    inputs = (x.requires_grad_(), weights.requires_grad_())
    assert torch.autograd.gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@every_reduction
@every_option
def test_second_derivatives_are_the_references(options, reduction):
    function, slow, x, weights = problem(options, reduction)
    second = []
    for f in (function, slow):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(leaf, weights).sum(), leaf, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    torch.testing.assert_close(*second, rtol=1e-9, atol=1e-12)


@every_reduction
def test_functorch_transforms_are_autograd(reduction):
    function, slow, x, weights = problem(OPTIONS["classes"], reduction)
    v, w = torch.randn_like(x), torch.randn_like(weights)
    both = (x.clone().requires_grad_(), weights.clone().requires_grad_())
    expected = slow(*both)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, both, upstream)
    loss, pull = torch.func.vjp(function, x, weights)
    assert_near(loss, expected)
    for ours, theirs in zip(pull(upstream), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    loss, tangent = torch.func.jvp(function, (x, weights), (v, w))
    assert_near(loss, expected)
    # <upstream, J v> is <J^T upstream, v>.
    expected_product = sum((g * d).sum() for g, d in zip(wanted, (v, w), strict=True))
    torch.testing.assert_close((upstream * tangent).sum(), expected_product)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        jacobian = transform(function)(x, weights)
        torch.testing.assert_close(
            torch.einsum("i,i...->...", upstream.flatten(), jacobian.reshape(-1, *x.shape)), wanted[0]
        )


def test_hessian():
    function, slow, x, weights = problem(OPTIONS["classes"], "mean")
    expected = torch.autograd.functional.hessian(lambda x: slow(x, weights), x)
    torch.testing.assert_close(torch.func.hessian(function)(x, weights), expected)
    vectorized = torch.autograd.functional.hessian(lambda x: function(x, weights), x, vectorize=True)
    torch.testing.assert_close(vectorized, expected)


def test_forward_over_reverse_and_reverse_over_forward():
    function, _, x, weights = problem(OPTIONS["weights"], "mean")
    v = torch.randn_like(x)
    _, forward_over_reverse = torch.func.jvp(lambda x: torch.func.grad(function)(x, weights), (x,), (v,))
    reverse_over_forward = torch.func.grad(lambda x: torch.func.jvp(lambda x: function(x, weights), (x,), (v,))[1])(x)
    torch.testing.assert_close(forward_over_reverse, reverse_over_forward)


@every_reduction
@every_option
def test_vmap_is_a_loop(options, reduction):
    options = dict(doubled(options), reduction=reduction, dim=-1)
    x, target, mask = (torch.stack(parts) for parts in zip(*(batch(torch.float64) for _ in range(2)), strict=True))

    def function(x, target, mask):
        return cross_entropy(x, target, mask, **options)

    def gradient(x, target, mask):
        return torch.func.grad(lambda x: function(x, target, mask).sum())(x)

    for f in (function, gradient):
        looped = torch.stack([f(*each) for each in zip(x, target, mask, strict=True)])
        torch.testing.assert_close(torch.vmap(f)(x, target, mask), looped)
        shared = torch.stack([f(each, target[0], mask[0]) for each in x])
        torch.testing.assert_close(torch.vmap(f, in_dims=(0, None, None))(x, target[0], mask[0]), shared)
    of_vmap = torch.func.grad(lambda x: torch.vmap(function)(x, target, mask).sum())(x)
    torch.testing.assert_close(of_vmap, torch.vmap(gradient)(x, target, mask))


def test_vmap_over_every_argument():
    x, target, mask = (torch.stack(parts) for parts in zip(*(batch(torch.float64) for _ in range(3)), strict=True))
    weight, sample_weight = torch.rand(3, C, dtype=torch.float64), torch.rand(3, B, 1, dtype=torch.float64)
    class_mask, count = torch.rand(3, B, 1, C) < torch.tensor([2, 2, 2, 0.5, 0.5]), torch.tensor([2.0, 3.0, 0.0])
    names = ("mask", "weight", "sample_weight", "class_mask", "normalizer")

    def function(x, target, *options):
        return cross_entropy(x, target, dim=-1, label_smoothing=0.1, **dict(zip(names, options, strict=True)))

    arguments = (x, target, mask, weight, sample_weight, class_mask, count)
    looped = torch.stack([function(*each) for each in zip(*arguments, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(*arguments), looped)
    gradients = torch.vmap(torch.func.grad(function))(*arguments)
    of_loop = torch.stack([torch.func.grad(function)(*each) for each in zip(*arguments, strict=True)])
    torch.testing.assert_close(gradients, of_loop)


@every_reduction
def test_per_example_gradients_drop_garbage(reduction):
    x, target, mask = batch()
    dirty = torch.where(mask.unsqueeze(-1), x, torch.nan)

    def gradient(x, target, mask):
        return torch.func.grad(lambda x: cross_entropy(x, target, mask, reduction=reduction).sum())(x)

    gradients = torch.vmap(gradient)(dirty, target, mask)
    assert gradients[mask].isfinite().all()
    assert_positive_zero(gradients[~mask].abs())
    torch.testing.assert_close(gradients, torch.vmap(gradient)(x, target, mask))


@every_reduction
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_upstream_gradients(reduction, create_graph):
    function, _, x, weights = problem(OPTIONS["weights"], reduction)
    both = (x.requires_grad_(), weights.requires_grad_())
    loss = function(*both)
    upstreams = torch.randn(6, *loss.shape, dtype=torch.float64)
    batched = torch.autograd.grad(
        loss, both, upstreams, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    for i, upstream in enumerate(upstreams):
        one_by_one = torch.autograd.grad(loss, both, upstream, retain_graph=True)
        for ours, theirs in zip(batched, one_by_one, strict=True):
            torch.testing.assert_close(ours[i], theirs)


@pytest.mark.parametrize("function", [masked_fill, masked_fill_])
def test_masked_fill(function):
    x, value = torch.randn(3, 4, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    mask = torch.rand(3, 1) < 0.5

    def filled(x, value, mask=mask):
        return function(x * x, mask, value * value)

    inputs = (x.clone().requires_grad_(), value.clone().requires_grad_())
    assert torch.autograd.gradcheck(filled, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(filled, inputs, check_fwd_over_rev=True)
    masks = torch.rand(5, 3, 4) < 0.5
    xs = torch.randn(5, 3, 4, dtype=torch.float64)
    looped = torch.stack([filled(each, value, m) for each, m in zip(xs, masks, strict=True)])
    torch.testing.assert_close(torch.vmap(filled, in_dims=(0, None, 0))(xs, value, masks), looped)
    per_example = torch.vmap(torch.func.grad(lambda x, m: filled(x, value, m).sum()))(xs, masks)
    torch.testing.assert_close(per_example, 2 * xs * ~masks)


def test_vmap_of_masks():
    lengths, tokens = torch.tensor([[1, 3], [0, 2]]), torch.randint(0, 5, (2, 7))
    assert torch.vmap(lambda n: sequence_mask(n, 4))(lengths).equal(sequence_mask(lengths, 4))
    assert torch.vmap(lambda t: mask_from_ids(t, [0, 1]))(tokens).equal(mask_from_ids(tokens, [0, 1]))
    mask = tokens > 2
    counts = torch.vmap(lambda t, m: loss_normalizer(t, m))(tokens, mask)
    assert_near(counts, mask.sum(1))
