"""Trains a tiny causal language model with Hugging Face's `Trainer` and a masked loss.

Loss and gradients agree with the `Trainer`'s own loss. Gradient accumulation over micro-batches with different numbers
of tokens gives the gradient of one large batch; a mean of the micro-batches' means does not. The model is initialized
at random and the text comes with Python, so nothing is downloaded.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import masked_loss

CHARACTERS, BATCH, MICRO_BATCH = 128, 8, 2


def masked_causal_loss(outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """For `Trainer(compute_loss_func=...)`: cross entropy of the logits of each position and the next label."""
    # Labels are shifted, not logits: the gradient of logits[:, :-1] would be copied into one of the whole size.
    next_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    # The number of items is that of all micro-batches of an optimizer step.
    return masked_loss.cross_entropy(outputs.logits, next_labels, normalizer=num_items_in_batch, dim=-1)


def mean_of_means(outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """What goes wrong without that number: a token counts the more, the shorter the lines of its micro-batch are."""
    return masked_causal_loss(outputs, labels) / (BATCH // MICRO_BATCH)


@cache
def lines() -> list[Tensor]:
    """Characters of lines of different lengths: the Zen of Python."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        import this  # noqa: F401, prints it, once
    return [torch.tensor(list(line.encode())) for line in text.getvalue().splitlines() if line]


def collate(batch: list[Tensor]) -> dict[str, Tensor]:
    tokens = pad_sequence(batch, batch_first=True)  # [B, T]
    inside = masked_loss.sequence_mask(torch.tensor([len(line) for line in batch]), tokens.shape[1])
    return {"input_ids": tokens, "attention_mask": inside.long(), "labels": tokens.masked_fill(~inside, -100)}


class FirstGradient(TrainerCallback):
    """Keeps the gradient that the first optimizer step is made with."""

    gradient: Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if self.gradient is None:
            self.gradient = parameters_to_vector(parameter.grad for parameter in model.parameters())


def train(loss: Callable[..., Tensor] | None, micro_batch: int, steps: int) -> tuple[list[float], Tensor]:
    """The loss of each step, and the first one's gradient, of the same batches in the same order."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    first = FirstGradient()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=BATCH // micro_batch,
            max_steps=steps,
            learning_rate=1e-2,
            max_grad_norm=0,  # gradients as they are
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_drop_last=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            LlamaForCausalLM(config),
            arguments,
            data_collator=collate,
            train_dataset=lines()[:16],
            callbacks=[first],
            compute_loss_func=loss,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, first.gradient


def difference(gradient: Tensor, expected: Tensor) -> float:
    return ((gradient - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # the model is too small for more
    set_verbosity_error()
    disable_progress_bar()

    losses, ours = train(masked_causal_loss, MICRO_BATCH, steps)
    for step in range(0, steps, max(1, steps // 5)):
        print(f"step {step:3d}: loss {losses[step]:.4f}")
    their_losses, theirs = train(None, MICRO_BATCH, steps)
    first, last = abs(losses[0] - their_losses[0]), abs(losses[-1] - their_losses[-1])
    print(f"Difference to the Trainer's own loss: {first:.1e}, its gradient {difference(ours, theirs):.1e}")
    print(f"After {steps} steps: {last:.1e}")

    _, whole = train(masked_causal_loss, BATCH, 1)
    _, means = train(mean_of_means, MICRO_BATCH, 1)
    print(f"Gradient of {BATCH // MICRO_BATCH} micro-batches, against that of one batch of {BATCH} lines:")
    print(f"  normalizer=num_items_in_batch  {difference(ours, whole):.1e} away")
    print(f"  mean of means                  {difference(means, whole):.1e} away")


if __name__ == "__main__":
    main()
