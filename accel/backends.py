"""What the backends of every op share: how they are called, why they refuse, and which tensors they take."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import dispatch

HALF_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *HALF_DTYPES)


# --- backends by the name of their op; accel._C and the Triton leaf may be missing, so the call looks them up ---


def native(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward in accel._C. torch calls the kernel of the device on which the tensors are."""

    def forward(*args: Any) -> Any:
        return getattr(torch.ops.accel_native, f"{op}_forward").default(*args)

    def backward(*args: Any) -> Any:
        return getattr(torch.ops.accel_native, f"{op}_backward").default(*args)

    return forward, backward


class Triton(NamedTuple):
    why_not: Callable[[Any], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def triton(op: str, floating: bool = True) -> Triton:
    """The Triton leaf of ``op``, the op's own module name. Unless its first tensor is ``floating`` the op says itself
    which dtypes it takes."""
    name = dispatch.leaf_of(op)

    def why_not(args: Any) -> str | None:
        reason = dispatch.leaf_reason(name) or dispatch.leaf(name)[0].why_not(args)
        return reason or (why_not_dtype(args) if floating else None)

    def forward(*args: Any) -> Any:
        return dispatch.leaf(name)[0].forward(*args)

    def backward(*args: Any) -> Any:
        return dispatch.leaf(name)[0].backward(*args)

    return Triton(why_not, forward, backward)


# --- why they refuse; torch.compile traces through these, and the first argument is the one whose device decides ---


def why_not_dtype(args: Any) -> str | None:
    if args[0].dtype not in KERNEL_DTYPES:
        return f"it computes float32, bfloat16 and float16, not {args[0].dtype}"
    return None


def why_not_cpu(args: Any) -> str | None:
    """Why the CPU kernels of ``accel._C`` cannot compute ``args``."""
    return why_not_native(args) or why_not_dtype(args)


def why_not_native(args: Any) -> str | None:
    """The same, of an op that says itself which dtypes it takes."""
    if args[0].device.type != "cpu":
        return f"the tensors are on {args[0].device.type}"
    return dispatch.leaf_reason("accel._C")


def why_not_cuda(args: Any) -> str | None:
    """Why the CUDA kernels of ``accel._C`` cannot compute ``args``."""
    if args[0].device.type != "cuda":
        return f"the tensors are on {args[0].device.type}"
    return _why_not_built(args[0].device.index) or why_not_dtype(args)


@torch.compiler.assume_constant_result  # the extension cannot be traced, and its answer does not change
def _why_not_built(index: int) -> str | None:
    extension, reason = dispatch.leaf("accel._C")
    return reason or _why_not_device(extension, index)


@functools.cache
def _why_not_device(extension: Any, index: int) -> str | None:
    build = extension.build_info()
    if not build["cuda_archs"]:
        return f"the CUDA kernels were not built: {build.get('cuda_missing')}"
    with torch.cuda.device(index):
        error = extension.cuda_error(index)
    if error:
        return f"the CUDA kernels, built for {build['cuda_archs']}, do not run on {_name_of(index)}: {error}"
    return None


def _name_of(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"


def why_not_gpu(x: Tensor, interpreting: bool) -> str | None:
    """Why Triton cannot run on the device of ``x``; its interpreter takes a CPU too."""
    if interpreting and x.device.type == "cpu":
        return None
    if x.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and the tensors are on {x.device.type}"
    if torch.version.hip:
        return f"it is built for NVIDIA GPUs, and this is ROCm {torch.version.hip}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    return None


# --- checks of arguments ---


def check_floating(x: Any, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")


def check_beside(x: Any, name: str, main: Tensor, main_name: str) -> None:
    """``x`` is a floating tensor on the device of ``main``."""
    check_floating(x, name)
    if x.device != main.device:
        raise ValueError(f"{name} is on {x.device} but {main_name} is on {main.device}")


def inner_dtype(x: Tensor) -> torch.dtype:
    """What coordinates and small parameters beside ``x`` are read in, and sums are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def integer(value: Any) -> Any:
    """``value`` as an integer, a TypeError if it is none. One that tracing lets vary stays a symbol, where
    ``operator.index`` would make it a constant."""
    return value if isinstance(value, int | torch.SymInt) else operator.index(value)


def pair(values: int | Sequence[int], name: str, least: int) -> list[int]:
    """One integer for both axes, or two of them (y, x); none below ``least``."""
    try:
        if isinstance(values, Sequence):
            out = [integer(v) for v in values]
        else:
            out = [integer(values)] * 2
    except TypeError:
        raise TypeError(f"{name} must be an integer or two of them (y, x), got {name}={values!r}") from None
    if len(out) != 2:
        raise ValueError(f"{name} must be an integer or two of them (y, x), got {name}={values!r}")
    if out[0] < least or out[1] < least:
        raise ValueError(f"{name} must be at least {least}, got {name}={values!r}")
    return out
