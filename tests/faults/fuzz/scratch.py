"""Where fuzzing puts its files; imports nothing of superpose, which has to be imported by what instruments it."""

from __future__ import annotations

import os

SCRATCH = "SUPERPOSE_FUZZ_SCRATCH"
"""Names the folder for all of a process: libFuzzer ends it without letting it clear up."""


def in_memory() -> str | None:
    """Return a folder in memory, where the system has such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
