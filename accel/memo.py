"""What is the same at every call of a model is made once: facts of a tensor's values, by the tensor and its version,
and tensors made from sizes and rules."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from accel import transforms

T = TypeVar("T")


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which no value can be read and tensors made now belong to it."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_plain(*tensors: Tensor) -> bool:
    """Whether they are tensors whose changes are counted, outside of tracing."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return not any([type(x) not in (Tensor, torch.nn.Parameter) or x.is_inference() for x in tensors])


def may_remember(*tensors: Tensor) -> bool:
    """Whether what follows from these tensors' values or shapes may outlive the call: they are plain, and what is made
    now belongs to no CUDA graph and no transform."""
    return _is_plain(*tensors) and not capturing(tensors[0]) and not transforms.transformed()


class Recent(OrderedDict[Any, Tensor]):
    """The last few tensors made, by what they were made from."""

    def get_or_make(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if key in self:
            self.move_to_end(key)
        else:
            with torch.inference_mode(False):  # a later call may save it for a backward
                self[key] = make()
            if len(self) > 64:
                self.popitem(last=False)
        return self[key]


class _Known(NamedTuple):
    versions: tuple[int, ...]
    others: tuple[Callable[[], Tensor | None], ...]  # the tensors beside the first, as long as they live
    key: Any
    fact: Any


class Facts(Generic[T]):
    """What was read from tensors, until they change or are gone. A fact that held the tensor would keep it alive."""

    def __init__(self) -> None:
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def known(self, tensors: tuple[Tensor, ...], key: Any = None) -> T | None:
        """What was read from these tensors as they are, None where nothing was. Nothing is made."""
        return self._find(tensors, key) if _is_plain(*tensors) else None

    def forget(self, first: Tensor) -> None:
        """What is remembered with ``first``, which changed without a new version."""
        self._known.pop(first, None)

    def get_or_read(self, tensors: tuple[Tensor, ...], key: Any, read: Callable[[], T]) -> T:
        """``read()``, remembered with the first of ``tensors`` for the same others, versions and ``key``."""
        first, *others = tensors
        plain = _is_plain(*tensors) and not capturing(first)
        fact = self._find(tensors, key) if plain else None
        if fact is None:
            fact = read()
            if plain and not transforms.transformed():
                self._known[first] = _Known(_versions(tensors), tuple([weakref.ref(x) for x in others]), key, fact)
        return fact

    def _find(self, tensors: tuple[Tensor, ...], key: Any) -> T | None:
        first, *others = tensors
        found = self._known.get(first)
        if found is None or (found.versions, found.key) != (_versions(tensors), key):
            return None
        if any([kept() is not x for kept, x in zip(found.others, others, strict=True)]):
            return None
        fact: T = found.fact
        return fact


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple([x._version for x in tensors])
