"""What tells a file from another, and from what it was before: place, size, times, and a sample of its content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from superpose.errors import SuperposeError

HEAD = 1 << 20
"""Bytes of a file's beginning, where headers are, that its sample has."""
BLOCKS, BLOCK = 16, 1 << 16
"""Number and bytes of the blocks, evenly over the file to its end, that its sample has."""

PIECE = 1 << 22
"""Bytes that are read and digested at a time."""


@dataclass(frozen=True)
class FileStamp:
    """What a file was at one moment.

    Args:
        place: where it lies, links followed.
        size: its bytes.
        modified: when its content was changed, in nanoseconds.
        changed: when anything about it was changed; copying tools cannot set this back.
        inode: its number in its file system.
        sample: digest of a sample of its content (see `content_sample`).
    """

    place: str
    size: int
    modified: int
    changed: int
    inode: int
    sample: str

    @property
    def text(self) -> str:
        """Everything in one line."""
        return "|".join(map(str, (self.place, self.modified, self.changed, self.inode, self.size, self.sample)))


def stamp(file: Path) -> FileStamp:
    """Return what a file is now.

    Args:
        file: the file.

    Returns:
        Its stamp.

    Raises:
        SuperposeError: it cannot be read.
    """
    try:
        status, sample = file.stat(), content_sample(file)
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise SuperposeError(what, where=str(file), mend="put the file back, or check its rights") from error
    return FileStamp(str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sample)


def content_sample(file: Path) -> str:
    """Return the sha256 of a file's first MiB and of 16 blocks of 64 KiB evenly over the rest, the last at its end.

    Small files are in it as a whole. Copies have the same sample wherever they lie.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        digest.update(size.to_bytes(8, "little"))
        digest.update(stream.read(HEAD))
        rest = max(0, size - HEAD)
        for number in range(1, BLOCKS + 1):
            if rest > BLOCKS * BLOCK:
                stream.seek(HEAD + rest * number // BLOCKS - BLOCK)
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
