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

T = TypeVar("T")


def may_remember(*tensors: Tensor) -> bool:
    """Whether what follows from these tensors' values or shapes may outlive the call: they are plain tensors, whose
    changes are counted, outside of tracing and of the capture of a CUDA graph."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if any([type(x) not in (Tensor, torch.nn.Parameter) or x.is_inference() for x in tensors]):
        return False
    return tensors[0].device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


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

    def get_or_read(self, tensors: tuple[Tensor, ...], key: Any, read: Callable[[], T]) -> T:
        """``read()``, remembered with the first of ``tensors`` for the same others, versions and ``key``."""
        first, *others = tensors
        if not may_remember(*tensors):
            return read()
        versions = tuple([x._version for x in tensors])
        known = self._known.get(first)
        same = known is not None and (known.versions, known.key) == (versions, key)
        if not same or any([kept() is not x for kept, x in zip(known.others, others, strict=True)]):
            known = _Known(versions, tuple([weakref.ref(x) for x in others]), key, read())
            self._known[first] = known
        fact: T = known.fact
        return fact
