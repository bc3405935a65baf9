"""The survey of methods that trim task vectors under an option of their own name."""

from __future__ import annotations

from typing import Any

import torch

from superpose.maths.sparsify import Cuts
from superpose.maths.streaming import MagnitudeSurvey, SearchState, TensorChunks


class TrimSurvey:
    """The thresholds of trimming, for options whose `trim()` says how: none where nothing is trimmed."""

    def __init__(self) -> None:
        self.magnitudes = MagnitudeSurvey()

    def memory(self, tasks: int, entries: int, dtype: torch.dtype) -> int:
        """Return the bytes that one tensor's counts take at most."""
        return self.magnitudes.memory(tasks, entries, dtype)

    def passes(self, options: Any, dtype: torch.dtype) -> int:
        """Return the passes for the thresholds."""
        return self.magnitudes.passes(options.trim(), dtype)

    def reads(self, options: Any, dtype: torch.dtype) -> int:
        """Return how often the model is read as a rule."""
        return self.magnitudes.reads(options.trim(), dtype)

    def measure(self, step: int, name: str, chunks: TensorChunks, state, options: Any):
        """Return one tensor's counts."""
        return self.magnitudes.measure(step, name, chunks, state, options.trim())

    def finish(self, step: int, total, state, options: Any, dtype: torch.dtype) -> SearchState:
        """Return the state of the search."""
        return self.magnitudes.finish(step, total, state, options.trim(), dtype)

    def for_tensor(self, name: str, chunks: TensorChunks, state, options: Any) -> Cuts:
        """Return the cuts of one tensor."""
        return self.magnitudes.for_tensor(name, chunks, state, options.trim())
