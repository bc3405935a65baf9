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

from superpose.maths.svd import Features


def shared_out(tasks: Sequence[Features], background: float) -> Float[Tensor, "out in_"]:
    """Return sum_i P_i M_i Q_i: each task's matrix by its share of every output and input direction.

    Args:
        tasks: features of the task matrices, each of one at least.
        background: how much a task uses directions that no feature of it has; its features' mean use is 1. Above 0.

    Returns:
        The matrix, in float64.
    """
    first = tasks[0]
    left = _identity(first.u.shape[0], first.u).mul_(background * len(tasks))
    right = _identity(first.vh.shape[1], first.vh).mul_(background * len(tasks))
    weighted = left.new_zeros(first.u.shape[0], first.vh.shape[1])
    for task in tasks:
        u, s, vh = task.u.double(), task.s.double(), task.vh.double()
        use = s / s.mean()
        left.addmm_(u * use, u.T)
        right.addmm_(vh.T * use, vh)
        # L_i M_i R_i: the features of M_i are eigenvectors of both.
        weighted.addmm_(u * (s * (use + background) ** 2), vh)
    merged = _divided(left, weighted)
    return _divided(right, merged.T).T


def _identity(size: int, like: Tensor) -> Float[Tensor, "size size"]:
    return torch.eye(size, dtype=torch.float64, device=like.device)


def _divided(by: Float[Tensor, "size size"], matrix: Float[Tensor, "size columns"]) -> Float[Tensor, "size columns"]:
    """Return by^-1 @ matrix, for a positive definite `by`, whose memory is used."""
    return torch.cholesky_solve(matrix, torch.linalg.cholesky(by, out=by))
