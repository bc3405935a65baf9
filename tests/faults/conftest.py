"""The fault harness: what is injected is counted, and written down for docs/reliability.md where that is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from faults.tally import Tally

_TALLY = Tally()


@pytest.fixture
def tally() -> Tally:
    """Return what counts this run's injections: `with tally(group, fault, where) as injection: ...`."""
    return _TALLY


def pytest_sessionfinish() -> None:
    """Write the counts, if a file is named for them."""
    if _TALLY.rows and (file := os.environ.get("SUPERPOSE_FAULT_TABLE")):
        _TALLY.write(Path(file))
