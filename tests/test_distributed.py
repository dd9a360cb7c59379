"""Experts spread over processes against all of them in one: outputs, gradients, and who is refused."""

import contextlib
import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

import accel
from accel.benchmarks._torchvision import allow_import
from accel.distributed import expert_parallel
from accel.nn import Experts, MoE

C, I, X, K = 12, 10, 7, 3  # noqa: E741
TOKENS = (5, 9, 0, 4)
"""Of each process."""


def drawn(T, seed, dtype=torch.float64, routing="any"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, C, generator=generator).to(dtype)
    indices = torch.rand(T, X, generator=generator).topk(K, -1).indices
    if routing == "elsewhere":
        indices[torch.rand(T, K, generator=generator) < 0.4] = X
        indices[:1, 0] = -1
    if routing == "first":
        indices = torch.zeros_like(indices)  # all to the first process
    if routing == "nobody":
        indices = torch.full_like(indices, -1)
    return x, indices, torch.rand(T, K, generator=generator).to(dtype)


def everyone(world, tokens, dtype, routing):
    return [drawn(T, seed, dtype, routing) for seed, T in enumerate(tokens[:world])]


def run(module, x, indices, weights):
    """Output, gradients of tokens, weights and parameters of the sum of its squares with signs."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = module(x, indices, weights)
    grad = torch.linspace(-2, 2, out.numel()).round().view_as(out).to(out.dtype)
    needed = [x, weights, *module.parameters()]
    if x.shape[0] == 0 and not module._forward_hooks and not out.requires_grad:  # a loop that met no token
        return out, tuple([torch.zeros_like(t) for t in needed])
    return out.detach(), torch.autograd.grad(out, needed, grad, materialize_grads=True)


def agree(module, rank, world, tokens=TOKENS, dtype=torch.float64, routing="any", exact=False, batches=None):
    """Spread ``module`` and compare one call with what it did before; leave it spread."""
    given = batches or everyone(world, tokens, dtype, routing)
    alone = [run(module, *one) for one in given]
    handle = expert_parallel(module, init_device_mesh("cpu", (world,)))
    (kept,) = handle.experts.values()
    out, grads = run(module, *given[rank])
    want, mine = alone[rank][0], alone[rank][1][:2]
    summed = [sum(each)[kept.start : kept.stop] for each in zip(*[grads[2:] for _, grads in alone], strict=True)]
    limit = {} if not exact else {"rtol": 0, "atol": 0}
    for got, expected in zip((out, *grads), (want, *mine, *summed), strict=True):
        torch.testing.assert_close(got, expected, **limit)
    return handle


def experts(dtype=torch.float64, whole=False, **how):
    torch.manual_seed(0)
    made = Experts(X, C, I, dtype=dtype, **how)
    if whole:
        for parameter in made.parameters():
            parameter.data = torch.randint(-2, 3, parameter.shape).to(dtype)
    return made


def of_transformers(name, implementation):
    import transformers

    if name == "gpt_oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts_

        config = transformers.GptOssConfig(hidden_size=C, intermediate_size=12, num_local_experts=X)
    else:
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts as Experts_

        config = transformers.MixtralConfig(hidden_size=C, intermediate_size=12, num_local_experts=X)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    made = Experts_(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


# --- what each process does ---


def one_process(rank, world, file):
    torch.set_num_threads(1)
    with contextlib.suppress(ModuleNotFoundError):
        allow_import()  # transformers imports torchvision where it is installed
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=wait)
    try:
        for check in CHECKS:
            check(rank, world)
            dist.barrier()
    finally:
        dist.destroy_process_group()


def outputs_and_gradients(rank, world):
    for routing in ("any", "elsewhere", "first", "nobody"):
        agree(experts(bias=True), rank, world, routing=routing)
    agree(experts(gated=False, activation="relu2"), rank, world)
    agree(experts(torch.float32), rank, world, dtype=torch.float32)
    agree(experts(bias=True), rank, world, tokens=[0] * world)
    agree(experts(bias=True), rank, world, tokens=[0, 6, 0, 0])


def integers_are_exact(rank, world):
    given = []
    for x, indices, weights in everyone(world, TOKENS, torch.float32, "elsewhere"):
        given.append(((2 * x).round(), indices, (4 * weights).round()))
    agree(experts(torch.float32, whole=True, activation="relu"), rank, world, exact=True, batches=given)


def half_precision_is_near(rank, world):
    module = experts(torch.bfloat16)
    given = everyone(world, TOKENS, torch.bfloat16, "any")
    want = module(*given[rank])
    expert_parallel(module, init_device_mesh("cpu", (world,)))
    torch.testing.assert_close(module(*given[rank]), want, rtol=0.03, atol=0.01)


def second_derivatives(rank, world):
    module, (x, indices, weights) = experts(activation="silu"), drawn(4, rank)
    direction = torch.ones(4, C, dtype=torch.float64)

    def curvature():
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((module(leaf, indices, weights) ** 2).sum(), leaf, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), leaf)[0]

    want = curvature()
    expert_parallel(module, init_device_mesh("cpu", (world,)))
    torch.testing.assert_close(curvature(), want)


def whole_layers(rank, world):
    for how in ({"shared_dim": 4, "bias": True}, {"capacity_factor": 0.7, "score": "sigmoid", "balance_rate": 0.1}):
        torch.manual_seed(0)
        moe = MoE(C, I, X, K, dtype=torch.float64, **how).eval()
        x = torch.randn(2, 6, C, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).requires_grad_()
        routers = [x, moe.router.weight]
        want = moe(x)
        want_grads = torch.autograd.grad(want.square().sum(), routers)
        handle = expert_parallel(moe, init_device_mesh("cpu", (world,)))
        assert list(handle.experts) == ["experts"]
        assert moe.experts.down_proj.shape[0] == len(handle.experts["experts"]) < X
        calls = [moe, lambda x, moe=moe: checkpoint(moe, x, use_reentrant=False), copy.deepcopy(moe)]
        calls += [torch.compile(moe, backend="eager")] if world > 2 else []
        for call in calls:
            got = call(x)
            torch.testing.assert_close(got, want)
            router = call.router.weight if isinstance(call, MoE) else routers[1]
            for a, b in zip(torch.autograd.grad(got.square().sum(), [x, router]), want_grads, strict=True):
                torch.testing.assert_close(a, b)


def undone(rank, world):
    module = experts(bias=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x, indices, weights = drawn(5, rank)
    want = module(x, indices, weights)
    handle = expert_parallel(module, init_device_mesh("cpu", (world,)))
    with pytest.raises(ValueError, match="Experts, Experts, cannot be spread: its experts are spread already"):
        expert_parallel(module, init_device_mesh("cpu", (world,)))
    handle.remove()
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module(x, indices, weights), want)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    handle = expert_parallel(module, init_device_mesh("cpu", (world,)))
    with torch.no_grad():
        module.down_bias += 1.0 + rank
    handle.remove()
    added = module.down_bias.detach() - before["down_bias"]
    owner = torch.tensor([next(r for r in range(world) if i < X * (r + 1) // world) for i in range(X)])
    torch.testing.assert_close(added, (1.0 + owner).double()[:, None].expand(X, C))


def an_optimizer_step_is_that_of_one_process(rank, world):
    module, alone = experts(bias=True), experts(bias=True)
    given = everyone(world, TOKENS, torch.float64, "any")
    handle = expert_parallel(module, init_device_mesh("cpu", (world,)))
    for one, batches in ((module, given[rank : rank + 1]), (alone, given)):
        optimizer = torch.optim.Adam(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            sum(one(*batch).square().sum() for batch in batches).backward()
            optimizer.step()
    handle.remove()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def refused(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    few = Experts(world - 1, C, I)
    with pytest.raises(ValueError, match=f"Experts has {world - 1} experts, fewer than the {world} processes"):
        expert_parallel(torch.nn.Sequential(few)[0], mesh)
    assert few.down_proj.shape[0] == world - 1
    with pytest.raises(ValueError, match=rf"one dimension, got \(1, {world}\) with dimensions data, experts"):
        expert_parallel(experts(), init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "experts")))
    part = DeviceMesh("cpu", list(range(1, world)))
    if rank == 0:
        with pytest.raises(ValueError, match="process 0 is not in the mesh of"):
            expert_parallel(experts(), part)


def classes_of_transformers(rank, world):
    pytest.importorskip("transformers.integrations.moe")
    for name in ("mixtral", "gpt_oss"):
        for implementation in ("eager", "grouped_mm", "accel")[name == "gpt_oss" :]:
            for routing in ("any", "first"):
                module = of_transformers(name, implementation)
                handle = agree(module, rank, world, dtype=torch.float32, routing=routing)
        handle.remove()
        assert (module.num_experts, module._is_expert_parallel) == (X, False)


def patched_before_and_after(rank, world):
    pytest.importorskip("transformers.integrations.moe")
    for first in (True, False):
        module = of_transformers("mixtral", "eager")
        model = torch.nn.Sequential(module)
        x, indices, weights = drawn(6, rank, torch.float32)
        want = module(x, indices, weights)
        if first:
            report = accel.patch(model)
        handle = expert_parallel(model, init_device_mesh("cpu", (world,)))
        if not first:
            report = accel.patch(model)
        torch.testing.assert_close(module(x, indices, weights), want, rtol=1e-4, atol=1e-5)
        assert "MixtralExperts" in str(report)
        assert module.__dict__["forward"].calls == 1
        accel.unpatch(model)
        torch.testing.assert_close(module(x, indices, weights), want, rtol=1e-4, atol=1e-5)
        handle.remove()
        torch.testing.assert_close(module(x, indices, weights), want, rtol=1e-4, atol=1e-5)


def a_whole_model(rank, world):
    """Patched, with two layers of experts: logits, and the gradient of what comes before both."""
    transformers = pytest.importorskip("transformers")
    if world == 2:
        return  # it takes a while
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=6)
    )
    tokens = torch.randint(50, (1, 3 + rank), generator=torch.Generator().manual_seed(rank))
    embedding = model.get_input_embeddings().weight

    def run_model():
        logits = model(tokens).logits
        return logits, torch.autograd.grad(logits.square().sum(), embedding)[0]

    want = run_model()
    accel.patch(model)
    handle = expert_parallel(model, init_device_mesh("cpu", (world,)))
    assert list(handle.experts) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    torch.testing.assert_close(run_model(), want, rtol=1e-4, atol=1e-5)


CHECKS = (
    a_whole_model,
    outputs_and_gradients,
    integers_are_exact,
    half_precision_is_near,
    second_derivatives,
    whole_layers,
    undone,
    an_optimizer_step_is_that_of_one_process,
    refused,
    classes_of_transformers,
    patched_before_and_after,
)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_give_what_one_gives(tmp_path, world):
    mp.spawn(one_process, (world, os.fspath(tmp_path / "store")), nprocs=world)
