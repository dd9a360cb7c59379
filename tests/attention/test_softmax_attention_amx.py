"""The backend ``torch`` on a CPU with AMX: when it is chosen, and that it keeps the op's promises.

No AMX is needed: torch's flash kernel computes on every CPU, and what asks the processor is answered in its place.
"""

import math

import pytest
import torch
from _attention_calls import case, heads_inside_tokens, keys_of_one_head, one_projection
from torch.export import Dim

import accel
from accel import dispatch, testing
from accel.ops.attention import flash_cpu
from accel.ops.attention.softmax_attention import OP
from accel.testing import assert_close, assert_same

BF16 = (torch.bfloat16,)


@pytest.fixture
def amx(monkeypatch):
    monkeypatch.setattr(flash_cpu, "_has_amx", lambda: True)


@pytest.fixture(params=["ours", "torch"])
def backward(request, amx, monkeypatch):
    """Which backward is taken for the faster one."""
    ran = []
    for name, least in (("ours", 1 << 40), ("torch", 0)):
        if request.param == name:
            monkeypatch.setattr(flash_cpu, "BACKWARD_KEYS", least)
    computed = flash_cpu.backward
    monkeypatch.setattr(flash_cpu, "backward", lambda *given: ran.append("torch") or computed(*given))
    return request.param, ran


def plain(tokens=256, keys=None, heads=4, kv_heads=None, size=64, **kwargs):
    return case("plain", tokens, keys, B=1, H=heads, Hkv=kv_heads, D=size, **kwargs)


def made(call, backend="torch"):
    """Tensors in bf16 and what else is given, where ``backend`` can run it."""
    tensors, kwargs = call.make(torch.bfloat16, "cpu", 0)
    testing.require(accel.softmax_attention, backend, tensors, kwargs)
    return tensors, kwargs


def prepared(*args, dtype=torch.bfloat16, **kwargs):
    tensors, given = plain(*args, **kwargs).make(dtype, "cpu", 0)
    testing.require(accel.softmax_attention, "cpu", tensors, given)
    return OP.prepare(**tensors, **given)


def chosen(*args, **kwargs):
    return dispatch.select(OP, prepared(*args, **kwargs)).name


# --- the choice ---


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_plain_calls_in_bf16_go_to_torch(causal, size, amx):
    assert chosen(192, size=size, causal=causal, scale=0.3) == "torch"
    assert chosen(197, size=size, causal=causal, kv_heads=2) == "torch"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"tokens": 191}, "it is for 192 tokens or more, not 191 queries and 191 keys"),
        ({"keys": 64}, "it is for 192 tokens or more, not 256 queries and 64 keys"),
        ({"heads": 3}, "it is for 4 heads or more, which torch packs for AMX, not 3"),
        ({"size": 80}, "it is for head sizes of 64 and 128, not 80 and 80"),
        ({"E": 128}, "it is for head sizes of 64 and 128, not 64 and 128"),
        ({"dtype": torch.float16}, "on a CPU it is for bfloat16, which torch multiplies in AMX, not torch.float16"),
        ({"dtype": torch.float32}, "on a CPU it is for bfloat16, which torch multiplies in AMX, not torch.float32"),
        ({"keys": 300, "causal": "top_left"}, "its causal order is for as many queries as keys, not 256 and 300"),
    ],
    ids=str,
)
def test_what_was_not_measured_stays_ours(call, words, amx):
    args = prepared(**call)
    assert dispatch.select(OP, args).name == "cpu"
    assert OP.backend("torch").why_not(args) == words


@pytest.mark.parametrize(
    "call",
    [
        {"causal": True, "window": (9, 0)},
        {"pattern": accel.BlockCausal(64)},
        {"softcap": 30.0},
        {"dropout_p": 0.1},
        {"mask": (256,)},
        {"bias": (1, 4, 256, 256)},
        {"rows": 32, "bias_index": accel.T5Buckets()},
        {"slopes": True},
        {"sinks": True},
        {"lengths": (100, 156)},
    ],
    ids=str,
)
def test_all_that_is_more_stays_ours(call, amx):
    args = prepared(**call)
    assert dispatch.select(OP, args).name == "cpu"
    words = "it is for calls without bias, mask, sinks, softcap and dropout, over all keys or in causal order"
    assert OP.backend("torch").why_not(args) == words


def test_without_amx_nothing_changes(monkeypatch):
    monkeypatch.setattr(flash_cpu, "_has_amx", lambda: False)
    words = "on a CPU it is for those with AMX, in which torch multiplies bfloat16, and this one has none in use"
    assert chosen() == "cpu"
    tensors, _ = made(plain(), "cpu")
    text = accel.explain(accel.softmax_attention, **tensors)
    assert f"    torch: {words}" in text
    assert " -> cpu: can run this call" in text
    with pytest.raises(NotImplementedError, match=f"backend 'torch' cannot run this call: {words}"):
        accel.softmax_attention(**tensors, backend="torch")


def test_explain_says_so_where_there_is(amx):
    tensors, _ = made(plain())
    assert " -> torch: can run this call" in accel.explain(accel.softmax_attention, **tensors)


def test_torch_is_asked_for_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert flash_cpu._has_amx() == torch.backends.mkldnn.is_available()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not flash_cpu._has_amx(), "oneDNN, which multiplies in it, is switched off"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not flash_cpu._has_amx()
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not flash_cpu._has_amx(), "a torch that cannot tell"


@pytest.mark.parametrize(
    ("call", "faster"),
    [
        ({"tokens": 2048}, True),
        ({"tokens": 2047}, False),
        ({"tokens": 1024, "size": 128}, True),
        ({"tokens": 1024, "size": 64}, False),
        ({"tokens": 2048, "size": 128, "causal": True}, False),
        ({"tokens": 2048, "kv_heads": 2}, False),
    ],
    ids=str,
)
def test_which_backward_is_the_faster(call, faster, amx):
    assert flash_cpu.backward_is_faster(prepared(**call)) is faster


# --- what it computes ---

CASES = {
    "all": plain(200),
    "causal": plain(261, causal=True),
    "causal_top_left": plain(192, causal="top_left", scale=0.3),
    "more_keys": plain(192, 333),
    "more_queries": plain(333, 193, scale=-0.2),
    "gqa": plain(200, heads=6, kv_heads=2),
    "gqa_causal": plain(200, heads=6, kv_heads=2, causal=True),
    "size_128": plain(200, size=128),
    "heads_inside_tokens": plain(200, layout=heads_inside_tokens),
    "one_projection": plain(200, layout=one_projection),
    "keys_of_one_head": plain(200, layout=keys_of_one_head),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, backward):
    which, ran = backward
    testing.check_values(accel.softmax_attention, CASES[name], "torch", torch.bfloat16)
    assert ran == ([] if "causal" in name or "gqa" in name or which == "ours" else ["torch"])


SMALL = [
    case("all", 9, 7, H=4, Hkv=2, D=8, dtypes=(torch.float32, *BF16)),
    case("causal", 9, H=4, Hkv=2, D=8, causal=True, dtypes=(torch.float32, *BF16)),
]
CHECKS = [
    testing.check_subsets,
    testing.check_opcheck,
    testing.check_compile,
    testing.check_strides,
    testing.check_poison,
    testing.check_batch,
    testing.check_checkpoint,
    testing.check_autocast,
]


@pytest.mark.parametrize("call", SMALL, ids=lambda call: call.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_behaviour(check, call, backward, monkeypatch):
    """In fp32, and on few tokens, which the kernel takes as well."""
    monkeypatch.setattr(flash_cpu, "why_not", lambda args: None)
    check(accel.softmax_attention, call, "torch")


@pytest.mark.parametrize("layout", [None, heads_inside_tokens], ids=["", "heads_inside_tokens"])
def test_strides_are_those_of_our_kernels(layout, backward):
    tensors, _ = made(plain(200, kv_heads=2, layout=layout))
    runs = [testing.run(accel.softmax_attention, tensors, {}, name) for name in ("torch", "cpu")]
    for name, expected in runs[1].named().items():
        assert runs[0].named()[name].stride() == expected.stride(), name


@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_every_time(causal, backward):
    tensors, kwargs = made(plain(200, causal=causal))
    first, again = (testing.run(accel.softmax_attention, tensors, kwargs, "torch").named() for _ in range(2))
    for name, expected in first.items():
        assert_same(again[name], expected, name)


def test_determinism_is_ours(backward):
    args = prepared(200)
    out = accel.softmax_attention(*(x.requires_grad_() for x in args[:3]))
    words = "determinism is asked for, and the bits of torch's sums depend on the number of threads"
    with accel.use(deterministic=True):
        assert dispatch.select(OP, args).name == "cpu"
        assert OP.backend("torch").why_not(args) == words
        out.sum().backward()
    assert backward[1] == []


# --- what is not finite ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_reaches_only_who_may_see_it(name, value, backward):
    """In causal order, of one batch entry: queries before the place, or of another place, and their gradients."""
    tensors, kwargs = made(case("two", 200, H=4, D=64, causal=True))
    clean = testing.run(accel.softmax_attention, testing.double(tensors), kwargs, "reference")
    tensors[name][0, :, 60, 1] = value
    leaking = flash_cpu.forward(*tensors.values(), True, 0.125)[0]
    got = testing.run(accel.softmax_attention, tensors, kwargs, "torch")
    want = testing.run(accel.softmax_attention, tensors, kwargs, "reference")
    assert torch.equal(got.out.isnan(), want.out.isnan())
    if name == "v":
        assert leaking[0, :, :60].isnan().any(), "torch's kernel alone keeps it apart: nothing is tested here"
    rows, keys = torch.ones(2, 200, dtype=torch.bool), torch.ones(2, 200, dtype=torch.bool)
    if name == "q":
        rows[0, 60] = keys[0, :61] = False
    else:
        rows[0, 60:] = keys[0] = False
    spared = {"out": rows, "grad q": rows, "grad k": keys, "grad v": keys}
    for key, expected in clean.named().items():
        x, y = (t.transpose(1, 2)[spared[key]] for t in (got.named()[key], expected))
        assert_close(x, y, "softmax_few" if key == "out" else "softmax_few_grad", torch.bfloat16, key)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k"])
def test_a_logit_that_is_not_finite_gives_nan(name, value, backward):
    """Where torch's kernel gives 0."""
    tensors, kwargs = made(plain(200))
    tensors[name][0, :, 60, 1] = value
    got, ours, want = (
        testing.run(accel.softmax_attention, tensors, kwargs, name).named() for name in ("torch", "cpu", "reference")
    )
    assert want["out"].isnan().any()
    assert torch.equal(got["out"].isnan(), want["out"].isnan())
    for key, expected in ours.items():
        assert torch.equal(got[key].isnan(), expected.isnan()), key


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_finite_stays_as_torch_computed_it(causal, backward):
    tensors, kwargs = made(plain(200, causal=causal))
    out, lse = accel.softmax_attention(**tensors, **kwargs, backend="torch", return_lse=True)
    expected, expected_lse = flash_cpu.forward(*tensors.values(), causal, 0.125)
    assert_same(out, expected, "output")
    assert_same(lse, expected_lse, "log-sum-exp")


def test_a_gradient_of_the_log_sum_exp_takes_our_backward(backward):
    tensors, _ = made(plain(200))

    def gradients(values, backend):
        leaves = [x.requires_grad_() for x in values.values()]
        _, lse = accel.softmax_attention(*leaves, return_lse=True, backend=backend)
        return torch.autograd.grad(lse.sin().sum(), leaves[:2])

    for got, want in zip(gradients(tensors, "torch"), gradients(testing.double(tensors), "reference"), strict=True):
        assert_close(got, want, "softmax_few_grad", torch.bfloat16)
    assert backward[1] == []


# --- compiled and exported ---


@pytest.mark.parametrize("causal", [False, True])
def test_compiled_it_is_chosen_too(causal, backward):
    tensors, kwargs = made(plain(200, causal=causal))
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: accel.softmax_attention(**given, **kwargs), fullgraph=True)
    try:
        with testing.watch(OP) as ran:
            got = testing.run(compiled, tensors, {}, None)
    finally:
        torch._dynamo.reset()
    assert ran == [("torch", "forward"), ("torch", "backward")]
    for name, expected in testing.run(accel.softmax_attention, tensors, kwargs, "torch").named().items():
        assert_same(got.named()[name], expected, name)


@pytest.mark.parametrize(("least", "backend"), [(2, "cpu"), (192, "torch")])
def test_exported_for_sizes_of_which_some_are_too_few_it_is_ours(least, backend, amx):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return accel.softmax_attention(q, k, v)

    tensors, _ = made(plain(256))
    spec = ({2: Dim("tokens", min=least, max=4096)},) * 3
    program = torch.export.export(Attention(), tuple(tensors.values()), dynamic_shapes=spec).module()
    longer = [torch.cat([x, x[:, :, :9]], 2) for x in tensors.values()]
    with testing.watch(OP) as ran:
        out = program(*longer)
    assert ran == [(backend, "forward")]
    assert_same(out, accel.softmax_attention(*longer, backend=backend), "output")
