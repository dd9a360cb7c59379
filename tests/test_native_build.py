"""The CUDA part of the native extension: what setup.py decides, what the binary asks of a machine, and the reasons that
the backend ``cuda`` gives. No GPU is needed, and no nvcc."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import accel
from accel import backends, dispatch
from accel.ops.deformable import deform_attention2d, deform_conv2d, ms_deform_attn, sampling

ROOT = Path(__file__).resolve().parents[1]
OPS = ("deform_attention2d", "deform_conv2d", "ms_deform_attn")


# --- setup.py ---


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, on a machine that has no nvcc but what a test gives it, and writes its log elsewhere."""
    stubs = {
        "setuptools": types.SimpleNamespace(Extension=lambda *_, **__: None, setup=lambda **_: None),
        "setuptools.command.build_ext": types.SimpleNamespace(build_ext=object),
    }
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    spec = importlib.util.spec_from_file_location("accel_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    real = shutil.which

    def which(name: str, path: str | None = None) -> str | None:
        folders = (path or os.environ.get("PATH", "")).split(os.pathsep)
        return real(name, path=os.pathsep.join(f for f in folders if f.startswith(str(tmp_path))))

    monkeypatch.setattr(module.shutil, "which", which)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "accel").mkdir()
    for name in ("ACCEL_SKIP_NATIVE", "ACCEL_SKIP_CUDA", "ACCEL_CUDA_ARCHS", "ACCEL_REQUIRE_NATIVE", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return module


def give_nvcc(folder: Path, *known: int) -> str:
    """An nvcc that knows these architectures and can do nothing else."""
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text("#!/bin/sh\necho " + " ".join(f"sm_{a}" for a in known) + "\n")
    path.chmod(0o755)
    return str(path)


def test_nvcc_is_looked_for_where_it_says(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.Cuda.find() == (None, "no nvcc was found at build time")
    on_path = give_nvcc(tmp_path / "path")
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    assert setup.Cuda.find() == (on_path, "")
    at_home = give_nvcc(tmp_path / "home" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup.Cuda.find() == (at_home, "")
    monkeypatch.setenv("ACCEL_SKIP_CUDA", "1")
    assert setup.Cuda.find() == (None, "ACCEL_SKIP_CUDA=1 was set at build time")


def test_architectures(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = setup.Cuda(give_nvcc(tmp_path / "newer", 75, 80, 86, 90, 100, 120))
    assert newer.archs() == "80;90;100+PTX"
    older = setup.Cuda(give_nvcc(tmp_path / "older", 75, 80, 86, 90))
    assert older.archs() == "80;90+PTX", "an nvcc is asked for no more than it knows"
    monkeypatch.setenv("ACCEL_CUDA_ARCHS", "86;90+PTX")
    command = older.compile("-fPIC -fvisibility=hidden")
    assert re.findall(r"'-gencode=arch=(\S+)'", command) == [
        "compute_86,code=sm_86",
        "compute_90a,code=sm_90a",
        "compute_90,code=compute_90",
    ]
    assert "-Xcompiler -fPIC,-fvisibility=hidden " in command
    assert older.define() == """-DACCEL_CUDA_ARCHS='"86;90+PTX"'"""
    assert setup.Cuda(None, "no reason").define() == """-DACCEL_CUDA_MISSING='"no reason"'"""


@pytest.mark.parametrize("required", [False, True])
def test_a_failure_of_nvcc_costs_no_cpu_kernels(
    setup: Any, required: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = give_nvcc(tmp_path / "bin")
    tried = []

    def build(ext: Any, cuda: Any) -> None:
        tried.append(cuda)
        if cuda.nvcc:
            raise RuntimeError("nvcc fell over")

    builder = types.SimpleNamespace(_build=build)
    if required:
        monkeypatch.setenv("ACCEL_REQUIRE_NATIVE", "1")
        with pytest.raises(RuntimeError, match="nvcc fell over"):
            setup.BuildNative.build_extension(builder, None)
        return
    setup.BuildNative.build_extension(builder, None)
    assert tried == [(nvcc, ""), (None, "compiling them failed")]
    log = tmp_path / "accel" / "_build_log.txt"
    assert log.read_text() == "the CUDA kernels were not built: nvcc fell over\n"
    monkeypatch.setenv("ACCEL_SKIP_CUDA", "1")
    setup.BuildNative.build_extension(builder, None)
    assert not log.exists(), "what is left out on purpose is no failure"


# --- the binary ---


@pytest.fixture
def extension() -> Any:
    module, reason = dispatch.leaf("accel._C")
    if module is None:
        pytest.skip(str(reason))
    return module


def test_what_was_built_is_what_is_registered(extension: Any) -> None:
    build = extension.build_info()
    built = bool(build["cuda_archs"])
    assert built != bool(build.get("cuda_missing"))
    assert built == hasattr(extension, "cuda_error")
    for op in OPS:
        for name in (f"accel_native::{op}_forward", f"accel_native::{op}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") == built
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def test_the_binary_needs_no_library_of_cuda(extension: Any) -> None:
    if shutil.which("readelf") is None or not extension.__file__.endswith(".so"):
        pytest.skip("readelf is not installed")
    said = subprocess.run(["readelf", "-d", extension.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said)
    assert "libtorch.so" in needed, "through which what is weak is found in a CUDA build"
    assert not [name for name in needed if "cuda" in name or "nv" in name]
    assert "RPATH" not in said
    assert "RUNPATH" not in said


def test_without_a_device_the_driver_says_so(extension: Any) -> None:
    if torch.cuda.is_available() or not extension.build_info()["cuda_archs"]:
        pytest.skip("there is a GPU, or there are no kernels for one")
    assert extension.cuda_error(0)


# --- reasons ---


@pytest.mark.parametrize("name", OPS)
def test_the_backend_says_that_tensors_are_on_the_cpu(name: str) -> None:
    op = dispatch.OPS[name]
    args, kwargs = op.example("cpu", torch.float32)
    assert "cuda: the tensors are on cpu\n" in accel.explain(op.function, *args, **kwargs)
    with pytest.raises(NotImplementedError, match="backend 'cuda' cannot run this call: the tensors are on cpu"):
        op.function(*args, **kwargs, backend="cuda")


class Fake:
    """A tensor on a GPU, as far as reasons look at it."""

    device = torch.device("cuda", 1)

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = shape, dtype


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU and an extension whose answers can be changed."""
    fake = types.SimpleNamespace(archs="80;90+PTX", missing="", error="")

    class Extension:
        def build_info(self) -> dict[str, str]:
            return {"cuda_archs": fake.archs, "cuda_missing": fake.missing}

        def cuda_error(self, index: int) -> str:
            assert index == 1
            return fake.error

    monkeypatch.setitem(dispatch._leaves, "accel._C", (Extension(), None))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    return fake


SIZES = {"batch": 2, "pixels": 100, "heads": 8, "channels": 32}


def test_reasons_of_the_build_and_the_device(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def why(**kwargs: Any) -> str | None:
        backends._why_not_device.cache_clear()
        return sampling.why_not_cuda((Fake(**kwargs),), SIZES, 300, 16)

    assert why() is None
    assert "not torch.float64" in str(why(dtype=torch.float64))
    gpu.error = "no kernel image is available for execution on the device"
    assert why() == (
        "the CUDA kernels, built for 80;90+PTX, do not run on Tesla V100 (compute capability 7.0): "
        "no kernel image is available for execution on the device"
    )
    gpu.archs, gpu.missing = "", "no nvcc was found at build time"
    assert why() == "the CUDA kernels were not built: no nvcc was found at build time"
    monkeypatch.setitem(dispatch._leaves, "accel._C", (None, "accel._C did not load: ImportError: x"))
    assert why() == "accel._C did not load: ImportError: x"


@pytest.mark.parametrize(
    ("change", "queries", "points", "words"),
    [
        ({}, 300, 16, None),
        ({"pixels": 2**30 - 1}, 2**27 - 1, 15, None),
        ({"pixels": 2**30}, 300, 16, "2^30 pixels"),
        ({}, 2**27, 1, "2^27 outputs"),
        ({}, 2**20, 2**11, "2^31 samples of a head"),
        ({"heads": 1, "channels": 2**21}, 300, 16, "2^21 channels of a head"),
        ({"heads": 2**11, "channels": 2**20}, 1, 1, "2^31 channels, not"),
        ({"batch": 2**20, "heads": 2**11}, 1, 1, "2^31 heads of all images"),
        ({"batch": 2**10}, 2**20, 16, "2^33 outputs of all heads"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_sizes_that_the_kernels_cannot_count_are_refused(
    change: dict[str, int], queries: int, points: int, words: str | None
) -> None:
    why = sampling.why_not_cuda((Fake(),), {**SIZES, **change}, queries, points)
    assert why is None if words is None else f"fewer than {words}" in str(why)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        (
            {"weight": (64, 48, 3, 3), "input": (2, 48, 9, 8)},
            "multiples of 64, not 48 of a weight group and 48 of an off",
        ),
        ({"offset": (2, 72, 9, 8)}, "multiples of 64, not 128 of a weight group and 32 of an offset group"),
        ({"weight": (60, 128, 3, 3)}, "output channels in multiples of 8, not 60 of a group"),
        ({"weight": (24, 64, 3, 3)}, "output channels in multiples of 8, not 12 of a group"),
        ({"input": (2, 128, 2**13, 2**13)}, "more than it can number"),
        ({"offset": (2**10, 18, 2**9, 2**9)}, None),
        ({"offset": (2, 18, 2**12, 2**12)}, "more than it can number"),
        ({"padding": [1, 2**30]}, "more than it can number"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_convolutions_that_the_kernel_does_not_take_are_refused(change: dict[str, Any], words: str | None) -> None:
    sizes = {"input": (2, 128, 9, 8), "offset": (2, 18, 9, 8), "weight": (64, 128, 3, 3), **change}
    dtype = sizes.pop("dtype", torch.bfloat16)
    padding = sizes.pop("padding", [1, 1])
    input, offset, weight = (Fake(*sizes[name], dtype=dtype) for name in ("input", "offset", "weight"))
    why = deform_conv2d._why_not_cuda(
        deform_conv2d.Args(input, offset, weight, None, None, [1, 1], padding, [1, 1], True)
    )
    assert why is None if words is None else words in str(why)


@pytest.mark.usefixtures("gpu")
def test_deterministic_mode_refuses_products_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = (Fake(*size, dtype=torch.bfloat16) for size in ((2, 128, 9, 8), (2, 18, 9, 8), (64, 128, 3, 3)))
    args = deform_conv2d.Args(*tensors, None, None, [1, 1], [1, 1], [1, 1], True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "CUBLAS_WORKSPACE_CONFIG" in str(deform_conv2d._why_not_cuda(args))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert deform_conv2d._why_not_cuda(args) is None


@pytest.mark.usefixtures("gpu")
def test_levels_and_lines_that_the_kernels_do_not_take_are_refused() -> None:
    def levels(count: int) -> str | None:
        return ms_deform_attn._why_not_cuda(
            ms_deform_attn.Args(Fake(2, 100, 8, 32), Fake(2, 5, 8, count, 2), None, None, None, [1] * count, True)
        )

    assert levels(16) is None
    assert levels(17) == "it takes up to 16 levels, not 17"
    header = (ROOT / "csrc" / "cuda" / "deformable" / "ms_deform_attn.h").read_text()
    assert f"ms_deform_attn_levels = {ms_deform_attn.CUDA_LEVELS};" in header

    call = deform_attention2d.Args(
        Fake(2, 8, 8, 32), None, Fake(2, 2, 2, 4, 9), [3, 3], [2**29, 2**29], [2**29, 0], [1, 1], 1.0, False, False
    )
    assert deform_attention2d._why_not_cuda(call) == f"it takes padded lines of fewer than 2^30 pixels, not {2**30 + 8}"
    assert deform_attention2d._why_not_cuda(call._replace(padding=[1, 1])) is None
