"""Model Stock: t * average + (1 - t) * base, t = T c / (1 + (T - 1) c), entry by entry (Jang et al. 2024, (7)).

c is the mean of the cosines over all pairs, clamped to [0, 1]; 0 for a pair with a task vector of zeros.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.methods.model_stock import ModelStockOptions, model_stock

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(1,), (13,), (6, 9), (4, 3, 2, 2), ()]
GRANULARITIES = ["tensor", "row"]


def mean_cosine_of(vectors):
    cosines = []
    for first, second in combinations(vectors, 2):
        product = sum(float(x) * float(x) for x in first) ** 0.5 * sum(float(x) * float(x) for x in second) ** 0.5
        cosines.append(sum(float(x) * float(y) for x, y in zip(first, second, strict=True)) / product if product else 0)
    return sum(cosines) / len(cosines)


def share_of(cosine, tasks):
    cosine = min(1.0, max(0.0, cosine))
    return tasks * cosine / (1 + (tasks - 1) * cosine)


def model_stock_by_entry(task_vectors, granularity):
    tasks, shape = len(task_vectors), task_vectors.shape[1:]
    by_row = granularity == "row" and len(shape) > 1
    stacks = task_vectors.reshape(tasks, shape[0] if by_row else 1, -1)
    merged = np.zeros(stacks.shape[1:])
    for row in range(stacks.shape[1]):
        share = share_of(mean_cosine_of(stacks[:, row]), tasks)
        for place in range(stacks.shape[2]):
            merged[row, place] = share * sum(stacks[:, row, place]) / tasks
    return merged.reshape(shape)


def merge(task_vectors, **options):
    return model_stock(torch.as_tensor(task_vectors), ModelStockOptions(**options)).tensor


def alike(tasks, *shape, dtype=torch.float64):
    """Return task vectors with a part in common, as several runs of one task have."""
    own = torch.randn(tasks, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    return (own + own[:1].roll(1)).to(dtype)


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_equals_the_formula(tasks, granularity, shape, dtype, tolerance):
    task_vectors = alike(tasks, *shape, dtype=dtype)
    merged = merge(task_vectors, granularity=granularity)
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert_close(merged, model_stock_by_entry(task_vectors.double().numpy(), granularity), tolerance)


@settings(deadline=None, max_examples=120)
@given(
    st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 2**32),
    st.sampled_from(GRANULARITIES),
)
def test_equals_the_formula_where_zeros_and_opposites_are_many(shape, seed, granularity):
    task_vectors = np.random.default_rng(seed).integers(-1, 2, shape).astype(float)
    expected = model_stock_by_entry(task_vectors, granularity)
    np.testing.assert_allclose(merge(task_vectors, granularity=granularity).numpy(), expected, rtol=0, atol=1e-14)


def test_defaults_are_one_angle_per_tensor():
    assert ModelStockOptions().granularity == "tensor"


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_worked_example_identical_models_give_that_model(tasks, granularity):
    task_vector = alike(1, 5, 6)
    merged = merge(task_vector.expand(tasks, 5, 6), granularity=granularity)
    assert_close(merged, task_vector[0].numpy(), 1e-14)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_worked_example_orthogonal_task_vectors_leave_the_base(granularity):
    task_vectors = torch.eye(3, dtype=torch.float64).reshape(3, 1, 3).expand(3, 4, 3)
    assert not merge(task_vectors, granularity=granularity).any()


@pytest.mark.parametrize(("tasks", "share"), [(2, 2 / 3), (3, 3 / 4)])
def test_worked_example_cosine_of_one_half(tasks, share):
    task_vectors = in_double([1, 1, 0], [1, 0, 1], [0, 1, 1])[:tasks]
    found = model_stock(task_vectors, ModelStockOptions())
    assert found.stats["cosine"] == pytest.approx(0.5, abs=1e-15)
    assert found.stats["share"] == pytest.approx(share, abs=1e-15)
    assert_close(found.tensor, share * task_vectors.mean(dim=0).numpy(), 1e-14)
    assert found.cautions == ()


def test_each_row_has_its_own_angle():
    task_vectors = in_double([[1, 0], [1, 0]], [[1, 0], [0, 1]])
    found = model_stock(task_vectors, ModelStockOptions(granularity="row"))
    assert found.tensor.tolist() == [[1, 0], [0, 0]]
    assert found.stats == {"cosine": 0.5, "share": 0.5}
    assert_close(merge(task_vectors), 2 / 3 * np.array([[1, 0], [0.5, 0.5]]), 1e-14)


def test_kernels_have_one_angle_per_output_channel():
    task_vectors = alike(3, 4, 3, 2, 2)
    merged = merge(task_vectors, granularity="row").reshape(4, 12)
    assert_close(merged, merge(task_vectors.reshape(3, 4, 12), granularity="row").numpy(), 1e-14)


def test_tensor_with_one_axis_has_one_angle():
    task_vectors = alike(3, 9)
    assert torch.equal(merge(task_vectors, granularity="row"), merge(task_vectors))


def test_lengths_do_not_matter_to_the_angle():
    task_vectors = in_double([1, 1, 0], [100, 0, 100])
    assert_close(merge(task_vectors), 2 / 3 * np.array([101, 1, 100]) / 2, 1e-14)


@pytest.mark.parametrize("factor", [1e-3, 3.0, 1e3])
def test_common_factor_and_order_of_the_tasks_come_out(factor):
    task_vectors = alike(4, 6, 5)
    assert_close(merge(factor * task_vectors.flip(0)), factor * merge(task_vectors).numpy(), 1e-13)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_breaks_zero_a_model_that_is_the_base_pulls_towards_it(tasks):
    """Its cosine with all others is 0: of identical models (T - 1) / (T + 1) of the pairs agree, the rest does not."""
    task_vector = alike(1, 6, 5)
    with_base = torch.cat([task_vector.expand(tasks, 6, 5), torch.zeros(1, 6, 5, dtype=torch.float64)])
    share = share_of((tasks - 1) / (tasks + 1), tasks + 1)
    assert_close(merge(with_base), share * tasks / (tasks + 1) * task_vector[0].numpy(), 1e-14)


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opposed_models_leave_the_base_and_are_told(tasks, granularity):
    """Unclamped, the mean would be turned round, and at c = -1 / (T - 1) divided by zero."""
    angles = 2 * np.pi * np.arange(tasks) / tasks
    task_vectors = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1))[:, None].repeat(1, 2, 1)
    found = model_stock(task_vectors + 0.01, ModelStockOptions(granularity=granularity))
    assert not found.tensor.any()
    (caution,) = found.cautions
    where = "2 of 2 rows" if granularity == "row" else "mean cosine"
    assert "point away from each other" in caution.text
    assert where in caution.text


def test_one_model_has_no_angle():
    with pytest.raises(ValueError, match="two or more"):
        merge(alike(1, 5))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (3, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base(shape, granularity):
    merged = merge(torch.zeros(3, *shape), granularity=granularity)
    assert merged.shape == shape
    assert not merged.any()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-4])
def test_degenerate_tiny_updates_agree_as_large_ones_do(size, dtype, tolerance):
    """With norms clamped at 1e-6, as mergekit does, tiny updates would look orthogonal."""
    task_vector = (size * alike(1, 6, 5)).to(dtype)
    assert_close(merge(task_vector.expand(3, 6, 5)), task_vector[0].double().numpy(), tolerance)


def test_degenerate_single_entries_agree_or_oppose():
    assert_close(merge(in_double([2.0], [4.0])), np.array([3.0]), 1e-14)
    assert merge(in_double([2.0], [-4.0])).tolist() == [0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_degenerate_updates_rounded_in_bfloat16_equal_the_formula(granularity):
    base = alike(1, 8, 9, dtype=torch.float32).bfloat16()
    tuned = base + (2e-3 * alike(3, 8, 9, dtype=torch.float32)).bfloat16()
    task_vectors = tuned.double() - base.double()
    expected = model_stock_by_entry(task_vectors.numpy(), granularity)
    assert_close(merge(task_vectors, granularity=granularity), expected, 1e-12)
