"""What README shows is run, and prints what README says."""

import re
import sys

import pytest

from building import BUILD, ROOT, build_project, run
from samples import blocks, check_python, said

PYTHON = blocks("README.md", "python")


def only(language):
    (code,) = blocks("docs/linking.md", language)
    return code


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_sample(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_python(code, tmp_path, capsys)


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
    named = re.findall(r"^make ([\w-]+)", "".join(blocks("README.md", "sh")), re.MULTILINE)
    assert named and set(named) <= targets


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert not anchor or anchor in anchors, f"{page.name}: {link}"
