"""AOTInductor packages with our ops: compiled once for every size, run by Python and by a program without Python."""

import importlib.util
import re
import sys

import pytest
import torch

import masked_loss
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


class Student(torch.nn.Module):
    """What the linear functions say of a head, and functions of all dimensions; the number of rows is the batch's."""

    def __init__(self):
        super().__init__()
        self.head, self.teacher = torch.nn.Linear(8, 11), torch.nn.Linear(6, 11)

    def forward(self, hidden, teacher_hidden, target, mask):
        head, teacher = self.head, self.teacher
        loss = masked_loss.linear_cross_entropy(hidden, head.weight, target, mask, linear_bias=head.bias)
        log_prob, entropy = masked_loss.linear_log_prob_and_entropy(hidden, head.weight, target, mask)
        kl = masked_loss.linear_kl(hidden, head.weight, teacher_hidden, teacher.weight, mask)
        # An empty list of dimensions is lost on the way to a package.
        of_all = [function(entropy, mask) for function in (masked_loss.masked_mean, masked_loss.masked_whiten)]
        return loss, log_prob, entropy, kl, *of_all, masked_loss.logsumexp(hidden, mask[:, None], dim=())


@pytest.mark.slow
def test_linear_functions_and_reductions(tmp_path):
    def batch(size):
        mask = torch.arange(size) % 3 != 1
        return torch.randn(size, 8), torch.randn(size, 6), torch.randint(11, (size,)), mask

    model, size = Student().eval(), torch.export.Dim("size", min=2)
    with torch.no_grad():
        exported = torch.export.export(model, batch(5), dynamic_shapes=[{0: size}] * 4)
        compiled = torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "student.pt2"))
        )
        for count in (2, 64):
            inputs = batch(count)
            for ours, expected in zip(compiled(*inputs), model(*inputs), strict=True):
                assert_same_bits(ours, expected)
