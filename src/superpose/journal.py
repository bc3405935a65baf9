"""The journal of a merge under way: what is finished, so that a restart goes on from there.

`OUT.partial/` holds the files of the output at full size, a lock, and the journal: one line per finished tensor with
the item's key, the digest of its bytes and its record. A line is written after the bytes are in place; the digest is
checked again on a restart, so that neither a torn line nor bytes lost with the power pass for finished work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from superpose.checkpoints.writer import StreamWriter
from superpose.output_folder import JOURNAL_FILE
from superpose.planning import WorkItem
from superpose.records import TensorRecord, tensor_record


class Journal:
    """The finished items of one merge.

    Args:
        folder: `OUT.partial`.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_FILE
        self._guard = threading.Lock()

    def finished(self, items: Sequence[WorkItem], writer: StreamWriter) -> dict[str, TensorRecord]:
        """Return the records of items that are finished, by name; only those whose bytes are in place."""
        keys = {item.name: item.key for item in items}
        found: dict[str, TensorRecord] = {}
        for line in self._lines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line torn by a crash is work not done
                entry = json.loads(line)
                record = tensor_record(entry["record"])
                if keys.get(record.name) == entry["key"]:
                    found[record.name] = record
        written = {item.name: item.names for item in items}
        return {name: record for name, record in found.items() if _in_place(record, written[name], writer)}

    def add(self, item: WorkItem, record: TensorRecord) -> None:
        """Note that an item is finished; from any thread."""
        line = json.dumps({"key": item.key, "record": dataclasses.asdict(record)}) + "\n"
        with self._guard, self._path.open("a", encoding="utf-8") as stream:
            if stream.tell() and not self._ends_with_newline():
                stream.write("\n")  # after a torn line
            stream.write(line)

    def _lines(self) -> list[str]:
        return self._path.read_text(encoding="utf-8", errors="replace").splitlines() if self._path.exists() else []

    def _ends_with_newline(self) -> bool:
        with self._path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"


def _in_place(record: TensorRecord, names: Sequence[str], writer: StreamWriter) -> bool:
    """Whether the bytes that a record tells of are still what it says."""
    told = {**dict.fromkeys(names, record.sha256), **record.beside, **record.factors}
    return all(writer.digest(name) == sha256 for name, sha256 in told.items())
