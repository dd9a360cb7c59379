"""The shim that runs CUDA kernels on the CPU finds what it says it finds; every .cu compiles with nvcc and fits."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import _cuda_host as host
import pytest
import torch
from torch import Tensor

from accel import dispatch

PLANTED = sorted((host.SHIM / "planted").glob("*.cu"))
CUDA = sorted((host.ROOT / "csrc" / "cuda" / "deformable").glob("*.cu"))
SEEDS = range(1, 9)


class Params(ctypes.Structure):
    _fields_ = [("inp", ctypes.c_void_p), ("out", ctypes.c_void_p), ("n", ctypes.c_int), ("bug", ctypes.c_int)]


@dataclass(frozen=True)
class Bug:
    """A planted bug: what its kernel reads, what the right one writes, what finds it.

    ``found_by`` holds modes: ``check`` (the shim's own error, whose words are ``says``), ``value`` (a wrong result in
    the plain run), ``seed`` (in one of eight orders of warps), ``repeat`` (results differ between orders), ``early``
    (copies that land at once), ``asan``, ``ubsan``, ``tsan``.
    """

    name: str
    given: Tensor
    right: Tensor
    found_by: tuple[str, ...]
    says: str = ""

    @property
    def n(self) -> int:
        return self.given.numel()


def _counts(x: Tensor) -> Tensor:
    return torch.bincount(x & 15, minlength=16).int()


def _neighbours(x: Tensor) -> Tensor:
    return x.view(-1, 2).flip(1).reshape(-1)


def _tile_sums(x: Tensor) -> Tensor:
    return x.view(4, 256).roll(-128, 1).view(4, 64, 4).sum((0, 2)).int()


def _below(x: Tensor) -> Tensor:
    rows = x.view(-1, 32)
    return torch.cat([rows[:, :1], rows[:, :-1]], 1).reshape(-1)


def _numbers(n: int) -> Tensor:
    return torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.int32)


def _harmonic(x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float32)
    for value in x.tolist():
        total += torch.tensor(1.0) / (value + 3)
    return total.view(1).view(torch.int32)


def _bug(name: str, n: int, right: Callable[[Tensor], Tensor], found_by: str, says: str = "") -> Bug:
    given = _numbers(n)
    return Bug(name, given, right(given), tuple(found_by.split()), says)


def _same(x: Tensor) -> Tensor:
    return x.clone()


BUGS = [
    _bug("missing_barrier", 200, lambda x: x.flip(0), "value seed tsan"),
    _bug("divergent_barrier", 64, _same, "check", "32 threads wait at wrong_barriers.cu:10"),
    _bug("partial_barrier", 64, _same, "check", "32 threads wait at wrong_barriers.cu:19"),
    _bug("early_exit", 50, _same, "check", "40 threads have exited"),
    _bug("mask_without_caller", 64, _neighbours, "check", "mask 0x0000ffff leaves out the lane that calls"),
    _bug("mask_of_absent_lanes", 64, _neighbours, "check", "names lane 0, which has exited"),
    _bug("masks_that_differ", 32, _neighbours, "check", "with mask 0x7fffffff"),
    _bug("read_outside_the_mask", 64, _neighbours, "check", "which mask 0x000000ff does not name"),
    _bug("mask_past_the_block", 24, _neighbours, "check", "names lane 24, which is not there"),
    _bug("uninitialised_shared", 128, _counts, "value"),
    _bug("write_past_shared", 64, _same, "check asan", "shared memory tile of 256 bytes was written 1 bytes past it"),
    _bug("read_past_shared", 64, lambda x: torch.cat([x[1:], x[-1:]]), "asan"),
    _bug("small_dynamic_shared", 64, _same, "check asan", "written 1 bytes past it"),
    _bug("past_the_tensor", 70, _same, "asan"),
    _bug("misaligned_vector", 128, lambda x: x.view(-1, 4).sum(1)[: 32 // 2].repeat_interleave(2).int(), "ubsan"),
    _bug("nan_index", 32, lambda x: torch.where(torch.arange(32) == 3, -1, x).int(), "ubsan"),
    _bug("racy_histogram", 128, _counts, "tsan"),
    _bug("missing_syncwarp", 128, _below, "seed tsan"),
    _bug("shuffle_as_fence", 128, _below, "tsan"),
    _bug("half_a_warp", 128, lambda x: x.view(-1, 2, 16).flip(1).reshape(-1), "tsan"),
    _bug("write_after_read", 128, lambda x: x.roll(-64), "seed tsan"),
    _bug("racy_sum", 40, lambda x: x.sum().view(1).int(), "tsan"),
    _bug("unordered_sum", 100, _harmonic, "repeat"),
    _bug("missing_async_wait", 1024, _tile_sums, "value"),
    _bug("early_overwrite", 1024, _tile_sums, "early tsan"),
]


def launch(
    mode: str, function: str, given: Tensor, out: Tensor, bug: bool, seed: int = 0, landing: int = 0
) -> host.Ran:
    program = host.build(PLANTED, mode)
    params = Params(n=given.numel(), bug=bug)
    return host.run(program, f"planted_{function}", params, {"inp": given, "out": out}, seed=seed, landing=landing)


def runs(bug: Bug, planted: bool, mode: str, seeds: Iterable[int] = (0,), landing: int = 0) -> list[host.Ran]:
    fresh = torch.zeros_like(bug.right)
    return [launch(mode, bug.name, bug.given, fresh, planted, seed, landing) for seed in seeds]


def is_right(bug: Bug, ran: host.Ran) -> bool:
    return ran.code == 0 and torch.equal(ran.buffers["out"], bug.right)


def finds(mode: str, bug: Bug) -> str:
    """How ``mode`` shows that the planted bug is there; empty if it does not."""
    if mode == "check":
        return "".join(ran.report for ran in runs(bug, True, "plain") if ran.code == 3)
    if mode in ("value", "seed", "early"):
        seeds = (0,) if mode == "value" else SEEDS
        got = runs(bug, True, "plain", seeds, host.EARLY if mode == "early" else host.LATE)
        return "".join(f"{ran.buffers['out']}" for ran in got if ran.code == 0 and not is_right(bug, ran))
    if mode == "repeat":
        first, *rest = [ran.buffers["out"] for ran in runs(bug, True, "plain", SEEDS) if ran.code == 0] or [bug.right]
        return "".join(f"{other}" for other in rest if not torch.equal(other, first))
    word = {"asan": "AddressSanitizer", "ubsan": "runtime error", "tsan": "ThreadSanitizer: data race"}[mode]
    program = "tsan" if mode == "tsan" else "asan"
    got = [ran for landing in (host.LATE, host.EARLY) for ran in runs(bug, True, program, landing=landing)]
    return "".join(ran.report for ran in got if ran.code not in (0, 2, 3) and word in ran.report)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    for mode in bug.found_by:
        said = finds(mode, bug)
        assert said, f"{mode} does not find {bug.name}"
        if mode == "check":
            assert bug.says in said, said
            assert "thread (" in said or "block (" in said, said
        if mode in ("asan", "ubsan", "tsan"):
            assert ".cu:" in said, said


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_its_right_twin_passes(bug: Bug) -> None:
    got = runs(bug, False, "plain", [0, *SEEDS])
    for landing in (host.EARLY, host.MIXED):
        got += runs(bug, False, "plain", [0, 1], landing)
    got += runs(bug, False, "asan") + runs(bug, False, "tsan", [0, 1])
    for ran in got:
        assert is_right(bug, ran), ran
        assert not ran.report, ran.report


@pytest.mark.slow
def test_the_table_of_the_page() -> None:
    """Prints what every mode makes of every bug, the table in csrc/testing/README.md."""
    modes = ("check", "value", "seed", "repeat", "early", "asan", "ubsan", "tsan")
    for bug in BUGS:
        found = [mode for mode in modes if finds(mode, bug)]
        print(f"| {bug.name} | {' '.join(found)} |")
        assert set(bug.found_by) <= set(found)


def test_a_shared_read_before_its_write_shows_minus_one() -> None:
    (bug,) = [b for b in BUGS if b.name == "uninitialised_shared"]
    (ran,) = runs(bug, True, "plain")
    assert torch.equal(ran.buffers["out"], bug.right - 1)


def test_the_same_seed_gives_the_same_order() -> None:
    (bug,) = [b for b in BUGS if b.name == "unordered_sum"]
    for seed in (1, 2):
        first, second = runs(bug, True, "plain", [seed, seed])
        assert torch.equal(first.buffers["out"], second.buffers["out"])


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16).int() & 0xFFFF


def test_every_half_number_converts_as_torch_does() -> None:
    ran = launch(
        "plain", "widen", torch.zeros(131072, dtype=torch.int32), torch.zeros(131072, dtype=torch.int32), False
    )
    assert not ran.code, ran.report
    bits = torch.arange(65536).to(torch.int32).to(torch.int16)
    for dtype, got in zip(
        (torch.bfloat16, torch.float16), ran.buffers["out"].view(torch.float32).chunk(2), strict=True
    ):
        torch.testing.assert_close(got, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_rounding_to_half_precision_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=generator).int().view(torch.float32)
    near = torch.randn(20000, generator=generator) * torch.logspace(-9, 5, 20000)
    ties = torch.arange(-4096, 4096) * 2.0**-25
    edges = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.996, 65520.0, -65504.0, 3.4e38, 6.1e-5])
    x = torch.cat([x, near, ties, 1 + ties, edges])
    x = x[~x.isnan()].contiguous()
    ran = launch("plain", "narrow", x.view(torch.int32), torch.zeros(x.numel(), dtype=torch.int32), False)
    assert not ran.code, ran.report
    assert torch.equal(ran.buffers["out"] & 0xFFFF, _bits(x.to(torch.bfloat16)))
    assert torch.equal(ran.buffers["out"] >> 16 & 0xFFFF, _bits(x.to(torch.float16)))


def _mask(bits: Iterable[bool]) -> int:
    mask = sum(1 << i for i, bit in enumerate(bits) if bit)
    return mask - (1 << 32) if mask >> 31 else mask


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
def test_warp_words(mode: str) -> None:
    x = _numbers(32)
    v = x.tolist()
    at = range(32)
    odd = [value & 1 == 1 for value in v]
    rows = [
        [v[i // 8 * 8 + (i + 3) % 8] for i in at],
        [v[i ^ 5] for i in at],
        [v[i ^ 16] if i >= 16 else v[i] for i in at],
        [v[i + 3] if i % 16 < 13 else v[i] for i in at],
        [v[i - 3] if i % 16 >= 3 else v[i] for i in at],
        [_mask(odd)] * 32,
        [int(max(v) > 1000)] * 32,
        [1] * 32,
        [_mask(v[j] & 3 == v[i] & 3 for j in at) for i in at],
        [value.bit_count() for value in v],
        [(value & -value).bit_length() for value in v],
        [32 - value.bit_length() for value in v],
        [_mask(odd[j] and j // 16 == i // 16 for j in at) for i in at],
    ]
    right = torch.tensor(rows, dtype=torch.int32).view(-1)
    for seed in range(4):
        ran = launch(mode, "warp_words", x, torch.zeros_like(right), False, seed)
        assert not ran.code, ran.report
        assert torch.equal(ran.buffers["out"], right)


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
def test_block_words(mode: str) -> None:
    out = torch.zeros(4, 128, dtype=torch.int32)
    right = out.clone()
    right[:, :32] = 50 + 1000 + 0
    right[:, 32], right[:, 34], right[:, 35], right[:, 36] = 7, 0, 11, 9
    for seed in range(3):
        ran = launch(mode, "block_words", _numbers(4), out, False, seed)
        assert not ran.code, ran.report
        assert torch.equal(ran.buffers["out"], right)


def test_a_launch_that_a_gpu_refuses_is_refused() -> None:
    ran = launch("plain", "no_such_launch", _numbers(4), _numbers(4), False)
    assert ran.code == 3
    assert "returned 9: no such launch: grid (0,1,1)" in ran.report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
def test_matrix_fragments(mode: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (16, 8), generator=generator).to(dtype)
    given = torch.cat([a, b.t().contiguous()]).contiguous().view(torch.int32).view(-1).contiguous()
    name = f"fragments_{str(dtype).removeprefix('torch.')}"
    ran = launch(mode, name, given, torch.zeros(128, dtype=torch.int32), False, 1)
    assert not ran.code, ran.report
    assert torch.equal(ran.buffers["out"].view(torch.float32).view(16, 8), a.float() @ b.float() + 1)
    ran = launch(mode, name, given, torch.zeros(128, dtype=torch.int32), True)
    assert ran.code == 3
    assert "mma_m16n8k16: mask 0xffffffff names lane 16, which has exited" in ran.report


# --- nvcc ---


def test_built_kernels_do_not_spill() -> None:
    """Each kernel of the native build on each architecture: what ptxas spills lies on the stack."""
    knobs = pytest.importorskip("triton").knobs
    extension, reason = dispatch.leaf("accel._C")
    if reason or not extension.build_info()["cuda_archs"]:
        pytest.skip(reason or "the native build is without CUDA")
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", extension.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for arch in extension.build_info()["cuda_archs"].removesuffix("+PTX").split(";"):
        assert f"arch = sm_{host.ARCHITECTURES[int(arch)]}" in text.splitlines()
    kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert len(kernels) == text.count("Function ") > 0
    for kernel, registers, stack, shared, local in kernels:
        assert 0 < int(registers) <= 255, kernel
        assert int(stack) == int(local) == 0, kernel
        assert int(shared) <= 48 << 10, kernel


@pytest.mark.slow  # what is built is looked at above; this is about warnings
@pytest.mark.parametrize("source", CUDA, ids=lambda path: path.stem)
def test_nvcc_compiles_without_warnings_or_spills(source: Path) -> None:
    found = host.nvcc(source)
    assert {u.architecture for u in found} == set(host.ARCHITECTURES)
    for u in found:
        print(u)
        assert u.spilled == 0, u
        assert 0 < u.registers <= 255, u
        assert u.shared <= 48 << 10, u


@pytest.mark.slow
@pytest.mark.parametrize("source", PLANTED, ids=lambda path: path.stem)
def test_nvcc_compiles_the_planted_kernels(source: Path) -> None:
    assert host.nvcc(source)


def test_resource_usage_is_read() -> None:
    text = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem
"""
    assert host.usage(text) == [host.Usage("_Z1kPf", 90, 40, 12, 512)]
