"""AdaMerging's composition: base + sum_i l_i^t tau_i^t, ++ on what TIES keeps (Yang et al. 2023, arXiv:2310.02575).

How coefficients are learned is tested in tests/learning.
"""

import numpy as np
import pytest
import torch

from superpose import merge_tensors
from superpose.methods.adamerging import AdamergingOptions, adamerging
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def merge(task_vectors, coefficients, **options):
    given = None if coefficients is None else torch.tensor(coefficients, dtype=torch.float64)
    return adamerging(task_vectors, AdamergingOptions(**options), learned=given)


def ties_parts(rows, density):
    """Return each row's largest entries that have the sign of the sum of all largest."""
    count = max(1, int(density * rows.shape[1] + 1e-9))
    kept = np.zeros_like(rows)
    for row, out in zip(rows, kept, strict=True):
        places = sorted(range(len(row)), key=lambda place: (-abs(row[place]), place))[:count]
        out[places] = row[places]
    elected = np.sign(kept.sum(axis=0))
    return np.where(np.sign(kept) == elected, kept, 0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", [[0.2, 0.5, 0.9], [0.0, 1.0, 0.3], [-0.5, 1.5, 0.3]])
@pytest.mark.parametrize("clamp", [True, False])
def test_equals_the_formula(clamp, coefficients, shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    merged = merge(task_vectors, coefficients, clamp=clamp)
    used = [min(max(value, 0), 1) for value in coefficients] if clamp else coefficients
    expected = sum(w * t.double().numpy() for w, t in zip(used, task_vectors, strict=True))
    assert (merged.shape, merged.dtype) == (shape, dtype)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=0, atol=5 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula_plus_plus(shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    merged = merge(task_vectors, [0.2, 0.5, 0.9], plus_plus=True, ties_density=0.4)
    parts = ties_parts(task_vectors.double().numpy().reshape(3, -1), 0.4)
    expected = np.tensordot([0.2, 0.5, 0.9], parts, axes=1)
    np.testing.assert_allclose(merged.double().numpy().ravel(), expected, rtol=0, atol=5 * tolerance)


def test_worked_example():
    # Of (4, 1, -3) and (-5, 2, -1) two each are kept: 4, -3 and -5, 2. Signs elected: -, +, -.
    task_vectors = torch.tensor([[4.0, 1.0, -3.0], [-5.0, 2.0, -1.0]])
    merged = merge(task_vectors, [0.5, 0.1], plus_plus=True, ties_density=0.67)
    assert torch.allclose(merged, torch.tensor([-0.5, 0.2, -1.5]))
    assert torch.allclose(merge(task_vectors, [0.5, 0.1]), torch.tensor([1.5, 0.7, -1.6]))


def test_worked_example_of_coefficients_by_tensor_and_for_all():
    base = {"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2, 2)}
    tuned = [{name: torch.full((2, 2), value) for name in base} for value in (1.0, 10.0)]
    learned = {"a.weight": torch.tensor([1.0, 0.0]), "*": torch.tensor([0.0, 0.5])}
    merged = merge_tensors(base, tuned, "adamerging", learned={k: v.double() for k, v in learned.items()})
    assert torch.equal(merged["a.weight"], torch.ones(2, 2))
    assert torch.equal(merged["b.weight"], torch.full((2, 2), 5.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_degenerate_nothing_learned_is_task_arithmetic(shape):
    task_vectors = random_stack(3, *shape)
    expected = task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=0.3))
    assert torch.allclose(merge(task_vectors, None), expected)
    assert not merge(torch.zeros(2, 3), [0.3, 0.4], plus_plus=True).any()


def test_plus_plus_counts_over_the_model_or_by_tensor():
    base = {"large.weight": torch.zeros(2, 2), "small.weight": torch.zeros(2, 2)}
    tuned = [{"large.weight": torch.full((2, 2), 9.0), "small.weight": torch.full((2, 2), 1.0)}]
    common = {"plus_plus": True, "ties_density": 0.5, "initial": 1.0, "steps": 0}
    whole = merge_tensors(base, tuned, "adamerging", **common)
    assert whole["large.weight"].all()
    assert not whole["small.weight"].any()
    apart = merge_tensors(base, tuned, "adamerging", density_scope="tensor", **common)
    assert int((apart["small.weight"] != 0).sum()) == 2


def test_breaks_same_coefficients_add_up():
    task_vectors = random_stack(1, 4, 5).expand(3, 4, 5)
    assert torch.allclose(merge(task_vectors, [0.3, 0.4, 0.1]), 0.8 * task_vectors[0])


def test_defaults():
    expected = AdamergingOptions(granularity="layer", plus_plus=False, initial=0.3, steps=500, learning_rate=1e-3)
    assert AdamergingOptions() == expected
    assert expected.clamp
    assert expected.ties_density == 0.2
