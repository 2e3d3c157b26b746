"""Which of two ways an eager call takes: the pybind11 module (a microsecond) or ``torch.ops`` (several)."""

import torch
from torch.overrides import has_torch_function

from . import _C as bound

__all__ = ["bound", "use_bound"]


@torch.jit.unused
def use_bound(*arguments: object) -> bool:
    """Whether nothing that sits above the dispatcher (a compiler, a trace, ``__torch_function__``) must see the op."""
    return not (torch.compiler.is_compiling() or has_torch_function(arguments) or torch.jit.is_tracing())
