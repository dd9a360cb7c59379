"""Masks and biases of transformers as the short rules they come from, in the shape of the tensors they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from accel.ops.rules import Grid2D, T5Buckets, grid_index

MASKING = "transformers.masking_utils"

_COPIES = {"T", "H", "mT", "mH", "data", "real", "imag"}  # attributes that are tensors, not facts about one
_FACTS = {"dim", "size", "is_floating_point", "is_complex", "__repr__", "__set__", "__delete__"}
_AUTOGRAD = {"backward", "requires_grad_", "register_hook", "retain_grad"}  # of the memory that is there


class Lazy(Tensor):
    """A mask or bias that is written out only for code that computes with it.

    Models hand it from layer to layer as the ``(B, H, T, S)`` tensor that it stands for. accel's attention reads the
    rule and never makes that tensor; anything else that touches its values gets them, with their gradient.
    """

    full: tuple[int, ...]
    """The shape that it stands for."""

    def dense(self) -> Tensor:
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """The rule as arguments of :func:`accel.softmax_attention`."""
        raise NotImplementedError

    def handed_on(self, func: Any) -> Lazy:
        """The same rule after ``func``, one of those that checkpointing applies to what it passes on."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        if name in ("detach", "view_as") and all(isinstance(x, Lazy) for x in args):
            return args[0].handed_on(func)
        if (attribute and attribute not in _COPIES) or name in _FACTS | _AUTOGRAD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*tree_map(written_out, args), **tree_map(written_out, kwargs or {}))

    def __repr__(self, **unused: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}{self.full}"


def written_out(x: Any) -> Any:
    """The plain tensor of a :class:`Lazy`, anything else as it is."""
    return x.dense() if isinstance(x, Lazy) else x


class LazyMask(Lazy):
    """A boolean mask that is a :class:`MaskRule`; it has no memory of its own."""

    rule: MaskRule

    @staticmethod
    def __new__(cls, rule: MaskRule) -> LazyMask:
        made: LazyMask = Tensor._make_wrapper_subclass(cls, rule.shape, dtype=torch.bool, device=rule.device)
        made.rule, made.full = rule, rule.shape
        return made

    def __init__(self, rule: MaskRule) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*tree_map(written_out, args), **tree_map(written_out, kwargs or {}))

    def dense(self) -> Tensor:
        return self.rule.dense()

    def arguments(self) -> dict[str, Any]:
        return self.rule.arguments()

    def handed_on(self, func: Any) -> LazyMask:
        return LazyMask(self.rule)


class LazyBias(Lazy):
    """A bias per head that a table holds by relative position; as a tensor it is a copy of the table, ``(R, H)``.

    So its gradient takes the way that the dense bias' would take, through checkpoints and sharded modules too.
    """

    by: T5Buckets | Grid2D

    @staticmethod
    def of(table: Tensor, index: T5Buckets | Grid2D, queries: int, keys: int) -> LazyBias:
        made = table.clone().as_subclass(LazyBias)
        made.by, made.full = index, (1, table.shape[1], queries, keys)
        return made

    @property
    def table(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)  # type: ignore[arg-type]

    def arguments(self) -> dict[str, Any]:
        return {"bias_table": self.table, "bias_index": self.by}

    def dense(self) -> Tensor:
        """``(1, H, T, S)`` in the table's dtype, differentiable in the table."""
        table, (queries, keys) = self.table, self.full[2:]
        if isinstance(self.by, T5Buckets):
            at = torch.arange(queries, device=table.device)[:, None]
            row = self.by.rows_of(at - torch.arange(keys, device=table.device), table.shape[0])
        else:
            row = grid_index((self.by.h, self.by.w, self.by.extra), table.device)
        return table[row].permute(2, 0, 1)[None]

    def handed_on(self, func: Any) -> LazyBias:
        table = self.table
        made = (table.detach() if func is Tensor.detach else table.view_as(table)).as_subclass(LazyBias)
        made.by, made.full = self.by, self.full
        return made


@dataclass(frozen=True, eq=False)
class MaskRule:
    """Which keys a query may see: causal order, a window, padding, packed sequences, all of them together.

    Query i stands at key ``i + offset``; ``window`` is ``(left, right)``, inclusive, −1 without bound.
    """

    batch: int
    queries: int
    keys: int
    device: torch.device
    causal: bool = False
    window: tuple[int, int] | None = None
    offset: int = 0
    key_mask: Tensor | None = None
    """``(B, S)`` boolean, True where a key is real."""
    cu_seqlens: Tensor | None = None
    """``(sequences + 1,)`` int32 where the one row of the batch is packed."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, 1, self.queries, self.keys)

    @property
    def aligned(self) -> bool:
        """Whether the op knows where the queries stand: beside the last keys, or causally from the first one on."""
        if not self.causal and self.window is None:
            return True
        return self.offset == self.keys - self.queries or (self.causal and self.offset == 0)

    @property
    def narrows(self) -> bool:
        """Whether the window hides anything that causal order leaves."""
        return self.window is not None and any(0 <= side < self.keys - 1 for side in self.window)

    @property
    def hides(self) -> bool:
        """Whether there is anything in it that could keep a query from a key."""
        return self.causal or any(x is not None for x in (self.window, self.key_mask, self.cu_seqlens))

    @cached_property
    def unseeing(self) -> Tensor | None:
        """The queries that see no key at all, ``(B, 1, T, 1)``; None where there is none: without padding each sees
        at least the key beside it."""
        if self.key_mask is None or self.cu_seqlens is not None:
            return None
        place = torch.arange(self.queries, device=self.device) + self.offset
        first, end = torch.zeros_like(place), torch.full_like(place, self.keys)
        if self.causal:
            end = (place + 1).clamp(0, self.keys)
        if self.window is not None:
            left, right = self.window
            first = (place - left).clamp(0, self.keys) if left >= 0 else first
            end = torch.minimum(end, (place + right + 1).clamp(0, self.keys)) if right >= 0 else end
        real = torch.nn.functional.pad(self.key_mask.cumsum(1), (1, 0))
        none = real[:, end] <= real[:, first]
        return none[:, None, :, None] if bool(none.any()) else None

    def arguments(self) -> dict[str, Any]:
        """The rule as arguments of :func:`accel.softmax_attention`."""
        how: dict[str, Any] = {}
        if self.causal:
            bottom = self.offset == self.keys - self.queries
            how["causal"] = True if bottom else "top_left"
        if self.window is not None:
            how["window"] = self.window
        if self.key_mask is not None:
            how["mask"] = self.key_mask[:, None, None, :]
        if self.cu_seqlens is not None:
            how["cu_seqlens_q"] = self.cu_seqlens
        return how

    def dense(self) -> Tensor:
        """The boolean ``(B, 1, T, S)``."""
        query = torch.arange(self.queries, device=self.device)[:, None] + self.offset
        key = torch.arange(self.keys, device=self.device)
        seen = torch.ones(self.queries, self.keys, dtype=torch.bool, device=self.device)
        if self.causal:
            seen &= key <= query
        if self.window is not None:
            left, right = self.window
            if left >= 0:
                seen &= key >= query - left
            if right >= 0:
                seen &= key <= query + right
        if self.cu_seqlens is not None:
            document = torch.searchsorted(self.cu_seqlens, key.to(torch.int32), right=True)
            seen &= document[:, None] == document
        seen = seen[None, None]
        if self.key_mask is not None:
            seen = seen & self.key_mask[:, None, None, :]
        return seen.expand(self.shape)


# --- reading transformers' mask functions, which are closures ---


@dataclass(frozen=True, eq=False)
class Seen:
    """What a mask function of transformers says, without sizes and padding."""

    causal: bool = False
    window: tuple[int, int] | None = None
    sequences: Tensor | None = None
    """``(B, T)``, the number of the packed sequence that a token belongs to."""


def read_mask_function(function: Any) -> Seen | None:
    """What ``function`` masks, or None where it is not one of those that are known here."""
    if getattr(function, "__module__", None) != MASKING:
        return None
    held = _closed_over(function)
    name = function.__qualname__.removesuffix(".<locals>.inner_mask")
    if name == "causal_mask_function":
        return Seen(causal=True)
    if name == "bidirectional_mask_function":
        return Seen()
    if name == "sliding_window_overlay":
        size = held.get("sliding_window")
        return Seen(window=(size - 1, -1)) if isinstance(size, int) and size >= 1 else None
    if name == "sliding_window_bidirectional_overlay":
        size = held.get("sliding_window")
        return Seen(window=(size, size)) if isinstance(size, int) and size >= 0 else None
    if name == "packed_sequence_mask_function":
        return Seen(sequences=held["packed_sequence_mask"]) if "packed_sequence_mask" in held else None
    if name == "remap_positions_for_packed_sequence":  # positions within a sequence run on as its tokens do
        return read_mask_function(held.get("mask_function"))
    if name == "and_masks.<locals>.and_mask":
        return _both([read_mask_function(f) for f in held.get("mask_functions", (None,))])
    return None


def _closed_over(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _both(parts: list[Seen | None]) -> Seen | None:
    found = [p for p in parts if p is not None]
    windows = [p.window for p in found if p.window is not None]
    sequences = [p.sequences for p in found if p.sequences is not None]
    if len(found) < len(parts) or len(windows) > 1 or len(sequences) > 1:
        return None
    causal = any(p.causal for p in found)
    return Seen(causal, windows[0] if windows else None, sequences[0] if sequences else None)
