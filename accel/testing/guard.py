"""Running ops on tensors that lie against an unreadable page, so that one element too far is a crash.

The crash must not take the tests with it: :func:`replay` hands the calls to a process of their own and turns its end
into an assertion. The child names each call before it makes it, so the text says which one died.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PROT_NONE = 0
_keep: list[mmap.mmap] = []  # a region lives as long as the process: unmapping it would free the page for others


def guarded(x: Tensor, end: bool) -> Tensor:
    """A contiguous copy of ``x`` whose last byte (or, with ``end=False``, first byte) touches an unreadable page."""
    x = x.contiguous()
    size = x.numel() * x.element_size()
    if size == 0:
        return x
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    region = mmap.mmap(-1, room + 2 * page)
    _keep.append(region)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for start in (address, address + page + room):
        if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), f"mprotect of {page} bytes at {start:#x} failed")
    offset = page + room - size if end else page
    view = torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    view.copy_(x)
    return view


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(x.nan_to_num(nan=12345.0), y.nan_to_num(nan=12345.0)) for x, y in zip(a, b, strict=True))


def replay(calls: Sequence[tuple[str, str, tuple[Any, ...]]], load: Sequence[str] = ("accel",)) -> None:
    """Make each ``(label, "namespace::name.overload", args)`` call in a child process with every tensor guarded.

    ``load`` names the modules whose import registers the ops. The results must equal those on plain tensors.

    Raises:
        AssertionError: a call crashed, failed or changed its result; with the child's own words.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "calls.pt")
        torch.save((list(load), list(calls)), path)
        child = subprocess.run(
            [sys.executable, "-m", "accel.testing.guard", path],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )
    said = child.stdout.splitlines()
    last = said[-1] if said else "nothing"
    assert child.returncode == 0, f"exit {child.returncode} after {last!r}:\n{child.stderr[-3000:]}"
    assert last == f"{len(calls)} calls passed", f"the child ended with {last!r}"


def main(path: str) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    load, calls = torch.load(path, weights_only=False)  # our own file, written a moment ago by replay()
    for module in load:
        importlib.import_module(module)
    for label, name, args in calls:
        print(label, flush=True)
        namespace, rest = name.split("::")
        packet, _, overload = rest.partition(".")
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        plain = op(*args)
        for end in (True, False):
            got = op(*(guarded(a, end) if isinstance(a, Tensor) else a for a in args))
            pair = [(x,) if isinstance(x, Tensor) else x for x in (got, plain)]
            assert _same(*pair), f"{label}: the result changed when the tensors {'end' if end else 'start'} at a page"
    print(f"{len(calls)} calls passed")


if __name__ == "__main__":
    main(sys.argv[1])
