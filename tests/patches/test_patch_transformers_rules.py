"""transformers: which rule a mask function or packed positions stand for, and registering in any order."""

import copy
import importlib
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import masking_utils

import accel
from accel import integrations
from accel.patches import transformers_interface, transformers_rules
from accel.patches.transformers_rules import LazyBias, LazyMask, MaskRule

pytestmark = pytest.mark.usefixtures("on_reference")

# --- rules ---


def mask_functions():
    window, both_ways = (
        masking_utils.sliding_window_causal_mask_function,
        (masking_utils.sliding_window_bidirectional_mask_function),
    )
    return {
        "causal": masking_utils.causal_mask_function,
        "all": masking_utils.bidirectional_mask_function,
        "window": window(3),
        "window of one": window(1),
        "window both ways": both_ways(2),
    }


@pytest.mark.parametrize("name", mask_functions())
@pytest.mark.parametrize("offsets", [(5, 5, 0, 0), (3, 7, 4, 0), (1, 6, 5, 0), (4, 9, 0, 0), (2, 6, 9, 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_are_those_of_sdpa(name, offsets, padded):
    queries, keys, q_offset, kv_offset = offsets
    padding = torch.ones(2, kv_offset + keys, dtype=torch.bool)
    padding[1, : kv_offset + 2] = False
    given = {
        "batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": mask_functions()[name], "attention_mask": padding if padded else None,
        "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False,
    }  # fmt: skip
    expected = masking_utils.sdpa_mask(**given)
    found = transformers_interface.mask(**given)
    assert found.shape == expected.shape
    assert found.dtype == torch.bool
    assert torch.equal(found & True, expected)
    if isinstance(found, LazyMask):  # and the op reads the rule as transformers does
        q, k = torch.randn(2, 2, queries, 8), torch.randn(2, 2, keys, 8)
        a = accel.softmax_attention(q, k, k, **found.rule.arguments())
        b = accel.softmax_attention(q, k, k, mask=expected)
        torch.testing.assert_close(a, b)
    else:
        assert queries != keys
        assert q_offset + queries != kv_offset + keys
        assert name == "window both ways"


def test_masks_that_are_no_rule_are_written_out():
    chunked = masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64))
    overlay = masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 2)
    for function in (chunked, overlay, lambda b, h, q, k: k <= q):
        given = {"batch_size": 1, "q_length": 7, "kv_length": 7, "mask_function": function}
        given["allow_is_causal_skip"] = False
        found = transformers_interface.mask(**given)
        assert type(found) is torch.Tensor
        assert torch.equal(found, masking_utils.sdpa_mask(**given))


def test_no_mask_where_nothing_is_hidden():
    causal = {"batch_size": 1, "q_length": 4, "kv_length": 4, "mask_function": masking_utils.causal_mask_function}
    ones = torch.ones(1, 4, dtype=torch.bool)
    assert transformers_interface.mask(**causal, attention_mask=ones) is None
    assert transformers_interface.mask(**causal, attention_mask=ones, allow_is_causal_skip=False) is not None
    window = {**causal, "mask_function": masking_utils.sliding_window_causal_mask_function(4)}
    assert transformers_interface.mask(**window, local_size=4) is None, "four tokens fit in a window of four"
    window = {**causal, "mask_function": masking_utils.sliding_window_causal_mask_function(3)}
    assert transformers_interface.mask(**window, local_size=3).rule.window == (2, -1)
    everything = {**causal, "mask_function": masking_utils.bidirectional_mask_function}
    assert transformers_interface.mask(**everything) is not None
    assert transformers_interface.mask(**everything, allow_is_bidirectional_skip=True) is None


def packed(inner, positions, numbers):
    """The mask function that transformers makes of packed positions; in one function up to 5.23."""
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(inner, positions, numbers)
    inner = masking_utils.remap_positions_for_packed_sequence(inner, positions)
    return masking_utils.and_masks(inner, masking_utils.packed_sequence_mask_function(numbers))


def test_packed_positions_become_offsets():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    numbers = masking_utils.find_packed_sequence_indices(positions)
    for inner in (masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function(2)):
        function = packed(inner, positions, numbers)
        given = {"batch_size": 1, "q_length": 6, "kv_length": 6, "mask_function": function}
        found = transformers_interface.mask(**given, allow_is_causal_skip=False)
        assert found.rule.cu_seqlens.tolist() == [0, 3, 5, 6]
        assert torch.equal(found.clone(), masking_utils.sdpa_mask(**given, allow_is_causal_skip=False))


def test_a_lazy_tensor_is_a_tensor_to_everyone_else():
    rule = MaskRule(2, 3, 3, torch.device("cpu"), causal=True)
    mask = LazyMask(rule)
    dense = rule.dense()
    assert (mask.shape, mask.dtype, mask.device, mask.ndim, mask.dim()) == (
        (2, 1, 3, 3),
        torch.bool,
        dense.device,
        4,
        4,
    )
    assert isinstance(mask, torch.Tensor)
    for f in (
        lambda x: x[:, :, :2], lambda x: ~x, lambda x: x.to(torch.float32), lambda x: torch.where(x, 0.0, -1.0),
        lambda x: x.clone(), lambda x: copy.deepcopy(x), lambda x: x.all(), lambda x: torch.cat([x, x]),
        lambda x: torch.zeros(2, 1, 3, 3).masked_fill(x, 1.0), lambda x: 1.0 + x, lambda x: x.contiguous(),
        lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.mT, lambda x: torch.tensor(x.tolist()),
    ):  # fmt: skip
        assert type(f(mask)) is torch.Tensor
        assert torch.equal(f(mask), f(dense))
    table = torch.randn(7, 2, requires_grad=True)
    bias = LazyBias.of(table, accel.T5Buckets(True, 8), 4, 5)
    assert (bias.full, bias.shape) == ((1, 2, 4, 5), table.shape)
    scores = torch.zeros(1, 2, 4, 5)
    scores += bias
    (scores * torch.arange(20.0).view(4, 5)).sum().backward()
    assert float(table.grad.sum()) == 2 * 190
    assert repr(bias) == "LazyBias(1, 2, 4, 5)"


# --- imports ---

STUB = """
class {name}:
    known = {{}}
    @classmethod
    def register(cls, key, value):
        cls.known[key] = value
"""
HALF_WAY = """
import transformers.masking_utils as m
import accel
import transformers.modeling_utils as a
assert set(a.AttentionInterface.known) == set(m.AttentionMaskInterface.known) == {"accel", "accel_eager_masks"}
assert a.AttentionInterface.known["accel"].__module__ == "accel.patches.transformers_interface"
import inspect
assert "register" in inspect.getsource(a)
print("registered")
"""
ROOT = Path(__file__).resolve().parents[2]


def run(code, *paths):
    search = [*map(str, paths), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {search}\n{code}"], capture_output=True, text=True
    )


def test_one_registry_before_and_one_after(tmp_path):
    folder = tmp_path / "transformers"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "modeling_utils.py").write_text(STUB.format(name="AttentionInterface"))
    (folder / "masking_utils.py").write_text(STUB.format(name="AttentionMaskInterface"))
    child = run(HALF_WAY, tmp_path)
    assert child.stdout == "registered\n", child.stderr[-2000:]


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """A finder that waits for modules of a folder, and what it has registered in."""
    seen = []

    def register(module):
        seen.append(module.__name__)
        module.AttentionInterface.register("accel", seen)

    names = {f"waited_for_{i}": register for i in range(3)}
    monkeypatch.setattr(integrations, "_REGISTRIES", names)
    others = [finder for finder in sys.meta_path if not isinstance(finder, integrations._Waiting)]
    monkeypatch.setattr(sys, "meta_path", [integrations._Waiting(), *others])
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path, seen
    for name in names:
        sys.modules.pop(name, None)


def test_an_import_is_never_broken(waiting):
    folder, seen = waiting
    (folder / "waited_for_0.py").write_text(STUB.format(name="AttentionInterface"))
    (folder / "waited_for_1.py").write_text("value = 1\n")  # a version without the registry
    found = importlib.import_module("waited_for_0")
    assert found.AttentionInterface.known == {"accel": ["waited_for_0"]}
    assert "exec_module" not in vars(found.__spec__.loader)
    assert importlib.reload(found).AttentionInterface.known
    assert importlib.import_module("waited_for_1").value == 1
    assert seen == ["waited_for_0", "waited_for_0", "waited_for_1"]
    assert importlib.util.find_spec("waited_for_2") is None
    with pytest.raises(ModuleNotFoundError, match="waited_for_2"):
        importlib.import_module("waited_for_2")
    (folder / "waited_for_2.py").write_text("raise RuntimeError('its own fault')\n")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="its own fault"):
        importlib.import_module("waited_for_2")


def test_registering_is_repeatable():
    before = len(sys.meta_path)
    integrations.install()
    integrations.install()
    assert len(sys.meta_path) <= before + 1
    assert masking_utils.__name__ == transformers_rules.MASKING
