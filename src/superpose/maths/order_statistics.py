"""Exact order statistics over a model that is never in memory: a radix search in read-only passes.

A float orders like its bit pattern once the patterns of negative numbers are turned round. Each pass counts values by
the next bits of that pattern, among those whose leading bits are found already; after the last pass the value itself
is known, whatever the number of entries. Several places of the order are searched at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths import tallies
from superpose.maths.tallies import Tally

# Widths of the digits, leading first; the table of the widest fits a core's own cache.
_DIGITS = {torch.float32: (18, 14), torch.float64: (18, 18, 18, 10)}
_SIGNED = {torch.float32: np.int32, torch.float64: np.int64}
_UNSIGNED = {torch.float32: np.uint32, torch.float64: np.uint64}
_FLOATS = {torch.float32: np.float32, torch.float64: np.float64}


@dataclass(frozen=True)
class Place:
    """One place of the ascending order, as far as its value is known.

    Args:
        row: which row of the stacked values it is in.
        rank: 0-based, among the values that begin with the prefix.
        prefix: leading bits of the value.
    """

    row: int
    rank: int
    prefix: int = 0


def passes(dtype: torch.dtype) -> int:
    """Return the number of passes that values of a dtype take."""
    return len(_DIGITS[dtype])


def row_bytes(entries: int, dtype: torch.dtype) -> int:
    """Return the most bytes that the counts of one place take, of so many values."""
    return max(tallies.row_bytes(entries, 1 << width) for width in _DIGITS[dtype])


def no_counts(places: int, step: int, dtype: torch.dtype) -> Tally:
    """Return an empty tally, a row for each place, of digit number `step`."""
    return Tally(places, 1 << _DIGITS[dtype][step])


def count(values: Float[Tensor, "rows entries"], step: int, places: Sequence[Place], counts: Tally) -> None:
    """Count one piece's values by digit number `step`, for each place among those that begin with its prefix.

    Args:
        values: without NaN.
        step: number of the pass.
        places: as the pass before left them.
        counts: a row for each place; added to.
    """
    widths = _DIGITS[values.dtype]
    remaining = sum(widths[step + 1 :])
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, place in enumerate(places):
        alike[place.row, place.prefix].append(number)
    ordered = {row: _ordered(values[row]) for row, _ in alike}
    for (row, prefix), numbers in alike.items():
        bits = ordered[row]
        shift = bits.dtype.type
        if step:
            bits = bits[(bits >> shift(remaining + widths[step])) == prefix]
        digits = (bits >> shift(remaining)) & shift((1 << widths[step]) - 1)
        for number in numbers:
            counts.count(number, digits)


def narrow(places: Sequence[Place], counts: Tally, step: int, dtype: torch.dtype) -> tuple[Place, ...]:
    """Return the places with one more digit of their values.

    Args:
        places: as the pass before left them.
        counts: of all values, a row for each place.
        step: number of the pass.
        dtype: of the values.

    Returns:
        The places, in their order.
    """
    width, narrowed = _DIGITS[dtype][step], []
    for number, place in enumerate(places):
        upto = np.cumsum(counts.row(number))
        digit = int(np.searchsorted(upto, place.rank, side="right"))
        if not upto[-1]:  # of no values at all, the one at any place is taken to be zero
            digit = 0 if step else 1 << (width - 1)
        below = int(upto[digit - 1]) if digit else 0
        narrowed.append(Place(place.row, place.rank - below, (place.prefix << width) | digit))
    return tuple(narrowed)


def value_of(place: Place, dtype: torch.dtype) -> float:
    """Return the value at a place after the last pass."""
    bits = np.array(place.prefix, _UNSIGNED[dtype])
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    pattern = bits ^ sign if bits & sign else ~bits
    return float(np.asarray(pattern, _UNSIGNED[dtype]).view(_FLOATS[dtype]))


def _ordered(values: Float[Tensor, " entries"]) -> np.ndarray:
    """Return unsigned integers that order like the values."""
    bits = values.contiguous().numpy(force=True).view(_SIGNED[values.dtype])
    width = 8 * bits.itemsize
    turned = bits ^ (bits >> (width - 1) & np.array((1 << (width - 1)) - 1, bits.dtype))
    unsigned = turned.view(_UNSIGNED[values.dtype])
    return unsigned ^ unsigned.dtype.type(1 << (width - 1))
