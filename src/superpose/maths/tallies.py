"""Counts of digits: a table where there are many, a list where there are few.

A model has hundreds of tensors of a few entries. Their counts wait for their turn to be added up while a large tensor
is read: as tables they would fill the memory, as lists they take no more than the tensors themselves.
"""

from __future__ import annotations

import numpy as np

FEW = 32
"""A table is made from a digit a row for every so many bins."""


def row_bytes(entries: int, bins: int) -> int:
    """Return the most bytes that a row of a tally takes.

    Args:
        entries: digits that are counted in it.
        bins: values that a digit can have.

    Returns:
        Bytes, while digits are counted: in a list they are there once more.
    """
    return 8 * bins if entries >= bins // FEW else 32 * entries


class Tally:
    """Counts of the values of a digit, in several rows.

    Args:
        rows: number of rows.
        bins: values that a digit can have.
    """

    def __init__(self, rows: int, bins: int) -> None:
        self.rows, self.bins = rows, bins
        self._table: np.ndarray | None = None
        self._listed: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(rows)]
        self._entries = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the counts."""
        if self._table is not None:
            return self._table.nbytes
        return sum(values.nbytes + counts.nbytes for row in self._listed for values, counts in row)

    def count(self, row: int, digits: np.ndarray) -> None:
        """Count the digits of one piece in a row."""
        if digits.size >= self.bins // FEW:
            self._as_table()[row] += np.bincount(digits.astype(np.int64, copy=False), minlength=self.bins)
        elif digits.size:
            values, counts = np.unique(digits, return_counts=True)
            self._add_listed(row, values.astype(np.int64), counts.astype(np.int64))

    def __iadd__(self, other: Tally) -> Tally:
        if other._table is not None:
            table = self._as_table()
            table += other._table
        for row, listed in enumerate(other._listed):
            for values, counts in listed:
                self._add_listed(row, values, counts)
        return self

    def row(self, row: int) -> np.ndarray:
        """Return the counts of all values in a row."""
        if self._table is not None:
            return self._table[row]
        counts = np.zeros(self.bins, np.int64)
        for values, found in self._listed[row]:
            counts[values] += found
        return counts

    def occurring(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the values that occur in a row, ascending, and how often."""
        if self._table is None and len(self._listed[row]) == 1:
            return self._listed[row][0]
        counts = self.row(row)
        values = np.flatnonzero(counts)
        return values, counts[values]

    def _add_listed(self, row: int, values: np.ndarray, counts: np.ndarray) -> None:
        if self._table is not None:
            self._table[row, values] += counts
            return
        self._listed[row].append((values, counts))
        self._entries += len(values)
        if self._entries >= self.rows * self.bins // FEW:
            self._as_table()

    def _as_table(self) -> np.ndarray:
        if self._table is None:
            self._table = np.stack([self.row(row) for row in range(self.rows)])
            self._listed = [[] for _ in range(self.rows)]
        return self._table
