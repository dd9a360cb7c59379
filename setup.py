"""Build of the optional native extension ``accel._C``.

One shared library: pybind11 for build facts, LibTorch's stable ABI for the ops, so that one build serves many torch
versions. Kernel files (``csrc/cpu/<op>/kernel.cpp``) include no torch header and are compiled once per instruction
set; which one runs is decided at load time. Ninja does the work; no GPU is needed.

Environment (build only):
    ACCEL_SKIP_NATIVE=1     install without the extension
    ACCEL_REQUIRE_NATIVE=1  a failed build is an error instead of a note for ``python -m accel doctor``
    MAX_JOBS                parallel compilations
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch the library accepts

PORTABLE = ("portable", 4, [])
X86_LEVELS = [
    ("portable", 4, ["-march=x86-64"]),
    ("avx2", 8, ["-march=x86-64-v3"]),
    ("avx512", 16, ["-march=x86-64-v4", "-mprefer-vector-width=512"]),
    ("avx512_bf16", 16, ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"]),
]


class BuildNative(build_ext):
    """Writes a ninja file with every flag in it and runs it."""

    def build_extension(self, ext: Extension) -> None:
        log = ROOT / "accel" / "_build_log.txt"
        if os.environ.get("ACCEL_SKIP_NATIVE") == "1":
            log.write_text("the native extension was left out: ACCEL_SKIP_NATIVE=1 at install time\n")
            return
        try:
            self._build(ext)
            log.unlink(missing_ok=True)
        except Exception as error:
            if os.environ.get("ACCEL_REQUIRE_NATIVE") == "1":
                raise
            text = f"the native extension was not built: {error}"
            log.write_text(text + "\n")
            print(text, file=sys.stderr)

    def _build(self, ext: Extension) -> None:
        try:
            import ninja
            import pybind11
            import torch
            from ninja import ninja_syntax
            from torch.utils.cpp_extension import include_paths
        except ImportError as error:
            raise RuntimeError(
                f"{error}; install torch, ninja and pybind11 first and use pip install --no-build-isolation"
            ) from error
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if compiler is None:
            raise RuntimeError("no C++ compiler: install g++ 12 or newer, or clang++ 15 or newer")

        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = Path(torch.__file__).parent / "lib"
        includes = [*include_paths(), pybind11.get_include(), sysconfig.get_paths()["include"]]
        warnings = "-Wall -Wextra -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized"  # last: gcc 12's headers
        numerics = "-ffp-contract=fast -fno-math-errno"
        common = f"-std=c++20 -O3 -fPIC -fvisibility=hidden {warnings} {numerics} -ffile-prefix-map={ROOT}=."
        binding = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -DTORCH_STABLE_ONLY",
            f'-DACCEL_TORCH_VERSION=\\"{torch.__version__}\\" -DACCEL_CUDA_ARCHS=\\"\\"',
            *(f"-isystem {path}" for path in includes),
        ]

        levels = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else [PORTABLE]
        objects: list[str] = []
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file)
            command = f"{compiler} -MMD -MF $out.d {common} $flags -c $in -o $out"
            writer.rule("cxx", command, depfile="$out.d", deps="gcc", description="$out")
            writer.rule("link", f"{compiler} -shared $in $flags -o $out", description="$out")
            # Ascending levels: of an inline function emitted twice the linker keeps the first, the most portable.
            for name, width, flags in levels:
                for source in sorted((ROOT / "csrc/cpu").glob("*/kernel.cpp")):
                    out = f"{source.parent.name}.{name}.o"
                    defines = [f"-DACCEL_ISA={name}", f"-DACCEL_WIDTH={width}"]
                    writer.build(out, "cxx", str(source), variables={"flags": " ".join([*flags, *defines])})
                    objects.append(out)
            for source in [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cpu").glob("*/binding.cpp"))]:
                out = f"{source.parent.name}.{source.stem}.o"
                writer.build(out, "cxx", str(source), variables={"flags": " ".join(binding)})
                objects.insert(0, out)
            flags = f"-L{libraries} -Wl,--no-as-needed -ltorch -ltorch_cpu"
            if sys.platform == "darwin":
                flags = f"-undefined dynamic_lookup -L{libraries} -ltorch -ltorch_cpu"
            writer.build(str(target), "link", objects, variables={"flags": flags})
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *jobs]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise RuntimeError(f"{compiler} failed:\n{result.stdout[-4000:]}")
        if "warning:" in result.stdout:
            print(result.stdout)


setup(
    packages=["accel", "accel.nn", "accel.ops", "accel.patches", "accel.kernels", "accel.benchmarks"],
    # A wheel takes these two from their real place, so it does not need the links in accel/.
    package_dir={"accel": "accel", "accel.kernels": "kernels", "accel.benchmarks": "benchmarks"},
    package_data={"accel": ["py.typed", "_build_log.txt"]},
    ext_modules=[Extension("accel._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
