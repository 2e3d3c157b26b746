"""AOTInductor packages with our ops: compiled once for every size, run by Python and by a program without Python."""

import importlib.util
import re
import sys

import pytest
import torch

from building import BUILD, ROOT, build_project, run
from reference import assert_same_bits

EXAMPLE = ROOT / "examples" / "aoti.py"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The example's package, and what Python prints of it."""
    path = tmp_path_factory.mktemp("aoti") / "evaluation.pt2"
    return path, run(sys.executable, EXAMPLE, path).splitlines()[0]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("aoti_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_python_runs_every_size(package, example):
    compiled = torch._inductor.aoti_load_package(str(package[0]))
    for size, time in ((3, 4), (6, 7), (40, 3), (2, 100)):
        inputs = example.batch(size, time)
        for ours, expected in zip(compiled(*inputs), example.Evaluation()(*inputs), strict=True):
            assert_same_bits(ours, expected)


@pytest.mark.slow
def test_targets_are_checked(package, example):
    logits, target, lengths = example.batch(3, 4)
    target[0, 0] = 5
    with pytest.raises(RuntimeError):  # of which AOTInductor tells only that a call failed
        torch._inductor.aoti_load_package(str(package[0]))(logits, target, lengths)


@pytest.mark.slow
def test_a_program_without_python(package):
    path, expected = package
    build = BUILD / "environment"
    prefix = run(sys.executable, "-m", "masked_loss", "--cmake-dir").strip()
    build_project(ROOT / "tests" / "consumer", build, "run_aoti", CMAKE_PREFIX_PATH=prefix)
    assert run(build / "run_aoti", path).strip() == expected
    loaded = run("ldd", build / "run_aoti")
    assert "libmasked_loss.so" in loaded and not re.search("libtorch_python|libpython", loaded)
