"""Importing torchvision where its native part does not fit the installed torch.

The registry's torchvision is a CUDA build; beside a CPU build of torch its extension does not load, and then its
pure-Python part (and with it timm and transformers' vision models) fails on the missing schema of ``nms``. Defining
the two schemas is enough for models. This is for tests and benchmarks only: the library never does it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from accel.benchmarks.harness import UnavailableError

_keep: list[torch.library.Library] = []


def allow_import() -> None:
    """Make ``import torchvision`` succeed; does nothing where it works by itself. Call before the first import."""
    if _keep:
        return
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        import sys

        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # half an import would be found again
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep.append(library)


def operator(name: str) -> Callable[..., Tensor]:
    """The function of torchvision.ops that calls its native operator of that name."""
    allow_import()
    import torchvision

    if not hasattr(torch.ops.torchvision, name):
        raise UnavailableError("its native part does not load")
    function: Callable[..., Tensor] = getattr(torchvision.ops, name)
    return function
