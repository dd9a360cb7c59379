"""Experts over processes: several gloo processes against one that holds them all."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import accel
from accel.distributed import _Spread, expert_parallel

C, I, X, K = 8, 6, 5, 2  # noqa: E741
COUNTS = {2: ((5, 9), (0, 4), (7, 0)), 4: ((5, 0, 3, 9), (1, 1, 0, 0))}
"""Tokens of each process, call by call; X is no multiple of any number of processes."""


def layer():
    torch.manual_seed(0)
    return accel.nn.MoE(C, I, X, K, score="sigmoid", bias=True, shared_dim=4, scale=2.0)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def compared(rank, size, counts, run, patched=False):
    """The model of one process on all tokens, and of several on theirs: outputs and every gradient."""
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), C, generator=generator)
    weights = torch.randn(sum(counts), C, generator=generator)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    whole = layer()
    spread = copy.deepcopy(whole)
    if size > 1:
        expert_parallel(spread, init_device_mesh("cpu", (size,)))
    all_, own = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    want, got = whole(all_), run(spread, own)
    close(got, want[mine])
    (want * weights).sum().backward()
    (got * weights[mine]).sum().backward()
    close(own.grad, all_.grad[mine])
    for name, parameter in whole.experts.named_parameters():
        held = getattr(spread.experts, name)
        start = spread.experts.forward.starts[rank]
        close(held.grad, parameter.grad[start : start + held.shape[0]])
    routers = spread.router.weight.grad.clone()
    dist.all_reduce(routers)  # as data parallelism would
    close(routers, whole.router.weight.grad)


def rank_main(rank, size, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    for counts in COUNTS[size]:
        compared(rank, size, counts, lambda model, x: model(x))
    compared(rank, size, COUNTS[size][0], lambda model, x: checkpoint(model, x, use_reentrant=False))
    elsewhere(rank, size)
    refused(size)
    if size == 4:
        of_transformers(rank, size)
    dist.destroy_process_group()


def elsewhere(rank, size):
    """Choices of no expert, all on one expert, frozen experts, and a capacity that drops nothing."""
    torch.manual_seed(1)
    whole = accel.nn.Experts(X, C, I)
    spread = expert_parallel(copy.deepcopy(whole), init_device_mesh("cpu", (size,)))
    x, weights = torch.randn(6, C), torch.rand(6, K)
    for indices in (torch.tensor([[-1, X], [0, 4], [X + 3, 1], [2, 2], [4, -7], [3, 0]]), torch.full((6, K), 3)):
        close(spread(x, indices, weights), whole(x, indices, weights))
    spread.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    spread(leaf, indices, weights).sum().backward()
    want = x.clone().requires_grad_()
    whole(want, indices, weights).sum().backward()
    close(leaf.grad, want.grad)
    capacious = accel.nn.MoE(C, I, X, K, capacity_factor=100.0)  # which counts the experts of all processes
    want = capacious(x)
    close(expert_parallel(capacious, init_device_mesh("cpu", (size,)))(x), want)


def refused(size):
    mesh = init_device_mesh("cpu", (size,))
    with pytest.raises(ValueError, match="Linear holds no experts"):
        expert_parallel(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match=f"has 1 experts for {size} processes"):
        expert_parallel(accel.nn.Experts(1, C, I), mesh)
    with pytest.raises(ValueError, match="are spread already"):
        expert_parallel(expert_parallel(layer(), mesh), mesh)
    with pytest.raises(ValueError, match="mesh must have one axis, got 2"):
        expert_parallel(layer(), init_device_mesh("cpu", (size, 1)))


def of_transformers(rank, size):
    """A whole Mixtral, patched first."""
    from accel.benchmarks._torchvision import allow_import

    allow_import()  # transformers imports torchvision where it is installed
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=6)
    )
    tokens = torch.randint(50, (1, 3 + rank), generator=torch.Generator().manual_seed(rank))
    want = model(tokens).logits
    accel.patch(model)
    expert_parallel(model, init_device_mesh("cpu", (size,)))
    assert sum(isinstance(vars(m).get("forward"), _Spread) for m in model.modules()) == 2
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == (2 if rank < 2 else 1)
    close(model(tokens).logits, want)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_compute_what_one_does(size, tmp_path):
    mp.spawn(rank_main, (size, os.fspath(tmp_path / "store")), nprocs=size)
