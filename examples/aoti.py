"""Compiles a module that uses ``torch.ops.masked_loss`` ahead of time, for batches of any size, and runs the package.

``examples/cpp/run_aoti.cpp`` runs the same file without Python.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import masked_loss


class Evaluation(nn.Module):
    """The loss of a padded batch, how many tokens it counts, and the logits without the padding's."""

    def forward(self, logits: Tensor, target: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = masked_loss.sequence_mask(lengths, target.shape[1]) & masked_loss.mask_from_ids(target, 0)
        target = masked_loss.check_targets(target, logits.shape[-1], mask)
        loss = masked_loss.cross_entropy(logits, target, mask, label_smoothing=0.1, dim=-1)
        count = masked_loss.loss_normalizer(target, mask)
        return loss, count, masked_loss.masked_fill(logits, ~mask.unsqueeze(-1), 0.0)


def batch(size: int, time: int, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.arange(size * time * classes, dtype=torch.float32).sin().view(size, time, classes)
    target = torch.arange(size * time).remainder(classes).view(size, time)
    return logits, target, torch.arange(size).remainder(time) + 1


def package(path: Path) -> None:
    shapes = {0: torch.export.Dim("size"), 1: torch.export.Dim("time")}
    program = torch.export.export(Evaluation(), batch(3, 4), dynamic_shapes=(shapes, shapes, {0: shapes[0]}))
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=Path("out/evaluation.pt2"), help="where to save it")
    path = parser.parse_args().path
    path.parent.mkdir(parents=True, exist_ok=True)
    package(path)
    loss, count, logits = torch._inductor.aoti_load_package(str(path))(*batch(6, 7))
    print(f"loss {loss.item():.6f}  count {count.item():.0f}  logits {logits.norm().item():.4f}")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
