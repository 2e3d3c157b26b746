"""The examples of losses, run as a user runs them: the numbers that prove the mask."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_hugging_face_trainer():
    pytest.importorskip("transformers", reason="transformers is not installed: it needs Python 3.11 or newer")
    pytest.importorskip("accelerate", reason="accelerate is not installed, which transformers' Trainer needs")
    printed = output_of("hf_trainer.py", "--steps=6")
    assert numbers(r"Trainer's own loss: ([^,]+),", printed)[0] < 1e-5
    assert numbers(r"its gradient (\S+)", printed)[0] < 1e-5
    assert numbers(r"num_items_in_batch +(\S+) away", printed)[0] < 1e-5
    assert numbers(r"mean of means +(\S+) away", printed)[0] > 0.02
    losses = numbers(r"step +\d+: loss (\S+)", printed)
    assert losses[-1] < 0.95 * losses[0]
