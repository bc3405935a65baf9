"""The fault harness: what is injected is counted, and written down for docs/reliability.md where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.forks import Forks
from faults.scenes import Scene, make_scene
from faults.tally import Tally

_TALLY = Tally()


@pytest.fixture
def tally() -> Tally:
    """Return what counts this run's injections: `with tally(group, fault, where) as injection: ...`."""
    return _TALLY


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Return what runs the command line in forks of one process, which starts in seconds and once."""
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def scene_of(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Callable[[str, str], Scene]:
    """Return what finds the merge of a name on a backend; each is made once."""
    made: dict[tuple[str, str], Scene] = {}

    def find(what: str, backend: str) -> Scene:
        if (what, backend) not in made:
            made[what, backend] = make_scene(tmp_path_factory.mktemp("scene"), what, backend, forks)
        return made[what, backend]

    return find


def pytest_sessionfinish() -> None:
    """Write the counts, if a folder is named for them."""
    if _TALLY.rows and (folder := os.environ.get("SUPERPOSE_FAULT_TABLE")):
        _TALLY.write(Path(folder))
