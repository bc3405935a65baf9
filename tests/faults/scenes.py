"""Merges that faults are injected into: small, but with all that a merge does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from families import make_family

from faults.forks import Forks, Outcome
from superpose.records import RECORD_FILE, RunRecord

ADAPTER = ["--form", "both", "--adapter-energy", "0.9", "--rest", "save"]
SCENES = {
    "stf": ["--method", "stf"],
    "ties, sharded": ["--method", "ties", "--shard-size", "1500"],
    "pcb": ["--method", "pcb"],
    "emr set": ["--method", "emr"],
    "model and adapter": ["--method", "task_arithmetic", *ADAPTER],
    "adapter": ["--method", "task_arithmetic", "--form", "adapter", "--adapter-rank", "2", "--rest", "save"],
    "over an older output": ["--method", "breadcrumbs", "--overwrite"],
}
"""What is merged, in a few words, and how the command line says it."""


@dataclass
class Scene:
    """One merge, undisturbed once, and then as often as wanted.

    Args:
        root: folder of all that it writes; emptied for every round.
        arguments: of the command line.
        forks: runs it.
        older: what lies under the output's name before; None for nothing.
        expected: every file of the undisturbed output.
        events: what the undisturbed merge did.
        old: every file of what lay there before.
    """

    root: Path
    arguments: Sequence[object]
    forks: Forks
    older: Path | None = None
    expected: dict[str, Any] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    old: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """The output's final name."""
        return self.root / "out"

    @property
    def partial(self) -> Path:
        """The output while it is under way."""
        return self.root / "out.partial"

    def begin(self) -> None:
        """Begin a round: nothing is there but the older output."""
        if self.root.exists():
            shutil.rmtree(self.root)
        self.root.mkdir()
        if self.older is not None:
            shutil.copytree(self.older, self.output)

    def run(self, **fault: Any) -> Outcome:
        """Run the merge, with a fault."""
        return self.forks.run(self.arguments, self.root, **fault)

    def is_complete(self) -> bool:
        """Whether the output has its name; it is then complete, or this fails."""
        if not self.output.exists():
            return False
        found = content(self.output)
        if found == self.old:
            return False
        differing = {name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name)}
        assert not differing, f"under the final name, incomplete or other than undisturbed: {differing}"
        return True

    def nothing_lost(self) -> None:
        """Check that the older output is where the next run finds it, unless the new one has its place."""
        if self.older is None or self.is_complete() or self.output.exists():
            return
        assert content(self.root / ".out.superpose-replaced") == self.old, "the older output is lost"

    def finished(self) -> int:
        """Return how many items the journal of a merge under way tells of."""
        files = [self.partial / "journal.jsonl", self.root / "out.partial.aside" / "journal.jsonl"]
        lines = [line for file in files if file.exists() for line in file.read_bytes().splitlines(keepends=True)]
        return sum(line.endswith(b"\n") and _is_json(line) for line in lines)

    def finish(self, *, again: bool = True) -> int:
        """Run the same command again, undisturbed, check what comes of it, and return how much was resumed."""
        complete = self.is_complete()
        done = self.run()
        if complete and self.older is None:
            assert done.status == 2, done.text
            assert "the output exists already" in done.text
            resumed = -1
        else:
            assert done.status == 0, done.text
            assert self.is_complete()
            resumed = RunRecord.load(self.output).totals["resumed"]
            assert again or not resumed
        assert "Traceback" not in done.text, done.text
        left = {path.name for path in self.root.iterdir()} - {"out"}
        # Killed when all was done but to clean up: the next merge of that name does it.
        assert not left or (resumed < 0 and left <= {"out.partial.lock", "out.partial.aside"}), left
        return resumed


def make_scene(
    folder: Path, what: str, backend: str, forks: Forks, more: Sequence[str] = (), root: Path | None = None
) -> Scene:
    """Make models, merge them undisturbed, and return the merge.

    Args:
        folder: for models and outputs.
        what: a key of `SCENES`.
        backend: "serial", "threads" or "ray".
        forks: runs it.
        more: arguments of the command line.
        root: for outputs; in `folder`, if it is not given.

    Returns:
        The merge.
    """
    models = folder / "models"
    if not models.exists():
        folders = make_family(models, layers=1, width=8)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (folders[0] / name).write_text(json.dumps({"about": name * 200}))
    folders = [models / name for name in ("base", "ft1", "ft2", "ft3")]
    root = root or folder / "work"
    workers = ["--workers", "2"] if backend != "serial" else []
    arguments = ["merge", *folders, "-o", root / "out", "--quiet", "--backend", backend, *workers, *more, *SCENES[what]]
    scene = Scene(root, arguments, forks)
    if what == "over an older output":
        scene.older = folder / "older"
        done = forks.run(["merge", *folders, "-o", scene.older, "--quiet", "--method", "average"], root)
        assert done.status == 0, done.text
        scene.old = content(scene.older)
    scene.begin()
    done = scene.run()
    assert done.status == 0, done.text
    scene.expected, scene.events = content(scene.output), dict(done.events)
    return scene


def content(folder: Path) -> dict[str, Any]:
    """Return every file of an output; of its record what does not tell the time."""
    found: dict[str, Any] = {
        str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }
    if RECORD_FILE in found:
        record = json.loads(found[RECORD_FILE])
        for key in ("seconds", "resumed"):
            record["totals"].pop(key)
        for tensor in record["tensors"]:
            tensor.pop("seconds")
        for key in [key for key in record["settings"] if key == "workers" or key.startswith("ray")]:
            record["settings"].pop(key)  # of a cluster this is known when it has had something to do
        found[RECORD_FILE] = record
    return found


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
