"""The average: sum_i w_i tuned_i / sum_i w_i, entry by entry (Wortsman et al. 2022, uniform soup)."""

import numpy as np
import pytest
import torch

from superpose.methods.average import AverageOptions, average
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (7,), (4, 5), (2, 3, 2, 2)]


def average_by_entry(tuned, weights):
    merged = np.empty(tuned.shape[1:])
    for place in np.ndindex(merged.shape):
        entries = [float(model[place]) for model in tuned]
        merged[place] = sum(w * entry for w, entry in zip(weights, entries, strict=True)) / sum(weights)
    return merged


def models(shape, dtype=torch.float64, tasks=3):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0], [0.2, 0.5, 0.3], [3.0, 0.0, 10.0], [2.0, -1.0, 0.5]])
def test_equals_the_formula(weights, shape, dtype, tolerance):
    tuned = models(shape, dtype)
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    merged = average(tuned, AverageOptions(), weights=given)
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert_close(merged, average_by_entry(tuned.double().numpy(), weights or [1.0] * 3), tolerance)


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("weighted", [False, True])
def test_identical_models_come_back_bit_for_bit(tasks, weighted):
    model = models((50,), torch.float32, tasks=1)[0]
    weights = torch.linspace(0.1, 3, tasks, dtype=torch.float64) if weighted else None
    assert torch.equal(average(model.expand(tasks, 50), AverageOptions(), weights=weights), model)


def test_worked_example_weights_are_divided_by_their_sum():
    tuned = torch.tensor([[1.0, 8.0], [5.0, 0.0]])
    for factor in (1.0, 0.25, 8.0):
        weights = factor * torch.tensor([1.0, 3.0], dtype=torch.float64)
        assert average(tuned, AverageOptions(), weights=weights).tolist() == [4.0, 2.0]


def test_order_of_the_models_does_not_matter():
    tuned = models((6, 5))
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    merged = average(tuned, AverageOptions(), weights=weights)
    assert_close(average(tuned.flip(0), AverageOptions(), weights=weights.flip(0)), merged.numpy(), 1e-14)


def test_equals_task_arithmetic_scaled_by_the_number_of_tasks():
    base, task_vectors = models((8, 9), tasks=1)[0], models((8, 9, 1), tasks=4)[..., 0]
    summed = task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=1 / 4))
    assert_close(average(base + task_vectors, AverageOptions()), (base + summed).numpy(), 1e-14)


def test_breaks_zero_as_the_base_shrinks_the_update():
    """The law "zero" does not hold: one of T models more takes T / (T + 1) of the update."""
    base, task_vectors = models((5,), tasks=1)[0], models((5, 1), tasks=3)[..., 0]
    tuned = torch.cat([base + task_vectors, base[None]])
    assert_close(average(tuned, AverageOptions()) - base, 3 / 4 * task_vectors.mean(dim=0).numpy(), 1e-14)


def test_defaults_weigh_all_models_alike():
    tuned = torch.tensor([[1.0, 2], [3, 6]])
    assert torch.equal(average(tuned, AverageOptions()), torch.tensor([2.0, 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_models_of_one_entry_zeros_and_a_model_without_share(dtype):
    options = AverageOptions()
    assert average(torch.zeros(3, 1, dtype=dtype), options).tolist() == [0]
    assert average(torch.full((4, 1), 0.1, dtype=dtype), options).item() == torch.tensor(0.1, dtype=dtype).item()
    # A model of share 0 leaves no trace, however large it is.
    far = torch.tensor([[1e6, 1e6], [1, 3.1]], dtype=dtype)
    assert torch.equal(average(far, options, weights=torch.tensor([0.0, 1.0]).double()), far[1])
