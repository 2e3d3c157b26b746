"""Trains a GRU to predict the next value of series of different lengths, padded into one batch.

The padding of the targets is NaN, to show that it is never read.
"""

import argparse

import torch
from torch import Tensor, nn

import masked_loss


def ragged_series(count: int, longest: int) -> tuple[Tensor, Tensor]:
    """Noisy sines `[N, T]` of random periods, with NaN behind their ends, and their lengths."""
    lengths = torch.randint(longest // 4, longest + 1, (count,))
    period, phase = 8 + 16 * torch.rand(count, 1), 6.3 * torch.rand(count, 1)
    series = torch.sin(6.3 * torch.arange(longest) / period + phase) + 0.1 * torch.randn(count, longest)
    return series.where(masked_loss.sequence_mask(lengths, longest), torch.nan), lengths


class Forecaster(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, series: Tensor) -> Tensor:
        # The loss does not read NaN in the padding, but the GRU's backward pass would multiply it by 0.
        states, _ = self.gru(series.nan_to_num().unsqueeze(-1))
        return self.head(states).squeeze(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    series, lengths = ragged_series(count=32, longest=40)
    past, future = series[:, :-1], series[:, 1:]
    mask = masked_loss.sequence_mask(lengths - 1, future.size(1))  # True = keep
    model = Forecaster(hidden=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    criterion = masked_loss.HuberLoss(delta=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(past), future, mask)
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}: loss {loss.item():.4f}")

    # Masked equals absent: series by series, cut to their lengths, without any padding.
    with torch.no_grad():
        batch = masked_loss.mse_loss(model(past), future, mask)
        errors = [model(past[i : i + 1, : n - 1]) - future[i : i + 1, : n - 1] for i, n in enumerate(lengths.tolist())]
        alone = torch.cat([error.flatten() for error in errors]).square().mean()
        by_series = masked_loss.mse_loss(model(past), future, mask, reduction="sequence_mean")
    print(f"Squared error: {batch.item():.6f} in one padded batch, {alone.item():.6f} series by series")
    print(f"Difference: {abs(batch.item() - alone.item()):.1e}")
    print(f"Mean over the series of each one's mean: {by_series.item():.6f}")


if __name__ == "__main__":
    main()
