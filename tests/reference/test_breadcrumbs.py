"""Breadcrumbs: the middle band of magnitudes of each task vector, entry by entry (Davari & Belilovsky 2024, section 3).

Per tensor, or per row along the last axis; a tensor with one axis is one row.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.methods.breadcrumbs import BreadcrumbsOptions, _band, breadcrumbs
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]


def middle_band(row, density, remove_top):
    """Return the row without its largest entries, of the rest the largest; ties to the lowest index."""
    order = sorted(range(len(row)), key=lambda place: (-abs(row[place]), place))
    dropped = math.floor(Fraction(str(remove_top)) * len(row))
    count = max(1, math.floor(Fraction(str(density)) * len(row))) if density > 0 else 0
    kept = np.zeros(len(row))
    for place in order[dropped : dropped + count]:
        kept[place] = row[place]
    return kept


def breadcrumbs_by_entry(task_vectors, density, remove_top, scaling_factor, scope, weights):
    merged = np.zeros(task_vectors.shape[1:])
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        per_row = scope == "row" and task_vector.ndim > 0
        rows = task_vector.reshape(-1, task_vector.shape[-1] if per_row else task_vector.size)
        band = np.array([middle_band(row, density, remove_top) for row in rows]).reshape(task_vector.shape)
        merged += scaling_factor * weight * band
    return merged


def merge(task_vectors, weights=None, **options):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return breadcrumbs(task_vectors, BreadcrumbsOptions(**options), weights=given).tensor


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("weights", [None, [0.3, -1.7, 1.0]])
@pytest.mark.parametrize(("density", "remove_top"), [(0.2, 0.1), (0.0, 0.1), (1.0, 0.0), (0.5, 0.9), (0.03, 0.29)])
def test_equals_the_formula(density, remove_top, weights, scope, shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    merged = merge(task_vectors, weights, density=density, remove_top=remove_top, scaling_factor=0.7, scope=scope)
    assert merged.shape == shape
    assert merged.dtype == dtype
    given = task_vectors.double().numpy()
    expected = breadcrumbs_by_entry(given, density, remove_top, 0.7, scope, weights or [1.0] * 3)
    assert_close(merged, expected, tolerance)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(0, 10), st.integers(0, 9), st.sampled_from(["tensor", "row"]))
def test_equals_the_formula_where_magnitudes_tie(data, tenths, top_tenths, scope):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=math.prod(shape), max_size=math.prod(shape)))
    task_vectors = torch.tensor(values, dtype=torch.float64).reshape(shape)
    options = {"density": tenths / 10, "remove_top": top_tenths / 10, "scaling_factor": 0.5, "scope": scope}
    expected = breadcrumbs_by_entry(task_vectors.numpy(), weights=[1.0] * shape[0], **options)
    assert np.array_equal(merge(task_vectors, **options).numpy(), expected)


@pytest.mark.parametrize("numel", [100, 10**8, 10**10])
def test_counts_of_large_tensors_are_exact(numel):
    """In binary 0.29 * 10^8 is 28999999.999999996."""
    for percent in range(1, 91):
        options = BreadcrumbsOptions(density=0.05, remove_top=percent / 100)
        assert _band(numel, options) == (percent * numel // 100, percent * numel // 100 + 5 * numel // 100)


def test_defaults_are_those_of_the_authors():
    options = BreadcrumbsOptions()
    assert (options.density, options.remove_top, options.scaling_factor) == (0.2, 0.1, 0.4)
    assert options.scope == "tensor"


def test_worked_example_drops_the_first_and_keeps_the_next_two():
    task_vectors = in_double([5, 4, 3, 2, 1])
    assert merge(task_vectors, density=0.4, remove_top=0.2, scaling_factor=1.0).tolist() == [0, 4, 3, 0, 0]


def test_worked_example_by_row_and_by_tensor():
    matrix = in_double([5, 4, 3, 2, 1], [10, -20, 30, -40, 50])[None]
    options = {"density": 0.4, "remove_top": 0.2, "scaling_factor": 1.0}
    assert merge(matrix, scope="row", **options).tolist() == [[0, 4, 3, 0, 0], [0, 0, 30, -40, 0]]
    assert merge(matrix, **options).tolist() == [[5, 0, 0, 0, 0], [10, -20, 30, 0, 0]]


def test_with_everything_kept_and_nothing_dropped_it_is_task_arithmetic():
    task_vectors = random_stack(4, 5, 6)
    merged = merge(task_vectors, density=1.0, remove_top=0.0, scaling_factor=0.3)
    expected = task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=0.3))
    assert_close(merged, expected.numpy(), 1e-14)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_breaks_same_identical_tasks_add_up(tasks):
    task_vector = random_stack(1, 40)
    one = merge(task_vector, scaling_factor=1.0)
    assert_close(merge(task_vector.expand(tasks, 40), scaling_factor=1.0), tasks * one.numpy(), 1e-14)
    assert_close(merge(task_vector.expand(tasks, 40), scaling_factor=1 / tasks), one.numpy(), 1e-14)


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("remove_top", [0.0, 0.01])
@pytest.mark.parametrize("numel", [1, 2, 7, 64, 99])
def test_degenerate_dropping_no_entry_leaves_the_band_full(numel, remove_top, scope):
    """In mergekit the band [n:-0] is empty, and the tensor's whole update vanishes."""
    options = {"density": 0.5, "remove_top": remove_top, "scaling_factor": 1.0, "scope": scope}
    assert int(merge(random_stack(1, numel), **options).count_nonzero()) == max(1, numel // 2)


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("remove_top", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (9, 1), (3, 5), (10,)])
def test_degenerate_small_tensors_keep_one_entry_at_least(shape, remove_top, scope):
    options = {"density": 0.001, "remove_top": remove_top, "scaling_factor": 1.0, "scope": scope}
    rows = math.prod(shape[:-1]) if scope == "row" else 1
    assert int(merge(random_stack(1, *shape), **options).count_nonzero()) == rows


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_degenerate_constant_rows_are_cut_by_place(scope):
    options = {"density": 0.4, "remove_top": 0.2, "scaling_factor": 1.0, "scope": scope}
    assert merge(torch.full((2, 5), -1.5), **options).tolist() == [0, -3, -3, 0, 0]


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_degenerate_zeros_change_nothing(scope):
    task_vectors = random_stack(2, 6, 5)
    with_zeros = torch.cat([task_vectors, torch.zeros(1, 6, 5, dtype=torch.float64)])
    assert torch.equal(merge(with_zeros, scope=scope), merge(task_vectors, scope=scope))
    assert not merge(torch.zeros(3, 6, 5), scope=scope).any()


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_degenerate_updates_rounded_in_bfloat16_equal_the_formula(scope):
    base = random_stack(1, 8, 9, dtype=torch.float32).bfloat16()
    tuned = base + (2e-3 * random_stack(3, 8, 9, dtype=torch.float32)).bfloat16()
    task_vectors = tuned.double() - base.double()
    assert int((task_vectors == 0).sum()) > 20
    expected = breadcrumbs_by_entry(task_vectors.numpy(), 0.2, 0.1, 0.4, scope, [1.0] * 3)
    assert_close(merge(task_vectors, scope=scope), expected, 1e-12)


def test_degenerate_update_that_is_dropped_as_a_whole_is_warned_of():
    sparse = torch.zeros(1, 100)
    sparse[0, :10] = torch.arange(1.0, 11)
    merged = breadcrumbs(sparse, BreadcrumbsOptions(remove_top=0.1))
    assert not merged.tensor.any()
    (caution,) = merged.cautions
    assert caution.tasks == (0,)
    assert "remove_top" in caution.text
    assert not breadcrumbs(sparse, BreadcrumbsOptions(remove_top=0.05)).cautions


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_degenerate_tensor_without_entries_in_a_row(scope):
    assert breadcrumbs(torch.zeros(2, 3, 0), BreadcrumbsOptions(scope=scope)).tensor.shape == (3, 0)
