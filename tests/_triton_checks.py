"""Checks of an op's Triton backend as pytest parameters. Triton's interpreter takes seconds for what others do in
milliseconds: what is not named as quick is marked slow where there is no GPU."""

import functools

import pytest
import torch

from accel.testing import check_guard_pages, check_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK_BEHAVIOUR = ("empty", "strides", "poison", "repeat", "batch", "second_derivative")


def params(function, cases, tiny, quick):
    """Every check of ``cases`` and of the behaviour of ``tiny``. ``quick`` maps names of cases to the dtype in which
    they run by default."""
    names = {f"triton-{dtype}-{name}" for name, dtype in quick.items()}
    names |= {f"triton-{check}-{case}" for check in QUICK_BEHAVIOUR for case in tiny[:1]}
    found = dict(check_op(function, cases, tiny, (), ["triton"], device=DEVICE))
    if DEVICE == "cpu":
        found["triton-guard_pages"] = functools.partial(check_guard_pages, function, tiny, "triton")
    assert names <= found.keys(), f"no such checks: {names - found.keys()}"
    slow = [] if DEVICE == "cuda" else [pytest.mark.slow]
    return [
        pytest.param(check, id=name.removeprefix("triton-"), marks=[] if name in names else slow)
        for name, check in found.items()
    ]


def on_the_cpu(*args):
    """Arguments for a test of all backends, which knows no GPU; skips where there is one."""
    if DEVICE == "cuda":
        pytest.skip("its tensors are on the CPU")
    return args
