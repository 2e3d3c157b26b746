"""Trains a small model to predict the class probabilities of a large one, on a padded batch.

`cross_entropy` takes class probabilities as targets. In the padding they are NaN, which is never read.
"""

import argparse

import torch
from torch import Tensor, nn

import masked_loss

CLASSES, FEATURES = 12, 8


def batch(count: int, longest: int) -> tuple[Tensor, Tensor]:
    """Features `[N, T, F]`, and which positions are no padding."""
    mask = masked_loss.sequence_mask(torch.randint(1, longest + 1, (count,)), longest)  # True = keep
    return torch.randn(count, longest, FEATURES), mask


def network(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    teacher, student, temperature = network(hidden=128), network(hidden=16), 0.25
    x, mask = batch(count=64, longest=12)
    with torch.no_grad():
        probabilities = (teacher(x) / temperature).softmax(-1)
        probabilities[~mask] = torch.nan  # nobody asked the teacher there
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    criterion = masked_loss.CrossEntropyLoss(dim=-1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = criterion(student(x), probabilities, mask)
        loss.backward()
        optimizer.step()
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step:3d}: loss {loss.item():.4f}")

    # Masked equals absent: compare with the unmasked positions, flattened.
    logits = student(x)
    masked = criterion(logits, probabilities, mask)
    alone = nn.functional.cross_entropy(logits[mask], probabilities[mask])
    (gradient,) = torch.autograd.grad(masked, logits)
    print(f"Loss: {masked.item():.6f} masked, {alone.item():.6f} of the {int(mask.sum())} kept positions alone")
    print(f"Difference: {abs(masked - alone).item():.1e}")
    print(f"Gradients that are not 0 in the padding: {gradient[~mask].count_nonzero().item()}")
    least = torch.special.entr(probabilities[mask]).sum(-1).mean()
    print(f"Divergence from the teacher: {(masked - least).item():.4f} nats")


if __name__ == "__main__":
    main()
