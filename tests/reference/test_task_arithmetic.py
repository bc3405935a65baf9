"""Task arithmetic: scaling_factor * sum_i weight_i tau_i, entry by entry (Ilharco et al. 2023, section 2)."""

import numpy as np
import pytest
import torch

from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (7,), (4, 5), (2, 3, 2, 2)]


def sum_by_entry(task_vectors, scaling_factor, weights):
    merged = np.zeros(task_vectors.shape[1:])
    for place in np.ndindex(merged.shape):
        for weight, task_vector in zip(weights, task_vectors, strict=True):
            merged[place] += scaling_factor * weight * float(task_vector[place])
    return merged


def task_vectors_of(shape, dtype=torch.float64, tasks=3):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def merge(task_vectors, scaling_factor=1.0, weights=None):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=scaling_factor), weights=given)


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [3.0, 0.0, -1.0]])
@pytest.mark.parametrize("scaling_factor", [0.3, 1.0, -0.7])
def test_equals_the_formula(scaling_factor, weights, shape, dtype, tolerance):
    task_vectors = task_vectors_of(shape, dtype)
    merged = merge(task_vectors, scaling_factor, weights)
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert_close(merged, sum_by_entry(task_vectors.double().numpy(), scaling_factor, weights or [1.0] * 3), tolerance)


def test_defaults_are_those_for_eight_tasks():
    assert TaskArithmeticOptions().scaling_factor == 0.3


def test_one_task_at_scaling_factor_one_comes_back_bit_for_bit():
    task_vectors = task_vectors_of((9,), torch.float32, tasks=1)
    assert torch.equal(merge(task_vectors), task_vectors[0])


def test_scaling_factor_zero_leaves_the_base():
    assert torch.equal(merge(task_vectors_of((9,)), 0.0).abs(), torch.zeros(9, dtype=torch.float64))


def test_forgetting_is_a_negative_factor_or_weight():
    task_vectors = task_vectors_of((9,), tasks=1)
    assert torch.equal(merge(task_vectors, -0.5), -0.5 * task_vectors[0])
    assert torch.equal(merge(task_vectors, 0.5, [-1.0]), -0.5 * task_vectors[0])


def test_worked_example_analogy_is_a_sum_with_weights_of_both_signs():
    a, b, c = task_vectors_of((9,))
    assert_close(merge(torch.stack([a, b, c]), 0.5, [-1.0, 1.0, 1.0]), (0.5 * (c + b - a)).numpy(), 1e-14)


def test_is_linear_in_every_task_vector():
    first, second = task_vectors_of((9,)), task_vectors_of((9, 1))[..., 0]
    assert_close(merge(first + 2 * second, 0.3), (merge(first, 0.3) + 2 * merge(second, 0.3)).numpy(), 1e-14)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_breaks_same_as_identical_tasks_are_added_up(tasks):
    """The law "same" does not hold: T identical tasks give T times the task."""
    task_vector = task_vectors_of((9,), tasks=1)[0]
    assert_close(merge(task_vector.expand(tasks, 9)), tasks * task_vector.numpy(), 1e-14)


def test_degenerate_tasks_of_zeros_leave_the_base_and_add_nothing():
    task_vector = torch.tensor([1.0, 0, -2], dtype=torch.float64)
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    options = TaskArithmeticOptions(scaling_factor=1)
    assert torch.equal(task_arithmetic(zeros, options), zeros[0])
    assert torch.equal(task_arithmetic(torch.cat([zeros, task_vector[None]]), options), task_vector)
