"""The code blocks of a page."""

import re
import runpy

from building import ROOT


def blocks(page, language):
    """The code of each block in a language."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [code for other, code in found if other == language]


def said(code, comment, call):
    """What the comments beside the lines that print say."""
    return re.findall(rf"^\s*{call}.*  {comment} (\S+)$", code, re.MULTILINE)


def check_python(code, folder, capsys):
    """Runs a block as a script: it prints what its comments say."""
    script = folder / "sample.py"
    script.write_text(code)
    runpy.run_path(str(script))
    assert said(code, "#", "print") == capsys.readouterr().out.split()
    assert said(code, "#", "print")
