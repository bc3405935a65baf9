"""STF: the smallest matrix that answers each task's singular directions as that task did.

    features  (u_a, s_a, v_a): the singular triplets of all task matrices M_i = trim(tuned_i - base), together
    solve     G alpha = s,   G_ab = (u_a . u_b)(v_a . v_b)
    merge     M = sum_a alpha_a u_a v_a^T,   so that u_a . M v_a = s_a for every feature a
    apply     merged = base + scaling_factor * M

For linear maps and convolutions (flattened to out x rest). Norms get the plain mean of their trimmed task vectors,
biases, embeddings and heads the scaled sum. Without shared features it is task arithmetic; where tasks share a
direction it keeps each one's strength instead of adding them up; where they contradict each other it takes the least
squares answer and says so. Use density 1 for LLMs; the best scaling factor falls as tasks are added.

Cost: T decompositions of each matrix, and a system of T min(out, in) unknowns; with `feature_share` 0.2 a tenth of
that or less. Prefer it for several tasks on one base that share leading directions, which `superpose compare` shows;
where they share none it equals trimmed task arithmetic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.kinds import MATRIX_KINDS, Kind
from superpose.maths.feature_gram import FeatureGram, add_up, block_bytes
from superpose.maths.linear_system import MOST_DENSE, TOLERANCE, Solution, Solver, solve_psd
from superpose.maths.low_rank import LowRank, of_features, total, zero
from superpose.maths.matrices import acts_as_matrix
from superpose.maths.side_by_side import side_by_side
from superpose.maths.sparsify import Cuts, apply_cuts, count_kept, keep_largest
from superpose.maths.streaming import MagnitudeSurvey
from superpose.maths.svd import Features, leading, leading_by_energy, leading_svd, thin_svd, without_ends
from superpose.options import Range
from superpose.registry import (
    Breach,
    Cache,
    Caution,
    Cost,
    Factored,
    Merged,
    MergedFactors,
    Remembered,
    merge_method,
    remembered,
)

NEARLY_PARALLEL = 1e4
"""Condition number beyond which a ridge is suggested."""
MOST_BESIDE = 4
"""Decompositions of one tensor at the same time."""


@dataclass(frozen=True, kw_only=True)
class StfOptions:
    """Options of STF."""

    density: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of each task vector's entries kept (eta in the paper); 1 for LLMs, 0.3 for LoRA."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 0.8
    """Factor on the merged task vector (gamma in the paper)."""
    density_scope: Literal["model", "tensor"] = "tensor"
    """Whether the kept entries are counted over the whole model or in each tensor."""
    ridge: Annotated[float, Range(0, 1)] = 0.0
    """Added to the system, whose diagonal is 1; 0.001 to 0.1 for nearly parallel tasks."""
    rank: Annotated[int | None, Range(1, 1_000_000)] = None
    """Most features kept of each task matrix, the strongest first; none keeps all."""
    energy: Annotated[float, Range(0, 1)] = 1.0
    """Share of each task matrix's squared norm that the kept features hold."""
    feature_share: Annotated[float, Range(0, 1)] = 1.0
    """Share of min(out, in) features kept of each task matrix, the strongest; 0.2 is many times faster."""
    decomposition: Literal["auto", "exact"] = "auto"
    """How leading features are found: auto by a sketch where that is much faster, exact by a full decomposition."""
    check_share: Annotated[float, Range(0, 1)] = 0.0
    """Share of the matrices also merged with all features, to record how far the result is from that."""
    remove_smallest: Annotated[float, Range(0, 1)] = 0.0
    """Fraction of each task's features removed from the weak end (the paper's Figure 5a)."""
    remove_largest: Annotated[float, Range(0, 1)] = 0.0
    """Fraction of each task's features removed from the strong end (the paper's Figure 5b)."""
    matrices: Literal["task", "finetuned"] = "task"
    """Decompose the task matrices, or the fine-tuned ones (the paper's Figure 3a; untrimmed and unscaled)."""
    trim_norm: bool = True
    """Whether norms are trimmed before they are averaged (Algorithm 2, line 11)."""
    solver: Literal["auto", "cg", "direct", "eigh"] = "auto"
    """How the system is solved; auto takes the fastest that its conditioning allows."""


@dataclass(frozen=True)
class Superposition:
    """The merged matrix as a sum of features, and how well it answers each of them."""

    tasks: Sequence[Features]
    factors: Sequence[Float[Tensor, " _"]]
    """Factor of each feature in the sum, by task."""
    norm: float
    """Of the matrix."""
    features: int
    solution: Solution
    worst: float
    """Largest |u_a . M v_a - s_a|, relative to the largest s."""
    conflicting: tuple[int, ...]
    """Indices of the tasks whose features are not answered."""

    @cached_property
    def matrix(self) -> Float[Tensor, "out in_"]:
        """The merged matrix written out."""
        return add_up(self.tasks, self.factors)

    def low_rank(self) -> LowRank:
        """Return the merged matrix by its factors, the strengths shared between both."""
        roots = [factor.abs().sqrt() for factor in self.factors]
        left = [
            task.u * (root * factor.sign()) for task, root, factor in zip(self.tasks, roots, self.factors, strict=True)
        ]
        right = [root[:, None] * task.vh for task, root in zip(self.tasks, roots, strict=True)]
        return LowRank(torch.cat(left, dim=1), torch.cat(right))


def stf_cost(shape: Sequence[int], tasks: int, options: StfOptions) -> Cost:
    """Return what one matrix takes: decompositions, the system, and its assembly."""
    out, in_ = shape[0], prod(shape[1:])
    small = min(out, in_)
    wanted = _wanted(options, small)
    count = small if wanted is None else wanted
    features = tasks * count
    checks = options.check_share > 0 and not _keeps_all_features(options)
    if checks:  # some matrices are merged with all features as well
        everything = replace(options, rank=None, feature_share=1.0, energy=1.0, remove_smallest=0.0, remove_largest=0.0)
        whole = stf_cost(shape, tasks, replace(everything, check_share=0.0))
    kept = 4 * ((tasks + 1) * out * in_ + features * (out + in_))
    # Each in float64, with its Gram matrix, eigenvectors and work space.
    decomposing = 16 * out * in_ + 32 * small**2
    if wanted is not None and options.decomposition == "auto" and 4 * wanted < small:
        decomposing = 16 * wanted * (out + in_) + 4 * out * in_  # by a sketch
    decomposing *= min(tasks, MOST_BESIDE)
    solving = block_bytes([count] * tasks, torch.float32)
    if features <= MOST_DENSE or options.solver in ("direct", "eigh"):
        solving += 32 * features**2  # written out in float64, with eigenvectors: what the slowest route takes
    flops = tasks * (2.0 * out * in_ * small + 12 * small**3) if wanted is None else 10.0 * tasks * out * in_ * wanted
    flops += features**2 * (out + in_) + 2.0 * features * out * in_
    memory = kept + max(decomposing, solving)
    if checks:
        memory, flops = kept + whole.memory, flops + options.check_share * whole.flops
    return Cost(memory, flops)


def _in_factors(tasks: Sequence[LowRank], options: StfOptions, kind: Kind) -> MergedFactors:
    """Superpose the features of low-rank task matrices: the result is one, of all ranks."""
    if kind not in MATRIX_KINDS:
        return MergedFactors(total(tasks, [options.scaling_factor] * len(tasks)))
    wanted = _wanted(options, min(tasks[0].shape))
    found = [without_ends(task.features(), options.remove_smallest, options.remove_largest) for task in tasks]
    kept = [leading(features, wanted, options.energy) for features in found]
    present = [index for index, task in enumerate(kept) if task.count]
    if len(present) < 2 and options.ridge == 0:
        count = sum(task.count for task in kept)
        alone = zero(tasks[0].shape, tasks[0].left)
        if present:
            alone = tasks[present[0]] if _keeps_all_features(options) else of_features(kept[present[0]])
        stats = {"features": count, "rank": count, "residual": 0.0, "condition": 1.0}
        return MergedFactors(alone.times(options.scaling_factor), stats)
    if not present:
        stats = {"features": 0, "rank": 0, "residual": 0.0, "condition": 1.0}
        return MergedFactors(zero(tasks[0].shape, tasks[0].left), stats)
    merged = superpose_features(kept, ridge=options.ridge, solver=options.solver)
    stats = _stats(merged, kept)
    update = merged.low_rank().times(options.scaling_factor)
    return MergedFactors(update, stats, _cautions(merged, present, stats["growth"]))


def _allows_factors(options: StfOptions, kind: Kind) -> bool:
    """Trimming asks for single entries, and a sample to check against for the matrices written out."""
    return options.density == 1 and options.matrices == "task" and options.check_share == 0


@merge_method(
    "stf",
    options=StfOptions,
    source="Qiu et al. 2025, arXiv:2502.10698v2 (EMNLP 2025), Algorithms 1 and 2",
    whole_for=MATRIX_KINDS,
    survey=MagnitudeSurvey(),
    cost=stf_cost,
    breaks={
        "same": Breach(
            "biases, embeddings and heads are added up, as in the paper",
            frozenset({Kind.BIAS, Kind.EMBEDDING, Kind.HEAD, Kind.SCALAR}),
        ),
        "zero": Breach("norms are averaged, as in the paper", frozenset({Kind.NORM})),
    },
    factored=Factored(_in_factors, _allows_factors),
    for_adapters={"density": 1.0},
    needs_base=lambda options: options.matrices == "finetuned",
)
def stf(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: StfOptions,
    *,
    kind: Kind,
    base: Float[Tensor, "*shape"] | None = None,
    survey: Cuts | None = None,
    cache: Cache | None = None,
) -> Merged:
    """Merge task vectors so that every kept singular feature keeps its strength.

    Args:
        task_vectors: tuned minus base, one per task.
        options: see `StfOptions`.
        kind: only linear maps and convolutions are solved for.
        base: the base weight; needed for `matrices: finetuned` alone.
        survey: this tensor's cuts; when not given, each task vector is trimmed by itself.
        cache: remembers decompositions and merged matrices before scaling.

    Returns:
        The merged task vector; for matrices with the system's size, rank, residual and conditioning.
    """
    solves = acts_as_matrix(kind, task_vectors.shape[1:])
    if options.matrices == "finetuned" and solves:
        if base is None:
            raise ValueError("matrices='finetuned' needs the base")
        tuned = task_vectors + base
        merged = _merge_stack(tuned, kind, options, cache)
        return Merged(merged.tensor - base, merged.stats, merged.cautions)
    trims = kind is not Kind.NORM or options.trim_norm
    if not trims:
        trimmed = task_vectors
    elif survey is not None:
        trimmed = apply_cuts(task_vectors, survey)
    else:
        trimmed = keep_largest(task_vectors, options.density)
    if kind is Kind.NORM:
        return Merged(trimmed.mean(dim=0))  # unscaled, as the paper does for norms
    if not solves:
        return Merged(options.scaling_factor * trimmed.sum(dim=0))
    merged = _merge_stack(trimmed, kind, options, cache)
    return Merged(options.scaling_factor * merged.tensor, merged.stats, merged.cautions)


def superpose_features(tasks: Sequence[Features], *, ridge: float = 0.0, solver: Solver = "auto") -> Superposition:
    """Solve for the matrix of smallest norm that answers every feature of every task with its strength.

    Equation (3) of the paper: (U o V) alpha = s, with its diagonal blocks known to be the identity and each block
    beside it formed once.

    Args:
        tasks: each task's features, all of one outer shape; at least one task has some.
        ridge: weight on the squared norm of the result.
        solver: see `solve_psd`.

    Returns:
        The matrix, and how well it answers.
    """
    s = torch.cat([task.s for task in tasks])
    gram = FeatureGram(tasks)
    solution = solve_psd(gram, s, ridge=ridge, solver=solver)
    counts = [task.count for task in tasks]
    x = solution.x.to(s)
    answers = gram.times(x[:, None])[:, 0]
    del gram  # its blocks are the largest thing here
    misses = (answers - s).abs() / s.max()
    worst = float(misses.max())
    conflicting: tuple[int, ...] = ()
    tolerance = 100 * TOLERANCE[s.dtype]
    if ridge == 0 and worst > tolerance and solution.converged:
        by_task = misses.split(counts)
        conflicting = tuple(i for i, part in enumerate(by_task) if len(part) and float(part.max()) > tolerance)
    # <M, M> = sum_a alpha_a u_a . M v_a; in float64 no square of a float32 vanishes.
    norm = math.sqrt(max(0.0, float(x.double() @ answers.double())))
    return Superposition(tasks, x.split(counts), norm, len(s), solution, worst, conflicting)


def _merge_stack(
    matrices: Float[Tensor, "tasks *shape"], kind: Kind, options: StfOptions, cache: Cache | None
) -> Merged:
    """Merge one matrix per task, or, for a stack of linear maps (experts), one after the other."""
    if kind is not Kind.LINEAR or matrices.ndim != 4:
        out = matrices.shape[1]
        flat = matrices.reshape(len(matrices), out, prod(matrices.shape[2:]))
        found = _merge_matrices(flat, options, cache)
        return replace(found, tensor=found.tensor.reshape(matrices.shape[1:]))
    merged = [_merge_matrices(member, options, cache) for member in matrices.unbind(1)]
    stats = {
        "features": sum(int(member.stats["features"]) for member in merged),
        "rank": sum(int(member.stats["rank"]) for member in merged),
        "residual": max(float(member.stats["residual"]) for member in merged),
        "condition": max(float(member.stats["condition"]) for member in merged),
    }
    cautions = tuple(dict.fromkeys(caution for member in merged for caution in member.cautions))
    return Merged(torch.stack([member.tensor for member in merged]), stats, cautions)


def _merge_matrices(matrices: Float[Tensor, "tasks out in_"], options: StfOptions, cache: Cache | None) -> Merged:
    """Superpose the features of one matrix per task, or remember having done so: scaling comes after it."""
    # What acts before or after this is not part of what was done here.
    done = replace(options, density=1.0, scaling_factor=1.0, density_scope="tensor", matrices="task", trim_norm=True)
    return remembered(cache, f"superposed by {done}", matrices, lambda: _solve_matrices(matrices, options, cache))


def _solve_matrices(matrices: Float[Tensor, "tasks out in_"], options: StfOptions, cache: Cache | None) -> Merged:
    decompose = partial(_remembered_features, options=options, cache=cache)
    tasks = side_by_side(decompose, list(matrices), most=MOST_BESIDE) if matrices.numel() else []
    present = [index for index, task in enumerate(tasks) if task.count]
    if len(present) == 0:
        stats = {"features": 0, "rank": 0, "residual": 0.0, "condition": 1.0}
        return Merged(torch.zeros_like(matrices[0]), stats)
    if len(present) == 1 and options.ridge == 0:
        # One task answers to nobody else: its own matrix, without the rounding of a decomposition.
        task = tasks[present[0]]
        matrix = matrices[present[0]] if _keeps_all_features(options) else task.matrix()
        stats = {"features": task.count, "rank": task.count, "residual": 0.0, "condition": 1.0}
        return Merged(matrix, stats)
    found = superpose_features(tasks, ridge=options.ridge, solver=options.solver)
    stats = _stats(found, tasks)
    if not _keeps_all_features(options) and _is_checked(matrices, options.check_share):
        stats["distance_to_all_features"] = _distance_to_all_features(found.matrix, matrices, options)
    return Merged(found.matrix, stats, _cautions(found, present, stats["growth"]))


def _stats(found: Superposition, tasks: Sequence[Features]) -> dict[str, Any]:
    together = sum(float(torch.linalg.vector_norm(task.s, dtype=torch.float64)) for task in tasks)
    return {
        "features": found.features,
        "rank": found.solution.rank,
        "residual": found.solution.residual,
        "condition": found.solution.condition,
        "worst": found.worst,
        "solver": found.solution.solver,
        "growth": found.norm / together if together else 0.0,
    }


def _remembered_features(matrix: Float[Tensor, "out in_"], options: StfOptions, cache: Cache | None) -> Features:
    """Return the features of one task that take part, by rows: laid out otherwise, their products round otherwise."""

    def compute() -> Remembered:
        features = _features(matrix, options)
        return Remembered({"uh": features.u.T.contiguous(), "s": features.s, "vh": features.vh.contiguous()})

    limits = options.rank, options.feature_share, options.energy, options.remove_smallest, options.remove_largest
    what = f"features {limits} {options.decomposition}"
    found = (compute() if cache is None else cache.remember(what, [matrix], compute, step=True)).tensors
    return Features(found["uh"].T, found["s"], found["vh"])


def _features(matrix: Float[Tensor, "out in_"], options: StfOptions) -> Features:
    wanted = _wanted(options, min(matrix.shape))
    keeps_ends = options.remove_smallest == options.remove_largest == 0
    if options.decomposition == "auto" and keeps_ends and wanted is not None:
        features = leading_svd(matrix, wanted)
    elif options.decomposition == "auto" and keeps_ends and options.energy < 1:
        return leading_by_energy(matrix, options.energy)
    else:
        features = without_ends(thin_svd(matrix), options.remove_smallest, options.remove_largest)
    return leading(features, wanted, options.energy)


def _wanted(options: StfOptions, size: int) -> int | None:
    """Return how many of a matrix's features are asked for by number, None for all of them."""
    counts = [] if options.rank is None else [options.rank]
    if options.feature_share < 1:
        counts.append(count_kept(options.feature_share, size))
    return min(*counts, size) if counts else None


def _is_checked(matrices: Float[Tensor, "tasks out in_"], share: float) -> bool:
    """Return whether these matrices are in the sample: by their content, so that every run takes the same."""
    if share in (0, 1):
        return share == 1
    first = matrices[0].contiguous().numpy(force=True)
    return int.from_bytes(hashlib.sha256(first.tobytes()).digest()[:6], "big") < share * 2**48


def _distance_to_all_features(
    merged: Float[Tensor, "out in_"], matrices: Float[Tensor, "tasks out in_"], options: StfOptions
) -> float:
    """Return how far a merge of some features is from that of all, relative to the latter's norm."""
    tasks = [thin_svd(matrix) for matrix in matrices]
    whole = superpose_features(tasks, ridge=options.ridge, solver=options.solver).matrix
    norm = float(torch.linalg.vector_norm(whole, dtype=torch.float64))
    return float(torch.linalg.vector_norm(merged - whole, dtype=torch.float64)) / norm if norm else 0.0


def _keeps_all_features(options: StfOptions) -> bool:
    limits = options.feature_share, options.energy
    return options.rank is None and limits == (1, 1) and options.remove_smallest == options.remove_largest == 0


def _cautions(found: Superposition, present: Sequence[int], growth: float) -> tuple[Caution, ...]:
    if found.conflicting:
        return (
            Caution(
                f"tasks contradict each other on a shared feature: the least-squares answer misses it by"
                f" {found.worst:.2g} of the strongest; a ridge of 0.001 to 0.1 makes such answers smooth",
                found.conflicting,
            ),
        )
    if not found.solution.converged:
        return (
            Caution(
                f"features of the tasks are so nearly parallel that the system is not solved to its end: features are"
                f" missed by up to {found.worst:.2g} of the strongest; a ridge of 0.001 to 0.1 makes it solvable",
                tuple(present),
            ),
        )
    if growth > 1 or found.solution.condition > NEARLY_PARALLEL:
        return (
            Caution(
                f"features of the tasks are nearly parallel (condition {found.solution.condition:.2g}): the merged"
                f" matrix is {growth:.2g} times as large as all task matrices together; a ridge of 0.001 to 0.1 bounds"
                " it",
                tuple(present),
            ),
        )
    return ()
