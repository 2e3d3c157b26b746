"""Trains a GRU to tag the words of sentences of different lengths, some of which have no tag.

Two ids are ignored: PAD after the end of a sentence, and UNTAGGED for words without a tag.
"""

import argparse

import torch
from torch import Tensor, nn

import masked_loss

WORDS, TAGS = 50, 5
PAD, UNTAGGED = 0, 1  # of tags; the real ones begin behind them


def sentences(count: int, longest: int) -> tuple[Tensor, Tensor]:
    """Words `[N, T]` and their tags, which depend on a word and the one before it."""
    lengths = torch.randint(longest // 4, longest + 1, (count,))
    words = torch.randint(1, WORDS, (count, longest))
    tags = 2 + (words + words.roll(1, dims=1)) % (TAGS - 2)
    tags = tags.where(torch.rand(count, longest) < 0.7, UNTAGGED)
    inside = masked_loss.sequence_mask(lengths, longest)
    return words.where(inside, 0), tags.where(inside, PAD)


class Tagger(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, TAGS)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(words))[0])  # [N, T, tags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    words, tags = sentences(count=64, longest=20)
    mask = masked_loss.mask_from_ids(tags, [PAD, UNTAGGED])  # True = keep
    model = Tagger(hidden=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    # PAD and UNTAGGED are not tags that a word can have: they get no probability.
    criterion = masked_loss.CrossEntropyLoss(class_mask=torch.arange(TAGS) > UNTAGGED, dim=-1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(words), tags, mask)
        loss.backward()
        optimizer.step()
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step:3d}: loss {loss.item():.4f}")

    # Masked equals absent: the tagged words alone, with the logits of real tags alone.
    logits = model(words)
    batch = criterion(logits, tags, mask)
    alone = nn.functional.cross_entropy(logits[mask][:, UNTAGGED + 1 :], tags[mask] - UNTAGGED - 1)
    by_ids = masked_loss.cross_entropy(
        logits, tags, ignore_index=[PAD, UNTAGGED], class_mask=criterion.class_mask, dim=-1
    )
    print(f"Loss: {batch.item():.6f} masked, {alone.item():.6f} of the {int(mask.sum())} tagged words alone")
    print(f"Difference: {abs(batch - alone).item():.1e}, with ignore_index {abs(batch - by_ids).item():.1e}")
    with torch.no_grad():
        right = (logits[..., UNTAGGED + 1 :].argmax(-1) + UNTAGGED + 1 == tags)[mask].float().mean()
    print(f"Tagged right: {right:.1%}")


if __name__ == "__main__":
    main()
