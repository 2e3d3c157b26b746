"""Writes the tables of speedups in README.md and docs/performance.md: `python docs/speedups.py`.

The numbers are those of the file in benchmarks/results that docs/performance.md names, which `make bench` wrote.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BETWEEN = re.compile(r"(?<=<!-- docs/speedups.py writes from here -->\n).*(?=<!-- to here -->)", re.DOTALL)
PEERS = {"eager": "eager", "eager, huge pages": "eager, huge pages", "torch.compile": "`torch.compile`"}

BOTH = "forward+backward"


class Row(NamedTuple):
    label: str
    case: str
    in_readme: bool = False
    eager: str = "eager"  # the peer in this column


ROWS = [
    Row("`cross_entropy` 2048 × 32000, forward", "cross_entropy 2048x32000, float32, forward", True),
    Row("`cross_entropy` 2048 × 32000", f"cross_entropy 2048x32000, float32, {BOTH}", True),
    Row("`cross_entropy` 2048 × 32000, half masked", f"cross_entropy 2048x32000, float32, {BOTH}, 50% masked", True),
    Row(
        "the same, over boolean indexing",
        f"cross_entropy 2048x32000, float32, {BOTH}, 50% masked",
        eager="eager, boolean indexing",
    ),
    Row("`cross_entropy` 2048 × 32000, bfloat16", f"cross_entropy 2048x32000, bfloat16, {BOTH}", True),
    Row(
        "`cross_entropy` 2048 × 32000, class probabilities",
        f"cross_entropy 2048x32000, float32, {BOTH}, class probabilities",
    ),
    Row("`cross_entropy` 512 × 128256", f"cross_entropy 512x128256, float32, {BOTH}"),
    Row("`cross_entropy` 512 × 128256, bfloat16", f"cross_entropy 512x128256, bfloat16, {BOTH}"),
    Row("`cross_entropy` 16384 × 1000", f"cross_entropy 16384x1000, float32, {BOTH}"),
    Row("`cross_entropy` [32, 1000, 512], `dim=1`", f"cross_entropy 32x1000x512, dim=1, float32, {BOTH}"),
    Row("`cross_entropy` [64, 21, 64, 64], `dim=1`", f"cross_entropy 64x21x64x64, dim=1, float32, {BOTH}"),
    Row("`cross_entropy` 8 × 10, forward", "cross_entropy 8x10, float32, forward"),
    Row("`cross_entropy` 8 × 10", f"cross_entropy 8x10, float32, {BOTH}", True),
    Row("`mse_loss` 2²⁴, half masked", f"mse_loss 16777216, float32, {BOTH}", True),
    Row("`mse_loss` 2²⁴, half masked, bfloat16", f"mse_loss 16777216, bfloat16, {BOTH}"),
    Row("`huber_loss` 2²⁴, half masked", f"huber_loss 16777216, float32, {BOTH}"),
    Row("`huber_loss` 2²⁴, half masked, bfloat16", f"huber_loss 16777216, bfloat16, {BOTH}"),
    Row(
        "`binary_cross_entropy_with_logits` 2²⁴, half masked",
        f"binary_cross_entropy_with_logits 16777216, float32, {BOTH}",
    ),
    Row(
        "`binary_cross_entropy_with_logits` 2²⁴, half masked, bfloat16",
        f"binary_cross_entropy_with_logits 16777216, bfloat16, {BOTH}",
    ),
    Row("`softmax` 8192 × 2048, half masked", f"softmax 8192x2048, float32, dense mask, {BOTH}", True),
    Row("`softmax` 8192 × 2048, half masked, bfloat16", f"softmax 8192x2048, bfloat16, dense mask, {BOTH}"),
    Row("`log_softmax` 8192 × 2048, half masked", f"log_softmax 8192x2048, float32, dense mask, {BOTH}"),
    Row("`log_softmax` 8192 × 2048, half masked, bfloat16", f"log_softmax 8192x2048, bfloat16, dense mask, {BOTH}"),
    Row("`softmax` [8, 16, 512, 512], causal", f"softmax 8x16x512x512, float32, causal mask, {BOTH}"),
    Row("`masked_mean` 2²⁴, half masked, forward", "masked_mean 16777216, float32, forward", True),
    Row("`masked_sum` 2²⁴, half masked, forward", "masked_sum 16777216, float32, forward"),
    Row("`masked_fill` 2048 × 32000, a mask of rows, forward", "masked_fill 2048x32000, float32, row mask"),
    Row("`masked_fill` 2048 × 32000, a mask of elements, forward", "masked_fill 2048x32000, float32, full mask"),
    Row("`masked_fill_` 2048 × 32000, a mask of rows, forward", "masked_fill_ 2048x32000, float32, row mask"),
    Row("`masked_fill_` 2048 × 32000, a mask of elements, forward", "masked_fill_ 2048x32000, float32, full mask"),
]


def measured_on(machine: dict) -> str:
    commit = f" at commit `{machine['commit']}`" if "commit" in machine else ""
    return (
        f"Measured with `make bench`{commit}: torch {machine['torch']}, {machine['threads']} threads, "
        f"{machine['processor']} ({machine['instructions']})."
    )


def table(rows: list[dict], short: bool) -> list[str]:
    ratios = {(row["case"], row["peer"]): row["ratio"] for row in rows}
    bandwidths = {row["case"]: f"{row['bandwidth']:.0%} of a {row['bandwidth_of']}" for row in rows if row["bandwidth"]}
    header = ["speedup over", *PEERS.values(), *([] if short else ["bandwidth"])]
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    for row in ROWS:
        if row.in_readme or not short:
            found = [ratios.get((row.case, row.eager if peer == "eager" else peer)) for peer in PEERS]
            cells = ["" if ratio is None else f"{ratio:.1f} ×" for ratio in found]
            cells += [] if short else [bandwidths.get(row.case, "")]
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return lines


def updated() -> dict[Path, str]:
    """The text of each page with its table."""
    name = re.search(r"^\.\. benchmarks:: (\S+)$", PAGE.read_text(), re.MULTILINE)[1]
    results = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    pages = {}
    for page in (README, PAGE):
        lines = ["", measured_on(results["machine"]), "", *table(results["rows"], page == README), "", ""]
        pages[page] = BETWEEN.sub(lambda _, lines=lines: "\n".join(lines), page.read_text())
    return pages


if __name__ == "__main__":
    for page, text in updated().items():
        page.write_text(text)
