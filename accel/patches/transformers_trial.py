"""A few tokens to try a transformers model on, padded in every way, and a model that does not notice it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from accel.patches.stand import stands_in

LENGTHS = (3, 4, 5)
TOTAL = sum(LENGTHS)
MIDDLE = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
"""The tokens of the sequence that is the same in both versions of the batch."""
_COLUMNS = 9
_STARTS = (0, 2, 4)  # padding stands behind the first sequence, around the second, before the last

# Tokens that a model may treat apart. Those that stand for pictures or sound do not come without them.
_SPECIAL = ("mask", "eos", "pad", "bos", "unk", "sep", "cls")
_NUMBERS = ("_token_id", "_token_index")

# Hooks of libraries that move, gather or collect what a model computes with; others only watch real calls.
_ENGINES = ("torch", "transformers", "accelerate", "deepspeed", "peft")


class Trial:
    """Three short sequences in two versions that share the middle one.

    Token ids come from the vocabulary, with special ones among them; whatever else a call has for each of its tokens
    is taken from the call ``given``, the real tokens of which are where ``real`` says.
    """

    def __init__(self, module: nn.Module, given: dict[str, Any], real: Tensor) -> None:
        self.given = given
        self.device = real.device
        places = real.flatten().nonzero().flatten()
        places = places[torch.arange(TOTAL, device=real.device) % places.numel()]
        made = ("attention_mask", "position_ids")
        tensors = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.dim() > 0 and n not in made}
        first = {n: x.detach().flatten(0, 1)[places] for n, x in tensors.items()}
        second = {n: _with_others(x) for n, x in first.items()}
        ids = first.get("input_ids")
        self.padding = 0
        if ids is not None:
            first["input_ids"], second["input_ids"], self.padding = _ids(module, ids)
        self.versions = (first, second)

    def batch(self, version: int, order: tuple[int, ...]) -> tuple[dict[str, Any], Tensor]:
        """The padded call, with the sequences in ``order``, and where its tokens are real."""
        real = torch.zeros(len(order), _COLUMNS, dtype=torch.bool, device=self.device)
        for row, i in enumerate(order):
            real[row, _STARTS[i] : _STARTS[i] + LENGTHS[i]] = True
        parts = torch.arange(TOTAL, device=self.device).split(LENGTHS)
        tokens = torch.cat([parts[i] for i in order])
        given = dict(self.given)
        for name, x in self.versions[version].items():
            given[name] = x.new_full((*real.shape, *x.shape[1:]), self.padding if name == "input_ids" else 0)
            given[name][real] = x[tokens]
        given["attention_mask"] = real.to(self.given["attention_mask"].dtype)
        positions = given.get("position_ids")
        if positions is not None:
            given["position_ids"] = torch.arange(_COLUMNS, device=self.device, dtype=positions.dtype).expand(real.shape)
        return given, real


def _with_others(x: Tensor) -> Tensor:
    """Other values in the first and the last sequence; numbers that count or name something stay valid."""
    if not x.is_floating_point():
        return x
    changed = -x
    changed[MIDDLE] = x[MIDDLE]
    return changed


def _ids(module: Any, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Token ids for both versions, and the one that stands at padding."""
    size = _vocabulary(module)
    if size is None:  # no table of embeddings: only the ids of the call are known to be valid
        others = like.flip(0)
        others[MIDDLE] = like[MIDDLE]
        return like, others, 0
    named = vars(module.config.get_text_config()) | vars(module.config)
    numbers = {name: i[0] if isinstance(i, list) and i else i for name, i in named.items() if name.endswith(_NUMBERS)}
    numbers = {name: i for name, i in numbers.items() if isinstance(i, int) and 0 <= i < size}
    special = list(dict.fromkeys(numbers[f"{n}_token_id"] for n in _SPECIAL if f"{n}_token_id" in numbers))
    kept = set(numbers.values())
    spread = range(0, size, max(1, size // 64))
    plain = cycle([i for i in spread if i not in kept] or spread)

    def sequence(length: int, *chosen: int) -> list[int]:
        return [*chosen, *(next(plain) for _ in range(length - len(chosen)))][:length]

    middle = sequence(LENGTHS[1], *special[:1])
    first = sequence(LENGTHS[0]) + middle + sequence(LENGTHS[2], *special[:3])
    second = sequence(LENGTHS[0], *special[:1] * 2) + middle + sequence(LENGTHS[2], *special[:1], *special[3:])
    made = [torch.tensor(ids, device=like.device, dtype=like.dtype) for ids in (first, second)]
    return made[0], made[1], numbers.get("pad_token_id", 0)


def _vocabulary(module: Any) -> int | None:
    try:
        table = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = None
    sizes = [getattr(table, "num_embeddings", None), getattr(module.config.get_text_config(), "vocab_size", None)]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(known) if known else None


@contextmanager
def unnoticed(module: nn.Module, device: torch.device, hooks: bool) -> Iterator[None]:
    """Runs without gradients, in eval mode, that leave no trace.

    Flags, numbers and buffers of every module, counts of what stands in them and random numbers are put back. Without
    ``hooks``, only those run that belong to a library which computing may depend on.
    """
    modules = list(module.modules())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if torch.is_autocast_enabled(device.type):
            # no weight that is cast here, without a gradient, may lie in the cache that the call itself reads
            dtype = torch.get_autocast_dtype(device.type)
            stack.enter_context(torch.autocast(device.type, dtype=dtype, cache_enabled=False))
        for each in modules:
            for stand in stands_in(each):
                stack.callback(vars(stand).update, {**vars(stand), "fallbacks": dict(stand.fallbacks)})
            if type(each).__module__.startswith(("torch.distributed", "torch.jit")):
                continue  # keeps accounts of its own from its first call on
            stack.callback(_put_back, each, {name: value for name, value in vars(each).items() if _is_plain(value)})
            each.training = False
            _replace(stack, each, "_buffers", {n: b if b is None else b.clone() for n, b in each._buffers.items()})
            for name in ("_forward_pre_hooks", "_forward_hooks"):
                found = vars(each)[name].items()
                kept = OrderedDict((key, hook) for key, hook in found if hooks or _belongs_to_an_engine(hook))
                _replace(stack, each, name, kept)
        yield


def _replace(stack: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    stack.callback(vars(module).__setitem__, name, vars(module)[name])
    vars(module)[name] = value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return value is None or isinstance(value, bool | int | float | str)


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    held = vars(module)
    for name in [name for name, value in held.items() if _is_plain(value) and name not in before]:
        del held[name]
    held.update(before)


def _belongs_to_an_engine(hook: Any) -> bool:
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.partition(".")[0] in _ENGINES
