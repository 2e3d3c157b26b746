"""Shapes and values of masks, for every function that takes one, and the hints for one that does not fit."""

import re

import pytest
import torch

import masked_loss

B, T, D = 3, 4, 5
LENGTHS = torch.tensor([2, 4, 1])


def elements(*shape):
    return torch.zeros(shape)


def classes(*shape):
    return torch.zeros(shape, dtype=torch.long)


# name: a call with a mask, of an input [B, T, D] or, of losses of rows, [B, T] with D classes
CALLS = {
    "cross_entropy": lambda mask: masked_loss.cross_entropy(elements(B, T, D), classes(B, T), mask, dim=-1),
    "loss_normalizer": lambda mask: masked_loss.loss_normalizer(classes(B, T), mask),
    "check_targets": lambda mask: masked_loss.check_targets(classes(B, T), D, mask),
    "mse_loss": lambda mask: masked_loss.mse_loss(elements(B, T), elements(B, T), mask),
    "gaussian_nll_loss": lambda mask: masked_loss.gaussian_nll_loss(elements(B, T), elements(B, T), 1.0, mask),
    "softmax": lambda mask: masked_loss.softmax(elements(B, T), mask),
    "log_softmax": lambda mask: masked_loss.log_softmax(elements(B, T), mask),
    "logsumexp": lambda mask: masked_loss.logsumexp(elements(B, T), mask),
    "masked_sum": lambda mask: masked_loss.masked_sum(elements(B, T), mask),
    "masked_mean": lambda mask: masked_loss.masked_mean(elements(B, T), mask, 1),
    "masked_var": lambda mask: masked_loss.masked_var(elements(B, T), mask),
    "masked_std": lambda mask: masked_loss.masked_std(elements(B, T), mask),
    "masked_whiten": lambda mask: masked_loss.masked_whiten(elements(B, T), mask),
    "masked_fill": lambda mask: masked_loss.masked_fill(elements(B, T), mask, 1.0),
    "masked_fill_": lambda mask: masked_loss.masked_fill_(elements(B, T), mask, 1.0),
}
STRICT = ("cross_entropy", "loss_normalizer", "check_targets", "mse_loss", "gaussian_nll_loss")
REDUCTIONS = tuple(name for name in CALLS if name.startswith("masked_") and "fill" not in name)


def message_of(error, call, *arguments):
    with pytest.raises(error) as caught:
        call(*arguments)
    return str(caught.value).split("\n")[0]


@pytest.mark.parametrize("name", STRICT + REDUCTIONS)
def test_lengths_are_recognised(name):
    message = message_of(RuntimeError, CALLS[name], LENGTHS)
    assert message.startswith(f"{name}: expected mask of rank 2, as ")
    assert message.endswith(f", got shape [{B}]; it looks like lengths: use sequence_mask(mask, {T})")
    # What the hint of an earlier version led to: nonzero lengths, which would keep everything.
    message = message_of(ValueError, CALLS[name], LENGTHS[:, None])
    assert message.startswith(f"{name}: expected mask of an integer dtype to hold 0 and 1, got 2 at position [0, 0]; ")
    assert "sequence_mask" in message


@pytest.mark.parametrize(
    ("loss", "mask", "hint"),
    [
        ((B, T, D), (B, T), "mask[..., None]"),
        ((B, T, T), (B, T), "mask[..., None]"),  # mask[:, None] would fit too, along the wrong dimension
        ((T, T, T), (T, T), "mask[..., None]"),
        ((B, T, D), (B,), "mask[..., None, None]"),
        ((B, T, D), (T, D), "mask[None]"),
        ((B, T, D), (D,), "mask[None, None]"),
        ((B, T, D), (1, D), "mask[None]"),
        ((B, T, D), (B, D), "mask[:, None, :]"),
        ((B, T, D), (T,), "mask[None, :, None]"),
    ],
)
def test_the_missing_dimensions_are_shown(loss, mask, hint):
    for dtype in (torch.bool, torch.long):
        kept = torch.ones(mask, dtype=dtype)
        message = message_of(RuntimeError, masked_loss.mse_loss, elements(*loss), elements(*loss), kept)
        missing = len(loss) - len(mask)
        assert message.endswith(f"; add the missing dimension{'s' * (missing > 1)} of size 1, as in {hint}"), message
        # Followed, the hint is right.
        masked_loss.mse_loss(elements(*loss), elements(*loss), eval(hint, dict(mask=kept)))


def test_a_shape_that_fits_nowhere_has_no_such_hint():
    message = message_of(RuntimeError, masked_loss.mse_loss, elements(B, T), elements(B, T), torch.ones(7).bool())
    assert message.endswith("got shape [7]; add the missing dimension of size 1")
    message = message_of(RuntimeError, CALLS["cross_entropy"], torch.ones(B, T, 1).bool())
    assert message.endswith(f"got shape [{B}, {T}, 1]; it has one dimension too many")
    message = message_of(RuntimeError, CALLS["mse_loss"], torch.ones(B, T, 1, 1).bool())
    assert message.endswith("; it has 2 dimensions too many")


def test_lengths_whose_values_cannot_be_read():
    with torch.device("meta"):
        message = message_of(RuntimeError, masked_loss.mse_loss, elements(B, T), elements(B, T), classes(B))
    assert f"; if it holds lengths, use sequence_mask(mask, {T})" in message


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def with_value(value, dtype, storage):
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, 1], mask[1, 2] = 0, value
    mask = mask.to(dtype)
    if storage == "transposed":
        return mask.t().contiguous().t()
    if storage == "strided":
        return mask.repeat_interleave(2, 1)[:, ::2]
    return mask


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_other_than_0_and_1_are_refused(name, dtype):
    largest = 255 if dtype == torch.uint8 else torch.iinfo(dtype).max if dtype != torch.uint64 else 2**62
    for storage, value in (("contiguous", 2), ("transposed", 64), ("strided", largest)):
        message = message_of(ValueError, CALLS[name], with_value(value, dtype, storage))
        beginning = f"{name}: expected mask of an integer dtype to hold 0 and 1, got {value}"
        assert message == f"{beginning} at position [1, 2]; if any value but 0 stands for True, use mask != 0"
        CALLS[name](with_value(1, dtype, storage))


@pytest.mark.parametrize("name", CALLS)
def test_an_inverted_integer_mask_is_refused(name):
    message = message_of(ValueError, CALLS[name], ~with_value(1, torch.long, "contiguous"))
    assert re.search(r"got -2 at position \[0, 0\]; ~ flips every bit of an integer mask: use logical_not\(\)", message)


def test_a_repeated_mask_is_read_once():
    """A mask of a stride of 0 is as large as it looks, but holds little."""
    wide = torch.ones(1, 1, dtype=torch.long).expand(1 << 20, 1 << 20)
    assert masked_loss.masked_fill_(torch.zeros(0), wide[:0, 0], 1.0).numel() == 0
    lengths = torch.tensor([[3]]).expand(B, T)
    assert "got 3 at position [0, 0]" in message_of(ValueError, CALLS["mse_loss"], lengths)


def test_a_class_mask_too():
    allowed = torch.tensor([1, 0, 2, 1, 1])
    message = message_of(ValueError, lambda: masked_loss.cross_entropy(elements(B, D), classes(B), class_mask=allowed))
    assert message.startswith(
        "cross_entropy: expected class_mask of an integer dtype to hold 0 and 1, got 2 at position"
    )


@pytest.mark.parametrize("name", CALLS)
def test_under_every_transform(name):
    """Beneath functorch's wrappers, in a second derivative, in forward mode: the values are read."""
    mask = with_value(7, torch.long, "contiguous")
    call = CALLS[name]

    def total(x, mask):
        return (x * call(mask)).sum()

    x = torch.ones([])
    ways = {
        "grad": lambda: torch.func.grad(total)(x, mask),
        "jvp": lambda: torch.func.jvp(lambda x: total(x, mask), (x,), (x,)),
        "vmap": lambda: torch.vmap(call)(mask.expand(2, B, T)),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(total), (None, 0))(x, mask.expand(2, B, T)),
        "no grad": lambda: torch.no_grad()(call)(mask),
        "inference": lambda: torch.inference_mode()(call)(mask),
    }
    if name == "masked_fill_":
        del ways["vmap"], ways["vmap of grad"]  # the input has no batch dimension, so torch refuses to write it
    for way, run in ways.items():
        with pytest.raises(ValueError, match="got 7 at position"):
            run()
            pytest.fail(way)


DIFFERENTIATED = {
    "cross_entropy": lambda x, mask: masked_loss.cross_entropy(x, classes(B, T), mask, dim=-1),
    "mse_loss": lambda x, mask: masked_loss.mse_loss(x, elements(B, T, D), mask[..., None]),
    "softmax": lambda x, mask: masked_loss.softmax(x, mask[..., None]),
    "logsumexp": lambda x, mask: masked_loss.logsumexp(x, mask[..., None]),
    "masked_var": lambda x, mask: masked_loss.masked_var(x, mask[..., None]),
    "masked_fill": lambda x, mask: masked_loss.masked_fill(x, mask[..., None], 1.0),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
@pytest.mark.parametrize("wrapped", [False, True])
def test_where_the_input_is_differentiated(name, wrapped):
    mask, function = with_value(7, torch.long, "contiguous"), DIFFERENTIATED[name]
    x = torch.randn(B, T, D)

    def total(x):
        return function(x, mask).sum()

    with pytest.raises(ValueError, match="got 7 at position"):
        if wrapped:
            torch.func.grad(total)(x)
        else:
            total(x.requires_grad_())


@pytest.mark.parametrize("name", CALLS)
def test_compiled(name, fresh_compiler):
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    compiled(with_value(1, torch.long, "contiguous"))
    if name == "masked_fill_" or name in masked_loss.masks.__all__:
        return
    with pytest.raises(ValueError, match="got 7 at position"):
        compiled(with_value(7, torch.long, "contiguous"))
