"""Scripts a module that uses ``torch.ops.masked_loss``, saves it, loads it again and runs it.

``examples/cpp/run_torchscript.cpp`` runs the same file without Python.
"""

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import masked_loss  # noqa: F401 – registers the ops


class SequenceLoss(nn.Module):
    """The mean loss over the tokens of a padded batch."""

    def forward(self, logits: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.ops.masked_loss.sequence_mask(lengths, logits.size(1))
        return torch.ops.masked_loss.cross_entropy(logits, target, mask, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=Path("out/sequence_loss.pt"), help="where to save it")
    path = parser.parse_args().path
    path.parent.mkdir(parents=True, exist_ok=True)

    warnings.filterwarnings("ignore", message="`?torch.jit", category=DeprecationWarning)
    torch.jit.script(SequenceLoss()).save(path)
    module = torch.jit.load(path)

    logits = torch.arange(2 * 4 * 5, dtype=torch.float64).sin().view(2, 4, 5).requires_grad_()
    target = torch.arange(2 * 4).remainder(5).view(2, 4)
    loss = module(logits, target, torch.tensor([4, 2]))
    loss.backward()
    print(f"loss {loss.item():.12f}  gradient's norm {logits.grad.norm().item():.12f}")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
