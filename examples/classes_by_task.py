"""Trains one classifier on several tasks. Each task has some of the classes, and a class mask excludes the others.

Without a class mask the model gives probability to classes that an example cannot have.
"""

import argparse

import torch
from torch import Tensor, nn

import masked_loss

TASKS = [[0, 1, 2, 3], [4, 5], [2, 3, 6, 7, 8]]  # the classes of each one; some belong to two
CLASSES = 9


def examples(count: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features `[N, F]`, the task of each example, and its class: the best of those its task has."""
    x, task = torch.randn(count, features), torch.randint(len(TASKS), (count,))
    scores = x @ torch.randn(features, CLASSES)
    return x, task, scores.masked_fill(~allowed(task), -torch.inf).argmax(-1)


def allowed(task: Tensor) -> Tensor:
    """True where a class exists for the example's task, `[N, C]`."""
    table = torch.zeros(len(TASKS), CLASSES, dtype=torch.bool)
    for number, classes in enumerate(TASKS):
        table[number, classes] = True
    return table[task]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    x, task, label = examples(count=900, features=16)
    class_mask = allowed(task)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        logits = model(x)
        loss = masked_loss.cross_entropy(logits, label, class_mask=class_mask, label_smoothing=0.02)
        loss.backward()
        optimizer.step()
        if step % 30 == 0 or step == steps - 1:
            print(f"step {step:3d}: loss {loss.item():.4f}")

    # Masked equals absent: each task by itself, with a head of its own classes alone.
    logits = model(x)
    joint = masked_loss.cross_entropy(logits, label, class_mask=class_mask)
    total = torch.zeros(())
    for number, classes in enumerate(TASKS):
        rows, own = task == number, torch.tensor(classes)
        of_own = torch.searchsorted(own, label[rows])
        total += nn.functional.cross_entropy(logits[rows][:, own], of_own, reduction="sum")
    alone = total / len(label)
    (gradient,) = torch.autograd.grad(joint, logits)
    print(f"Loss: {joint.item():.6f} of all tasks at once, {alone.item():.6f} task by task")
    print(f"Difference: {abs(joint.item() - alone.item()):.1e}")
    print(f"Gradients that are not 0 at classes a task has not: {gradient[~class_mask].count_nonzero().item()}")
    right = (logits.masked_fill(~class_mask, -torch.inf).argmax(-1) == label).float().mean()
    print(f"Classified right: {right:.1%}")


if __name__ == "__main__":
    main()
