"""The search without gradients: bounds, budget and seed respected, near the minimum of smooth functions."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.quadratic_search import Trial, best, minimise


def bowl(size, seed=0, stretch=4.0):
    """A convex quadratic with its minimum, 0, inside of [-1.5, 1.5]."""
    draw = np.random.default_rng(seed)
    q, _ = np.linalg.qr(draw.standard_normal((size, size)))
    curvature = q @ np.diag(np.linspace(1, stretch, size)) @ q.T
    centre = draw.uniform(-1, 1, size)
    return lambda point: float((np.asarray(point) - centre) @ curvature @ (np.asarray(point) - centre))


def wavy(point):
    x = np.asarray(point)
    return float(((x - 0.6) ** 2).sum() + 0.1 * np.sin(5 * x).sum())


@pytest.mark.parametrize("size", [1, 2, 4, 8, 20])
@pytest.mark.parametrize("seed", range(3))
def test_forty_trials_improve_much_on_smooth_functions(size, seed):
    function = bowl(size, seed)
    trials = minimise(function, [0.0] * size, bound=1.5, evaluations=40, seed=seed)
    assert len(trials) == 40
    assert best(trials).value <= (0.05 if size <= 8 else 0.5) * trials[0].value


def test_it_finds_the_minimum_of_a_quadratic_of_two_variables():
    function = bowl(2, 1)
    assert best(minimise(function, [0.0, 0.0], bound=1.5, evaluations=40, seed=0)).value < 0.01 * function([0.0, 0.0])


def test_a_function_with_waves_gets_better_too():
    trials = minimise(wavy, [0.0] * 3, bound=1.5, evaluations=40, seed=0)
    assert best(trials).value < wavy([0.0] * 3) - 0.8


@given(
    size=st.integers(1, 6),
    evaluations=st.integers(0, 30),
    bound=st.sampled_from([0.0, 0.01, 1.5, 100.0]),
    seed=st.integers(-5, 2**70),
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=30, max_size=30),
)
@settings(deadline=None, max_examples=60)
def test_whatever_the_values_the_budget_and_the_bounds_hold(size, evaluations, bound, seed, values):
    """NaN, infinities and huge numbers among them."""
    asked = []

    def function(point):
        asked.append(point)
        return values[len(asked) - 1]

    trials = minimise(function, [0.0] * size, bound=bound, evaluations=evaluations, seed=seed)
    assert [trial.point for trial in trials] == asked
    assert len(asked) == evaluations
    assert all(len(point) == size and all(abs(value) <= bound for value in point) for point in asked)
    assert all(type(value) is float for point in asked for value in point)
    if asked:
        assert asked[0] == (0.0,) * size
        finite = [value for value in values[:evaluations] if math.isfinite(value)]
        found = best(trials).value
        assert found == min(finite) if finite else found is trials[0].value or found == trials[0].value


def test_a_start_outside_of_the_bounds_is_moved_inside():
    assert minimise(sum, [3.0, -3.0], bound=1.0, evaluations=1, seed=0)[0].point == (1.0, -1.0)


def test_the_seed_decides():
    runs = [minimise(wavy, [0.0] * 4, bound=1.5, evaluations=25, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("known", [0, 1, 7, 24, 25])
def test_known_values_are_not_computed_again(known):
    function, whole = bowl(4), None
    whole = minimise(function, [0.0] * 4, bound=1.5, evaluations=25, seed=3)
    asked = []
    values = [trial.value for trial in whole[:known]]
    again = minimise(
        lambda point: asked.append(point) or function(point), [0.0] * 4, bound=1.5, evaluations=25, seed=3, known=values
    )
    assert again == whole
    assert len(asked) == 25 - known


def test_the_best_is_the_first_of_the_smallest():
    trials = [Trial((0.0,), math.nan), Trial((1.0,), 2.0), Trial((2.0,), -math.inf), Trial((3.0,), 2.0)]
    assert best(trials) is trials[1]


def test_points_that_fail_are_gone_around():
    """Where a third of the space has no value, the rest is searched all the same."""
    inner = bowl(3, 2)
    trials = minimise(
        lambda point: math.nan if point[0] > 0.9 else inner(point), [0.0] * 3, bound=1.5, evaluations=40, seed=0
    )
    assert best(trials).value < 0.3 * inner([0.0] * 3)


@pytest.mark.parametrize("evaluations", [6, 10, 14])
def test_with_fewer_trials_than_directions_need_it_does_more_than_step_along_them(evaluations):
    """Half of the trials go along coordinates; the others use what these told."""
    size = 20
    trials = minimise(lambda point: float(sum((x - 0.7) ** 2 for x in point)), [0.0] * size, bound=1.5,
                      evaluations=evaluations, seed=0)  # fmt: skip
    steps = [np.count_nonzero(np.subtract(b.point, a.point)) for a, b in pairwise(trials)]
    assert max(steps) > 1
