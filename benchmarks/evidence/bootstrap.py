"""How sure a difference between two merges is: paired bootstrap over test examples.

Both are scored on the same examples with the same heads. Examples are drawn with replacement within each task, the same
for both and for all seeds; what is compared is the mean over seeds and tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from suite import Answers

DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """Of two means.

    Args:
        value: first less second.
        low: 2.5% quantile of the draws.
        high: 97.5% quantile.
        above: share of the draws above 0; half of those at 0.
    """

    value: float
    low: float
    high: float
    above: float

    @property
    def is_clear(self) -> bool:
        """Whether 0 is outside of the interval."""
        return self.low > 0 or self.high < 0


def difference(
    first: Sequence[Mapping[str, str]], second: Sequence[Mapping[str, str]], draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Return the difference of two merges' mean accuracies.

    Args:
        first: packed answers by task, one mapping per seed.
        second: of the other merge, with the same tasks and seeds.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: tasks or seeds are not the same.
    """
    if len(first) != len(second) or any(set(one) != set(other) for one, other in zip(first, second, strict=False)):
        raise ValueError("the tasks or seeds of two merges differ")
    generator = np.random.default_rng(seed)
    value, drawn = 0.0, np.zeros(draws)
    for task in first[0]:
        # Of each example, how much better the first is, over all seeds.
        better = np.mean([_right(one[task]) - _right(other[task]) for one, other in zip(first, second, strict=True)], 0)
        # A draw of n examples with replacement is how often each of the values that occur is drawn.
        values, counts = np.unique(better, return_counts=True)
        times = generator.multinomial(len(better), counts / len(better), size=draws)
        value += float(better.mean()) / len(first[0])
        drawn += times @ values / len(better) / len(first[0])
    low, high = np.quantile(drawn, [0.025, 0.975])
    above = float((drawn > 1e-12).mean() + (np.abs(drawn) <= 1e-12).mean() / 2)
    return Difference(value, float(low), float(high), above)


def _right(packed: str) -> np.ndarray:
    return np.array(Answers.unpacked(packed).right, float)
