"""torch's own test material for the functions that ours extend: its OpInfo and ModuleInfo samples, and its errors."""

import functools

import pytest
import torch
import torch.nn.functional as F

import masked_loss
from masked_loss import cross_entropy, masked_fill, masked_fill_
from reference import ABSOLUTE, RELATIVE, assert_near, assert_same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The samples are small."""
    with threads(1):
        yield


def device():
    """Where the other tensors of the tests are made too."""
    return str(torch.get_default_device())


# torch's test modules change global settings and take seconds to import: nobody pays who runs other tests.
@functools.cache
def op_info(name):
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == name)
    return info


@functools.cache
def module_info():
    from torch.testing._internal.common_modules import module_db

    (info,) = (info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)
    return info


def from_module(inputs):
    """A call of the function that the module is a shell of."""
    return *inputs.forward_input.args, inputs.constructor_input.kwargs


def cross_entropy_samples(dtype):
    """Input, target (class indices or class probabilities) and arguments, up to 4 dimensions."""
    info = op_info("nn.functional.cross_entropy")
    samples = [
        (sample.input, *sample.args, sample.kwargs)
        for _ in range(3)  # the samples are random
        for sample in info.sample_inputs(device(), dtype, requires_grad=True)
    ]
    modules = module_info().module_inputs_func(module_info(), device(), dtype, requires_grad=True, training=True)
    samples += map(from_module, modules)
    for probabilities in (False, True):
        assert sum(sample[1].is_floating_point() == probabilities for sample in samples) > 50
    return samples


def leaf(tensor, dtype=None):
    """The same numbers, to differentiate by; class indices as they are."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(tensor.requires_grad)


def in_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def run(function, input, target, arguments, upstream=None):
    """The loss, the gradients of input and target, and the upstream one."""
    loss = function(input, target, **arguments)
    if upstream is None:
        upstream = torch.randn_like(loss)
    leaves = [each for each in (input, target) if each.requires_grad]
    gradients = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype), materialize_grads=True)
    return loss, gradients, upstream


def expect(function, sample, expected_function, **mask):
    """`function` on the sample is the other on the sample in float64: values and gradients."""
    input, target, arguments = sample
    loss, gradients, upstream = run(function, leaf(input), leaf(target), {**arguments, **mask})
    doubles = {name: in_double(value) for name, value in arguments.items()}
    expected, wanted, _ = run(
        expected_function, leaf(input, torch.float64), leaf(target, torch.float64), {**doubles, **mask}, upstream
    )
    assert loss.dtype == input.dtype
    # A row that is nearly certain loses digits: lse - x_y to the size of the logits, p - 1 to that of 1.
    weight = 1.0 if arguments.get("weight") is None else arguments["weight"].abs().max().item()
    assert_near(loss, expected, largest=weight * input.abs().max().item())
    for ours, theirs, of in zip(gradients, wanted, (input, target), strict=False):
        assert ours.dtype == of.dtype
        assert_near(ours, theirs, largest=weight * upstream.abs().max().item())


def zero_for_nothing(loss, input, targets, ignore_index=-100):
    """The one deliberate difference: torch's mean of nothing is NaN, ours 0 with a zero gradient."""
    kept = targets if targets.is_floating_point() else targets[targets != ignore_index]
    return loss if len(kept) else input.sum() * 0


def unmasked(input, target, *, reduction="mean", **arguments):
    loss = F.cross_entropy(input, target, reduction=reduction, **arguments)
    return loss if reduction == "none" else zero_for_nothing(loss, input, target, arguments.get("ignore_index", -100))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_without_a_mask(dtype):
    for sample in cross_entropy_samples(dtype):
        expect(cross_entropy, sample, unmasked)


def masks(shape):
    """Random ones, one that keeps nothing, and a broadcast one."""
    yield from (torch.rand(shape) < 0.6 for _ in range(2))
    yield torch.zeros(shape, dtype=torch.bool)
    yield torch.rand([size if d == 0 else 1 for d, size in enumerate(shape)]) < 0.6


def selected(input, target, *, mask, reduction="mean", ignore_index=-100, **arguments):
    """torch's loss of `input[mask]`, `target[mask]`; 0 where that is the mean of nothing."""
    class_dim = min(input.dim() - 1, 1)
    shape = [size for d, size in enumerate(input.shape) if d != class_dim]
    mask = mask.expand(shape)
    rows = input.movedim(class_dim, -1)[mask]
    targets = target.movedim(class_dim, -1)[mask] if target.is_floating_point() else target[mask]
    losses = F.cross_entropy(rows, targets, reduction=reduction, ignore_index=ignore_index, **arguments)
    if reduction == "none":
        return torch.zeros(shape, dtype=input.dtype).masked_scatter(mask, losses)
    return zero_for_nothing(losses, rows, targets, ignore_index)


def ignored(input, target, *, mask, ignore_index=-100, **arguments):
    """torch's loss with `ignore_index` written into the target where the mask is False; its mean of nothing is NaN."""
    return F.cross_entropy(input, target.where(mask, ignore_index), ignore_index=ignore_index, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_cross_entropy_is_that_of_what_is_kept(dtype):
    for sample in cross_entropy_samples(dtype):
        input, target, arguments = sample
        shape = input.select(min(input.dim() - 1, 1), 0).shape
        for mask in masks(shape):
            expect(cross_entropy, sample, selected, mask=mask)
            if target.is_floating_point():
                continue
            if (mask & (target != arguments.get("ignore_index", -100))).any():
                expect(cross_entropy, sample, ignored, mask=mask)


def test_cross_entropy_errors():
    # OpInfo has none of its own for it today; ModuleInfo has.
    info, errors = op_info("nn.functional.cross_entropy"), []
    if info.error_inputs_func is not None:
        errors += [
            (e.sample_input.input, *e.sample_input.args, e.sample_input.kwargs) for e in info.error_inputs(device())
        ]
    modules = module_info().module_error_inputs_func(
        module_info(), device(), torch.float32, requires_grad=True, training=True
    )
    errors += [from_module(error.module_error_input) for error in modules]
    assert len(errors) >= 7
    for input, target, arguments in errors:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"^cross_entropy: expected "):
            cross_entropy(input, target, **arguments)


# torch's names of what its samples pass by position.
POINTWISE = {
    "mse_loss": (),
    "l1_loss": (),
    "smooth_l1_loss": (),
    "huber_loss": (),
    "binary_cross_entropy_with_logits": ("weight",),
    "binary_cross_entropy": ("weight",),
    "kl_div": (),
    "poisson_nll_loss": (),
    "gaussian_nll_loss": ("var",),
}


def pointwise_samples(name, dtype):
    """Arguments by name; of torch's own what ours does not have is left out: broadcast inputs of BCE."""
    samples = []
    for sample in op_info(f"nn.functional.{name}").sample_inputs(device(), dtype, requires_grad=True):
        arguments = dict(zip(("input", "target", *POINTWISE[name]), (sample.input, *sample.args), strict=False))
        arguments |= sample.kwargs
        if "binary" in name and arguments["input"].shape != arguments["target"].shape:
            continue
        weight = arguments.get("weight")
        if isinstance(weight, torch.Tensor) and weight.dim() != arguments["input"].dim():
            arguments["weight"] = weight.expand(arguments["input"].shape)
        samples.append(arguments)
    assert len(samples) >= 4
    return samples


def of_leaves(function, arguments, dtype, upstream=None):
    """The loss, its gradients where the namesake has them, and the upstream one."""
    given = {
        name: value.detach().to(dtype).requires_grad_(name in ("input", "target", "var"))
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    loss = function(**given)
    if upstream is None:
        upstream = torch.randn_like(loss)
    leaves = [value for value in given.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    return loss, torch.autograd.grad(loss, leaves, upstream.to(loss.dtype)), upstream


def spread(name, tensor, shape):
    """An argument over all elements; a variance may lack the last dimension."""
    return (tensor.unsqueeze(-1) if name == "var" and tensor.dim() == len(shape) - 1 else tensor).expand(shape)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size")
@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_pointwise(name, dtype, masked):
    """torch's numbers in float64 without a mask, and on what a mask keeps with one."""
    ours, theirs = getattr(masked_loss, name), getattr(F, name)
    for arguments in pointwise_samples(name, dtype):
        tensors = [n for n, value in arguments.items() if isinstance(value, torch.Tensor)]
        shape = torch.broadcast_shapes(arguments["input"].shape, arguments["target"].shape)
        if 0 in shape:  # whose mean is NaN in torch
            assert (ours(**arguments) == 0).all()
            continue
        reference, function = theirs, ours
        if masked:
            mask = torch.rand(shape) < 0.6
            mask.view(-1)[0] = True

            def reference(mask=mask, tensors=tensors, **given):
                given = {n: spread(n, v, mask.shape)[mask] if n in tensors else v for n, v in given.items()}
                if given.get("reduction") != "batchmean":
                    return theirs(**given)
                # of the slices with something kept
                return theirs(**given | {"reduction": "sum"}) / mask.view(len(mask), -1).any(1).sum()

            def function(mask=mask, **given):
                loss = ours(**given, mask=mask)
                return loss[mask] if given.get("reduction") == "none" else loss

        loss, gradients, upstream = of_leaves(function, arguments, dtype)
        expected, wanted, _ = of_leaves(reference, arguments, torch.float64, upstream)
        wide = arguments | {n: spread(n, arguments[n], shape) for n in tensors}
        _, terms, _ = of_leaves(reference, wide, torch.float64, upstream)
        assert loss.dtype == dtype
        assert_near(loss, expected, largest=1.0)
        for gradient, exact, each in zip(gradients, wanted, terms, strict=True):
            if gradient.shape == shape and arguments.get("var") is None:
                assert_near(gradient, exact, largest=1.0)
            else:  # sums of what is rounded, whose terms cancel: each term may be larger than its sum
                largest = each.abs().max().item()
                torch.testing.assert_close(
                    gradient.double(), exact, rtol=4 * RELATIVE[dtype], atol=8 * largest * RELATIVE[dtype]
                )


# torch.masked's functions, and ours; softmaxes of torch itself have more samples than one name.
NORMALIZED = ("softmax", "log_softmax", "logsumexp")


def normalized_samples(name, dtype):
    """Input, dim and arguments: of torch's function, and of torch.masked's, which have a mask or None."""
    from torch.testing._internal.common_methods_invocations import op_db

    found = []
    for info in (info for info in op_db if info.name in (name, f"masked.{name}")):
        for sample in info.sample_inputs(device(), dtype, requires_grad=True):
            arguments = dict(zip(("dim", "keepdim"), sample.args, strict=False)) | sample.kwargs
            if sample.input.is_floating_point() or "dtype" in arguments or name == "logsumexp":
                found.append((info.name.startswith("masked."), sample.input, arguments))
    assert len(found) > 20
    return found


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized(name, dtype):
    """torch's numbers; torch.masked's too, but where a slice has nothing kept: there its softmaxes are NaN."""
    outside = {"softmax": 0.0, "log_softmax": -torch.inf, "logsumexp": -torch.inf}[name]
    for masked, input, arguments in normalized_samples(name, dtype):
        ours, theirs = getattr(masked_loss, name), getattr(torch.masked if masked else torch, name)
        mask = arguments.get("mask")
        result_dtype = arguments.get("dtype", input.dtype)

        def double(function, input=input, arguments=arguments):
            wide = leaf(input, torch.float64)
            result = function(wide, **{n: v for n, v in arguments.items() if n != "dtype"})
            return wide, result.masked_fill(result.isnan(), outside)

        if "dim" not in arguments:
            continue  # which torch warns of, and takes any dimension for
        dim = arguments["dim"]
        arguments = {**arguments, "dim": list(dim) if isinstance(dim, tuple) else dim}
        given = leaf(input)
        value = ours(given, **arguments)
        wide, expected = double(theirs, arguments={**arguments, "dim": dim})
        assert value.dtype == result_dtype
        assert not value.isnan().any()
        assert_near(value, expected, largest=1.0)
        if not given.requires_grad or value.numel() == 0:
            continue
        upstream = torch.randn_like(value)
        (gradient,) = torch.autograd.grad(value, given, upstream)
        safe = upstream.double().masked_fill(expected == outside, 0.0) if mask is not None else upstream.double()
        (wanted,) = torch.autograd.grad(expected, wide, safe, materialize_grads=True)
        assert gradient.dtype == input.dtype
        wanted = wanted.nan_to_num(0.0) if mask is not None else wanted
        largest = upstream.abs().max().item() * torch.finfo(result_dtype).eps * 8 / ABSOLUTE[result_dtype]
        assert_near(gradient, wanted, largest=max(largest, 1.0))


def reduction_samples(name, dtype):
    """Input and arguments of torch's function, and of torch.masked's, which are said to be those."""
    from torch.testing._internal.common_methods_invocations import op_db

    found = []
    for info in (info for info in op_db if info.name in (name, f"masked.{name}")):
        for sample in info.sample_inputs(device(), dtype, requires_grad=True):
            arguments = {**sample.kwargs, **({"unbiased": sample.args[0]} if sample.args else {})}
            found.append((info.name.startswith("masked."), sample.input, arguments))
    assert len(found) > 40
    return found


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("name", ["sum", "mean", "var", "std"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(name, dtype):
    """torch's numbers; torch.masked's too, but where a slice has nothing kept: there they may be NaN, and ours is 0."""
    function = getattr(masked_loss, f"masked_{name}")
    for masked, input, theirs in reduction_samples(name, dtype):
        ours = {n: list(v) if isinstance(v, tuple) else v for n, v in theirs.items()}
        if ours.get("mask") is not None:  # torch's broadcasts from the last dimension on, ours has the input's rank
            ours["mask"] = ours["mask"][(None,) * (input.dim() - ours["mask"].dim())]
        if "unbiased" in ours:
            ours["correction"] = int(ours.pop("unbiased"))
        elif ours.get("correction", 0) is None:
            ours["correction"] = 1
        if theirs.get("correction", 1) is None:
            theirs = {**theirs, "correction": 1}
        given, wide = leaf(input), leaf(input, torch.float64)
        value = function(given, **ours)
        expected = (getattr(torch.masked, name) if masked else getattr(torch, name))(wide, **theirs)
        mask = theirs.get("mask")
        keep = torch.ones(input.shape, dtype=torch.bool) if mask is None else mask.expand(input.shape)
        dims = {n: v for n, v in theirs.items() if n in ("dim", "keepdim")}
        dims["dim"] = dims.get("dim") if dims.get("dim") != () else None
        counts = torch.sum(keep, **dims) if dims["dim"] is not None else keep.sum().expand(expected.shape)
        assert value.dtype == dtype
        size = max(input.detach().abs().max().item() if input.numel() else 0.0, 1.0)
        assert_near(value, expected.masked_fill(counts == 0, 0.0), largest=input.numel() * size)
        upstream = torch.randn_like(value)
        (gradient,) = torch.autograd.grad(value, given, upstream)
        (wanted,) = torch.autograd.grad(expected, wide, upstream.double())
        defined = wanted.isfinite()
        largest = 4.0 * upstream.abs().max().item() if upstream.numel() else 0.0
        assert_near(gradient[defined], wanted[defined], largest=largest)


def fill_samples(dtype, requires_grad=False):
    samples = list(op_info("masked_fill").sample_inputs(device(), dtype, requires_grad=requires_grad))
    assert len(samples) >= 8
    return [(sample.input, *sample.args) for sample in samples]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_masked_fill_in_every_dtype():
    dtypes = op_info("masked_fill").dtypes
    assert len(dtypes) >= 13
    for dtype in sorted(dtypes, key=str):
        for input, mask, value in fill_samples(dtype):
            expected = torch.masked_fill(input, mask, value)
            assert_same_bits(masked_fill(input, mask, value), expected)
            assert_same_bits(masked_fill(input, mask.long(), value), expected)
            ours = input.clone()
            if expected.shape == input.shape:
                assert_same_bits(masked_fill_(ours, mask, value), expected)
            else:
                with pytest.raises(RuntimeError, match="masked_fill_: expected mask to broadcast to input"):
                    masked_fill_(ours, mask, value)


def fill_gradients(function, dtype, input, mask, value, upstream=None):
    """Of the input, of the value if that is a tensor, and the upstream one."""
    leaves = [each.detach().to(dtype).requires_grad_() for each in (input, value) if isinstance(each, torch.Tensor)]
    filled = function(leaves[0], mask, leaves[1] if len(leaves) == 2 else value)
    if upstream is None:
        upstream = torch.randn_like(filled)
    return torch.autograd.grad(filled, leaves, upstream.to(dtype)), upstream


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128])
def test_masked_fill_gradients(dtype):
    double = torch.complex128 if dtype.is_complex else torch.float64
    for sample in fill_samples(dtype, requires_grad=True):
        for function in (masked_fill, masked_fill_of_a_copy):
            if function is masked_fill_of_a_copy and sample[0].dim() < sample[1].dim():
                continue  # the samples that broadcast their input
            ours, upstream = fill_gradients(function, dtype, *sample)
            expected, _ = fill_gradients(torch.masked_fill, double, *sample, upstream)
            for a, b in zip(ours, expected, strict=True):
                assert a.dtype == dtype
                if dtype.is_complex:
                    torch.testing.assert_close(a.to(double), b, rtol=1e-6, atol=1e-6)
                else:
                    assert_near(a, b)


def masked_fill_of_a_copy(input, mask, value):
    return masked_fill_(input.clone(), mask, value)


@pytest.mark.parametrize("function", [masked_fill, masked_fill_])
def test_masked_fill_errors(function):
    errors = list(op_info("masked_fill").error_inputs(device()))
    assert len(errors) >= 3
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=f"^{function.__name__}: expected value "):
            function(sample.input, *sample.args, **sample.kwargs)
