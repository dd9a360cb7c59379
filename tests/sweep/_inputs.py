"""Arguments for a tiny model of transformers: text padded on one side, pictures, sound, as forward asks for them."""

import inspect

import torch
from _tiny import FIRST_SPECIAL, MAP

BATCH, LENGTH, REAL, TARGET = 2, 11, 6, 7
"""Two rows of tokens, the second of which has ``REAL`` that count."""


def candidates(model, side):
    """What may be a valid call of ``model``, the likeliest first; the mask says which outputs are compared."""
    taken = inspect.signature(type(model).forward).parameters
    main = model.main_input_name
    text, picture = _text(side), _picture(model)
    text |= _decoder(model, taken)
    kinds = []
    if main in ("input_features", "input_values"):
        kinds += [_sound(model, main, side, shape) for shape in _shapes(model, main)]
    if "pixel_values" in taken and "input_ids" in taken:
        kinds += [{**text, **picture}, text] if not _has_image_tokens(model) else [text, {**text, **picture}]
    elif main == "pixel_values" or "pixel_values" in taken:
        film = picture["pixel_values"][:, None].expand(-1, _of(model, "num_frames", 2), -1, -1, -1)
        kinds += [picture, {"pixel_values": film}]
    if main == "pixel_values_videos" or "pixel_values_videos" in taken:
        kinds.append({"pixel_values_videos": _noise(BATCH, _of(model, "num_frames", 2), 3, MAP, MAP)})
    if "grid_thw" in taken:
        kinds += [_patches(model, name) for name in ("hidden_states", "pixel_values") if name in taken]
    kinds.append(text)
    if "attention_mask" not in taken:
        kinds.append({k: v for k, v in text.items() if k != "attention_mask"})
    for kind in kinds:
        yield {k: v for k, v in kind.items() if k in taken or ("kwargs" in taken and k == main)}


def _text(side):
    ids = torch.randint(4, FIRST_SPECIAL, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side is not None:
        mask[1, REAL:] = 0
    if side == "left":
        mask = mask.flip(1)
    ids = torch.where(mask == 1, ids, 0)  # many models count positions by the padding token
    return {"input_ids": ids, "attention_mask": mask}


def _decoder(model, taken):
    if not getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" not in taken:
        return {}
    ids = torch.randint(4, FIRST_SPECIAL, (BATCH, TARGET), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def _noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _picture(model):
    return {"pixel_values": _noise(BATCH, _of(model, "num_channels", 3), *_map_size(model))}


def _patches(model, name):
    """Two pictures of 4 × 4 and 4 × 8 patches, one behind the other."""
    patch = _of(model, "patch_size", 8)
    patch = patch if isinstance(patch, int) else patch[-1]
    width = _of(model, "in_channels", 3) * _of(model, "temporal_patch_size", 1) * patch**2
    return {name: _noise(48, width), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]])}


def _map_size(model):
    size = _of(model, "image_size", MAP)
    if isinstance(size, list | tuple):
        return tuple(size)
    return (size, size) if isinstance(size, int) else (MAP, MAP)


def _of(model, name, default):
    """A field of the configuration or of its part for pictures or sound."""
    config = model.config
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return default


def _has_image_tokens(model):
    names = ("image_token_id", "image_token_index", "img_token_id", "media_token_id")
    return any(getattr(model.config, name, None) is not None for name in names)


def _shapes(model, main):
    if main == "input_values":
        return ((1, 800), (1, 1, 800), (1, 64, _of(model, "num_mel_bins", 16)))
    bins = _of(model, "num_mel_bins", 16)
    return ((1, bins, 2 * _of(model, "max_source_positions", 64)), (1, 64, bins), (1, bins, 64))


def _sound(model, main, side, shape):
    """Sound of two lengths; the mask counts samples or frames."""
    taken = inspect.signature(type(model).forward).parameters
    given = {main: _noise(BATCH, *shape[1:]), **_decoder(model, taken)}
    length = max(shape[1:])
    if side is not None and "attention_mask" in taken:
        given["attention_mask"] = torch.ones(BATCH, length, dtype=torch.long)
        given["attention_mask"][1, length * 5 // 8 :] = 0
    return given
