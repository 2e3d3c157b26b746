"""The ops under opcheck, compilers, TorchScript, export, fx, modes and meta tensors."""

import io
from typing import List, Optional, Union

import pytest
import torch
from torch import Tensor

from masked_loss import (
    CrossEntropyLoss,
    causal_mask,
    check_targets,
    cross_entropy,
    loss_normalizer,
    mask_from_ids,
    masked_fill,
    masked_fill_,
    sequence_mask,
)
from problems import REDUCTIONS, B, C, T, batch, every_option, every_reduction
from reference import assert_near, assert_same_bits

ops = torch.ops.masked_loss


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def opcheck_arguments():
    """name: (op, arguments), each a new set."""
    x, target, mask = batch()
    full = dict(weight=torch.rand(C), sample_weight=torch.rand(B, 1), class_mask=torch.rand(1, 1, C) < 2, z_loss=0.1)
    full.update(label_smoothing=0.1, ignore_index=[-100, 4], dim=-1)
    maximum = x.amax(-1)
    softmax = torch.stack([maximum, (x - maximum.unsqueeze(-1)).exp().sum(-1)], -1)
    fill = torch.rand(T, 1) < 0.5
    half = x.to(torch.bfloat16)
    lengths = torch.tensor([1, 4, 2])
    count = torch.tensor(3.0)
    differentiable = torch.rand(B, 1, requires_grad=True)
    checks = {
        "differentiated sample_weight": (
            ops.cross_entropy,
            (x, target, mask),
            dict(sample_weight=differentiable, dim=-1),
        ),
        "normalizer": (ops.cross_entropy, (x, target, mask, 1), dict(normalizer=count, dim=-1)),
        "bfloat16": (ops.cross_entropy, (half.requires_grad_(), target), dict(dim=-1)),
        "inner classes": (ops.cross_entropy, (x.transpose(1, 2).contiguous().requires_grad_(), target, mask), {}),
        "unbatched": (ops.cross_entropy, (torch.randn(C, requires_grad=True), torch.tensor(1)), {}),
        "no grad": (ops.cross_entropy, (x, target, mask), dict(dim=-1)),
        "loss_normalizer": (ops.loss_normalizer, (target, mask), dict(weight=torch.rand(C), dim=-1)),
        "check_targets": (ops.check_targets, (target, C, mask), {}),
        "scale": (ops._scale_gradient_, (torch.randn(2, 3), torch.tensor(2.0)), {}),
        "masked_fill scalar": (ops.masked_fill.Scalar, (x.clone().requires_grad_(), fill, 2.0), {}),
        "masked_fill tensor": (ops.masked_fill.Tensor, (x, fill, torch.tensor(2.0, requires_grad=True)), {}),
        "masked_fill integers": (ops.masked_fill.Scalar, (target, mask.long(), 2), {}),
        "masked_fill grows": (ops.masked_fill.Scalar, (torch.randn(4, 1, requires_grad=True), mask[:, None], 2), {}),
        "masked_fill_ scalar": (ops.masked_fill_.Scalar, (x.clone(), fill, 2.0), {}),
        "masked_fill_ tensor": (ops.masked_fill_.Tensor, (x.clone(), fill, torch.tensor(2.0)), {}),
        "masked_fill_ graph": (ops.masked_fill_.Scalar, (x.clone().requires_grad_() * 1, fill, 2.0), {}),
        "sequence_mask": (ops.sequence_mask, (lengths, 5, "left"), {}),
        "mask_from_ids": (ops.mask_from_ids, (target, [0, 2]), {}),
        "causal_mask": (ops.causal_mask, (3, 4), {}),
    }
    for number, name in enumerate(REDUCTIONS):
        grad = torch.randn(B, T) if name == "none" else torch.tensor(2.0)
        checks[f"cross_entropy {name}"] = (ops.cross_entropy, (x.clone().requires_grad_(), target, mask, number), full)
        checks[f"forward {name}"] = (ops._cross_entropy_forward, (x, target, mask, number), full)
        checks[f"backward {name}"] = (ops._cross_entropy_backward, (grad, x, target, softmax, mask, number), full)
        if name != "none":
            checks[f"forward_grad {name}"] = (ops._cross_entropy_forward_grad, (x, target, mask, number), full)
    return checks


@pytest.mark.parametrize("name", opcheck_arguments())
def test_opcheck(name, fresh_compiler):
    op, arguments, options = opcheck_arguments()[name]
    op = op.default if isinstance(op, torch._ops.OpOverloadPacket) else op
    torch.library.opcheck(op, arguments, options)


def test_every_op_is_checked():
    checked = {str(op).split(".")[1] for op, _, _ in opcheck_arguments().values()}
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    assert checked == {name.removeprefix("masked_loss::") for name in names if name.startswith("masked_loss::")}


def loss_and_gradients(function, *leaves, upstream=None):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


@every_reduction
@every_option
def test_compiled_gives_the_eager_numbers(options, reduction, fresh_compiler):
    def function(x, target, mask):
        return cross_entropy(x * 1.5, target, mask, reduction=reduction, dim=-1, **options)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    x, target, mask = batch()
    upstream = torch.randn(B, T) if reduction == "none" else torch.tensor(-2.0)
    eager = loss_and_gradients(lambda x: function(x, target, mask), x, upstream=upstream)
    results = loss_and_gradients(lambda x: compiled(x, target, mask), x, upstream=upstream)
    for ours, theirs in zip(results, eager, strict=True):
        assert_same_bits(ours, theirs)


def test_one_compilation_serves_every_size(fresh_compiler):
    def function(x, target, lengths, count):
        mask = sequence_mask(lengths, target.shape[1])
        return cross_entropy(x, target, mask, normalizer=count, dim=-1)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for number, (size, time) in enumerate([(3, 4), (5, 7), (2, 9)]):
        x, target, _ = batch(size=size, time=time)
        arguments = (target, torch.randint(1, time, (size,)), torch.tensor(6))
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            ours = loss_and_gradients(lambda x: compiled(x, *arguments), x)  # noqa: B023
        theirs = loss_and_gradients(lambda x: function(x, *arguments), x)  # noqa: B023
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dim", [1, -1])
def test_inductor_gives_the_eager_numbers(dim, fresh_compiler):
    def function(x, target, lengths, weights):
        logits = x.transpose(1, 2) if dim == 1 else x
        mask = sequence_mask(lengths, target.shape[1])
        loss = cross_entropy(logits.sin(), target, mask, sample_weight=weights, label_smoothing=0.1, dim=dim)
        return loss + masked_fill(x, mask.unsqueeze(-1), 0.0).square().mean()

    x, target, _ = batch()
    lengths, weights = torch.tensor([4, 1, 0]), torch.rand(B, 1) + 0.1
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    ours = loss_and_gradients(lambda x, w: compiled(x, target, lengths, w), x, weights)
    theirs = loss_and_gradients(lambda x, w: function(x, target, lengths, w), x, weights)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b)


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
        return keep, causal_mask(tokens.shape[1]), loss_normalizer(checked, keep)

    for time in (4, 6):
        lengths, tokens = torch.tensor([2, 4]), torch.randint(0, 9, (2, time))
        keep, causal, count = function(lengths, tokens)
        expected = (tokens > 1) & (torch.arange(time) >= time - lengths[:, None])
        assert keep.equal(expected)
        assert causal.equal(torch.ones(time, time, dtype=torch.bool).tril())
        assert count.item() == expected.sum().item()
    with pytest.raises(IndexError, match=r"got 9 "):
        function(lengths, tokens.fill_(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_under_autocast(dtype, fresh_compiler):
    def function(x, target, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross_entropy(x, target, mask, dim=-1)

    x, target, mask = batch(dtype)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    ours = loss_and_gradients(lambda x: compiled(x, target, mask), x)
    theirs = loss_and_gradients(lambda x: function(x, target, mask), x)
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


def graphs_of(function, *arguments):
    """The forward and the backward graph that a compiler is given."""
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return torch._functorch.aot_autograd.make_boxed_func(module.forward)

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(function, backend=backend, fullgraph=True)(*arguments).sum().backward()
    return graphs


@every_reduction
def test_a_graph_has_one_op_forward_and_one_backward(reduction, fresh_compiler):
    x, target, mask = batch()
    options = dict(reduction=reduction, label_smoothing=0.1, dim=-1)
    graphs = graphs_of(lambda x: cross_entropy(x, target, mask, **options), x.requires_grad_())
    assert len(graphs) == 2
    for graph in graphs:
        calls = [f"{node.target} {node.args}" for node in graph.nodes if node.op == "call_function"]
        assert sum("masked_loss" in call for call in calls) == 1, calls
        assert not any("softmax" in call or "logsumexp" in call for call in calls)


class Model(torch.nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.head = torch.nn.Linear(6, C)
        self.loss = CrossEntropyLoss(torch.rand(C), ignore_index=[2, -100], reduction=reduction, z_loss=0.1, dim=-1)

    def forward(self, hidden: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        mask = sequence_mask(lengths, target.shape[1])
        return self.loss(masked_fill(self.head(hidden), mask.unsqueeze(-1).logical_not(), 0.0), target, mask)


def model_inputs(size=3, time=4):
    return torch.randn(size, time, 6), torch.randint(C, (size, time)), torch.randint(0, time + 1, (size,)).clamp(min=1)


@every_reduction
def test_export_with_dynamic_shapes(reduction):
    size, time = torch.export.Dim("size"), torch.export.Dim("time")
    model = Model(reduction)
    dynamic_shapes = ({0: size, 1: time}, {0: size, 1: time}, {0: size})
    program = torch.export.export(model, model_inputs(), dynamic_shapes=dynamic_shapes)
    assert "masked_loss.cross_entropy" in program.graph_module.code
    for shape in [(3, 4), (5, 9), (2, 3)]:
        inputs = model_inputs(*shape)
        assert_same_bits(program.module()(*inputs), model(*inputs))


def saved_and_loaded(scripted):
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def script_me(
    x: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    ids: Union[int, List[int]] = -100,
    normalizer: Optional[Union[float, Tensor]] = None,
    reduction: str = "mean",
) -> Tensor:
    options = loss_normalizer(target, mask, ignore_index=ids)
    loss = cross_entropy(
        x, target, mask, ignore_index=ids, normalizer=normalizer, reduction=reduction, label_smoothing=0.1, dim=-1
    )
    kept = mask_from_ids(check_targets(target, 5, mask, ignore_index=ids), ids)
    x = masked_fill_(masked_fill(x, kept.unsqueeze(-1), 1.0), kept.unsqueeze(-1), torch.zeros([], dtype=x.dtype))
    return loss * options + x.sum() + causal_mask(3).sum() + sequence_mask(target.sum(1)).sum()


class TestTorchScript:
    @pytest.mark.parametrize("load", [lambda f: f, saved_and_loaded], ids=["scripted", "saved and loaded"])
    def test_every_function(self, load):
        function = load(torch.jit.script(script_me))
        x, target, mask = batch()
        # All of them are given: a function that was saved has lost its defaults of a Union type.
        cases = [
            (None, -100, None, "mean"),
            (mask, 2, None, "none"),
            (mask.long(), [1, 2], 3.0, "mean"),
            (mask, -100, torch.tensor(2), "sequence_mean"),
            (None, 1, None, "sum"),
        ]
        for case in cases:
            ours = loss_and_gradients(lambda x: function(x, target, *case).sum(), x)  # noqa: B023
            theirs = loss_and_gradients(lambda x: script_me(x, target, *case).sum(), x)  # noqa: B023
            for a, b in zip(ours, theirs, strict=True):
                assert_near(a, b)

    @every_reduction
    def test_a_module_trains_the_same(self, reduction):
        model = Model(reduction)
        loaded = saved_and_loaded(torch.jit.script(model))
        assert "masked_loss::cross_entropy" in str(loaded.inlined_graph)
        inputs = model_inputs()
        for module in (model, loaded):
            module(*inputs).sum().backward()
        assert_same_bits(loaded(*inputs), model(*inputs))
        for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
            assert_near(ours.grad, theirs.grad)

    def test_traced(self):
        x, target, mask = batch()
        traced = torch.jit.trace(lambda x, t, m: cross_entropy(x, t, m, dim=-1), (x, target, mask))
        assert "masked_loss::cross_entropy" in str(traced.graph)
        x, target, mask = batch()
        assert_same_bits(traced(x, target, mask), cross_entropy(x, target, mask, dim=-1))


class TestMeta:
    @every_reduction
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_cross_entropy(self, reduction, dtype):
        x, target, mask = batch(dtype)
        for moved in (x, x.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
            real, fake = moved.detach().requires_grad_(), moved.detach().to("meta").requires_grad_()
            options = dict(reduction=reduction, dim=-1)
            expected = cross_entropy(real, target, mask, **options)
            loss = cross_entropy(fake, target.to("meta"), mask.to("meta"), **options)
            assert loss.device.type == "meta"
            assert (loss.shape, loss.dtype, loss.requires_grad) == (expected.shape, dtype, True)
            loss.sum().backward()
            expected.sum().backward()
            assert (fake.grad.shape, fake.grad.dtype) == (x.shape, dtype)
            assert fake.grad.stride() == real.grad.stride()

    def test_the_other_ops(self):
        target = torch.zeros(B, T, dtype=torch.int32, device="meta")
        mask = torch.ones(B, 1, dtype=torch.bool, device="meta")
        x = torch.zeros(B, T, C, dtype=torch.float16, device="meta")
        for result, shape, dtype in (
            (loss_normalizer(target, mask), (), torch.float32),
            (check_targets(target, 5, mask), (B, T), torch.int32),
            (masked_fill(x, mask.unsqueeze(-1), 1), (B, T, C), torch.float16),
            (masked_fill(x, torch.ones(2, B, 1, 1, dtype=torch.bool, device="meta"), 1), (2, B, T, C), torch.float16),
            (masked_fill_(x, mask.unsqueeze(-1), 1), (B, T, C), torch.float16),
            (sequence_mask(target, 7), (B, T, 7), torch.bool),
            (mask_from_ids(target, 0), (B, T), torch.bool),
        ):
            assert (result.device.type, result.shape, result.dtype) == ("meta", shape, dtype)

    def test_fake_tensors_of_the_meta_kernels(self):
        with torch._subclasses.FakeTensorMode():
            x, target, mask = (
                torch.empty(3, 4, 5, requires_grad=True),
                torch.zeros(3, 4).long(),
                torch.empty(3, 1).bool(),
            )
            loss = cross_entropy(x, target, mask, reduction="none", dim=-1)
            loss.sum().backward()
        assert loss.shape == (3, 4)
        assert x.grad.shape == x.shape


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
