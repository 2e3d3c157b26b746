"""Trains a multi-label classifier with labels of which most are unknown, neither 1 nor 0.

Treating an unknown label as 0 teaches the model that unlabelled classes are absent.
"""

import argparse

import torch
from torch import Tensor, nn

import masked_loss

UNKNOWN = -1.0


def partly_labelled(count: int, features: int, labels: int, known: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features `[N, F]`, all labels `[N, L]`, and those of them that somebody has looked for."""
    x = torch.randn(count, features)
    truth = (x @ torch.randn(features, labels) > 0).float()
    return x, truth, truth.where(torch.rand(count, labels) < known, UNKNOWN)


def train(x: Tensor, labels: Tensor, mask: Tensor | None, steps: int) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(x.size(1), 64), nn.ReLU(), nn.Linear(64, labels.size(1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        masked_loss.binary_cross_entropy_with_logits(model(x), labels, mask).backward()
        optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    x, truth, labels = partly_labelled(count=1000, features=20, labels=10, known=0.2)
    known = labels != UNKNOWN  # True = keep
    print(f"{known.float().mean():.0%} of {labels.numel()} labels are known")
    for name, given, mask in (("unknown as 0", labels.clamp(min=0), None), ("unknown masked", labels, known)):
        model = train(x, given, mask, steps)
        right = ((model(x) > 0) == truth.bool())[~known].float().mean()
        print(f"{name:>14}: {right:.1%} of the unknown labels predicted right")

    # Masked equals absent: only the known labels, flattened.
    logits = model(x)
    masked = masked_loss.binary_cross_entropy_with_logits(logits, labels, known)
    alone = nn.functional.binary_cross_entropy_with_logits(logits[known], labels[known])
    (gradient,) = torch.autograd.grad(masked, logits)
    print(f"Loss: {masked.item():.6f} masked, {alone.item():.6f} of the known labels alone")
    print(f"Difference: {abs(masked.item() - alone.item()):.1e}")
    print(f"Gradients that are not 0 at unknown labels: {gradient[~known].count_nonzero().item()}")


if __name__ == "__main__":
    main()
