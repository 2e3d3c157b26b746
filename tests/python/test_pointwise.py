"""Elementwise losses: torch's numbers without a mask, what is masked is absent and never read, every argument."""

import functools
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import grid
import masked_loss
import pointwise_grid
import reference
from pointwise_grid import BROADCASTING, LOSSES, OPTIONS, WEIGHTED, operands
from reference import RELATIVE, allocations_of, assert_near, assert_positive_zero, assert_same_bits

CASES = list(enumerate(grid.covering_grid(pointwise_grid.LEVELS)))
IDS = [f"{seed} {grid.case_id(case)}" for seed, case in CASES]
GARBAGE = (math.nan, math.inf, -math.inf, -3.0, 1e30)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2, "sequence_mean": 3, "batchmean": 4}

every_loss = pytest.mark.parametrize("name", LOSSES)
every_variant = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in LOSSES for options in OPTIONS[name]], ids=str
)
every_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def reductions_of(name):
    return [reduction for reduction in REDUCTIONS if reduction != "batchmean" or name == "kl_div"]


every_variant_and_reduction = pytest.mark.parametrize(
    ("name", "options", "reduction"),
    [(name, options, reduction) for name in LOSSES for options in OPTIONS[name] for reduction in reductions_of(name)],
    ids=str,
)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The calls are small."""
    with threads(1):
        yield


def ours(name):
    return getattr(masked_loss, name)


def theirs(name):
    return reference.POINTWISE[name][0]


def differentiable(name):
    return ["input", "target"] + ["var"] * (name == "gaussian_nll_loss")


def sample(name, shape=(4, 6), dtype=torch.float32, leaves=("input",), **options):
    """New arguments of a loss."""
    tensors = {n: t.to(dtype) for n, t in operands(name, shape, options).items()}
    return {n: t.requires_grad_(n in leaves) for n, t in tensors.items()} | options


def loss_and_gradients(function, arguments, upstream=None):
    loss = function(**arguments)
    leaves = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    if upstream is None and loss.dim():
        upstream = torch.ones_like(loss)
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), upstream), strict=True))


class TestNoMaskNoDifference:
    @every_variant
    @every_reduction
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("mask", [None, torch.ones(4, 6, dtype=torch.bool)], ids=["no mask", "all kept"])
    def test_is_torch(self, name, options, reduction, dtype, mask):
        arguments = sample(name, dtype=dtype, leaves=differentiable(name), **options)
        upstream = torch.randn(4, 6, dtype=dtype) if reduction == "none" else torch.randn([], dtype=dtype)
        if not hasattr(F, name):  # the reference's has no reduction of its own
            expected_function = functools.partial(reference.pointwise, name, reduction=reduction)
            upstream = upstream.double()
        else:
            expected_function = functools.partial(theirs(name), reduction=reduction)
        expected, wanted = loss_and_gradients(expected_function, arguments, upstream)
        loss, gradients = loss_and_gradients(
            functools.partial(ours(name), mask=mask, reduction=reduction), arguments, upstream.to(dtype)
        )
        tolerance = dict(rtol=2e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(loss, expected.to(dtype), **tolerance)
        assert loss.dtype == dtype
        for argument, gradient in gradients.items():
            # NaN where torch's is: t log t and Stirling's formula at targets of 0.
            torch.testing.assert_close(gradient, wanted[argument], **tolerance, equal_nan=True)

    @pytest.mark.parametrize("name", WEIGHTED)
    @every_reduction
    def test_weight(self, name, reduction):
        arguments = sample(name) | {"weight": torch.rand(4, 6) + 0.1}
        if name == "binary_cross_entropy_with_logits":
            arguments["pos_weight"] = torch.rand(6) + 0.5
        with torch._C.DisableTorchFunction():  # under a mode torch's l1_loss forgets its weight
            expected, wanted = loss_and_gradients(functools.partial(theirs(name), reduction=reduction), arguments)
        loss, gradients = loss_and_gradients(functools.partial(ours(name), reduction=reduction), arguments)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients["input"], wanted["input"])

    @pytest.mark.parametrize("name", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
    @every_reduction
    @pytest.mark.parametrize("sizes", [(), (6,), (1,), (4, 1), (1, 6)], ids=str)
    def test_weights_broadcast_as_torchs(self, name, reduction, sizes):
        arguments = sample(name) | {"weight": torch.rand(sizes) + 0.1}
        expected, wanted = loss_and_gradients(functools.partial(theirs(name), reduction=reduction), arguments)
        loss, gradients = loss_and_gradients(functools.partial(ours(name), reduction=reduction), arguments)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, wanted)
        arguments["weight"].requires_grad_()  # the composite's, whose gradient has the weight's shape
        loss, gradients = loss_and_gradients(functools.partial(ours(name), reduction=reduction), arguments)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients["input"], wanted["input"])
        assert gradients["weight"].shape == sizes

    @pytest.mark.parametrize("log_target", [False, True])
    def test_batchmean(self, log_target):
        arguments = sample("kl_div", log_target=log_target)
        expected = F.kl_div(**arguments, reduction="batchmean")
        torch.testing.assert_close(masked_loss.kl_div(**arguments, reduction="batchmean"), expected)

    @every_loss
    def test_result_has_the_dtype_that_torch_promotes_to(self, name):
        for a in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for b in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                arguments = sample(name, dtype=torch.float64)
                arguments |= {"input": arguments["input"].detach().to(a), "target": arguments["target"].to(b)}
                if "var" in arguments:
                    arguments["var"] = arguments["var"].to(a)
                loss = ours(name)(**arguments)
                assert loss.dtype == torch.promote_types(a, b)
                wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
                assert_near(loss, reference.pointwise(name, **wide))

    @pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss", "poisson_nll_loss"])
    def test_integer_targets_promote(self, name):
        x, target = torch.rand(4, 6), torch.randint(5, (4, 6))
        torch.testing.assert_close(ours(name)(x, target), theirs(name)(x, target.float()))

    @pytest.mark.parametrize(
        "shapes", [((4, 6), (4, 1)), ((4, 1), (4, 6)), ((4, 6), (6,)), ((1, 6), (3, 4, 1))], ids=str
    )
    @pytest.mark.parametrize("name", [name for name in BROADCASTING if name != "gaussian_nll_loss"])
    @pytest.mark.filterwarnings("ignore:Using a target size")
    def test_targets_broadcast(self, name, shapes):
        arguments = {n: operands(name, shape, {})[n] for n, shape in zip(("input", "target"), shapes, strict=True)}
        arguments = {n: t.requires_grad_() for n, t in arguments.items()}

        def mean(**given):
            return theirs(name)(**given, reduction="none").mean()

        expected, wanted = loss_and_gradients(mean, arguments)
        loss, gradients = loss_and_gradients(ours(name), arguments)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, wanted, equal_nan=True)

    @pytest.mark.parametrize("sizes", [(4, 6), (4, 1), (4,), None])
    @pytest.mark.parametrize("full", [False, True])
    def test_variances(self, sizes, full):
        x, target = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
        var = 0.7 if sizes is None else torch.rand(sizes) + 0.2
        expected, wanted = loss_and_gradients(F.gaussian_nll_loss, dict(input=x, target=target, var=var, full=full))
        loss, gradients = loss_and_gradients(
            masked_loss.gaussian_nll_loss, dict(input=x, target=target, var=var, full=full)
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, wanted)

    def test_a_variance_below_eps_has_torchs_gradient(self):
        x, target = torch.randn(5, requires_grad=True), torch.randn(5)
        var = torch.tensor([0.0, 1e-7, 0.05, 0.1, 2.0], requires_grad=True)
        arguments = dict(input=x, target=target, var=var, eps=0.1)
        expected, wanted = loss_and_gradients(F.gaussian_nll_loss, arguments)
        loss, gradients = loss_and_gradients(masked_loss.gaussian_nll_loss, arguments)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, wanted)

    def test_probabilities_of_0_and_1(self):
        x = torch.tensor([0.0, 0.0, 1.0, 1.0, 1e-30, 0.5], requires_grad=True)
        target = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.25])
        for reduction in ("none", "sum"):
            expected, wanted = loss_and_gradients(
                functools.partial(F.binary_cross_entropy, reduction=reduction), dict(input=x, target=target)
            )
            loss, gradients = loss_and_gradients(
                functools.partial(masked_loss.binary_cross_entropy, reduction=reduction), dict(input=x, target=target)
            )
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients, wanted)

    def test_large_logits(self):
        x = torch.tensor([-200.0, -90.0, -1e-3, 0.0, 40.0, 90.0, 1e30], requires_grad=True)
        for target in (torch.zeros(7), torch.ones(7), torch.full((7,), 0.25)):
            arguments = dict(input=x, target=target)
            for name in ("binary_cross_entropy_with_logits", "sigmoid_focal_loss"):
                expected, wanted = loss_and_gradients(functools.partial(theirs(name), reduction="none"), arguments)
                loss, gradients = loss_and_gradients(functools.partial(ours(name), reduction="none"), arguments)
                torch.testing.assert_close(loss, expected)
                if name != "sigmoid_focal_loss":  # whose plain formula loses its gradient where p is 1
                    torch.testing.assert_close(gradients, wanted)
                assert gradients["input"].isfinite().all()


class TestMaskedIsAbsent:
    @pytest.mark.parametrize(("seed", "case"), CASES, ids=IDS)
    def test_against_reference(self, seed, case):
        call = pointwise_grid.build(case, seed)
        loss, gradients = pointwise_grid.run(ours(call.name), call)
        expected, wanted = pointwise_grid.run(
            functools.partial(reference.pointwise, call.name), pointwise_grid.in_double(call)
        )
        assert loss.dtype == (call.upstream.dtype if call.upstream is not None else result_dtype(call))
        assert_near(loss, expected, **allowance(call))
        for argument, gradient in gradients.items():
            assert gradient.dtype == call.arguments[argument].dtype
            coarser = max((gradient.dtype, loss.dtype, call.arguments["input"].dtype), key=RELATIVE.get)
            assert_near(gradient, wanted[argument], coarser, 1.0 if argument != "input" else 0.0)

    @pytest.mark.parametrize(("seed", "case"), CASES, ids=IDS)
    def test_torch_ops_and_bound_function_are_one(self, seed, case):
        call = pointwise_grid.build(case, seed)
        loss, gradients = pointwise_grid.run(ours(call.name), call)
        other, other_gradients = pointwise_grid.run(functools.partial(by_torch_ops, call.name), call)
        assert_same_bits(loss, other)
        for argument, gradient in gradients.items():
            assert_same_bits(gradient, other_gradients[argument])

    @pytest.mark.parametrize(("seed", "case"), [(seed, case) for seed, case in CASES if case["mask"] == "bytes"])
    def test_bytes_of_masks_are_not_numbers(self, seed, case):
        call = pointwise_grid.build(case, seed)
        loss, gradients = pointwise_grid.run(ours(call.name), call)
        plain = call._replace(arguments=grid.with_plain_masks(call.arguments))
        other, other_gradients = pointwise_grid.run(ours(call.name), plain)
        assert_same_bits(loss, other)
        for argument, gradient in gradients.items():
            assert_same_bits(gradient, other_gradients[argument])

    @every_variant
    def test_is_the_loss_of_what_is_kept(self, name, options):
        arguments, mask = sample(name, leaves=differentiable(name), **options), torch.rand(4, 6) < 0.5
        kept = {n: v[mask] if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        expected = ours(name)(**kept)
        loss = ours(name)(**arguments, mask=mask)
        torch.testing.assert_close(loss, expected)


def result_dtype(call):
    tensors = [call.arguments[n] for n in ("input", "target", "var", "pos_weight") if n in call.arguments]
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def allowance(call):
    """Terms of both signs may cancel in a sum."""
    return dict(largest=1.0)


def by_torch_ops(name, input, target, *, var=None, mask=None, reduction="mean", normalizer=None, **options):
    if isinstance(normalizer, float):
        accumulation = torch.float64 if input.dtype == torch.float64 else torch.float32
        normalizer = torch.tensor(normalizer, dtype=accumulation)
    operands = (input, target) if var is None else (input, target, var)
    op = getattr(torch.ops.masked_loss, name)
    return op(*operands, mask, REDUCTIONS[reduction], normalizer=normalizer, **options)


def poisoned(tensor, mask, start=0):
    """With garbage where the mask is False."""
    dropped = (~mask).nonzero().tolist()
    dirty = tensor.detach().clone()
    for number, position in enumerate(dropped):
        dirty[tuple(position)] = GARBAGE[(number + start) % len(GARBAGE)]
    return dirty.requires_grad_(tensor.requires_grad)


class TestMaskedIsNeverRead:
    @every_variant_and_reduction
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("path", ["kernel", "composite"])
    def test_garbage_changes_no_bit(self, name, options, reduction, dtype, path):
        leaves = ["input"] + ["var"] * (name == "gaussian_nll_loss") + ["target"] * (path == "composite")
        shape = (9, 33)  # registers and a tail
        arguments = sample(name, shape, dtype, leaves, **options)
        mask = torch.rand(shape) < 0.5
        mask[2], mask[3] = False, True
        weights = {"sample_weight": torch.rand(shape) + 0.1} | (
            {"weight": torch.rand(shape)} if name in WEIGHTED else {}
        )
        dirty = {
            n: poisoned(t, mask, n == "target") if n in ("input", "target", "var") else t for n, t in arguments.items()
        }
        dirty_weights = {n: poisoned(w, mask) for n, w in weights.items()}
        upstream = torch.randn(shape).to(dtype) if reduction == "none" else None
        dirty_upstream = None if upstream is None else poisoned(upstream, mask)
        function = functools.partial(ours(name), mask=mask, reduction=reduction)
        loss, gradients = loss_and_gradients(functools.partial(function, **weights), arguments, upstream)
        other, other_gradients = loss_and_gradients(functools.partial(function, **dirty_weights), dirty, dirty_upstream)
        assert_same_bits(other, loss)
        if reduction == "none":
            assert_positive_zero(loss[~mask])
        for argument, gradient in gradients.items():
            assert_same_bits(other_gradients[argument], gradient)
            assert_positive_zero(other_gradients[argument][~mask])
            assert gradient[mask].ne(0).any()

    @every_loss
    def test_a_sample_weight_of_0_masks(self, name):
        mask = torch.rand(4, 6) < 0.5
        arguments = sample(name)
        dirty = {n: poisoned(t, mask) for n, t in arguments.items()}
        by_mask, gradient = loss_and_gradients(functools.partial(ours(name), mask=mask), arguments)
        by_weight, other = loss_and_gradients(functools.partial(ours(name), sample_weight=mask.float()), dirty)
        assert_same_bits(by_weight, by_mask)
        assert_same_bits(other["input"], gradient["input"])

    @every_loss
    def test_upstream_garbage_at_masked_outputs_reaches_no_weight(self, name):
        mask = torch.rand(4, 6) < 0.5
        arguments = sample(name) | {"sample_weight": torch.rand(4, 6, requires_grad=True), "mask": mask}
        upstream = torch.randn(4, 6)
        function = functools.partial(ours(name), reduction="none")
        _, clean = loss_and_gradients(function, arguments, upstream)
        _, dirty = loss_and_gradients(function, arguments, poisoned(upstream, mask))
        for argument, gradient in clean.items():
            assert_same_bits(dirty[argument], gradient)
            assert_positive_zero(dirty[argument][~mask])


class TestNothingKept:
    @pytest.mark.parametrize(
        ("name", "reduction", "how"),
        [
            (name, reduction, how)
            for name in LOSSES
            for reduction in reductions_of(name)
            for how in ["mask", "sample_weight", "empty"]
            + ["normalizer"] * (reduction not in ("none", "sum"))
            + ["weights that cancel"] * (reduction in ("mean", "sequence_mean"))
        ],
    )
    def test_is_0_with_a_zero_gradient(self, name, reduction, how):
        shape = (0, 6) if how == "empty" else (4, 6)
        arguments = sample(name, shape)
        signs = torch.tensor([1.0, -1.0]).repeat(12).reshape(4, 6)
        arguments |= {
            "mask": {"mask": torch.zeros(shape, dtype=torch.bool)},
            "sample_weight": {"sample_weight": torch.zeros(4, 1)},
            "empty": {},
            "normalizer": {"mask": torch.zeros(shape, dtype=torch.bool), "normalizer": 0.0},
            "weights that cancel": {"sample_weight": signs},
        }[how]
        loss, gradients = loss_and_gradients(functools.partial(ours(name), reduction=reduction), arguments)
        assert_positive_zero(loss)
        assert_positive_zero(gradients["input"])
        assert gradients["input"].shape == shape

    @every_loss
    def test_an_empty_sequence_has_no_part_in_their_mean(self, name):
        arguments = sample(name)
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[1], mask[2, 3:] = False, False
        each = [ours(name)(**{n: t[i : i + 1] for n, t in arguments.items()}, mask=mask[i : i + 1]) for i in (0, 2, 3)]
        loss = ours(name)(**arguments, mask=mask, reduction="sequence_mean")
        torch.testing.assert_close(loss, torch.stack(each).mean())

    def test_batchmean_counts_slices_with_something_kept(self):
        arguments = sample("kl_div")
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[1], mask[2, 3:] = False, False
        total = masked_loss.kl_div(**arguments, mask=mask, reduction="sum")
        torch.testing.assert_close(masked_loss.kl_div(**arguments, mask=mask, reduction="batchmean"), total / 3)


class TestKeptGarbagePropagates:
    @pytest.mark.parametrize(
        ("name", "options", "argument", "value"),
        [
            (name, options, argument, value)
            for name in LOSSES
            for options in OPTIONS[name]
            for argument in ("input", "target")
            for value in (math.nan, math.inf, -math.inf)
            # torch refuses these
            if name != "binary_cross_entropy"
            and not (name.startswith("binary") and argument == "target" and math.isnan(value))
        ],
        ids=str,
    )
    def test_as_torchs(self, name, options, argument, value):
        """In value and gradient, inside a register and in a tail."""
        arguments = sample(name, (37,), **options)
        for position in (3, 36):
            changed = {n: t.detach().clone() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
            changed[argument][position] = value
            changed["input"].requires_grad_()
            expected, wanted = loss_and_gradients(functools.partial(theirs(name), reduction="none"), changed)
            loss, gradients = loss_and_gradients(functools.partial(ours(name), reduction="none"), changed)
            if argument == "target" and name == "binary_cross_entropy_with_logits":
                assert not loss[position].isfinite()
                continue
            torch.testing.assert_close(loss, expected, equal_nan=True)
            at = torch.arange(37) != position if name == "sigmoid_focal_loss" else slice(None)
            torch.testing.assert_close(gradients["input"][at], wanted["input"][at], equal_nan=True)
            # kl_div is linear in its input, and torch's slope of |NaN| is 0.
            if value != value and name not in ("kl_div", "l1_loss") and options.get("beta") != 0:
                assert gradients["input"][position].isnan()
            reduced, of_mean = loss_and_gradients(functools.partial(ours(name), mask=torch.ones(37) > 0), changed)
            torch.testing.assert_close(reduced, loss.mean(), equal_nan=True)
            torch.testing.assert_close(of_mean["input"], gradients["input"] / 37, equal_nan=True)

    @pytest.mark.parametrize("argument", ["input", "target"])
    def test_a_nan_probability(self, argument):
        arguments = sample("binary_cross_entropy")
        arguments[argument].data[1, 2] = math.nan
        loss, gradients = loss_and_gradients(masked_loss.binary_cross_entropy, arguments)
        assert loss.isnan()
        assert gradients["input"].isnan().nonzero().tolist() == [[1, 2]]

    def test_a_nan_variance(self):
        arguments = sample("gaussian_nll_loss")
        arguments["var"][1, 2] = math.nan
        assert masked_loss.gaussian_nll_loss(**arguments).isnan()


MODES = {
    "kernel": lambda function, x, **others: function(x, **others),
    "composite": lambda function, x, **others: function(
        x, **others, sample_weight=torch.ones_like(x, requires_grad=True)
    ),
    "grad": lambda function, x, **others: torch.func.grad(lambda x: function(x, **others).sum())(x),
    "jvp": lambda function, x, **others: torch.func.jvp(lambda x: function(x, **others), (x,), (torch.ones_like(x),)),
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class TestUnfitValues:
    @pytest.mark.parametrize("value", [-0.5, 1.5, -1e-6, math.inf, -math.inf])
    @every_reduction
    def test_probabilities(self, value, reduction):
        x, target = torch.full((3, 400), 0.5), torch.ones(3, 400)
        x[2, 371] = value
        message = rf"^binary_cross_entropy: expected kept input in \[0, 1\], got {value:g} at position \[2, 371\]"
        for requires_grad in (False, True):
            with pytest.raises(ValueError, match=message):
                masked_loss.binary_cross_entropy(x.clone().requires_grad_(requires_grad), target, reduction=reduction)
        masked_loss.binary_cross_entropy(x, target, x == 0.5, reduction=reduction)
        message = message.replace("input", "target")
        for requires_grad in (False, True):
            with pytest.raises(ValueError, match=message):
                masked_loss.binary_cross_entropy(target.clone().requires_grad_(requires_grad), x, reduction=reduction)
        masked_loss.binary_cross_entropy(target, x, x == 0.5, reduction=reduction)

    @every_mode
    @every_reduction
    def test_every_mode_refuses_them(self, mode, reduction):
        x = torch.full((2, 3), 0.5)
        bad = x.clone()
        bad[1, 0] = -2.0
        cross_entropy = functools.partial(masked_loss.binary_cross_entropy, reduction=reduction)
        where = r", got -2 at position \[1, 0\]"
        with pytest.raises(ValueError, match=r"^binary_cross_entropy: expected kept input in \[0, 1\]" + where):
            mode(cross_entropy, bad, target=x)
        with pytest.raises(ValueError, match=r"^binary_cross_entropy: expected kept target in \[0, 1\]" + where):
            mode(cross_entropy, x, target=bad)
        mode(cross_entropy, bad, target=bad, mask=bad > 0)
        gaussian = functools.partial(masked_loss.gaussian_nll_loss, target=x, reduction=reduction)
        with pytest.raises(ValueError, match="^gaussian_nll_loss: expected kept var of at least 0" + where):
            mode(gaussian, x, var=bad)
        mode(gaussian, x, var=bad, mask=bad > 0)

    def test_nan_where_they_cannot_be_read(self):
        bad, x = torch.tensor([0.5, -2.0, math.nan]), torch.full((3,), 0.5)
        for arguments in ((bad, x), (x, bad)):
            losses = torch.vmap(masked_loss.binary_cross_entropy)(*arguments)
            gradients = torch.vmap(torch.func.grad(masked_loss.binary_cross_entropy))(*arguments)
            for result in (losses, gradients):
                assert result.isnan().tolist() == [False, True, True]
        for argnums in (0, 2):
            gradients = torch.vmap(torch.func.grad(masked_loss.gaussian_nll_loss, argnums))(x, x + 1, bad)
            assert gradients.isnan().tolist() == [False, True, True]
        assert torch.vmap(masked_loss.gaussian_nll_loss)(x, x, bad).isnan().tolist() == [False, True, True]
        divisors = torch.tensor([2.0, -2.0, math.nan])
        each = torch.vmap(lambda x, n: masked_loss.mse_loss(x, torch.zeros(()), normalizer=n))(x, divisors)
        assert each.isnan().tolist() == [False, True, True]

    @every_mode
    def test_every_mode_refuses_a_negative_normalizer(self, mode):
        for normalizer in (-2.5, torch.tensor(-2.5)):
            with pytest.raises(ValueError, match=r"^mse_loss: expected normalizer of at least 0, got -2\.5"):
                mode(
                    functools.partial(masked_loss.mse_loss, normalizer=normalizer), torch.ones(3), target=torch.ones(3)
                )

    @every_reduction
    def test_variances(self, reduction):
        x, var = torch.zeros(3, 4), torch.ones(3, 4)
        var[1, 2] = -0.25
        message = r"^gaussian_nll_loss: expected kept var of at least 0, got -0\.25 at position \[1, 2\]"
        with pytest.raises(ValueError, match=message):
            masked_loss.gaussian_nll_loss(x, x, var, reduction=reduction)
        masked_loss.gaussian_nll_loss(x, x, var, var > 0, reduction=reduction)
        with pytest.raises(ValueError, match=r"^gaussian_nll_loss: expected kept var of at least 0, got -1 at"):
            masked_loss.gaussian_nll_loss(x, x, -1.0)


IN_A_CHILD = """
import sys, torch, masked_loss
results = []
for name, arguments in torch.load(sys.argv[1]):
    arguments["input"].requires_grad_()
    loss = getattr(masked_loss, name)(**arguments, reduction="none")
    (gradient,) = torch.autograd.grad(loss, arguments["input"], torch.ones_like(loss))
    results.append((loss.detach(), gradient))
torch.save(results, sys.argv[2])
"""


def edges(name, dtype):
    """Operands that ask everything of the elementary functions: tiny, huge, and close to 0 and to 1."""
    near = torch.logspace(-7, -1, 500, dtype=torch.float64)
    above_0 = torch.cat([torch.logspace(-44, 36, 5000, dtype=torch.float64), 1 - near, 1 + near])
    real = torch.cat([torch.linspace(-80, 80, 6001, dtype=torch.float64), near, -near])
    targets = (0.0, 0.3, 1.0)
    if name == "binary_cross_entropy":
        x = torch.cat([above_0[above_0 <= 1], torch.linspace(0, 1, 3001, dtype=torch.float64)])
    elif name == "kl_div":
        x, targets = torch.zeros_like(above_0), (above_0,)
    elif name == "gaussian_nll_loss":
        x, targets = torch.zeros_like(above_0), (0.0,)
    elif name == "poisson_nll_loss":
        x, targets = real, (0.0,)
    else:
        x = real
    for target in targets:
        target = target if isinstance(target, torch.Tensor) else torch.full_like(x, target)
        arguments = dict(input=x, target=target)
        if name == "gaussian_nll_loss":
            arguments["var"] = above_0
        yield {n: t.to(dtype) for n, t in arguments.items()}


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability, tmp_path):
    """Values and slopes are as exact as the dtype, wherever they lie; what the machine lacks falls back."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    problems = [(name, arguments) for name in LOSSES for dtype in dtypes for arguments in edges(name, dtype)]
    torch.save(problems, tmp_path / "problems.pt")
    command = [sys.executable, "-c", IN_A_CHILD, tmp_path / "problems.pt", tmp_path / "results.pt"]
    subprocess.run(command, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": capability})
    results = torch.load(tmp_path / "results.pt")
    for (name, arguments), (loss, gradient) in zip(problems, results, strict=True):
        expected, wanted = loss_and_gradients(
            functools.partial(reference.pointwise, name, reduction="none"),
            {n: t.double().requires_grad_(n == "input") for n, t in arguments.items()},
        )
        # Of these two terms of both signs cancel.
        largest = 1.0 if "logits" in name or "focal" in name else 0.0
        assert_near(loss, expected, largest=largest)
        assert_near(gradient, wanted["input"], largest=largest)


class TestGradients:
    @pytest.mark.parametrize(
        ("name", "options", "reduction"),
        [
            (name, options, reduction)
            for name in LOSSES
            for options in OPTIONS[name]
            if options != {"eps": 0.5}  # the derivative is as if it were not there
            for reduction in reductions_of(name)
        ],
        ids=str,
    )
    def test_finite_differences(self, name, options, reduction):
        names = differentiable(name)
        arguments = sample(name, (3, 4), torch.float64, names, **options)
        arguments["sample_weight"] = (torch.rand(3, 4, dtype=torch.float64) + 0.5).requires_grad_()
        names = [*names, "sample_weight"]
        if name in WEIGHTED:
            arguments["weight"] = (torch.rand(3, 1, dtype=torch.float64) + 0.5).requires_grad_()
            names = [*names, "weight"]
        if name in ("kl_div", "poisson_nll_loss") and not options.get("log_target"):  # t log t at 0, Stirling at 1
            arguments["target"] = (arguments["target"].detach() + 0.1).requires_grad_()
        mask = torch.rand(3, 4) < 0.7

        def function(*values):
            changed = arguments | dict(zip(names, values, strict=True))
            return ours(name)(**changed, mask=mask, reduction=reduction)

        values = [arguments[n] for n in names]
        assert torch.autograd.gradcheck(function, values, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, values)

    @every_loss
    def test_a_weight_of_0_that_is_differentiated_has_the_loss_for_its_gradient(self, name):
        arguments = sample(name)
        weight = torch.zeros(4, 6, requires_grad=True)
        function = functools.partial(ours(name), reduction="none")
        losses = function(**arguments)
        (gradient,) = torch.autograd.grad(function(**arguments, sample_weight=weight).sum(), weight)
        torch.testing.assert_close(gradient, losses.detach())

    def test_pos_weight_has_none(self):
        x = torch.zeros(2, 3)
        with pytest.raises(RuntimeError, match=r"^binary_cross_entropy_with_logits: expected pos_weight that does not"):
            masked_loss.binary_cross_entropy_with_logits(x, x, pos_weight=torch.ones(3, requires_grad=True))

    def test_float16_gradients_are_made_after_the_loss_scale(self):
        x = torch.full((1 << 14,), 1e-3, dtype=torch.float16, requires_grad=True)
        loss = masked_loss.mse_loss(x, torch.zeros_like(x))
        (gradient,) = torch.autograd.grad(loss.float() * 32768.0, x)
        expected = 32768.0 * 2 * x.detach().double() / len(x)
        torch.testing.assert_close(gradient.double(), expected, rtol=2**-9, atol=0)


class TestReductions:
    @every_loss
    def test_normalizer(self, name):
        arguments, mask = sample(name), torch.rand(4, 6) < 0.7
        total = ours(name)(**arguments, mask=mask, reduction="sum")
        for normalizer in (7, 7.0, torch.tensor(7.0), torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)):
            torch.testing.assert_close(ours(name)(**arguments, mask=mask, normalizer=normalizer), total / 7)

    @every_loss
    def test_bitwise_the_same_on_any_number_of_threads(self, name, threads):
        arguments = sample(name, (3, 100_000), leaves=["input"] + ["var"] * (name == "gaussian_nll_loss"))
        arguments["mask"] = torch.rand(3, 100_000) < 0.7
        for reduction in ("none", "mean", "sum", "sequence_mean"):
            results = []
            for count in (1, 2):
                with threads(count):
                    function = functools.partial(ours(name), reduction=reduction)
                    results.append(loss_and_gradients(function, arguments))
            (loss, gradients), (other, other_gradients) = results
            assert_same_bits(loss, other)
            for argument, gradient in gradients.items():
                assert_same_bits(gradient, other_gradients[argument])

    @every_loss
    def test_a_mask_is_not_expanded(self, name):
        """A mask of rows gives the bits of the same one written out."""
        arguments, mask = sample(name, (50, 70)), torch.rand(50, 1) < 0.6
        for reduction in ("none", "mean", "sum", "sequence_mean"):
            function = functools.partial(ours(name), reduction=reduction)
            assert_same_bits(
                function(**arguments, mask=mask), function(**arguments, mask=mask.expand(50, 70).contiguous())
            )

    @every_loss
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
    def test_no_temporary_but_the_gradients(self, name, dtype, reduction, check_values):
        check_values(False)  # where values are waited for, torch's ops look for unfit ones
        shape, leaves = (64, 1000), ["input"] + ["var"] * (name == "gaussian_nll_loss")
        arguments = sample(name, shape, dtype, leaves)
        if name in BROADCASTING:
            arguments["target"] = arguments["target"][:1]
        rows = dict(mask=torch.rand(64, 1) < 0.5, sample_weight=torch.rand(64, 1, dtype=dtype) + 0.1)
        function = functools.partial(ours(name), **rows, reduction=reduction)
        half = arguments["input"].nbytes // 2
        with torch.no_grad():
            assert allocations_of(lambda: function(**arguments), half) == 0
        assert allocations_of(lambda: loss_and_gradients(function, arguments), half) == len(leaves)

    def test_more_dimensions_than_merge(self):
        sizes = [2, 1, 3, 1, 2, 1, 2, 1, 2, 2]
        shape = [2, 2, 3, 2, 2, 2, 2, 2, 2, 2]
        x = torch.randn(shape[::-1]).permute(*reversed(range(10)))
        target, mask = torch.randn(sizes).expand(shape), torch.rand(sizes) < 0.6
        weight, upstream = torch.rand(shape).permute(*range(0, 10, 2), *range(1, 10, 2)), torch.randn(shape)
        weight = weight.contiguous().permute(0, 5, 1, 6, 2, 7, 3, 8, 4, 9)
        for reduction in ("none", "mean", "sequence_mean"):
            results = []
            for change in (lambda t: t, lambda t: t.expand(shape).contiguous()):
                arguments = dict(input=change(x).requires_grad_(), target=change(target), sample_weight=change(weight))
                function = functools.partial(masked_loss.mse_loss, mask=change(mask), reduction=reduction)
                given = change(upstream) if reduction == "none" else None
                results.append(loss_and_gradients(function, arguments, given))
            (loss, gradients), (other, other_gradients) = results
            assert_same_bits(loss, other)
            assert_same_bits(gradients["input"], other_gradients["input"])


class TestWarnings:
    """torch's own, in its words."""

    SIZES = (((3, 1), (3,)), ((3,), (3, 1)), ((2, 3), (3,)), ((), (1,)))

    @staticmethod
    def heard(function, *arguments, **options):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            function(*arguments, **options)
        return [(warning.category, str(warning.message), warning.filename) for warning in heard]

    @pytest.mark.parametrize("name", [name for name in BROADCASTING if name != "gaussian_nll_loss"])
    @pytest.mark.parametrize("sizes", (*SIZES, ((2, 3), (2, 3)), ((0,), (0,))), ids=str)
    def test_of_sizes_that_differ(self, name, sizes):
        arguments = [torch.ones(shape) for shape in sizes]
        options = {"reduction": "sum"} if name == "kl_div" else {}
        expected = self.heard(theirs(name), *arguments, **options)
        assert len(expected) == (
            sizes[0] != sizes[1] and name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
        )
        assert self.heard(ours(name), *arguments, **options) == expected
        assert [w[2] for w in expected] == [__file__] * len(expected)

    def test_of_a_mean_of_a_divergence(self):
        x = torch.zeros(2, 3)
        for reduction in ("mean", "sum", "none", "batchmean"):
            expected = self.heard(F.kl_div, x, x, reduction=reduction)
            assert len(expected) == (reduction == "mean")
            assert self.heard(masked_loss.kl_div, x, x, reduction=reduction) == expected
        assert self.heard(masked_loss.kl_div, x, x, normalizer=2.0) == []

    @pytest.mark.parametrize("name", ["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "KLDivLoss"])
    def test_of_modules(self, name):
        x, target = torch.ones(3, 1), torch.ones(3)
        expected = [w[:2] for w in self.heard(getattr(torch.nn, name)(), x, target)]
        assert [w[:2] for w in self.heard(getattr(masked_loss, name)(), x, target)] == expected
        assert len(expected) == 1

    def test_of_a_scripted_loss(self):
        x, target = torch.ones(3, 1), torch.ones(3)
        theirs, ours = torch.jit.script(F.mse_loss), torch.jit.script(masked_loss.mse_loss)
        assert [w[:2] for w in self.heard(ours, x, target)] == [w[:2] for w in self.heard(theirs, x, target)]
        assert self.heard(ours, x, x) == []

    def test_of_a_compiled_loss(self, fresh_compiler):
        """None, which would break the graph."""
        x, target = torch.ones(3, 1), torch.ones(3)
        for function in (masked_loss.mse_loss, masked_loss.kl_div):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            assert self.heard(compiled, x, target) == []


class TestDtype:
    @every_variant_and_reduction
    def test_float32_of_bfloat16(self, name, options, reduction):
        """What float32 copies of the same numbers give, of which gradients are rounded once."""
        arguments = sample(name, dtype=torch.bfloat16, leaves=differentiable(name), **options)
        wide = {
            n: t.detach().float().requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()
        }
        mask = torch.rand(4, 6) < 0.6
        expected, wanted = loss_and_gradients(functools.partial(ours(name), mask=mask, reduction=reduction), wide)
        function = functools.partial(ours(name), mask=mask, reduction=reduction, dtype=torch.float32)
        for leaves in (differentiable(name), ["input"]):
            given = {
                n: t.detach().requires_grad_(n in leaves) if isinstance(t, torch.Tensor) else t
                for n, t in arguments.items()
            }
            loss, gradients = loss_and_gradients(function, given)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected)
            for argument, gradient in gradients.items():
                assert gradient.dtype == torch.bfloat16
                torch.testing.assert_close(gradient, wanted[argument].bfloat16(), rtol=2**-7, atol=1e-6, equal_nan=True)

    @every_loss
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, None], ids=str)
    @pytest.mark.parametrize("autocast", [False, True])
    def test_wins(self, name, dtype, autocast):
        """Over what the operands promote to and over autocast, on every path."""
        arguments = sample(name, dtype=torch.bfloat16)
        default = torch.float32 if autocast else torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            function = functools.partial(ours(name), dtype=dtype)
            learned = arguments | {"sample_weight": torch.ones(4, 6, requires_grad=True)}
            constant = {n: t.detach() for n, t in arguments.items()}
            results = [function(**arguments), function(**learned), function(**constant)]
            names = list(constant)
            each = torch.vmap(lambda *values: function(**dict(zip(names, values, strict=True))))
            results.append(each(*constant.values()))
            results.append(by_torch_ops(name, **constant, dtype=dtype))
        if dtype is not None:
            results.append(function(**{n: t.to("meta") for n, t in constant.items()}))
        assert {result.dtype for result in results} == {dtype or default}

    def test_float64_is_what_the_loss_is_computed_in(self):
        x = torch.tensor([1e-30, 3.0], requires_grad=True)
        loss = masked_loss.mse_loss(x, torch.zeros(2), reduction="none", dtype=torch.float64)
        torch.testing.assert_close(loss, x.double() ** 2, rtol=1e-15, atol=0)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(gradient, 2 * x)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_of_half_types_makes_no_copy_of_them(self, reduction):
        x = torch.rand(64, 1000).bfloat16().requires_grad_()
        function = functools.partial(masked_loss.mse_loss, reduction=reduction, dtype=torch.float32)
        with torch.no_grad():
            assert allocations_of(lambda: function(x, x), x.nbytes) == (reduction == "none")
        assert allocations_of(lambda: function(x, x.detach()).sum().backward(), x.nbytes) == 1 + (reduction == "none")

    def test_module(self):
        x = torch.zeros(3, dtype=torch.bfloat16)
        assert masked_loss.MSELoss(dtype=torch.float32)(x, x).dtype == torch.float32
        assert "dtype=torch.float32" in repr(masked_loss.HuberLoss(dtype=torch.float32))


def test_a_variance_that_is_a_number_compiles(fresh_compiler):
    """Of which a compiler makes a symbol."""
    x, target = torch.randn(4), torch.randn(4)
    options = dict(fullgraph=True, backend="aot_eager", dynamic=True)
    compiled = torch.compile(lambda var: masked_loss.gaussian_nll_loss(x, target, var), **options)
    for var in (1.5, 2.5):
        torch.testing.assert_close(compiled(var), F.gaussian_nll_loss(x, target, torch.full((4,), var)))
