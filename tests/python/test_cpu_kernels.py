"""The paths of the CPU's cross entropy, which sizes and strides choose: right numbers, the same bits on any threads."""

import pytest
import torch
import torch.nn.functional as F

import masked_loss
from reference import assert_same_bits, loss_and_gradient

SHAPES = [
    (300, 7),  # classes transposed into lanes, a part of the last tile
    (40, 64),  # the most classes of that path
    (70, 65),  # row by row, a block that is no multiple of a vector
    (6, 5000),  # row by row, three blocks
    (601, 4001),  # stored past the cache, rows that begin anywhere in a cache line
    (3, 40000),  # threads share each row
    (5, 21, 40, 30),  # classes apart in memory, exponentials kept
    (2, 700, 600),  # the same, in fewer lanes
    (2, 2100, 600),  # classes apart in memory, exponentials made twice; past the cache
    (3, 9, 5),  # lanes of several parts
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("targets", ["indices", "probabilities"])
def test_paths(shape, reduction, dtype, targets, threads):
    classes, rows = shape[1], (shape[0], *shape[2:])
    x, mask = torch.randn(shape).to(dtype), torch.rand(rows) < 0.7
    target = torch.randint(classes, rows) if targets == "indices" else torch.randn(shape).softmax(1).to(dtype)
    options = {"reduction": reduction, "weight": torch.rand(classes), "label_smoothing": 0.1}
    poisoned = x.masked_fill(~mask.unsqueeze(1), torch.nan)
    results = []
    for count in (1, 3):
        with threads(count):
            results.append(loss_and_gradient(masked_loss.cross_entropy, poisoned, target, mask, **options))
    loss, gradient = results[0]
    for a, b in zip(results[0], results[1], strict=True):
        assert_same_bits(a, b)
    options["weight"] = options["weight"].double()
    if targets == "indices":
        expected = loss_and_gradient(F.cross_entropy, x.double(), torch.where(mask, target, -100), **options)
    else:  # of which torch's mean divides by all rows
        kept = mask.unsqueeze(1)
        x, target = x.double().where(kept, 0), target.double().where(kept, 0)

        def by_torch(x):
            losses = F.cross_entropy(x, target, **{**options, "reduction": "none"}).where(mask, 0)
            return losses if reduction == "none" else losses.sum() / mask.sum()

        expected = loss_and_gradient(by_torch, x)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(loss.double(), expected[0], rtol=10 * tolerance, atol=tolerance)
    scale = expected[1].abs().max().item()
    torch.testing.assert_close(gradient.double(), expected[1], rtol=10 * tolerance, atol=tolerance * scale)
    assert (gradient.movedim(1, -1)[~mask] == 0).all()


@pytest.mark.parametrize("shape", [(3, 40000), (2, 70, 600), (2, 2100, 600), (300, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_paths_of_softmax(name, shape, dtype, masked, threads):
    # Threads share each row; classes apart in memory, kept and visited twice; classes contiguous, and few.
    x = torch.randn(shape).to(dtype)
    mask = torch.rand(shape) < 0.7 if masked else torch.ones(shape, dtype=torch.bool)
    function, poisoned = getattr(masked_loss, name), x.masked_fill(~mask, torch.nan)
    upstream = torch.randn(function(x, dim=1).shape).to(dtype)

    def ours():
        leaf = poisoned.clone().requires_grad_()
        result = function(leaf, mask if masked else None, 1)
        return result.detach(), torch.autograd.grad(result, leaf, upstream)[0]

    results = []
    for count in (1, 3):
        with threads(count):
            results.append(ours())
    for a, b in zip(results[0], results[1], strict=True):
        assert_same_bits(a, b)
    leaf = x.double().masked_fill(~mask, -torch.inf).requires_grad_()
    expected = getattr(torch, name)(leaf, 1)
    kept = mask if expected.shape == x.shape else torch.ones_like(expected, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(expected, leaf, upstream.double().where(kept, 0))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(results[0][0].double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(results[0][1].double(), gradient.where(mask, 0), rtol=tolerance, atol=tolerance)
    assert (results[0][1][~mask] == 0).all()


@pytest.mark.parametrize("shape", [(1, 7), (1100, 1)], ids=["of classes", "of rows"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_masks_of_several_tiles(name, shape, dim):
    # Rows are lanes; what masks the same classes of all of them is read once.
    x, mask = torch.randn(1100, 7), torch.rand(shape) < 0.6
    whole = mask.expand(1100, 7)
    if dim == 0:
        x, mask, whole = (tensor.t().contiguous() for tensor in (x, mask, whole))
    function = getattr(masked_loss, name)
    assert_same_bits(function(x, mask, dim), function(x, whole.contiguous(), dim))


@pytest.mark.parametrize("dim", [0, 1])
def test_class_masks_of_several_tiles(dim):
    x, target, mask = torch.randn(1100, 7), torch.randint(7, (1100,)), torch.rand(7) < 0.6
    whole = mask.expand(1100, 7).contiguous()
    if dim == 0:
        x, whole = x.t().contiguous(), whole.t().contiguous()
    results = [
        loss_and_gradient(masked_loss.cross_entropy, x, target, None, class_mask=of, reduction="none", dim=dim)
        for of in (mask, whole)
    ]
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_memory_of_large_outputs_is_reused():
    x = torch.randn(2011, 1013)  # a size that no other test leaves a block of
    first = masked_loss.masked_fill(x, x > 0, 0.0)
    address, kept = first.data_ptr(), first.clone()
    second = masked_loss.masked_fill(x, x > 1, 0.0)
    assert second.data_ptr() != address
    assert first.equal(kept)
    del first
    third = masked_loss.masked_fill(x[:2000], x[:2000] > 0, 0.0)
    assert third.data_ptr() == address
    assert third.equal(kept[:2000])
    third.resize_(3000, 1013)
    assert third[:2000].equal(kept[:2000])
