"""Trains an encoder and a decoder to reverse sequences of different lengths.

The loss takes logits `[B, T, V]` and targets `[B, T]`: nothing is flattened, transposed or copied.
"""

import argparse

import torch
from torch import Tensor, nn

import masked_loss

PAD, BOS, EOS, SYMBOLS = 0, 1, 2, 12


def reversals(count: int, longest: int) -> tuple[Tensor, Tensor]:
    """Sources `[B, T]`, padded at the end, and targets `[B, T + 1]`: the source backwards, then EOS."""
    lengths = torch.randint(2, longest + 1, (count,))
    source = torch.randint(EOS + 1, SYMBOLS, (count, longest))
    source = source.where(masked_loss.sequence_mask(lengths, longest), PAD)
    target = torch.full((count, longest + 1), PAD)
    for row, n in enumerate(lengths.tolist()):
        target[row, : n + 1] = torch.cat([source[row, :n].flip(0), torch.tensor([EOS])])
    return source, target


class Seq2Seq(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, hidden)
        self.encoder = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(hidden, 2 * hidden, batch_first=True)
        self.head = nn.Linear(2 * hidden, SYMBOLS)

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        _, state = self.encoder(self.embedding(source))
        state = torch.cat(state.unbind(), dim=-1).unsqueeze(0)
        return self.head(self.decoder(self.embedding(given), state)[0])  # [B, T, V]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    source, target = reversals(count=128, longest=8)
    given = torch.cat([torch.full((len(target), 1), BOS), target[:, :-1]], dim=1)
    mask = target != PAD  # True = keep
    model = Seq2Seq(hidden=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        # Each sequence counts as much as any other, however long it is.
        loss = masked_loss.cross_entropy(
            model(source, given), target, mask, dim=-1, reduction="sequence_mean", label_smoothing=0.05
        )
        loss.backward()
        optimizer.step()
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step:3d}: loss {loss.item():.4f}")

    # Masked equals absent: one sequence at a time, cut to its length.
    with torch.no_grad():
        logits = model(source, given)
        batch = masked_loss.cross_entropy(logits, target, mask, dim=-1, reduction="sequence_mean")
        each = [nn.functional.cross_entropy(x[keep], y[keep]) for x, y, keep in zip(logits, target, mask, strict=True)]
        alone = torch.stack(each).mean()
        right = (logits.argmax(-1) == target)[mask].float().mean()
    print(f"Loss: {batch.item():.6f} in one padded batch, {alone.item():.6f} sequence by sequence")
    print(f"Difference: {abs(batch.item() - alone.item()):.1e}")
    print(f"Symbols predicted right: {right:.1%}")


if __name__ == "__main__":
    main()
