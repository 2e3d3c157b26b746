"""What every benchmark shares: interleaved timing of ours and a peer in one process, and the table."""

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, List

import torch


@dataclass
class Row:
    case: str
    peer: str
    ours_ms: float  # medians
    peer_ms: float
    ratio: float  # the median of the rounds' ratios: how many times faster ours is


def _seconds(call: Callable[[], object], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def compare(case: str, peer: str, ours: Callable[[], object], theirs: Callable[[], object], seconds: float) -> Row:
    """Times the two in turns, for about `seconds` in all; a short call is repeated within its turn."""
    for warm_up in (ours, theirs):
        warm_up()
    once = max(_seconds(ours, 1), _seconds(theirs, 1))
    repeat = max(1, int(2e-3 / once))
    rounds = min(100, max(5, int(seconds / (2 * once * repeat))))
    pairs = [(_seconds(ours, repeat), _seconds(theirs, repeat)) for _ in range(rounds)]
    ours_ms, peer_ms = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return Row(case, peer, ours_ms, peer_ms, statistics.median(t / o for o, t in pairs))


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the benchmark runs")
    parser.add_argument("--output", type=Path, help="write the rows, and the machine, as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    return chosen


def report(rows: List[Row], chosen: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {chosen.threads} threads\n")
    print("| case | peer | ours, ms | peer, ms | times faster |")
    print("| --- | --- | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {row.case} | {row.peer} | {row.ours_ms:.4g} | {row.peer_ms:.4g} | {row.ratio:.2f} |")
    if chosen.output:
        machine = {
            "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": chosen.threads,
            "machine": platform.machine(),
            "python": platform.python_version(),
        }
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1))
