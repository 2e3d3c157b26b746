"""Trains a tiny causal language model with Hugging Face's `Trainer`, whose logits are never computed as a whole.

The loss takes the last hidden states and the weights of the head. Loss and gradients agree with the `Trainer`'s own
loss, with gradient accumulation over micro-batches of different numbers of tokens. Prompts are left out: their
positions take no part in the matrix products.
"""

import argparse
import contextlib
import io
import tempfile

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from masked_loss.integrations.transformers import causal_lm_loss

WORDS, BATCH, MICRO_BATCH, LENGTH = 128, 8, 2, 24


class LinearTrainer(Trainer):
    """A `Trainer` whose model computes no logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = causal_lm_loss(self.accelerator.unwrap_model(model), num_items_in_batch=num_items_in_batch, **inputs)
        return (loss, {}) if return_outputs else loss


def examples() -> list[dict[str, Tensor]]:
    """Sequences that count upwards; what comes before a position of their own is the prompt."""
    found = []
    for i in range(16):
        tokens = (torch.arange(LENGTH) * (i % 5 + 1) + i) % WORDS
        found.append({"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(LENGTH) < 2 + i, -100)})
    return found


class FirstGradient(TrainerCallback):
    """Keeps the gradient that the first optimizer step is made with."""

    gradient: Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if self.gradient is None:
            self.gradient = parameters_to_vector(parameter.grad for parameter in model.parameters())


def train(kind: type[Trainer], steps: int) -> tuple[list[float], Tensor]:
    """The loss of each step, and the first one's gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    first = FirstGradient()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=BATCH // MICRO_BATCH,
            max_steps=steps,
            learning_rate=1e-2,
            max_grad_norm=0,  # gradients as they are
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = kind(LlamaForCausalLM(config), arguments, train_dataset=examples(), callbacks=[first])
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, first.gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # the model is too small for more
    set_verbosity_error()
    disable_progress_bar()

    losses, ours = train(LinearTrainer, steps)
    for step in range(0, steps, max(1, steps // 5)):
        print(f"step {step:3d}: loss {losses[step]:.4f}")
    their_losses, theirs = train(Trainer, steps)
    gradient = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"Difference to the Trainer's own loss: {abs(losses[0] - their_losses[0]):.1e}, its gradient {gradient:.1e}")


if __name__ == "__main__":
    main()
