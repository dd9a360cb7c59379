"""Calls of softmax attention that are refused in words, and calls with nothing in them."""

import math

import pytest
import torch
from _attention_calls import BACKENDS, drawn
from _attention_cases import WHOLE
from _bad import Bad, check_bad, each, zeros

import accel
from accel import BlockCausal, BlockDiffusion, Grid2D, PrefixLM, T5Buckets


def offsets(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


INT = {"dtype": torch.int64}
META = {"device": "meta"}
BAD = [
    Bad("rank_3", ValueError, r"q must be .*\(4, 6, 8\)", {"q": zeros(4, 6, 8)}),
    Bad("rank_5_of_v", ValueError, r"v must be .*\(1, 2, 4, 7, 8\)", {"v": zeros(1, 2, 4, 7, 8)}),
    Bad("not_a_tensor", TypeError, "q must be .* got list", {"q": [1.0]}),
    Bad("keys_not_a_tensor", TypeError, "k must be .* got NoneType", {"k": None}),
    Bad("integer_q", TypeError, "q must be .*int64", {"q": zeros(2, 4, 6, 8, **INT)}),
    Bad("complex_v", TypeError, "v must be .*complex64", {"v": zeros(2, 2, 7, 8, dtype=torch.complex64)}),
    Bad("dtypes_differ", TypeError, "float32, torch.bfloat16", {"k": zeros(2, 2, 7, 8, dtype=torch.bfloat16)}),
    Bad("k_elsewhere", ValueError, "k is on meta but q is on cpu", {"k": zeros(2, 2, 7, 8, **META)}),
    Bad(
        "batches_differ",
        ValueError,
        r"\(2, 4, 6, 8\).*\(3, 2, 7, 8\)",
        {"k": zeros(3, 2, 7, 8), "v": zeros(3, 2, 7, 8)},
    ),
    Bad("sizes_differ", ValueError, r"\(2, 4, 6, 8\).*\(2, 2, 7, 16\)", {"k": zeros(2, 2, 7, 16)}),
    Bad("keys_and_values_differ", ValueError, r"\(2, 2, 7, 8\).*\(2, 2, 5, 8\)", {"v": zeros(2, 2, 5, 8)}),
    Bad(
        "heads_do_not_divide",
        ValueError,
        r"divide.*\(2, 4, 6, 8\).*\(2, 3, 7, 8\)",
        {"k": zeros(2, 3, 7, 8), "v": zeros(2, 3, 7, 8)},
    ),
    Bad("no_heads_of_keys", ValueError, r"divide.*\(2, 0, 7, 8\)", {"k": zeros(2, 0, 7, 8), "v": zeros(2, 0, 7, 8)}),
    Bad("scale_infinite", ValueError, "scale=inf", {"scale": math.inf}),
    Bad("scale_nan", ValueError, "scale=nan", {"scale": math.nan}),
    Bad("softcap_zero", ValueError, "softcap=0.0", {"softcap": 0.0}),
    Bad("softcap_negative", ValueError, "softcap=-30.0", {"softcap": -30.0}),
    Bad("softcap_nan", ValueError, "softcap=nan", {"softcap": math.nan}),
    Bad("softcap_infinite", ValueError, "softcap=inf", {"softcap": math.inf}),
    Bad("dropout_1", ValueError, "dropout_p=1.0", {"dropout_p": 1.0}),
    Bad("dropout_negative", ValueError, "dropout_p=-0.1", {"dropout_p": -0.1}),
    Bad("dropout_nan", ValueError, "dropout_p=nan", {"dropout_p": math.nan}),
    Bad("causal_word", ValueError, "causal='upper'", {"causal": "upper"}),
    Bad("causal_number", ValueError, "causal=2", {"causal": 2}),
    Bad("window_of_one_number", ValueError, "window=5", {"window": 5}),
    Bad("window_of_three", ValueError, r"window=\(1, 2, 3\)", {"window": (1, 2, 3)}),
    Bad("window_negative", ValueError, r"window=\(-2, 0\)", {"window": (-2, 0)}),
    Bad("window_not_whole", ValueError, r"window=\(1.5, 0\)", {"window": (1.5, 0)}),
    Bad("pattern_of_wrong_kind", TypeError, "pattern must be .* got 'causal'", {"pattern": "causal"}),
    Bad("prefix_for_other_batch", ValueError, r"2 sequences, got \(3,\)", {"pattern": PrefixLM([1, 2, 3])}),
    Bad("prefix_float", ValueError, "float32", {"pattern": PrefixLM([1.0, 2.0])}),
    Bad("prefix_negative", ValueError, r"at least 0.*-1", {"pattern": PrefixLM([3, -1])}),
    Bad("prefix_negative_int", ValueError, r"at least 0.*-2", {"pattern": PrefixLM(-2)}),
    Bad("diffusion_not_square", ValueError, "T=6, S=7", {"pattern": BlockDiffusion(2)}),
    Bad("two_diffusions", ValueError, r"at most one.*n=2.*n=3", {"pattern": [BlockDiffusion(2), BlockDiffusion(3)]}),
    Bad("mask_not_boolean", TypeError, "mask must be boolean.*float32", {"mask": zeros(6, 7)}),
    Bad("mask_not_a_tensor", TypeError, "mask must be boolean.*list", {"mask": [True]}),
    Bad("mask_elsewhere", ValueError, "mask is on meta .* cpu", {"mask": zeros(6, 7, dtype=torch.bool, **META)}),
    Bad("mask_shape", ValueError, r"mask .*\(2, 4, 6, 7\).*\(1, 1, 6, 8\)", {"mask": zeros(6, 8, dtype=torch.bool)}),
    Bad("mask_rank_5", ValueError, r"mask .*\(1, 1, 1, 6, 7\)", {"mask": zeros(1, 1, 1, 6, 7, dtype=torch.bool)}),
    Bad("mask_of_kv_heads", ValueError, r"mask .*\(2, 2, 6, 7\)", {"mask": zeros(2, 2, 6, 7, dtype=torch.bool)}),
    Bad("bias_shape", ValueError, r"bias .*\(2, 4, 6, 7\).*\(1, 4, 7, 6\)", {"bias": zeros(4, 7, 6)}),
    Bad("bias_boolean", TypeError, "bias must be .*bool", {"bias": zeros(6, 7, dtype=torch.bool)}),
    Bad("bias_elsewhere", ValueError, "bias is on meta .* cpu", {"bias": zeros(6, 7, **META)}),
    Bad("table_without_index", TypeError, "bias_index must be .*NoneType", {"bias_table": zeros(12, 4)}),
    Bad("index_without_table", ValueError, "bias_index needs bias_table.*toeplitz", {"bias_index": "toeplitz"}),
    Bad("table_of_other_heads", ValueError, r"\(R, 4\).*\(12, 2\)", {"bias_table": zeros(12, 2), **WHOLE}),
    Bad("table_flat", ValueError, r"\(R, 4\).*\(48,\)", {"bias_table": zeros(48), **WHOLE}),
    Bad("table_empty", ValueError, r"\(0, 4\)", {"bias_table": zeros(0, 4), "bias_index": T5Buckets()}),
    Bad("table_integer", TypeError, "bias_table .*int64", {"bias_table": zeros(12, 4, **INT), **WHOLE}),
    Bad("table_elsewhere", ValueError, "bias_table is on meta", {"bias_table": zeros(12, 4, **META), **WHOLE}),
    Bad("toeplitz_rows", ValueError, r"= 12 rows, got .*\(13, 4\)", {"bias_table": zeros(13, 4), **WHOLE}),
    Bad("index_word", ValueError, "got 'circulant'", {"bias_table": zeros(12, 4), "bias_index": "circulant"}),
    Bad("index_float", TypeError, "bias_index .*float32", {"bias_table": zeros(12, 4), "bias_index": zeros(6, 7)}),
    Bad("index_boolean", TypeError, "bias_index .*bool", {"bias_table": zeros(12, 4), "bias_index": zeros(6, 7) > 0}),
    Bad(
        "index_shape",
        ValueError,
        r"\(6, 7\), got .*\(7, 6\)",
        {"bias_table": zeros(12, 4), "bias_index": zeros(7, 6, **INT)},
    ),
    Bad(
        "index_outside",
        ValueError,
        "from 0 to 12, .*rows 0 to 11",
        {"bias_table": zeros(12, 4), "bias_index": torch.arange(42).view(6, 7) % 13},
    ),
    Bad(
        "index_negative",
        ValueError,
        "from -1 to",
        {"bias_table": zeros(12, 4), "bias_index": torch.arange(42).view(6, 7) % 5 - 1},
    ),
    Bad(
        "index_outside_toeplitz",
        ValueError,
        "from 5 to 5, ",
        {"bias_table": zeros(5, 4), "bias_index": zeros(6, 7, **INT) + 5},
    ),
    Bad(
        "index_elsewhere",
        ValueError,
        "bias_index is on meta",
        {"bias_table": zeros(12, 4), "bias_index": zeros(6, 7, dtype=torch.int64, **META)},
    ),
    Bad("t5_without_room", ValueError, "no room", {"bias_table": zeros(3, 4), "bias_index": T5Buckets()}),
    Bad(
        "t5_distance",
        ValueError,
        "max_distance=8.*16 buckets",
        {"bias_table": zeros(32, 4), "bias_index": T5Buckets(max_distance=8)},
    ),
    Bad(
        "grid_of_other_size",
        ValueError,
        r"T = S = 12 .*T=6, S=7, .*\(35, 4\)",
        {"bias_table": zeros(35, 4), "bias_index": Grid2D(3, 4)},
    ),
    Bad("slopes_shape", ValueError, r"alibi_slopes must be \(4,\).*\(2,\)", {"alibi_slopes": zeros(2)}),
    Bad("slopes_integer", TypeError, "alibi_slopes .*int64", {"alibi_slopes": zeros(4, **INT)}),
    Bad("slopes_elsewhere", ValueError, "alibi_slopes is on meta", {"alibi_slopes": zeros(4, **META)}),
    Bad("sinks_shape", ValueError, r"sinks must be \(4,\).*\(4, 1\)", {"sinks": zeros(4, 1)}),
    Bad("sinks_integer", TypeError, "sinks .*int64", {"sinks": zeros(4, **INT)}),
    Bad("packed_batch", ValueError, r"\(1, H, total, D\), got .*\(2, 4, 6, 8\)", {"cu_seqlens_q": offsets(0, 6)}),
    Bad("cu_k_alone", ValueError, r"cu_seqlens_k needs cu_seqlens_q, got .*\(2,\)", {"cu_seqlens_k": offsets(0, 7)}),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has torch, cpu", {"backend": "cuda9"}),
    Bad(
        "backend_refuses",
        NotImplementedError,
        "multiple of 4 .* not 10",
        {"q": zeros(2, 4, 6, 10), "k": zeros(2, 2, 7, 10), "backend": "cpu"},
    ),
    Bad(
        "backend_refuses_size", NotImplementedError, "up to 256, not 264", {"v": zeros(2, 2, 7, 264), "backend": "cpu"}
    ),
    Bad(
        "backend_refuses_dtype",
        NotImplementedError,
        "not torch.float64",
        {n: zeros(2, h, t, 8, dtype=torch.float64) for n, h, t in (("q", 4, 6), ("k", 2, 7), ("v", 2, 7))}
        | {"backend": "cpu"},
    ),
]


@each(BAD)
def test_bad_input(bad):
    good = {"q": zeros(2, 4, 6, 8), "k": zeros(2, 2, 7, 8), "v": zeros(2, 2, 7, 8)}
    check_bad(accel.softmax_attention, good, bad)


EIGHT = offsets(0, 3, 8)
BAD_PACKED = [
    Bad("decreasing", ValueError, r"without falling, got \[0, 5, 3, 8\]", {"cu_seqlens_q": offsets(0, 5, 3, 8)}),
    Bad("negative", ValueError, r"\[0, -2, 8\]", {"cu_seqlens_q": offsets(0, -2, 8)}),
    Bad("too_long", ValueError, r"the 8 packed tokens .*\[0, 3, 9\]", {"cu_seqlens_q": offsets(0, 3, 9)}),
    Bad("too_short", ValueError, r"the 8 packed tokens .*\[0, 3, 7\]", {"cu_seqlens_q": offsets(0, 3, 7)}),
    Bad("does_not_start_at_0", ValueError, r"\[1, 3, 8\]", {"cu_seqlens_q": offsets(1, 3, 8)}),
    Bad(
        "long_list_is_cut",
        ValueError,
        r"\[0, 1, 2, 3, 4, 5, '...', 8, 8, 8, 8, 7\]",
        {"cu_seqlens_q": offsets(*range(9), 8, 8, 8, 7)},
    ),
    Bad("wrong_dtype", TypeError, "cu_seqlens_q must be int32 or int64, got torch.float32", {"cu_seqlens_q": zeros(3)}),
    Bad("int16", TypeError, "got torch.int16", {"cu_seqlens_q": offsets(0, 8, dtype=torch.int16)}),
    Bad("a_list", TypeError, "got list", {"cu_seqlens_q": [0, 8]}),
    Bad("one_number", ValueError, r"\(1,\)", {"cu_seqlens_q": offsets(0)}),
    Bad("two_axes", ValueError, r"\(1, 2\)", {"cu_seqlens_q": offsets([0, 8])}),
    Bad("elsewhere", ValueError, "cu_seqlens_q is on meta", {"cu_seqlens_q": offsets(0, 8, device="meta")}),
    Bad("keys_decrease", ValueError, r"cu_seqlens_k .*\[0, 9, 8\]", {"cu_seqlens_k": offsets(0, 9, 8)}),
    Bad("keys_elsewhere", ValueError, "cu_seqlens_k is on meta", {"cu_seqlens_k": offsets(0, 3, 8, device="meta")}),
    Bad("other_number_of_sequences", ValueError, r"\(3,\).*\(2,\)", {"cu_seqlens_k": offsets(0, 8)}),
    Bad("keys_differ", ValueError, r"\(1, 2, 8, 8\).*\(1, 2, 9, 8\)", {"k": zeros(1, 2, 9, 8), "v": zeros(1, 2, 9, 8)}),
    Bad("dense_mask", ValueError, r"'mask': \(1, 1, 8, 8\)", {"mask": zeros(8, 8, dtype=torch.bool)}),
    Bad("dense_bias", ValueError, r"'bias': \(1, 2, 1, 1\)", {"bias": zeros(2, 1, 1)}),
    Bad(
        "index_tensor",
        ValueError,
        r"a rule, not a tensor of \(8, 8\)",
        {"bias_table": zeros(9, 2), "bias_index": zeros(8, 8, **INT)},
    ),
    Bad("grid", ValueError, r"sequences of 8 tokens", {"bias_table": zeros(21, 2), "bias_index": Grid2D(2, 4)}),
    Bad("toeplitz_even", ValueError, "got 10 rows", {"bias_table": zeros(10, 2), **WHOLE}),
    Bad("toeplitz_short", ValueError, "reach 4, the 7 rows .* reach 3", {"bias_table": zeros(7, 2), **WHOLE}),
    Bad("prefix_for_other_number", ValueError, r"2 sequences, got \(1,\)", {"pattern": PrefixLM([1])}),
    Bad("diffusion_of_odd_length", ValueError, r"even length", {"pattern": BlockDiffusion(2)}),
    Bad(
        "diffusion_of_two_offsets",
        ValueError,
        "as many queries as keys",
        {"pattern": BlockDiffusion(2), "cu_seqlens_k": EIGHT.clone()},
    ),
    Bad(
        "alibi_and_table",
        NotImplementedError,
        "packed alike",
        {
            "cu_seqlens_k": EIGHT.clone(),
            "alibi_slopes": zeros(2),
            "bias_table": zeros(32, 2),
            "bias_index": T5Buckets(),
        },
    ),
]


@each(BAD_PACKED)
def test_bad_packed_input(bad):
    good = {n: zeros(1, 2, 8, 8) for n in "qkv"} | {"cu_seqlens_q": EIGHT}
    check_bad(accel.softmax_attention, good, bad)


@pytest.mark.parametrize("rule", [BlockCausal, BlockDiffusion])
@pytest.mark.parametrize("n", [0, -3, 2.5, None])
def test_a_block_has_a_size(rule, n):
    with pytest.raises(ValueError, match=f"{rule.__name__} takes a positive block size, got {n}"):
        rule(n)


@pytest.mark.parametrize("sizes", [(0, 3, 0), (3, 0, 1), (2, 2, -1)])
def test_a_grid_has_sides(sizes):
    with pytest.raises(ValueError, match=f"h={sizes[0]}, w={sizes[1]}, extra={sizes[2]}"):
        Grid2D(*sizes)


def test_zero_and_one_stand_for_false_and_true():
    q, k, v = drawn(5, 5)
    for number in (0, 1):
        got = accel.softmax_attention(q, k, v, causal=number, backend="reference")
        assert torch.equal(got, accel.softmax_attention(q, k, v, causal=bool(number), backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("B", "H", "T", "S", "E"),
    [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (2, 2, 0, 0, 8), (2, 2, 3, 4, 0)],
)
def test_nothing_in_nothing_out(B, H, T, S, E, backend):
    q, k, v = (zeros(B, H, n, d).add_(1.0).requires_grad_() for n, d in ((T, 8), (S, 8), (S, E)))
    how = {"bias": zeros(1, 1, T, S).requires_grad_(), "causal": True, "alibi_slopes": zeros(H).requires_grad_()}
    if E == 0 and backend == "cpu":
        with pytest.raises(NotImplementedError, match="not 0"):
            accel.softmax_attention(q, k, v, backend=backend)
        return
    for given in ({}, how):
        out, lse = accel.softmax_attention(q, k, v, **given, return_lse=True, backend=backend)
        assert out.shape == (B, H, T, E)
        assert torch.equal(
            out,
            torch.ones_like(out)
            if S and not given
            else torch.where(lse[..., None] == -math.inf, 0.0, torch.ones_like(out)),
        )
        if S == 0:
            assert (lse == -math.inf).all()
        leaves = [q, k, v, *(x for x in given.values() if isinstance(x, torch.Tensor))]
        for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves, allow_unused=True), strict=True):
            assert grad is None or (grad.shape == x.shape and grad.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_leave_the_sink(backend):
    q, none = zeros(1, 2, 3, 8), zeros(1, 2, 0, 8)
    sinks = torch.tensor([0.5, -2.0])
    out, lse = accel.softmax_attention(q, none, none, sinks=sinks, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, sinks[:, None].expand(2, 3)[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_of_no_tokens(backend):
    none = zeros(1, 2, 0, 8).requires_grad_()
    out = accel.softmax_attention(none, none, none, cu_seqlens_q=offsets(0, 0, 0), causal=True, backend=backend)
    assert out.shape == (1, 2, 0, 8)
    out.sum().backward()
    assert none.grad.shape == none.shape
