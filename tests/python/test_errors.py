"""Every bad input a user can give, and what the message says, by all three Python ways in.

The format is `<op>: expected <argument> <requirement>, got <value>`; the facts are what must be named in it.
"""

import itertools
import re
import warnings
from typing import Any, NamedTuple

import pytest
import torch

import masked_loss
from reference import assert_same_bits

HERE = torch.get_default_device().type
B, C, T = 3, 5, 3  # B == T: a [B] mask would broadcast along T without a word
TARGET = torch.arange(B * T).remainder(C).reshape(B, T)
LOGITS = torch.linspace(-1, 1, B * C * T).reshape(B, C, T)
MASK = torch.tensor([[True, True, False]]).expand(B, T)
H = 4
HIDDEN, HEAD = torch.linspace(-1, 1, B * T * H).reshape(B, T, H), torch.linspace(-1, 1, C * H).reshape(C, H)

GOOD = {
    "cross_entropy": dict(input=LOGITS, target=TARGET, mask=MASK),
    "linear_cross_entropy": dict(input=HIDDEN, linear_weight=HEAD, target=TARGET, mask=MASK),
    "linear_log_prob": dict(input=HIDDEN, linear_weight=HEAD, index=TARGET, mask=MASK),
    "linear_log_prob_and_entropy": dict(input=HIDDEN, linear_weight=HEAD, index=TARGET, mask=MASK),
    "linear_kl": dict(
        input=HIDDEN, linear_weight=HEAD, target_input=HIDDEN[..., :2], target_linear_weight=HEAD[:, :2], mask=MASK
    ),
    "loss_normalizer": dict(target=TARGET, mask=MASK),
    "check_targets": dict(target=TARGET, num_classes=C, mask=MASK),
    "masked_fill": dict(input=LOGITS, mask=torch.ones(B, 1, T, dtype=torch.bool), value=0.0),
    "masked_fill_": dict(input=LOGITS, mask=torch.ones(B, 1, T, dtype=torch.bool), value=0.0),
    "sequence_mask": dict(lengths=torch.tensor([1, 2]), maxlen=3),
    "causal_mask": dict(query_len=2, key_len=3),
    "mask_from_ids": dict(tokens=TARGET, ids=[0]),
}


class Bad(NamedTuple):
    op: str
    change: dict[str, Any]  # of the good arguments
    error: type
    argument: str  # that the message names first
    facts: tuple[str, ...] = ()  # patterns that are found in the message


def ones(*shape, **options):
    return torch.ones(shape, **options)


def target_with(value, position, dtype=torch.int64):
    target = TARGET.to(dtype).clone()
    target[position] = value
    return target


def sparse(tensor):
    return tensor.to_sparse()


def nested(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor(list(tensor))


LOWEST = torch.iinfo(torch.int64).min
LONG, FLOAT, COMPLEX = "int64|Long", "float|Float", "complex|Complex"
HOW_TO_FIX = r"None|unsqueeze|keepdim|reshape"


def mask_like(op, argument, good_shape, wrong_dtype, wrong_dtype_facts):
    """What goes wrong alike for every tensor that broadcasts with the target."""
    dtype = torch.bool if argument == "mask" else torch.float32

    def make(*shape):
        return {argument: torch.ones(shape, dtype=dtype)}

    good = torch.ones(good_shape, dtype=dtype)
    return [
        Bad(op, make(B), RuntimeError, argument, (r"\[3\]", HOW_TO_FIX)),
        Bad(op, make(B, 1, T), RuntimeError, argument, (r"\[3, 1, 3\]",)),
        Bad(op, make(), RuntimeError, argument, (r"\[\]",)),
        Bad(op, make(B, T + 1), RuntimeError, argument, (r"\[3, 3\]", r"\[3, 4\]")),
        Bad(op, make(0, T), RuntimeError, argument, (r"\[0, 3\]",)),
        Bad(op, {argument: good.to("meta")}, RuntimeError, argument, ("meta", HERE)),
        Bad(op, {argument: sparse(good)}, TypeError, argument, ("sparse",)),
        Bad(op, {argument: good.to(wrong_dtype)}, TypeError, argument, wrong_dtype_facts),
        Bad(op, {argument: good.to(torch.complex64)}, TypeError, argument, (COMPLEX,)),
    ]


def rows_arguments(op):
    """cross_entropy and loss_normalizer take these alike."""
    return [
        *mask_like(op, "mask", (B, T), torch.float32, (FLOAT, "sample_weight", r"\bweight")),
        *mask_like(op, "sample_weight", (B, T), torch.int64, (LONG, r"\bmask\b")),
        Bad(op, dict(sample_weight=MASK), TypeError, "sample_weight", ("bool|Bool", r"\bmask\b")),
        Bad(op, dict(mask=torch.rand(B, T, requires_grad=True)), TypeError, "mask", (FLOAT, "sample_weight")),
        Bad(op, dict(weight=ones(C, 1)), RuntimeError, "weight", (r"\[5, 1\]",)),
        Bad(op, dict(weight=ones()), RuntimeError, "weight", (r"\[\]",)),
        Bad(op, dict(weight=ones(C, dtype=torch.int64)), TypeError, "weight", (LONG,)),
        Bad(op, dict(weight=ones(C, dtype=torch.complex64)), TypeError, "weight", (COMPLEX,)),
        Bad(op, dict(weight=ones(C, device="meta")), RuntimeError, "weight", ("meta", HERE)),
        Bad(op, dict(weight=sparse(ones(C))), TypeError, "weight", ("sparse",)),
        Bad(op, dict(class_mask=ones(C)), TypeError, "class_mask", (FLOAT,)),
        Bad(op, dict(class_mask=ones(B, C, dtype=torch.bool)), RuntimeError, "class_mask", (r"\[3, 5\]",)),
        Bad(op, dict(class_mask=ones(B, C, T + 1, dtype=torch.bool)), RuntimeError, "class_mask", (r"\[3, 5, 4\]",)),
        Bad(op, dict(class_mask=ones(C, dtype=torch.bool, device="meta")), RuntimeError, "class_mask", ("meta",)),
        Bad(op, dict(class_mask=sparse(ones(C, dtype=torch.bool))), TypeError, "class_mask", ("sparse",)),
        Bad(op, dict(target=TARGET.float()), TypeError, "target", (FLOAT, LONG)),
        Bad(op, dict(target=TARGET.to(torch.int16)), TypeError, "target", ("int16|Short",)),
        Bad(op, dict(target=TARGET.to(torch.int8)), TypeError, "target", ("int8|Char",)),
        Bad(op, dict(target=TARGET > 0), TypeError, "target", ("bool|Bool",)),
        Bad(op, dict(target=sparse(TARGET)), TypeError, "target", ("sparse",)),
        Bad(op, dict(target=nested(TARGET)), TypeError, "target", ("nested",)),
        Bad(op, dict(dim=3), IndexError, "dim", (r"\b3\b", r"-3\b", r"\b2\b")),
        Bad(op, dict(dim=-4), IndexError, "dim", (r"-4\b",)),
    ]


def loss_arguments():
    op = "cross_entropy"
    return [
        Bad(op, dict(input=LOGITS.long()), TypeError, "input", (LONG,)),
        Bad(op, dict(input=LOGITS.to(torch.complex64)), TypeError, "input", (COMPLEX,)),
        Bad(op, dict(input=LOGITS.to(torch.float8_e5m2)), TypeError, "input", ("(?i)float8_e5m2",)),
        Bad(op, dict(input=sparse(LOGITS)), TypeError, "input", ("sparse",)),
        Bad(op, dict(input=nested(LOGITS)), TypeError, "input", ("nested",)),
        Bad(op, dict(input=LOGITS[0, 0, 0]), RuntimeError, "input", (r"0-d|\[\]",)),
        Bad(op, dict(input=LOGITS.to("meta")), RuntimeError, "target|input", ("meta", HERE)),
        Bad(op, dict(target=TARGET.to("meta")), RuntimeError, "target", ("meta", HERE)),
        Bad(op, dict(target=TARGET[:, :2]), RuntimeError, "target", (r"\[3, 3\]", r"\[3, 2\]")),
        Bad(op, dict(target=ones(B, 4, T)), RuntimeError, "target", (r"\[3, 5, 3\]", r"\[3, 4, 3\]")),
        Bad(op, dict(target=ones(B, C, T), ignore_index=[-1, 2]), ValueError, "ignore_index", ("got 2", "mask=")),
        Bad(op, dict(target=TARGET[:, :1]), RuntimeError, "target", (r"\[3, 3\]", r"\[3, 1\]")),
        Bad(op, dict(target=TARGET[0]), RuntimeError, "target", (r"\[3, 3\]", r"\[3\]")),
        Bad(op, dict(target=TARGET[:, None].expand(B, C, T)), RuntimeError, "target", (r"\[3, 3\]", r"\[3, 5, 3\]")),
        Bad(op, dict(dim=0, input=LOGITS.transpose(0, 1)[:, :2]), RuntimeError, "target", (r"\[2, 3\]", r"\[3, 3\]")),
        Bad(op, dict(weight=ones(C - 1)), RuntimeError, "weight", (r"\b5\b", r"\b4\b")),
        Bad(op, dict(weight=ones(C, requires_grad=True)), RuntimeError, "weight", ("grad",)),
        Bad(op, dict(class_mask=ones(C + 1, dtype=torch.bool)), RuntimeError, "class_mask", (r"\b5\b", r"\b6\b")),
        Bad(op, dict(reduction="average"), ValueError, "reduction", ("'average'", "'sequence_mean'")),
        Bad(op, dict(reduction="batchmean"), ValueError, "reduction", ("'batchmean'",)),
        Bad(op, dict(reduction="Mean"), ValueError, "reduction", ("'Mean'",)),
        Bad(op, dict(label_smoothing=-0.1), ValueError, "label_smoothing", (r"-0\.1\b", r"\[0, 1\]")),
        Bad(op, dict(label_smoothing=1.5), ValueError, "label_smoothing", (r"1\.5\b",)),
        Bad(op, dict(label_smoothing=torch.nan), ValueError, "label_smoothing", ("nan",)),
        Bad(op, dict(z_loss=-0.5), ValueError, "z_loss", (r"-0\.5\b",)),
        Bad(op, dict(z_loss=torch.nan), ValueError, "z_loss", ("nan",)),
        Bad(op, dict(dtype=torch.int64), TypeError, "dtype", (LONG,)),
        Bad(op, dict(dtype=torch.complex64), TypeError, "dtype", (COMPLEX,)),
        Bad(op, dict(normalizer=-2.5), ValueError, "normalizer", (r"-2\.5",)),
        Bad(op, dict(normalizer=torch.tensor(-2.5)), ValueError, "normalizer", (r"-2\.5",)),
        Bad(op, dict(normalizer=-2.5, reduction="sequence_mean"), ValueError, "normalizer", (r"-2\.5",)),
        Bad(op, dict(normalizer=2.0, reduction="sum"), ValueError, "normalizer", ("sum",)),
        Bad(op, dict(normalizer=2.0, reduction="none"), ValueError, "normalizer", ("none",)),
        Bad(op, dict(normalizer=ones(1)), RuntimeError, "normalizer", (r"\[1\]",)),
        Bad(op, dict(normalizer=ones(dtype=torch.complex64)), TypeError, "normalizer", (COMPLEX,)),
        Bad(op, dict(normalizer=ones(device="meta")), RuntimeError, "normalizer", ("meta", HERE)),
        Bad(op, dict(normalizer=ones(requires_grad=True)), RuntimeError, "normalizer", ("grad",)),
        Bad(op, dict(target=target_with(C, (1, 0))), IndexError, "target", (r"got 5\b", r"\[1, 0\]", r"\[0, 5\)")),
        Bad(op, dict(target=target_with(-1, (2, 1))), IndexError, "target", (r"got -1\b", r"\[2, 1\]")),
        Bad(op, dict(target=target_with(LOWEST, (0, 1))), IndexError, "target", (rf"got {LOWEST}\b", r"\[0, 1\]")),
        Bad(op, dict(target=target_with(-7, (0, 1), torch.int32)), IndexError, "target", (r"got -7\b", r"\[0, 1\]")),
        Bad(op, dict(target=target_with(200, (2, 0), torch.uint8)), IndexError, "target", ("got 200", r"\[2, 0\]")),
        Bad(op, dict(target=target_with(-100, (2, 0)), ignore_index=7), IndexError, "target", ("got -100",)),
    ]


def linear_arguments(op):
    """What the family has in common."""
    return [
        *mask_like(op, "mask", (B, T), torch.float32, (FLOAT,)),
        Bad(op, dict(input=HIDDEN.long()), TypeError, "input", (LONG,)),
        Bad(op, dict(input=sparse(HIDDEN)), TypeError, "input", ("sparse",)),
        Bad(op, dict(input=HIDDEN[0, 0, 0]), RuntimeError, "input", ("0-d",)),
        Bad(op, dict(input=HIDDEN[..., :3]), RuntimeError, "linear_weight", (r"\[C, 3\]", r"\[5, 4\]")),
        Bad(op, dict(linear_weight=HEAD[0]), RuntimeError, "linear_weight", (r"\[4\]",)),
        Bad(op, dict(linear_weight=HEAD.long()), TypeError, "linear_weight", (LONG,)),
        Bad(op, dict(linear_weight=HEAD.double()), TypeError, "linear_weight", (FLOAT, "Double")),
        Bad(op, dict(linear_weight=HEAD.to("meta")), RuntimeError, "linear_weight", ("meta", HERE)),
        Bad(op, dict(linear_weight=sparse(HEAD)), TypeError, "linear_weight", ("sparse",)),
        Bad(op, dict(linear_bias=ones(C - 1)), RuntimeError, "linear_bias", (r"\[5\]", r"\[4\]")),
        Bad(op, dict(linear_bias=ones(C, 1)), RuntimeError, "linear_bias", (r"\[5\]", r"\[5, 1\]")),
        Bad(op, dict(linear_bias=ones(C, dtype=torch.float64)), TypeError, "linear_bias", ("Double",)),
        Bad(op, dict(class_mask=ones(C)), TypeError, "class_mask", (FLOAT,)),
        Bad(op, dict(class_mask=ones(C - 1, dtype=torch.bool)), RuntimeError, "class_mask", (r"\b5\b", r"\b4\b")),
        Bad(op, dict(softcap=0.0), ValueError, "softcap", ("got 0",)),
        Bad(op, dict(softcap=-2.0), ValueError, "softcap", ("got -2",)),
        Bad(op, dict(softcap=torch.nan), ValueError, "softcap", ("nan",)),
        Bad(op, dict(temperature=0.0), ValueError, "temperature", ("got 0",)),
        Bad(op, dict(temperature=torch.inf), ValueError, "temperature", ("inf",)),
        Bad(op, dict(chunk_size=0), ValueError, "chunk_size", ("at least 1", "got 0")),
        Bad(op, dict(chunk_size=-3), ValueError, "chunk_size", ("got -3",)),
        Bad(op, dict(max_kept=-1), ValueError, "max_kept", ("got -1",)),
        Bad(op, dict(max_kept=5), ValueError, "max_kept", (r"\b6\b", "got 5")),
        Bad(op, dict(dtype=torch.int64), TypeError, "dtype", (LONG,)),
    ]


def linear_index_arguments(op):
    name = "target" if op == "linear_cross_entropy" else "index"
    return [
        *linear_arguments(op),
        Bad(op, {name: TARGET.float()}, TypeError, name, (FLOAT, "int64")),
        Bad(op, {name: TARGET > 0}, TypeError, name, ("bool|Bool",)),
        Bad(op, {name: TARGET[:, :2]}, RuntimeError, name, (r"\[3, 3\]", r"\[3, 2\]")),
        Bad(op, {name: TARGET[0]}, RuntimeError, name, (r"\[3, 3\]", r"\[3\]")),
        Bad(op, {name: TARGET.to("meta")}, RuntimeError, name, ("meta", HERE)),
        Bad(op, {name: target_with(C, (1, 0))}, IndexError, "target", (r"got 5\b", r"\[1, 0\]", r"\[0, 5\)")),
        Bad(op, {name: target_with(-1, (2, 1))}, IndexError, "target", (r"got -1\b", r"\[2, 1\]")),
    ]


def linear_loss_arguments():
    op = "linear_cross_entropy"
    return [
        *mask_like(op, "sample_weight", (B, T), torch.int64, (LONG, r"\bmask\b")),
        Bad(op, dict(target=ones(B, T, C)), TypeError, "target", (FLOAT, "cross_entropy")),
        Bad(op, dict(weight=ones(C - 1)), RuntimeError, "weight", (r"\b5\b", r"\b4\b")),
        Bad(op, dict(weight=ones(C, requires_grad=True)), RuntimeError, "weight", ("grad",)),
        Bad(op, dict(reduction="average"), ValueError, "reduction", ("'average'", "'sequence_mean'")),
        Bad(op, dict(label_smoothing=1.5), ValueError, "label_smoothing", (r"1\.5\b",)),
        Bad(op, dict(z_loss=-0.5), ValueError, "z_loss", (r"-0\.5\b",)),
        Bad(op, dict(normalizer=-2.5), ValueError, "normalizer", (r"-2\.5",)),
        Bad(op, dict(normalizer=2.0, reduction="none"), ValueError, "normalizer", ("none",)),
        Bad(op, dict(normalizer=ones(requires_grad=True)), RuntimeError, "normalizer", ("grad",)),
    ]


def linear_kl_arguments():
    op = "linear_kl"
    return [
        *linear_arguments(op),
        *mask_like(op, "sample_weight", (B, T), torch.int64, (LONG, r"\bmask\b")),
        Bad(op, dict(target_input=HIDDEN.long()), TypeError, "target_input", (LONG,)),
        Bad(op, dict(target_input=HIDDEN[:2, :, :2]), RuntimeError, "target_input", (r"\[3, 3, 4\]", r"\[2, 3, 2\]")),
        Bad(op, dict(target_input=HIDDEN[0, :, :2]), RuntimeError, "target_input", (r"\[3, 3, 4\]", r"\[3, 2\]")),
        Bad(op, dict(target_input=HIDDEN), RuntimeError, "target_linear_weight", (r"\[C, 4\]", r"\[5, 2\]")),
        Bad(op, dict(target_input=HIDDEN.to("meta")), RuntimeError, "target_input", ("meta", HERE)),
        Bad(
            op,
            dict(target_input=HIDDEN[..., :2].double(), target_linear_weight=HEAD[:, :2].double()),
            TypeError,
            "target_input",
            (FLOAT, "Double"),
        ),
        Bad(op, dict(target_linear_weight=HEAD[:3, :2]), RuntimeError, "target_linear_weight", (r"\b5\b", r"\[3, 2\]")),
        Bad(op, dict(target_linear_bias=ones(C - 1)), RuntimeError, "target_linear_bias", (r"\[5\]", r"\[4\]")),
        Bad(op, dict(kind="backward"), ValueError, "kind", ("'backward'", "'jsd'")),
        Bad(op, dict(beta=1.5), ValueError, "beta", (r"1\.5\b",)),
        Bad(op, dict(beta=torch.nan), ValueError, "beta", ("nan",)),
        Bad(op, dict(reduction="batchmean"), ValueError, "reduction", ("'batchmean'", "'sequence_mean'")),
        Bad(op, dict(normalizer=-2.5), ValueError, "normalizer", (r"-2\.5",)),
        Bad(op, dict(normalizer=2.0, reduction="none"), ValueError, "normalizer", ("none",)),
        Bad(op, dict(normalizer=ones(requires_grad=True)), RuntimeError, "normalizer", ("grad",)),
    ]


def divisor_arguments():
    op = "loss_normalizer"
    classes = dict(weight=ones(4), class_mask=ones(C, dtype=torch.bool))
    return [
        Bad(op, classes, RuntimeError, "class_mask|weight", (r"\b4\b", r"\b5\b")),
        Bad(op, dict(target=target_with(-1, (2, 1))), IndexError, "target", (r"got -1\b", r"\[2, 1\]")),
        Bad(op, dict(weight=ones(4)), IndexError, "target", (r"got 4\b", r"\[1, 1\]")),
        Bad(op, dict(class_mask=ones(B, 4, T, dtype=torch.bool)), IndexError, "target", (r"got 4\b", r"\[1, 1\]")),
    ]


def check_arguments():
    op = "check_targets"
    return [
        *mask_like(op, "mask", (B, T), torch.float32, (FLOAT,)),
        Bad(op, dict(target=TARGET.float()), TypeError, "target", (FLOAT,)),
        Bad(op, dict(target=sparse(TARGET)), TypeError, "target", ("sparse",)),
        Bad(op, dict(num_classes=4), IndexError, "target", (r"got 4\b", r"\[1, 1\]", r"\[0, 4\)")),
        Bad(op, dict(num_classes=-1), ValueError, "num_classes", ("-1",)),
    ]


def fill_arguments(op):
    mask = GOOD[op]["mask"]
    overlapping = LOGITS.view(-1)[:10].to(torch.bool)
    rows = [
        Bad(op, dict(mask=mask.float()), TypeError, "mask", (FLOAT,)),
        Bad(op, dict(mask=mask.to(torch.complex64)), TypeError, "mask", (COMPLEX,)),
        Bad(op, dict(mask=mask[..., :2]), RuntimeError, "mask", (r"\[3, 5, 3\]", r"\[3, 1, 2\]")),
        Bad(op, dict(mask=mask.to("meta")), RuntimeError, "mask", ("meta", HERE)),
        Bad(op, dict(mask=sparse(mask)), TypeError, "mask", ("sparse",)),
        Bad(op, dict(mask=nested(mask)), TypeError, "mask", ("nested",)),
        Bad(op, dict(input=sparse(LOGITS)), TypeError, "input", ("sparse",)),
        Bad(op, dict(input=nested(LOGITS)), TypeError, "input", ("nested",)),
        Bad(op, dict(input=LOGITS.to("meta")), RuntimeError, "mask|input", ("meta", HERE)),
        Bad(op, dict(value=ones(1)), RuntimeError, "value", (r"\[1\]",)),
        Bad(op, dict(value=torch.tensor(1 + 2j)), RuntimeError, "value", (FLOAT,)),
        Bad(op, dict(value=1e40), RuntimeError, "value", (FLOAT, r"1e\+?40")),
        Bad(op, dict(value=ones(device="meta")), RuntimeError, "value", ("meta", HERE)),
        Bad(op, dict(value=sparse(ones())), TypeError, "value", ("sparse",)),
    ]
    if op == "masked_fill_":
        shares = dict(input=ones(B, 1, T).expand(B, C, T))
        partly = dict(input=overlapping[1:], mask=overlapping[:-1], value=1.0)
        grows = dict(input=LOGITS[:, :1], mask=ones(B, C, T, dtype=torch.bool))
        rows += [
            Bad(op, shares, RuntimeError, "input", (r"\[3, 5, 3\]|\[3, 0, 1\]", "clone")),
            Bad(op, partly, RuntimeError, "mask", ("overlap|share",)),
            Bad(op, grows, RuntimeError, "mask", (r"\[3, 1, 3\]", r"\[3, 5, 3\]")),
        ]
    return rows


def mask_arguments():
    lengths = GOOD["sequence_mask"]["lengths"]
    return [
        Bad("sequence_mask", dict(lengths=lengths.float()), TypeError, "lengths", (FLOAT,)),
        Bad("sequence_mask", dict(lengths=lengths > 1), TypeError, "lengths", ("bool|Bool",)),
        Bad("sequence_mask", dict(lengths=sparse(lengths)), TypeError, "lengths", ("sparse",)),
        Bad("sequence_mask", dict(maxlen=-1), ValueError, "maxlen", ("-1",)),
        Bad("sequence_mask", dict(padding_side="both"), ValueError, "padding_side", ("'right'", "'left'", "'both'")),
        Bad("causal_mask", dict(query_len=-2), ValueError, "query_len", ("-2",)),
        Bad("causal_mask", dict(key_len=-3), ValueError, "key_len", ("-3",)),
        Bad("mask_from_ids", dict(tokens=TARGET.float()), TypeError, "tokens", (FLOAT,)),
        Bad("mask_from_ids", dict(tokens=sparse(TARGET)), TypeError, "tokens", ("sparse",)),
    ]


TABLE = [
    *rows_arguments("cross_entropy"),
    *rows_arguments("loss_normalizer"),
    *loss_arguments(),
    *linear_index_arguments("linear_cross_entropy"),
    *linear_index_arguments("linear_log_prob"),
    *linear_index_arguments("linear_log_prob_and_entropy"),
    *linear_loss_arguments(),
    *linear_kl_arguments(),
    *divisor_arguments(),
    *check_arguments(),
    *fill_arguments("masked_fill"),
    *fill_arguments("masked_fill_"),
    *mask_arguments(),
]


def describe(value):
    if not isinstance(value, torch.Tensor):
        return repr(value)
    kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    shape = "" if value.is_nested else list(value.shape)
    return f"{kind} {value.dtype} {shape} {value.device}{' grad' if value.requires_grad else ''}"


def row_id(bad):
    return f"{bad.op} " + " ".join(f"{name}={describe(value)}" for name, value in bad.change.items())


def rows(where=lambda bad: True):
    chosen = [(number, bad) for number, bad in enumerate(TABLE) if where(bad)]
    return pytest.mark.parametrize("bad", [b for _, b in chosen], ids=[f"{n} {row_id(b)}" for n, b in chosen])


def arguments_of(bad):
    return {**GOOD[bad.op], **bad.change}


def message_of(function, arguments, errors):
    """The first line of what a call raises; more can follow where torch shows C++ stack traces."""
    with pytest.raises(errors) as caught:
        function(**arguments)
    return str(caught.value).split("\n")[0]


def message_in_python(bad):
    return message_of(getattr(masked_loss, bad.op), arguments_of(bad), bad.error)


@rows()
def test_python_function(bad):
    with pytest.raises(bad.error) as caught:
        getattr(masked_loss, bad.op)(**arguments_of(bad))
    assert type(caught.value) is bad.error
    message = str(caught.value).split("\n")[0]
    assert re.search(rf"^{bad.op}: expected .*?\b({bad.argument})s?\b.*, got ", message), message
    for fact in bad.facts:
        assert re.search(fact, message), f"{fact!r} not in {message!r}"


REDUCTIONS = {"none": 0, "mean": 1, "sum": 2, "sequence_mean": 3}


def for_the_dispatcher(arguments):
    """The Python function's arguments as the op takes them."""
    arguments = dict(arguments)
    if "reduction" in arguments:
        arguments["reduction"] = REDUCTIONS[arguments["reduction"]]
    if isinstance(arguments.get("normalizer"), float):
        arguments["normalizer"] = torch.tensor(arguments["normalizer"])
    return arguments


@rows(lambda bad: bad.change.get("reduction", "mean") in REDUCTIONS and "kind" not in bad.change)
def test_torch_ops(bad):
    op = getattr(torch.ops.masked_loss, bad.op)
    assert message_of(op, for_the_dispatcher(arguments_of(bad)), bad.error) == message_in_python(bad)


@pytest.fixture(scope="module")
def scripted():
    return {name: torch.jit.script(getattr(masked_loss, name)) for name in GOOD}


@rows()
def test_torchscript(bad, scripted):
    """TorchScript turns other exceptions into RuntimeError and wraps their message."""
    with pytest.raises((RuntimeError, torch.jit.Error, bad.error)) as caught:
        scripted[bad.op](**arguments_of(bad))
    assert message_in_python(bad) in str(caught.value)


def tensors_of(bad):
    return {name: value for name, value in arguments_of(bad).items() if isinstance(value, torch.Tensor)}


def is_dense(tensor):
    return tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == HERE


def reads_data(bad):
    """Targets, values and normalizers are not read, and memory does not overlap, where there is no data."""
    overlaps = bad.op == "masked_fill_" and any("clone" in fact or "overlap" in fact for fact in bad.facts)
    values = (bad.argument == "value" and FLOAT in bad.facts) or r"-2\.5" in bad.facts
    values = values or bad.change.get("max_kept") == 5  # kept rows are counted
    return overlaps or values or (bad.error is IndexError and bad.argument == "target")


@rows(lambda bad: tensors_of(bad) and all(map(is_dense, tensors_of(bad).values())) and not reads_data(bad))
def test_meta_tensors_get_the_same_message(bad):
    on_meta = {name: value.to("meta") for name, value in tensors_of(bad).items()}
    function = getattr(masked_loss, bad.op)
    assert message_of(function, {**arguments_of(bad), **on_meta}, bad.error) == message_in_python(bad)


@rows(lambda bad: bad.op == "masked_fill_" and is_dense(arguments_of(bad)["input"]))
def test_nothing_is_written_before_the_checks_have_passed(bad):
    arguments = arguments_of(bad)
    x = arguments["input"]
    before, version = x.clone(), x._version
    message_of(masked_loss.masked_fill_, arguments, bad.error)
    assert_same_bits(x, before)
    assert x._version == version


@pytest.mark.parametrize("number", [-1, 4, 7])
def test_reduction_numbers(number):
    with pytest.raises(ValueError, match=rf"^cross_entropy: expected reduction .*, got {number}"):
        torch.ops.masked_loss.cross_entropy(LOGITS, TARGET, MASK, number)


def test_a_module_refuses_a_reduction_when_it_is_made():
    with pytest.raises(ValueError, match=r"^CrossEntropyLoss: expected reduction .*, got 'total'"):
        masked_loss.CrossEntropyLoss(reduction="total")


LAYOUTS = ((1, (B, C, T)), (-1, (B, T, C)), (0, (C, B, T)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_every_path_finds_a_target_out_of_range(reduction, requires_grad):
    target = target_with(C, (2, 1))
    for (dim, shape), options in itertools.product(LAYOUTS, ({}, {"class_mask": ones(C, dtype=torch.bool)})):
        x = torch.zeros(shape, requires_grad=requires_grad)
        with pytest.raises(IndexError, match=r"^cross_entropy: expected .*target.*got 5 .*\[2, 1\]"):
            masked_loss.cross_entropy(x, target, MASK, reduction=reduction, dim=dim, **options)


def modes(function, logits, *batched):
    """A loss of logits and of what has a batch dimension, in every mode that torch.func has."""
    ones = torch.ones_like(logits)
    return {
        "grad": lambda: torch.func.grad(function)(logits, *batched),
        "jvp": lambda: torch.func.jvp(lambda x: function(x, *batched), (logits,), (ones,)),
        "hessian": lambda: torch.func.hessian(function)(logits, *batched),
        "vmap": lambda: torch.vmap(function)(logits, *batched),
        "vmap of the logits": lambda: torch.vmap(lambda x: function(x, *(b[0] for b in batched)))(logits),
        "vmap of the target": lambda: torch.vmap(lambda *b: function(logits[0], *b))(*batched),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(function))(logits, *batched),
        "grad of vmap": lambda: torch.func.grad(lambda *a: torch.vmap(function)(*a).sum())(logits, *batched),
        "nested vmap": lambda: torch.vmap(torch.vmap(function))(
            *(tensor.unsqueeze(1) for tensor in (logits, *batched))
        ),
    }


@pytest.mark.parametrize("mode", modes(None, ones(1)))
@pytest.mark.parametrize("options", [{}, {"weight": ones(C)}], ids=["", "weight"])
def test_every_mode_of_torch_func_finds_a_target_out_of_range(mode, options):
    logits, mask = torch.zeros(2, 3, C), torch.tensor([[True, True, False], [False, True, True]])

    def loss(x, target, mask):
        return masked_loss.cross_entropy(x, target, mask, dim=-1, **options)

    masked, kept = torch.tensor([[0, 1, 7], [-3, 4, 3]]), torch.tensor([[0, 7, 2], [1, 4, 3]])
    modes(loss, logits, masked, mask)[mode]()
    with pytest.raises(IndexError, match=r"expected kept targets in \[0, 5\), got 7 at position \[.*1\]"):
        modes(loss, logits, kept, mask)[mode]()
    mapped = torch.vmap(lambda t, m: masked_loss.loss_normalizer(t, m, **options))
    with pytest.raises(IndexError, match="got -3" if not options else "got 7"):
        mapped(kept - 10 * (kept == 7) if not options else kept, mask)


@pytest.mark.parametrize("options", [{}, {"weight": ones(C)}], ids=["", "weight"])
def test_a_learned_sample_weight_finds_a_target_out_of_range(options):
    sample_weight = ones(B, T).requires_grad_()
    with pytest.raises(IndexError, match=r"expected kept targets in \[0, 5\), got 5 at position \[2, 1\]"):
        masked_loss.cross_entropy(LOGITS, target_with(C, (2, 1)), sample_weight=sample_weight, **options)


def test_a_compiler_reads_no_target(fresh_compiler):
    """A mode of torch.func that is compiled answers as a GPU: NaN for the row, and for its gradient."""

    def losses(x, target):
        return torch.vmap(lambda x, t: masked_loss.cross_entropy(x, t, reduction="none"))(x, target)

    x, target = torch.zeros(2, 3, C), torch.tensor([[0, 7, 2], [1, 4, -1]])
    bad = torch.tensor([[False, True, False], [False, False, True]])
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    assert compiled(x, target).isnan().equal(bad)
    gradient = torch.compile(torch.func.grad(lambda x: losses(x, target).sum()), backend="aot_eager")(x)
    assert gradient.isnan().all(-1).equal(bad)
    assert gradient[~bad].isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 1)], ids=str)
def test_check_targets_in_a_batch(in_dims, compiled, fresh_compiler):
    target, mask = torch.tensor([[0, 7, 2], [1, 4, 9]]), torch.tensor([[True, False, True], [True, True, False]])
    values = [v if dim == 0 else v.t() if dim == 1 else v[0] for v, dim in zip((target, mask), in_dims, strict=True)]

    def check(num_classes):
        mapped = torch.vmap(lambda t, m: masked_loss.check_targets(t, num_classes, m), in_dims)
        return torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped

    expected = target[0].expand(2, 3) if in_dims[0] is None else target
    if in_dims == (0, 0):
        assert check(5)(*values).equal(expected)
        with pytest.raises(IndexError, match=r"got 4 at position \[1, 1\]"):
            check(3)(*values)
    assert check(10)(*values).equal(expected)
    with pytest.raises(IndexError, match="expected kept targets"):
        check(1)(*values)


def test_the_first_bad_target_is_named_on_any_number_of_threads(threads):
    target = torch.zeros(200_000, dtype=torch.long)
    target[[150_000, 20_003, 199_999]] = torch.tensor([8, 9, 10])
    for count in (1, 2):
        with threads(count), pytest.raises(IndexError, match=r"got 9 .*\[20003\]"):
            masked_loss.cross_entropy(torch.zeros(200_000, 2), target)


def test_an_unbatched_input_has_one_dim():
    with pytest.raises(IndexError, match=r"^cross_entropy: expected dim .*got 2"):
        masked_loss.cross_entropy(torch.zeros(C), torch.tensor(1), dim=2)
    with pytest.raises(IndexError, match=r"got 5 .*\[\]"):
        masked_loss.cross_entropy(torch.zeros(C), torch.tensor(5))


def test_torch_arguments_moved_over_are_caught():
    # The third argument of F.cross_entropy is weight.
    with pytest.raises(TypeError, match=r"^cross_entropy: expected mask .*weight"):
        masked_loss.cross_entropy(torch.zeros(2, C), torch.tensor([0, 1]), torch.rand(C))
