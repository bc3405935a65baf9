"""Weighted means that lose nothing where all agree."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def weighted_mean(rows: Float[Tensor, "tasks *shape"], shares: Sequence[float]) -> Float[Tensor, "*shape"]:
    """Return sum_i shares_i rows_i, measured from the row of largest share.

    Shares that add up to 1 then give equal entries back bit for bit, which a plain sum would round; and a row of small
    share cannot drown the others, as it could if all were measured from it.

    Args:
        rows: one per task.
        shares: one per task.

    Returns:
        New memory of the rows' shape.
    """
    first = max(range(len(rows)), key=lambda task: abs(shares[task]))
    total = sum(shares)
    merged = rows[first].clone() if abs(total - 1) < 1e-12 else rows[first] * total
    for task, (share, row) in enumerate(zip(shares, rows, strict=True)):
        if task != first and share:
            difference = row - rows[first]
            difference *= share
            merged += difference
    return merged
