"""Arguments of a wrong type: a TypeError that names argument and type, and never shows what a tensor holds."""

import inspect
import re

import numpy
import pytest
import torch

import masked_loss
from masked_loss import functional, masks

x, y, m = torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
target = torch.zeros(2, dtype=torch.long)

# name: arguments that are right
GOOD = {
    "cross_entropy": dict(input=x, target=target, mask=m[:, 0]),
    "linear_cross_entropy": dict(input=x, linear_weight=y, target=target, mask=m[:, 0]),
    "linear_log_prob": dict(input=x, linear_weight=y, index=target, mask=m[:, 0]),
    "linear_log_prob_and_entropy": dict(input=x, linear_weight=y, index=target, mask=m[:, 0]),
    "linear_kl": dict(input=x, linear_weight=y, target_input=x, target_linear_weight=y, mask=m[:, 0]),
    "loss_normalizer": dict(target=target, mask=m[:, 0]),
    "check_targets": dict(target=target, num_classes=3, mask=m[:, 0]),
    **{name: dict(input=x, target=y, mask=m) for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")},
    **{name: dict(input=x, target=y, mask=m) for name in ("kl_div", "poisson_nll_loss", "sigmoid_focal_loss")},
    "binary_cross_entropy_with_logits": dict(input=x, target=y, mask=m),
    "binary_cross_entropy": dict(input=x, target=y, mask=m),
    "gaussian_nll_loss": dict(input=x, target=y, var=torch.ones(2, 3), mask=m),
    **{name: dict(input=x, mask=m) for name in ("softmax", "log_softmax", "logsumexp")},
    **{name: dict(input=x, mask=m) for name in ("masked_sum", "masked_mean", "masked_var", "masked_std")},
    "masked_whiten": dict(input=x, mask=m),
    **{name: dict(input=x.clone(), mask=m, value=0.0) for name in ("masked_fill", "masked_fill_")},
    "sequence_mask": dict(lengths=torch.tensor([1, 2])),
    "mask_from_ids": dict(tokens=target, ids=[1]),
}
EVERY_TENSOR = [
    (name, argument)
    for name, arguments in GOOD.items()
    for argument, parameter in inspect.signature(getattr(masked_loss, name)).parameters.items()
    if "Tensor" in str(parameter.annotation) and argument not in ("normalizer", "value", "var")
]


class Opaque:
    def __repr__(self):  # in the ids of tests, which are the same in every process
        return "opaque"


SECRET = 123456.5  # what no message may show


@pytest.mark.parametrize(("name", "argument"), EVERY_TENSOR, ids=str)
@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([SECRET] * 3, "list; use torch.as_tensor("),
        ((SECRET,), "tuple"),
        (numpy.full((2, 3), SECRET), "ndarray; use torch.as_tensor("),
        ([torch.full((3,), SECRET)], "list"),
        (Opaque(), "Opaque"),
        (3.5, "3.5 (float); use torch.tensor(3.5)"),
        (True, "True (bool)"),
        (None, "None"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_something_else_where_a_tensor_belongs(name, argument, value, got):
    function = getattr(masked_loss, name)
    optional = "Optional" in str(inspect.signature(function).parameters[argument].annotation)
    if value is None and optional:
        function(**{**GOOD[name], argument: None})
        return
    with pytest.raises(TypeError) as caught:
        function(**{**GOOD[name], argument: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: expected {argument} to be a Tensor, got {got}"), message
    assert str(SECRET) not in message and "(self" not in message and "\n" not in message


def message_of(call, error=TypeError):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "masked_mean", "masked_var"])
def test_a_dimension_in_the_place_of_the_mask(name):
    message = message_of(lambda: getattr(masked_loss, name)(x, -1))
    assert message == f"{name}: expected mask to be a Tensor, got -1 (int); a dimension is passed by name, dim=-1"


@pytest.mark.parametrize("name", ["huber_loss", "mse_loss", "cross_entropy", "kl_div"])
def test_a_reduction_in_the_place_of_the_mask(name):
    message = message_of(lambda: getattr(masked_loss, name)(x, GOOD[name]["target"], "mean"))
    expected = "got 'mean' (str); a reduction is passed by name, reduction='mean'"
    assert message == f"{name}: expected mask to be a Tensor, {expected}"


def test_a_packed_sequence():
    packed = torch.nn.utils.rnn.pack_sequence([torch.full((2, 3), SECRET)])
    message = message_of(lambda: masked_loss.cross_entropy(packed, target))
    assert message.endswith("got PackedSequence; use torch.nn.utils.rnn.pad_packed_sequence")


OTHERS = {
    "dim to be an int, got tuple": lambda f: f.softmax(x, dim=(0, 1)),
    "dim to be an int, got '1' (str)": lambda f: f.softmax(x, dim="1"),
    "dim to be an int or a list of ints, got 'rows'": lambda f: f.masked_mean(x, dim="rows"),
    "dim to be an int or a list of ints, got Tensor": lambda f: f.masked_mean(x, dim=x),
    "dim to be an int, got 1.5 (float)": lambda f: f.cross_entropy(x, target, dim=1.5),
    "z_loss to be a number, got '1' (str)": lambda f: f.cross_entropy(x, target, z_loss="1"),
    "delta to be a number, got None": lambda f: f.huber_loss(x, y, delta=None),
    "delta to be a number, got Tensor": lambda f: f.huber_loss(x, y, delta=x),
    "dtype to be a torch.dtype, got 'float' (str)": lambda f: f.softmax(x, dtype="float"),
    "num_classes to be an int, got 3.0 (float)": lambda f: f.check_targets(target, 3.0),
    "maxlen to be an int, got '3' (str)": lambda f: f.sequence_mask(target, "3"),
    "query_len to be an int, got '3' (str)": lambda f: f.causal_mask("3"),
    "query_len to be an int, got Tensor": lambda f: f.causal_mask(x),
    "ids to be an int or a list of ints, got 1.5": lambda f: f.mask_from_ids(target, 1.5),
}


@pytest.mark.parametrize("expected", OTHERS)
def test_other_arguments(expected):
    message = message_of(lambda: OTHERS[expected](masked_loss))
    assert re.fullmatch(rf"\w+: expected {re.escape(expected)}", message), message


@pytest.mark.parametrize("name", ["masked_fill", "masked_fill_"])
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "None"),
        ([0.0], "list"),
        ("-inf", "'-inf' (str)"),
        ((1,), "tuple"),
        (numpy.zeros(2), "ndarray"),
        (Opaque(), "Opaque"),
    ],
    ids=str,
)
def test_value_of_masked_fill(name, value, got):
    message = message_of(lambda: getattr(masked_loss, name)(x.clone(), m, value))
    assert message == f"{name}: expected value to be a number or a 0-d Tensor, got {got}"


@pytest.mark.parametrize(
    "value",
    [True, 2, 2.5, 2**40, numpy.float32(2.5), numpy.float64(2.5), numpy.int64(2), numpy.bool_(True), torch.tensor(2.5)],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_values_that_masked_fill_takes(value):
    assert masked_loss.masked_fill(x, m, value).equal(torch.full((2, 3), float(value)))
    integers = torch.zeros(3, dtype=torch.int64)
    kept = torch.tensor([True, False, True])
    if not isinstance(value, torch.Tensor):
        expected = torch.masked_fill(integers, kept, value if not isinstance(value, numpy.generic) else value.item())
        assert masked_loss.masked_fill(integers, kept, value).equal(expected)


def test_complex_values():
    z = torch.zeros(2, dtype=torch.complex64)
    assert masked_loss.masked_fill(z, torch.tensor([True, False]), 1 + 2j).tolist() == [1 + 2j, 0]


def test_a_dtype_that_cannot_be_filled():
    nibbles = torch.zeros(4, dtype=torch.uint8).view(torch.uint4) if hasattr(torch, "uint4") else None
    if nibbles is None:
        pytest.skip("this torch has no uint4")
    message = message_of(lambda: masked_loss.masked_fill(nibbles, torch.ones(4, dtype=torch.bool), 1))
    assert re.match(r"masked_fill: expected input of a dtype whose elements can be filled, got UInt4", message)


def takes_normalizer(name):
    return "normalizer" in inspect.signature(getattr(masked_loss, name)).parameters


@pytest.mark.parametrize("name", [name for name in GOOD if takes_normalizer(name)])
@pytest.mark.parametrize(("value", "got"), [(1j, "1j"), ("3", "'3'"), ([3], "list"), (Opaque(), "Opaque")], ids=str)
def test_normalizer(name, value, got):
    function = getattr(masked_loss, name)
    message = message_of(lambda: function(**GOOD[name], normalizer=value))
    assert message == f"{name}: expected normalizer to be a number or a 0-d Tensor, got {got}"
    for number in (2, 2.0, numpy.float32(2), numpy.int64(2), torch.tensor(2)):
        assert torch.isfinite(function(**GOOD[name], normalizer=number))
    # What is wrong with the input is said where it is looked at.
    arguments = {**GOOD[name], "input": [1.0], "normalizer": 2}
    assert message_of(lambda: function(**arguments)).startswith(f"{name}: expected input to be a Tensor, got list")


class TestNames:
    @pytest.mark.parametrize("module", [masked_loss, functional, masks, masked_loss.modules, masked_loss.distributed])
    def test_dir_shows_what_is_public(self, module):
        assert dir(module) == sorted(module.__all__)
        assert not {"torch", "Tensor", "bound", "scriptable", "id_list"} & set(dir(module))
        for name in dir(module):
            assert getattr(module, name) is not None
