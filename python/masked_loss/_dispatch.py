"""How a Python function calls its op: eagerly, under a compiler, and in TorchScript."""

import ast
import functools
import inspect
import linecache
import textwrap
from typing import Any, Callable, Dict, TypeVar

import torch
from torch.overrides import has_torch_function

from . import _C as bound

__all__ = ["bound", "scriptable", "use_bound"]

Function = TypeVar("Function", bound=Callable[..., Any])


@torch.jit.unused
def use_bound(*arguments: object) -> bool:
    """Whether to call the pybind11 function, which takes a microsecond, instead of ``torch.ops``, which takes several.

    Not if something above the dispatcher has to see the op: a compiler, a trace, ``__torch_function__``.
    """
    return not (torch.compiler.is_compiling() or has_torch_function(arguments) or torch.jit.is_tracing())


def scriptable(function: Function) -> Function:
    """Lets ``torch.jit.script`` compile a function that has keyword-only arguments with defaults.

    TorchScript refuses these, so it compiles the same function without the star.
    """

    @functools.cache
    def without_star() -> Callable[..., Any]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        definition.decorator_list = []
        arguments = definition.args
        arguments.args += arguments.kwonlyargs
        arguments.defaults += [default for default in arguments.kw_defaults if default is not None]
        arguments.kwonlyargs, arguments.kw_defaults = [], []
        source, filename = ast.unparse(tree), f"<scriptable {function.__qualname__}>"
        # TorchScript reads sources, not code: linecache is where it finds this one.
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        scope: Dict[str, Callable[..., Any]] = {}
        exec(compile(source, filename, "exec"), function.__globals__, scope)
        return scope[function.__name__]

    function.__prepare_scriptable__ = without_star  # type: ignore[attr-defined]
    return function
