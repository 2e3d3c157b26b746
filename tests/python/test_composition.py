"""What only some of the ops meet among compilers, tracers, modes and meta tensors."""

import pytest
import torch
import torch.nn.functional as F

from masked_loss import (
    causal_mask,
    check_targets,
    cross_entropy,
    logsumexp,
    loss_normalizer,
    mask_from_ids,
    masked_fill,
    masked_fill_,
    masked_mean,
    mse_loss,
    sequence_mask,
    softmax,
)
from reference import assert_near, assert_same_bits

B, T, C = 3, 4, 5


def batch():
    return torch.randn(B, T, C), torch.randint(3, (B, T)), torch.rand(B, T) < 0.7


def loss_and_gradients(function, *leaves, upstream=None):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_masked_fill_in_place(backend, fresh_compiler):
    def function(x, mask, value):
        base = x * 2
        masked_fill_(base[:, 1:], mask, value)
        masked_fill_(base, torch.zeros_like(base, dtype=torch.int64), 5)
        return base * base

    x, value = torch.randn(3, 4), torch.tensor(0.5)
    mask = torch.rand(3, 1) < 0.5
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    upstream = torch.randn(3, 4)
    ours = loss_and_gradients(lambda x, v: compiled(x, mask, v), x, value, upstream=upstream)
    theirs = loss_and_gradients(lambda x, v: function(x, mask, v), x, value, upstream=upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b)


def test_compiled_masks_and_checks(fresh_compiler):
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def function(lengths, tokens):
        checked = check_targets(tokens, 9, ignore_index=0)
        keep = mask_from_ids(checked, [0, 1]) & sequence_mask(lengths, tokens.shape[1], padding_side="left")
        return keep, causal_mask(tokens.shape[1], device=tokens.device), loss_normalizer(checked, keep)

    for time in (4, 6):
        lengths, tokens = torch.tensor([2, 4]), torch.randint(0, 9, (2, time))
        keep, causal, count = function(lengths, tokens)
        expected = (tokens > 1) & (torch.arange(time) >= time - lengths[:, None])
        assert keep.equal(expected)
        assert causal.equal(torch.ones(time, time, dtype=torch.bool).tril())
        assert count.item() == expected.sum().item()
    with pytest.raises(IndexError, match=r"got 9 "):
        function(lengths, tokens.fill_(9))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_without_memory_have_the_strides_of_others(reduction):
    x, target, mask = batch()
    for moved in (x, x.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        gradients = []
        for device in ("cpu", "meta"):
            leaf = moved.detach().to(device).requires_grad_()
            cross_entropy(leaf, target.to(device), mask.to(device), reduction=reduction, dim=-1).sum().backward()
            gradients.append(leaf.grad)
        assert gradients[0].stride() == gradients[1].stride() == moved.stride()


class TestWhatLooksOverTheDispatchersShoulder:
    def test_fx_symbolic_trace(self):
        graph = torch.fx.symbolic_trace(
            lambda x, t, m: masked_fill(cross_entropy(x, t, m, reduction="none", dim=-1), m, 0.0)
        )
        assert "masked_loss.cross_entropy" in graph.code
        x, target, mask = batch()
        expected = masked_fill(cross_entropy(x, target, mask, reduction="none", dim=-1), mask, 0.0)
        assert_same_bits(graph(x, target, mask), expected)

    def test_make_fx(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        x, target, mask = batch()
        graph = make_fx(lambda x, t, m: cross_entropy(x, t, m, dim=-1), tracing_mode="symbolic")(x, target, mask)
        assert_same_bits(graph(x, target, mask), cross_entropy(x, target, mask, dim=-1))

    def test_torch_function_mode(self):
        class Recorder(torch.overrides.TorchFunctionMode):
            def __init__(self):
                super().__init__()
                self.seen = []

            def __torch_function__(self, function, types, args=(), kwargs=None):
                self.seen.append(str(function))
                return function(*args, **(kwargs or {}))

        x, target, mask = batch()
        with Recorder() as recorder:
            loss = cross_entropy(x, target, mask, dim=-1)
        assert any(
            "masked_loss.cross_entropy" in name or "masked_loss::cross_entropy" in name for name in recorder.seen
        )
        assert_same_bits(loss, cross_entropy(x, target, mask, dim=-1))

    def test_torch_function_of_an_argument(self):
        class Logged(torch.Tensor):
            seen = []  # noqa: RUF012

            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                cls.seen.append(str(function))
                return super().__torch_function__(function, types, args, kwargs or {})

        x, target, mask = batch()
        cross_entropy(x, target, mask.as_subclass(Logged), dim=-1)
        assert any("cross_entropy" in name for name in Logged.seen)

    def test_torch_dispatch_mode(self):
        class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.seen = []

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.seen.append(str(function))
                return function(*args, **(kwargs or {}))

        x, target, mask = batch()
        with Recorder() as recorder:
            cross_entropy(x.requires_grad_(), target, mask, dim=-1).backward()
        assert sum("masked_loss" in name for name in recorder.seen) <= 2, recorder.seen


def many_dimensions(count, values=torch.randn):
    """So many dimensions of size 2, of which no two neighbours can be walked as one."""
    return values(2**count).view([2] * count).permute(*reversed(range(count)))


def rows_of(tensor):
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


MANY = 18
FAMILIES = {
    "cross_entropy": (
        lambda x, keep: cross_entropy(x, (x[:, 0] > 0).long(), keep[:, 0]),
        lambda x, keep: F.cross_entropy(rows_of(x)[keep[:, 0].flatten()], (x[:, 0] > 0).long()[keep[:, 0]]),
    ),
    "cross_entropy none": (
        lambda x, keep: cross_entropy(x, (x[:, 0] > 0).long(), keep[:, 0], reduction="none"),
        lambda x, keep: F.cross_entropy(x, (x[:, 0] > 0).long(), reduction="none").where(keep[:, 0], 0.0),
    ),
    "softmax": (
        lambda x, keep: softmax(x, keep),
        lambda x, keep: torch.softmax(x.masked_fill(~keep, -1e9), -1).where(keep, 0.0),
    ),
    "logsumexp": (
        lambda x, keep: logsumexp(x, keep, 3).exp(),
        lambda x, keep: x.exp().where(keep, 0.0).sum(3),
    ),
    "mse_loss": (
        lambda x, keep: mse_loss(x, x.detach().flip(0), keep),
        lambda x, keep: F.mse_loss(x[keep], x.detach().flip(0)[keep]),
    ),
    "masked_mean": (
        lambda x, keep: masked_mean(x, keep, 3),
        lambda x, keep: x.where(keep, 0.0).sum(3) / keep.sum(3).clamp(min=1),
    ),
    "masked_fill": (lambda x, keep: masked_fill(x, keep, 2.0), lambda x, keep: x.masked_fill(keep, 2.0)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_more_dimensions_than_merge(family):
    ours, theirs = FAMILIES[family]
    x, keep = many_dimensions(MANY).double(), many_dimensions(MANY, torch.rand) < 0.7
    upstream = torch.randn_like(ours(x, keep))
    values = loss_and_gradients(lambda x: ours(x, keep), x, upstream=upstream)
    expected = loss_and_gradients(lambda x: theirs(x, keep), x, upstream=upstream)
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("reduced", ["mean", "none"])
def test_a_batch_of_a_size_that_no_compiler_knows(reduced, fresh_compiler):
    """vmap over rows, the number of whose classes is data."""

    def function(x, target, classes):
        size = classes.item()
        torch._check(size >= 0)
        torch._check(size <= x.shape[-1])
        x = x[..., :size]
        probabilities = torch.vmap(softmax)(x)
        of_probabilities = torch.vmap(lambda x, p: cross_entropy(x, p, dim=-1, reduction=reduced))(x, probabilities)
        # Not through vmap: torch has no gather there.
        gradient = torch.func.grad(lambda x: cross_entropy(x, target, dim=-1, reduction=reduced).sum())(x)
        return probabilities, torch.vmap(logsumexp)(x), of_probabilities, gradient

    x, target, classes = torch.randn(B, T, 9), torch.randint(3, (B, T)), torch.tensor(7)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, target, classes), function(x, target, classes))
