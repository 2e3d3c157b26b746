"""What README shows is run, and prints what README says."""

import re
import runpy
import sys

import pytest

from building import BUILD, ROOT, build_project, run

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def only(language):
    (code,) = [code for other, code in BLOCKS if other == language]
    return code


def said(code, comment, call):
    """What the comments beside the lines that print say."""
    return re.findall(rf"^\s*{call}.*  {comment} (\S+)$", code, re.MULTILINE)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_sample(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "sample.py"
    script.write_text(code)
    runpy.run_path(str(script))
    assert said(code, "#", "print") == capsys.readouterr().out.split()
    assert said(code, "#", "print")


@pytest.mark.slow
def test_cpp_sample():
    sources = BUILD / "readme"
    sources.mkdir(exist_ok=True)
    for name, language in (("main.cpp", "cpp"), ("CMakeLists.txt", "cmake")):
        # An unchanged file keeps its time: nothing is compiled again.
        if not (sources / name).exists() or (sources / name).read_text() != only(language):
            (sources / name).write_text(only(language))
    prefix = run(sys.executable, "-m", "masked_loss", "--cmake-dir").strip()
    build_project(sources, sources / "build", CMAKE_PREFIX_PATH=prefix)
    assert said(only("cpp"), "//", "std::cout") == run(sources / "build" / "app").split() != []


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"^make ([\w-]+)", BLOCKS[0][1], re.MULTILINE)
    assert named and set(named) <= targets
