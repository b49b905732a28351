"""The grouped matmul with static shapes alone: rows in tiles of a fixed size, for programs that are traced.

Every expert's rows are cut into tiles of TILE rows; the last one of an expert is padded. There are never more than
N // TILE + E of them, whatever the routing, so no size is read from the data. In eager mode a loop over groups is
faster (docs/benchmarks.md); a compiler fuses the gathers away.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

TILE = 16


class Tiles(NamedTuple):
    """Assignment of rows to tiles."""

    rows: Int[Tensor, "tiles places"]  # index of the row; any row where `filled` is False
    filled: Bool[Tensor, "tiles places"]
    expert: Int[Tensor, " tiles"]
    place: Int[Tensor, " rows"]  # of each row among all tiles' places
    owned: Bool[Tensor, " rows"]  # False behind the last offset


def cut_tiles(offsets: Int32[Tensor, " experts"], num_rows: int) -> Tiles:
    """Cut the rows of each expert, which `offsets` bound, into tiles."""
    ends = offsets.long()
    experts, device = ends.shape[0], ends.device
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    behind = ((counts + TILE - 1) // TILE).cumsum(dim=0)  # tile behind the last one of each expert
    first_tile = behind - (counts + TILE - 1) // TILE
    tile = torch.arange(num_rows // TILE + experts, device=device)
    expert = torch.searchsorted(behind, tile, right=True).clamp_max(experts - 1)
    first_row = (ends - counts)[expert] + (tile - first_tile[expert]) * TILE
    rows = first_row.unsqueeze(1) + torch.arange(TILE, device=device)
    filled = (rows < ends[expert].unsqueeze(1)) & (tile < behind[-1]).unsqueeze(1)
    row = torch.arange(num_rows, device=device)
    owner = torch.searchsorted(ends, row, right=True).clamp_max(experts - 1)
    place = first_tile[owner] * TILE + row - (ends - counts)[owner]
    return Tiles(rows.clamp(0, num_rows - 1), filled, expert, place.clamp(0, tile.shape[0] * TILE - 1), row < ends[-1])


def tiled_matmul(
    rows: Float[Tensor, "rows in_dim"],
    weights: Float[Tensor, "experts in_dim out_dim"],
    offsets: Int32[Tensor, " experts"],
) -> Float[Tensor, "rows out_dim"]:
    """`grouped_matmul`, tile by tile."""
    tiles = cut_tiles(offsets, rows.shape[0])
    out = torch.bmm(rows[tiles.rows], weights[tiles.expert]).flatten(0, 1)
    return torch.where(tiles.owned.unsqueeze(-1), out[tiles.place], 0.0)


def tiled_outer(
    rows: Float[Tensor, "rows in_dim"], grads: Float[Tensor, "rows out_dim"], offsets: Int32[Tensor, " experts"]
) -> Float[Tensor, "experts in_dim out_dim"]:
    """Sum of the rows' outer products for each expert, rows^T @ grads: `grouped_outer` in tiles of a fixed size."""
    tiles = cut_tiles(offsets, rows.shape[0])
    left, right = (torch.where(tiles.filled.unsqueeze(-1), part[tiles.rows], 0.0) for part in (rows, grads))
    out = rows.new_zeros(offsets.shape[0], rows.shape[1], grads.shape[1])
    return out.index_add(0, tiles.expert, torch.bmm(left.mT, right))
