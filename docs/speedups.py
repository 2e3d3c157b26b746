"""Writes the tables of speedups in README.md and docs/performance.md: `python docs/speedups.py`.

The numbers are those of the file in benchmarks/results that docs/performance.md names, which `make bench` wrote.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BETWEEN = re.compile(r"(?<=<!-- docs/speedups.py writes from here -->\n).*(?=<!-- to here -->)", re.DOTALL)
PEERS = {"eager": "eager", "eager, huge pages": "eager, huge pages", "torch.compile": "`torch.compile`"}

BOTH = "forward+backward"
# What a row says, the name of its case, and whether README has it too.
ROWS = [
    ("`cross_entropy` 2048 × 32000, forward", "cross_entropy 2048x32000, float32, forward", True),
    ("`cross_entropy` 2048 × 32000", f"cross_entropy 2048x32000, float32, {BOTH}", True),
    ("`cross_entropy` 2048 × 32000, half masked", f"cross_entropy 2048x32000, float32, {BOTH}, 50% masked", True),
    ("`cross_entropy` 2048 × 32000, bfloat16", f"cross_entropy 2048x32000, bfloat16, {BOTH}", True),
    (
        "`cross_entropy` 2048 × 32000, class probabilities",
        f"cross_entropy 2048x32000, float32, {BOTH}, class probabilities",
        False,
    ),
    ("`cross_entropy` 512 × 128256", f"cross_entropy 512x128256, float32, {BOTH}", False),
    ("`cross_entropy` 512 × 128256, bfloat16", f"cross_entropy 512x128256, bfloat16, {BOTH}", False),
    ("`cross_entropy` 16384 × 1000", f"cross_entropy 16384x1000, float32, {BOTH}", False),
    ("`cross_entropy` [32, 1000, 512], `dim=1`", f"cross_entropy 32x1000x512, dim=1, float32, {BOTH}", False),
    ("`cross_entropy` [64, 21, 64, 64], `dim=1`", f"cross_entropy 64x21x64x64, dim=1, float32, {BOTH}", False),
    ("`cross_entropy` 8 × 10, forward", "cross_entropy 8x10, float32, forward", False),
    ("`cross_entropy` 8 × 10", f"cross_entropy 8x10, float32, {BOTH}", True),
    ("`mse_loss` 2²⁴, half masked", f"mse_loss 16777216, float32, {BOTH}", True),
    ("`mse_loss` 2²⁴, half masked, bfloat16", f"mse_loss 16777216, bfloat16, {BOTH}", False),
    ("`huber_loss` 2²⁴, half masked", f"huber_loss 16777216, float32, {BOTH}", False),
    ("`huber_loss` 2²⁴, half masked, bfloat16", f"huber_loss 16777216, bfloat16, {BOTH}", False),
    (
        "`binary_cross_entropy_with_logits` 2²⁴, half masked",
        f"binary_cross_entropy_with_logits 16777216, float32, {BOTH}",
        False,
    ),
    (
        "`binary_cross_entropy_with_logits` 2²⁴, half masked, bfloat16",
        f"binary_cross_entropy_with_logits 16777216, bfloat16, {BOTH}",
        False,
    ),
    ("`softmax` 8192 × 2048, half masked", f"softmax 8192x2048, float32, dense mask, {BOTH}", True),
    ("`softmax` 8192 × 2048, half masked, bfloat16", f"softmax 8192x2048, bfloat16, dense mask, {BOTH}", False),
    ("`log_softmax` 8192 × 2048, half masked", f"log_softmax 8192x2048, float32, dense mask, {BOTH}", False),
    ("`log_softmax` 8192 × 2048, half masked, bfloat16", f"log_softmax 8192x2048, bfloat16, dense mask, {BOTH}", False),
    ("`softmax` [8, 16, 512, 512], causal", f"softmax 8x16x512x512, float32, causal mask, {BOTH}", False),
    ("`masked_mean` 2²⁴, half masked, forward", "masked_mean 16777216, float32, forward", True),
    ("`masked_sum` 2²⁴, half masked, forward", "masked_sum 16777216, float32, forward", False),
    ("`masked_fill` 2048 × 32000, a mask of rows", "masked_fill 2048x32000, float32, row mask", False),
    ("`masked_fill` 2048 × 32000, a mask of elements", "masked_fill 2048x32000, float32, full mask", False),
    ("`masked_fill_` 2048 × 32000, a mask of rows", "masked_fill_ 2048x32000, float32, row mask", False),
    ("`masked_fill_` 2048 × 32000, a mask of elements", "masked_fill_ 2048x32000, float32, full mask", False),
]


def measured_on(machine: dict) -> str:
    commit = f" at commit `{machine['commit']}`" if "commit" in machine else ""
    return (
        f"Measured with `make bench`{commit}: torch {machine['torch']}, {machine['threads']} threads, "
        f"{machine['processor']} ({machine['instructions']})."
    )


def table(rows: list[dict], short: bool) -> list[str]:
    ratios = {(row["case"], row["peer"]): row["ratio"] for row in rows}
    lines = [f"| speedup over | {' | '.join(PEERS.values())} |", f"| --- |{' ---: |' * len(PEERS)}"]
    for label, case, in_readme in ROWS:
        if in_readme or not short:
            found = [ratios.get((case, peer)) for peer in PEERS]
            lines.append(f"| {label} | {' | '.join('' if ratio is None else f'{ratio:.1f} ×' for ratio in found)} |")
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
