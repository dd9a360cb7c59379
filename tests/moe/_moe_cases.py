"""What the tests of routing and permutation share: calls as data for the common checks, and oracles in plain loops."""

import math

import pytest
import torch

import accel
from accel import testing
from accel.ops.moe.plan import Plan
from accel.testing import Case

BACKENDS = ("cpu", "reference")
LONG = ("reference-compile", "compiled_use")
"""Checks that the default run leaves out: what they are about is the same for every op."""
FP32 = (torch.float32,)


def checks_of(function, values, behaviour, gradients, asked_here, slow=LONG):
    """``check_op`` as parameters, but for what a test asks in its own terms."""
    return [
        pytest.param(check, id=name, marks=[pytest.mark.slow] if any(part in name for part in slow) else [])
        for name, check in testing.check_op(function, values, behaviour, gradients, BACKENDS)
        if not any(part in name for part in asked_here)
    ]


# --- routing ---


def moe_route(logits, backend=None, **kwargs):
    """Both results as one tensor, ``(T, X)``: the weight of each expert, 0 where it was not chosen."""
    weights, indices = accel.moe_route(logits, backend=backend, **kwargs)
    return torch.zeros_like(logits, dtype=weights.dtype).scatter(1, indices, weights).to(logits.dtype)


def route_case(name, T, X, K, *, bias=None, change=None, dtypes=testing.KERNEL_DTYPES, family="softmax", **kwargs):
    """A case with random logits, and with ``bias`` random ones of that size; ``change(logits)`` edits them in place."""

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed + 11)
        logits = 2.0 * torch.randn((T, X), generator=generator)
        if change is not None:
            change(logits)
        given = {"top_k": K, **kwargs}
        if bias is not None:
            given["bias"] = (bias * torch.randn(X, generator=generator)).to(device)
        return {"logits": logits.to(device, dtype)}, given

    return Case(name, make, family, dtypes, batched=("logits",))


def scores_of(row, kind):
    """The scores of a token's logits, NaN where a logit is one."""
    if kind == "softmax":
        numbers = [x for x in row if x == x]
        largest = max(numbers, default=math.nan)
        exps = [math.exp(x - largest) if x == x and largest != -math.inf else math.nan for x in row]
        total = sum(x for x in exps if x == x)
        return [x / total if total else math.nan for x in exps]
    if kind == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in row]
    if kind == "sqrt_softplus":
        return [math.sqrt(math.log1p(math.exp(x))) if x < 30 else math.sqrt(x) for x in row]
    return row


def ranked(values, places):
    """The places from the largest value on, ties in their order, NaN last."""
    return sorted(places, key=lambda i: (values[i] != values[i], -values[i] if values[i] == values[i] else 0.0, i))


def route_oracle(logits, top_k, score="softmax", bias=None, num_groups=None, topk_groups=None, group_score="top2_sum",
                 renormalize=True, eps=1e-20, scale=1.0):  # fmt: skip
    """Weights and indices, one token after the other, in float64."""
    weights, indices = [], []
    for row in logits.double().tolist():
        scores = scores_of(row, score)
        compared = scores if bias is None else [s + b for s, b in zip(scores, bias.double().tolist(), strict=True)]
        allowed = list(range(len(row)))
        if num_groups is not None:
            size = len(row) // num_groups
            groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
            best = [ranked(compared, group) for group in groups]
            values = [sum(compared[i] for i in b[: 1 if group_score == "max" else 2]) for b in best]
            allowed = [i for g in sorted(ranked(values, range(num_groups))[:topk_groups]) for i in groups[g]]
        chosen = ranked(row if bias is None else compared, allowed)[:top_k]
        found = (
            scores_of([row[i] for i in chosen], "softmax") if score == "softmax_topk" else [scores[i] for i in chosen]
        )
        if score.startswith("softmax") and any(
            x != x for x in (row if score == "softmax" else [row[i] for i in chosen])
        ):
            found = [math.nan] * top_k
        if renormalize and score != "softmax_topk":
            total = sum(found) + eps
            found = [w / total for w in found]
        weights.append([scale * w for w in found])
        indices.append(chosen)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(indices)


# --- permutation ---


def moe_permute(x, indices, num_experts, backend=None, **kwargs):
    return accel.moe_permute(x, indices, num_experts, backend=backend, **kwargs)[0]


def choices(T, K, X, seed=0, nobody=0.0, distinct=True):
    """Indices of T tokens; some of them, outside of [0, X), of nobody."""
    generator = torch.Generator().manual_seed(seed)
    if distinct and K <= X:
        indices = torch.rand((T, X), generator=generator).argsort(1)[:, :K]
    else:
        indices = torch.randint(0, X, (T, K), generator=generator)
    strange = torch.where(torch.rand((T, K), generator=generator) < 0.5, -1, X)
    return torch.where(torch.rand((T, K), generator=generator) < nobody, strange, indices)


def permute_case(name, T, K, X, C, *, nobody=0.0, distinct=True, whole=False, indices=None, scores=False,
                 dtypes=testing.KERNEL_DTYPES, **kwargs):  # fmt: skip
    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed + 5)
        x = torch.randn((T, C), generator=generator)
        given = {"num_experts": X, **kwargs}
        if scores:
            given |= {"weights": torch.rand((T, K), generator=generator).to(device), "drop": "score"}
        chosen = choices(T, K, X, seed, nobody, distinct) if indices is None else indices
        x = x.mul(4).round() if whole else x
        return {"x": x.to(device, dtype), "indices": chosen.to(device)}, given

    return Case(name, make, "exact" if whole else "softmax", dtypes, batched=("x", "indices"))


def unpermute_case(name, T, K, X, C, *, nobody=0.0, whole=False, dtypes=testing.KERNEL_DTYPES, **kwargs):
    """The plan is that of random choices, with the arguments of the permutation."""

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed + 7)
        rows, plan = accel.moe_permute(
            torch.zeros(T, 1), choices(T, K, X, seed, nobody), X, backend="reference", **kwargs
        )
        y, weights = torch.randn((len(rows), C), generator=generator), torch.randn((T, K), generator=generator)
        if whole:
            y, weights = y.mul(2).round(), weights.mul(2).round()
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {"y": y.to(device, dtype), "weights": weights.to(device, inner)}
        return tensors, {"plan": Plan(*[x.to(device) for x in plan])}

    return Case(name, make, "exact" if whole else "softmax", dtypes)


def plan_oracle(indices, num_experts, capacity=None, weights=None, align=1):
    """Source without the tail, destination, counts and offsets, one expert after the other."""
    flat = indices.flatten().tolist()
    source, destination, counts, offsets = [], [-1] * len(flat), [], [0]
    for x in range(num_experts):
        mine = [i for i, e in enumerate(flat) if e == x]
        if capacity is not None:
            best = mine if weights is None else ranked(weights.flatten().tolist(), mine)
            mine = sorted(best[:capacity])
        for i in mine:
            destination[i] = len(source)
            source.append(i)
        source += [-1] * (-len(mine) % align)
        counts.append(len(mine))
        offsets.append(len(source))
    return source, torch.tensor(destination).view(indices.shape), torch.tensor(counts), torch.tensor(offsets)
