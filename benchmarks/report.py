"""What comes out of a run: a table, JSON with the machine's description, and pictures."""

import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from common import OURS, Result
from matplotlib.axes import Axes

COLORS = ["#d94801", "#4292c6", "#41ab5d"]


def commit() -> str:
    """Of the checkout that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device, threads: int) -> Dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine."""

    def read(path: str, key: str = "") -> str:
        try:
            found = [line for line in Path(path).read_text().splitlines() if line.startswith(key)]
        except OSError:
            found = []
        return found[0].removeprefix(key).strip("\t :") if found else "unknown"

    described = {
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": read("/proc/cpuinfo", "model name"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "memory": read("/proc/meminfo", "MemTotal"),
        "huge pages": read("/sys/kernel/mm/transparent_hugepage/enabled"),
    }
    if device.type == "cuda":
        described |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return described


def rows(result: Result) -> List[Dict[str, Any]]:
    """One for each peer of a case."""
    return [
        {
            "group": result.case.group,
            "case": result.case.name,
            "peer": peer,
            "ours_ms": 1e3 * result.median(OURS),
            "peer_ms": 1e3 * result.median(peer),
            "ratio": result.ratio(peer),
            "goal": result.case.goals.get(peer),
            "rounds": len(result.seconds[OURS]),
            "bandwidth": result.bandwidth(),
            "bandwidth_of": result.case.floor,
            "ours_memory": result.peak.get(OURS),
            "peer_memory": result.peak.get(peer),
        }
        for peer in result.peers()
    ]


def report(results: List[Result]) -> str:
    lines = [
        "| case | against | ours, ms | theirs, ms | times faster | goal | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        for row in rows(result):
            goal = row["goal"]
            judged = "|  |" if goal is None else f"{goal:.3g} | {'reached' if row['ratio'] >= goal else 'missed'} |"
            times = f"{row['ours_ms']:.4g} | {row['peer_ms']:.4g} | {row['ratio']:.2f}"
            lines.append(f"| {row['case']} | {row['peer']} | {times} | {judged}")
    lines += ["", "Bytes that must move, at a share of the bandwidth that a copy, or a read, has in the same run:", ""]
    lines += ["| case | share | of |", "| --- | ---: | --- |"]
    lines += [f"| {r.case.name} | {r.bandwidth():.0%} | {r.case.floor} |" for r in results if r.bandwidth() is not None]
    lines += ["", "Peak of the memory beyond what was held before the call, as a multiple of the input's:", ""]
    lines += ["| case | ours | goal, at most | |", "| --- | ---: | ---: | --- |"]
    for r in results:
        if (ours := r.peak.get(OURS)) is not None:
            peers = ", ".join(
                f"{name} {peak:.2f}" for name, peak in r.peak.items() if name != OURS and peak is not None
            )
            verdict = "reached" if ours <= r.case.most_memory else "missed"
            lines.append(f"| {r.case.name} | {ours:.3f} | {r.case.most_memory} | {verdict}; {peers} |")
    return "\n".join(lines)


def write_json(path: Path, results: List[Result], described: Dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [row for result in results for row in rows(result)]
    path.write_text(json.dumps({"machine": described, "rows": found}, indent=1) + "\n")


@dataclass
class Line:
    label: str
    results: List[Result]
    value: Callable[[Result], float]


def draw_lines(axes: Axes, title: str, xlabel: str, ylabel: str, lines: List[Line], doubling: bool = False) -> None:
    """Lines over what varies in a group of cases."""
    for color, line in zip(COLORS, lines, strict=False):
        points = [(result.case.x, line.value(result)) for result in line.results]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=line.label)
    if doubling:
        axes.set_xscale("log", base=2)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
