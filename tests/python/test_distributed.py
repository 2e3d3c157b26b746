"""Data parallel over two processes, with gradient accumulation: the gradient of the single big batch."""

import contextlib
import doctest
import json
import math
import os
import re
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import masked_loss
import reference
from masked_loss import cross_entropy, distributed, loss_normalizer, sequence_mask
from masked_loss.distributed import global_normalizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp_global_normalizer.py"
C, T, H = 11, 8, 6

# The lengths of the sequences in each process's micro-batches: unequal numbers of micro-batches, sequences and tokens.
LENGTHS = {
    "unequal": [[[8, 7, 8], [5, 1]], [[1], [2, 1, 1], [2]]],
    "a process that keeps nothing": [[[3, 8], [1]], [[0, 0], [0]]],
    "nothing kept": [[[0], [0]], [[0, 0]]],
}
MICRO_BATCHES = 3  # at most
KINDS = [f"{way}{loss}" for way in ("DDP", "FSDP2", "summed") for loss in ("", " linear")]


def class_weight():
    return torch.linspace(0.5, 2, C, dtype=torch.float64)


OPTIONS = {
    "plain": lambda tokens: {},
    # The normalizer counts class weights and sample weights then.
    "weights": lambda tokens: {
        "weight": class_weight(),
        "sample_weight": 0.1 + (tokens % 5).double(),
        "ignore_index": [3, 4],
        "label_smoothing": 0.1,
    },
}


def problems():
    return [(lengths, options) for lengths in LENGTHS for options in OPTIONS]


def micro_batches(lengths, process):
    """Tokens `[B, T]`, targets `[B, T]` and masks `[B, T]`."""
    generator = torch.Generator().manual_seed(process)
    for sizes in LENGTHS[lengths][process]:
        tokens, target = torch.randint(C, (2, len(sizes), T), generator=generator)
        yield tokens, target, sequence_mask(torch.tensor(sizes), T)


class Logits(nn.Sequential):
    """A model whose loss is that of its logits."""

    def forward(self, tokens, target, mask, **options):
        return cross_entropy(super().forward(tokens), target, mask, dim=-1, **options)


class Hidden(nn.Sequential):
    """The same without logits: the head's weights are those of the forward pass, whole and here."""

    def forward(self, tokens, target, mask, **options):
        embedding, head = self
        options |= dict(linear_bias=head.bias, chunk_size=5)
        return masked_loss.linear_cross_entropy(embedding(tokens), head.weight, target, mask, **options)


def model(of=Logits):
    torch.manual_seed(0)
    return of(nn.Embedding(C, H), nn.Linear(H, C)).double()


def gradients(module):
    return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)().clone() for p in module.parameters()]


def wrapped(kind):
    """The model in parallel, and what says before each micro-batch whether gradients are exchanged after it."""
    of = Hidden if "linear" in kind else Logits
    if "DDP" in kind:
        parallel = nn.parallel.DistributedDataParallel(model(of))
        return parallel, lambda last: contextlib.nullcontext() if last else parallel.no_sync()
    if "FSDP2" in kind:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        sharded = model(of)
        if of is Logits:  # a module of its own has its weights while it is called, and not when others ask for them
            dist.fsdp.fully_shard(sharded[1], mesh=mesh)
        dist.fsdp.fully_shard(sharded, mesh=mesh)
        return sharded, lambda last: contextlib.nullcontext(sharded.set_requires_gradient_sync(last))
    return model(of), lambda last: contextlib.nullcontext()


def gradient_of_a_step(kind, process, lengths, options, naive=False):
    parallel, exchange = wrapped(kind)
    batches = list(micro_batches(lengths, process))
    if "FSDP2" in kind:
        # Its processes gather the parameters for each micro-batch: who has fewer goes on with nothing kept.
        tokens, target, mask = batches[0]
        batches += [(tokens, target, mask & False)] * (MICRO_BATCHES - len(batches))
    count = 0.0
    for tokens, target, mask in batches:
        counted = {name: value for name, value in OPTIONS[options](tokens).items() if name != "label_smoothing"}
        count += loss_normalizer(target, mask, **counted)
    normalizer = None if naive else global_normalizer(count, averaged_gradients="summed" not in kind)
    for i, (tokens, target, mask) in enumerate(batches):
        with exchange(i == len(batches) - 1):
            arguments = OPTIONS[options](tokens)
            loss = parallel(tokens, target, mask, normalizer=normalizer, **arguments)
            (loss / len(batches) if naive else loss).backward()
    if "summed" in kind:
        for parameter in parallel.parameters():
            dist.all_reduce(parameter.grad)
    return gradients(parallel)


def counts(process):
    """What global_normalizer returns for groups of all sizes."""
    count = torch.tensor(3.0 + process, requires_grad=True)
    groups = [dist.new_group([0]), dist.new_group([1]), dist.new_group([0, 1])]
    results = {
        "float": global_normalizer(count),
        "sum": global_normalizer(count, averaged_gradients=False),
        "double": global_normalizer(count.double()),
        "half": global_normalizer(count.bfloat16()),
        "long": global_normalizer(torch.tensor(2**40 + process)),
        "int32": global_normalizer(torch.tensor(2**31 - 1, dtype=torch.int32), averaged_gradients=False),
        "number": global_normalizer(3 + process),
        "zero": global_normalizer(torch.tensor(0.0)),
        "alone": global_normalizer(count, groups[process]),
        "group": global_normalizer(count, groups[2]),
    }
    for other in (groups[1 - process], dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(ValueError, match="expected group to hold this process"):
            global_normalizer(count, other)
        with pytest.raises(ValueError, match="expected group to hold this process"):
            global_normalizer(3, other)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(count, x):
        return global_normalizer(count) * x

    results["compiled"] = compiled(count.detach(), torch.tensor(2.0))
    results["count afterwards"] = count.detach()
    assert not any(result.requires_grad for result in results.values())
    return results


def work(process, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # nothing writes into it
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-point", rank=process, world_size=2, timeout=timedelta(minutes=5)
    )
    results = {"counts": counts(process)}
    for kind in KINDS:
        for problem in problems():
            results[(kind, *problem)] = gradient_of_a_step(kind, process, *problem)
    for kind in ("DDP", "FSDP2"):
        results["naive", kind] = gradient_of_a_step(kind, process, "unequal", "plain", naive=True)
    dist.destroy_process_group()
    torch.save(results, f"{folder}/{process}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes returns."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{process}.pt") for process in range(2)]


def gradient_of_the_big_batch(lengths, options):
    batches = [batch for process in range(2) for batch in micro_batches(lengths, process)]
    tokens, target, mask = (torch.cat(parts) for parts in zip(*batches, strict=True))
    single = model()
    logits = nn.Sequential.forward(single, tokens)
    reference.cross_entropy(logits, target, mask, dim=-1, **OPTIONS[options](tokens)).backward()
    return gradients(single)


def difference(ours, expected):
    largest = max(each.abs().max() for each in expected)
    return max((a - b).abs().max() for a, b in zip(ours, expected, strict=True)) / largest


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "options"), problems())
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_big_batch(results, kind, lengths, options):
    expected = gradient_of_the_big_batch(lengths, options)
    for process in results:
        ours = process[kind, lengths, options]
        if lengths == "nothing kept":
            assert all(each.eq(0).all() for each in ours)
        else:
            assert difference(ours, expected) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_mean_of_means_is_another_gradient(results, kind):
    expected = gradient_of_the_big_batch("unequal", "plain")
    for process in results:
        assert difference(process["naive", kind], expected) > 0.1


@pytest.mark.slow
def test_counts_of_two_processes(results):
    expected = {
        "float": torch.tensor(3.5),
        "sum": torch.tensor(7.0),
        "double": torch.tensor(3.5).double(),
        "half": torch.tensor(3.5),
        "long": torch.tensor(2.0**40 + 0.5, dtype=torch.float64),
        "int32": torch.tensor(2.0**32 - 2, dtype=torch.float64),
        "number": torch.tensor(3.5).double(),
        "zero": torch.tensor(0.0),
        "group": torch.tensor(3.5),
        "compiled": torch.tensor(7.0),
    }
    for process, all_results in enumerate(results):
        alone = torch.tensor(3.0 + process)
        wanted = expected | {"alone": alone, "count afterwards": alone}
        torch.testing.assert_close(all_results["counts"], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("averaged_gradients", [True, False])
@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        (5, torch.float64),
        (5.0, torch.float64),
        (torch.tensor(5), torch.float64),
        (torch.tensor(5, dtype=torch.uint8), torch.float64),
        (torch.tensor(5.0), torch.float32),
        (torch.tensor(5.0, dtype=torch.float64), torch.float64),
        (torch.tensor(5.0, dtype=torch.bfloat16), torch.float32),
        (torch.tensor(5.0, requires_grad=True), torch.float32),
    ],
)
def test_single_process(count, dtype, averaged_gradients):
    result = global_normalizer(count, averaged_gradients=averaged_gradients)
    reference.assert_same_bits(result, torch.tensor(5.0, dtype=dtype))
    assert not result.requires_grad
    result.zero_()  # never the count itself
    assert count == 5


def test_default_and_own_device():
    with torch.device("meta"):
        assert global_normalizer(5).device.type == "meta"
        assert global_normalizer(torch.tensor(5.0, device="cpu")).device.type == "cpu"
    assert global_normalizer(torch.tensor(5, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        ("5", TypeError, "expected count to be a number or a 0-d tensor, got str"),
        (None, TypeError, "expected count to be a number or a 0-d tensor, got NoneType"),
        (torch.ones(1), RuntimeError, "expected count to be a number or a 0-d tensor, got shape [1]"),
        (torch.ones(2, 3), RuntimeError, "expected count to be a number or a 0-d tensor, got shape [2, 3]"),
        (torch.tensor(True), TypeError, "expected count of a real dtype, got torch.bool"),
        (torch.tensor(1j), TypeError, "expected count of a real dtype, got torch.complex64"),
    ],
)
def test_errors(count, error, message):
    with pytest.raises(error, match=re.escape(f"global_normalizer: {message}")):
        global_normalizer(count)


def test_docstring():
    assert doctest.testmod(distributed).attempted > 0
    assert doctest.testmod(distributed).failed == 0


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_dtensor_is_refused_with_a_way_out(one_process):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    x, target, mask = torch.randn(4, C), torch.arange(4), torch.tensor([True, True, False, True])

    def spread(tensor):
        return distribute_tensor(tensor, mesh, [Replicate()])

    calls = {
        "cross_entropy: expected input": lambda: cross_entropy(spread(x), target, mask),
        "cross_entropy: expected target": lambda: cross_entropy(x, spread(target), mask),
        "linear_cross_entropy: expected linear_weight": lambda: masked_loss.linear_cross_entropy(
            torch.randn(4, H), spread(torch.randn(C, H)), target, mask
        ),
        "mse_loss: expected mask": lambda: masked_loss.mse_loss(x[:, 0], x[:, 0], spread(mask)),
        "softmax: expected input": lambda: masked_loss.softmax(spread(x)),
        "masked_mean: expected input": lambda: masked_loss.masked_mean(spread(x)),
        "masked_fill: expected input": lambda: masked_loss.masked_fill(spread(x), mask[:, None], 0.0),
        "mask_from_ids: expected tokens": lambda: masked_loss.mask_from_ids(spread(target), 0),
    }
    for beginning, call in calls.items():
        name = beginning.split()[-1]
        message = rf"^{beginning} to be a plain Tensor, got DTensor; pass {name}\.full_tensor\(\)"
        with pytest.raises(TypeError, match=message):
            call()
    reference.assert_same_bits(cross_entropy(spread(x).full_tensor(), target, mask), cross_entropy(x, target, mask))


# As torchrun starts it, with one process: accumulation alone. Port 0 takes one that is free.
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "test",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}


@pytest.mark.slow
@pytest.mark.parametrize(("environment", "processes"), [({}, 2), (TORCHRUN, 1)])
def test_example(environment, processes):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    run = subprocess.run([sys.executable, EXAMPLE], capture_output=True, encoding="utf-8", timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    (kept,) = re.findall(r"Tokens kept: (.*)", run.stdout)
    assert len(json.loads(kept)) == processes
    (ours,) = re.findall(r"global_normalizer +(\S+)", run.stdout)
    (naive,) = re.findall(r"mean of means +(\S+)", run.stdout)
    assert float(ours) < 4e-6
    assert float(naive) > 0.1
    losses = [float(loss) for loss in re.findall(r"Step +\d+: loss (\S+)", run.stdout)]
    assert losses[0] == pytest.approx(math.log(40), rel=0.1)  # 40 tokens, nothing learnt yet
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1
