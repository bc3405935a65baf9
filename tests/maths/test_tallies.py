"""Counts that are lists while there are few of them, and tables when there are many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.tallies import Tally, row_bytes

BINS = 256
pieces = st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, BINS - 1), max_size=30)), max_size=12)


def tally_of(counted):
    tally = Tally(2, BINS)
    for row, digits in counted:
        tally.count(row, np.array(digits, np.int32))
    return tally


def expected(counted, row):
    digits = [digit for counted_row, piece in counted if counted_row == row for digit in piece]
    return np.bincount(np.array(digits, np.int64), minlength=BINS)


@settings(deadline=None)
@given(pieces, pieces)
def test_counts_and_sums_are_those_of_all_digits(first, second):
    tally = tally_of(first)
    other = tally_of(second)
    tally += other
    for row in range(2):
        counts = expected(first + second, row)
        assert tally.row(row).tolist() == counts.tolist()
        values, found = tally.occurring(row)
        assert values.tolist() == np.flatnonzero(counts).tolist()
        assert found.tolist() == counts[counts > 0].tolist()
        assert other.row(row).tolist() == expected(second, row).tolist()


@pytest.mark.parametrize("digits", [0, 1, 3])
def test_few_counts_take_few_bytes(digits):
    tally = Tally(2, 1 << 18)
    tally.count(1, np.arange(digits))
    assert tally.nbytes == 16 * digits


def test_many_counts_take_a_table_and_no_more():
    tally = Tally(1, BINS)
    for _ in range(100):
        tally.count(0, np.arange(5))
    assert tally.nbytes == 8 * BINS


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**14 - 1), max_size=300), min_size=1, max_size=4))
def test_rows_take_no_more_than_is_announced(digits):
    tally = Tally(3, 2**14)
    for row in range(3):
        for piece in digits:
            tally.count(row, np.array(piece, np.int32))
    assert tally.nbytes <= 3 * row_bytes(sum(map(len, digits)), 2**14)


def test_rows_of_few_entries_are_announced_as_few_bytes():
    assert row_bytes(10, 2**18) == 320
    assert row_bytes(2**13, 2**18) == row_bytes(10**9, 2**18) == 2**21
