"""Every bad argument of the elementwise losses, in test_errors.py's format."""

import math
import re

import pytest
import torch

import masked_loss
from pointwise_grid import BROADCASTING, LOSSES, WEIGHTED, operands

HERE = torch.get_default_device().type
B, T = 3, 3  # B == T: a [B] mask would broadcast along T without a word
MASK = torch.ones(B, T, dtype=torch.bool)
HOW_TO_FIX = r"None|unsqueeze|keepdim|reshape"
FLOAT, LONG, COMPLEX = "float|Float", "int64|Long", "complex|Complex"


def good(name):
    return {**operands(name, (B, T), {}), "mask": MASK}


def ones(*shape, **options):
    return torch.ones(shape, **options)


def rows_of(name):
    """What changes, the error, the argument that the message names first, and facts in it."""
    x = good(name)["input"]
    rows = [
        (dict(mask=MASK.float()), TypeError, "mask", (FLOAT, "sample_weight")),
        (dict(mask=MASK[0]), RuntimeError, "mask", (r"\[3\]", HOW_TO_FIX)),
        (dict(mask=ones(B, T + 1, dtype=torch.bool)), RuntimeError, "mask", (r"\[3, 3\]", r"\[3, 4\]")),
        (dict(mask=MASK.to("meta")), RuntimeError, "mask", ("meta", HERE)),
        (dict(mask=MASK.to_sparse()), TypeError, "mask", ("sparse",)),
        (dict(sample_weight=MASK), TypeError, "sample_weight", ("bool|Bool", r"\bmask\b")),
        (dict(sample_weight=MASK.long()), TypeError, "sample_weight", (LONG, r"\bmask\b")),
        (dict(sample_weight=ones(B)), RuntimeError, "sample_weight", (r"\[3\]", HOW_TO_FIX)),
        (dict(sample_weight=ones(B, T, dtype=torch.complex64)), TypeError, "sample_weight", (COMPLEX,)),
        (dict(input=x.to_sparse()), TypeError, "input", ("sparse",)),
        (dict(input=x.to(torch.complex64)), TypeError, "input", (COMPLEX,)),
        (dict(target=ones(B, T, device="meta")), RuntimeError, "target", ("meta", HERE)),
        (dict(reduction="average"), ValueError, "reduction", ("'average'", "'sequence_mean'")),
        (dict(normalizer=2.0, reduction="sum"), ValueError, "normalizer", ("sum",)),
        (dict(normalizer=2.0, reduction="none"), ValueError, "normalizer", ("none",)),
        (dict(normalizer=ones(1)), RuntimeError, "normalizer", (r"\[1\]",)),
        (dict(normalizer=ones(requires_grad=True)), RuntimeError, "normalizer", ("grad",)),
        (dict(dtype=torch.int64), TypeError, "dtype", (LONG, "float32")),
        (dict(dtype=torch.complex64), TypeError, "dtype", (COMPLEX,)),
        (dict(dtype=torch.float8_e5m2), TypeError, "dtype", ("Float8",)),
    ]
    if name in BROADCASTING:
        rows.append((dict(target=ones(2, T), mask=None), RuntimeError, "target", (r"\[3, 3\]", r"\[2, 3\]")))
    if name != "kl_div":
        rows.append((dict(reduction="batchmean"), ValueError, "reduction", ("'batchmean'",)))
    if name in WEIGHTED:
        rows += [
            (dict(weight=ones(2, T)), RuntimeError, "weight", (r"\[2, 3\]", r"\[3, 3\]")),
            (dict(weight=ones(B, T).long()), TypeError, "weight", (LONG,)),
        ]
    if name.startswith("binary"):
        rows += [
            (dict(weight=ones(T + 1)), RuntimeError, "weight", (r"\[4\]", r"\[3, 3\]")),
            (dict(weight=ones(1, B, T)), RuntimeError, "weight", (r"\[1, 3, 3\]", r"\[3, 3\]")),
        ]
    elif name in WEIGHTED:
        rows.append((dict(weight=ones(T)), RuntimeError, "weight", (r"\[3\]",)))
    return rows


OTHERS = [
    ("smooth_l1_loss", dict(beta=-0.5), ValueError, "beta", (r"-0\.5",)),
    ("huber_loss", dict(delta=0.0), ValueError, "delta", ("got 0",)),
    ("huber_loss", dict(delta=-1.0), ValueError, "delta", ("-1",)),
    ("sigmoid_focal_loss", dict(gamma=-2.0), ValueError, "gamma", ("-2",)),
    ("sigmoid_focal_loss", dict(alpha=2.0), ValueError, "alpha", (r"\[0, 1\]", "got 2")),
    ("sigmoid_focal_loss", dict(alpha=math.nan), ValueError, "alpha", (r"\[0, 1\]", "nan")),
    ("gaussian_nll_loss", dict(eps=0.0), ValueError, "eps", ("got 0",)),
    ("gaussian_nll_loss", dict(var=ones(2, T)), RuntimeError, "var", (r"\[2, 3\]",)),
    ("gaussian_nll_loss", dict(var=ones(B, T).long()), TypeError, "var", (LONG,)),
    ("binary_cross_entropy_with_logits", dict(target=ones(B, 1)), RuntimeError, "target", (r"\[3, 3\]", r"\[3, 1\]")),
    ("binary_cross_entropy", dict(target=ones(T)), RuntimeError, "target", (r"\[3, 3\]", r"\[3\]")),
    ("binary_cross_entropy_with_logits", dict(pos_weight=ones(T + 1)), RuntimeError, "pos_weight", (r"\[4\]",)),
    ("binary_cross_entropy_with_logits", dict(pos_weight=ones(T).long()), TypeError, "pos_weight", (LONG,)),
]
TABLE = [(name, *row) for name in LOSSES for row in rows_of(name)] + OTHERS
IDS = [f"{number} {name} {' '.join(change)}" for number, (name, change, *_) in enumerate(TABLE)]
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2, "sequence_mean": 3}


def message_of(function, arguments, error):
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    return str(caught.value).split("\n")[0]


@pytest.mark.parametrize(("name", "change", "error", "argument", "facts"), TABLE, ids=IDS)
def test_message(name, change, error, argument, facts):
    arguments = {**good(name), **change}
    message = message_of(getattr(masked_loss, name), arguments, error)
    assert re.search(rf"^{name}: expected .*?\b({argument})\b.*, got ", message), message
    for fact in facts:
        assert re.search(fact, message), f"{fact!r} not in {message!r}"
    if arguments.get("reduction", "mean") not in REDUCTIONS:
        return
    for_the_dispatcher = dict(arguments)
    if "reduction" in arguments:
        for_the_dispatcher["reduction"] = REDUCTIONS[arguments["reduction"]]
    if isinstance(arguments.get("normalizer"), float):
        for_the_dispatcher["normalizer"] = torch.tensor(arguments["normalizer"])
    assert message_of(getattr(torch.ops.masked_loss, name), for_the_dispatcher, error) == message


def test_a_negative_normalizer():
    with pytest.raises(ValueError, match=r"^mse_loss: expected normalizer of at least 0, got -2\.5"):
        masked_loss.mse_loss(ones(2), ones(2), normalizer=-2.5)


def test_a_reduction_that_a_module_does_not_have():
    with pytest.raises(ValueError, match=r"^MSELoss: expected reduction .*, got 'batchmean'"):
        masked_loss.MSELoss(reduction="batchmean")
    assert "reduction='batchmean'" in repr(masked_loss.KLDivLoss(reduction="batchmean"))
