"""Counts of what was injected, for the table in docs/reliability.md."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

GROUPS = ("Death", "Disk", "Used targets", "Broken inputs", "Hostile inputs", "Mismatch", "Resources")
"""The sections of the table, in its order."""
ROUNDS = int(os.environ.get("SUPERPOSE_FAULT_ROUNDS", "0"))
"""How often what is random is injected; 0 for the few times that every run of the tests takes."""


def rounds(few: int) -> int:
    """Return how often to inject a random fault: `few` times, or as often as `scripts/faults` asks for."""
    return ROUNDS or few


@dataclass
class Injection:
    """What came of one fault; the test sets it."""

    outcome: str = "survived"


@dataclass
class Tally:
    """Injections by group, fault and place: how many, what came of them, and how many lost something."""

    rows: dict[tuple[str, str, str], dict[str, int]] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, group: str, fault: str, where: str = "") -> Iterator[Injection]:
        """Count a fault; what the body raises is counted as a loss, and raised.

        Args:
            group: one of `GROUPS`.
            fault: what is injected, in a few words.
            where: backend, point or kind of file, in a few words.
        """
        assert group in GROUPS, group
        injection = Injection()
        try:
            yield injection
        except BaseException:
            injection.outcome = "LOST"
            raise
        finally:
            row = self.rows.setdefault((group, fault, where), {})
            row[injection.outcome] = row.get(injection.outcome, 0) + 1

    def write(self, folder: Path) -> None:
        """Write the counts into a file of this process."""
        told = [
            {"group": group, "fault": fault, "where": where, "outcomes": outcomes}
            for (group, fault, where), outcomes in self.rows.items()
        ]
        (folder / f"{os.getpid()}.json").write_text(json.dumps(told), encoding="utf-8")
