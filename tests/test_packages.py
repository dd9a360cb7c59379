"""What is handed out: an sdist that holds all a build needs, and the same wheel from it as from the tree."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import accel

ROOT = Path(__file__).resolve().parent.parent
NAME = f"accel_kernels-{accel.__version__}"
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def run(command, folder, **environment):
    """``command`` in ``folder``, by default without the native part."""
    environment = {**os.environ, "ACCEL_SKIP_NATIVE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    environment.setdefault("ACCEL_REQUIRE_NATIVE", "0")
    child = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=folder)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-3000:]


def built(source, folder, **environment):
    """The wheel of a tree or an sdist: its files."""
    folder.mkdir()
    options = ["--no-build-isolation", "--no-deps", "--no-index"]
    run(["-m", "pip", "wheel", *options, "-w", folder, source], folder, **environment)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith(f"{NAME}-"), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info for info in archive.infolist()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what would be committed."""
    for package in ("setuptools", "wheel", "pip"):
        try:
            importlib.metadata.version(package)  # looking for pip's module takes setuptools' own distutils away
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("source") / "tree"
    hidden = shutil.ignore_patterns(".*", "*.so", "__pycache__", "build", "dist", "*.egg-info", "reports")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=hidden)
    return folder


@pytest.fixture(scope="module")
def sdist(tree):
    run(["-c", BUILD_SDIST, tree.parent], tree)
    return tree.parent / f"{NAME}.tar.gz"


@pytest.fixture(scope="module")
def wheel(tree):
    return built(tree, tree.parent / "wheel")


def files(floor):
    """A floor's files, as they are named in the tree."""
    found = (path for path in (ROOT / floor).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


def test_the_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        members = {member.name.removeprefix(f"{NAME}/"): member for member in archive if not member.isdir()}
    needed = files("csrc") | {f for floor in ("kernels", "benchmarks") for f in files(floor) if f.endswith(".py")}
    needed |= {"setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "CHANGELOG.md"}
    assert needed <= members.keys(), f"missing: {needed - members.keys()}"
    assert not [name for name in members if name.startswith(("accel/kernels", "accel/benchmarks"))], "links followed"
    assert not [name for name in members if name.endswith((".so", ".o", ".pyc", "_build_log.txt"))]
    assert all(member.isfile() for member in members.values()), "a wheel must not depend on links"
    assert not [name for name in members if name.startswith(("tests/", "benchmarks/results/"))]


def test_the_wheel_of_the_sdist_is_that_of_the_tree(sdist, wheel):
    found = built(sdist, sdist.parent / "wheel_of_sdist")
    record = f"{NAME}.dist-info/RECORD"  # in the order of the file system
    assert found.keys() == wheel.keys()
    assert {n: i.CRC for n, i in found.items() if n != record} == {n: i.CRC for n, i in wheel.items() if n != record}


@pytest.mark.slow
def test_the_native_part_is_built_from_the_sdist(sdist):
    native = {"ACCEL_SKIP_NATIVE": "0", "ACCEL_REQUIRE_NATIVE": "1", "ACCEL_SKIP_CUDA": "1"}
    found = built(sdist, sdist.parent / "native", **native)
    assert [name for name in found if name.startswith("accel/_C.")]


def test_the_wheel_installs_accel_and_nothing_else(wheel):
    assert {name.split("/")[0] for name in wheel} == {"accel", f"{NAME}.dist-info"}


def test_the_wheel_holds_what_the_links_point_to(wheel):
    expected = ["accel/py.typed", "accel/__main__.py", "accel/doctor.py", "accel/testing/checks.py"]
    for floor in ("accel/ops", "accel/nn", "accel/patches", "kernels", "benchmarks"):
        within = "" if floor.startswith("accel/") else "accel/"
        expected += [f"{within}{name}" for name in files(floor) if name.endswith(".py")]
    for name in [*expected, "accel/kernels/windows/window_attention.py", "accel/benchmarks/harness.py"]:
        assert name in wheel, f"{name} is not in the wheel"
        assert not (wheel[name].external_attr >> 16) & 0o020000, f"{name} is a link"
        assert wheel[name].file_size > 0 or name.endswith(("py.typed", "__init__.py")), f"{name} is empty"
