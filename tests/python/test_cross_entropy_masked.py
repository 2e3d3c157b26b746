"""cross_entropy: masked means never read, bit for bit; kept NaN and inf propagate as torch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from masked_loss import cross_entropy, loss_normalizer
from reference import FLOAT_TYPES, assert_near, assert_positive_zero, assert_same_bits, bits, loss_and_gradient

REDUCTIONS = ("none", "mean", "sum", "sequence_mean")
BATCH, TIME, CLASSES = 4, 6, 70  # 70 classes: rows of whole SIMD registers and a tail, or tiles where strided
LOWEST, HIGHEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max

# What lies at masked slots, in turn.
LOGIT_GARBAGE = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan, 6e4])
TARGET_GARBAGE = torch.tensor([LOWEST, HIGHEST, CLASSES, CLASSES + 5, -1, 2**32])
WEIGHT_GARBAGE = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0])

# dim=1: classes strided, rows side by side in memory; dim=-1: classes contiguous
LAYOUTS = {"B,C,T": 1, "B,T,C": -1}


def cycle(garbage, shape):
    count = torch.Size(shape).numel()
    return garbage.repeat(count // len(garbage) + 1)[:count].reshape(shape)


class Problem:
    """A batch of which about a third is masked `by` one of the ways to mask, clean or with garbage in its place."""

    def __init__(self, by, dtype, layout, target_dtype=torch.int64):
        self.by, self.dim = by, LAYOUTS[layout]
        self.x = torch.randn(BATCH, TIME, CLASSES).to(dtype)
        self.target = torch.randint(CLASSES - 1, (BATCH, TIME)).to(target_dtype)
        self.masked = torch.rand(BATCH, TIME) < 0.35
        self.masked[1] = True  # a sequence without anything kept
        self.sample_weight = 0.1 + torch.rand(BATCH, TIME)
        self.sample_weight[0, ::2] *= -0.1
        self.weight = torch.rand(CLASSES)
        self.class_mask = torch.rand(BATCH, TIME, CLASSES) < 0.7
        self.class_mask.scatter_(-1, self.target.long().unsqueeze(-1), True)

    def poisoned(self):
        """Logits, targets and sample weights with garbage wherever they must not be read."""
        x, target, weights = self.x.clone(), self.target.clone(), self.sample_weight.clone()
        x[self.masked] = cycle(LOGIT_GARBAGE, x[self.masked].shape).to(x.dtype)
        if self.by == "class_mask":
            x[~self.class_mask] = cycle(LOGIT_GARBAGE, x[~self.class_mask].shape).to(x.dtype)
        if self.by != "ignore_index":
            target[self.masked] = cycle(TARGET_GARBAGE, target[self.masked].shape).to(target.dtype)
        if self.by != "sample_weight":
            weights[self.masked] = cycle(WEIGHT_GARBAGE, weights[self.masked].shape)
        return x, target, weights

    def run(self, x, target, sample_weight, upstream=None, **options):
        """Loss and gradients `[B, T, C]`; a sample_weight that masks is data, any other is differentiated."""
        options = {"mask": None, **options}
        class_mask = self.class_mask if options.pop("class_masks", self.by == "class_mask") else None
        if self.by == "mask":
            options["mask"] = ~self.masked
        elif self.by == "ignore_index":
            target = target.masked_fill(self.masked, CLASSES - 1)
            options["ignore_index"] = [-5, CLASSES - 1]
        elif self.by == "sample_weight":
            sample_weight = sample_weight.masked_fill(self.masked, 0.0)
        elif self.by == "class_mask":
            class_mask = self.class_mask & ~self.masked.unsqueeze(-1)
        leaf = x.transpose(1, 2).contiguous() if self.dim == 1 else x.clone()
        leaf.requires_grad_()
        loss = cross_entropy(
            leaf,
            target,
            options.pop("mask"),
            weight=self.weight,
            sample_weight=sample_weight,
            class_mask=class_mask if class_mask is None or self.dim == -1 else class_mask.movedim(-1, 1),
            dim=self.dim,
            **options,
        )
        leaves = [leaf, sample_weight] if sample_weight.requires_grad else [leaf]
        gradient, *others = torch.autograd.grad(loss, leaves, upstream)
        return loss.detach(), gradient.transpose(1, 2) if self.dim == 1 else gradient, others


BY = ("mask", "ignore_index", "sample_weight", "class_mask")


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_garbage_changes_no_bit(by, reduction, layout, dtype):
    problem = Problem(by, dtype, layout)
    upstream = torch.randn(BATCH, TIME).to(dtype) if reduction == "none" else None
    options = dict(reduction=reduction, label_smoothing=0.1, z_loss=0.01, upstream=upstream)
    loss, gradient, _ = problem.run(problem.x, problem.target, problem.sample_weight, **options)
    assert loss.isfinite().all()
    other, other_gradient, _ = problem.run(*problem.poisoned(), **options)
    assert_same_bits(other, loss)
    assert_same_bits(other_gradient, gradient)
    assert_positive_zero(other_gradient[problem.masked])
    if reduction == "none":
        assert_positive_zero(other[problem.masked])
    if by == "class_mask":
        assert_positive_zero(other_gradient[~problem.class_mask])
    assert gradient[~problem.masked].ne(0).any(-1).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_garbage_without_a_graph(reduction, layout, dtype):
    problem = Problem("mask", dtype, layout)
    dim = problem.dim

    def value(x, target, sample_weight):
        x = x.transpose(1, 2).contiguous() if dim == 1 else x
        return cross_entropy(x, target, ~problem.masked, sample_weight=sample_weight, reduction=reduction, dim=dim)

    assert_same_bits(value(*problem.poisoned()), value(problem.x, problem.target, problem.sample_weight))


@pytest.mark.parametrize("by", ["mask", "ignore_index", "class_mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_garbage_with_a_differentiated_sample_weight(by, reduction):
    problem = Problem(by, torch.float32, "B,T,C")
    upstream = torch.randn(BATCH, TIME) if reduction == "none" else None
    results = []
    for x, target, weights in ((problem.x, problem.target, problem.sample_weight), problem.poisoned()):
        results.append(problem.run(x, target, weights.requires_grad_(), upstream, reduction=reduction))
    assert_same_bits(results[1][0], results[0][0])
    assert_same_bits(results[1][1], results[0][1])
    assert_same_bits(results[1][2][0], results[0][2][0])
    assert_positive_zero(results[1][1][problem.masked])
    assert_positive_zero(results[1][2][0][problem.masked])


@pytest.mark.parametrize("target_dtype", [torch.int32, torch.uint8], ids=str)
def test_garbage_in_narrow_targets(target_dtype):
    problem = Problem("mask", torch.float32, "B,T,C", target_dtype)
    x, target, weights = problem.poisoned()
    if target_dtype == torch.int32:
        target[problem.masked] = torch.iinfo(torch.int32).min
    loss, gradient, _ = problem.run(problem.x, problem.target, problem.sample_weight)
    other, other_gradient, _ = problem.run(x, target, weights)
    assert_same_bits(other, loss)
    assert_same_bits(other_gradient, gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_garbage_at_masked_classes_of_every_kind_of_class_mask(layout):
    dim = LAYOUTS[layout]
    x, target = torch.randn(BATCH, TIME, CLASSES), torch.zeros(BATCH, TIME, dtype=torch.long)
    for shape in [
        (CLASSES,),
        (1, 1, CLASSES),
        (BATCH, 1, CLASSES),
        (1, TIME, CLASSES),
        (BATCH, TIME, CLASSES),
        (BATCH, TIME, 1),
    ]:
        allowed = torch.rand(shape) < 0.5
        allowed[..., :1] |= torch.tensor(shape[-1] == CLASSES)
        dirty = torch.where(allowed, x, cycle(LOGIT_GARBAGE, x.shape))
        given = allowed.movedim(-1, dim) if allowed.dim() == 3 else allowed
        results = []
        for logits in (x, dirty):
            leaf = logits.movedim(-1, dim).contiguous().requires_grad_()
            loss = cross_entropy(leaf, target, class_mask=given, label_smoothing=0.1, dim=dim)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0].movedim(dim, -1)))
        assert_same_bits(results[1][0], results[0][0])
        assert_same_bits(results[1][1], results[0][1])
        assert_positive_zero(results[1][1][~allowed.expand(x.shape)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream", [-1.0, -0.0, torch.nan, torch.inf, -torch.inf])
def test_upstream_gradients_never_reach_masked_slots(upstream, reduction, layout):
    problem = Problem("mask", torch.float32, layout)
    x, target, weights = problem.poisoned()
    shape = (BATCH, TIME) if reduction == "none" else ()
    _, gradient, _ = problem.run(x, target, weights, torch.full(shape, upstream), reduction=reduction, class_masks=True)
    assert_positive_zero(gradient[problem.masked])
    assert_positive_zero(gradient[~problem.class_mask])
    if upstream not in (-1.0, -0.0):
        assert not gradient[~problem.masked & (problem.sample_weight != 0)].isfinite().all(-1).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_upstream_garbage_at_masked_outputs_is_ignored(dtype, layout):
    problem = Problem("mask", dtype, layout)
    upstream = torch.randn(BATCH, TIME).to(dtype)
    dirty = torch.where(problem.masked, cycle(LOGIT_GARBAGE, upstream.shape).to(dtype), upstream)
    for weights in (problem.sample_weight, problem.sample_weight.clone().requires_grad_()):
        arguments = (problem.x, problem.target, weights)
        _, gradient, others = problem.run(*arguments, upstream, reduction="none")
        _, other, other_others = problem.run(*arguments, dirty, reduction="none")
        assert_same_bits(other, gradient)
        for a, b in zip(others, other_others, strict=True):
            assert_same_bits(a, b)


def test_second_derivatives_ignore_garbage():
    problem = Problem("mask", torch.float64, "B,T,C")
    results = []
    for x, target, weights in ((problem.x, problem.target, problem.sample_weight), problem.poisoned()):
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, target, ~problem.masked, sample_weight=weights, label_smoothing=0.1, dim=-1)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        results.append((gradient.detach(), second))
    for clean, dirty in zip(*results, strict=True):
        assert_same_bits(dirty, clean)
        assert_positive_zero(dirty[problem.masked])


def test_the_normalizer_ignores_garbage():
    for by in BY:
        problem = Problem(by, torch.float32, "B,T,C")
        divisors = []
        for _, target, weights in ((problem.x, problem.target, problem.sample_weight), problem.poisoned()):
            options = {"sample_weight": weights, "weight": problem.weight}
            if by == "mask":
                options["mask"] = ~problem.masked
            elif by == "ignore_index":
                target = target.masked_fill(problem.masked, -7)
                options["ignore_index"] = -7
            elif by == "sample_weight":
                options["sample_weight"] = weights.masked_fill(problem.masked, 0.0)
            else:
                options["class_mask"] = (~problem.masked).unsqueeze(-1).expand(-1, -1, CLASSES)
            divisors.append(loss_normalizer(target, dim=-1, **options))
        assert_same_bits(*divisors)


# Which logits of a row are not finite, and where the target is: torch says what comes of it.
ROWS = {
    "NaN": [(0, torch.nan)],
    "NaN in the tail": [(-1, torch.nan)],
    "negative NaN": [(3, -torch.nan)],
    "NaN beside inf": [(3, torch.nan), (4, torch.inf)],
    "NaN beside -inf": [(3, -torch.inf), (4, torch.nan)],
    "inf": [(3, torch.inf)],
    "inf at the target": [(1, torch.inf)],
    "two inf": [(3, torch.inf), (5, torch.inf)],
    "-inf": [(3, -torch.inf)],
    "-inf in front": [(0, -torch.inf)],
    "-inf at the target": [(1, -torch.inf)],
    "all -inf": [(slice(None), -torch.inf)],
    "all -inf but the target": [(slice(None), -torch.inf), (1, 0.5)],
    "all inf": [(slice(None), torch.inf)],
    "all NaN": [(slice(None), torch.nan)],
}


def not_finite(kind, rows, classes, dtype):
    x = torch.randn(rows, classes).to(dtype)
    for index, value in ROWS[kind]:
        x[1, index] = value
    return x, torch.ones(rows, dtype=torch.long)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
# 7: tiles; 70: a row of whole SIMD registers and a tail, or tiles; 5000: blocks of a row, or narrower tiles
@pytest.mark.parametrize("classes", [7, 70, 5000])
def test_kept_values_that_are_not_finite_propagate_as_torchs(kind, reduction, dtype, classes):
    x, target = not_finite(kind, 3, classes, dtype)
    expected, expected_gradient = loss_and_gradient(F.cross_entropy, x.double(), target, reduction=reduction)
    for dim, logits in ((-1, x), (0, x.t().contiguous())):  # contiguous and strided classes
        loss, gradient = loss_and_gradient(cross_entropy, logits, target, reduction=reduction, dim=dim)
        gradient = gradient if dim == -1 else gradient.t()
        assert_near(loss, expected)
        assert_near(gradient, expected_gradient)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["NaN", "inf", "-inf", "all -inf", "-inf at the target"])
@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
def test_label_smoothing_of_what_is_not_finite_is_torchs(kind, label_smoothing, reduction):
    x, target = not_finite(kind, 3, 70, torch.float32)
    options = dict(label_smoothing=label_smoothing, reduction=reduction)
    expected, _ = loss_and_gradient(F.cross_entropy, x.double(), target, **options)
    loss, _ = loss_and_gradient(cross_entropy, x, target, **options)
    assert_near(loss, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_in_a_kept_weight_propagates(reduction):
    x, target = torch.randn(3, 5, 4), torch.randint(5, (3, 4))
    sample_weight = torch.ones(3, 4)
    sample_weight[1, 2] = torch.nan
    loss, gradient = loss_and_gradient(cross_entropy, x, target, sample_weight=sample_weight, reduction=reduction)
    assert (loss[1, 2] if reduction == "none" else loss).isnan()
    assert gradient[1, :, 2].isnan().all()


def test_a_nan_stays_in_its_own_row():
    x, target = torch.randn(4, 40), torch.randint(40, (4,))
    clean, clean_gradient = loss_and_gradient(cross_entropy, x, target, reduction="none")
    x[2, 7] = torch.nan
    loss, gradient = loss_and_gradient(cross_entropy, x, target, reduction="none")
    rest = torch.tensor([True, True, False, True])
    assert_same_bits(loss[rest], clean[rest])
    assert_same_bits(gradient[rest], clean_gradient[rest])
    assert loss[2].isnan()
    assert gradient[2].isnan().all()


def test_every_kept_subset_of_a_small_batch():
    x, target = torch.randn(4, 3), torch.randint(3, (4,))
    for keep in itertools.product([False, True], repeat=4):
        mask = torch.tensor(keep)
        dirty = torch.where(mask[:, None], x, torch.nan)
        loss, gradient = loss_and_gradient(cross_entropy, dirty, target, mask=mask)
        if not any(keep):
            assert bits(loss).item() == 0
            continue
        expected, expected_gradient = loss_and_gradient(F.cross_entropy, x[mask].double(), target[mask])
        assert_near(loss, expected)
        assert_near(gradient[mask], expected_gradient)
        assert_positive_zero(gradient[~mask])


@pytest.mark.parametrize("masked", [False, True])
def test_more_ids_to_ignore_than_a_kernel_takes_as_arguments(masked):
    x, y = torch.randn(60, 50), torch.randint(50, (60,))
    ids = list(range(0, 40, 2))
    mask = torch.rand(60) < 0.7 if masked else None
    keep = ~torch.isin(y, torch.tensor(ids)) & (torch.ones(60, dtype=torch.bool) if mask is None else mask)
    assert_same_bits(
        cross_entropy(x, y, mask, ignore_index=ids, reduction="none"),
        cross_entropy(x, y, keep, reduction="none"),
    )
