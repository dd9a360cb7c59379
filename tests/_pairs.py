"""Offsets, masks and indices that calls of every kind of attention share."""

import itertools
import math

import torch


def cumulative(lengths, dtype=torch.int32, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def padding(*lengths, left=False):
    """Key padding, one length per batch entry."""

    def change(tensors):
        mask = tensors["mask"]
        at = torch.arange(mask.shape[-1], device=mask.device)
        at = at.flip(0) if left else at
        for entry, length in zip(mask, lengths, strict=True):
            entry[:] = at < length

    return change


def rows_without_keys(tensors):
    tensors["mask"][..., ::3, :] = False


def batch_entry_without_keys(tensors):
    tensors["mask"][1] = False


def no_keys_at_all(tensors):
    tensors["mask"].fill_(False)


def some_minus_inf(tensors):
    tensors["bias"][..., ::3] = -math.inf


def random_index(T, S, rows, dtype=torch.int64, seed=0):
    return torch.randint(rows, (T, S), generator=torch.Generator().manual_seed(seed)).to(dtype)


def toeplitz_index(T, S, rows, dtype=torch.int64):
    """A tensor that depends on i − j alone, and not one row per distance."""
    return ((torch.arange(T)[:, None] - torch.arange(S) + S - 1) // 3 % rows).to(dtype)
