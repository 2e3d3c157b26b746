"""Many Python threads at once: each gets the numbers that one alone gets, and none waits for another's kernel."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import masked_loss
from grid import LEVELS, Call, build, covering_grid, run
from reference import assert_same_bits

THREADS = 8


def at_once(work):
    """What `work(thread)` returns in each of the threads, which start together."""
    barrier, device = threading.Barrier(THREADS), torch.get_default_device()

    def start(thread):
        # Each Python thread has its own number of threads for kernels, and its own default device.
        torch.set_num_threads(1 + thread % 2)
        with device if device.type != "cpu" else contextlib.nullcontext():
            barrier.wait()
            return work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(start, range(THREADS)))
    torch.set_num_threads(torch.get_num_threads())  # MKL's is shared
    return results


def assert_same_results(actual, expected):
    for ours, single in zip(actual, expected, strict=True):
        for a, b in zip(ours, single, strict=True):
            assert_same_bits(a, b)


def cross_entropy_results(call):
    loss, gradients = run(masked_loss.cross_entropy, call)
    return loss, *gradients


def test_cross_entropy_on_shared_tensors():
    calls = [build(case, seed) for seed, case in enumerate(covering_grid(LEVELS)[:40])]
    # And a batch that a call cuts into many pieces, which threads of its own share.
    x, target = torch.randn(500, 300, requires_grad=True), torch.randint(300, (500,))
    calls.append(Call(x, target, {"sample_weight": None}, None))
    expected = [cross_entropy_results(call) for call in calls]

    def work(thread):
        order = random.Random(thread).sample(range(len(calls)), len(calls))
        results = {i: cross_entropy_results(calls[i]) for i in order}
        return [results[i] for i in range(len(calls))]

    for results in at_once(work):
        assert_same_results(results, expected)


def test_gradients_that_add_up():
    def work(seed):
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        x = torch.randn(64, 33, generator=generator).requires_grad_()
        target = torch.randint(33, (64,), generator=generator)
        mask = masked_loss.sequence_mask(torch.randint(9, (8,), generator=generator), 8).reshape(64)
        value = torch.tensor(0.5, requires_grad=True)
        results = []
        for reduction in ("mean", "none", "sum") * 5:
            filled = masked_loss.masked_fill(x * 2, ~mask[:, None], value)
            masked_loss.masked_fill_(filled, torch.arange(33) == 5, value)
            normalizer = masked_loss.loss_normalizer(target, mask) if reduction == "mean" else None
            loss = masked_loss.cross_entropy(filled, target, mask, reduction=reduction, normalizer=normalizer).sum()
            loss.backward(retain_graph=True)
            loss.backward()
            results.append((loss.detach(), x.grad.clone(), value.grad.clone()))
        return results

    expected = [work(thread) for thread in range(THREADS)]
    for actual, single in zip(at_once(work), expected, strict=True):
        assert_same_results(actual, single)


FIRST_CALLS = """
import threading, masked_loss, torch
x, target = torch.randn(50, 70), torch.randint(70, (50,))
barrier, results = threading.Barrier(8), []
def work():
    leaf = x.clone().requires_grad_()
    barrier.wait()
    loss = masked_loss.cross_entropy(leaf, target, target > 20)
    loss.backward()
    results.append(torch.cat([leaf.grad.flatten(), loss.detach().reshape(1)]))
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
barrier = threading.Barrier(1)
work()
assert len(results) == 9 and results[-1][-1] > 1
assert all(result.equal(results[-1]) for result in results)
"""


def test_first_calls_of_a_process():
    # What is set up once (a kernel's instruction set, an op's handle) is set up under contention.
    result = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, encoding="utf-8", timeout=120)
    assert result.returncode == 0, result.stderr


FORKS = """
import os, signal, threading, time
import masked_loss, torch

torch.set_num_threads(1)
mask = torch.zeros(1, dtype=torch.bool)

def output(mebi):
    return masked_loss.masked_fill(torch.zeros(1).expand(mebi << 18), mask, 0.0)

def churn(k):
    while True:
        k = (k * 7 + 3) % 61
        output(8 + 3 * k)

children = {}

def reap(most):
    while len(children) > most:
        pid, status = os.wait()
        if status != 0:
            print(f"child {children[pid]} hung", flush=True)
            os._exit(1)
        del children[pid]

for seed in (1, 5, 11, 17):
    threading.Thread(target=churn, args=(seed,), daemon=True).start()
end = time.monotonic() + 6
for fork in range(400):
    pid = os.fork()
    if pid == 0:
        signal.alarm(6)  # kills a child that hangs
        output(4)
        os._exit(0)
    children[pid] = fork
    reap(3)
    if time.monotonic() > end:
        break
reap(0)
print(fork, "forks", flush=True)
os._exit(0)  # and no thread is waited for
"""


def test_forks_while_threads_free_outputs():
    """As DataLoader's workers are: a fork must not copy the memory of outputs locked."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output


def ticks_during(call):
    """How often another Python thread has its turn while `call` runs; it asks for one every millisecond.

    Python itself would make a thread give up the GIL after the switch interval: that is made longer than any call.
    """
    ticks, stop = 0, False

    def count():
        nonlocal ticks
        while not stop:
            ticks += 1
            time.sleep(0.001)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    sys.setswitchinterval(1000)
    try:
        thread.start()
        before = ticks
        call()
        return ticks - before
    finally:
        stop = True
        sys.setswitchinterval(interval)
        thread.join()


# Each takes from a tenth of a second to one: expanded tensors take no memory.
def long_rows():
    return torch.randn(1, 5000).expand(60_000, 5000), torch.zeros(1, dtype=torch.int64).expand(60_000)


def long_cross_entropy():
    x, target = long_rows()
    return lambda: masked_loss.cross_entropy(x, target)


def long_op():
    x, target = long_rows()
    return lambda: torch.ops.masked_loss.cross_entropy(x, target)


def long_backward():
    leaf = torch.randn(8000, 4000, requires_grad=True)
    loss = masked_loss.cross_entropy(leaf, torch.zeros(8000, dtype=torch.int64), reduction="none")
    upstream = torch.rand(8000)
    return lambda: torch.autograd.grad(loss, leaf, upstream, retain_graph=True)


def long_loss_normalizer():
    target = torch.ones(1, dtype=torch.uint8).expand(3 * 10**7)
    return lambda: masked_loss.loss_normalizer(target)


def long_check_targets():
    target = torch.ones(1, dtype=torch.uint8).expand(3 * 10**7)
    return lambda: masked_loss.check_targets(target, 2)


def long_masked_fill():
    x, mask = torch.zeros(1, dtype=torch.uint8).expand(10**4, 10**4), torch.rand(10**4, 1) < 0.5
    return lambda: masked_loss.masked_fill(x, mask, 1)


def long_masked_fill_():
    x, mask = torch.zeros(10**4, 10**4, dtype=torch.uint8), torch.rand(1, 10**4) < 0.5
    return lambda: [masked_loss.masked_fill_(x, mask, 1) for _ in range(10)]


def long_mse_loss():
    x, target = torch.randn(2, 2 * 10**7)
    return lambda: [masked_loss.mse_loss(x, target) for _ in range(5)]


def long_softmax():
    x = torch.randn(1000, 20_000)
    return lambda: [masked_loss.softmax(x) for _ in range(5)]


def long_masked_mean():
    x = torch.randn(1000, 20_000)
    return lambda: [masked_loss.masked_mean(x, None) for _ in range(10)]


@pytest.mark.parametrize(
    "long",
    [
        long_cross_entropy,
        long_op,
        long_backward,
        long_loss_normalizer,
        long_check_targets,
        long_masked_fill,
        long_masked_fill_,
        long_mse_loss,
        long_softmax,
        long_masked_mean,
    ],
)
def test_other_threads_run_during_a_call(long, threads):
    with threads(1):
        call = long()
        # A busy machine may leave the other thread without its turn, but not each time.
        assert any(ticks_during(call) >= 5 for _ in range(5))


def test_that_test():
    """A call that keeps the GIL shows no tick."""
    assert ticks_during(lambda: sum(range(3_000_000))) == 0
