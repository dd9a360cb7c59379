"""Build of the optional native extension ``accel._C``.

One shared library: pybind11 for build facts, LibTorch's stable ABI for the ops, so that one build serves many torch
versions. Kernel files (``csrc/cpu/<family>/<op>/kernel.cpp``) include no torch header and are compiled once per
instruction set; which one runs is decided at load time. Ninja does the work; no GPU is needed.
Where nvcc is found, ``csrc/cuda`` is built in too, against any build of torch: what it needs of a CUDA build is looked
up when the library loads.

Environment (build only):
    ACCEL_SKIP_NATIVE=1     install without the extension
    ACCEL_SKIP_CUDA=1       build it without the CUDA kernels
    ACCEL_CUDA_ARCHS        what to build them for, as "90;100+PTX"; with PTX the driver compiles for later devices
    ACCEL_REQUIRE_NATIVE=1  a failed build is an error instead of a note for ``python -m accel doctor``
    CUDA_HOME               where nvcc is looked for first, then on PATH and in /usr/local/cuda
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
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch the library accepts

PORTABLE = ("portable", 4, [])
X86_LEVELS = [
    ("portable", 4, ["-march=x86-64"]),
    ("avx2", 8, ["-march=x86-64-v3"]),
    ("avx512", 16, ["-march=x86-64-v4", "-mprefer-vector-width=512"]),
    ("avx512_bf16", 16, ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mavx512vbmi"]),
]
CUDA_ARCHS = ("80", "90", "100")
OWN_INSTRUCTIONS = ("90",)  # kernels use what only this one has, wgmma; its PTX is without, as later devices run it


class Cuda(NamedTuple):
    """How the CUDA kernels are built, or why they are not."""

    nvcc: str | None
    missing: str = ""

    @staticmethod
    def find() -> Cuda:
        if os.environ.get("ACCEL_SKIP_CUDA") == "1":
            return Cuda(None, "ACCEL_SKIP_CUDA=1 was set at build time")
        folders = [f"{os.environ.get('CUDA_HOME', '')}/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
        return Cuda(nvcc, "" if nvcc else "no nvcc was found at build time")

    def archs(self) -> str:
        """As "80;90+PTX": what the environment says, else those of ours that this nvcc knows."""
        if given := os.environ.get("ACCEL_CUDA_ARCHS"):
            return given
        known = subprocess.run([str(self.nvcc), "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        return ";".join([arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]) + "+PTX"

    def define(self) -> str:
        """What ``build_info()`` tells of it."""
        name, value = ("ARCHS", self.archs()) if self.nvcc else ("MISSING", self.missing)
        return f"""-DACCEL_CUDA_{name}='"{value}"'"""

    def compile(self, host: str) -> str:
        """The command that compiles a .cu, with these flags for the host's compiler."""
        targets = []
        for arch in self.archs().split(";"):
            number = arch.removesuffix("+PTX")
            own = f"{number}a" if number in OWN_INSTRUCTIONS else number
            targets.append(f"'-gencode=arch=compute_{own},code=sm_{own}'")
            if arch.endswith("+PTX"):
                targets.append(f"'-gencode=arch=compute_{number},code=compute_{number}'")
        flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xcompiler", host.replace(" ", ","), *targets]
        return f"{self.nvcc} -MD -MF $out.d {' '.join(flags)} -c $in -o $out"

    def link(self) -> str:
        # nvcc knows where its static runtime is, whose symbols stay inside: torch may bring a runtime of its own
        return f"{self.nvcc} -shared --no-device-link -Xlinker --exclude-libs=ALL $in $flags -o $out"


class BuildNative(build_ext):
    """Writes a ninja file with every flag in it and runs it."""

    def build_extension(self, ext: Extension) -> None:
        log = ROOT / "accel" / "_build_log.txt"
        if os.environ.get("ACCEL_SKIP_NATIVE") == "1":
            log.write_text("the native extension was left out: ACCEL_SKIP_NATIVE=1 at install time\n")
            return
        required, cuda = os.environ.get("ACCEL_REQUIRE_NATIVE") == "1", Cuda.find()
        failures = []
        for attempt in [cuda] if required or not cuda.nvcc else [cuda, Cuda(None, "compiling them failed")]:
            try:
                self._build(ext, attempt)
                break
            except Exception as error:
                if required:
                    raise
                part = "CUDA kernels were" if attempt.nvcc else "native extension was"
                failures.append(f"the {part} not built: {error}")
                print(failures[-1], file=sys.stderr)
        if failures:
            log.write_text("\n".join([*failures, ""]))
        else:
            log.unlink(missing_ok=True)

    def _build(self, ext: Extension, cuda: Cuda) -> None:
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
        # pybind11's own headers first: torch 2.11 brings a copy that refuses to stand beside the stable ABI
        includes = [pybind11.get_include(), *include_paths(), sysconfig.get_paths()["include"]]
        warnings = "-Wall -Wextra -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized"  # last: gcc 12's headers
        numerics = "-ffp-contract=fast -fno-math-errno"
        shared = f"-I{ROOT / 'csrc'} -fPIC -fvisibility=hidden -ffile-prefix-map={ROOT}=."
        # whole cache lines of instructions: by where a loop happens to begin it takes up to a quarter longer
        common = f"-std=c++20 -O3 -falign-loops=64 {shared} {warnings} {numerics}"
        binding = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -DTORCH_STABLE_ONLY",
            *(f"-isystem {path}" for path in includes),
        ]
        facts = [f'-DACCEL_TORCH_VERSION=\\"{torch.__version__}\\"', cuda.define()]

        levels = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else [PORTABLE]
        objects: list[str] = []
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file)
            command = f"{compiler} -MMD -MF $out.d {common} $flags -c $in -o $out"
            writer.rule("cxx", command, depfile="$out.d", deps="gcc", description="$out")
            link = cuda.link() if cuda.nvcc else f"{compiler} -shared $in $flags -o $out"
            writer.rule("link", link, description="$out")
            # Ascending levels: of an inline function emitted twice the linker keeps the first, the most portable.
            for name, width, flags in levels:
                for source in sorted((ROOT / "csrc/cpu").glob("*/*/kernel.cpp")):
                    out = f"{source.parent.name}.{name}.o"
                    defines = [f"-DACCEL_ISA={name}", f"-DACCEL_WIDTH={width}"]
                    writer.build(out, "cxx", str(source), variables={"flags": " ".join([*flags, *defines])})
                    objects.append(out)
            bindings = sorted((ROOT / "csrc/cpu").glob("*/*/binding.cpp"))
            if cuda.nvcc:
                writer.rule("cuda", cuda.compile(shared), depfile="$out.d", deps="gcc", description="$out")
                for source in sorted((ROOT / "csrc/cuda").rglob("*.cu")):
                    objects.insert(0, f"{source.name}.o")
                    writer.build(objects[0], "cuda", str(source))
                bindings += sorted((ROOT / "csrc/cuda").rglob("*.cpp"))
            for source in [ROOT / "csrc/bindings.cpp", *bindings]:
                objects.insert(0, f"{source.parent.name}.{source.stem}.o")
                flags = " ".join([*binding, *(facts if source.stem == "bindings" else [])])
                writer.build(objects[0], "cxx", str(source), variables={"flags": flags})
            flags = f"-L{libraries} -Xlinker --no-as-needed -ltorch -ltorch_cpu"
            if sys.platform == "darwin":
                flags = f"-undefined dynamic_lookup -L{libraries} -ltorch -ltorch_cpu"
            writer.build(str(target), "link", objects, variables={"flags": flags})
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *jobs]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise RuntimeError(f"the compiler failed:\n{result.stdout[-4000:]}")
        if "warning:" in result.stdout:
            print(result.stdout)


def packages(name: str, folder: str) -> list[str]:
    """The package ``name`` in ``folder`` and those below it; links are not followed."""
    found = [Path(at) for at, _, files in os.walk(ROOT / folder) if any(file.endswith(".py") for file in files)]
    return sorted(".".join([name, *path.relative_to(ROOT / folder).parts]) for path in found)


setup(
    packages=[*packages("accel", "accel"), *packages("accel.kernels", "kernels"), "accel.benchmarks"],
    # A wheel takes these two from their real place, so it does not need the links in accel/.
    package_dir={"accel": "accel", "accel.kernels": "kernels", "accel.benchmarks": "benchmarks"},
    package_data={"accel": ["py.typed", "_build_log.txt"]},
    ext_modules=[Extension("accel._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
