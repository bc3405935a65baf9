"""TIES: trim, elect, merge, entry by entry (Yadav et al. 2023, arXiv:2306.01708, Algorithm 1).

The weighted form elects on weighted values, and its mean divides by the sum of the agreeing weights.
"""

from fractions import Fraction
from functools import reduce
from operator import iadd

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.streaming import TensorChunks
from superpose.methods.ties import TiesOptions, TiesSurvey, ties

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
TIES = ["zero", "positive", "majority"]
AGGREGATES = ["mean", "sum", "max"]


def trimmed(task_vectors, density):
    """Return each row with its floor(density * n) largest entries, at least one, ties to the lowest index."""
    kept = np.zeros_like(task_vectors)
    count = int(Fraction(str(density)) * task_vectors.shape[1])
    count = max(1, count) if density > 0 else 0
    for row, out in zip(task_vectors, kept, strict=True):
        order = sorted(range(len(row)), key=lambda place: (-abs(row[place]), place))
        for place in order[:count]:
            out[place] = row[place]
    return kept


def elected(kept, weights, tie):
    signs = [int(np.sign(sum(w * value for w, value in zip(weights, column, strict=True)))) for column in kept.T]
    at_ties = {"zero": 0, "positive": 1, "majority": int(np.sign(sum(signs)))}[tie]
    return [sign or at_ties for sign in signs]


def merged_by_entry(kept, signs, weights, aggregate):
    merged = np.zeros(kept.shape[1])
    for place, sign in enumerate(signs):
        agreeing = [(w * value, w) for w, value in zip(weights, kept[:, place], strict=True) if w * value * sign > 0]
        if not agreeing:
            continue
        values = [value for value, _ in agreeing]
        merged[place] = {
            "mean": sum(values) / sum(w for _, w in agreeing),
            "sum": sum(values),
            "max": max(values, key=abs),
        }[aggregate]
    return merged


def ties_by_entry(task_vectors, density, scaling_factor, tie, aggregate, weights):
    kept = trimmed(task_vectors, density)
    signs = elected(kept, weights, tie)
    return scaling_factor * merged_by_entry(kept, signs, weights, aggregate)


def merge(task_vectors, weights=None, **options):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return ties(torch.as_tensor(task_vectors), TiesOptions(**options), weights=given)


def random_rows(tasks, entries):
    return torch.randn(tasks, entries, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("weights", [None, [0.3, 1.7, 1.0, 0.1]])
@pytest.mark.parametrize("density", [0.0, 0.07, 0.5, 1.0])
def test_equals_the_formula(density, weights, tie, aggregate, dtype, tolerance):
    task_vectors = torch.randn(4, 6, 9, dtype=dtype, generator=torch.Generator().manual_seed(7))
    merged = merge(task_vectors, weights, density=density, scaling_factor=0.7, tie=tie, aggregate=aggregate)
    assert merged.shape == (6, 9)
    assert merged.dtype == dtype
    expected = ties_by_entry(
        task_vectors.double().numpy().reshape(4, -1), density, 0.7, tie, aggregate, weights or [1.0] * 4
    )
    np.testing.assert_allclose(merged.double().numpy().ravel(), expected, rtol=tolerance, atol=tolerance)


@st.composite
def cancelling_stacks(draw):
    """Small integers: many entries tie in magnitude, many sums cancel exactly."""
    tasks, entries = draw(st.integers(1, 5)), draw(st.integers(1, 15))
    values = draw(st.lists(st.integers(-2, 2), min_size=tasks * entries, max_size=tasks * entries))
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=tasks, max_size=tasks))
    return np.array(values, float).reshape(tasks, entries), weights


@settings(deadline=None, max_examples=150)
@given(cancelling_stacks(), st.integers(0, 10), st.sampled_from(TIES), st.sampled_from(AGGREGATES))
def test_equals_the_formula_where_magnitudes_tie_and_sums_cancel(stack, tenths, tie, aggregate):
    task_vectors, weights = stack
    merged = merge(task_vectors, weights, density=tenths / 10, tie=tie, aggregate=aggregate)
    expected = ties_by_entry(task_vectors, tenths / 10, 1.0, tie, aggregate, weights)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=0)


def test_defaults_are_those_of_the_paper():
    options = TiesOptions()
    assert (options.density, options.scaling_factor, options.density_scope) == (0.2, 1.0, "model")
    assert (options.tie, options.aggregate) == ("zero", "mean")


def test_worked_example_keeps_exactly_half():
    """The authors' code keeps the threshold entries too, and gets (3, -1.25, 0, 1.5)."""
    task_vectors = in_double([3, -1, 0.5, 2], [-2, -1.5, 0.1, 1])
    assert merge(task_vectors, density=0.5).tolist() == [3, -1.5, 0, 2]


def test_one_task_with_everything_kept_comes_back():
    task_vectors = random_rows(1, 11)
    assert torch.equal(merge(task_vectors, density=1.0), task_vectors[0])


def test_identical_tasks_give_the_trimmed_task():
    task_vector = in_double([4, -3, 2, -1, 0])
    merged = merge(task_vector.expand(3, 5), density=0.4)
    assert merged.tolist() == [4, -3, 0, 0, 0]


@pytest.mark.parametrize(("tie", "expected"), [("zero", [0, 0]), ("positive", [1, 2]), ("majority", [0, 0])])
def test_degenerate_opposite_tasks(tie, expected):
    """No sign has a majority either; the authors' code then keeps the negative entries."""
    assert merge(in_double([1, -2], [-1, 2]), density=1.0, tie=tie).tolist() == expected


@pytest.mark.parametrize("sign", [1, -1])
def test_majority_decides_what_cancels(sign):
    task_vectors = sign * in_double([2, 5, 1, -1], [-2, 1, 1, -1])
    merged = merge(task_vectors, density=1.0, tie="majority")
    assert merged.tolist() == [2 * sign, 3 * sign, sign, -sign]


def test_merged_entries_are_no_larger_than_the_largest_kept():
    task_vectors = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    kept = torch.from_numpy(trimmed(task_vectors.numpy(), 0.3))
    assert (merge(task_vectors, density=0.3).abs() <= kept.abs().amax(dim=0) * (1 + 1e-6)).all()


def test_degenerate_task_of_zeros_contributes_nothing():
    task_vectors = random_rows(3, 50)
    with_zeros = torch.cat([task_vectors[:1], torch.zeros(1, 50, dtype=torch.float64), task_vectors[1:]])
    assert torch.equal(merge(with_zeros), merge(task_vectors))


def test_flipping_one_coordinate_in_every_task_flips_it_in_the_merge():
    task_vectors = torch.randint(-3, 4, (4, 60), generator=torch.Generator().manual_seed(2)).double()
    flips = torch.ones(60, dtype=torch.float64)
    flips[::3] = -1
    assert torch.equal(merge(flips * task_vectors, density=0.6), flips * merge(task_vectors, density=0.6))


def test_weights_take_part_in_the_election_and_in_the_mean():
    task_vectors = in_double([3, 3], [-2, 1])
    assert merge(task_vectors, density=1.0).tolist() == [3, 2]
    assert merge(task_vectors, [1, 3], density=1.0).tolist() == [-2, 1.5]  # (3 + 3 * 1) / (1 + 3)
    assert merge(task_vectors, [1, 3], density=1.0, aggregate="sum").tolist() == [-6, 6]
    assert merge(task_vectors, [1, 4], density=1.0, aggregate="max").tolist() == [-8, 4]


def test_weights_do_not_change_what_is_trimmed():
    task_vectors = in_double([3, 1], [1, 2])
    assert merge(task_vectors, [0.125, 8], density=0.5).tolist() == [3, 2]


def test_common_factor_of_the_weights_does_not_matter_for_the_mean():
    task_vectors = random_rows(3, 40)
    first, second = merge(task_vectors, [1, 2, 0.5]), merge(task_vectors, [4, 8, 2])
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_negative_weight_takes_a_task_the_other_way_round():
    task_vectors = random_rows(3, 40)
    turned = task_vectors * in_double([1], [-1], [1])
    torch.testing.assert_close(merge(task_vectors, [1, -2, 0.5]), merge(turned, [1, 2, 0.5]))


def merge_model(tensors, weights, options):
    """Merge tensors after the survey's passes over all of them, reading three entries at a time."""
    survey, tasks = TiesSurvey(), len(weights)
    chunks = {
        name: TensorChunks(tasks, array.shape[1], 3, lambda a, b, t=array: torch.from_numpy(t[:, a:b]), weights)
        for name, array in tensors.items()
    }
    state = None
    for step in range(survey.passes(options, torch.float64)):
        values = [survey.measure(step, name, chunks[name], state, options) for name in chunks]
        state = survey.finish(step, reduce(iadd, values), state, options, torch.float64)
    given = torch.tensor(weights, dtype=torch.float64)
    return [
        ties(
            torch.from_numpy(array),
            options,
            weights=given,
            survey=survey.for_tensor(name, chunks[name], state, options),
        ).numpy()
        for name, array in tensors.items()
    ]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from(TIES), st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]))
def test_scope_model_equals_the_formula_on_the_flattened_model(seed, tie, density):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.integers(-3, 4, (3, size)).astype(float) for name, size in (("a", 4), ("b", 11))}
    weights = (1.0, 0.5, 2.0)
    merged = merge_model(tensors, weights, TiesOptions(density=density, tie=tie))
    whole = np.concatenate(list(tensors.values()), axis=1)
    expected = ties_by_entry(whole, density, 1.0, tie, "mean", weights)
    np.testing.assert_allclose(np.concatenate(merged), expected, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from(TIES), st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]))
def test_scope_tensor_trims_each_tensor_but_takes_the_majority_over_the_model(seed, tie, density):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.integers(-3, 4, (3, size)).astype(float) for name, size in (("a", 4), ("b", 11))}
    weights = (1.0, 0.5, 2.0)
    merged = merge_model(tensors, weights, TiesOptions(density=density, density_scope="tensor", tie=tie))
    kept = np.concatenate([trimmed(array, density) for array in tensors.values()], axis=1)
    expected = merged_by_entry(kept, elected(kept, weights, tie), weights, "mean")
    np.testing.assert_allclose(np.concatenate(merged), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tie", TIES)
def test_degenerate_model_with_a_tensor_without_entries(tie):
    tensors = {"nil": np.zeros((2, 0)), "some": np.array([[3, -1, 0.5, 2], [-2, -1.5, 0.1, 1]])}
    nil, some = merge_model(tensors, (1.0, 1.0), TiesOptions(density=0.5, tie=tie))
    assert nil.shape == (0,)
    assert some.tolist() == [3, -1.5, 0, 2]
