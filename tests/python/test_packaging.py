"""The package as C++ projects find it: from a wheel, an editable install, CMake's install, and as a folder."""

import email
import math
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from building import BUILD, ROOT, attempt, build_project, configure, run
from masked_loss import _build

CONSUMER = ROOT / "tests" / "consumer"
TORCH = Path(torch.__file__).resolve().parent
MINOR = ".".join(torch.__version__.split(".")[:2])


def cmake_dir(**environment):
    return Path(run(sys.executable, "-m", "masked_loss", "--cmake-dir", **environment).strip())


@pytest.fixture(scope="module")
def wheel():
    wheels = BUILD / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels, ROOT)
    (wheel,) = wheels.iterdir()
    return wheel


@pytest.fixture(scope="module")
def site(wheel):
    """A folder like site-packages: a wheel of masked_loss, with torch beside it."""
    site = BUILD / "site"
    shutil.rmtree(site, ignore_errors=True)
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel)
    (site / "torch").symlink_to(TORCH)
    return site


@pytest.fixture(scope="module")
def standalone():
    """What CMake installs of a build without Python."""
    build, prefix = BUILD / "standalone-build", BUILD / "standalone"
    shutil.rmtree(prefix, ignore_errors=True)
    build_project(ROOT, build, MASKED_LOSS_PYTHON="OFF", CMAKE_PREFIX_PATH=TORCH)
    run("cmake", "--install", build, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    """A saved module, and what Python prints of it."""
    path = tmp_path_factory.mktemp("torchscript") / "sequence_loss.pt"
    return path, run(sys.executable, ROOT / "examples" / "torchscript.py", path).splitlines()[0]


def options_for(kind, request):
    """How the consumer is told where masked_loss is."""
    if kind == "wheel":
        return {"CMAKE_PREFIX_PATH": cmake_dir(PYTHONPATH=request.getfixturevalue("site"))}
    if kind == "environment":  # editable, in `make test`
        return {"CMAKE_PREFIX_PATH": cmake_dir()}
    if kind == "standalone":
        return {"CMAKE_PREFIX_PATH": request.getfixturevalue("standalone")}
    return {"MASKED_LOSS_SOURCE_DIR": ROOT, "CMAKE_PREFIX_PATH": TORCH}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "environment", "standalone", "subdirectory"])
def test_cpp_consumer(kind, request, torchscript):
    build = BUILD / kind
    build_project(CONSUMER, build, "train", "run_torchscript", **options_for(kind, request))

    # Links the ops, calls nothing: the very numbers that Python prints.
    path, expected = torchscript
    assert run(build / "run_torchscript", path).strip() == expected

    steps = re.findall(r"step +(\d+)  loss (\S+)  on the kept positions alone (\S+)", run(build / "train"))
    losses = [float(loss) for _, loss, _ in steps]
    assert [int(step) for step, _, _ in steps] == [0, 50, 100, 150, 200]
    assert losses[0] == pytest.approx(math.log(23), rel=0.1)  # 23 tokens, nothing learnt yet
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]
    for _, loss, kept in steps:
        assert float(loss) == pytest.approx(float(kept), rel=1e-5, abs=2e-6)


@pytest.mark.slow
def test_wheel(site):
    package = site / "masked_loss"
    code = "import masked_loss, torch; print(masked_loss.__file__, masked_loss.causal_mask(2).sum().item())"
    file, kept = run(sys.executable, "-c", code, PYTHONPATH=site).split()
    assert Path(file).parent == package
    assert kept == "3"
    assert cmake_dir(PYTHONPATH=site) == package
    assert Path(run(sys.executable, "-m", "masked_loss", "--library", PYTHONPATH=site).strip()).is_file()
    assert run(sys.executable, "-m", "masked_loss", "--version", PYTHONPATH=site) == (ROOT / "VERSION").read_text()

    headers = {file.name for file in (ROOT / "csrc" / "include" / "masked_loss").iterdir()}
    assert {file.name for file in (package / "include" / "masked_loss").iterdir()} == headers
    assert {"py.typed", "_C.pyi"} <= {file.name for file in package.iterdir()}


@pytest.mark.slow
def test_wheel_is_small_and_described(wheel):
    if not _build.cuda_architectures:  # kernels for several GPUs are large
        assert wheel.stat().st_size < 5e6
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(files.read(name))
        folders = {name.split("/")[0] for name in files.namelist()}
    # Nothing of the sources but the headers.
    assert folders == {"masked_loss", f"masked_loss-{metadata['Version']}.dist-info"}
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("Requires-Dist") == [f"torch=={MINOR}.*"]


@pytest.mark.slow
def test_wheel_needs_torch_and_the_system_alone(site):
    ours, system = {"libmasked_loss.so"}, {"libc.so.6", "libgcc_s.so.1", "libm.so.6", "libstdc++.so.6"}
    for library in [*(site / "masked_loss").glob("_C*.so"), site / "masked_loss" / "lib" / "libmasked_loss.so"]:
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library)))
        others = {name for name in needed - ours - system if not name.startswith("ld-linux")}
        assert all((TORCH / "lib" / name).exists() or name.startswith("libcudart") for name in others), others


def test_import_is_quick():
    code = "import time, torch; start = time.perf_counter(); import masked_loss; print(time.perf_counter() - start)"
    # The least of several: others may use this machine.
    assert min(float(run(sys.executable, "-c", code)) for _ in range(4)) < 0.05


@pytest.mark.slow
def test_wheel_has_no_path_of_this_machine(site):
    (module,) = (site / "masked_loss").glob("_C*.so")
    for library, expected in (
        (module, "$ORIGIN/lib"),
        (site / "masked_loss" / "lib" / "libmasked_loss.so", "$ORIGIN/../../torch/lib"),
    ):
        dynamic = run("readelf", "-d", library)
        assert re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic) == [expected]
    for file in (site / "masked_loss" / "lib" / "cmake" / "MaskedLoss").iterdir():
        assert str(ROOT) not in file.read_text() and str(TORCH) not in file.read_text()


@pytest.mark.slow
def test_standalone_needs_no_python(standalone):
    cache = (BUILD / "standalone-build" / "CMakeCache.txt").read_text()
    assert not re.search(r"^_?Python", cache, re.MULTILINE)
    dynamic = run("readelf", "-d", standalone / "lib" / "libmasked_loss.so")
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed and not any("python" in library for library in needed)


@pytest.fixture
def other_torch(tmp_path):
    """A CMake package Torch of a version that does not exist."""
    (tmp_path / "TorchConfig.cmake").write_text("")
    (tmp_path / "TorchConfigVersion.cmake").write_text(
        "set(PACKAGE_VERSION 2.99.0)\nset(PACKAGE_VERSION_COMPATIBLE 1)\n"
    )
    return tmp_path


def test_cmake_refuses_another_torch(other_torch):
    result = attempt(*configure(CONSUMER, other_torch / "b", CMAKE_PREFIX_PATH=cmake_dir(), Torch_DIR=other_torch))
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert f"masked_loss was built for torch {MINOR}, but torch 2.99.0 was found" in message


def test_build_refuses_an_old_torch(other_torch):
    version = other_torch / "TorchConfigVersion.cmake"
    version.write_text(version.read_text().replace("2.99", "2.10"))
    result = attempt(*configure(ROOT, other_torch / "b", MASKED_LOSS_PYTHON="OFF", Torch_DIR=other_torch))
    assert result.returncode != 0
    assert "masked_loss needs torch 2.11 or newer, found 2.10.0" in " ".join(result.stderr.split())


def test_an_isolated_build_says_what_to_do():
    """As pip asks for the metadata in an environment without torch, before it fetches anything."""
    code = f"""
import importlib.metadata, runpy, sys
def version(name): raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version, sys.argv = version, ["setup.py", "dist_info"]
runpy.run_path({str(ROOT / "setup.py")!r})
"""
    result = attempt(sys.executable, "-c", code)
    assert result.returncode != 0
    assert result.stderr.startswith("masked_loss: expected torch in the environment that builds")
    assert "`pip install --no-build-isolation .`" in result.stderr


def test_import_refuses_another_torch():
    code = "import torch; torch.__version__ = '2.99.0'; import masked_loss"
    result = attempt(sys.executable, "-c", code)
    assert result.returncode != 0
    assert re.search(
        r"ImportError: masked_loss \S+ was built for torch \S+ and cannot be loaded by torch 2.99.0", result.stderr
    )
