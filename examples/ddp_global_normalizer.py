"""DistributedDataParallel and gradient accumulation on padded sequences, with the gradient of one large batch.

If micro-batches or processes have different numbers of tokens, the mean of their means is not the mean over the batch:
tokens of small micro-batches get too much weight. Dividing every loss by one global count is correct:
``normalizer=global_normalizer(count)``. This script prints the difference of both from the gradient of the whole batch,
then trains. It starts two processes, or joins those that torchrun has started:

    python examples/ddp_global_normalizer.py
    torchrun --nproc-per-node 3 examples/ddp_global_normalizer.py
"""

import contextlib
import tempfile
from typing import NamedTuple

import torch
import torch.distributed as dist

# DistributedDataParallel imports this, whose default arguments then keep the process group for good, and gloo's threads
# with it: one that lets go of a tensor while Python ends aborts the process. Imported before there is a group, none is.
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

import masked_loss
from masked_loss.distributed import global_normalizer

VOCABULARY, HIDDEN = 40, 32
STEPS = 60


class Batch(NamedTuple):
    inputs: Tensor  # [B, T]
    targets: Tensor  # [B, T]
    mask: Tensor  # [B, T], True = a token, False = padding


def pad(sequences: list[Tensor]) -> Batch:
    lengths = torch.tensor([len(sequence) - 1 for sequence in sequences])
    padded = pad_sequence(sequences, batch_first=True)  # [B, T + 1]
    return Batch(padded[:, :-1], padded[:, 1:], masked_loss.sequence_mask(lengths))


def local_sequences(rank: int, step: int) -> list[list[Tensor]]:
    """What process `rank` trains on in a step: long sequences in two micro-batches, or short ones in three."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    sizes, longest = ([4, 2], 24) if rank % 2 == 0 else ([1, 2, 3], 6)

    def sequence() -> Tensor:
        length = int(torch.randint(2, longest, [], generator=generator))
        # What is to be learnt: each token follows from the one before it.
        tokens = [int(torch.randint(VOCABULARY, [], generator=generator))]
        for _ in range(length):
            tokens.append((7 * tokens[-1] + 3) % VOCABULARY)
        return torch.tensor(tokens)

    return [[sequence() for _ in range(size)] for size in sizes]


def backward(model: DistributedDataParallel, batches: list[Batch], normalizer: Tensor | None) -> Tensor:
    """Accumulates the gradients of a step and returns this process's loss. No normalizer: the mean of means."""
    model.zero_grad()
    total = torch.zeros([])
    for i, batch in enumerate(batches):
        # Processes exchange gradients once a step, in the backward pass of their last micro-batch.
        with contextlib.nullcontext() if i == len(batches) - 1 else model.no_sync():
            logits = model(batch.inputs)  # [B, T, V]
            loss = masked_loss.cross_entropy(logits, batch.targets, batch.mask, normalizer=normalizer, dim=-1)
            if normalizer is None:
                loss = loss / len(batches)
            loss.backward()
        total += loss.detach()
    return total


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def train() -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, VOCABULARY))
    model = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    report = print if rank == 0 else lambda *_: None

    for step in range(STEPS):
        batches = [pad(sequences) for sequences in local_sequences(rank, step)]
        # Before the first backward pass, count the tokens of this process in the step, then those of all processes.
        count = sum(masked_loss.loss_normalizer(batch.targets, batch.mask) for batch in batches)
        normalizer = global_normalizer(count)

        if step == 0:
            everything = [local_sequences(r, step) for r in range(processes)]
            big = pad([s for local in everything for sequences in local for s in sequences])
            masked_loss.cross_entropy(module(big.inputs), big.targets, big.mask, dim=-1).backward()
            expected = gradients(module)
            report(f"Tokens kept: {[[sum(len(s) - 1 for s in micro) for micro in local] for local in everything]}")
            report("Gradient, largest difference to the whole batch's, relative to its largest element:")
            for name, divisor in (("global_normalizer", normalizer), ("mean of means", None)):
                backward(model, batches, divisor)
                difference = (gradients(module) - expected).abs().max() / expected.abs().max()
                report(f"  {name:<20}{difference:.1e}")

        loss = backward(model, batches, normalizer)
        optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            # Averaged over processes, as gradients are, the losses too are those of the whole batch.
            dist.all_reduce(loss)
            report(f"Step {step:>2}: loss {loss / processes:.4f}")


def start(rank: int, meeting_point: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        train()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(start, (f"{folder}/meeting-point",), nprocs=2)
