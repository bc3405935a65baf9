"""Keeping the entries of largest magnitude: exactly as many as asked for, ties to the lowest index."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.sparsify import apply_cuts, count_kept, find_cuts, keep_largest

quick = settings(deadline=None, max_examples=80)
TINIEST = {np.float32: 1.401298464324817e-45, np.float64: 5e-324}


def kept_by_sorting(vector, count):
    """Return the vector with all but `count` entries set to zero, by a stable sort of its magnitudes."""
    order = np.argsort(-np.abs(vector), kind="stable")
    kept = np.zeros_like(vector)
    kept[order[:count]] = vector[order[:count]]
    return kept


@st.composite
def vectors(draw):
    """Few distinct magnitudes, so that most entries tie; zeros of both signs and denormals among them."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    values = [0.0, -0.0, 1.0, -1.0, 1.0 + np.finfo(dtype).eps, TINIEST[dtype], -2 * TINIEST[dtype], 3e30]
    return np.array(draw(st.lists(st.sampled_from(values), min_size=1, max_size=60)), dtype)


@pytest.mark.parametrize("percent", range(1, 101))
def test_count_is_the_exact_floor_but_at_least_one(percent):
    for numel in [*range(1, 301), 768 * 3072, 10**9 + 7]:
        assert count_kept(percent / 100, numel) == max(1, percent * numel // 100)


def test_nothing_is_kept_of_nothing_or_at_density_zero():
    assert count_kept(0.0, 1000) == 0
    assert count_kept(0.5, 0) == 0


@quick
@given(vectors(), st.integers(0, 20))
def test_equals_a_stable_sort(vector, twentieths):
    numel = len(vector)
    count = max(1, twentieths * numel // 20) if twentieths else 0
    kept = keep_largest(torch.from_numpy(vector)[None], twentieths / 20)[0].numpy()
    assert kept.dtype == vector.dtype
    assert np.array_equal(kept, kept_by_sorting(vector, count))


@pytest.mark.parametrize("numel", [1, 2, 7, 64, 99, 100])
def test_every_count_can_be_asked_for(numel):
    vector = torch.randn(1, numel, generator=torch.Generator().manual_seed(numel))
    for count in range(numel + 1):
        kept = keep_largest(vector, count / numel)
        assert int(kept.count_nonzero()) == count


def test_equal_magnitudes_are_kept_from_the_front():
    vector = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    assert keep_largest(vector, 0.6).tolist() == [[1, -1, 1, 0, 0]]
    assert keep_largest(vector, 0.01).tolist() == [[1, 0, 0, 0, 0]]


def test_each_task_is_cut_by_itself():
    task_vectors = torch.tensor([[1.0, 2.0, 3.0, 4.0], [400.0, 300.0, 200.0, 100.0]])
    assert keep_largest(task_vectors, 0.5).tolist() == [[0, 0, 3, 4], [400, 300, 0, 0]]


def test_density_one_returns_the_values_and_zero_returns_zeros():
    task_vectors = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_largest(task_vectors, 1.0), task_vectors)
    assert torch.equal(keep_largest(task_vectors, 0.0), torch.zeros(3, 4, 5))


def test_order_is_that_of_the_rows_even_of_a_transposed_view():
    matrix = torch.tensor([[1.0, 2.0], [2.0, 3.0], [2.0, 0.0]])
    transposed = matrix.T[None]  # flat order 1 2 2 2 3 0
    assert keep_largest(transposed, 0.5).tolist() == [[[0, 2, 2], [0, 3, 0]]]


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 0), (2, 3, 4, 5)])
def test_any_shape_is_kept(shape):
    task_vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = task_vectors.clone()
    assert keep_largest(task_vectors, 0.3).shape == shape
    assert torch.equal(task_vectors, before)


@quick
@given(st.lists(vectors(), min_size=1, max_size=3), st.integers(0, 10), st.integers(1, 13))
def test_cutting_pieces_equals_cutting_the_whole(rows, tenths, size):
    numel = min(map(len, rows))
    task_vectors = torch.stack([torch.from_numpy(row[:numel]).double() for row in rows])
    cuts = find_cuts(task_vectors, tenths / 10)
    pieces = [
        apply_cuts(task_vectors[:, start : start + size], cuts.within(start, min(start + size, numel)))
        for start in range(0, numel, size)
    ]
    assert torch.equal(torch.cat(pieces, dim=1), keep_largest(task_vectors, tenths / 10))


def test_counts_of_large_tensors_are_exact():
    for hundredths in range(1, 101):
        assert count_kept(hundredths / 100, 10**8) == hundredths * 10**6
        assert count_kept(hundredths / 100, 10**12) == hundredths * 10**10
