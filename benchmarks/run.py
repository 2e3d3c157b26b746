"""Times masked_loss and its peers: every family, or those that are named. `make bench` runs all of them."""

import argparse
from importlib import import_module
from pathlib import Path

import torch
from common import CORES, measure, start
from report import machine, report, write_json
from tqdm import tqdm

FAMILIES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help=f"among {', '.join(FAMILIES)}")
    parser.add_argument("--filter", default="", help="only cases with this in their names")
    parser.add_argument("--group", help="only cases of this group")
    parser.add_argument("--threads", type=int, default=len(CORES))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the benchmarks run")
    parser.add_argument("--json", type=Path, help="write the numbers, and of what machine they are")
    parser.add_argument("--plots", type=Path, help="draw into this folder")
    chosen = parser.parse_args()
    for name in chosen.families:
        if name not in FAMILIES:
            parser.error(f"expected families among {FAMILIES}, got {name}")
    return chosen


def main() -> None:
    chosen = options()
    start(chosen.threads)
    device = torch.device("cpu")
    results = []
    for family in chosen.families or FAMILIES:
        module = import_module(f"bench_{family}")
        cases = [
            case
            for case in module.cases(chosen.tiny)
            if chosen.filter in case.name and chosen.group in (None, case.group)
        ]
        measured = []
        for case in tqdm(cases, desc=family, disable=None):
            measured.append(measure(case, device, 0.0 if chosen.tiny else chosen.seconds, chosen.threads))
        if chosen.plots is not None and hasattr(module, "draw"):
            chosen.plots.mkdir(parents=True, exist_ok=True)
            module.draw(measured).savefig(chosen.plots / f"{family}_{device.type}.png", dpi=110)
        results += measured
    described = machine(device, chosen.threads)
    print(*(f"{key}: {value}" for key, value in described.items()), "", report(results), sep="\n")
    if chosen.json is not None:
        write_json(chosen.json, results, described)


if __name__ == "__main__":
    main()
