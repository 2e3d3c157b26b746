"""The benchmarks run, at sizes that show nothing but that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAMILIES = sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_benchmark_runs(family, tmp_path):
    output = tmp_path / "rows.json"
    command = [sys.executable, BENCHMARKS / "run.py", family, "--tiny", "--json", output, "--plots", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(output.read_text())
    assert found["machine"]["torch"]
    assert found["rows"]
    for row in found["rows"]:
        assert row["ours_ms"] > 0
        assert row["peer_ms"] > 0
        assert row["ratio"] > 0
        assert row["case"] in done.stdout
    assert family != "cross_entropy" or (tmp_path / "cross_entropy_cpu.png").stat().st_size > 10_000
