"""sequence_mask, causal_mask, mask_from_ids and check_targets."""

import pytest
import torch
import torch.nn.functional as F

from masked_loss import causal_mask, check_targets, cross_entropy, mask_from_ids, sequence_mask
from reference import assert_near

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SIDES = ("right", "left")


def by_hand(lengths, maxlen, side="right"):
    """One row of Python booleans a length."""
    rows = []
    for length in lengths.reshape(-1).tolist():
        kept = min(max(length, 0), maxlen)
        row = [True] * kept + [False] * (maxlen - kept)
        rows.append(row if side == "right" else row[::-1])
    return torch.tensor(rows, dtype=torch.bool).reshape(*lengths.shape, maxlen)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_sequence_mask(dtype, side):
    lengths = torch.tensor([2, 0, 5, 3, 1], dtype=dtype)
    mask = sequence_mask(lengths, padding_side=side)
    assert mask.dtype == torch.bool
    assert mask.equal(by_hand(lengths, 5, side))
    for maxlen in (0, 1, 4, 5, 9, 300):  # below, at and above the largest length; beyond what a uint8 holds
        assert sequence_mask(lengths, maxlen, padding_side=side).equal(by_hand(lengths, maxlen, side))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_lengths_of_any_rank(shape, side):
    lengths = torch.randint(0, 7, shape)
    assert sequence_mask(lengths, 6, padding_side=side).equal(by_hand(lengths, 6, side))
    largest = int(lengths.max()) if lengths.numel() else 0
    assert sequence_mask(lengths, padding_side=side).equal(by_hand(lengths, largest, side))


@pytest.mark.parametrize("side", SIDES)
def test_lengths_out_of_range_are_clamped(side):
    lengths = torch.tensor([-3, 4, 100, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min])
    assert sequence_mask(lengths, 4, padding_side=side).equal(by_hand(lengths, 4, side))
    assert sequence_mask(torch.tensor([-2, -1]), padding_side=side).shape == (2, 0)


def test_strided_lengths():
    lengths = torch.arange(12).view(3, 4).t()[::2]
    assert sequence_mask(lengths).equal(by_hand(lengths, 10))


def test_the_mask_of_the_lengths_is_the_mask_of_the_padding():
    lengths, x = torch.tensor([3, 0, 2]), torch.randn(3, 4, 5)
    target = torch.randint(5, (3, 4))
    padded = target.masked_fill(~sequence_mask(lengths, 4), -100)
    loss = cross_entropy(x, target, sequence_mask(lengths, 4), dim=-1)
    assert_near(loss, F.cross_entropy(x.double().transpose(1, 2), padded))


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 6), (6, 3), (1, 5), (5, 1), (0, 3), (3, 0)])
def test_causal_mask(queries, keys):
    mask = causal_mask(queries, keys)
    assert mask.dtype == torch.bool
    assert mask.equal(torch.ones(queries, keys, dtype=torch.bool).tril())
    if keys == queries:
        assert causal_mask(queries).equal(mask)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 6), (6, 3)])
def test_causal_mask_is_is_causal_of_attention(queries, keys):
    q, k, v = torch.randn(2, queries, 8), torch.randn(2, keys, 8), torch.randn(2, keys, 8)
    attention = F.scaled_dot_product_attention
    given = attention(q, k, v, attn_mask=causal_mask(queries, keys))
    torch.testing.assert_close(given, attention(q, k, v, is_causal=True))


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")
def test_causal_mask_of_a_traced_size():
    traced = torch.jit.trace(lambda s: causal_mask(s.shape[0], s.shape[1]), torch.zeros(3, 4))
    for shape in ((3, 4), (5, 2), (1, 6)):
        assert traced(torch.zeros(shape)).equal(causal_mask(*shape))
    on_meta = torch.jit.trace(lambda s: causal_mask(s.shape[0], device=torch.device("meta")), torch.zeros(3))
    assert on_meta(torch.zeros(5)).shape == (5, 5) and on_meta(torch.zeros(5)).is_meta


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_causal_mask_follows_the_default_device(backend, fresh_compiler):
    compiled = torch.compile(lambda x: causal_mask(x.shape[0]), fullgraph=True, backend=backend)
    with torch.device("meta"):
        assert causal_mask(3).is_meta and compiled(torch.zeros(3)).is_meta


def test_causal_mask_is_made_on_the_device_asked_for():
    assert causal_mask(2, device=torch.device("meta")).device.type == "meta"
    assert causal_mask(2).device.type == torch.get_default_device().type


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_mask_from_ids(dtype):
    tokens = torch.tensor([[0, 5, 100], [1, 0, 7]], dtype=dtype)
    assert mask_from_ids(tokens, 0).tolist() == [[False, True, True], [True, False, True]]
    assert mask_from_ids(tokens, [0, 7, 100]).tolist() == [[False, True, False], [True, False, False]]
    assert mask_from_ids(tokens, []).all()
    # Ids that the dtype cannot hold stand nowhere, also where they would be an id that is there, modulo 2^n.
    assert mask_from_ids(tokens, [256, -251, 2**32, 2**16 + 1]).all()


def test_mask_from_ids_of_any_shape():
    assert mask_from_ids(torch.tensor(3), 3).tolist() is False
    assert mask_from_ids(torch.zeros(0, 4, dtype=torch.long), 0).shape == (0, 4)
    tokens = torch.randint(0, 9, (40, 50)).t()[::3]
    assert mask_from_ids(tokens, [2, 4]).equal((tokens != 2) & (tokens != 4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0,), (40_000,)], ids=str)
def test_check_targets_returns_a_copy(shape, dtype):
    target = torch.randint(0, 9, shape).to(dtype)
    checked = check_targets(target, 9)
    assert checked.dtype == dtype
    assert checked.equal(target)
    assert target.numel() == 0 or checked.data_ptr() != target.data_ptr()


def test_check_targets_reads_only_what_is_kept():
    lowest = torch.iinfo(torch.int64).min
    target = torch.tensor([[1, 9, lowest], [-1, 2, -100]])
    mask = torch.tensor([[True, False, False], [False, True, True]])
    assert check_targets(target, 3, mask).equal(target)
    assert check_targets(target, 3, mask.long()).equal(target)
    assert check_targets(target, 3, ignore_index=[9, -1, lowest, -100]).equal(target)
    with pytest.raises(IndexError):
        check_targets(target, 3, mask, ignore_index=7)


@pytest.mark.parametrize("bad", [9, 8, -1, -100, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min])
@pytest.mark.parametrize("position", [(0, 0), (2, 3), (1, 2)])
def test_check_targets_names_value_and_position(bad, position):
    target = torch.zeros(3, 4, dtype=torch.long)
    target[position] = bad
    with pytest.raises(
        IndexError, match=rf"^check_targets: expected .*\b8\b.*got {bad} .*\[{position[0]}, {position[1]}\]"
    ):
        check_targets(target.t().contiguous().t(), 8, ignore_index=-7)


def test_check_targets_names_the_first_of_many(threads):
    target = torch.zeros(300_000, dtype=torch.long)
    target[[250_000, 77_777, 299_999]] = torch.tensor([5, 6, 7])
    for count in (1, 2):
        with threads(count), pytest.raises(IndexError, match=r"got 6 .*\[77777\]"):
            check_targets(target, 5)


def test_causal_mask_is_made_on_the_default_device():
    with torch.device("meta"):
        assert causal_mask(3).device.type == "meta"
    assert causal_mask(3, device=torch.device("meta")).device.type == "meta"
