"""The one tolerance table, and comparing with it: what an error may be by what was computed and in which dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *HALVES)


class Tolerance(NamedTuple):
    """``rms``: of the error over that of the reference, for a whole output. ``row``: largest error in a row of the
    last axis over the largest reference value in that row. Both must hold, since a mean does not see one bad element
    in a million."""

    rms: float
    row: float


_FP16, _BF16 = 2.0**-11, 2.0**-8  # unit roundoff

# Measured floors are of a tiled softmax that keeps fp32 inside and rounds probabilities and outputs once; limits are
# two to four times the floor. In half precision a row may be off by 4 u: one u for each of the two roundings, doubled.
# In fp32 the row is bounded by ten times the mean, which is what the tail of a sum of rounding errors needs.
TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    # floor 4.5e-7, 2.9e-4, 2.3e-3
    ("softmax", torch.float32): Tolerance(2e-6, 2e-5),
    ("softmax", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    # floor 4.8e-7, 3.0e-4, 2.5e-3: one more product, and the output is rounded before it enters the row's delta
    ("softmax_grad", torch.float32): Tolerance(3e-6, 3e-5),
    ("softmax_grad", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_grad", torch.bfloat16): Tolerance(8e-3, 4 * _BF16),
    # rows that see few keys, or in which biases give one key most of the weight: a gradient there is the difference of
    # nearly equal numbers, of which one, the row's delta, is made of the rounded output. The floor of dense arithmetic
    # that rounds weights, their gradients and outputs once is 22 u in the worst row of 200 calls; the mean is as above
    ("softmax_few", torch.float32): Tolerance(2e-6, 2e-5),
    ("softmax_few", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_few", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("softmax_few_grad", torch.float32): Tolerance(3e-6, 3e-5),
    ("softmax_few_grad", torch.float16): Tolerance(1e-3, 32 * _FP16),
    ("softmax_few_grad", torch.bfloat16): Tolerance(8e-3, 32 * _BF16),
    # the same with thousands of tokens in causal order: the first rows' gradients are rounded as before, and most rows,
    # by which they are measured, shrink with the number of keys; 39 u at 8192 tokens
    ("softmax_long", torch.float32): Tolerance(2e-6, 2e-5),
    ("softmax_long", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_long", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("softmax_long_grad", torch.float32): Tolerance(3e-6, 6e-5),
    ("softmax_long_grad", torch.float16): Tolerance(1e-3, 64 * _FP16),
    ("softmax_long_grad", torch.bfloat16): Tolerance(8e-3, 64 * _BF16),
    # logits of up to 100 or 10 000: rounding a logit, or the log-sum-exp that the backward starts from, to fp32 moves
    # a weight by that many u; in half precision the last rounding hides it
    ("softmax_100", torch.float32): Tolerance(1e-5, 1e-4),
    ("softmax_100", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_100", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("softmax_100_grad", torch.float32): Tolerance(2e-5, 2e-4),
    ("softmax_100_grad", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_100_grad", torch.bfloat16): Tolerance(8e-3, 4 * _BF16),
    ("softmax_10000", torch.float32): Tolerance(1e-5, 1e-4),
    ("softmax_10000", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_10000", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("softmax_10000_grad", torch.float32): Tolerance(1e-4, 1e-3),
    ("softmax_10000_grad", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_10000_grad", torch.bfloat16): Tolerance(8e-3, 4 * _BF16),
    # one number summed with both signs over every weight of the call: plain fp32 torch is off by up to 1.7e-6. In half
    # precision the rounding of the output alone, which the backward starts from, leaves 2.3e-3 and 8.9e-3 in the worst
    # of 40 draws, on an H200 up to 1.5e-3 and 1.1e-2; a kernel that sums rounded terms is off by up to 4e-2
    ("sum_grad", torch.float32): Tolerance(6e-6, 6e-5),
    ("sum_grad", torch.float16): Tolerance(3e-3, 8 * _FP16),
    ("sum_grad", torch.bfloat16): Tolerance(1.5e-2, 8 * _BF16),
    # weights that no row normalises, times values, times a gate. Strips of torch's own products, which keep weights in
    # fp32, have 4.2e-7, 2.7e-4, 1.9e-3 and in the worst row 1.2e-6, 1 u; in gradients 4.3e-7, 3.9e-4, 2.9e-3, worst row
    # 2e-6, 1.8 u. A kernel that multiplies pairs of bf16 rounds weights and upstream gradients times gates once more:
    # 2.8e-3, 3 u, in gradients 3.8e-3, 3.4 u in the worst of six draws of the cases
    ("gau", torch.float32): Tolerance(2e-6, 8e-6),
    ("gau", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("gau", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("gau_grad", torch.float32): Tolerance(2e-6, 8e-6),
    ("gau_grad", torch.float16): Tolerance(1.5e-3, 4 * _FP16),
    ("gau_grad", torch.bfloat16): Tolerance(8e-3, 4 * _BF16),
    # sums of bilinear samples. Rounding a position on a map of 40 pixels to fp32 moves a sample, and any gradient, by
    # 1e-6 of what its neighbours differ: that is the floor in fp32, mean 1.8e-6 and worst row 1.1e-5 for outputs and
    # gradients alike. In half precision everything is rounded once, at the end: 3.0e-4, 2.5e-3, worst row 1 u. A
    # gradient of positions is a sum over channels of differences of pixels, with the same floor
    ("sample", torch.float32): Tolerance(5e-6, 4e-5),
    ("sample", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("sample", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    ("sample_grad", torch.float32): Tolerance(5e-6, 4e-5),
    ("sample_grad", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("sample_grad", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    # the same on maps of 167 pixels, whose positions are rounded four times as coarsely: in the worst of 3 million rows
    # 9.8e-5 here and in torch's grid_sample
    ("sample_wide", torch.float32): Tolerance(5e-6, 1.6e-4),
    ("sample_wide", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("sample_wide", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    ("sample_wide_grad", torch.float32): Tolerance(5e-6, 1.6e-4),
    ("sample_wide_grad", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("sample_wide_grad", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    # products of weights with such samples, fp32 sums over taps and channels. In half precision a sample times its mask
    # is rounded before the product and the output after it: floor 8.1e-7, 3.2e-4, 2.8e-3, worst row 3.6e-6 and 1.9 u
    ("deform_conv", torch.float32): Tolerance(3e-6, 1.5e-5),
    ("deform_conv", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("deform_conv", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    # the weight's gradient is made of the rounded samples: 1.4e-6, 4.3e-4, 3.4e-3, worst row 1.6e-5 and 3.8 u. The
    # others start from the product of weight and upstream gradient; rounded once as well, a sum over channels of its
    # products with differences of pixels (offset) or samples (mask) has 6.7e-4, 4.4e-3, worst row 4.7 u
    ("deform_conv_grad", torch.float32): Tolerance(4e-6, 5e-5),
    ("deform_conv_grad", torch.float16): Tolerance(1.5e-3, 8 * _FP16),
    ("deform_conv_grad", torch.bfloat16): Tolerance(1e-2, 8 * _BF16),
    # sums of products of features, divided by such a sum; everything in fp32, and rounded once. One that multiplies
    # pairs of bf16 rounds features and weights as well: 2.8e-3, 2.8 u, in gradients 5.0e-3, 3.3 u in the worst of six
    # draws of the cases
    ("linear", torch.float32): Tolerance(2e-6, 2e-5),
    ("linear", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("linear", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("linear_grad", torch.float32): Tolerance(3e-6, 3e-5),
    ("linear_grad", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("linear_grad", torch.bfloat16): Tolerance(8e-3, 4 * _BF16),
    # rows that see few keys, or hardly any weight: see "softmax_few". Where all weights are small, a gradient of q is
    # the difference of nearly equal numbers divided by their sum: plain fp32 torch is off by 6.4e-5 in the worst row
    ("linear_few", torch.float32): Tolerance(2e-6, 2e-5),
    ("linear_few", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("linear_few", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("linear_few_grad", torch.float32): Tolerance(3e-6, 1.5e-4),
    ("linear_few_grad", torch.float16): Tolerance(1e-3, 32 * _FP16),
    ("linear_few_grad", torch.bfloat16): Tolerance(8e-3, 32 * _BF16),
    # products of rows with the weights of their expert, summed in fp32 and rounded once: 2e-7 here and in plain torch,
    # 2.1e-4, 1.7e-3
    ("grouped", torch.float32): Tolerance(1e-6, 1e-5),
    ("grouped", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("grouped", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    ("grouped_grad", torch.float32): Tolerance(1e-6, 1e-5),
    ("grouped_grad", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("grouped_grad", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    # two such products with an activation between, whose results are rounded once more: 4e-7, 3.7e-4, 2.8e-3; gradients
    # 5e-7, 5.4e-4, 4.4e-3. Of an expert with few tokens a row of the first projection's gradient is one number times a
    # token, and that number a long sum that may cancel: plain fp32 torch is off by up to 4.8e-5 in such a row
    ("experts", torch.float32): Tolerance(2e-6, 2e-5),
    ("experts", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("experts", torch.bfloat16): Tolerance(8e-3, 4 * _BF16),
    ("experts_grad", torch.float32): Tolerance(2e-6, 1e-4),
    ("experts_grad", torch.float16): Tolerance(1.5e-3, 8 * _FP16),
    ("experts_grad", torch.bfloat16): Tolerance(1e-2, 8 * _BF16),
    # exact products of eight-bit numbers, summed in fp32 and rounded once: 3e-7 at a depth of 16384, 2.1e-4, 1.7e-3
    ("fp8", torch.float32): Tolerance(1e-6, 1e-5),
    ("fp8", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("fp8", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    ("fp8_grad", torch.float32): Tolerance(1e-6, 1e-5),
    ("fp8_grad", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("fp8_grad", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    # kept in fp32 whatever the inputs; about as large as a logit, so one relative figure serves
    ("lse", torch.float32): Tolerance(1e-6, 1e-5),
    # integers small enough that every product, sum and rounding is exact
    ("exact", torch.float32): Tolerance(0.0, 0.0),
    ("exact", torch.float16): Tolerance(0.0, 0.0),
    ("exact", torch.bfloat16): Tolerance(0.0, 0.0),
    ("exact_grad", torch.float32): Tolerance(0.0, 0.0),
    ("exact_grad", torch.float16): Tolerance(0.0, 0.0),
    ("exact_grad", torch.bfloat16): Tolerance(0.0, 0.0),
}


def assert_close(actual: Tensor, expected: Tensor, family: str, dtype: torch.dtype, what: str = "result") -> None:
    """``actual`` is within the table's limits for ``family`` and ``dtype`` of ``expected`` (best float64).

    NaN and infinities must stand in the same places first. A row whose reference is small beside the whole comes from
    cancellation, so the root mean square of the whole is the least a row's error is measured against.
    """
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)=}, {tuple(expected.shape)=}"
    limit = TOLERANCES[family, dtype]
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = test(a) != test(e)
        assert not differ.any(), (
            f"{what}: {name} at {int(test(a).sum())} places, expected at {int(test(e).sum())}; "
            f"they differ at {differ.nonzero()[:4].tolist()}"
        )
    if a.numel() == 0:
        return
    finite = torch.isfinite(e)
    a, e = torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)
    error = (a - e).abs()
    mean = e.square().mean().sqrt()
    rms = error.square().mean().sqrt()
    bound = limit.rms * mean
    assert rms <= bound, (
        f"{what}: rms error {rms:.3e} > {limit.rms:.1e} x rms {mean:.3e} = {bound:.3e} ({family}, {dtype})"
    )
    rows, error_rows = (x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in (e.abs(), error))
    largest = rows.amax(-1).clamp_min(mean)
    excess = error_rows.amax(-1) - limit.row * largest
    worst = int(excess.argmax())
    column = int(error_rows[worst].argmax())
    assert excess[worst] <= 0, (
        f"{what}: error {error_rows[worst, column]:.3e} > {limit.row:.1e} x {largest[worst]:.3e} in row {worst}, "
        f"column {column}: got {a.reshape(-1)[worst * rows.shape[1] + column]:.6e}, "
        f"expected {e.reshape(-1)[worst * rows.shape[1] + column]:.6e} ({family}, {dtype})"
    )


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal bit for bit, except that any NaN equals any NaN."""
    kinds = ((x.dtype, tuple(x.shape)) for x in (actual, expected))
    assert next(kinds) == next(kinds), f"{what}: {actual.dtype=}, {actual.shape=}, {expected.dtype=}, {expected.shape=}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), (
        f"{what}: {int((~same).sum())} of {same.numel()} elements differ, first at {(~same).nonzero()[0].tolist()}: "
        f"{actual[~same][0].item()!r} against {expected[~same][0].item()!r}"
    )
