"""Random numbers that depend on a seed, a tensor's name, a task's name and an entry's place, and on nothing else.

A counter-based generator (Philox, Salmon et al. 2011) reaches the number of any entry without drawing those before it:
pieces of a tensor get the same numbers as the whole, on any device, in any order, in a survey pass and in the merge.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

_PER_BLOCK = 8
"""Numbers of 32 bits that one step of the counter gives."""


@dataclass(frozen=True)
class Generator:
    """The random numbers of one tensor.

    Args:
        seed: the recipe's.
        name: of the tensor.
        tasks: names of the tasks, in the order of the stacked task vectors. A task's numbers go by its name, so that
            the order of the models does not matter.
        start: flat index of the first entry of the piece these numbers are for.
    """

    seed: int
    name: str
    tasks: tuple[str, ...]
    start: int = 0

    def within(self, start: int) -> Generator:
        """Return the numbers of the piece of the flattened tensor that begins at `start`."""
        return replace(self, start=self.start + start)

    def uniform(self, task: int, shape: torch.Size | tuple[int, ...]) -> Float[Tensor, "*shape"]:
        """Return numbers in [0, 1), float64 on the CPU; multiples of 2^-32."""
        return torch.from_numpy(self._draw(task, prod(shape)) * 2.0**-32).reshape(shape)

    def keeps(self, task: int, probability: float, shape: torch.Size | tuple[int, ...]) -> Bool[Tensor, "*shape"]:
        """Return which entries are kept when each is kept with this probability, on the CPU."""
        limit = round(min(max(probability, 0.0), 1.0) * 2**32)
        if limit == 2**32:  # one more than the largest number
            return torch.ones(shape, dtype=torch.bool)
        return torch.from_numpy(self._draw(task, prod(shape)) < np.uint32(limit)).reshape(shape)

    def _draw(self, task: int, count: int) -> np.ndarray:
        """Return `count` numbers of 32 bits for the entries from `start` on."""
        block, skipped = divmod(self.start, _PER_BLOCK)
        text = json.dumps([self.seed, self.name, self.tasks[task]])
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        words = np.random.Philox(key=key, counter=block).random_raw((skipped + count + 1) // 2)
        return words.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]


def drop_and_rescale(
    task_vectors: Float[Tensor, "tasks *shape"], density: float, generator: Generator
) -> Float[Tensor, "tasks *shape"]:
    """Keep each entry with probability `density` and divide what is kept by it: the expectation stays.

    DARE (Yu et al. 2024, arXiv:2311.03099), with density = 1 - p.

    Args:
        task_vectors: one per task.
        density: probability of an entry to be kept, in (0, 1].
        generator: the tensor's random numbers.

    Returns:
        The sparsified task vectors; the input where density is 1.
    """
    if density == 1:
        return task_vectors
    kept = torch.div(task_vectors, density)
    for task, row in enumerate(kept):
        _zero(row, generator.keeps(task, density, row.shape))
    return kept


def _zero(row: Float[Tensor, "*shape"], keeps: Bool[Tensor, "*shape"]) -> None:
    """Set to zero, in place, what is not kept."""
    if row.is_cuda:
        row.masked_fill_(~keeps.to(row.device), 0)
    else:  # NumPy multiplies by a mask; torch would branch on each entry, at ten times the cost
        values = row.numpy()
        np.multiply(values, keeps.numpy(), out=values)
