"""The Triton kernel of a token of linear attention against the op over all tokens, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from _triton_checks import DEVICE

import accel
from accel import dispatch
from accel.ops.linear.linear_attention_step import OP
from accel.testing import assert_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def by_columns(kv: torch.Tensor) -> torch.Tensor:
    return kv.mT.contiguous().mT


CASES: dict[str, dict[str, Any]] = {
    "one of all": {"B": 1, "H": (1, 1, 1), "D": 1, "E": 1},
    "odd, by columns": {"D": 19, "E": 37, "features": "exp", "layout": by_columns},
    "more than a tile": {"B": 1, "H": (1, 1, 1), "D": 70, "E": 136, "decay": "head"},
    "tiles of values": {"B": 1, "H": (2, 2, 2), "D": 70, "E": 136, "normalize": False, "features": "identity"},
    "grouped queries": {"H": (4, 2, 2), "D": 16, "E": 24, "decay": "token", "features": "relu"},
    "Mamba-2": {"H": (1, 1, 3), "D": 8, "E": 5, "normalize": False, "decay": "token", "features": "squared_relu"},
    "bf16": {"D": 24, "E": 16, "decay": "token", "dtype": BF16},
    "fp16": {"D": 24, "E": 16, "dtype": FP16},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps_are_the_op_over_all_tokens(case: dict[str, Any]) -> None:
    given = {"B": 2, "H": (2, 2, 2), "features": "elu1", "normalize": True, "decay": None, "dtype": FP32, **case}
    B, H, D, E, dtype = (given[name] for name in ("B", "H", "D", "E", "dtype"))
    generator, heads, tokens = torch.Generator().manual_seed(0), max(H[1:]), 3

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    main = [noise(B, h, tokens, n).to(dtype) for h, n in zip(H, (D, D, E), strict=True)]
    kv, k_sum = noise(B, heads, D, E), noise(B, heads, D).abs() + 1.0
    decay = {"token": -noise(B, heads, tokens).abs(), "head": -noise(heads).abs(), None: None}[given["decay"]]
    how = {"feature_map": given["features"], "normalize": given["normalize"], "scale": 0.7, "eps": 1e-3}
    start = kv.double(), k_sum.double() if given["normalize"] else None
    want, (want_kv, want_sum) = accel.linear_attention(
        *[x.double() for x in main], causal=True, log_decay=None if decay is None else decay.double(),
        initial_state=start, return_state=True, backend="reference", **how,
    )  # fmt: skip

    state = given.get("layout", torch.clone)(kv.to(DEVICE)), k_sum.to(DEVICE)
    versions, rows = [x._version for x in state], []
    for t in range(tokens):
        at = decay if decay is None or decay.dim() == 1 else decay[:, :, t : t + 1]
        token = [x[:, :, t : t + 1].to(DEVICE) for x in main]
        at = None if at is None else at.to(DEVICE)
        rows.append(accel.linear_attention_step(*token, state, log_decay=at, backend="triton", **how))
    assert rows[0].dtype == dtype
    assert_close(torch.cat(rows, 2), want, "linear", dtype)
    assert_close(state[0], want_kv, "linear", FP32)
    if given["normalize"]:
        assert_close(state[1], want_sum, "linear", FP32)
    assert state[0]._version > versions[0]
    assert (state[1]._version > versions[1]) is given["normalize"]


def test_a_denominator_of_0_gives_0() -> None:
    token = -torch.ones(1, 1, 1, 16, device=DEVICE)
    state = torch.zeros(1, 1, 16, 16, device=DEVICE), torch.zeros(1, 1, 16, device=DEVICE)
    out = accel.linear_attention_step(token, token, token, state, feature_map="relu", eps=0.0, backend="triton")
    assert torch.equal(out, torch.zeros_like(out))


def test_why_not() -> None:
    token, kv = torch.ones(1, 1, 1, 16, device=DEVICE), torch.ones(1, 1, 16, 16, 2, device=DEVICE)

    def reason(kv: torch.Tensor) -> str:
        return str(dispatch.reasons(OP, OP.prepare(token, token, token, (kv, None), normalize=False))["triton"])

    assert "not a matrix a head" in reason(kv[..., 0])
    assert reason(kv[..., 0].contiguous()) == "None"
