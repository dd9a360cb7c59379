"""Training through eight bits over two processes, by DDP and FSDP2, and compiled: the bits of one process."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from accel import FP8Recipe
from accel.nn import FP8Linear
from accel.testing import assert_same

WORLD, STEPS, ROWS = 2, 20, 24
K, HIDDEN, N = 150, 140, 12


def model(storage="master", **recipe):
    torch.manual_seed(4)
    layers = [nn.Linear(K, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, N)]
    recipe = FP8Recipe(**recipe)
    made = [FP8Linear.from_linear(x, recipe, storage if i == 1 else "master") for i, x in enumerate(layers)]
    return nn.Sequential(made[0], nn.SiLU(), made[1], nn.SiLU(), made[2])


def batch(step, rank):
    x = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(100 * step + rank))
    return x, x[:, :N]


def train(module, ranks, call=None):
    """Losses of the last rank, and the module's numbers in the end."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    call, losses = module if call is None else call, []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in ranks:
            x, y = batch(step, rank)
            loss = F.mse_loss(call(x), y)
            loss.backward()
        for p in module.parameters():
            if p.grad is not None:
                p.grad /= len(ranks)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def numbers(module):
    """All tensors; of codes that are sharded, which gloo gathers not, the part of this process."""
    found = {}
    for name, t in module.state_dict().items():
        eight = t.dtype == torch.float8_e4m3fn
        if isinstance(t, DTensor):
            t = t.to_local() if eight else t.full_tensor()
        found[name.removeprefix("module.")] = t.view(torch.uint8) if eight else t.clone()
    return found


def check_equal(rank, got, losses, want, want_losses):
    assert got.keys() == want.keys()
    for name, t in want.items():
        part = t if got[name].shape == t.shape else t.chunk(WORLD)[rank]
        assert_same(got[name], part, name)
    if rank == WORLD - 1:
        assert_same(losses, want_losses, "losses")


def alone(**how):
    module = model(**how)
    start = numbers(module)
    losses = train(module, range(WORLD))
    assert any(not torch.equal(v, start[k]) for k, v in numbers(module).items())
    assert losses[-5:].mean() < losses[:5].mean()
    return numbers(module), losses


# --- what each process does ---


def one_process(rank, world, file):
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=wait)
    try:
        for check in CHECKS:
            check(rank)
            dist.barrier()
    finally:
        dist.destroy_process_group()


def replicated(rank):
    for how in ({}, {"cache_weight": True, "save": "input"}, {"storage": "fp8"}):
        want = alone(**how)
        module = DistributedDataParallel(model(**how), init_sync="storage" not in how)  # gloo sends no float8
        losses = train(module, [rank])
        check_equal(rank, numbers(module), losses, *want)


def sharded(rank):
    for how in ({}, {"storage": "fp8"}):
        want = alone(**how)
        module = model(**how)
        for layer in module:
            if isinstance(layer, FP8Linear):
                fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
        fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
        losses = train(module, [rank])
        check_equal(rank, numbers(module), losses, *want)


def kept_weights_are_refused(rank):
    for by_layer in (True, False):
        module = model(cache_weight=True)
        for layer in [x for x in module if by_layer and isinstance(x, FP8Linear)]:
            fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
        fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
        with pytest.raises(NotImplementedError, match="cache_weight=True cannot be used under FSDP"):
            module(batch(0, rank)[0])


CHECKS = [replicated, sharded, kept_weights_are_refused]


def test_two_processes_train_as_one(tmp_path):
    mp.spawn(one_process, (WORLD, os.fspath(tmp_path / "store")), nprocs=WORLD)


def test_compiled_training_is_that_of_eager_code():
    module = model()
    want, want_losses = alone()
    torch._dynamo.reset()
    losses = train(module, range(WORLD), torch.compile(module, backend="aot_eager", fullgraph=True))
    check_equal(WORLD - 1, numbers(module), losses, want, want_losses)
    torch._dynamo.reset()
