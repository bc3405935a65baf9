"""Electing signs and merging what agrees with them, against loops over the entries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.signs import disjoint_merge, elect_signs

quick = settings(deadline=None, max_examples=80)
WEIGHTS = [0.0, 0.5, 1.0, 2.0, 4.0]


def elected_by_loop(task_vectors, tie_sign):
    return np.array([np.sign(column.sum()) or tie_sign for column in task_vectors.T])


def merged_by_loop(task_vectors, signs, aggregate, weights):
    merged = np.zeros(task_vectors.shape[1])
    for entry, sign in enumerate(signs):
        agreeing = [
            (weight * value, weight)
            for value, weight in zip(task_vectors[:, entry], weights, strict=True)
            if weight * value * sign > 0
        ]
        values = [value for value, _ in agreeing]
        if agreeing and aggregate == "mean":
            merged[entry] = sum(values) / sum(weight for _, weight in agreeing)
        elif agreeing and aggregate == "sum":
            merged[entry] = sum(values)
        elif agreeing:
            merged[entry] = max(values, key=abs)
    return merged


@st.composite
def stacks(draw):
    """Small integers, whose sums are exact and often cancel."""
    tasks, entries = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    values = draw(st.lists(st.integers(-3, 3), min_size=tasks * entries, max_size=tasks * entries))
    return np.array(values, float).reshape(tasks, entries)


@quick
@given(stacks(), st.sampled_from([0.0, 1.0, -1.0]))
def test_election_equals_the_loop(task_vectors, tie_sign):
    signs = elect_signs(torch.from_numpy(task_vectors), tie_sign)
    assert np.array_equal(signs.numpy(), elected_by_loop(task_vectors, tie_sign))


@quick
@given(stacks(), st.sampled_from(["mean", "sum", "max"]), st.sampled_from([0.0, 1.0]), st.data())
def test_merge_equals_the_loop(task_vectors, aggregate, tie_sign, data):
    tasks = len(task_vectors)
    weights = data.draw(st.none() | st.lists(st.sampled_from(WEIGHTS), min_size=tasks, max_size=tasks))
    signs = elected_by_loop(task_vectors, tie_sign)
    merged = disjoint_merge(
        torch.from_numpy(task_vectors),
        torch.from_numpy(signs),
        aggregate=aggregate,
        weights=None if weights is None else torch.tensor(weights, dtype=torch.float64),
    )
    expected = merged_by_loop(task_vectors, signs, aggregate, weights or [1.0] * tasks)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
def test_merge_of_generic_values_equals_the_loop(aggregate, dtype, tolerance):
    task_vectors = torch.randn(6, 40, dtype=dtype, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.3, 2.0, 1.0, 0.1, 0.7], dtype=torch.float64)
    signs = elect_signs(task_vectors)
    merged = disjoint_merge(task_vectors, signs, aggregate=aggregate, weights=weights)
    expected = merged_by_loop(task_vectors.double().numpy(), signs.numpy(), aggregate, weights.tolist())
    assert merged.dtype == dtype
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=tolerance, atol=0)


def test_entry_without_a_sign_or_without_agreement_is_zero():
    task_vectors = torch.tensor([[3.0, -1.0, 0.0], [-3.0, -2.0, 0.0]])
    merged = disjoint_merge(task_vectors, torch.tensor([0.0, 1.0, 1.0]))
    assert merged.tolist() == [0, 0, 0]


def test_zeros_do_not_count_in_the_mean():
    task_vectors = torch.tensor([[6.0], [0.0], [2.0], [-1.0]])
    assert disjoint_merge(task_vectors, torch.tensor([1.0])).tolist() == [4.0]


def test_denormal_values_agree_with_their_sign():
    tiny = torch.tensor([[1e-45], [1e-45]])
    assert torch.equal(disjoint_merge(tiny, elect_signs(tiny)), tiny[0])


def test_inputs_stay_as_they_are_and_shapes_are_kept():
    task_vectors = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    before = task_vectors.clone()
    signs = elect_signs(task_vectors, 1.0)
    elected = signs.clone()
    assert disjoint_merge(task_vectors, signs, weights=torch.ones(3, dtype=torch.float64)).shape == (2, 4, 5)
    assert torch.equal(task_vectors, before)
    assert torch.equal(signs, elected)
