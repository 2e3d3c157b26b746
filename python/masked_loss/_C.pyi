"""Each op as a function of all of its arguments, in the order of its schema."""

from collections.abc import Callable

from torch import Tensor

def __getattr__(name: str) -> Callable[..., Tensor]: ...
