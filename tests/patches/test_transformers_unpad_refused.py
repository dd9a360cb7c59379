"""Flattened batches of transformers: calls and outputs that are refused, and a trial that leaves no trace."""

import ast
import inspect

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from _transformers_models import (
    BATCH,
    DECODER,
    IDS,
    LEFT,
    LENGTH,
    RIGHT,
    TEXT,
    assert_same,
    llama,
    outputs,
    randomize,
    text,
)
from _unpad_models import BOTH, MIXTURES

import accel
from accel.patches import transformers_flat, transformers_unpad, transformers_unpad_proof

pytestmark = pytest.mark.usefixtures("on_reference")


def test_generation_needs_no_cache():
    model = randomize(llama())
    how = {"attention_mask": LEFT, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, **how)
    accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match=r"no (cache|use_cache|past_key_values); generate without a cache or"):
        model.generate(IDS, **how)
    assert torch.equal(model.generate(IDS, **how, use_cache=False), expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_not_filled_with_flattened_keys(name):
    model = randomize(llama())
    accel.patch(model, unpad=True)
    cache = transformers.DynamicCache()
    with pytest.raises(NotImplementedError, match=f"have no ({name}|cache)"):
        model(**text(RIGHT), use_cache=False, **{name: cache})
    assert cache.get_seq_length() == 0


def test_positions_in_three_dimensions_are_refused_by_a_sentence():
    model = randomize(llama())
    accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match=r"position_ids \(3, 3, 9\) is not laid out as the tokens"):
        model(**text(RIGHT), position_ids=torch.zeros(3, BATCH, LENGTH, dtype=torch.long))


CALLS = {
    "a mask of four axes": {"attention_mask": torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)},
    "no tokens": {"input_ids": None},
    "a cache": {"use_cache": True},
    "attention weights": {"output_attentions": True},
    "pictures": {"pixel_values": torch.zeros(2, 3, 16, 16)},
    "positions of three axes": {"position_ids": torch.zeros(3, BATCH, LENGTH, dtype=torch.long)},
    "a first token that is padding": {"attention_mask": LEFT},
    "compiled": {},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_refused_call_says_which_model_of_a_program_it_was(call):
    model = randomize(transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)))
    accel.patch(model, unpad=True)
    given = {**text(RIGHT), **CALLS[call]}
    run = torch.compile(model, backend="eager", fullgraph=True) if call == "compiled" else model
    torch._dynamo.reset()
    with pytest.raises(Exception, match="BertModel cannot run on flattened batches: ") as caught:
        run(**given)
    if call != "compiled":
        assert type(caught.value) is (ValueError if call == "no tokens" else NotImplementedError)
        assert str(caught.value).startswith("BertModel cannot run on flattened batches: ")


def test_every_refusal_is_that_sentence():
    """Also of those that no call above provokes."""
    written = 0
    for module in (transformers_flat, transformers_unpad, transformers_unpad_proof):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                kind = ast.unparse(node.exc.func)
                assert kind == "_TrialError" or "cannot(" in ast.unparse(node.exc), ast.unparse(node)
                written += kind != "_TrialError"
    assert written > 10


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_padding(kind):
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 7}
    model = randomize(llama(rope_parameters=rope, max_position_embeddings=7 if kind == "dynamic" else 28))
    short, long = torch.ones_like(RIGHT), RIGHT
    short[:, 8:] = 0
    expected = outputs(model, text(long))
    accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match=r"from 7 on, and the batch is padded to 9 where .* ends at 8"):
        model(**text(short))
    assert_same(outputs(model, text(long)), expected)


def test_a_model_that_raises_in_the_middle_is_refused():
    model = randomize(llama())

    class Refusing(nn.Embedding):
        def forward(self, ids):
            if len(ids) == 1:
                raise ValueError("a batch of one is not for me")
            return super().forward(ids)

    model.model.embed_tokens.__class__ = Refusing
    accel.patch(model, unpad=True)
    sentence = "LlamaModel cannot run on flattened batches: flattened, a trial of 12 tokens raised ValueError: a batch"
    with pytest.raises(NotImplementedError, match=sentence) as caught:
        model(**text(RIGHT))
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_output_of_another_layout_is_refused():
    model = randomize(llama())
    forward = transformers.LlamaModel.forward

    class Counting(transformers.LlamaModel):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            out = forward(self, input_ids, attention_mask, position_ids, **kwargs)
            out["count"] = out.last_hidden_state.new_zeros(out.last_hidden_state.shape[0], 7)
            return out

    model.model.__class__ = Counting
    accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match=r"its count is \(3, 7\) padded and \(1, 7\) flattened"):
        model(**text(RIGHT))


def test_outputs_that_are_no_field_of_their_class():
    model = randomize(llama().model)
    forward = transformers.LlamaModel.forward

    class Twice(transformers.LlamaModel):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            out = forward(self, input_ids, attention_mask, position_ids, **kwargs)
            out["twice"] = {"of": [2 * out.last_hidden_state, 1]}
            return out

    model.__class__ = Twice
    expected = model(**text(BOTH))
    accel.patch(model, unpad=True)
    found = model(**text(BOTH))
    assert_same([found["twice"]["of"][0][BOTH.bool()]], [expected["twice"]["of"][0][BOTH.bool()]])
    assert found["twice"]["of"][1] == 1


def test_a_pooler_of_more_than_the_first_token_is_refused():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(1)

    model = transformers.BertModel(transformers.BertConfig(**TEXT))
    model.pooler = Mean()
    randomize(model)
    accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match="the pooler reads more than a first token"):
        model(**text(RIGHT))


def test_tracing_is_refused():
    model = randomize(llama())
    accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match=r"not known to torch\.compile and torch\.jit"):
        torch.jit.trace(lambda ids, mask: model(ids, attention_mask=mask, use_cache=False).logits, (IDS, RIGHT))


def test_masks_without_a_packed_form_are_refused_with_the_name_of_the_model():
    config = transformers.Llama4TextConfig(
        **DECODER, num_local_experts=2, intermediate_size_mlp=48, layer_types=["full_attention"] * 2
    )
    model = randomize(transformers.Llama4ForCausalLM(config))
    accel.patch(model, unpad=True)
    model.model.config.layer_types[0] = "chunked_attention"
    with pytest.raises(NotImplementedError, match="Llama4TextModel masks by more than causal order, a sliding window"):
        model(**text(RIGHT))


# --- trying a model leaves no trace ---


def state(model):
    buffers = {n: (b, b._version, b.clone()) for n, b in model.named_buffers()}
    flags = {n: {k: v for k, v in vars(m).items() if isinstance(v, int | str)} for n, m in model.named_modules()}
    return buffers, flags


@pytest.mark.parametrize("training", [False, True])
def test_a_trial_leaves_no_trace(training):
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    model = randomize(llama(rope_parameters=rope)).train(training)
    model.model.norm.eval()
    rope = model.model.rotary_emb
    rope.original_max_seq_len, rope.max_seq_len_cached = 20, 40  # what a long call before has left behind
    report = accel.patch(model, unpad=True)
    buffers, flags = state(model)
    seen = []
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
            module.register_forward_pre_hook(lambda m, args: seen.append(type(m).__name__))
    unpadding = model.model.forward
    drawn = torch.get_rng_state()
    unpadding._proof(text(RIGHT), RIGHT.bool())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not seen
    after, flags_after = state(model)
    assert flags_after == flags
    for name, (buffer, version, value) in buffers.items():
        assert after[name][0] is buffer
        assert after[name][1] == version
        assert torch.equal(buffer, value)
    assert [row.calls for row in report.rows] == [0] * 3
    assert all(row.backend is None and not row.fallbacks for row in report.rows)
    assert all(p.grad is None for p in model.parameters())
    assert len(unpadding.proven) == 1


def test_hooks_run_if_the_model_needs_them():
    model = randomize(llama())

    def cast(module, args):
        return (args[0].double(),)

    def back(module, args, out):
        return out.float()

    q = model.model.layers[0].self_attn.q_proj.double()
    q.register_forward_pre_hook(cast)
    q.register_forward_hook(back)
    expected = outputs(model, text(RIGHT))
    accel.patch(model, unpad=True)
    assert_same(outputs(model, text(RIGHT)), expected)


def test_captured_outputs_are_collected_once():
    """transformers installs the hooks that collect them at the first call that asks."""
    model = randomize(MIXTURES["Mixtral"]())
    accel.patch(model, unpad=True)
    for _ in range(2):
        out = model(**text(RIGHT), output_router_logits=True, output_hidden_states=True)
        assert (len(out.router_logits), len(out.hidden_states)) == (2, 3)


def test_a_trial_draws_no_random_numbers_from_a_training_run():
    model = randomize(llama(attention_dropout=0.3)).train()
    report = accel.patch(model, unpad=True)
    model.model.forward._proof(text(RIGHT), RIGHT.bool())
    torch.manual_seed(0)
    expected = model(**text(RIGHT)).logits
    accel.unpatch(model)
    report = accel.patch(model, unpad=True)
    torch.manual_seed(0)
    assert torch.equal(model(**text(RIGHT)).logits, expected)
    assert report.rows[-1].calls == 1
    assert model.training
    assert model.model.layers[0].training
