"""Cases of the products of experts: counts of rows, and routings, that are awkward on purpose."""

import torch

from accel.testing import Case


def numbers(generator, dtype, whole, scale=1.0):
    """``make(*shape)``: normal values, or integers from −2 to 2."""

    def make(*shape):
        if whole:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    return make


def inner(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_case(name, counts, C, O, *, tail=0, transposed=False, bias=False, whole=False, kind=torch.int64, **how):  # noqa: E741
    """``counts`` rows for each expert, and ``tail`` rows that have none."""

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        make = numbers(generator, dtype, whole)
        X = len(counts)
        tensors = {"x": make(sum(counts) + tail, C), "weight": make(X, *((C, O) if transposed else (O, C)))}
        if bias:
            tensors["bias"] = make(X, O).to(inner(dtype))
        offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=kind)
        tensors = {n: t.to(device) for n, t in tensors.items()}
        return tensors, {"offsets": offsets.to(device), "transposed": transposed}

    family = "exact" if whole else "grouped"
    return Case(name, make, family, autocast=("x", "weight"), **how)


def route(T, K, X, how, generator):
    """The experts of each token: any, with some that are not here, all the same one, or half of them the same."""
    indices = torch.randint(0, X, (T, K), generator=generator)
    if how == "elsewhere":
        indices[torch.rand(T, K, generator=generator) < 0.4] = X
        indices[0, 0] = -1
    if how == "one":
        indices[:] = X // 2
    if how == "skewed":
        indices[: T // 2] = X - 1
    return indices


def experts_case(
    name,
    T=7,
    K=2,
    X=4,
    C=8,
    I=6,  # noqa: E741
    *,
    routing="any",
    activation="silu",
    gated=True,
    layout="concatenated",
    transposed=False,
    bias=False,
    whole=False,
    **how,
):
    J = 2 * I if gated else I

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        make = numbers(generator, dtype, whole)
        first, second = (1.0, 1.0) if whole else (C**-0.5, I**-0.5)
        gate_up = make(X, *((C, J) if transposed else (J, C))) * first
        down = make(X, *((I, C) if transposed else (C, I))) * second
        weights = torch.rand(T, K, generator=generator) + 0.1
        if whole:  # few of them, so that halves hold every product
            weights = torch.randint(1, 3, (T, K), generator=generator) * 0.5
            gate_up = gate_up * (torch.rand(gate_up.shape, generator=generator) < 2.0 / C)
            down = down * (torch.rand(down.shape, generator=generator) < 3.0 / I)
        indices = route(T, K, X, routing, generator)
        tensors = {
            "x": make(T, C),
            "indices": indices,
            "weights": weights.to(inner(dtype)),
            "gate_up_proj": gate_up.to(dtype),
            "down_proj": down.to(dtype),
        }
        if bias:
            tensors["gate_up_bias"], tensors["down_bias"] = make(X, J).to(inner(dtype)), make(X, C).to(inner(dtype))
        kwargs = {"activation": activation, "gated": gated, "layout": layout, "transposed": transposed}
        return {n: t.to(device) for n, t in tensors.items()}, kwargs

    return Case(
        name,
        make,
        "exact" if whole else "experts",
        batched=("x", "indices", "weights"),
        autocast=("x", "gate_up_proj", "down_proj"),
        **how,
    )
