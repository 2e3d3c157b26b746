"""Losses of Hugging Face models. Needs ``transformers``."""

from typing import Any, Optional, Union

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..linear import linear_cross_entropy

__all__ = ["causal_lm_loss"]


def causal_lm_loss(
    model: PreTrainedModel,
    *,
    labels: Tensor,
    num_items_in_batch: Optional[Union[int, Tensor]] = None,
    ignore_index: int = -100,
    **inputs: Any,
) -> Tensor:
    """The loss of a causal language model, whose logits are never computed as a whole.

    It equals ``model(**inputs, labels=labels).loss`` and takes the same arguments, as keywords. The last hidden states
    go to :func:`masked_loss.linear_cross_entropy` with the weights of the head. Positions with a label of
    ``ignore_index``, such as prompts and padding, take no part in the products of the head. A softcap and a scale of
    the logits are those of the model's config. Other losses, as mixtures of experts have, are not added.

    Args:
        model: with a decoder and a linear head, as ``get_decoder()`` and ``get_output_embeddings()`` give them.
        labels: the input's tokens, of dtype int64, ``ignore_index`` where they do not count; they are shifted here.
        num_items_in_batch: divides the loss instead of the number of labels that count, as the ``Trainer`` gives it:
            that number in all micro-batches of a step.
        ignore_index: the label of positions that do not count.
        inputs: those of the decoder, such as ``input_ids`` and ``attention_mask``.

    Shape:
        - ``labels``: ``(B, T)``.
        - Output: 0-d.

    Returns:
        The loss, in float32, or float64 for a model in float64.

    Raises:
        TypeError: the head is not an ``nn.Linear``.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(f"causal_lm_loss: expected model to have a head of type Linear, got {type(head).__name__}")
    config = model.config.get_text_config()
    hidden = model.get_decoder()(**inputs).last_hidden_state
    next_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    # Cohere multiplies its logits, Granite divides them.
    temperature = getattr(config, "logits_scaling", None) or 1.0 / (getattr(config, "logit_scale", None) or 1.0)
    return linear_cross_entropy(
        hidden,
        head.weight,
        next_labels,
        linear_bias=head.bias,
        softcap=getattr(config, "final_logit_softcapping", None),
        temperature=temperature,
        ignore_index=ignore_index,
        normalizer=num_items_in_batch,
    )
