"""Text that docstrings share."""

import inspect
import re
import textwrap
from typing import Any, Iterable

__all__ = ["share_text"]


def share_text(objects: Iterable[Any], **texts: str) -> None:
    """Replaces each line ``{name}`` of the objects' docstrings by the text of that name, indented as the line is."""

    def text(line: "re.Match[str]") -> str:
        return textwrap.indent(inspect.cleandoc(texts[line[2]]), line[1])

    for documented in objects:
        if documented.__doc__:  # none under python -OO
            documented.__doc__ = re.sub(r"^( *)\{(\w+)\}$", text, documented.__doc__, flags=re.MULTILINE)
