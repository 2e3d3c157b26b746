"""The examples of losses, run as a user runs them: the numbers that prove the mask."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(name, *options):
    command = [sys.executable, EXAMPLES / name, *options]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout


def numbers(pattern, text):
    found = re.findall(pattern, text)
    assert found, f"no {pattern!r} in:\n{text}"
    return [float(number) for number in found]


def test_masked_regression():
    printed = output_of("masked_regression_gru.py", "--steps=15")
    (difference,) = numbers(r"Difference: (\S+)", printed)
    assert difference < 1e-6
    losses = numbers(r"step +\d+: loss (\S+)", printed)
    assert losses[-1] < 0.9 * losses[0]


def test_unknown_labels():
    printed = output_of("multilabel_unknown.py", "--steps=30")
    assert numbers(r"Difference: (\S+)", printed)[0] < 1e-6
    assert numbers(r"not 0 at unknown labels: (\d+)", printed) == [0]
    as_zero, masked = numbers(r": (\S+)% of the unknown labels", printed)
    assert masked > as_zero + 20


def test_tagger():
    printed = output_of("tagger_gru.py", "--steps=41")
    assert numbers(r"Difference: ([^,]+),", printed)[0] < 1e-6
    assert numbers(r"with ignore_index (\S+)", printed)[0] < 1e-6
    losses = numbers(r"step +\d+: loss (\S+)", printed)
    assert losses[-1] < 0.5 * losses[0]


def test_seq2seq():
    printed = output_of("seq2seq.py", "--steps=41")
    assert numbers(r"Difference: (\S+)", printed)[0] < 1e-6
    losses = numbers(r"step +\d+: loss (\S+)", printed)
    assert losses[-1] < 0.6 * losses[0]


def test_classes_by_task():
    printed = output_of("classes_by_task.py", "--steps=41")
    assert numbers(r"Difference: (\S+)", printed)[0] < 1e-6
    assert numbers(r"classes a task has not: (\d+)", printed) == [0]
    losses = numbers(r"step +\d+: loss (\S+)", printed)
    assert losses[-1] < 0.6 * losses[0]


def test_attention():
    printed = output_of("attention.py", "--steps=31")
    differences = numbers(r"Difference .*: (\S+)", printed)
    assert len(differences) == 2
    assert max(differences) < 1e-5
    losses = numbers(r"step +\d+: loss (\S+)", printed)
    assert losses[-1] < 0.8 * losses[0]


def test_distillation():
    printed = output_of("distillation.py", "--steps=41")
    assert numbers(r"Difference: (\S+)", printed)[0] < 1e-6
    assert numbers(r"not 0 in the padding: (\d+)", printed) == [0]
    losses = numbers(r"step +\d+: loss (\S+)", printed)
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture
def hugging_face():
    pytest.importorskip("transformers", reason="transformers is not installed: it needs Python 3.11 or newer")
    pytest.importorskip("accelerate", reason="accelerate is not installed, which transformers' Trainer needs")


def names_of_nodes(node):
    return [node.name()] + [name for next, _ in node.next_functions if next for name in names_of_nodes(next)]


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(17)])
def test_loss_of_the_trainer_is_that_of_hugging_face(hugging_face, num_items):
    from transformers.loss.loss_utils import ForCausalLMLoss

    masked_causal_loss = runpy.run_path(str(EXAMPLES / "hf_trainer.py"))["masked_causal_loss"]
    with torch.device("cpu"):
        torch.manual_seed(0)
        logits, labels = torch.randn(3, 8, 11, requires_grad=True), torch.randint(11, (3, 8))
        labels[0, 5:] = labels[1, :2] = labels[2] = -100
    ours = masked_causal_loss(SimpleNamespace(logits=logits), labels, num_items)
    theirs = ForCausalLMLoss(logits, labels, 11, num_items_in_batch=num_items)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    # A slice of the logits would have its gradient copied into one of the whole size.
    assert not any("Slice" in name for name in names_of_nodes(ours.grad_fn))
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_hugging_face_trainer(hugging_face):
    printed = output_of("hf_trainer.py", "--steps=6")
    assert numbers(r"Trainer's own loss: ([^,]+),", printed)[0] < 1e-5
    assert numbers(r"its gradient (\S+)", printed)[0] < 1e-5
    assert numbers(r"num_items_in_batch +(\S+) away", printed)[0] < 1e-5
    assert numbers(r"mean of means +(\S+) away", printed)[0] > 0.02
    losses = numbers(r"step +\d+: loss (\S+)", printed)
    assert losses[-1] < 0.95 * losses[0]


def test_hugging_face_trainer_without_logits(hugging_face):
    printed = output_of("hf_linear.py", "--steps=6")
    assert numbers(r"Trainer's own loss: ([^,]+),", printed)[0] < 1e-5
    assert numbers(r"its gradient (\S+)", printed)[0] < 1e-5
    losses = numbers(r"step +\d+: loss (\S+)", printed)
    assert losses[-1] < 0.95 * losses[0]


def test_policy_gradient():
    printed = output_of("policy_gradient.py", "--steps=6")
    assert max(numbers(r"whole logits: (\S+), ", printed)) < 1e-6
    assert max(numbers(r"gradients (\S+)", printed)) < 1e-6
    entropies = numbers(r"entropy (\S+)", printed)
    assert entropies[-1] < entropies[0]
