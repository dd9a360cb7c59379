"""What keeps experts busy alike: losses against loops and transformers, load, and the bias that follows it."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _bad import Bad, check_bad, each, zeros
from torch.utils.checkpoint import checkpoint

import accel


def drawn(T, X, K, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((T, X), generator=generator).to(dtype)
    return logits, logits.topk(K, -1)[1]


def loops(logits, indices, mask, score="softmax"):
    """The Switch loss, one token after the other."""
    X, total = logits.shape[1], sum(mask)
    counts, sums = [0.0] * X, [0.0] * X
    for row, chosen, counts_in in zip(logits.tolist(), indices.tolist(), mask, strict=True):
        scores = [math.exp(x) if score == "softmax" else 1 / (1 + math.exp(-x)) for x in row]
        for x in range(X):
            sums[x] += counts_in * scores[x] / sum(scores)
        for x in chosen:
            counts[x] += counts_in if 0 <= x < X else 0.0
    return X * sum(n / total * p / total for n, p in zip(counts, sums, strict=True))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
def test_switch_is_that_of_plain_loops(masked, score):
    logits, indices = drawn(11, 5, 2)
    indices[3, 1] = -1
    indices[4, 0] = 5
    mask = torch.rand(11, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    got = accel.moe_balance_loss(logits, indices, score=score, mask=mask)
    want = loops(logits, indices.where(indices < 5, -1), [1.0] * 11 if mask is None else mask.double().tolist(), score)
    assert got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_switch_is_transformers_loss(masked):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers = [torch.randn(2 * 7, 6, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    mask = torch.ones(2, 7, dtype=torch.int64)
    if masked:
        mask[0, :3] = 0
    want = modeling.load_balancing_loss_func(tuple(layers), 6, 2, mask if masked else None)
    chosen = [accel.moe_route(x, 2)[1] for x in layers]
    got = accel.moe_balance_loss(layers, chosen, mask=mask if masked else None)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, layers), torch.autograd.grad(want, layers), strict=True):
        torch.testing.assert_close(a, b)


def test_even_load_is_the_least():
    logits, indices = torch.zeros(12, 4), torch.arange(24).view(12, 2) % 4
    assert accel.moe_balance_loss(logits, indices).item() == pytest.approx(2.0)
    assert accel.moe_balance_loss(logits, indices, kind="sequence", batch=3).item() == pytest.approx(1.0)
    assert accel.moe_balance_loss(logits, indices, kind="global").item() == pytest.approx(2.0)
    one = torch.zeros(12, 4).index_fill(1, torch.tensor([2]), 50.0)
    assert accel.moe_balance_loss(one, torch.full((12, 1), 2)).item() == pytest.approx(4.0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
def test_sequence_is_the_mean_over_sequences(masked, score):
    logits, indices = drawn(12, 5, 2)
    mask = torch.ones(3, 4, dtype=torch.bool)
    if masked:
        mask[0, 2:] = False
        mask[1] = False
    got = accel.moe_balance_loss(logits, indices, kind="sequence", score=score, batch=3, mask=mask if masked else None)
    parts = [
        loops(logits[4 * i : 4 * i + 4], indices[4 * i : 4 * i + 4], mask[i].double().tolist(), score) / 2
        for i in range(3)
        if mask[i].any()
    ]
    assert got.item() == pytest.approx(sum(parts) / len(parts), rel=1e-12)


@pytest.mark.parametrize("kind", ["switch", "sequence", "global"])
def test_gradients(kind):
    logits, indices = drawn(6, 4, 2)
    given = {"kind": kind, **({"batch": 2} if kind == "sequence" else {})}
    assert torch.autograd.gradcheck(
        lambda x: accel.moe_balance_loss(x, indices, **given), logits.requires_grad_(), fast_mode=False
    )
    assert torch.autograd.gradcheck(accel.moe_z_loss, logits, fast_mode=False)


def test_z_loss():
    logits, _ = drawn(5, 4, 2)
    squares = [math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.tolist()]
    assert accel.moe_z_loss(logits).item() == pytest.approx(sum(squares) / 5, rel=1e-12)
    mask = torch.tensor([1, 0, 0, 1, 0])
    assert accel.moe_z_loss(logits, mask=mask).item() == pytest.approx((squares[0] + squares[3]) / 2, rel=1e-12)
    assert accel.moe_z_loss([logits, logits], mask=mask).item() == pytest.approx((squares[0] + squares[3]) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(dtype):
    logits, indices = drawn(9, 4, 2, dtype=dtype)
    for loss in (lambda x: accel.moe_balance_loss(x, indices), accel.moe_z_loss):
        got = loss(logits)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, loss(logits.float()), rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(logits), got, rtol=0, atol=0)


def test_without_tokens_losses_are_zero():
    logits, indices = zeros(0, 4).requires_grad_(), zeros(0, 2, dtype=torch.int64)
    none = torch.zeros(3, dtype=torch.bool)
    for loss in (
        accel.moe_balance_loss(logits, indices),
        accel.moe_balance_loss(logits, indices, kind="sequence", batch=2),
        accel.moe_z_loss(logits),
        accel.moe_balance_loss(zeros(3, 4), zeros(3, 2, dtype=torch.int64), mask=none),
        accel.moe_z_loss(zeros(3, 4), mask=none),
    ):
        assert loss.item() == 0.0


def test_losses_compile_in_one_graph_for_every_size():
    def both(logits, indices, mask):
        return accel.moe_balance_loss(logits, indices, mask=mask) + accel.moe_z_loss(logits, mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(both, backend="eager", fullgraph=True, dynamic=True)
    for T in (5, 9, 13):
        logits, indices = drawn(T, 4, 2, dtype=torch.float32)
        mask = torch.ones(T)
        torch.testing.assert_close(compiled(logits, indices, mask), both(logits, indices, mask))
    torch._dynamo.reset()


# --- load ---


def test_load():
    indices = torch.tensor([[0, 2], [2, -1], [2, 7], [0, 2]])
    load = accel.moe_load(indices, 4)
    assert load.counts.tolist() == [2, 0, 4, 0]
    assert (load.nobody.item(), load.imbalance.item(), load.idle.item()) == (2, pytest.approx(4 / 1.5), 0.5)
    load = accel.moe_load(indices.int(), 4, mask=torch.tensor([[True, False], [True, True]]))
    assert load.counts.tolist() == [2, 0, 3, 0]
    assert load.nobody.item() == 1
    load = accel.moe_load(indices[:0], 3)
    assert (load.counts.tolist(), load.imbalance.item(), load.idle.item()) == ([0, 0, 0], 0.0, 1.0)


# --- the bias ---


def test_the_bias_moves_against_the_load():
    balance = accel.nn.ExpertBias(4, rate=0.5)
    balance(torch.tensor([[0, 1], [0, 2]]))
    balance(torch.tensor([[0, 3], [9, -1]]))  # the second part of a step
    assert balance.counts.tolist() == [3, 1, 1, 1]
    balance.update()
    assert balance.counts.tolist() == [0, 0, 0, 0]
    assert balance.bias.tolist() == [-0.75, 0.25, 0.25, 0.25]
    balance.update()
    assert balance.bias.tolist() == [-0.75, 0.25, 0.25, 0.25]
    balance(torch.tensor([[0], [1], [2], [3]]))
    balance.update()
    assert balance.bias.tolist() == [-0.75, 0.25, 0.25, 0.25]


def test_the_bias_evens_the_load():
    generator = torch.Generator().manual_seed(0)
    lean, balance = 3 * torch.rand(8, generator=generator), accel.nn.ExpertBias(8, rate=0.01)

    def chosen(tokens=400):
        logits = torch.randn((tokens, 8), generator=generator) + lean
        return accel.moe_route(logits, 2, score="sigmoid", bias=balance.bias)[1]

    before = accel.moe_load(chosen(20000), 8).imbalance
    for step in range(400):
        balance.rate = 0.02 if step < 100 else 0.001
        balance(chosen())
        balance.update()
    assert before > 2.0
    assert accel.moe_load(chosen(20000), 8).imbalance < 1.15
    assert abs(balance.bias.sum().item()) < 1e-5


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.balance = torch.nn.Linear(5, 6), accel.nn.ExpertBias(6)

    def forward(self, x):
        weights, indices = accel.moe_route(self.gate(x), 2, score="sigmoid", bias=self.balance.bias)
        self.balance(indices)
        return x * weights.sum(1, keepdim=True) + x


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointing_counts_once(reentrant):
    layer, x = Layer(), torch.randn(7, 5).requires_grad_()
    out = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
    out.sum().backward()
    assert layer.balance.counts.sum() == 14
    layer.eval()(x)
    assert layer.balance.counts.sum() == 14


def test_it_follows_an_optimizer():
    layer = Layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = layer.balance.follow(optimizer)
    for _ in range(2):
        layer(torch.randn(7, 5)).sum().backward()
    optimizer.step()
    assert layer.balance.counts.sum() == 0
    first = layer.balance.bias.clone()
    assert first.count_nonzero() > 0
    handle.remove()
    layer(torch.randn(7, 5))
    optimizer.step()
    assert layer.balance.counts.sum() == 14
    assert torch.equal(layer.balance.bias, first)


def test_the_bias_is_saved_and_stays_in_float32():
    layer = Layer()
    layer.balance.bias.copy_(torch.linspace(-1, 1, 6) + 1e-4)
    assert [n for n in layer.state_dict() if n.startswith("balance")] == ["balance.bias"]
    want = layer.balance.bias.clone()
    layer.bfloat16()
    assert layer.gate.weight.dtype == torch.bfloat16
    assert torch.equal(layer.balance.bias, want)
    assert layer.to("meta").balance.bias.device.type == "meta"
    assert "6, rate=0.001" in repr(layer)


@pytest.mark.parametrize(
    "given", [{"num_experts": 0}, {"num_experts": 4, "rate": math.nan}, {"num_experts": 4, "rate": -1.0}]
)
def test_bad_bias(given):
    with pytest.raises(ValueError, match=r"num_experts=0|rate="):
        accel.nn.ExpertBias(**given)


# --- several processes ---


def rank_main(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    sizes = (5, 9)
    logits, indices = drawn(14, 4, 2)
    mine = slice(0, 5) if rank == 0 else slice(5, 14)
    local = logits[mine].clone().requires_grad_()
    loss = accel.moe_balance_loss(local, indices[mine], kind="global")
    counts = accel.moe_load(indices, 4).counts
    mean = local.softmax(-1).mean(0)
    torch.testing.assert_close(loss, 4 * (counts / 14 * mean).sum())
    torch.testing.assert_close(accel.moe_load(indices[mine], 4, group=dist.group.WORLD).counts, counts)
    assert accel.moe_load(indices[mine], 4).counts.sum() == 2 * sizes[rank]
    loss.backward()
    assert local.grad.count_nonzero() > 0
    together, alone = accel.nn.ExpertBias(4), accel.nn.ExpertBias(4)
    together(indices[mine])
    together.update()
    step = torch.sign(28 - 4 * counts).float() * 1e-3
    torch.testing.assert_close(together.bias, step - step.mean())
    assert alone.bias.count_nonzero() == 0
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_their_counts(tmp_path):
    mp.spawn(rank_main, (os.fspath(tmp_path / "store"),), nprocs=2)


def test_a_group_of_one_is_this_process(tmp_path):
    logits, indices = drawn(9, 4, 2)
    want = accel.moe_balance_loss(logits, indices)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.testing.assert_close(accel.moe_balance_loss(logits, indices, kind="global"), want)
        balance = accel.nn.ExpertBias(4, rate=1.0)
        balance(indices)
        balance.update()
        assert balance.bias.count_nonzero() > 0
    finally:
        dist.destroy_process_group()


GOOD = {"logits": zeros(6, 4), "indices": zeros(6, 2, dtype=torch.int64)}
BAD = [
    Bad("no_tensor", TypeError, "logits must be a tensor, or a list .* got float", {"logits": 1.0}),
    Bad("no_layers", TypeError, "logits must be .* got list", {"logits": []}),
    Bad("integers", TypeError, "torch.int64", {"logits": zeros(6, 4, dtype=torch.int64)}),
    Bad("indices_of_floats", TypeError, "int32 or int64, got torch.float32", {"indices": zeros(6, 2)}),
    Bad("indices_of_5", ValueError, r"T = 6 .*\(5, 2\)", {"indices": zeros(5, 2, dtype=torch.int64)}),
    Bad("kind", ValueError, "switch, sequence, global, got 'aux'", {"kind": "aux"}),
    Bad("score", ValueError, "got 'relu'", {"score": "relu"}),
    Bad("batch_without", ValueError, "kind='switch', batch=2", {"batch": 2}),
    Bad("sequence_without", ValueError, "kind='sequence', batch=None", {"kind": "sequence"}),
    Bad("batch_of_4", ValueError, "6 tokens are no multiple of batch=4", {"kind": "sequence", "batch": 4}),
    Bad("no_batch", ValueError, "at least 1, got batch=0", {"kind": "sequence", "batch": 0}),
    Bad("group_without", ValueError, "kind='global', got kind='switch'", {"group": "any"}),
    Bad("mask_of_4", ValueError, "mask has 4 tokens, of which the 6", {"mask": zeros(4)}),
    Bad("mask_of_none", ValueError, "mask has 0 tokens, of which the 6", {"mask": zeros(0)}),
    Bad("mask_no_tensor", TypeError, "mask must be a tensor, got list", {"mask": [1]}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    check_bad(accel.moe_balance_loss, GOOD, bad)
