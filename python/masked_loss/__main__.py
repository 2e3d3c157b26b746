"""``python -m masked_loss``: describes the installation, and inspects a saved batch."""

import argparse
import sys
from pathlib import Path

import torch

from . import __version__, _build
from .paths import cmake_prefix_path, library_path


def build_info() -> str:
    """What the library was built for, and which kernels run on this machine."""
    compiled = _build.cpu_capabilities.split(";")
    capability = torch.backends.cpu.get_cpu_capability()
    used = capability if capability in compiled else "DEFAULT"
    architectures = _build.cuda_architectures.replace(";", ", ")
    return "\n".join(
        [
            f"masked_loss {__version__}",
            f"torch: built for {_build.built_for_torch}, running with {torch.__version__}",
            f"CPU kernels: {', '.join(compiled)}; {used} runs here",
            f"CUDA kernels: {f'for {architectures}' if architectures else 'none'}",
            f"library: {library_path}",
        ]
    )


def count(text: str) -> int:
    """A number that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text}")
    return int(text)


def arguments() -> argparse.Namespace:
    """The command line, which asks for one thing."""
    parser = argparse.ArgumentParser(prog="python -m masked_loss", description=__doc__.replace("``", "`"))
    parser.add_argument("--version", action="version", version=__version__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--info",
        action="store_true",
        help="print the torch version, CUDA architectures and instruction sets of the build",
    )
    choice.add_argument("--cmake-dir", action="store_true", help="print the folder to add to CMAKE_PREFIX_PATH")
    choice.add_argument(
        "--library", action="store_true", help="print the path of the shared library that registers the ops"
    )
    inspect = parser.add_subparsers(dest="command").add_parser(
        "inspect", help="report which positions of a saved batch count"
    )
    inspect.add_argument("batch", type=Path, help="file of torch.save: a dict of logits, targets (or labels) and mask")
    inspect.add_argument("--dim", type=int, help="the class dimension, if the shapes are ambiguous")
    inspect.add_argument(
        "--limit",
        type=count,
        default=12,
        help="the most sequences, and positions of a sequence, that are printed (default: 12)",
    )
    inspect.add_argument("--picture", type=Path, help="file of the picture (default: the name of the batch with .png)")
    inspect.add_argument("--no-picture", action="store_true", help="draw nothing")
    chosen = parser.parse_args()
    if (chosen.info or chosen.cmake_dir or chosen.library) == bool(chosen.command):
        parser.error("expected one of inspect, --info, --cmake-dir, --library and --version")
    return chosen


def main() -> None:
    """Runs the command line."""
    chosen = arguments()
    if chosen.command == "inspect":
        from . import _inspect

        picture = None if chosen.no_picture else chosen.picture or chosen.batch.with_suffix(".png")
        sys.exit(_inspect.run(chosen.batch, chosen.dim, chosen.limit, picture))
    print(build_info() if chosen.info else cmake_prefix_path if chosen.cmake_dir else library_path)


if __name__ == "__main__":
    main()
