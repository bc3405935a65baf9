"""PEM composition: sum_i c_i tau_i with c_i = weight_i / (sum of the positive weights) (Zhang et al. 2023, section 3).

Where no weight is positive, the sum of their magnitudes divides.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.methods.pem import PemOptions, pem

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]


def pem_by_entry(task_vectors, scaling_factor, weights):
    total = sum(weight for weight in weights if weight > 0) or sum(abs(weight) for weight in weights) or 1.0
    merged = np.zeros(task_vectors.shape[1:])
    for place in np.ndindex(merged.shape):
        for task_vector, weight in zip(task_vectors, weights, strict=True):
            merged[place] += scaling_factor * weight / total * float(task_vector[place])
    return merged


def merge(task_vectors, weights=None, scaling_factor=1.0):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return pem(torch.as_tensor(task_vectors), PemOptions(scaling_factor=scaling_factor), weights=given)


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "weights", [None, [1, 1, 1], [0.2, 0.5, 0.3], [3, 0, 10], [2, 1, -1], [-1, -1, -2], [-3, 0, 0], [0.5, -2, 0.7]]
)
@pytest.mark.parametrize("scaling_factor", [1.0, 0.3, -0.7, 0.0])
def test_equals_the_formula(scaling_factor, weights, shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    merged = merge(task_vectors, weights, scaling_factor)
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert_close(merged, pem_by_entry(task_vectors.double().numpy(), scaling_factor, weights or [1] * 3), tolerance)


@settings(deadline=None, max_examples=120)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32))
def test_equals_the_formula_where_sums_cancel(tasks, entries, seed):
    rng = np.random.default_rng(seed)
    task_vectors = rng.integers(-2, 3, (tasks, entries)).astype(float)
    weights = rng.choice([-2.0, -1.0, 0.0, 0.5, 1.0], tasks).tolist()
    expected = pem_by_entry(task_vectors, 1.0, weights)
    np.testing.assert_allclose(merge(task_vectors, weights).numpy(), expected, rtol=0, atol=1e-14)


def test_default_is_the_composition_unscaled():
    assert PemOptions().scaling_factor == 1.0


def test_worked_example_addition_is_a_convex_combination():
    task_vectors = in_double([1, 8], [5, 0])
    assert merge(task_vectors).tolist() == [3, 4]
    for factor in (1.0, 0.25, 8.0):
        assert merge(task_vectors, [factor, 3 * factor]).tolist() == [4, 2]


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.25, 0.0], [7.0, 0.0]])
def test_worked_example_all_of_the_share_gives_the_first_task(weights):
    task_vectors = random_stack(2, 5, 6, dtype=torch.float32)
    assert torch.equal(merge(task_vectors, weights), task_vectors[0])


def test_worked_example_all_of_the_share_gives_the_second_task():
    task_vectors = random_stack(2, 5, 6)
    assert_close(merge(task_vectors, [0.0, 1.0]), task_vectors[1].numpy(), 1e-14)


@pytest.mark.parametrize("factor", [1e3, 1e6, 1e9])
def test_worked_example_task_of_share_zero_leaves_no_trace_however_large(factor):
    task_vectors = random_stack(2, 5, 6, dtype=torch.float32)
    task_vectors[0] *= factor
    assert_close(merge(task_vectors, [0.0, 1.0]), task_vectors[1].double().numpy(), 1e-6)


def test_worked_example_negation_is_the_task_turned_round_and_twice_the_task():
    task_vectors = random_stack(1, 5, 6)
    negated = merge(task_vectors, [-1.0])
    assert torch.equal(negated, -task_vectors[0])
    assert torch.equal(merge(negated[None], [-1.0]), task_vectors[0])
    assert torch.equal(merge(task_vectors, [-1.0], 0.5), -0.5 * task_vectors[0])
    assert torch.equal(merge(task_vectors, scaling_factor=-1.0), -task_vectors[0])


def test_worked_example_transfer_is_two_shares_and_one_taken_away():
    task_vectors = in_double([8, 0], [0, 8], [4, 4])
    assert merge(task_vectors, [0.75, 0.25, -0.25]).tolist() == [5, 1]
    assert merge(task_vectors, [3.0, 1.0, -1.0]).tolist() == [5, 1]


@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
def test_identical_tasks_come_back_bit_for_bit(tasks):
    task_vector = random_stack(1, 40, dtype=torch.float32)
    assert torch.equal(merge(task_vector.expand(tasks, 40)), task_vector[0])


def test_weights_go_with_their_tasks():
    task_vectors, order = random_stack(3, 40), [2, 0, 1]
    merged = merge(task_vectors[order], [3.0, 1.0, -2.0])
    assert_close(merged, merge(task_vectors, [1.0, -2.0, 3.0]).numpy(), 1e-14)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_breaks_zero_the_base_takes_a_share(tasks):
    task_vectors = random_stack(tasks, 40)
    with_base = torch.cat([task_vectors, torch.zeros(1, 40, dtype=torch.float64)])
    assert_close(merge(with_base), tasks / (tasks + 1) * merge(task_vectors).numpy(), 1e-14)
    assert_close(merge(with_base, [1.0] * tasks + [0.0]), merge(task_vectors).numpy(), 1e-14)


@pytest.mark.parametrize("weights", [None, [0.0, 0.0, 0.0], [-1.0, 0.0, 2.0]])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base(shape, weights):
    merged = merge(torch.zeros(3, *shape), weights)
    assert merged.shape == shape
    assert not merged.any()


def test_degenerate_weights_of_zero_leave_the_base():
    assert not merge(random_stack(3, 7), [0.0, 0.0, 0.0]).any()


def test_degenerate_single_entry_and_opposite_tasks():
    assert merge(in_double([2], [-2])).tolist() == [0]
    assert merge(in_double([2], [-2]), [1.0, -1.0]).tolist() == [4]
