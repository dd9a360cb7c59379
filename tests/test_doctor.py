"""The doctor must speak where all else fails, and tell the machine that runs from the one that does not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from _absent import without

from accel import dispatch, doctor

ROOT = Path(__file__).resolve().parent.parent
BY_ITS_PATH = """
import sys

sys.argv[0] = {script!r}
sys.path.insert(0, {folder!r})
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""


def run(*arguments, absent=()):
    """The doctor in a process of its own, by its path, without some modules."""
    script = str(ROOT / "accel" / "doctor.py")
    code = without(*absent) + BY_ITS_PATH.format(script=script, folder=str(ROOT / "accel"))
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd="/")


@pytest.fixture
def works(monkeypatch):
    """A native extension that loads, whether or not this machine has one."""

    class Extension:
        @staticmethod
        def build_info():
            return {"compiler": "g++ 12", "isa_built": ["portable", "avx2"], "isa": "avx2", "cuda_archs": ""}

    monkeypatch.setitem(dispatch._leaves, "accel._C", (Extension, None))


@pytest.fixture
def broken(monkeypatch):
    why = "accel._C did not load: ImportError: undefined symbol: aoti_torch_x"
    monkeypatch.setitem(dispatch._leaves, "accel._C", (None, why))


def ask(capsys, *arguments):
    code = doctor.main(list(arguments))
    return code, capsys.readouterr().out


@pytest.mark.usefixtures("works")
def test_well(capsys):
    code, text = ask(capsys)
    assert code == 0
    assert "window_attention on cpu\n  cpu        yes\n" in text
    assert "isa_built       portable, avx2" in text
    assert "PROBLEM" not in text
    assert "  cuda       no: the tensors are on cpu\n" in text


@pytest.mark.usefixtures("works")
def test_json_is_the_same_report(capsys):
    code, text = ask(capsys, "--json")
    report = json.loads(text)
    assert code == 0
    assert report["versions"]["accel"] == doctor.installed("accel-kernels") or report["versions"]["accel"]
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["ops"]["window_attention"]["cpu"]["cpu"] == dict.fromkeys(doctor.DTYPES)
    assert set(report["ops"]) == set(dispatch.OPS)
    assert report["extension"]["build"]["isa"] == "avx2"
    assert report["cpu"]["torch_level"]


@pytest.mark.usefixtures("broken")
def test_a_broken_extension_is_a_problem_with_one_command(capsys):
    code, text = ask(capsys)
    assert code == 1
    assert "native extension  not loaded: accel._C did not load: ImportError: undefined symbol: aoti_torch_x" in text
    assert "  cpu        no: accel._C did not load" in text
    assert "  reference  yes" in text
    assert "PROBLEM: window_attention on cpu has only slow backends (cpu: accel._C did not load" in text
    problem = json.loads(ask(capsys, "--json")[1])["problems"][-1]
    assert problem["mend"].endswith("setup.py build_ext --inplace")
    assert str(ROOT) in problem["mend"]


@pytest.mark.usefixtures("broken")
def test_the_failed_build_is_told(capsys, monkeypatch, tmp_path):
    (tmp_path / "_build_log.txt").write_text("ninja: build stopped\nthe native extension was not built: no compiler\n")
    (tmp_path / "_version.py").write_text('__version__ = "9.9"\n')
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor, "compiler", lambda: None)
    code, text = ask(capsys)
    assert code == 1
    assert "build log" in text
    assert "the native extension was not built: no compiler" in text
    assert "to mend: install a C++20 compiler" in text
    assert "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir accel-kernels" in text
    assert "9.9" in text


def test_a_build_log_is_shown_by_its_first_error():
    said = "[1/2] x.o\nnvcc fatal   : Unsupported gpu architecture\nninja: build stopped: subcommand failed."
    report = {"loaded": True, "reason": None, "build": {"cuda_archs": ""}, "build_log": said}
    text = doctor.render({**doctor.examine(), "extension": report})
    assert re.search(r"build log +nvcc fatal   : Unsupported gpu architecture\n", text)


@pytest.mark.usefixtures("works")
def test_an_op_that_cannot_be_asked_is_a_problem(capsys, monkeypatch):
    def broken_example(device, dtype):
        raise RuntimeError("example fell over")

    op = dispatch.OPS["window_attention"]
    monkeypatch.setitem(
        dispatch.OPS, "window_attention", dispatch.Op(op.name, op.function, op.prepare, op.backends, broken_example)
    )
    code, text = ask(capsys)
    assert code == 1
    assert "window_attention on cpu in float32 cannot be asked: RuntimeError: example fell over" in text


@pytest.mark.usefixtures("works")
def test_cpu_torch_beside_a_cuda_torchvision_is_named(capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("torch is built for CUDA here")
    monkeypatch.setattr(doctor, "built_for_cuda", lambda package: "cu130" if package == "torchvision" else None)
    code, text = ask(capsys)
    assert code == 0, "accel itself runs"
    assert "note: torchvision is built for CUDA (cu130) and torch" in text
    assert "pip install --force-reinstall --no-deps torchvision (with the index" in text
    monkeypatch.setattr(doctor, "built_for_cuda", lambda package: None)
    assert "torchvision is built for CUDA" not in ask(capsys)[1]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("__version__ = '0.28.0+cu130'\n", "cu130"),
        ('__version__: str = "0.28.0+cu126"\n', "cu126"),
        ("__version__ = '0.28.0+cpu'\n", None),
        ("__version__ = '0.28.0'\ncuda = '13.0'\n", None),
        ("", None),
    ],
)
def test_a_package_is_told_by_its_version_file_and_not_imported(version, expected, tmp_path, monkeypatch):
    package = tmp_path / "some_vision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "version.py").write_text(version)
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.built_for_cuda("some_vision") == expected
    assert doctor.built_for_cuda("no_such_package") is None


def test_a_gpu_with_a_cpu_torch_is_named(capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("torch is built for CUDA here")
    seen = doctor.first_line
    monkeypatch.setattr(
        doctor, "first_line", lambda *c, **k: "GPU 0: NVIDIA H200" if c[0] == "nvidia-smi" else seen(*c, **k)
    )
    assert "note: this machine has GPU 0: NVIDIA H200 but torch" in ask(capsys)[1]


@pytest.mark.parametrize("toolkit", [None, "/opt/cuda/bin/nvcc"])
def test_a_gpu_without_cuda_kernels_is_told_why(toolkit, monkeypatch):
    class Extension:
        @staticmethod
        def build_info():
            return {"cuda_archs": "", "cuda_missing": "no nvcc was found at build time"}

    monkeypatch.setitem(dispatch._leaves, "accel._C", (Extension, None))
    monkeypatch.setattr(doctor, "nvcc", lambda: toolkit)
    monkeypatch.setattr(doctor, "_examine_op", lambda *args: {})
    report = {"devices": [{"name": "NVIDIA H200", "architecture": "sm_90"}], "extension": {}, "ops": {}, "problems": []}
    doctor._examine_accel(report, pytest.importorskip("torch"))
    (problem,) = report["problems"]
    assert problem["what"] == "the native extension has no CUDA kernels: no nvcc was found at build time"
    assert problem["mend"].endswith("setup.py build_ext --inplace")
    assert ("install the CUDA toolkit" in problem["mend"]) == (toolkit is None)
    assert not problem["fatal"], "Triton computes the same"


@pytest.mark.parametrize(
    ("absent", "words"),
    [
        (["torch"], "PROBLEM: torch does not import: ModuleNotFoundError: No module named 'torch'"),
        (
            ["accel.ops.windows.window_attention"],
            "does not import: ModuleNotFoundError: No module named 'accel.ops.windows.window_attention'",
        ),
        (["accel.dispatch"], "PROBLEM: accel does not import: ModuleNotFoundError: No module named 'accel.dispatch'"),
        (
            ["accel._C", "triton"],
            "native extension  not loaded: accel._C did not load: ModuleNotFoundError: No module named 'accel._C'",
        ),
    ],
    ids=["torch", "an op", "the frame", "extension and triton"],
)
def test_whatever_is_missing_it_speaks(absent, words):
    result = run(absent=absent)
    assert result.returncode == 1, result.stderr
    assert words in result.stdout
    assert "to mend: " in result.stdout
    assert "Traceback" not in result.stderr
    assert "python  " in result.stdout


def test_as_a_command():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accel", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    report = json.loads(result.stdout)
    fatal = [p for p in report["problems"] if p["fatal"]]
    assert result.returncode == (1 if fatal else 0), result.stderr
    assert report["ops"]["window_attention"]["cpu"]["reference"] == dict.fromkeys(doctor.DTYPES)


def test_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--jsn"])
    assert "--jsn" in capsys.readouterr().err
