"""A bias by index while a CUDA graph is captured, where no value can be read: what is known is used, nothing is made.

Without a GPU the capture is only told to the op; on one it is real in ``test_softmax_attention_gpu.py``.
"""

import pytest
import torch
from _attention_calls import drawn
from _pairs import random_index, toeplitz_index

from accel import memo
from accel.ops import tables
from accel.ops.attention.softmax_attention import OP, reference


@pytest.fixture
def capture(monkeypatch):
    """From its call on, a graph is being captured."""

    def begin():
        monkeypatch.setattr(memo, "capturing", lambda x: True)
        monkeypatch.setattr(tables, "_read_index", lambda index: pytest.fail("values are read during a capture"))

    return begin


def arguments_for(index, rows):
    q, k, v = drawn(9, 7)
    return {"q": q, "k": k, "v": v, "bias_table": torch.randn(rows, 2, dtype=torch.float64), "bias_index": index}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("make", [random_index, toeplitz_index], ids=["random", "toeplitz"])
@pytest.mark.parametrize("known", [False, True])
def test_it_gives_the_same(make, dtype, known, capture):
    given = arguments_for(make(9, 7, 12, dtype), 12)
    expected = reference(*OP.prepare(**given))[0]
    if not known:
        given["bias_index"] = given["bias_index"].clone()
    capture()
    args = OP.prepare(**given)
    assert (args.line is not None) == (known and make is toeplitz_index), "what is known of the index is used"
    torch.testing.assert_close(reference(*args)[0], expected)


def test_it_keeps_no_tensor_of_before(capture):
    """A graph replays on its memory: what is remembered from eager calls may be gone by then."""
    calls = [arguments_for(make(9, 7, 12, torch.uint8), 12) for make in (random_index, toeplitz_index)]
    for given in calls:
        OP.prepare(**given)
    capture()
    for given in calls:
        facts = tables._index_facts.known((given["bias_index"],))
        assert facts is not None
        args = OP.prepare(**given)
        kept = [x.data_ptr() for x in (facts.small, facts.line) if x is not None]
        assert kept
        assert not {x.data_ptr() for x in (args.bias_index, args.line) if x is not None} & set(kept)
        assert tables._index_facts.known((given["bias_index"],)) is facts


def test_what_is_known_to_be_wrong_is_still_refused(capture):
    given = arguments_for(random_index(9, 7, 12), 12)
    OP.prepare(**given)
    capture()
    with pytest.raises(ValueError, match="bias_table has rows 0 to 4"):
        OP.prepare(**{**given, "bias_table": torch.randn(5, 2, dtype=torch.float64)})
