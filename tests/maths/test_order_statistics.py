"""Order statistics by digits: exactly the values at the asked places of the sorted whole, whatever the pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths import order_statistics
from superpose.maths.order_statistics import Place

DTYPES = [torch.float32, torch.float64]
FLOATS = {torch.float32: np.float32, torch.float64: np.float64}
RANKS = [0, 1, 7, -2, -1]


def found_at(places, tensors, dtype, size=5):
    """Search all places at once, over several tensors of stacked rows, each read in pieces."""
    for step in range(order_statistics.passes(dtype)):
        total = order_statistics.no_counts(len(places), step, dtype)
        for tensor in tensors:
            counts = order_statistics.no_counts(len(places), step, dtype)
            for start in range(0, tensor.shape[1], size):
                order_statistics.count(tensor[:, start : start + size], step, places, counts)
            total += counts
        places = order_statistics.narrow(places, total, step, dtype)
    return [order_statistics.value_of(place, dtype) for place in places]


def assert_found(rows, dtype, sizes=(), ranks=RANKS):
    """Assert the values at places of each row, split into tensors of these sizes and the rest."""
    entries = rows.shape[1]
    ranks = sorted({rank % entries for rank in ranks if -entries <= rank < entries})
    places = [Place(row, rank) for row in range(len(rows)) for rank in ranks]
    tensors = np.split(rows.astype(FLOATS[dtype]), np.cumsum(sizes).astype(int), axis=1) if sizes else [rows]
    found = found_at(places, [torch.from_numpy(part.astype(FLOATS[dtype])) for part in tensors], dtype)
    expected = np.sort(rows.astype(FLOATS[dtype]), axis=1)[:, ranks].astype(float)
    assert found == expected.ravel().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(), (1,), (0, 30, 0), (12, 12, 12)])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_values_of_several_rows_and_tensors_are_those_of_the_sorted_whole(scale, sizes, dtype):
    assert_found(scale * np.random.default_rng(1).standard_normal((3, 53)), dtype, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_of_one_row_is_found(dtype):
    rows = np.random.default_rng(2).standard_normal((1, 40))
    assert_found(rows, dtype, (17,), range(40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_places_in_the_middle_agree_with_a_partition(dtype):
    row = np.random.default_rng(3).standard_normal(200_000).astype(FLOATS[dtype])
    ranks = [20, 99_999, 100_000, 199_979]
    tensors = [torch.from_numpy(part)[None] for part in np.split(row, [70_000, 70_001])]
    found = found_at([Place(0, rank) for rank in ranks], tensors, dtype, size=60_000)
    assert found == np.partition(row, ranks)[ranks].astype(float).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_values_are_counted_as_often_as_they_come(dtype):
    rows = np.random.default_rng(4).integers(-2, 3, (2, 60)).astype(float)
    assert_found(rows, dtype, (25,), range(60))
    assert_found(np.full((1, 9), -0.1), dtype, (4,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_tiny_and_denormal_values_of_both_signs_are_told_apart(dtype):
    info = np.finfo(FLOATS[dtype])
    magnitudes = [info.max, np.nextafter(info.max, 0, dtype=FLOATS[dtype]), 1.0, info.tiny, info.smallest_subnormal]
    magnitudes += [2 * info.smallest_subnormal, np.nextafter(info.tiny, 0, dtype=FLOATS[dtype]), 1 + info.eps]
    row = np.array([0.0, *magnitudes, *(-value for value in magnitudes)], FLOATS[dtype])[None]
    assert_found(np.random.default_rng(5).permuted(row, axis=1), dtype, (6,), range(row.size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_values_are_at_the_ends(dtype):
    assert_found(np.array([[1.0, np.inf, -2.0, -np.inf, 0.0]]), dtype, (2,), range(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_equals_zero_and_keeps_its_place_beside_it(dtype):
    """Patterns tell them apart, values do not: between a negative and a positive value both are zero."""
    assert_found(np.array([[0.0, -0.0, 1.0, -0.0, -1.0, 0.0]]), dtype, (2,), range(6))
    assert_found(np.array([[-0.0, -0.0]]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_values_differ_in_the_last_digit_alone(dtype):
    eps = np.finfo(FLOATS[dtype]).eps
    row = 1 + eps * np.random.default_rng(6).permutation(50)
    assert_found(np.stack([row, -row]), dtype, (20,), range(0, 50, 7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_entry_is_at_every_place_there_is(dtype):
    for value in (0.0, -3.5, 1e-40):
        assert_found(np.array([[value]]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_places_need_no_order_and_may_repeat(dtype):
    rows = np.random.default_rng(7).standard_normal((2, 31)).astype(FLOATS[dtype])
    asked = [(1, 30), (0, 4), (1, 30), (0, 29), (1, 0)]
    found = found_at([Place(row, rank) for row, rank in asked], [torch.from_numpy(rows)], dtype)
    ordered = np.sort(rows, axis=1)
    assert found == [float(ordered[row, rank]) for row, rank in asked]


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_need_not_be_contiguous(dtype):
    rows = torch.from_numpy(np.random.default_rng(8).standard_normal((20, 3)).astype(FLOATS[dtype]))
    found = found_at([Place(row, 10) for row in range(3)], [rows.T], dtype)
    assert found == np.sort(rows.numpy(), axis=0)[10].astype(float).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_take_the_bytes_that_are_announced(dtype):
    bytes_of = []
    for step in range(order_statistics.passes(dtype)):
        counts = order_statistics.no_counts(1, step, dtype)
        assert counts.nbytes == 0
        counts.count(0, np.arange(counts.bins))
        bytes_of.append(counts.nbytes)
    assert max(bytes_of) == order_statistics.row_bytes(1 << 18, dtype)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from(DTYPES))
def test_any_finite_values_are_ordered_as_numpy_orders_them(data, dtype):
    width = 32 if dtype == torch.float32 else 64
    values = st.floats(allow_nan=False, allow_infinity=False, width=width) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
    row = np.array(data.draw(st.lists(values, min_size=1, max_size=20)), FLOATS[dtype])
    rank = data.draw(st.integers(0, len(row) - 1))
    split = data.draw(st.integers(0, len(row)))
    assert_found(row[None], dtype, (split,), [rank])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_no_values_any_is_zero(dtype):
    """A model whose merged tensors are all empty has none; PCB asks for their quantiles all the same."""
    assert found_at([Place(0, 0), Place(1, 3)], [torch.zeros(2, 0, dtype=dtype)], dtype) == [0.0, 0.0]
