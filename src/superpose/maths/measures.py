"""How well a merged matrix keeps the features of the task matrices it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from superpose.maths.svd import Features


@dataclass(frozen=True)
class Preservation:
    """How far a merged matrix is from answering each feature with its strength; 0 is perfect.

    Args:
        mean: mean of |<s u, M v - s u>| over the features of all tasks (Appendix A of arXiv:2502.10698v2); has the
            unit of the weights squared and is dominated by strong features.
        relative: mean of |u . M v / s - 1|, which is free of scale and counts every feature alike.
        by_task: `mean` over each task's own features, 0 for a task that has none.
        features: number of features.
    """

    mean: float
    relative: float
    by_task: tuple[float, ...]
    features: int


def feature_preservation(merged: Float[Tensor, "out in_"], tasks: Sequence[Features]) -> Preservation:
    """Measure how far a merged task matrix is from answering each task's features.

    Args:
        merged: the merged task matrix, without final scaling.
        tasks: the features of each task's matrix.

    Returns:
        The means over all features; zeros when there are none.
    """
    misses, shares, by_task = 0.0, 0.0, []
    count = sum(task.count for task in tasks)
    for task in tasks:
        if not task.count:
            by_task.append(0.0)
            continue
        s = task.s.double()
        answers = ((task.u.T @ merged) * task.vh).sum(dim=1).double()
        miss = s * (answers - s).abs()
        misses += float(miss.sum())
        shares += float((answers / s - 1).abs().sum())
        by_task.append(float(miss.mean()))
    return Preservation(misses / max(count, 1), shares / max(count, 1), tuple(by_task), count)


def effective_rank(s: Float[Tensor, " rank"]) -> float:
    """Return the effective rank: exp of the entropy of the singular values' shares of their sum.

    Roy & Vetterli 2007, "The effective rank". n equal values give n; 0 for none.
    """
    if not len(s):
        return 0.0
    shares = s.double() / s.double().sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def subspace_overlap(first: Float[Tensor, "size count"], second: Float[Tensor, "size other"]) -> float:
    """Return how far two subspaces share their directions: 1 if one lies in the other, 0 if they are orthogonal.

    The mean squared cosine of their principal angles; count / size is to be expected of random subspaces.

    Args:
        first: orthonormal columns.
        second: orthonormal columns.

    Returns:
        A number from 0 to 1; 0 where one has no columns.
    """
    directions = min(first.shape[1], second.shape[1])
    return float((first.T @ second).double().square().sum()) / directions if directions else 0.0
