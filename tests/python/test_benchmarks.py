"""The benchmarks run, at sizes that show nothing but that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

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


def test_the_benchmark_of_a_gpu_runs(tmp_path):
    options = ["--device", "cpu", "--tiny", "--output", tmp_path]
    subprocess.run([sys.executable, BENCHMARKS / "run_cuda.py", *options], capture_output=True, check=True)
    (output,) = tmp_path.glob("cuda_*.json")
    assert {row["case"].split()[0] for row in json.loads(output.read_text())["rows"]} >= {"softmax", "masked_mean"}
