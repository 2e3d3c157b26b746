"""The demo, run as a user runs it on a tiny budget: what it prints and what it draws."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "char_language_model.py"
NUMBER = r"([+-]?[\d.]+(?:e[+-]\d+)?)"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo prints, and the path of its picture."""
    picture = tmp_path_factory.mktemp("demo") / "pictures" / "demo.png"
    options = ["--steps=15", "--seconds=300", "--hidden=64", "--lr=0.03", f"--output={picture}"]
    run = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, encoding="utf-8", timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout, picture


def numbers(pattern, text):
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in:\n{text}"
    return [float(number) for number in match.groups()]


def test_held_out_loss_falls(demo):
    before, after = numbers(f"Held-out loss: {NUMBER} bits/char before training, {NUMBER} after", demo[0])
    # Untrained, each of 96 characters costs about log2(96) = 6.58 bits.
    assert 6.4 < before < 6.8
    assert after < before - 0.5


def test_mask_is_ignore_index_and_is_not_counting_padding(demo):
    padding_counted = numbers(rf"padding counted as text +{NUMBER} +{NUMBER}\n", demo[0])
    flattened = numbers(rf"F\.cross_entropy, flattened, ignore_index +{NUMBER} +{NUMBER}\n", demo[0])
    ours = numbers(rf"masked_loss\.cross_entropy, mask +{NUMBER} +{NUMBER}\n", demo[0])
    (after,) = numbers(f"bits/char before training, {NUMBER} after", demo[0])
    assert ours == [pytest.approx(after, abs=1e-3), 0]
    assert flattened == [pytest.approx(ours[0], abs=2e-6), pytest.approx(0, abs=1e-6)]
    assert abs(padding_counted[1]) > 0.1
    assert padding_counted[0] - ours[0] == pytest.approx(padding_counted[1], rel=0.01)


def test_gradient_is_that_of_ignore_index(demo):
    (difference,) = numbers(f"Gradient, largest difference to ignore_index: {NUMBER}\n", demo[0])
    assert difference < 1e-7


def test_nan_at_padding_changes_nothing(demo):
    assert "NaN logits at padding: masked_loss stays bitwise the same; loss * mask gives nan\n" in demo[0]


def test_picture(demo):
    printed, picture = demo
    assert printed.splitlines()[-1] == f"Picture: {picture}"
    assert 20_000 < picture.stat().st_size < 500_000
    image = imread(picture)[..., :3]
    assert min(image.shape[:2]) > 600
    # Padding's grey covers a good part of it, and text, curves and losses bring many colours.
    grey = (abs(image - [0xE4 / 255, 0xE6 / 255, 0xE9 / 255]) < 0.002).all(-1)
    assert grey.mean() > 0.05
    assert len({tuple(color) for color in image[::3, ::3].reshape(-1, 3).tolist()}) > 200
