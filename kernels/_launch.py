"""What the Triton kernels share: dropout bits, one launch as data, and the compile case made from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from accel.ops.layout import empty_like_layout

ARCHITECTURES = (80, 90, 100)
_POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
_TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def random_bits(seed_ptr, position):
    """The 32 bits of ``accel.philox`` at 64-bit linear ``position``, as int64."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    return word.to(tl.int64)


@triton.jit
def keep_bits(seed_ptr, position, threshold):
    """True where dropout keeps the element at 64-bit linear ``position``."""
    return random_bits(seed_ptr, position) >= threshold


INTERPRETING = not isinstance(keep_bits, triton.JITFunction)
"""TRITON_INTERPRET=1 was set when Triton was imported: kernels run in numpy, on CPU tensors too."""


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of ``tl.dot`` operands: fp32 in the interpreter, which multiplies bf16 as the integers it keeps."""
    return tl.float32 if INTERPRETING else _TL_DTYPE[dtype]


def store_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of output buffers: fp32 in the interpreter, which truncates instead of rounding; torch rounds then."""
    return torch.float32 if INTERPRETING else dtype


def result(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A buffer for a result ``(B, H, T, ·)`` in the layout of ``x``."""
    return torch.empty_like(empty_like_layout(x, shape), dtype=store_dtype(x.dtype))


@contextlib.contextmanager
def device_of(x: torch.Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    if x.device.type != "cuda":
        yield
    else:
        with torch.cuda.device(x.device):
            yield


def capability(x: torch.Tensor) -> tuple[int, int]:
    """Of the GPU that holds ``x``; 8.0 where it is on none."""
    return torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else (8, 0)


def options(warps: int, stages: int, registers: int | None) -> dict[str, Any]:
    """What Triton compiles a kernel with, and a thread's registers at most."""
    # contraction to FMA is stated because Triton's default for it changes between versions
    found = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return found if registers is None else {**found, "maxnreg": registers}


@dataclass(frozen=True)
class CompileCase:
    """One kernel configuration as ``triton.compile`` wants it; plain data beside the kernel itself."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]  # by place: of a parameter, and of an element where that is a tuple
    attributes: dict[tuple[int, ...], list[list[Any]]]
    warps: int
    stages: int
    registers: int | None = None
    spill: int = 0
    architectures: tuple[int, ...] = ARCHITECTURES

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles it with."""
        return options(self.warps, self.stages, self.registers)


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is launched with. ``arguments`` may hold meta tensors when only compiled.

    Pointers and floats may come in NamedTuples. Integers may not: Triton compiles a kernel anew for their values there,
    whatever ``do_not_specialize`` says.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None
    """A thread's at most, where the compiler would take a few more and one program less would fit a processor."""
    spill: int = 0
    """Bytes that a thread may spill, where that was measured to be the fastest all the same."""

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **options(self.warps, self.stages, self.registers))

    def case(self, name: str) -> CompileCase:
        """What a launch compiles to: integers are not specialised, pointers are aligned to 16 bytes as torch's are."""
        signature: dict[str, Any] = {}
        constexprs: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}

        def kind(value: Any, place: tuple[int, ...]) -> Any:
            """Triton's name for the type of a value, of each of its elements where it is a tuple."""
            if value is None:
                constexprs[place] = None
                return "constexpr"
            if isinstance(value, torch.Tensor):
                attributes[place] = [["tt.divisibility", 16]]
                return _POINTER[value.dtype]
            if isinstance(value, float):
                return "fp32"
            if isinstance(value, tuple):
                return type(value)(*[kind(element, (*place, n)) for n, element in enumerate(value)])
            parameter = self.kernel.params[place[0]]
            if len(place) > 1 or not parameter.do_not_specialize:
                raise TypeError(f"{self.kernel.__name__} would be compiled anew for each value of {parameter.name}")
            return "i32" if -(2**31) <= value < 2**31 else "i64"

        for position, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                constexprs[position,] = value
                signature[parameter.name] = "constexpr"
            else:
                signature[parameter.name] = kind(value, (position,))
        name = f"{self.kernel.__name__} {name}"
        how = (self.warps, self.stages, self.registers, self.spill)
        return CompileCase(name, self.kernel, signature, constexprs, attributes, *how)


def power_of_two(size: int, least: int, most: int) -> int:
    """The block for ``size`` elements, within bounds that are powers of two."""
    return min(most, max(least, triton.next_power_of_2(size)))


def launch(
    kernel: Any,
    programs: int,
    warps: int,
    stages: int = 1,
    registers: int | None = None,
    spill: int = 0,
    /,
    **arguments: Any,
) -> Launch:
    """A launch with those of the arguments that the kernel takes."""
    given = {name: arguments[name] for name in kernel.arg_names}
    return Launch(kernel, programs, given, warps, stages, registers, spill)


def once(cases: Iterable[CompileCase]) -> Iterator[CompileCase]:
    """The cases, those that the compiler would see twice only once."""
    seen = set()
    for case in cases:
        how = (case.warps, case.stages, case.registers, case.architectures)
        key = repr((case.kernel.__name__, case.signature, case.constexprs, how))
        if key not in seen:
            seen.add(key)
            yield case


def by_generation(old: Iterable[CompileCase], new: Iterable[CompileCase]) -> Iterator[CompileCase]:
    """The cases of a call on other generations and on Hopper, one for all where they are the same."""
    for before, since in zip(old, new, strict=True):
        if before == since:
            yield since
        else:
            yield replace(before, architectures=(80, 100))
            yield replace(since, name=f"{since.name} hopper", architectures=(90,))
