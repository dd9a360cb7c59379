"""Emulated kernels whose sources have not changed since all their tests passed are not all tested again.

Triton's interpreter and the shim that runs CUDA on the host take half of the suite's time for kernels that change
rarely. ``settled.json`` keeps for each of their test files the hash of what its tests depend on. ``pytest --settled``,
which ``make test`` calls, runs one test in eight of a file where that is still so, in case a record is wrong, and all
of the others. ``make settle`` runs what has changed, and records it when it passes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "settled.json"
EVERY = 8
"""Of so many tests of a settled file one runs."""

TRITON = ["kernels/*.py", "kernels/{family}/*.py", "accel/testing/tolerance.py"]
CUDA = [
    "csrc/*.h",
    "csrc/*.cuh",
    "csrc/cuda/*",
    "csrc/cuda/{family}/*",
    "csrc/testing/**/*",
    "accel/testing/tolerance.py",
]
OP = ["accel/philox.py", "accel/ops/*.py", "accel/ops/{family}/*.py", "tests/_*.py", "tests/{family}/_*.py"]
ENDINGS = {"_triton.py": TRITON + OP, "_cuda_host.py": CUDA + OP, "_cuda_binding.py": CUDA + OP}
SHIM = {
    "tests/test_cuda_shim.py": [
        "csrc/testing/**/*",
        "csrc/cuda/**/*",
        "csrc/*.h",
        "csrc/*.cuh",
        "setup.py",
        "tests/_*.py",
    ]
}


def files() -> list[str]:
    """The test files that can be settled, from the root."""
    found = [path for end in ENDINGS for path in ROOT.glob(f"tests/*/test_*{end}")]
    return sorted([path.relative_to(ROOT).as_posix() for path in found] + list(SHIM))


def _sources(file: str) -> Iterator[Path]:
    path = ROOT / file
    yield path
    if file in SHIM:
        patterns = SHIM[file]
    else:
        patterns = next(found for end, found in ENDINGS.items() if file.endswith(end))
        # what it imports of the tests of its op: test_<op>.py beside test_<op>_triton.py
        yield from [other for other in path.parent.glob("test_*.py") if path.stem.startswith(f"{other.stem}_")]
    for pattern in patterns:
        yield from [x for x in ROOT.glob(pattern.format(family=path.parent.name)) if x.is_file()]


@functools.cache
def digest(file: str) -> str:
    """Of the contents of all that its tests depend on, and of the versions that run them."""
    found = hashlib.sha256(f"{sys.version_info[:2]} {version('torch')} {version('triton')}".encode())
    for path in sorted(set(_sources(file))):
        if path.suffix != ".pyc":
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:20]


def settled() -> set[str]:
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return {file for file in files() if kept.get(file) == digest(file)}


def left_out(nodeids: Iterable[str]) -> set[str]:
    """Of all that was collected, what need not run."""
    still, found = settled(), set()
    seen: dict[str, int] = {}
    for nodeid in nodeids:
        file = nodeid.partition("::")[0]
        if file in still:
            seen[file] = seen.get(file, 0) + 1
            if seen[file] % EVERY != 1:
                found.add(nodeid)
    return found


def main() -> int:
    """Run what has changed, and record it."""
    changed = sorted(set(files()) - settled())
    before = {file: digest(file) for file in files()}
    if changed:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-m", "not slow and not gpu"]
        code = subprocess.run([*command, *changed], cwd=ROOT).returncode
        if code:
            return code
    digest.cache_clear()
    moved = [file for file in files() if before[file] != digest(file)]
    if moved:
        print(f"not recorded: sources of {', '.join(moved)} changed during the run", file=sys.stderr)
        return 1
    KEPT.write_text(json.dumps(before, indent=1) + "\n")
    print(f"{len(changed)} of {len(before)} files ran; {KEPT.relative_to(ROOT)} holds them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
