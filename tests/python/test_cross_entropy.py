"""cross_entropy, loss_normalizer and CrossEntropyLoss: values and gradients."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import masked_loss
import reference
from masked_loss import CrossEntropyLoss, cross_entropy, loss_normalizer
from reference import FLOAT_TYPES, HALF_TYPES, assert_near, assert_positive_zero, assert_same_bits

REDUCTIONS = ("none", "mean", "sum", "sequence_mean")
TORCH_REDUCTIONS = ("none", "mean", "sum")

# (N, C): part of a tile of rows; whole tiles and a part, enough of them to be split over threads; one row at a time:
# with a tail after whole SIMD registers, split over threads, and in blocks of 2048 classes with a tail
SIZES = [(7, 3), (9000, 10), (5, 67), (300, 1000), (3, 9001)]


def loss_and_gradient(function, x, *arguments, upstream=None, **options):
    leaf = x.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


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
        dict(mask=torch.full((1, 40), 3)),
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
# With dim inside, tiles of 64 rows (the second: across sequences, and adjacent in memory) or, above 1024 classes, of 16;
# with dim last, tiles (40 classes), rows (400) and rows in blocks (3000)
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


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("by", MASKING)
@pytest.mark.parametrize("normalizer", [None, 0.0, 3.0])
def test_nothing_kept_is_zero(by, reduction, normalizer):
    if normalizer is not None and reduction in ("none", "sum"):
        pytest.skip("normalizer goes with the means")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sample_weight_gradient(reduction, dtype):
    x, target = torch.randn(3, 6, 4).to(dtype), torch.randint(6, (3, 4))
    mask = torch.rand(3, 4) < 0.7
    options = dict(reduction=reduction, weight=torch.rand(6), label_smoothing=0.1, z_loss=0.01)
    upstream = torch.randn(3, 4).to(dtype) if reduction == "none" else torch.tensor(-2.0).to(dtype)
    for shape in [(3, 4), (3, 1), (1, 4), (1, 1)]:
        weights = torch.rand(shape) + 0.2
        weights[0, 0] = 0.0  # differentiated, so that it is read
        ours, theirs = weights.requires_grad_(), weights.detach().double().requires_grad_()
        loss = cross_entropy(x, target, mask, sample_weight=ours, **options)
        expected = reference.cross_entropy(x, target, mask, sample_weight=theirs, **options)
        assert_near(loss, expected)
        (gradient,) = torch.autograd.grad(loss, ours, upstream)
        (wanted,) = torch.autograd.grad(expected, theirs, upstream.double())
        assert gradient.shape == shape
        # The mean of a sequence does not change with a weight that its positions share: 0, by cancellation.
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_zero_sample_weight_is_the_loss():
    x, target = torch.randn(4, 5), torch.randint(5, (4,))
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0], requires_grad=True)
    loss = cross_entropy(x, target, sample_weight=weights, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weights)
    assert_near(gradient, F.cross_entropy(x.double(), target, reduction="none"))


@pytest.mark.parametrize("by", ["mask", "ignore_index", "class_mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sample_weight_has_no_gradient_where_masked(reduction, by):
    x, target = torch.randn(4, 5), torch.randint(4, (4,))
    x[2] = torch.nan
    weights = torch.tensor([1.0, 2.0, torch.nan, 0.5], requires_grad=True)
    options = {"mask": None, "class_mask": None}
    if by == "mask":
        options["mask"] = torch.tensor([True, True, False, True])
    elif by == "class_mask":
        options["class_mask"] = torch.ones(4, 5, dtype=torch.bool).index_fill(0, torch.tensor(2), False)
    else:
        target[2] = -100
    loss = cross_entropy(x, target, sample_weight=weights, reduction=reduction, **options)
    upstream = torch.ones_like(loss)
    if reduction == "none":
        upstream[2] = torch.nan
    (gradient,) = torch.autograd.grad(loss, weights, upstream)
    assert gradient.isfinite().all()
    assert_positive_zero(gradient[2])


class TestLossNormalizer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
    def test_is_what_mean_divides_by(self, target_dtype, dtype):
        x, target = torch.randn(3, 7, 50, dtype=dtype), torch.randint(7, (3, 50)).to(target_dtype)
        options = dict(
            weight=torch.rand(7, dtype=dtype), sample_weight=torch.rand(3, 1, dtype=dtype) - 0.2, ignore_index=[3, 5]
        )
        mask = torch.rand(3, 50) < 0.5
        divisor = loss_normalizer(target, mask, **options)
        assert divisor.dtype == dtype
        assert_near(divisor, reference.loss_normalizer(target, 7, mask, **options))
        mean = cross_entropy(x, target, mask, **options)
        total = cross_entropy(x, target, mask, reduction="sum", **options)
        assert_near(mean, total.double() / divisor)
        assert_near(cross_entropy(x, target, mask, normalizer=divisor, **options), mean.double())

    @pytest.mark.parametrize("dim", [1, -1, 0])
    def test_class_mask_drops_rows_that_allow_nothing(self, dim):
        class_mask = torch.ones(3, 5, 4, dtype=torch.bool)
        class_mask[1, :, 2:] = False
        target = torch.zeros(3, 4, dtype=torch.long)
        target[1, 2:] = 99  # masked, so out of range is no error
        assert loss_normalizer(target, class_mask=class_mask.movedim(1, dim), dim=dim).item() == 10
        assert loss_normalizer(target, class_mask=torch.zeros(5, dtype=torch.bool)).item() == 0

    def test_counts_in_integers(self):
        target = torch.zeros(1, dtype=torch.uint8).expand(2**24 + 1, 1)  # one more than float32 counts to
        assert loss_normalizer(target, dim=-1).dtype == torch.float32
        assert loss_normalizer(target, torch.ones(1, 1, dtype=torch.bool)).item() in (2**24, 2**24 + 2)

    def test_has_no_gradient_and_counts_nothing_as_zero(self):
        weights = torch.ones(3, requires_grad=True)
        target = torch.tensor([0, 1, -100])
        divisor = loss_normalizer(target, sample_weight=weights)
        assert not divisor.requires_grad
        assert divisor.item() == 2
        assert_positive_zero(loss_normalizer(target, torch.zeros(3, dtype=torch.bool)))
        assert_positive_zero(loss_normalizer(torch.zeros(0, 3, dtype=torch.long)))
        assert loss_normalizer(torch.tensor(1)).item() == 1

    def test_micro_batches_add_up_to_the_batch(self):
        x, target = torch.randn(7, 11, dtype=torch.float64), torch.randint(11, (7,))
        mask = torch.tensor([1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
        weight = torch.rand(11, dtype=torch.float64)
        whole = loss_and_gradient(cross_entropy, x, target, mask, weight=weight)
        parts = [slice(0, 4), slice(4, 6), slice(6, 7)]  # 3, 0 and 1 kept
        total = sum(loss_normalizer(target[part], mask[part], weight=weight) for part in parts)
        leaf = x.clone().requires_grad_()
        losses = [cross_entropy(leaf[p], target[p], mask[p], weight=weight, normalizer=total) for p in parts]
        for loss in losses:
            loss.backward()
        assert_near(sum(losses), whole[0])
        assert_near(leaf.grad, whole[1])


class TestModule:
    def module(self, **options):
        options = dict(weight=torch.rand(5), ignore_index=[2, -100], label_smoothing=0.1, z_loss=0.01, **options)
        return CrossEntropyLoss(**options)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_is_the_function(self, reduction):
        module = self.module(reduction=reduction, class_mask=torch.tensor([True, True, True, False, True]), dim=-1)
        x, target = torch.randn(3, 4, 5), torch.randint(3, (3, 4))
        mask, sample_weight = torch.rand(3, 4) < 0.5, torch.rand(3, 1)
        names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "dim", "weight", "class_mask")
        options = {name: getattr(module, name) for name in names}
        expected = cross_entropy(x, target, mask, sample_weight=sample_weight, **options)
        assert_same_bits(module(x, target, mask, sample_weight), expected)
        if reduction == "mean":
            with_normalizer = module(x, target, mask, normalizer=4.0)
            assert_same_bits(with_normalizer, cross_entropy(x, target, mask, normalizer=4.0, **options))

    def test_weights_are_buffers(self):
        module = self.module(class_mask=torch.ones(5, dtype=torch.bool))
        assert set(module.state_dict()) == {"weight", "class_mask"}
        assert not list(module.parameters())
        assert module.double().weight.dtype == torch.float64
        assert module.class_mask.dtype == torch.bool
        assert CrossEntropyLoss().state_dict() == {}

    def test_repr_names_the_arguments(self):
        text = repr(self.module(reduction="sum", dim=-1))
        for part in ("[2, -100]", "'sum'", "0.1", "0.01", "dim=-1"):
            assert part in text

    @pytest.mark.parametrize("copied", ["deepcopy", "pickle", "save", "state_dict"])
    def test_copies_are_equal(self, copied):
        module = self.module(dim=-1)
        if copied == "deepcopy":
            other = copy.deepcopy(module)
        elif copied == "pickle":
            other = pickle.loads(pickle.dumps(module))
        elif copied == "save":
            buffer = io.BytesIO()
            torch.save(module, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        else:
            other = self.module(dim=-1)
            other.load_state_dict(module.state_dict())
        x, target = torch.randn(3, 5), torch.randint(5, (3,))
        assert_same_bits(module(x, target), other(x, target))


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


def test_divisors_are_the_same_on_any_number_of_threads(threads):
    target, weights = torch.randint(9, (1_000_000,)), torch.rand(1_000_000)
    divisors = []
    for count in (1, 2):
        with threads(count):
            divisors.append(loss_normalizer(target, sample_weight=weights))
    assert_same_bits(*divisors)
    assert_near(divisors[0], weights.double().sum())


def allocations_of(function, size):
    """How many blocks of at least `size` bytes a call asks of the CPU allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() >= size for event in events)


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


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [*HALF_TYPES, torch.float32, torch.float64], ids=str)
def test_autocast_returns_float32_as_torch(dtype, reduction):
    x, target = torch.randn(6, 40).to(dtype), torch.randint(40, (6,))
    upstream = torch.randn(6) if reduction == "none" else None
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(leaf, target, reduction=reduction)
        plain = cross_entropy(x, target, reduction=reduction)
        assert loss.dtype == plain.dtype == F.cross_entropy(x, target).dtype
    (gradient,) = torch.autograd.grad(loss, leaf, None if upstream is None else upstream.to(loss.dtype))
    exact = x.double().requires_grad_()
    expected = reference.cross_entropy(exact, target, reduction=reduction)
    assert_near(loss, expected)
    assert_near(plain, expected)
    assert gradient.dtype == dtype
    assert_near(gradient, torch.autograd.grad(expected, exact, None if upstream is None else upstream.double())[0])


class TestAutograd:
    def problem(self):
        x, target = torch.randn(4, 6, requires_grad=True), torch.randint(6, (4,))
        return x, target, torch.tensor([True, True, False, True])

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_backward_twice_on_a_kept_graph(self, reduction):
        x, target, mask = self.problem()
        loss = cross_entropy(x, target, mask, reduction=reduction).sum()
        first = torch.autograd.grad(3 * loss, x, retain_graph=True)[0]
        copy_of_first = first.clone()
        first.mul_(7)  # whoever receives a gradient may write into it
        second = torch.autograd.grad(3 * loss, x, retain_graph=True)[0]
        third = torch.autograd.grad(loss, x)[0]
        assert_same_bits(second, copy_of_first)
        assert_near(3 * third, copy_of_first)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_accumulated_gradients_do_not_alias_what_is_kept(self, reduction):
        x, target, mask = self.problem()
        loss = cross_entropy(x, target, mask, reduction=reduction).sum()
        loss.backward(retain_graph=True)
        once = x.grad.clone()
        x.grad.zero_()
        loss.backward(retain_graph=True)
        assert_same_bits(x.grad, once)
        loss.backward()
        assert_near(x.grad, 2 * once.double())

    def test_a_freed_graph_says_so(self):
        x, target, mask = self.problem()
        loss = cross_entropy(x, target, mask)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    @pytest.mark.parametrize("upstream", [3.0, -1.0, 0.0, 1e-30])
    def test_upstream_gradient(self, upstream):
        x, target, mask = self.problem()
        (gradient,) = torch.autograd.grad(cross_entropy(x, target, mask) * upstream, x)
        expected = loss_and_gradient(F.cross_entropy, x.detach()[mask].double(), target[mask])[1]
        assert_near(gradient[mask], expected * upstream)
        assert_positive_zero(gradient[~mask])

    def test_hooks_see_the_gradient(self):
        x, target, mask = self.problem()
        seen = []
        x.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
        loss = cross_entropy(x, target, mask)
        loss.register_hook(lambda g: 5 * g)
        loss.backward()
        expected = loss_and_gradient(cross_entropy, x, target, mask)[1]
        assert_near(seen[0], 5 * expected.double())
        assert_near(x.grad, 10 * expected.double())

    def test_a_changed_input_is_noticed(self):
        x, target, mask = self.problem()
        logits = x * 1
        loss = cross_entropy(logits, target, mask, reduction="none")
        logits.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_modes_without_a_graph(self, mode, reduction):
        x, target, mask = self.problem()
        with mode():
            loss = cross_entropy(x, target, mask, reduction=reduction)
        assert not loss.requires_grad
        assert_near(loss, cross_entropy(x, target, mask, reduction=reduction).double())

    def test_two_losses_of_one_input(self):
        x, target, mask = self.problem()
        both = cross_entropy(x, target, mask) + 2 * cross_entropy(x, target, ~mask, reduction="sum")
        (gradient,) = torch.autograd.grad(both, x)
        for part, reduction, factor in ((mask, "mean", 1), (~mask, "sum", 2)):
            expected = loss_and_gradient(F.cross_entropy, x.double()[part], target[part], reduction=reduction)[1]
            assert_near(gradient[part], factor * expected)

    def test_functions_take_tensor_subclasses(self):
        class Logged(torch.Tensor):
            pass

        x, target, mask = self.problem()
        loss = cross_entropy(x.detach().as_subclass(Logged), target, mask)
        assert isinstance(loss, Logged)
        assert_same_bits(loss.as_subclass(torch.Tensor), cross_entropy(x.detach(), target, mask))


def test_targets_and_masks_of_every_dtype_agree():
    x, target, mask = torch.randn(50, 9), torch.randint(9, (50,)), torch.rand(50) < 0.5
    expected = loss_and_gradient(cross_entropy, x, target, mask)
    masks = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    for target_dtype in (torch.int64, torch.int32, torch.uint8):
        for mask_dtype in masks:
            loss, gradient = loss_and_gradient(cross_entropy, x, target.to(target_dtype), mask.to(mask_dtype))
            assert_same_bits(loss, expected[0])
            assert_same_bits(gradient, expected[1])
    for values in (torch.tensor(-1), torch.tensor(2**40), torch.tensor(-(2**63))):
        assert_same_bits(masked_loss.cross_entropy(x, target, mask * values), expected[0])
