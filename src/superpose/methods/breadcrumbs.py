"""Model Breadcrumbs: drop the largest and the smallest entries of each task vector, add up the rest.

    mask_i = of the entries of tau_i by magnitude: the largest `remove_top` dropped, the next `density` kept
    merged = base + scaling_factor * sum_i mask_i o tau_i

Counts are exact: floor(remove_top * n) dropped, floor(density * n) kept, at least one; ties to the lowest index, in
each tensor or in each row (`scope: row`, along the last axis), zeros among them: of a sparse update the largest entries
can be most or all of it, which is warned of.

Cost: one pass; each tensor as a whole, with selection. Prefer it for many fine-tunes with heavy tails; where the
largest updates are what was learnt, TIES or STF keep them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.sparsify import apply_cut, count_kept, count_share, find_cut
from superpose.options import Range
from superpose.registry import Caution, Merged, merge_method


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsOptions:
    """Options of Model Breadcrumbs."""

    density: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of each task vector's entries kept (beta in the authors' README: 0.2)."""
    remove_top: Annotated[float, Range(0, 0.9)] = 0.1
    """Fraction of the largest entries dropped first (gamma in the authors' README: 0.1; mergekit: 0.01)."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 0.4
    """Factor on the sum (alpha in the authors' README: 0.4)."""
    scope: Literal["tensor", "row"] = "tensor"
    """Whether entries are counted in each tensor (the paper's layer-wise) or in each row (the authors' code)."""


def breadcrumbs_notes(options: BreadcrumbsOptions, tasks: int) -> list[str]:
    """Return what to tell the user about these options before anything is computed."""
    del tasks
    kept = 1 - options.remove_top
    if options.density <= kept + 1e-9:
        return []
    return [f"breadcrumbs: remove_top {options.remove_top:g} leaves {kept:.2g} of the entries, less than the density"]


@merge_method(
    "breadcrumbs",
    options=BreadcrumbsOptions,
    source="Davari & Belilovsky 2024, arXiv:2312.06795, masks and merge; counted per tensor, the code per row",
    breaks={"same": "T identical tasks add up to T times the task; with scaling_factor 1/T it holds"},
    notes=breadcrumbs_notes,
    plain={"density": 1.0, "remove_top": 0.0, "scaling_factor": 1.0},
)
def breadcrumbs(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: BreadcrumbsOptions,
    *,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Merged:
    """Add up the middle band of each task vector, scaled.

    Args:
        task_vectors: tuned minus base.
        options: see `BreadcrumbsOptions`.
        weights: one factor per task, not normalised; 1 when not given.

    Returns:
        The merged task vector; with a warning where all that differs from the base is among the largest entries.
    """
    merged = torch.zeros_like(task_vectors[0])
    erased = []
    for task, task_vector in enumerate(task_vectors if merged.numel() else ()):
        factor = options.scaling_factor * (1.0 if weights is None else float(weights[task]))
        band = _middle_band(task_vector, options)
        merged += factor * band
        if options.density and not bool(band.any()) and bool(task_vector.any()):
            erased.append(task)
    if not erased:
        return Merged(merged)
    text = "all entries that differ from the base are among the largest and dropped: choose a smaller remove_top"
    return Merged(merged, cautions=(Caution(text, tuple(erased)),))


def _middle_band(task_vector: Float[Tensor, "*shape"], options: BreadcrumbsOptions) -> Float[Tensor, "*shape"]:
    if options.scope == "row" and task_vector.ndim > 1:
        # A stable order by magnitude is a cut per row: ties to the lowest index.
        rows = task_vector.reshape(-1, task_vector.shape[-1])
        first, last = _band(rows.shape[1], options)
        order = rows.abs().argsort(dim=1, descending=True, stable=True)[:, first:last]
        return torch.zeros_like(rows).scatter_(1, order, rows.gather(1, order)).reshape(task_vector.shape)
    first, last = _band(task_vector.numel(), options)
    flat = task_vector.reshape(-1)
    kept = apply_cut(flat, find_cut(flat, last))
    return (kept - apply_cut(flat, find_cut(flat, first))).reshape(task_vector.shape)


def _band(numel: int, options: BreadcrumbsOptions) -> tuple[int, int]:
    """Return the places, in the order of descending magnitude, where the kept entries begin and end."""
    first = count_share(options.remove_top, numel)
    return first, min(numel, first + count_kept(options.density, numel))
