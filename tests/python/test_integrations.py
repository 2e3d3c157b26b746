"""Helpers for other libraries, on tiny random models of theirs."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from masked_loss.integrations.transformers import causal_lm_loss  # noqa: E402

SIZES = dict(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
SIZES |= dict(intermediate_size=24, head_dim=8, max_position_embeddings=32)
SIZES |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

# name: (config, what it says of logits)
MODELS = {
    "Llama": (transformers.LlamaConfig, {}),
    "Llama, tied": (transformers.LlamaConfig, dict(tie_word_embeddings=True)),
    "Gemma2": (transformers.Gemma2Config, dict(final_logit_softcapping=0.5)),
    "Cohere": (transformers.CohereConfig, dict(logit_scale=0.25)),
    "Granite": (transformers.GraniteConfig, dict(logits_scaling=3.0)),
}


def model_of(name):
    config, options = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**SIZES, **options))
    model.get_output_embeddings().weight.data *= 20  # so that a cap or a scale shows
    return model.eval()


def batch():
    tokens = torch.randint(3, 61, (3, 12))
    inside = torch.arange(12) < torch.tensor([[12], [7], [10]])
    labels = tokens.masked_fill(~inside | (torch.arange(12) < 3), -100)
    return dict(input_ids=tokens.where(inside, 0), attention_mask=inside.long(), labels=labels)


@pytest.mark.parametrize("count", [None, 50, torch.tensor(50)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_is_the_loss_of_the_model(name, count):
    model, inputs = model_of(name), batch()
    parameters = list(model.parameters())
    options = {} if count is None else dict(num_items_in_batch=count)
    expected = model(**inputs, **options).loss
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    loss = causal_lm_loss(model, **inputs, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters, allow_unused=True), wanted)


def test_a_prompt_alone_stays_attached():
    model, inputs = model_of("Llama"), batch()
    inputs["labels"].fill_(-100)
    loss = causal_lm_loss(model, **inputs)
    loss.backward()
    assert loss == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_another_head_is_refused():
    model = model_of("Llama")
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(TypeError, match=r"^causal_lm_loss: expected model to have a head of type Linear, got Identity"):
        causal_lm_loss(model, **batch())
