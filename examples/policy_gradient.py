"""Trains a tiny policy, as GRPO does, from hidden states: log-probabilities and entropies without whole logits.

Groups of responses to a prompt are sampled, each response is rewarded for tokens that repeat the prompt's, and rewards
are whitened in each group. Prompts and padding are masked. Values and gradients agree with those of whole logits.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss

WORDS, HIDDEN, PROMPTS, GROUP, LENGTH = 40, 32, 4, 8, 12
CLIP, ENTROPY = 0.2, 0.01


class Policy(nn.Module):
    """A GRU that gives the hidden state of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, HIDDEN)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gru(self.embedding(tokens))[0]


@torch.no_grad()
def sample(policy: Policy, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] that begin with the prompt, and which of them are the response; responses differ in length."""
    tokens = prompts.repeat_interleave(GROUP, 0)[:, None]
    for _ in range(LENGTH):
        logits = policy.head(policy(tokens)[:, -1])
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (len(tokens),))
    response = masked_loss.sequence_mask(lengths + 1, LENGTH + 1)
    response[:, 0] = False
    return tokens, response


def advantages_of(tokens: Tensor, response: Tensor) -> Tensor:
    """[B, 1]: the share of a response that repeats the prompt, whitened in its group."""
    right = (tokens == tokens[:, :1]).double()
    reward = masked_loss.masked_mean(right, response, dim=1).float().view(PROMPTS, GROUP)
    return ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).view(-1, 1)


def loss_of(log_prob: Tensor, entropy: Tensor, old: Tensor, advantages: Tensor, response: Tensor) -> Tensor:
    ratio = (log_prob - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    objective = torch.minimum(ratio * advantages, clipped * advantages) + ENTROPY * entropy
    return -masked_loss.masked_mean(objective, response)


def of_whole_logits(policy: Policy, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the op computes, from logits that are whole."""
    log_p = F.log_softmax(policy.head(policy(tokens[:, :-1])), -1)
    return log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for step in range(steps):
        tokens, response = sample(policy, torch.randint(WORDS, (PROMPTS,)))
        advantages, response = advantages_of(tokens, response), response[:, 1:]
        old = None
        for _ in range(2):  # the second time the ratio is not 1
            log_prob, entropy = masked_loss.linear_log_prob_and_entropy(
                policy(tokens[:, :-1]), policy.head.weight, tokens[:, 1:], response
            )
            old = log_prob.detach() if old is None else old
            loss = loss_of(log_prob, entropy, old, advantages, response)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                whole = loss_of(*of_whole_logits(policy, tokens), old, advantages, response)
                expected = torch.autograd.grad(whole, list(policy.parameters()))
                away = max((p.grad - e).abs().max().item() for p, e in zip(policy.parameters(), expected, strict=True))
                print(f"Difference to whole logits: {(loss - whole).abs().item():.1e}, of the gradients {away:.1e}")
            optimizer.step()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            repeats = masked_loss.masked_mean((tokens[:, 1:] == tokens[:, :1]).float(), response).item()
            mean = masked_loss.masked_mean(entropy.detach(), response).item()
            print(f"step {step:3d}: reward {repeats:.4f}, entropy {mean:.4f}")


if __name__ == "__main__":
    main()
