"""What the ops should return, the slow and obvious way in float64, and how closely they must return it."""

import torch
import torch.nn.functional as F

HALF_TYPES = (torch.bfloat16, torch.float16)
FLOAT_TYPES = (torch.float32, torch.float64, *HALF_TYPES)

# Relative: half a unit in the last place of the result, twice (loss or gradient is rounded, then scaled).
# Absolute: what the accumulation type (float32 for half types) loses to cancellation, in units of the largest element.
RELATIVE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
ABSOLUTE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
# The smallest float16 is 2^-24, so that is how far apart two of its subnormals are.
SMALLEST = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}


def assert_near(actual, expected, dtype=None, largest=0.0):
    """`actual`, as the `dtype` computed it, is the float64 `expected` within the tolerances above.

    `largest` is that of the terms which cancel, where they leave less than that.
    """
    dtype = dtype or actual.dtype
    expected = expected.detach().double()
    finite = expected[expected.isfinite()]
    largest = max(largest, finite.abs().max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(
        actual.detach().double(),
        expected,
        rtol=RELATIVE[dtype],
        atol=ABSOLUTE[dtype] * largest + SMALLEST[dtype],
        equal_nan=True,
    )


def allocations_of(function, size):
    """How many blocks of at least `size` bytes a call asks of the CPU allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() >= size for event in events)


def bits(tensor):
    """The bit patterns of a tensor: NaN equals NaN, and +0.0 is not -0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    return real.contiguous().view(integers[real.element_size()])


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = (bits(actual) != bits(expected)).sum().item()
    assert different == 0, f"{different} elements differ: {actual.detach()} and {expected.detach()}"


def assert_positive_zero(tensor):
    assert bits(tensor).eq(0).all(), f"not exactly +0.0: {tensor.detach()}"


def loss_and_gradient(function, x, *arguments, upstream=None, **options):
    """What a loss returns, and the gradient of its first argument for an upstream one, by default 1."""
    leaf = x.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss) if upstream is None else upstream)[0]


def is_kept(mask):
    """Whatever is not 0 keeps. A bool mask may have bytes beyond 0 and 1, of which torch's own ops make no promise."""
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask) != 0


def row_shape(input, dim):
    class_dim = 0 if input.dim() == 1 else dim % input.dim()
    return input.shape[:class_dim] + input.shape[class_dim + 1 :]


def to_rows(input, dim):
    """`[rows, C]` in float64, in the order of the targets."""
    class_dim = 0 if input.dim() == 1 else dim
    # movedim and not transpose: the order of the other dimensions is target's.
    return input.double().movedim(class_dim, -1).reshape(row_shape(input, dim).numel(), input.shape[class_dim])


def _row_loss(logits, y, allowed, weight, label_smoothing, z_loss):
    """The docstring's formula for one row, over its allowed classes; y is a class, or the probability of each."""
    lse = logits[allowed].logsumexp(0)
    costs = weight[allowed] * (lse - logits[allowed])
    smooth = costs.sum() / allowed.sum()
    if y.is_floating_point():
        squared = z_loss * lse**2 + (torch.inf if (y[~allowed] > 0).any() else 0.0)
        return (1 - label_smoothing) * (y[allowed] * costs).sum() + label_smoothing * smooth + squared
    at_target = logits[y] if allowed[y] else torch.full_like(lse, -torch.inf)
    nll = weight[y] * (lse - at_target)
    return (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * weight[y] * lse**2


def _torch_losses(rows, targets, weight, label_smoothing, z_loss):
    """The same where every class is allowed, from torch's own cross entropy."""
    plain = F.cross_entropy(rows, targets, weight, reduction="none", label_smoothing=label_smoothing)
    of_target = 1.0 if targets.is_floating_point() else weight[targets]
    return plain + z_loss * of_target * rows.logsumexp(-1) ** 2


def _spread(tensor, shape):
    return None if tensor is None else tensor.expand(shape).reshape(-1)


def _divide(total, divisor):
    """A divisor of exactly 0 gives 0, with a zero gradient."""
    return total * 0.0 if divisor == 0 else total / divisor


def _reduce(losses, weights, sequences, reduction, normalizer):
    """Kept losses and the weights that 'mean' counts, both `[kept]`; sequences `[kept]` tells whose they are."""
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return _divide(losses.sum(), weights.sum() if normalizer is None else normalizer)
    nonempty = sequences.unique()
    means = [_divide(losses[sequences == s].sum(), weights[sequences == s].sum()) for s in nonempty]
    total = torch.stack(means).sum() if means else losses.sum()
    return _divide(total, max(len(nonempty), 1) if normalizer is None else normalizer)


def _reduce_rows(losses, weights, keep, shape, sample_weight, reduction, normalizer):
    """The same of rows of which `keep` says which have a loss."""
    if sample_weight is not None:
        s = _spread(sample_weight.double(), shape)[keep]
        losses, weights = losses * s, weights * s
    if reduction == "none":
        everywhere = torch.zeros(len(keep), dtype=torch.float64)
        return everywhere.masked_scatter(keep, losses).reshape(shape)
    sequence_of = torch.arange(len(keep)) // max(shape[1:].numel() if shape else 1, 1)
    return _reduce(losses, weights, sequence_of[keep], reduction, normalizer)


def kept_rows(input, target, mask=None, sample_weight=None, class_mask=None, ignore_index=-100, dim=1):
    """Which rows count, `[rows]`, and the classes each allows, `[rows, C]`."""
    rows, shape = to_rows(input, dim), row_shape(input, dim)
    ids = [ignore_index] if isinstance(ignore_index, int) else ignore_index
    keep = torch.ones(len(rows), dtype=torch.bool)
    if not target.is_floating_point():
        keep = torch.tensor([y not in ids for y in target.reshape(-1).tolist()], dtype=torch.bool)
    if mask is not None:
        keep &= _spread(is_kept(mask), shape)
    if sample_weight is not None and not sample_weight.requires_grad:
        keep &= _spread(sample_weight, shape) != 0
    allowed = torch.ones(rows.shape, dtype=torch.bool)
    if class_mask is not None:
        if class_mask.dim() == input.dim() > 1:
            class_mask = class_mask.expand(input.shape).movedim(dim, -1).reshape(rows.shape)
        allowed &= is_kept(class_mask)
    return keep & allowed.any(-1), allowed


def cross_entropy(
    input,
    target,
    mask=None,
    *,
    weight=None,
    sample_weight=None,
    class_mask=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    normalizer=None,
    dim=1,
    dtype=None,  # of ours; this one is in float64
):
    """`masked_loss.cross_entropy` in float64: select the kept rows, then reduce them."""
    rows, shape = to_rows(input, dim), row_shape(input, dim)
    probabilities = target.is_floating_point()
    targets = to_rows(target, dim) if probabilities else target.reshape(-1).long()
    keep, allowed = kept_rows(input, target, mask, sample_weight, class_mask, ignore_index, dim)
    weight = rows.new_ones(rows.shape[1]) if weight is None else weight.double()
    rows, targets, allowed = rows[keep], targets[keep], allowed[keep]
    if class_mask is None:
        losses = _torch_losses(rows, targets, weight, label_smoothing, z_loss)
    else:
        each = zip(rows, targets, allowed, strict=True)
        per_row = [_row_loss(x, y, a, weight, label_smoothing, z_loss) for x, y, a in each]
        losses = torch.stack(per_row) if per_row else rows.sum(-1)
    weights = losses.new_ones(len(losses)) if probabilities else weight[targets]
    return _reduce_rows(losses, weights, keep, shape, sample_weight, reduction, normalizer)


def linear_logits(input, linear_weight, linear_bias=None, softcap=None, temperature=1.0):
    logits = F.linear(input.double(), linear_weight.double(), None if linear_bias is None else linear_bias.double())
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


LOGITS = ("linear_bias", "softcap", "temperature")


def linear_cross_entropy(input, linear_weight, target, mask=None, *, chunk_size=None, max_kept=None, **options):
    """`masked_loss.linear_cross_entropy` of logits that are whole, in float64."""
    logits = linear_logits(input, linear_weight, **{name: options.pop(name) for name in LOGITS if name in options})
    return cross_entropy(logits, target, mask, **options, dim=-1)


def linear_log_prob(input, linear_weight, index, mask=None, **options):
    return -linear_cross_entropy(input, linear_weight, index, mask, ignore_index=[], reduction="none", **options)


def linear_entropy(input, linear_weight, index, mask=None, *, class_mask=None, chunk_size=None, **options):
    logits = linear_logits(input, linear_weight, **options)
    if class_mask is not None:
        logits = logits.masked_fill(~is_kept(class_mask), -torch.inf)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return entropy if mask is None else torch.where(is_kept(mask), entropy, 0.0)


def divergences(log_p, log_q, kind="forward", beta=0.5):
    """Of rows of log-probabilities, by the definitions."""

    def kl(log_a, log_b):
        a = log_a.exp()
        return torch.where(a == 0, 0.0, a * (torch.where(a == 0, 0.0, log_a) - torch.where(a == 0, 0.0, log_b))).sum(-1)

    if kind == "forward" or (kind == "jsd" and beta == 0):
        return kl(log_q, log_p)
    if kind == "reverse" or beta == 1:
        return kl(log_p, log_q)
    mixture = beta * log_q.exp() + (1 - beta) * log_p.exp()
    log_m = torch.where(mixture == 0, 1.0, mixture).log()
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def linear_kl(
    input,
    linear_weight,
    target_input,
    target_linear_weight,
    mask=None,
    *,
    linear_bias=None,
    target_linear_bias=None,
    class_mask=None,
    softcap=None,
    temperature=1.0,
    chunk_size=None,
    max_kept=None,
    kind="forward",
    beta=0.5,
    sample_weight=None,
    reduction="mean",
    normalizer=None,
    dtype=None,
):
    """`masked_loss.linear_kl` of logits that are whole, in float64."""
    logits = linear_logits(input, linear_weight, linear_bias, softcap, temperature)
    targets = linear_logits(target_input, target_linear_weight, target_linear_bias, softcap, temperature)
    shape = input.shape[:-1]
    index = torch.zeros(shape, dtype=torch.int64)
    keep, allowed = kept_rows(logits, index, mask, sample_weight, class_mask, [], -1)

    def log_probabilities(logits):
        return to_rows(logits, -1)[keep].masked_fill(~allowed[keep], -torch.inf).log_softmax(-1)

    losses = divergences(log_probabilities(logits), log_probabilities(targets), kind, beta)
    return _reduce_rows(losses, torch.ones_like(losses), keep, shape, sample_weight, reduction, normalizer)


def loss_normalizer(target, classes, mask=None, *, weight=None, sample_weight=None, ignore_index=-100):
    """The divisor of 'mean', from the kept rows one by one."""
    logits = torch.zeros(target.numel(), classes)
    flat_mask, flat_sample_weight = _spread(mask, target.shape), _spread(sample_weight, target.shape)
    keep, _ = kept_rows(logits, target.reshape(-1), flat_mask, flat_sample_weight, None, ignore_index)
    each = torch.ones(target.numel(), dtype=torch.float64)
    if weight is not None:
        each = each * weight.double()[target.reshape(-1).long().where(keep, 0)]
    if sample_weight is not None:
        each = each * flat_sample_weight.double()
    return each[keep].sum()


def _focal(input, target, alpha=0.25, gamma=2.0, reduction="none"):
    p = torch.sigmoid(input)
    wrong = 1 - (target * p + (1 - target) * (1 - p))
    losses = F.binary_cross_entropy_with_logits(input, target, reduction=reduction) * wrong**gamma
    return losses * (alpha * target + (1 - alpha) * (1 - target)) if alpha >= 0 else losses


# Elementwise losses: torch's, and whether its mean divides by `weight`.
POINTWISE = {
    "mse_loss": (F.mse_loss, True),
    "l1_loss": (F.l1_loss, True),
    "smooth_l1_loss": (F.smooth_l1_loss, False),
    "huber_loss": (F.huber_loss, False),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, False),
    "binary_cross_entropy": (F.binary_cross_entropy, False),
    "kl_div": (F.kl_div, False),
    "poisson_nll_loss": (F.poisson_nll_loss, False),
    "gaussian_nll_loss": (F.gaussian_nll_loss, False),
    "sigmoid_focal_loss": (_focal, False),
}


def kept_elements(shape, mask=None, sample_weight=None):
    keep = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        keep = keep & is_kept(mask)
    if sample_weight is not None and not sample_weight.requires_grad:
        keep = keep & (sample_weight != 0)
    return keep


def pointwise(
    name,
    input,
    target,
    mask=None,
    *,
    weight=None,
    sample_weight=None,
    reduction="mean",
    normalizer=None,
    dtype=None,  # of ours; this one is in float64
    **options,
):
    """An elementwise loss in float64: torch's of `input[mask]`, `target[mask]`, then reduced."""
    losses_of, counts_weight = POINTWISE[name]
    shape = torch.broadcast_shapes(input.shape, target.shape)
    keep = kept_elements(shape, mask, sample_weight)

    def kept(tensor):
        return tensor.double().expand(shape)[keep]

    if isinstance(options.get("var"), torch.Tensor) and options["var"].dim() == len(shape) - 1:
        options["var"] = options["var"].unsqueeze(-1)
    options = {n: kept(value) if isinstance(value, torch.Tensor) else value for n, value in options.items()}
    losses = losses_of(kept(input), kept(target), **options, reduction="none")
    weights = torch.ones_like(losses)
    if weight is not None:
        losses, weights = losses * kept(weight), weights * kept(weight) if counts_weight else weights
    if sample_weight is not None:
        losses, weights = losses * kept(sample_weight), weights * kept(sample_weight)
    if reduction == "none":
        return torch.zeros(shape, dtype=torch.float64).masked_scatter(keep, losses)
    sequences = torch.zeros(shape, dtype=torch.int64)
    if shape:
        sequences += torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    sequences = sequences[keep]
    if reduction == "batchmean":
        return _divide(losses.sum(), len(sequences.unique()) if normalizer is None else normalizer)
    return _reduce(losses, weights, sequences, reduction, normalizer)
