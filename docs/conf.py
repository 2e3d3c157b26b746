"""Sphinx's configuration, and what it cannot do by itself: C++ headers and benchmark results as parts of a page."""

import json
import re
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import masked_loss

ROOT = Path(__file__).resolve().parents[1]
HEADERS = ROOT / "csrc" / "include" / "masked_loss"

project = "masked_loss"
author = "masked_loss developers"
copyright = f"2026, {author}"
version = release = masked_loss.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_custom_sections = ["Shape"]
autosummary_generate = False  # the tables link to the same page
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
maximum_signature_line_length = 88
html_theme = "furo"
html_title = f"masked_loss {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]


def link_to_twin(name: str) -> list[str]:
    """To the Python function of the same name, which has the formula and describes the arguments."""
    if not hasattr(masked_loss, name):
        return []
    return [f"In Python: :py:func:`masked_loss.{name}`."]


def plain(text: str) -> str:
    """As reStructuredText that means just that."""
    return re.sub(r"([|*_])", r"\\\1", text)


def joined(comment: list[str]) -> list[str]:
    return [plain(line.strip().removeprefix("//").strip()).replace("`", "``") for line in comment]


def indented(lines: list[str]) -> list[str]:
    return ["", *(f"   {line}" for line in lines), ""]


class Header(SphinxDirective):
    """The declarations of a public header with their comments, and links to the Python functions of the same names."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = HEADERS / self.arguments[0]
        self.env.note_dependency(str(path))
        before, _, declarations = path.read_text().partition("namespace masked_loss {\n")
        introduction = joined([line for line in before.splitlines() if line.startswith("//")])
        lines = [*introduction, "", ".. cpp:namespace:: masked_loss", ""]
        for block in re.split(r"\n\n", declarations.partition("}  // namespace")[0].strip()):
            lines += self.block(block.splitlines())
        lines += [".. cpp:namespace:: nullptr", ""]
        return self.parse_text_to_nodes(StringList(lines, str(path)), offset=0)

    def block(self, source: list[str]) -> list[str]:
        """Declarations that no empty line divides."""
        lines: list[str] = []
        comment: list[str] = []
        while source:
            line = source.pop(0)
            if line.startswith("//"):
                comment.append(line)
                continue
            while not line.rstrip().endswith((";", "{")):
                line += " " + source.pop(0).strip()
            if match := re.match(r"struct (\w+) \{", line):
                lines += [f".. cpp:struct:: {match[1]}", *indented(joined(comment))]
                while (member := source.pop(0)) != "};":
                    lines += indented(self.member(member))
            elif match := re.match(r"enum class (\w+).*\{ (.*) \};", line):
                lines += [f".. cpp:enum-class:: {match[1]}", *indented(joined(comment))]
                for enumerator in match[2].split(", "):
                    lines += indented([f".. cpp:enumerator:: {enumerator}", "   :no-contents-entry:"])
            elif match := re.match(r"using (\w+) = (\w+);", line):
                lines += [f".. cpp:type:: {match[1]} = {match[2]}", *indented(joined(comment))]
            else:
                declaration = line.removeprefix("MASKED_LOSS_API ").rstrip(";")
                name = re.search(r"(\w+)\(", declaration)[1]
                lines += [f".. cpp:function:: {declaration}", *indented(joined(comment))]
                lines += indented(link_to_twin(name))
            comment = []
        return lines

    def member(self, line: str) -> list[str]:
        declaration, _, comment = line.partition("//")
        declaration = re.sub(r"(\w)(\{.*\});", r"\1 = \2", declaration.strip()).rstrip(";")
        return [f".. cpp:member:: {declaration}", "   :no-contents-entry:", *indented(joined([comment]))]


class Benchmarks(SphinxDirective):
    """The results of `make bench`: a table for each family."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = ROOT / "benchmarks" / "results" / self.arguments[0]
        self.env.note_dependency(str(path))
        results = json.loads(path.read_text())
        machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
        lines = [f"Machine: {machine}.", ""]
        families: dict[str, list[dict]] = {}
        for row in results["rows"]:
            families.setdefault(row["case"].split()[0], []).append(row)
        for family, rows in families.items():
            lines += [f".. rubric:: {plain(family)}", "", ".. list-table::", "   :header-rows: 1", ""]
            lines += self.row(["case", "against", "ours, ms", "theirs, ms", "times faster"])
            for row in rows:
                numbers = [f"{row['ours_ms']:.4g}", f"{row['peer_ms']:.4g}", f"{row['ratio']:.3g}"]
                lines += self.row([row["case"], row["peer"], *numbers])
            lines.append("")
        return self.parse_text_to_nodes(StringList(lines, str(path)), offset=0)

    def row(self, cells: list[str]) -> list[str]:
        return [f"   {'* -' if i == 0 else '  -'} {plain(cell)}" for i, cell in enumerate(cells)]


def link_to_torch(app: Sphinx, env: object, node: pending_xref, content: nodes.Element) -> nodes.Node | None:
    """torch's own pages for its functions, without an inventory: a build needs no network."""
    name = node.get("reftarget", "")
    if not name.startswith("torch.") or node.get("reftype") not in ("func", "class"):
        return None
    pages = {"torch.Tensor": "tensors", "torch.dtype": "tensor_attributes", "torch.device": "tensor_attributes"}
    address = f"https://docs.pytorch.org/docs/stable/{pages.get(name, f'generated/{name}')}.html"
    return nodes.reference("", "", content, internal=False, refuri=address)


def setup(app: Sphinx) -> None:
    app.add_directive("header", Header)
    app.add_directive("benchmarks", Benchmarks)
    app.connect("missing-reference", link_to_torch)
