"""Every architecture of transformers, tiny, in each of the ways in which its users ask for kernels."""

import contextlib
import copy
import functools
import importlib
import logging
import warnings

import torch
import transformers
from _compare import SAME, Row, difference, finite, has_attention, randomize, run
from _inputs import candidates
from _tiny import HEADS, tiny
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import accel
from accel.patches import transformers_interface

LARGEST = 10_000_000
"""Parameters of the largest model that counts as tiny."""
NEW_TOKENS = 3
WAYS = ("by name", "patch", "unpad", "generate by name", "generate")
_HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)  # fmt: skip


class NotBuiltError(Exception):
    """The family has no tiny model here; the message says what is missing."""


def families():
    """Every model type that has a model."""
    return sorted(name for name in CONFIG_MAPPING if _class_name(name) is not None)


def _class_name(family):
    for mapping in _HEADS:
        name = getattr(modeling_auto, mapping).get(family)
        if name is not None:
            return name if isinstance(name, str) else name[0]
    return None


def build(family, groups=2):
    """The class of a family and a tiny configuration for it, with ``groups`` heads of keys and values.

    Raises:
        NotBuiltError: the library needs something that is not installed, or the parts do not fit at this size.
    """
    name = _class_name(family)
    try:
        cls = getattr(transformers, name, None)
        config = tiny(CONFIG_MAPPING[family], groups)
        config._attn_implementation = "eager"
        if cls is None:
            module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
            cls = getattr(module, name)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    except Exception as error:
        raise NotBuiltError(_short(error)) from error
    if size > LARGEST:
        raise NotBuiltError(f"{size / 1e6:.0f} million parameters")
    return cls, config


def _short(error):
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


@contextlib.contextmanager
def _quiet():
    level, before = transformers.logging.get_verbosity(), logging.getLogger("accel").level
    transformers.logging.set_verbosity_error()
    logging.getLogger("accel").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        logging.getLogger("accel").setLevel(before)


@contextlib.contextmanager
def _counted():
    """How often the op ran for a model that calls it by name."""
    calls = []
    op = transformers_interface.softmax_attention

    def counting(*args, **kwargs):
        calls.append(1)
        return op(*args, **kwargs)

    transformers_interface.softmax_attention = counting
    try:
        yield calls
    finally:
        transformers_interface.softmax_attention = op


def sweep(family, ways=WAYS, sides=("right", "left")):
    """One row for each way and side.

    Raises:
        NotBuiltError: no tiny model, or no call of it that runs in eager attention.
    """
    with _quiet():
        try:
            cls, config, model = _eager(family, 2)
        except NotBuiltError:  # a class may want as many heads of keys as of queries
            cls, config, model = _eager(family, HEADS)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        return [row for side in sides for row in _side(family, cls, config, model, state, ways, side)]


def _eager(family, groups):
    """The class, the configuration and the model of a family in eager attention, which has run."""
    cls, config = build(family, groups)
    try:
        model = randomize(cls(copy.deepcopy(config)))
    except Exception as error:
        raise NotBuiltError(_short(error)) from error
    _call(model, "right")
    return cls, config, model


def _side(family, cls, config, eager, state, ways, side):
    inputs, expected = _call(eager, side)
    masked = "attention_mask" in inputs
    if not masked and side != "right":
        return  # there is nothing to pad
    scores = _scores(eager, inputs) if side == "left" else None

    def passed(model):
        return difference(run(model, inputs), expected)

    def generated(model):
        return difference(([_generated(model, inputs)], {}), ([scores], {}))

    for way in ways:
        generates = way in _GENERATE
        if (generates and scores is None) or (way == "unpad" and not masked):
            continue
        made = functools.partial(_make, _GENERATE.get(way, way), cls, config, state)
        yield _row(family, f"{way}, {side}", made, generated if generates else passed)


_GENERATE = {"generate by name": "by name", "generate": "patch"}


def _call(model, side):
    """Arguments that the model takes, and what it computes with eager attention."""
    failed = []
    for inputs in candidates(model, side):
        try:
            expected = run(model, inputs)
        except Exception as error:
            failed.append(_short(error))
            continue
        if not expected[0]:
            failed.append("it returns no floating-point tensor")
        elif not finite(expected):
            failed.append("eager attention gives no finite numbers")
        else:
            return inputs, expected
    raise NotBuiltError("; ".join(dict.fromkeys(failed)))


def _make(way, cls, config, state):
    """The model with kernels, and its report where it was patched."""
    name = "accel" if way == "by name" else None
    config = copy.deepcopy(config)
    if name is None:
        config._attn_implementation = None
        made = cls._from_config(config)
    else:
        made = cls._from_config(config, attn_implementation=name)
    made.load_state_dict(state)
    made.eval()
    return made, None if name is not None else accel.patch(made, unpad=way == "unpad")


def _scores(model, inputs):
    """What the model generates with eager attention; None where it does not, or not from these inputs."""
    if not (hasattr(model, "can_generate") and model.can_generate() and "input_ids" in inputs):
        return None
    try:
        return _generated(model, inputs)
    except Exception:  # what eager attention does not generate there is nothing to compare with
        return None


def _generated(model, inputs):
    """The scores of a few tokens, greedily, with the cache."""
    given = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
    with torch.no_grad():
        out = model.generate(
            **given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1,
            use_cache=True, output_logits=True, return_dict_in_generate=True, pad_token_id=0, **_start(model),
        )  # fmt: skip
    return torch.stack(out.logits)


def _start(model):
    return {"decoder_start_token_id": 1} if model.config.is_encoder_decoder else {}


def _row(family, way, make, measure):
    row = Row(family, way, "equal")
    try:
        model, report = make()
    except (ValueError, NotImplementedError) as error:
        row.status, row.note = "refused", " ".join(str(error).split())
        if "accel" not in row.note and "replace" not in row.note and "flattened" not in row.note:
            row.status = "FAILS"
        return row
    except Exception as error:
        row.status, row.note = "FAILS", _short(error)
        return row
    try:
        with _counted() as calls:
            row.difference = measure(model)
    except NotImplementedError as error:
        row.status, row.note = "refused", " ".join(str(error).split())
        return row
    except Exception as error:
        row.status, row.note = "FAILS", _short(error)
        return row
    row.calls, row.replaced = len(calls), 0
    if report is not None:
        row.calls, row.replaced = sum(r.calls for r in report.rows), len(report.replaced)
        row.note = "; ".join(dict.fromkeys(reason for r in report.rows for reason in r.fallbacks))
    if row.difference > SAME:
        row.status = "DIFFERS"
    elif not row.calls:
        left = [] if report is None else [f"{r.name} is left alone: {r.reason}" for r in report.skipped]
        row.status = "refused" if left else "UNUSED" if has_attention(model) else "no attention"
        row.note = left[0] if left else row.note
    return row
