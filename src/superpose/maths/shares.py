"""Directions shared out among tasks: a soft partition of the output and input space, read off the task matrices.

A task uses the output direction u_k and the input direction v_k of its feature k as strongly as the feature is, and any
other a little:

    L_i = sum_k w_k u_k u_k^T + background I,    R_i = sum_k w_k v_k v_k^T + background I,    w_k = s_k / mean(s)

With L = sum_i L_i and R = sum_i R_i, the maps P_i = L^-1 L_i and Q_i = R_i R^-1 add up to the identity each: a
direction that one task alone uses is that task's, one that several use is divided by how much each does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.side_by_side import side_by_side
from superpose.maths.svd import Features

ROWS = 256
"""So many rows of a use are formed at a time: what is above the diagonal's block is not formed."""
MOST_BESIDE = 4
"""Blocks of rows that are formed at the same time."""
CLEAR = 1e-3
"""Share of the background up to which rounding of the strongest use is harmless."""


def shared_out(tasks: Sequence[Features], background: float) -> Float[Tensor, "out in_"]:
    """Return sum_i P_i M_i Q_i: each task's matrix by its share of every output and input direction.

    What is added up and solved is in float64, so that what the tasks' features span is left to rounding of its own size
    alone. L and R are known as the features are: those of float32 are formed in it where the background allows.

    Args:
        tasks: features of the task matrices, each of one at least.
        background: how much a task uses directions that no feature of it has; its features' mean use is 1. Above 0.

    Returns:
        The matrix, in float64.
    """
    first = tasks[0]
    uses = [(s := task.s.double()) / s.mean() for task in tasks]
    merged = torch.zeros(first.u.shape[0], first.vh.shape[1], dtype=torch.float64, device=first.u.device)
    for task, use in zip(tasks, uses, strict=True):
        # L_i M_i R_i: the features of M_i are eigenvectors of both.
        merged.addmm_(task.u.double() * (task.s.double() * (use + background) ** 2), task.vh.double())
    merged = _divided(_all_uses([task.u for task in tasks], uses, background), merged)
    return _divided(_all_uses([task.vh.T for task in tasks], uses, background), merged.T).T


def _all_uses(
    directions: Sequence[Float[Tensor, "size _"]], uses: Sequence[Float[Tensor, " _"]], background: float
) -> Float[Tensor, "size size"]:
    """Return sum_i (D_i diag(use_i) D_i^T + background I) in float64, up to what is above the diagonal."""
    size, dtype, every = directions[0].shape[0], directions[0].dtype, background * len(uses)
    # The smallest eigenvalue is that of the background: what rounds near to it would be solved for.
    if torch.finfo(dtype).eps * float(sum(use.max() for use in uses)) > CLEAR * every:
        dtype = torch.float64
    columns = [direction.to(dtype) for direction in directions]
    total = torch.eye(size, dtype=dtype, device=columns[0].device).mul_(every)

    def add_rows(start: int) -> None:
        rows = slice(start, min(start + ROWS, size))
        for each, use in zip(columns, uses, strict=True):
            total[rows, : rows.stop].addmm_(each[rows] * use.to(dtype), each[: rows.stop].T)

    side_by_side(add_rows, range(0, size, ROWS)[::-1], most=MOST_BESIDE)  # the longest first
    return total.double()


def _divided(by: Float[Tensor, "size size"], matrix: Float[Tensor, "size columns"]) -> Float[Tensor, "size columns"]:
    """Return by^-1 @ matrix, for a positive definite `by`: its lower triangle is read, and its memory is used."""
    return torch.cholesky_solve(matrix, torch.linalg.cholesky(by, out=by))
