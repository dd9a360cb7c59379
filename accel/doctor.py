"""``python -m accel doctor``: what this installation can run, what it cannot and why, and the command that mends it.

It must speak where all else fails, so nothing outside the standard library is imported at the top, every import is
caught, and the file runs by its path too (``python accel/doctor.py``) when ``import accel`` itself is what breaks.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
PACKAGES = ("torch", "triton", "torchvision", "transformers", "timm")
DTYPES = ("float32", "bfloat16", "float16")

Report = dict[str, Any]


def attempt(module: str) -> tuple[Any, str | None]:
    """Import ``module``: ``(module, None)`` or ``(None, why not)``."""
    try:
        return importlib.import_module(module), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def installed(package: str) -> str | None:
    """The version in the package's metadata; nothing of it is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(*command: str, pattern: str = ".+") -> str | None:
    """The first match of ``pattern`` in what ``command`` prints, None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, said)
    return found.group(0).strip() if found else None


def compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((line for name in names if (line := first_line(*name.split(), "--version"))), None)


def nvcc() -> str | None:
    """Where ``setup.py`` finds it."""
    folders = [f"{os.environ.get('CUDA_HOME', '')}/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def built_for_cuda(package: str) -> str | None:
    """The local version (``cu130``) of a CUDA build, read from the package's ``version.py`` without importing it.

    A package index's metadata leaves that part out, so the file is what tells the builds apart.
    """
    try:
        spec = importlib.util.find_spec(package)
        text = (Path(str(spec.origin)).parent / "version.py").read_text() if spec and spec.origin else ""
    except (ImportError, OSError, ValueError):
        return None
    found = re.search(r"""__version__\s*(?::\s*\w+\s*)?=\s*['"][^'"+]*\+(cu\d+)""", text)
    return found.group(1) if found else None


def rebuild_command() -> str:
    """What builds the native extension again: in a checkout in place, elsewhere by installing anew."""
    if (ROOT.parent / "setup.py").is_file():
        command = f"cd {ROOT.parent} && ACCEL_REQUIRE_NATIVE=1 {sys.executable} setup.py build_ext --inplace"
    else:
        command = (
            f"ACCEL_REQUIRE_NATIVE=1 {sys.executable} -m pip install --force-reinstall --no-deps "
            "--no-build-isolation --no-cache-dir accel-kernels"
        )
    return command if compiler() else f"install a C++20 compiler (apt-get install g++), then: {command}"


def examine() -> Report:
    """Everything the doctor knows, as plain data."""
    report: Report = {
        "versions": {"python": platform.python_version(), **{p: installed(p) for p in PACKAGES}},
        "tools": {"compiler": compiler(), "nvcc": first_line(nvcc() or "nvcc", "--version", pattern=r"release [\d.]+")},
        "devices": [],
        "cpu": {"machine": platform.machine(), "cores": os.cpu_count(), "torch_level": None},
        "extension": {"loaded": False, "reason": None},
        "triton": {"loaded": False, "reason": None},
        "ops": {},
        "problems": [],
    }
    try:
        report["versions"]["accel"] = re.findall(r'"(.+)"', (ROOT / "_version.py").read_text())[0]
    except (OSError, IndexError):
        report["versions"]["accel"] = None
    torch, reason = attempt("torch")
    if torch is None:
        _problem(report, f"torch does not import: {reason}", f"{sys.executable} -m pip install 'torch>=2.11'")
        return report
    _examine_torch(report, torch)
    triton, report["triton"]["reason"] = attempt("triton")
    report["triton"]["loaded"] = triton is not None
    _examine_accel(report, torch)
    return report


def _problem(report: Report, what: str, mend: str, fatal: bool = True) -> None:
    """``fatal``: something this machine should run does not, or only slowly."""
    report["problems"].append({"what": what, "mend": mend, "fatal": fatal})


def _examine_torch(report: Report, torch: Any) -> None:
    version = str(torch.__version__)
    report["versions"]["torch"] = version
    pip = f"{sys.executable} -m pip install"
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        _problem(report, f"torch {version} is older than 2.11", f"{pip} --upgrade 'torch>=2.11'")
    report["cpu"]["torch_level"] = torch.backends.cpu.get_cpu_capability()
    report["cpu"]["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            report["devices"].append({"name": torch.cuda.get_device_name(i), "architecture": f"sm_{major}{minor}"})
    elif torch.version.cuda is None and (gpu := first_line("nvidia-smi", "--list-gpus", pattern="GPU 0.*")):
        _problem(
            report,
            f"this machine has {gpu} but torch {version} is built for the CPU",
            f"{pip} --force-reinstall torch (with the index that pytorch.org names for your CUDA version)",
            fatal=False,
        )
    cuda = built_for_cuda("torchvision")
    if torch.version.cuda is None and torch.version.hip is None and cuda:
        _problem(
            report,
            f"torchvision is built for CUDA ({cuda}) and torch {version} for the CPU: import torchvision fails, and "
            "with it timm and transformers' vision models (accel itself does not need it)",
            f"{pip} --force-reinstall --no-deps torchvision (with the index that pytorch.org names for the CPU)",
            fatal=False,
        )


def _examine_accel(report: Report, torch: Any) -> None:
    dispatch, reason = attempt("accel.dispatch")
    _, ops_reason = attempt("accel.ops") if dispatch else (None, reason)
    if dispatch is None or ops_reason is not None:
        _problem(report, f"accel does not import: {ops_reason}", rebuild_command())
        return
    extension, reason = dispatch.leaf("accel._C")
    report["extension"] = {"loaded": extension is not None, "reason": reason}
    if extension is not None:
        try:
            report["extension"]["build"] = dict(extension.build_info())
        except Exception as error:
            report["extension"]["reason"] = f"build_info() failed: {type(error).__name__}: {error}"
    build = report["extension"].get("build", {})
    log = ROOT / "_build_log.txt"
    if not build.get("cuda_archs") and log.is_file():
        report["extension"]["build_log"] = log.read_text(errors="replace").strip()
    if build and not build.get("cuda_archs") and report["devices"]:
        why = build.get("cuda_missing") or "it was built without them"
        mend = rebuild_command() if nvcc() else f"install the CUDA toolkit (nvcc), then: {rebuild_command()}"
        _problem(report, f"the native extension has no CUDA kernels: {why}", mend, fatal=False)
    devices = ["cpu", "cuda"] if report["devices"] else ["cpu"]
    for name, op in dispatch.OPS.items():
        report["ops"][name] = {device: _examine_op(report, dispatch, op, torch, device) for device in devices}


def _examine_op(report: Report, dispatch: Any, op: Any, torch: Any, device: str) -> dict[str, Any]:
    """``{backend: {dtype: reason or None}}``; a problem where one meant for ``device`` cannot run at all."""
    found: dict[str, dict[str, str | None]] = {b.name: {} for b in op.backends}
    for dtype in DTYPES:
        try:
            args, kwargs = op.example(device, getattr(torch, dtype))
            reasons = dispatch.reasons(op, op.prepare(*args, **kwargs))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            _problem(report, f"{op.name} on {device} in {dtype} cannot be asked: {text}", rebuild_command())
            reasons = {b.name: text for b in op.backends}
        for backend, reason in reasons.items():
            found[backend][dtype] = reason
    meant = [b.name for b in op.backends if device in b.devices]
    more = any(device in b.devices and not b.extra for b in op.backends)  # than what only some calls take
    if more and not any(None in found[name].values() for name in meant):
        why = "; ".join(f"{name}: {found[name][DTYPES[0]]}" for name in meant)
        triton = "triton" in meant and not report["triton"]["loaded"]
        mend = f"{sys.executable} -m pip install 'triton>=3.6'" if triton else rebuild_command()
        _problem(report, f"{op.name} on {device} has only slow backends ({why})", mend)
    return found


# --- text ---


def _table(rows: list[tuple[str, Any]], indent: str = "  ") -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{indent}{name:<{width}}  {value}" for name, value in rows]


def _verdict(by_dtype: dict[str, str | None]) -> str:
    reasons = set(by_dtype.values())
    if reasons == {None}:
        return "yes"
    if len(reasons) == 1:
        return f"no: {reasons.pop()}"
    return "; ".join(f"{dtype}: {'yes' if reason is None else reason}" for dtype, reason in by_dtype.items())


def render(report: Report) -> str:
    """The report as aligned plain text."""
    lines = ["versions"]
    lines += _table([(name, version or "not installed") for name, version in report["versions"].items()])
    lines += _table([(name, found or "not found") for name, found in report["tools"].items()])
    lines += ["", "devices"]
    cpu = report["cpu"]
    rows = [("cpu", f"{cpu['machine']}, {cpu['cores']} cores, torch uses {cpu['torch_level'] or 'nothing known'}")]
    rows += [(f"cuda:{i}", f"{d['name']} ({d['architecture']})") for i, d in enumerate(report["devices"])]
    lines += _table(rows)
    lines += ["", "parts"]
    extension, triton = report["extension"], report["triton"]
    rows = [
        ("native extension", "loaded" if extension["loaded"] else f"not loaded: {extension['reason'] or 'not tried'}")
    ]
    for name, value in extension.get("build", {}).items():
        rows.append((f"  {name}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else value or "none"))
    if "build_log" in extension:
        said = extension["build_log"].splitlines()
        rows.append(("  build log", next((line for line in said if re.search(r"\b(error|fatal)\b", line)), said[-1])))
    rows.append(("triton", "loaded" if triton["loaded"] else f"not loaded: {triton['reason'] or 'not tried'}"))
    lines += _table(rows)
    for op, devices in report["ops"].items():
        for device, backends in devices.items():
            lines += ["", f"{op} on {device}"]
            lines += _table([(name, _verdict(found)) for name, found in backends.items()])
    lines += ["", "problems" if report["problems"] else "no problems found"]
    for problem in report["problems"]:
        lines += [
            f"  {'PROBLEM' if problem['fatal'] else 'note'}: {problem['what']}",
            f"    to mend: {problem['mend']}",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """0 where every op has a fast backend on every device here, else 1."""
    parser = argparse.ArgumentParser(prog="python -m accel doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=2, default=str) if options.json else render(report))
    return 1 if any(problem["fatal"] for problem in report["problems"]) else 0


if __name__ == "__main__":
    # run by path, the package's own folder stands first and would hide other packages behind accel's files
    sys.path[0] = str(ROOT.parent)
    sys.exit(main())
