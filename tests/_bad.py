"""Calls that must be refused in words, as data: what to change of a good call, which error, what it says."""

import dataclasses

import pytest
import torch


@dataclasses.dataclass(frozen=True)
class Bad:
    name: str
    error: type[Exception]
    words: str  # regular expression
    change: dict


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def each(calls):
    """Parametrizes a test of one call, ``bad``."""
    return pytest.mark.parametrize("bad", calls, ids=lambda bad: bad.name)


def check_bad(function, good, bad):
    """``function`` takes the arguments ``good``, and refuses them as ``bad`` changes them."""
    function(**good)
    with pytest.raises(bad.error, match=bad.words):
        function(**{**good, **bad.change})
