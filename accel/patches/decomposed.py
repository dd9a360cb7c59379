"""Relative positions decomposed by axis, as in SAM: query · row embedding + query · column embedding for every pair.

Such a bias is a product of what a query holds for each row and column of the map with the place of the key, written
as ones: it becomes a few more channels of queries and keys, and nothing of the size of T·S is made or has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.ops.attention.softmax_attention import MAX_HEAD_SIZE

MULTIPLE = 8
"""What head sizes of the kernels are a multiple of."""


def why_not(head_size: int, h: int, w: int) -> str | None:
    if head_size + h + w > MAX_HEAD_SIZE:
        return f"a head of {head_size} channels has no room beside {h} rows and {w} columns in {MAX_HEAD_SIZE}"
    return None


def stretched(table: Tensor, queries: int, keys: int) -> Tensor:
    """``(queries, keys, D)`` of a table by distance; the shorter axis is stretched to the longer, as in MViTv2."""
    far, near = max(keys / queries, 1.0), max(queries / keys, 1.0)
    query = torch.arange(queries, device=table.device)[:, None]
    key = torch.arange(keys, device=table.device)
    return table[(query * far - key * near + (keys - 1) * near).long()]


def with_positions(
    q: Tensor, k: Tensor, scale: float, of_rows: Tensor, of_columns: Tensor, prefix: int = 0
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product, with scale 1, holds the bias too.

    Args:
        q: ``(B, H, prefix + h·w, D)``, the last h·w on a map.
        k: ``(B, H, prefix + y·x, D)``, on a map of y · x.
        scale: the factor of q·k, which the bias does not have.
        of_rows: ``(h, y, D)``, the embedding of a query's row and a key's.
        of_columns: ``(w, x, D)``.
        prefix: tokens without a place, which have no bias.
    """
    (h, y, _), (w, x, _) = of_rows.shape, of_columns.shape
    on_map = q[:, :, prefix:].unflatten(2, (h, w))
    rows = torch.einsum("bnhwc,hkc->bnhwk", on_map, of_rows)
    columns = torch.einsum("bnhwc,wkc->bnhwk", on_map, of_columns)
    asked = F.pad(torch.cat([rows, columns], -1).flatten(2, 3), (0, 0, prefix, 0))
    row, column = torch.eye(y, dtype=k.dtype, device=k.device), torch.eye(x, dtype=k.dtype, device=k.device)
    places = F.pad(torch.cat([row.repeat_interleave(x, 0), column.repeat(y, 1)], 1), (0, 0, prefix, 0))
    empty = (0, -(q.shape[-1] + y + x) % MULTIPLE)
    wide_q = torch.cat([q * scale, asked], -1)
    wide_k = torch.cat([k, places.expand(*k.shape[:2], -1, -1)], -1)
    return F.pad(wide_q, empty), F.pad(wide_k, empty)
