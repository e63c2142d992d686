# SPDX-License-Identifier: Apache-2.0
"""Cut weights into the groups that share a scale, and put them together again.

Shapes: ... leading dimensions, O rows (outputs), I columns (inputs), G groups per row, S columns per group.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_autoround.scheme import Granularity, PerBlock, PerGroup, PerTensor


def group_columns(columns: int, granularity: Granularity) -> int:
    """Return S for rows of `columns` inputs: a group is never longer than its row."""
    match granularity:
        case PerGroup(size) | PerBlock(_, size):
            return min(size, columns)
    return columns


def rows_together(granularity: Granularity) -> int | None:
    """Return how many rows share their scales, None if all of them do."""
    match granularity:
        case PerTensor():
            return None
        case PerBlock(rows, _):
            return rows
    return 1


def group_count(columns: int, granularity: Granularity) -> int:
    """Return G, the last, shorter group included."""
    return -(-columns // group_columns(columns, granularity))


def group(weight: Tensor, granularity: Granularity) -> Tensor:
    """Split each row into groups that share a scale, padding the last one with zeros.

    (..., O, I) -> (..., O, G, S). A range always includes 0, so the padding never widens it.
    """
    size = group_columns(weight.shape[-1], granularity)
    short = -weight.shape[-1] % size
    return (F.pad(weight, (0, short)) if short else weight).unflatten(-1, (-1, size))


def ungroup(groups: Tensor, columns: int) -> Tensor:
    """Undo `group`: (..., O, G, S) -> (..., O, I), the padding cut off."""
    flat = groups.flatten(-2)
    return flat if flat.shape[-1] == columns else flat[..., :columns]  # the backward of a cut that cuts nothing copies


def over_rows(values: Tensor, granularity: Granularity, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce numbers (..., O, G, 1) over the rows that share a scale (`reduce` keeps dimension -3), for each of those rows."""
    together, rows = rows_together(granularity), values.shape[-3]
    if together == 1:
        return values
    portions = values.split(together or max(rows, 1), dim=-3)
    return torch.cat([reduce(portion).expand_as(portion) for portion in portions], dim=-3)
