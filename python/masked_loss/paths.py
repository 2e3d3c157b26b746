"""Where the C++ side of the package lies."""

from pathlib import Path

from . import _C

# _C is found where the library was installed, which for an editable install too is beside lib/ and include/.
_root = Path(_C.__file__).resolve().parent

#: what to add to ``CMAKE_PREFIX_PATH`` for ``find_package(MaskedLoss)``
cmake_prefix_path = str(_root)
#: what ``torch.ops.load_library`` or ``dlopen`` takes
library_path = str(_root / "lib" / "libmasked_loss.so")
