"""Trimmed task arithmetic: the control for STF, equal to it but for the linear system.

    t_i    = the `density` entries of tau_i of largest magnitude
    merged = base + scaling_factor * sum_i t_i;   norms: base + mean_i t_i, unscaled

Same trimming, same scaling, same treatment of norms as STF with the same options: what STF gains over it, the system
gained. For tasks that share no directions the two are equal.

Cost: one pass with selection (`density_scope: model` two more); each tensor as a whole to select in it. Prefer it as a
control in experiments, and where STF's decompositions take too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxtyping import Float
from torch import Tensor

from superpose.kinds import Kind
from superpose.maths.low_rank import LowRank, total
from superpose.maths.sparsify import Cuts, apply_cuts, keep_largest
from superpose.maths.streaming import MagnitudeSurvey
from superpose.options import Range
from superpose.registry import Breach, Factored, merge_method


@dataclass(frozen=True, kw_only=True)
class TrimmedTaskArithmeticOptions:
    """Options of trimmed task arithmetic: those of STF that both have."""

    density: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of each task vector's entries kept; STF's default (eta in its paper)."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 0.8
    """Factor on the sum; STF's default (gamma in its paper)."""
    density_scope: Literal["model", "tensor"] = "tensor"
    """Whether the kept entries are counted over the whole model or in each tensor; STF's default."""
    trim_norm: bool = True
    """Whether norms are trimmed before they are averaged; STF's default."""


def _in_factors(tasks: Sequence[LowRank], options: TrimmedTaskArithmeticOptions) -> LowRank:
    return total(tasks, [options.scaling_factor] * len(tasks))


@merge_method(
    "trimmed_task_arithmetic",
    options=TrimmedTaskArithmeticOptions,
    source="control of Qiu et al. 2025, arXiv:2502.10698v2, Algorithm 2 with the sum in place of the system",
    whole_for=(),
    survey=MagnitudeSurvey(),
    breaks={
        "same": Breach("T identical tasks add up to T times the task", frozenset(Kind) - {Kind.NORM}),
        "zero": Breach("norms are averaged, as by STF", frozenset({Kind.NORM})),
    },
    factored=Factored(_in_factors, lambda options, kind: options.density == 1, splits=False),
    for_adapters={"density": 1.0},
)
def trimmed_task_arithmetic(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: TrimmedTaskArithmeticOptions,
    *,
    kind: Kind,
    survey: Cuts | None = None,
) -> Float[Tensor, "*shape"]:
    """Add up the trimmed task vectors, scaled; average those of norms.

    Args:
        task_vectors: tuned minus base.
        options: see `TrimmedTaskArithmeticOptions`.
        kind: norms are averaged.
        survey: this tensor's cuts; when not given, each task vector is trimmed by itself.

    Returns:
        The merged task vector.
    """
    trimmed = task_vectors
    if kind is not Kind.NORM or options.trim_norm:
        trimmed = apply_cuts(task_vectors, survey) if survey else keep_largest(task_vectors, options.density)
    if kind is Kind.NORM:
        return trimmed.mean(dim=0)
    return options.scaling_factor * trimmed.sum(dim=0)
