"""The documentation: its samples run, its tables and pictures are what their scripts make, and nothing is left out."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

import masked_loss
from building import ROOT
from samples import blocks, check_python

DOCS = ROOT / "docs"
SAMPLES = [(page.name, code) for page in sorted(DOCS.glob("*.md")) for code in blocks(page, "python")]


@pytest.fixture(autouse=True)
def on_the_cpu():
    """A target out of range that torch itself is given would end a GPU's context."""
    with torch.device("cpu"):
        yield


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "code"), SAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SAMPLES)])
def test_sample(page, code, tmp_path, monkeypatch, capsys):
    for library in re.findall(r"^import (keras|optax)", code, re.MULTILINE):
        monkeypatch.setenv("KERAS_BACKEND", "torch")
        pytest.importorskip(library, reason=f"{library} is not installed: docs/peers.py says how")
    monkeypatch.chdir(tmp_path)
    check_python(code, tmp_path, capsys)


def test_report_of_a_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(blocks(DOCS / "inspect.md", "python")[0], {})
    command, report = blocks(DOCS / "inspect.md", "text")[0].split("\n", 1)
    assert command == "$ python -m masked_loss inspect batch.pt"
    run = subprocess.run([sys.executable, *command.split()[2:]], capture_output=True, text=True, check=True)
    # Another processor rounds the last digits otherwise.
    parts, expected = (re.split(r"([-+]?\d+\.\d+)", text) for text in (run.stdout, report))
    assert parts[::2] == expected[::2]
    assert list(map(float, parts[1::2])) == pytest.approx(list(map(float, expected[1::2])), rel=2e-3)


def test_peers_of_the_table():
    peers = load("peers")
    table = (DOCS / "masks.md").read_text().splitlines()
    rows = peers.rows()
    assert {"torch", "masked-loss"} <= {row.split()[1] for row in rows}
    assert [row for row in rows if row not in table] == []


def test_tables_of_speedups():
    for page, text in load("speedups").updated().items():
        assert page.read_text() == text


def test_pictures_of_the_rules(tmp_path):
    subprocess.run([sys.executable, DOCS / "rules.py", tmp_path], check=True)
    committed = sorted((DOCS / "rules").iterdir())
    assert len(committed) == 4
    for picture in committed:
        # Another matplotlib may place things elsewhere; what is said stays.
        old, new = (
            re.findall(r"<text[^>]*>(.*?)</text>", file.read_text()) for file in (picture, tmp_path / picture.name)
        )
        assert old == new != []


def test_every_public_name_is_in_the_reference():
    listed = re.findall(
        r"^\.\. auto(?:function|class|data):: (?:masked_loss\.)?(\S+)", (DOCS / "python.rst").read_text(), re.M
    )
    names = set(masked_loss.__all__) - {"__version__", "distributed"}
    names |= {f"distributed.{name}" for name in masked_loss.distributed.__all__}
    names.add("integrations.transformers.causal_lm_loss")
    assert set(listed) == names


def test_every_header_is_in_the_reference():
    listed = re.findall(r"^\.\. header:: (\S+)", (DOCS / "cpp.rst").read_text(), re.M)
    headers = {file.name for file in (ROOT / "csrc" / "include" / "masked_loss").iterdir()}
    assert set(listed) == headers - {"export.h", "masked_loss.h"}


def test_every_page_is_in_the_index():
    pages = {page.stem for page in DOCS.iterdir() if page.suffix in (".md", ".rst")} - {"index"}
    assert pages == set(
        re.search(r"\{toctree\}\n:.*?\n\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)[1].split()
    )
