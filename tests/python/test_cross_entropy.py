"""cross_entropy, loss_normalizer and CrossEntropyLoss: values and gradients."""

import functools
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import reference
from masked_loss import cross_entropy
from reference import (
    FLOAT_TYPES,
    HALF_TYPES,
    allocations_of,
    assert_near,
    assert_positive_zero,
    assert_same_bits,
    loss_and_gradient,
)

REDUCTIONS = ("none", "mean", "sum", "sequence_mean")
TORCH_REDUCTIONS = ("none", "mean", "sum")

# (N, C): part of a tile of rows; whole tiles and a part, enough of them to be split over threads; one row at a time:
# with a tail after whole SIMD registers, split over threads, and in blocks of 2048 classes with a tail
SIZES = [(7, 3), (9000, 10), (5, 67), (300, 1000), (3, 9001)]


def assert_matches_torch(x, target, expected_options, options=None, **more):
    """Ours in x's dtype against F.cross_entropy in float64, value and gradient."""
    reduction = expected_options.get("reduction", "mean")
    upstream = torch.randn(target.shape if reduction == "none" else ()).to(x.dtype)
    options = {**(expected_options if options is None else options), **more}
    loss, gradient = loss_and_gradient(cross_entropy, x, target, upstream=upstream, **options)
    if expected_options.get("weight") is not None:
        expected_options = {**expected_options, "weight": expected_options["weight"].double()}
    wanted = loss_and_gradient(F.cross_entropy, x.double(), target, upstream=upstream.double(), **expected_options)
    assert loss.dtype == gradient.dtype == x.dtype
    assert_near(loss, wanted[0])
    assert_near(gradient, wanted[1])


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_without_a_mask_it_is_torch(rows, classes, dtype):
    x, target = (2 * torch.randn(rows, classes)).to(dtype), torch.randint(classes, (rows,))
    assert_matches_torch(x, target, {})


@pytest.mark.parametrize("reduction", TORCH_REDUCTIONS)
@pytest.mark.parametrize("shape", [(4,), (6, 4), (3, 4, 5), (2, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_every_argument_that_torch_has(shape, reduction, label_smoothing, weighted, ignore_index):
    x = torch.randn(shape)
    target = torch.randint(4, shape[:1] and (shape[0], *shape[2:]) if len(shape) > 1 else ())
    if len(shape) == 1 and ignore_index == 2:
        target.fill_(1)  # alone and ignored: torch's mean is NaN, ours is 0, tested elsewhere
    weight = torch.rand(4) if weighted else None
    arguments = dict(reduction=reduction, label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index)
    assert_matches_torch(x, target, arguments)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_masked_is_absent(rows, classes, reduction, dtype):
    x, target = (2 * torch.randn(rows, classes)).to(dtype), torch.randint(classes, (rows,))
    mask = torch.rand(rows) < 0.6
    mask[0] = True
    loss, gradient = loss_and_gradient(cross_entropy, x, target, mask, reduction=reduction)
    expected = loss_and_gradient(F.cross_entropy, x[mask].double(), target[mask], reduction=reduction)
    assert_near(loss, expected[0], dtype)
    assert_near(gradient[mask], expected[1])
    assert_positive_zero(gradient[~mask])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mask_that_keeps_everything_changes_no_bit(reduction):
    x, target = torch.randn(6, 5, 40), torch.randint(5, (6, 40))
    upstream = torch.randn(6, 40) if reduction == "none" else None
    plain = loss_and_gradient(cross_entropy, x, target, upstream=upstream, reduction=reduction)
    everything = (
        dict(mask=torch.ones(6, 40, dtype=torch.bool)),
        dict(mask=torch.ones(1, 40, dtype=torch.long)),
        dict(class_mask=torch.ones(5, dtype=torch.bool)),
        dict(ignore_index=[]),
    )
    for options in everything:
        other = loss_and_gradient(cross_entropy, x, target, upstream=upstream, reduction=reduction, **options)
        assert_same_bits(plain[0], other[0])
        assert_same_bits(plain[1], other[1])


def test_sequence_mean_by_hand():
    per_token = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    # Two classes, the target's logit 0 and the other's such that the loss is the number above.
    x = torch.stack([torch.zeros(3, 3), per_token.expm1().log()], dim=-1)
    target = torch.zeros(3, 3, dtype=torch.long)
    options = dict(reduction="sequence_mean", dim=-1)
    assert_near(cross_entropy(x, target, mask, **options), torch.tensor((1.5 + 3.0) / 2))
    assert_near(cross_entropy(x, target, mask, normalizer=3, **options), torch.tensor((1.5 + 3.0) / 3))
    weights = torch.tensor([[3.0, 1.0, 5.0]]).expand(3, 3)
    weighted = cross_entropy(x, target, mask, sample_weight=weights, **options)
    assert_near(weighted, torch.tensor(((3 * 1 + 1 * 2) / 4 + 3) / 2))


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
# With dim inside, tiles of 64 rows (in the second, adjacent ones across sequences) or, above 1024 classes, of 16; with
# dim last, tiles (40 classes), rows (400) and rows in blocks (3000)
@pytest.mark.parametrize("shape", [(3, 40, 5), (2, 40, 70), (2, 400, 3, 5), (2, 3000, 20)], ids=str)
def test_layouts_of_dim_agree(shape, reduction, dtype):
    x = torch.randn(shape).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    mask = torch.rand(target.shape) < 0.7
    upstream = torch.randn(target.shape).to(dtype) if reduction == "none" else None
    options = dict(upstream=upstream, reduction=reduction)
    loss, gradient = loss_and_gradient(cross_entropy, x, target, mask, **options)
    for dim in range(len(shape)):
        moved = x.movedim(1, dim).contiguous()
        other, other_gradient = loss_and_gradient(cross_entropy, moved, target, mask, dim=dim, **options)
        view, view_gradient = loss_and_gradient(cross_entropy, x.movedim(1, dim), target, mask, dim=dim, **options)
        for value in (other, view):
            assert_near(value, loss, dtype)
        for value in (other_gradient, view_gradient):
            assert_near(value.movedim(dim, 1), gradient, dtype)


VIEWS = {
    "shifted": (lambda x: x[:, :-1], (4, 8, 50)),  # next-token prediction
    "transposed": (lambda x: x.transpose(1, 2), (4, 50, 7)),
    "batch innermost": (lambda x: x.permute(2, 1, 0), (50, 7, 4)),
    "stride 2": (lambda x: x[..., ::2], (4, 7, 100)),
    "inner classes": (lambda x: x[:, :, 5:55], (4, 7, 60)),
    "expanded batch": (lambda x: x.expand(4, 7, 50), (1, 7, 50)),
    "expanded classes": (lambda x: x.expand(4, 7, 50), (4, 7, 1)),
    "expanded time": (lambda x: x[:, None].expand(4, 7, 50), (4, 50)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_as_their_copies(view, dtype):
    function, shape = VIEWS[view]
    base = torch.randn(shape).to(dtype).requires_grad_()
    x = function(base)
    target = torch.randint(100, (8, 9)).t()[1:9:2, 1:8].remainder(x.shape[-1])
    target = target[: x.shape[0], : x.shape[1]]
    mask = (torch.rand(x.shape[1], x.shape[0]) < 0.7).t()
    sample_weight = torch.rand(x.shape[0], 1).expand(x.shape[:2])
    options = dict(sample_weight=sample_weight, dim=-1)
    loss = cross_entropy(x, target, mask, **options)
    same = cross_entropy(x.contiguous(), target.contiguous(), mask.contiguous(), **options)
    assert_near(loss, same)
    (gradient,) = torch.autograd.grad(loss, x)
    exact = function(base.detach().double()).requires_grad_()
    (expected,) = torch.autograd.grad(reference.cross_entropy(exact, target, mask, **options), exact)
    assert_near(gradient, expected)


def test_a_lazily_negated_view():
    z = torch.randn(6, 5, dtype=torch.complex64)
    x, target = z.conj().imag, torch.randint(5, (6,))  # has the bits of z.imag, and a mark that they are negated
    assert x.is_neg()
    loss, gradient = loss_and_gradient(cross_entropy, x, target)
    expected = loss_and_gradient(F.cross_entropy, -z.imag.double(), target)
    assert_near(loss, expected[0])
    assert_near(gradient, expected[1])


def test_channels_last_gradient():
    x = torch.randn(2, 5, 4, 3).to(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(5, (2, 4, 3))
    cross_entropy(x, target).backward()
    _, expected = loss_and_gradient(F.cross_entropy, x.detach().double(), target)
    assert_near(x.grad, expected)


EMPTY = {
    "no batch": ((0, 5), 1),
    "no time": ((3, 5, 0), 1),
    "no batch, classes last": ((0, 4, 5), -1),
    "no class, no row": ((0, 0), 1),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("empty", EMPTY)
def test_empty_batches(empty, reduction):
    shape, dim = EMPTY[empty]
    x = torch.randn(shape, requires_grad=True)
    target = torch.zeros([size for d, size in enumerate(shape) if d != dim % len(shape)], dtype=torch.long)
    loss = cross_entropy(x, target, reduction=reduction, dim=dim)
    assert loss.requires_grad
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert_positive_zero(loss)
    loss.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_classes(reduction):
    x, target = torch.randn(3, 0, requires_grad=True), torch.tensor([-100, -100, 7])
    mask = torch.tensor([True, True, False])
    loss = cross_entropy(x, target, mask, reduction=reduction)
    assert_positive_zero(loss)
    loss.sum().backward()
    with pytest.raises(IndexError, match=r"7 .*\[2\]"):
        cross_entropy(x, target, reduction=reduction)


MASKING = {
    "mask": dict(mask=torch.zeros(3, 4, dtype=torch.bool)),
    "broadcast mask": dict(mask=torch.zeros(1, 1, dtype=torch.int32)),
    "ignore_index": dict(ignore_index=[0, 1, 2, 3, 4]),
    "sample_weight": dict(sample_weight=torch.zeros(3, 1)),
    "class_mask": dict(class_mask=torch.zeros(5, dtype=torch.bool)),
}


REDUCED = [(reduction, None) for reduction in REDUCTIONS]
REDUCED += [(reduction, normalizer) for reduction in ("mean", "sequence_mean") for normalizer in (0.0, 3.0)]


@pytest.mark.parametrize("by", MASKING)
@pytest.mark.parametrize(("reduction", "normalizer"), REDUCED)
def test_nothing_kept_is_zero(by, reduction, normalizer):
    x = torch.full((3, 5, 4), torch.nan, requires_grad=True)
    target = torch.randint(5, (3, 4))
    loss = cross_entropy(x, target, reduction=reduction, label_smoothing=0.1, normalizer=normalizer, **MASKING[by])
    assert loss.requires_grad
    assert_positive_zero(loss)
    loss.backward(torch.full_like(loss, -torch.inf))
    assert_positive_zero(x.grad)


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize(
    "options",
    [
        dict(sample_weight=torch.tensor([1.0, -1.0]).expand(3, 2)),  # cancel to 0 in each sequence
        dict(weight=torch.zeros(5), label_smoothing=0.5),
        dict(normalizer=0.0),
        dict(normalizer=torch.tensor(0)),
    ],
    ids=["sample_weight", "weight", "normalizer", "tensor"],
)
def test_a_divisor_of_zero_gives_zero(options, reduction):
    x, target = torch.randn(3, 5, 2, requires_grad=True), torch.randint(5, (3, 2))
    loss = cross_entropy(x, target, reduction=reduction, **options)
    assert_positive_zero(loss)
    loss.backward()
    assert_positive_zero(x.grad)


def test_a_sequence_whose_divisor_is_zero_counts_as_a_sequence():
    x, target = torch.randn(3, 2, 5), torch.randint(5, (3, 2))
    sample_weight = torch.tensor([[1.0, -1.0], [1.0, 1.0], [0.0, 0.0]])
    loss = cross_entropy(x, target, sample_weight=sample_weight, reduction="sequence_mean", dim=-1)
    middle = F.cross_entropy(x[1].double(), target[1])
    assert_near(loss, middle / 2)  # of the first and the second; nothing of the third is kept


def test_a_uint8_target_is_not_ignored_by_an_id_that_it_cannot_hold():
    x, target = torch.randn(3, 200), torch.tensor([156, 255 - 100, 3], dtype=torch.uint8)  # 156 = -100 mod 256
    assert_near(cross_entropy(x, target, ignore_index=[-100, 259]), F.cross_entropy(x.double(), target.long()))
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2], dtype=torch.int32)
    kept = torch.tensor([0, 2])
    assert_near(cross_entropy(x, target, ignore_index=[1, 2**32]), F.cross_entropy(x[kept].double(), kept))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dim", [1, -1])
def test_class_mask_is_torch_on_the_allowed_classes(label_smoothing, dim):
    allowed = torch.tensor([True, False, True, True, False, True])
    x, small_target = torch.randn(4, 6, 3), torch.randint(4, (4, 3))
    target = allowed.nonzero()[:, 0][small_target]
    arguments = dict(label_smoothing=label_smoothing)
    given = x if dim == 1 else x.transpose(1, 2).contiguous()
    loss, gradient = loss_and_gradient(cross_entropy, given, target, class_mask=allowed, dim=dim, **arguments)
    gradient = gradient if dim == 1 else gradient.transpose(1, 2)
    expected = loss_and_gradient(F.cross_entropy, x[:, allowed].double(), small_target, **arguments)
    assert_near(loss, expected[0])
    assert_near(gradient[:, allowed], expected[1])
    assert_positive_zero(gradient[:, ~allowed])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_target_on_a_masked_class_costs_infinity(reduction, label_smoothing):
    x, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    class_mask = torch.tensor([True, True, False, True])
    options = dict(class_mask=class_mask, reduction=reduction, label_smoothing=label_smoothing)
    upstream = torch.ones(3, dtype=torch.float64) if reduction == "none" else None
    loss, gradient = loss_and_gradient(cross_entropy, x, target, upstream=upstream, **options)
    assert (loss[2] if reduction == "none" else loss) == torch.inf
    assert gradient.isfinite().all()
    assert_positive_zero(gradient[:, 2])
    _, expected = loss_and_gradient(cross_entropy, x[:2], target[:2], **{**options, "reduction": "sum"})
    assert_near(gradient[:2], expected / (1 if reduction in ("none", "sum") else 3))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
def test_large_logits_are_stable(dtype):
    x = (torch.randn(20, 100) * 1e4).clamp(-6e4, 6e4).to(dtype)
    target = torch.randint(100, (20,))
    assert_matches_torch(x, target, {"reduction": "none"})
    assert_matches_torch(x, target, {"label_smoothing": 0.1})


def test_logits_far_from_zero_lose_nothing_relative_to_themselves():
    x, target = torch.randn(20, 100, dtype=torch.float64), torch.randint(100, (20,))
    for offset in (-1e4, 1e4):
        assert cross_entropy(x + offset, target).item() == pytest.approx(F.cross_entropy(x, target).item(), rel=1e-11)


def test_a_confident_row_keeps_its_small_gradient():
    # p - 1 is formed before it is rounded: here it is -2.5e-4, and p in float16 would be 1 or 1 - 4.9e-4.
    x = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.float16)
    _, gradient = loss_and_gradient(cross_entropy, x, torch.tensor([0]))
    expected = loss_and_gradient(F.cross_entropy, x.double(), torch.tensor([0]))[1]
    torch.testing.assert_close(gradient.double(), expected, rtol=0.01, atol=0)


def test_two_runs_and_two_thread_counts_give_the_same_bits(threads):
    # Many short rows, medium rows and few long ones: each is split over threads in another way.
    for shape, dim in [((60_000, 7), 1), ((700, 1000), 1), ((3, 200_000), 1), ((16, 300, 120), 1), ((64, 64, 64), 2)]:
        x = torch.randn(shape)
        rows = [size for d, size in enumerate(shape) if d != dim]
        target, mask, weights = torch.randint(shape[dim], rows), torch.rand(rows) < 0.7, torch.rand(rows)
        for reduction in REDUCTIONS:
            upstream = torch.randn(rows) if reduction == "none" else None
            options = dict(sample_weight=weights, reduction=reduction, dim=dim, upstream=upstream, label_smoothing=0.1)
            results = []
            for count in (1, 2, 2):
                with threads(count):
                    results.append(loss_and_gradient(cross_entropy, x, target, mask, **options))
            for other in results[1:]:
                assert_same_bits(results[0][0], other[0])
                assert_same_bits(results[0][1], other[1])


def test_python_threads_may_call_at_once():
    problems = [(torch.randn(40, 300), torch.randint(300, (40,)), torch.rand(40) < 0.7) for _ in range(8)]
    alone = [loss_and_gradient(cross_entropy, *each) for each in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: loss_and_gradient(cross_entropy, *each), problems * 10))
    for ours, theirs in zip(together, alone * 10, strict=True):
        assert_same_bits(ours[0], theirs[0])
        assert_same_bits(ours[1], theirs[1])


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_temporary_of_the_size_of_the_logits_but_the_gradient(reduction, dim):
    x = torch.randn(16, 400, 20) if dim == 1 else torch.randn(16, 20, 400)
    target, mask = torch.randint(400, (16, 20)), torch.rand(16, 20) < 0.7
    upstream = torch.ones(16, 20) if reduction == "none" else None
    options = dict(reduction=reduction, dim=dim, label_smoothing=0.1, class_mask=torch.ones(400, dtype=torch.bool))
    half = x.numel() * x.element_size() // 2
    assert allocations_of(lambda: cross_entropy(x, target, mask, **options), half) == 0
    options["upstream"] = upstream
    assert allocations_of(lambda: loss_and_gradient(cross_entropy, x, target, mask, **options), half) == 1


IN_A_CHILD = """
import sys, torch
from masked_loss import cross_entropy
results = []
for x, target, mask, dim in torch.load(sys.argv[1]):
    x.requires_grad_()
    loss = cross_entropy(x, target, mask, label_smoothing=0.1, z_loss=0.01, dim=dim)
    none = cross_entropy(x, target, mask, reduction="none", dim=dim)
    results.append((loss.detach(), none.detach(), *torch.autograd.grad(loss, x), *torch.autograd.grad(none.sum(), x)))
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability, tmp_path):
    """Which kernels run is chosen once in a process, by torch's own variable; what the machine lacks falls back."""
    problems = []
    # tiles, a row at a time, blocks of a row; contiguous and strided
    for dtype, classes, dim in itertools.product(FLOAT_TYPES, (10, 70, 5000), (1, -1)):
        x = torch.randn((3, classes, 30) if dim == 1 else (3, 30, classes)).to(dtype)
        problems.append((x, torch.randint(classes, (3, 30)), torch.rand(3, 30) < 0.7, dim))
    torch.save(problems, tmp_path / "problems.pt")
    command = [sys.executable, "-c", IN_A_CHILD, tmp_path / "problems.pt", tmp_path / "results.pt"]
    subprocess.run(command, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": capability})
    results = torch.load(tmp_path / "results.pt")
    for (x, target, mask, dim), (loss, none, gradient, none_gradient) in zip(problems, results, strict=True):
        smoothed = functools.partial(reference.cross_entropy, label_smoothing=0.1, z_loss=0.01)
        expected, expected_gradient = loss_and_gradient(smoothed, x.double(), target, mask, dim=dim)
        each, each_gradient = loss_and_gradient(
            reference.cross_entropy, x.double(), target, mask, reduction="none", dim=dim
        )
        assert_near(loss, expected)
        assert_near(none, each)
        assert_near(gradient, expected_gradient)
        assert_near(none_gradient, each_gradient)


def test_huge_pages_change_no_bit(tmp_path):
    # A gradient of 24 MB, which is advised where the variable is not 0.
    problem = (torch.randn(1500, 4000), torch.randint(4000, (1500,)), torch.rand(1500) < 0.7, 1)
    torch.save([problem], tmp_path / "problems.pt")
    results = []
    for setting in ("0", "1"):
        command = [sys.executable, "-c", IN_A_CHILD, tmp_path / "problems.pt", tmp_path / "results.pt"]
        subprocess.run(command, check=True, env={**os.environ, "MASKED_LOSS_HUGE_PAGES": setting})
        results.append(torch.load(tmp_path / "results.pt")[0])
    for without, with_huge_pages in zip(*results, strict=True):
        assert_same_bits(without, with_huge_pages)


def test_targets_and_masks_of_every_dtype_agree():
    x, target, mask = torch.randn(50, 9), torch.randint(9, (50,)), torch.rand(50) < 0.5
    expected = loss_and_gradient(cross_entropy, x, target, mask)
    masks = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    for target_dtype in (torch.int64, torch.int32, torch.uint8):
        for mask_dtype in masks:
            loss, gradient = loss_and_gradient(cross_entropy, x, target.to(target_dtype), mask.to(mask_dtype))
            assert_same_bits(loss, expected[0])
            assert_same_bits(gradient, expected[1])
