"""A search without gradients, for functions that are smooth and costly: a quadratic fitted to all trials so far.

Coordinates are stepped along first, each from the best point so far. Then a quadratic is fitted to the trials (least
squares with a small ridge, trials near the best counting most), and the next point is its minimiser within a radius
around the best, which grows by success and shrinks by failure. Some steps are shaken, so that the trials span all
directions. Forty trials bring it nearer to the minimum of smooth functions of four to twenty variables than a (1+1)
evolution strategy with the one-fifth rule, whose steps are random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

_GROWTH, _SHRINKAGE = 1.5, 0.75
_SHAKE = 0.1
"""Of the radius; every third step."""
_RIDGE = 1e-3
_SAME = 1e-3
"""Points nearer than that tell nothing new."""

Points = Float[np.ndarray, "trials variables"]


@dataclass(frozen=True)
class Trial:
    """A point that was tried, and its value."""

    point: tuple[float, ...]
    value: float


def minimise(
    function: Callable[[tuple[float, ...]], float],
    start: Sequence[float],
    *,
    bound: float,
    evaluations: int,
    seed: int,
    known: Sequence[float] = (),
) -> list[Trial]:
    """Search for a point of small value within [-bound, bound] in every direction.

    Args:
        function: point -> value; a value that is no number counts as the worst so far.
        start: the first point.
        bound: largest magnitude of a coordinate.
        evaluations: how many points are tried, the first included.
        seed: of the shaken steps.
        known: values of the first points, of an earlier search that was interrupted: they are not computed again.

    Returns:
        All trials, in order.
    """
    draw = np.random.default_rng(seed % 2**64)
    radius, along = bound / 3, _along(start, evaluations)
    trials: list[Trial] = []
    for number in range(evaluations):
        point = tuple(float(value) for value in np.clip(_next(trials, start, radius, along, draw), -bound, bound))
        before = best(trials).value if trials else np.inf
        value = known[number] if number < len(known) else function(point)
        trials.append(Trial(point, value))
        if number > along:
            radius = min(bound, radius * (_GROWTH if value < before else _SHRINKAGE))
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """Return the first of the trials of smallest value."""
    return min(trials, key=lambda trial: trial.value if np.isfinite(trial.value) else np.inf)


def _along(start: Sequence[float], evaluations: int) -> int:
    """Return how many coordinates are stepped along first."""
    return min(len(start), evaluations // 2)


def _next(
    trials: Sequence[Trial], start: Sequence[float], radius: float, along: int, draw: np.random.Generator
) -> np.ndarray:
    """Return the point to try."""
    if not trials:
        return np.asarray(start, dtype=np.float64)
    centre, size = np.asarray(best(trials).point), len(start)
    number = len(trials)
    noise = draw.standard_normal(size)
    if number <= along:
        return centre + radius * np.eye(size)[number - 1]
    step = _minimiser(trials, centre, radius)
    if number % 3 == 0:
        step = step + _SHAKE * radius * noise
    nearest = min(float(np.abs(centre + step - np.asarray(trial.point)).max()) for trial in trials)
    return centre + (0.5 * radius * noise if nearest < _SAME else step)


def _rises(trials: Sequence[Trial]) -> Float[np.ndarray, " trials"]:
    """Return how far each value is above the smallest, from 0 to 1; what is no number counts as the largest."""
    values = np.asarray([trial.value for trial in trials])
    finite = values[np.isfinite(values)]
    if not finite.size or finite.min() == finite.max():
        return np.zeros(len(values))
    low, high = finite.min() / 2, finite.max() / 2  # halves: their difference is finite
    return (np.where(np.isfinite(values), values / 2, high) - low) / (high - low)


def _minimiser(trials: Sequence[Trial], centre: np.ndarray, radius: float) -> np.ndarray:
    """Return the step from the centre to where the fitted quadratic is smallest, no longer than the radius."""
    points = np.asarray([trial.point for trial in trials]) - centre
    size = points.shape[1]
    if not radius:
        return np.zeros(size)
    pairs = list(combinations(range(size), 2)) if len(trials) > 1 + 2 * size else []
    columns = [
        points,
        points**2 / 2,
        *([np.stack([points[:, i] * points[:, j] for i, j in pairs], 1)] if pairs else []),
    ]
    features = np.concatenate(columns, axis=1)
    nearness = 1 / (1 + (2 * np.linalg.norm(points, axis=1) / radius) ** 2)
    ridge = np.full(features.shape[1], _RIDGE * nearness.mean())
    ridge[size:] *= 3  # curvatures are known less well than slopes
    system = features.T @ (nearness[:, None] * features) + np.diag(ridge)
    fitted = np.linalg.solve(system, features.T @ (nearness * _rises(trials)))
    curvature = np.diag(fitted[size : 2 * size])
    for value, (i, j) in zip(fitted[2 * size :], pairs, strict=True):
        curvature[i, j] = curvature[j, i] = value
    strengths, directions = np.linalg.eigh(curvature)
    # Where it curves down there is no minimum: the step goes down the slope all the same.
    firm = np.maximum(np.abs(strengths), 1e-2 * np.abs(strengths).max() + 1e-9)
    step = -directions @ ((directions.T @ fitted[:size]) / firm)
    length = float(np.linalg.norm(step))
    return step * min(1.0, radius / length) if length > 0 else step
