"""The layout and the package: names that belong together, imports that cannot fail, and what a wheel holds."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import accel
from accel import dispatch

ROOT = Path(__file__).resolve().parent.parent
OPS = {p.stem for p in (ROOT / "accel" / "ops").glob("*.py") if not p.stem.startswith("_")}

# files of the frame itself; everything else in these folders is named after an op
FRAME = {
    "tests": {
        *("conftest", "test_dispatch", "test_doctor", "test_frame", "test_philox", "test_testing"),
        *("test_benchmarks", "test_nn", "test_patch"),
    },
    "benchmarks": {"harness", "models", "report", "run", "test_rows"},
    "kernels": set(),
    "csrc/cpu": set(),
    "csrc/cuda": set(),
}


def strays(folder):
    """Files of ``folder`` that name neither an op nor a part of the frame."""
    found = []
    for path in sorted((ROOT / folder).iterdir()) if (ROOT / folder).is_dir() else []:
        name = path.stem if path.is_file() else path.name
        if path.suffix not in (".py", ".cpp", ".cu", ".h", ".cuh", "") or name.startswith(("_", ".")):
            continue
        if path.is_dir() and not any(path.glob("*.[pchc]*")):
            continue  # data, as benchmarks/results
        of_op = any(name in (op, f"test_{op}") or name.startswith(f"test_{op}_") for op in OPS)
        if not of_op and name not in FRAME[folder]:
            found.append(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("folder", FRAME)
def test_every_file_names_an_op_or_a_part_of_the_frame(folder):
    assert OPS, "accel/ops is empty"
    assert not strays(folder), f"ops: {sorted(OPS)}"


def test_every_op_is_registered_and_public():
    assert set(dispatch.OPS) == OPS
    for name, op in dispatch.OPS.items():
        assert getattr(accel, name).__name__ == name
        assert name in accel.__all__
        assert op.backends[-1].name == "reference", "what runs everywhere comes last"
        assert (ROOT / "tests" / f"test_{name}.py").is_file()


def test_kernels_is_no_package():
    # transformers and diffusers import a top-level package of that name, and would find ours
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in ("kernels", "benchmarks"):
        link = ROOT / "accel" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


BLOCKED = """
import sys

OTHERS = ("triton", "torchvision", "transformers", "timm", "rich", "matplotlib", "psutil", "packaging")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OTHERS or name == "accel._C":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
before = set(sys.modules)
import accel
print(accel.__version__)
print(sorted({n.split(".")[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(accel.explain(accel.window_attention, torch.zeros(1, 4, 4, 24), num_heads=2, window_size=(4, 4)))
x = torch.randn(1, 4, 4, 24, requires_grad=True)
accel.window_attention(x, num_heads=2, window_size=(4, 4)).sum().backward()
print(x.grad.shape)
"""


def test_import_needs_torch_alone():
    child = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stderr[-3000:]
    version, imported, *explained, shape = child.stdout.splitlines()
    assert version == accel.__version__
    assert "accel" in imported
    for name in ("triton", "torchvision", "transformers", "timm", "rich"):
        assert f"'{name}'" not in imported
    assert "    cpu: accel._C did not load: ImportError: accel._C is blocked" in explained
    assert " -> reference: can run this call" in explained
    assert shape == "torch.Size([1, 4, 4, 24])"


def test_transformers_imports_from_the_root():
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    code = """
import accel
from accel.benchmarks._torchvision import allow_import
try:
    allow_import()  # transformers imports torchvision where it is installed
except ModuleNotFoundError:
    pass
import transformers.models.llama.modeling_llama as m
print(m.LlamaAttention.__name__)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.splitlines()[-1] == "LlamaAttention"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel built, without the native part, from a copy of what would be committed."""
    for package in ("setuptools", "wheel", "pip"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    hidden = shutil.ignore_patterns(".*", "*.so", "__pycache__", "build", "dist", "*.egg-info", "reports")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=hidden)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        folder,
        tree,
    ]
    environment = {**os.environ, "ACCEL_SKIP_NATIVE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("ACCEL_REQUIRE_NATIVE", None)
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    assert built.name.startswith(f"accel_kernels-{accel.__version__}-"), built.name
    with zipfile.ZipFile(built) as archive:
        return {info.filename: info for info in archive.infolist()}


def test_the_wheel_installs_accel_and_nothing_else(wheel):
    assert {name.split("/")[0] for name in wheel} == {"accel", f"accel_kernels-{accel.__version__}.dist-info"}


def test_the_wheel_holds_what_the_links_point_to(wheel):
    expected = ["accel/py.typed", "accel/__main__.py", "accel/doctor.py", "accel/testing.py"]
    expected += [f"accel/ops/{op}.py" for op in OPS]
    for folder in ("kernels", "benchmarks"):
        expected += [f"accel/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")]
    for name in [*expected, "accel/kernels/window_attention.py", "accel/benchmarks/harness.py"]:
        assert name in wheel, f"{name} is not in the wheel"
        assert not (wheel[name].external_attr >> 16) & 0o020000, f"{name} is a link"
        assert wheel[name].file_size > 0 or name.endswith(("py.typed", "__init__.py")), f"{name} is empty"


def test_there_is_one_version():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "accel._version.__version__" }' in text
    assert f'__version__ = "{accel.__version__}"' in (ROOT / "accel" / "_version.py").read_text()
    try:
        installed = importlib.metadata.version("accel-kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == accel.__version__, "an older version is installed; install again"
