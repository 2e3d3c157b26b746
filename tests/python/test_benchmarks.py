"""The benchmarks run, at sizes that show nothing but that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_a_benchmark_runs(script, tmp_path):
    output = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, script, "--tiny", "--output", output], capture_output=True, text=True, check=True
    )
    rows = json.loads(output.read_text())["rows"]
    assert rows
    assert all(row["ours_ms"] > 0 and row["peer_ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert all(row["case"] in done.stdout for row in rows)
