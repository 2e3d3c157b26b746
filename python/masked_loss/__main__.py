"""``python -m masked_loss``: what a build system asks of the package."""

import argparse

from . import __version__
from .paths import cmake_prefix_path, library_path


def main() -> None:
    """Prints what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m masked_loss", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--cmake-dir", action="store_true", help="print what to add to CMAKE_PREFIX_PATH")
    choice.add_argument("--library", action="store_true", help="print the shared library that registers the ops")
    arguments = parser.parse_args()
    print(cmake_prefix_path if arguments.cmake_dir else library_path)


if __name__ == "__main__":
    main()
