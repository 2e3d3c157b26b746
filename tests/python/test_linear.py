"""The linear functions: what the harness does not look at."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

import masked_loss
import reference
from reference import assert_near, assert_positive_zero, assert_same_bits

N, H, C = 23, 8, 37
CHUNKS = (1, 7, None)  # every row or class by itself, several that do not fit, all at once
OPTIONS = {
    "plain": {},
    "softcap": dict(softcap=2.0, temperature=0.7),
    "temperature": dict(temperature=0.5),
    "smoothing": dict(label_smoothing=0.1, z_loss=0.01, weight=torch.rand(C) + 0.5),
    "classes": dict(class_mask=torch.arange(C) % 5 != 4, label_smoothing=0.2),
}


def problem(dtype=torch.float64, rows=(N,), hidden=H, classes=C, scale=1.0, wanted=("input", "linear_weight")):
    arguments = dict(
        input=scale * torch.randn(*rows, hidden),
        linear_weight=torch.randn(classes, hidden),
        target=torch.randint(max(classes - 2, 1), rows) // 5 * 5,
    )
    tensors = {n: t.to(dtype).requires_grad_(n in wanted) if t.is_floating_point() else t for n, t in arguments.items()}
    return tensors, torch.rand(rows) < 0.6


def gradients(result, arguments, upstream=None):
    leaves = [tensor for tensor in arguments.values() if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
    return torch.autograd.grad(result, leaves, upstream)


@contextlib.contextmanager
def products():
    """The matrix products of a call, each as its number of multiplications, in a list that is filled at the end."""
    sizes = []
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        yield sizes
    for event in sorted(profile.function_events, key=lambda event: event.time_range.start):
        if event.name in ("aten::mm", "aten::addmm"):
            (n, k), (_, m) = event.input_shapes[0:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            sizes.append(n * k * m)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_is_the_loss_of_whole_logits(dtype, chunk_size, options, reduction):
    arguments, mask = problem(dtype)
    loss = masked_loss.linear_cross_entropy(
        **arguments, mask=mask, chunk_size=chunk_size, reduction=reduction, **options
    )
    exact = {n: t.detach().double().requires_grad_() if t.requires_grad else t for n, t in arguments.items()}
    expected = reference.linear_cross_entropy(**exact, mask=mask, reduction=reduction, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide
    assert_near(loss, expected, largest=10.0)
    upstream = torch.randn_like(loss)
    ours, theirs = gradients(loss, arguments, upstream), gradients(expected, exact, upstream.double())
    for gradient, wanted in zip(ours, theirs, strict=True):
        assert gradient.dtype == dtype
        # Logits' gradients are rounded once more on their way to the products.
        largest = wanted.abs().max()
        allowed = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        torch.testing.assert_close(gradient.double(), wanted, rtol=0.0, atol=(allowed * largest).item())


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_rows_are_not_read(chunk_size, reduction):
    arguments, mask = problem(torch.float32)
    poisoned = dict(arguments, input=arguments["input"].detach().masked_fill(~mask[:, None], torch.nan))
    poisoned["input"].requires_grad_()
    poisoned["target"] = arguments["target"].masked_fill(~mask, torch.iinfo(torch.int64).min)
    results = []
    for given in (arguments, poisoned):
        loss = masked_loss.linear_cross_entropy(**given, mask=mask, chunk_size=chunk_size, reduction=reduction)
        upstream = torch.ones_like(loss)
        if reduction == "none":
            upstream[~mask] = torch.nan
        results.append((loss, *gradients(loss, given, upstream)))
    for clean, dirty in zip(*results, strict=True):
        assert_same_bits(dirty, clean)
    assert_positive_zero(results[1][1][~mask])
    if reduction == "none":
        assert_positive_zero(results[1][0][~mask])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("rows", "hidden", "classes", "kept"),
    [((N,), H, C, False), ((0,), H, C, True), ((N,), H, 0, False), ((N,), 0, C, True), ((), H, C, True)],
    ids=["nothing kept", "no rows", "no classes", "no hidden size", "one row"],
)
def test_empty(rows, hidden, classes, kept, reduction):
    """Attached to the graph, with zero gradients where nothing is kept."""
    arguments, _ = problem(torch.float32, rows, hidden, classes)
    mask = torch.full(rows, kept)
    loss = masked_loss.linear_cross_entropy(**arguments, mask=mask, reduction=reduction)
    logits = F.linear(arguments["input"], arguments["linear_weight"])
    expected = masked_loss.cross_entropy(logits, arguments["target"], mask, dim=-1, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    ones = torch.ones_like(loss)
    for ours, theirs in zip(gradients(loss, arguments, ones), gradients(expected, arguments, ones), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("wanted", "count"),
    [((), 1), (("input",), 2), (("linear_weight",), 2), (("input", "linear_weight"), 3)],
    ids=["no gradient", "frozen head", "frozen input", "both"],
)
def test_only_the_products_that_are_needed(wanted, count):
    arguments, mask = problem(torch.float32, wanted=wanted)
    one = int(mask.sum()) * H * C
    with products() as of_loss:
        loss = masked_loss.linear_cross_entropy(**arguments, mask=mask)
        if wanted:
            gradients(loss, arguments)
    assert sum(of_loss) == count * one
    # What has one gradient for each row makes the logits again.
    with products() as of_rows:
        losses = masked_loss.linear_cross_entropy(**arguments, mask=mask, reduction="none")
        if wanted:
            gradients(losses, arguments, torch.ones_like(losses))
    assert sum(of_rows) == (count + bool(wanted)) * one


def test_no_grad_computes_no_gradient():
    arguments, mask = problem(torch.float32)
    with torch.no_grad(), products() as sizes:
        masked_loss.linear_cross_entropy(**arguments, mask=mask)
    assert sizes == [int(mask.sum()) * H * C]


def test_chunks_are_balanced():
    arguments, _ = problem(torch.float32, rows=(22,))
    with products() as sizes:
        masked_loss.linear_cross_entropy(**arguments, chunk_size=20)
    assert sizes[::3] == [11 * H * C] * 2
    # The budget's: 1100 rows of so many classes are two chunks of multiples of 128.
    arguments, _ = problem(torch.float32, rows=(1100,), hidden=1, classes=130_000, wanted=())
    with products() as sizes:
        masked_loss.linear_cross_entropy(**arguments)
    assert sizes == [640 * 130_000, 460 * 130_000]


def test_max_kept():
    arguments, mask = problem(torch.float32)
    kept = int(mask.sum())
    loss = masked_loss.linear_cross_entropy(**arguments, mask=mask, max_kept=kept)
    assert_same_bits(loss, masked_loss.linear_cross_entropy(**arguments, mask=mask))
    with pytest.raises(ValueError, match=f"expected max_kept of at least .*, {kept}, got {kept - 1}"):
        masked_loss.linear_cross_entropy(**arguments, mask=mask, max_kept=kept - 1)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(half, chunk_size, reduction):
    """Operands are rounded as by torch's linear; what is made of them is not."""
    arguments, mask = problem(torch.float32)
    with torch.autocast("cpu", dtype=half):
        loss = masked_loss.linear_cross_entropy(**arguments, mask=mask, chunk_size=chunk_size, reduction=reduction)
    rounded = {n: t.detach().to(half).requires_grad_() if t.requires_grad else t for n, t in arguments.items()}
    expected = masked_loss.linear_cross_entropy(**rounded, mask=mask, chunk_size=chunk_size, reduction=reduction)
    assert loss.dtype == torch.float32
    assert_same_bits(loss, expected)
    upstream = torch.randn_like(loss)
    ours, theirs = gradients(loss, arguments, upstream), gradients(expected, rounded, upstream)
    for gradient, wanted in zip(ours, theirs, strict=True):
        assert_same_bits(gradient, wanted.float())
    # The composite, of a transform.
    with torch.autocast("cpu", dtype=half):
        composed = torch.func.vjp(
            lambda x: masked_loss.linear_cross_entropy(**dict(arguments, input=x), mask=mask, reduction=reduction),
            arguments["input"].detach(),
        )[0]
    torch.testing.assert_close(composed, loss)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_log_prob_and_entropy(chunk_size):
    arguments, mask = problem()
    arguments["index"] = arguments.pop("target")
    log_prob, entropy = masked_loss.linear_log_prob_and_entropy(**arguments, mask=mask, chunk_size=chunk_size)
    assert_same_bits(log_prob, masked_loss.linear_log_prob(**arguments, mask=mask, chunk_size=chunk_size))
    log_p = F.linear(arguments["input"], arguments["linear_weight"]).log_softmax(-1)
    expected = [
        log_p.gather(-1, arguments["index"][:, None]).squeeze(-1).where(mask, 0.0),
        -(log_p.exp() * log_p).sum(-1).where(mask, 0.0),
    ]
    torch.testing.assert_close([log_prob, entropy], expected)
    assert_positive_zero(log_prob[~mask])
    assert_positive_zero(entropy[~mask])
    upstream = [torch.randn(N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)]
    leaves = [arguments["input"], arguments["linear_weight"]]
    ours = torch.autograd.grad([log_prob, entropy], leaves, upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves, upstream))


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_logits_of_minus_infinity(chunk_size):
    """A class of no probability adds 0 to the entropy, and has no gradient."""
    arguments, _ = problem()
    arguments["index"] = arguments.pop("target")
    bias = torch.zeros(C, dtype=torch.float64).index_fill(0, torch.tensor([1, 36]), -torch.inf)
    allowed = bias == 0
    results = []
    for options in (dict(linear_bias=bias), dict(class_mask=allowed)):
        both = masked_loss.linear_log_prob_and_entropy(**arguments, **options, chunk_size=chunk_size)
        results.append((*both, *gradients(sum(both).sum(), arguments)))
    torch.testing.assert_close(*results)
    assert all(tensor.isfinite().all() for tensor in results[0])


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_that_is_not_allowed(chunk_size, reduction):
    arguments, _ = problem()
    allowed = torch.ones(C, dtype=torch.bool)
    allowed[arguments["target"][0]] = False
    loss = masked_loss.linear_cross_entropy(**arguments, class_mask=allowed, chunk_size=chunk_size, reduction=reduction)
    assert loss.max() == torch.inf
    assert all(g.isfinite().all() for g in gradients(loss, arguments, torch.ones_like(loss)))


def test_masks_of_every_shape_of_the_logits():
    arguments, mask = problem(rows=(4, 5))
    logits = F.linear(arguments["input"], arguments["linear_weight"])
    for shape in ((4, 5, C), (1, 5, C), (4, 1, C), (4, 5, 1), (1, 1, C)):
        allowed = torch.rand(shape) < 0.7
        allowed[..., ::5] = True
        for reduction in ("mean", "none"):
            options = dict(class_mask=allowed, reduction=reduction, label_smoothing=0.1)
            loss = masked_loss.linear_cross_entropy(**arguments, mask=mask, chunk_size=3, **options)
            expected = masked_loss.cross_entropy(logits, arguments["target"], mask, dim=-1, **options)
            torch.testing.assert_close(loss, expected)
            ones = torch.ones_like(loss)
            torch.testing.assert_close(
                torch.autograd.grad(loss, list(arguments.values())[:2], ones),
                torch.autograd.grad(expected, list(arguments.values())[:2], ones, retain_graph=True),
            )


def errors(dtype, scale, chunk_size, rows=512, hidden=64, classes=2000):
    """Of a loss and of the head's gradient, relative to float64: ours, logits in float32, torch's in chunks."""
    arguments, _ = problem(dtype, (rows,), hidden, classes, scale / hidden**0.5)
    arguments["linear_weight"] = (arguments["linear_weight"].detach() * 1.0).requires_grad_()
    x, w, y = arguments.values()

    def exact(x, w):
        return F.cross_entropy(F.linear(x, w), y)

    def of(function, *leaves):
        loss = function(*leaves)
        return loss.detach().double(), torch.autograd.grad(loss, leaves[1])[0].double()

    wide = of(exact, *(t.detach().double().requires_grad_() for t in (x, w)))
    found = [
        of(lambda x, w: masked_loss.linear_cross_entropy(x, w, y, chunk_size=chunk_size), x, w),
        of(lambda x, w: exact(x.float(), w.float()), x, w),
    ]
    if hasattr(F, "linear_cross_entropy"):
        found.append(of(lambda x, w: F.linear_cross_entropy(x, w, y), x, w))
    return [[((a - b).norm() / b.norm()).item() for a, b in zip(each, wide, strict=True)] for each in found]


@pytest.mark.parametrize("scale", [5, 160, 640])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accuracy(dtype, scale):
    """As exact as logits in float32, whatever their size and the number of chunks."""
    torch.manual_seed(0)
    (ours, of_ours), (wide, of_wide), *chunked = errors(dtype, scale, chunk_size=64)
    rounding = torch.finfo(dtype).eps / 2
    assert ours <= max(wide, 1e-6) * 1.5
    assert of_ours <= of_wide + rounding
    for _, of_torch in chunked:
        assert of_ours <= of_torch / 2


KINDS = [dict(kind="forward"), dict(kind="reverse"), *(dict(kind="jsd", beta=beta) for beta in (0.0, 0.1, 0.5, 1.0))]
OPERANDS = ("input", "linear_weight", "target_input", "target_linear_weight", "linear_bias", "target_linear_bias")


def pair_of_heads(dtype=torch.float64, rows=(N,), classes=C, wanted=OPERANDS):
    """The arguments of linear_kl, and a mask."""
    shapes = ((*rows, H), (classes, H), (*rows, H + 3), (classes, H + 3), (classes,), (classes,))
    tensors = {
        name: torch.randn(shape).to(dtype).requires_grad_(name in wanted)
        for name, shape in zip(OPERANDS, shapes, strict=True)
    }
    return tensors, torch.rand(rows) < 0.6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("options", [{}, dict(softcap=2.0, temperature=0.7), dict(class_mask=torch.arange(C) % 5 != 4)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_is_the_divergence_of_whole_logits(dtype, chunk_size, options, kind):
    arguments, mask = pair_of_heads(dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in arguments.items()}
    for reduction in ("mean", "none"):
        given = dict(kind, **options, mask=mask, reduction=reduction)
        ours = masked_loss.linear_kl(**arguments, **given, chunk_size=chunk_size)
        expected = reference.linear_kl(**exact, **given)
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(ours, expected, largest=10.0)
        upstream = torch.randn_like(ours)
        wanted = gradients(expected, exact, upstream.double())
        for gradient, exactly in zip(gradients(ours, arguments, upstream), wanted, strict=True):
            assert gradient.dtype == dtype
            allowed = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
            atol = allowed[dtype] * exactly.abs().max().item()
            torch.testing.assert_close(gradient.double(), exactly, rtol=0.0, atol=atol)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_divergences_are_not_negative(kind):
    """Rounding included: 0 between equals, and between neighbours what float64 finds."""
    x, w = 4 * torch.randn(64, H), torch.randn(1000, H)
    equal = masked_loss.linear_kl(x, w, x, w, **kind, reduction="none")
    assert_positive_zero(equal)
    neighbour = x + 1e-4 * torch.randn_like(x)
    near = masked_loss.linear_kl(x, w, neighbour, w, **kind, reduction="none")
    assert (near >= 0).all()
    exact = reference.linear_kl(x.double(), w.double(), neighbour.double(), w.double(), **kind, reduction="none")
    torch.testing.assert_close(near.double(), exact, rtol=0.02, atol=2e-9)  # the logits are rounded by 2e-6


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_class_that_only_one_head_has(kind):
    """It has no probability by the second of the two: inf. By the first: it adds 0."""
    arguments, _ = pair_of_heads()
    for name in ("linear_bias", "target_linear_bias"):
        changed = dict(arguments, **{name: arguments[name].detach().index_fill(0, torch.tensor([2]), -torch.inf)})
        ours = masked_loss.linear_kl(**changed, **kind, reduction="none")
        expected = reference.linear_kl(**changed, **kind, reduction="none")
        torch.testing.assert_close(ours, expected)
        by_one = {"forward": "linear_bias", "reverse": "target_linear_bias", 0.0: "linear_bias"}
        by_one[1.0] = "target_linear_bias"
        assert ours.isinf().all() == (name == by_one.get(kind.get("beta", kind["kind"])))
        if ours.isfinite().all():
            leaves = [changed["input"], changed["target_input"]]
            assert all(g.isfinite().all() for g in torch.autograd.grad(ours.sum(), leaves))
    both = {name: arguments[name].detach().index_fill(0, torch.tensor([2]), -torch.inf) for name in OPERANDS[4:]}
    ours = masked_loss.linear_kl(**dict(arguments, **both), **kind)
    torch.testing.assert_close(ours, masked_loss.linear_kl(**arguments, **kind, class_mask=torch.arange(C) != 2))


def test_numbers_of_other_libraries():
    """Worked out by their formulas: TRL's and Liger's generalized Jensen-Shannon divergence, torchtune's forward KL."""
    x, w = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    arguments = dict(input=x, linear_weight=w, target_input=2 * x, target_linear_weight=w)
    student, teacher = x.matmul(w.T).log_softmax(-1), (2 * x).matmul(w.T).log_softmax(-1)
    for beta in (0.1, 0.5):  # log-sum-exp of the weighted log-probabilities, and F.kl_div of its result
        mixture = torch.logsumexp(torch.stack([student + math.log1p(-beta), teacher + math.log(beta)]), 0)
        kl_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True).sum(-1)
        kl_student = F.kl_div(mixture, student, reduction="none", log_target=True).sum(-1)
        expected = (beta * kl_teacher + (1 - beta) * kl_student).mean()
        torch.testing.assert_close(masked_loss.linear_kl(**arguments, kind="jsd", beta=beta), expected)
    cross_entropy = -(teacher.exp() * student).sum(-1).mean()
    entropy = -(teacher.exp() * teacher).sum(-1).mean()
    torch.testing.assert_close(masked_loss.linear_kl(**arguments), cross_entropy - entropy)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_rows_of_neither_head_are_read(chunk_size, reduction):
    arguments, mask = pair_of_heads(torch.float32)
    poisoned = dict(arguments)
    for name in ("input", "target_input"):
        poisoned[name] = arguments[name].detach().masked_fill(~mask[:, None], torch.nan).requires_grad_()
    results = []
    for given in (arguments, poisoned):
        loss = masked_loss.linear_kl(**given, mask=mask, chunk_size=chunk_size, reduction=reduction, kind="jsd")
        upstream = torch.ones_like(loss)
        if reduction == "none":
            upstream[~mask] = torch.nan
        results.append((loss, *gradients(loss, given, upstream)))
    for clean, dirty in zip(*results, strict=True):
        assert_same_bits(dirty, clean)
    assert_positive_zero(results[1][1][~mask])
    assert_positive_zero(results[1][3][~mask])


@pytest.mark.parametrize(
    ("rows", "classes", "kept"),
    [((N,), C, False), ((0,), C, True), ((N,), 0, True), ((), C, True)],
    ids=["nothing kept", "no rows", "no classes", "one row"],
)
def test_empty_pairs(rows, classes, kept):
    arguments, _ = pair_of_heads(torch.float32, rows, classes)
    for reduction in ("mean", "none"):
        loss = masked_loss.linear_kl(**arguments, mask=torch.full(rows, kept), reduction=reduction)
        found = gradients(loss, arguments, torch.ones_like(loss))
        if not kept or 0 in (*rows, classes):
            assert_positive_zero(loss)
            for gradient in found:
                assert_positive_zero(gradient)
        else:
            assert loss > 0


@pytest.mark.parametrize(
    ("wanted", "count"),
    [((), 2), (("input",), 3), (("input", "linear_weight"), 4), (("target_linear_weight",), 3), (OPERANDS, 6)],
    ids=["no gradient", "frozen heads", "frozen teacher", "frozen student", "all"],
)
def test_only_the_products_of_a_divergence_that_are_needed(wanted, count):
    rows, hidden = 16, 8
    arguments = {
        "input": torch.randn(rows, hidden),
        "linear_weight": torch.randn(C, hidden),
        "target_input": torch.randn(rows, hidden),
        "target_linear_weight": torch.randn(C, hidden),
    }
    for name, tensor in arguments.items():
        tensor.requires_grad_(name in wanted)
    with products() as sizes:
        loss = masked_loss.linear_kl(**arguments, chunk_size=5)
        if wanted:
            gradients(loss, arguments)
    assert sum(sizes) == count * rows * hidden * C


@pytest.mark.parametrize("module", [masked_loss.LinearCrossEntropyLoss])
def test_the_module_holds_no_head(module):
    assert not list(module().parameters())
    assert not module().state_dict()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_that_of_a_chunk(reduction, kernels):
    """Beyond the gradients: of 128 MiB of logits 16 are held at once."""
    if kernels != "cpu":
        pytest.skip("of the CPU's memory")
    rows, hidden, classes, chunk = 2048, 32, 16384, 256
    masked_loss.empty_cache()

    def step(rows):
        arguments, _ = problem(torch.float32, (rows,), hidden, classes)
        loss = masked_loss.linear_cross_entropy(**arguments, chunk_size=chunk, reduction=reduction)
        gradients(loss, arguments, torch.ones_like(loss))

    step(16)  # what is made once
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak becomes what there is
    except OSError:
        pytest.skip("the peak of the memory is not known here")

    def status(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    before = status("VmHWM")
    step(rows)
    operands = 2 * 4 * (rows + classes) * hidden  # and their gradients
    assert status("VmHWM") - before < 1.05 * 4 * chunk * classes + operands + (8 << 20)


@pytest.mark.parametrize(
    ("rows", "classes"),
    [(70, 37), (30, 300), (9, 5000), (3, 70_000)],
    ids=["rows as lanes", "one block", "three blocks", "parts of rows"],
)
@pytest.mark.parametrize("chunk_size", [2, None])
def test_every_traversal(rows, classes, chunk_size):
    arguments, mask = problem(rows=(rows,), classes=classes)
    options = dict(label_smoothing=0.1, softcap=4.0, class_mask=torch.rand(rows, classes) < 0.9)
    options["class_mask"][:, ::5] = True  # the targets
    for reduction in ("mean", "none"):
        given = dict(arguments, mask=mask, reduction=reduction)
        loss = masked_loss.linear_cross_entropy(**given, **options, chunk_size=chunk_size)
        expected = reference.linear_cross_entropy(**given, **options)
        upstream = torch.randn_like(loss)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, arguments, upstream), gradients(expected, arguments, upstream))
    arguments["index"] = arguments.pop("target")
    both = masked_loss.linear_log_prob_and_entropy(**arguments, chunk_size=chunk_size)
    expected = (reference.linear_log_prob(**arguments), reference.linear_entropy(**arguments))
    torch.testing.assert_close(both, expected)
    ours, theirs = (gradients(a + 0.5 * b, arguments, torch.ones_like(a)) for a, b in (both, expected))
    torch.testing.assert_close(ours, theirs)
