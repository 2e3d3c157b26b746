"""Where the C++ library of the package is installed."""

from pathlib import Path

from . import _C

# _C is installed next to lib/ and include/, also in an editable install.
_root = Path(_C.__file__).resolve().parent

#: The folder to add to ``CMAKE_PREFIX_PATH`` for ``find_package(MaskedLoss)``.
cmake_prefix_path = str(_root)
#: The shared library, for ``torch.ops.load_library`` or ``dlopen``.
library_path = str(_root / "lib" / "libmasked_loss.so")
