"""Trains a small transformer with masked attention: a query sees neither padding nor later positions.

The two masks are combined to one tensor `[B, 1, T, T]`, which `softmax` does not expand. Nothing is filled with -inf.
"""

import argparse
import math

import torch
from torch import Tensor, nn

import masked_loss

PAD, SYMBOLS = 0, 10


def sequences(count: int, longest: int) -> Tensor:
    """Symbols `[N, T]` that repeat with a period of 2 to 4, padded at the end."""
    lengths = torch.randint(longest // 2, longest + 1, (count,))
    period = torch.randint(2, 5, (count, 1))
    motif = torch.randint(1, SYMBOLS, (count, 4))
    tokens = motif.gather(1, torch.arange(longest) % period)
    return tokens.where(masked_loss.sequence_mask(lengths, longest), PAD)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def heads_of(self, x: Tensor) -> list[Tensor]:
        """Query, key and value, `[B, heads, T, width of a head]` each."""
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(x).chunk(3, dim=-1)]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.heads_of(x)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # [B, heads, T, T]
        seen = masked_loss.softmax(scores, mask) @ value
        return self.out(seen.transpose(1, 2).flatten(-2))


class Transformer(nn.Module):
    def __init__(self, width: int, longest: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(SYMBOLS, width), nn.Embedding(longest, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.attentions = nn.ModuleList(Attention(width, heads=2) for _ in range(2))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.size(1)))
        for i, (attention, feed_forward) in enumerate(zip(self.attentions, self.feed_forwards, strict=True)):
            x = x + attention(self.norms[2 * i](x), mask)
            x = x + feed_forward(self.norms[2 * i + 1](x))
        return self.head(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    tokens = sequences(count=64, longest=16)
    given, target = tokens[:, :-1], tokens[:, 1:]
    padding = (given != PAD)[:, None, None, :]  # [B, 1, 1, T], True = keep
    causal = masked_loss.causal_mask(given.size(1))  # [T, T]
    model = Transformer(width=32, longest=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss = masked_loss.cross_entropy(model(given, padding & causal), target, target != PAD, dim=-1)
        loss.backward()
        optimizer.step()
        if step % 30 == 0 or step == steps - 1:
            print(f"step {step:3d}: loss {loss.item():.4f}")

    # Against torch's fused attention with the same masks; rows of padding, which it may fill with anything, left out.
    with torch.no_grad():
        attention = model.attentions[0]
        query, key, value = attention.heads_of(model.embedding(given))
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
        ours = masked_loss.softmax(scores, padding & causal) @ value
        theirs = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=padding & causal)
        kept = (given != PAD)[:, None, :, None].expand_as(ours)
        without_tensor = masked_loss.softmax(scores, padding, causal=True) @ value
    print(f"Difference from scaled_dot_product_attention: {(ours - theirs)[kept].abs().max().item():.1e}")
    print(f"Difference with causal=True and no causal mask: {(ours - without_tensor).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
