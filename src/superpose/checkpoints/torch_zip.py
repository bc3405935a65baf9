"""The zip around a file of torch.save, seen to be of the plain sort before PyTorch opens it.

A zip can pack a gigabyte of zeros into a megabyte, lay its entries into each other, and show every reader something
else. What torch.save writes does none of it: entries are stored as they are, one behind the other.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from superpose.checkpoints.pickles import check_pickle

SUFFIXES = (".bin", ".pt", ".pth")
"""Of names of files that torch.save writes."""
LARGEST_DIRECTORY, LARGEST_PICKLE = 30_000_000, 100_000_000
"""Bytes; of a file's table of contents, and of its description of the tensors."""
_END, _END_64, _LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_FULL_16, _FULL_32 = 2**16 - 1, 2**32 - 1


class Entry(NamedTuple):
    """One file in a zip.

    Args:
        name: with the folder that torch.save puts all entries into.
        start: of the entry in the zip.
        size: bytes of its content.
        checksum: of its content; 0 where PyTorch was told to compute none.
    """

    name: bytes
    start: int
    size: int
    checksum: int


def check_zip(file: Path) -> None:
    """See that a file is a zip as torch.save writes it, and that its pickle can be read and fits the other entries.

    Args:
        file: the file.

    Raises:
        ValueError: it is not, in words.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        entries = _entries(stream, size)
        pickles = [entry for entry in entries if entry.name.endswith(b"/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("the zip has no data.pkl, or several")
        others = sum(entry.size for entry in entries if b"/data/" not in entry.name)
        if others > LARGEST_PICKLE:
            raise ValueError(f"its description of the tensors takes {others} bytes")
        folder = pickles[0].name.removesuffix(b"data.pkl") + b"data/"
        sizes = {entry.name.removeprefix(folder): entry.size for entry in entries if entry.name.startswith(folder)}
        check_pickle(_content(stream, pickles[0]), sizes)


def _entries(stream: BinaryIO, size: int) -> list[Entry]:
    """Return the entries of a zip.

    Zip files can be read in several ways, of which a hostile one shows another content each. So only the plain way is
    taken: the table of contents ends where its end is marked, the mark ends the file, and nothing lies in anything.
    """
    count, length, start = _directory(stream, size)
    if length > LARGEST_DIRECTORY or length < 46 * count:
        raise ValueError("the zip's table of contents is damaged")
    stream.seek(start)
    text = stream.read(length)
    entries, place = [], 0
    for _ in range(count):
        entry, place = _entry(text, place)
        entries.append(entry)
    if place != len(text):
        raise ValueError("the zip's table of contents is damaged")
    if len({entry.name.lower() for entry in entries}) < len(entries):  # PyTorch does not tell capitals apart
        raise ValueError("an entry of the zip is there twice")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.start):
        if entry.start < end:
            raise ValueError("entries of the zip lie in each other")
        end = entry.start + 30 + len(entry.name) + entry.size
    if end > start:
        raise ValueError("the zip declares more than it holds: it is cut off or damaged")
    return entries


def _directory(stream: BinaryIO, size: int) -> tuple[int, int, int]:
    """Return how many entries there are, and length and place of the table of contents."""
    stream.seek(max(size - 98, 0))
    tail = stream.read(98)
    if size < 22 or tail[-22:-18] != _END or tail[-2:] != b"\0\0":
        raise ValueError("no zip of torch.save, or cut off")
    count, length, start = struct.unpack("<HII", tail[-12:-2])
    end = size - 22
    if tail[-42:-38] == _LOCATOR_64:
        end = size - 98
        if len(tail) < 98 or tail[:4] != _END_64 or struct.unpack("<Q", tail[-34:-26])[0] != end:
            raise ValueError("the zip's table of contents is damaged")
        count, length, start = struct.unpack("<QQQ", tail[32:56])
    elif count == _FULL_16 or _FULL_32 in (length, start):
        raise ValueError("the zip's table of contents is damaged")
    if start + length != end:
        raise ValueError("the zip's table of contents is damaged")
    return count, length, start


def _entry(text: bytes, place: int) -> tuple[Entry, int]:
    """Return the entry that the table of contents describes at a place, and the place of the next."""
    try:
        head = struct.unpack_from("<4s6H3L5H2L", text, place)
    except struct.error as error:
        raise ValueError("the zip's table of contents is damaged") from error
    mark, flags, method, checksum, packed, size, start = head[0], head[3], head[4], *head[7:10], head[16]
    name_length, extra_length, comment_length = head[10:13]
    begin = place + 46
    stop = begin + name_length + extra_length + comment_length
    name = text[begin : begin + name_length]
    if mark != b"PK\1\2" or stop > len(text):
        raise ValueError("the zip's table of contents is damaged")
    if _FULL_32 in (packed, size, start):
        extra = text[begin + name_length : begin + name_length + extra_length]
        size, packed, start = _wide(extra, [size, packed, start])
    shown = name[:80].decode("utf-8", "replace")
    if flags & 1 or method or packed != size:
        raise ValueError(f"entry {shown} of the zip is packed: {packed} bytes that become {size}")
    return Entry(name, start, size, checksum), stop


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Return sizes and place of an entry where 32 bits do not hold them: they stand among its extra fields."""
    place = 0
    while place + 4 <= len(extra):
        mark, length = struct.unpack_from("<HH", extra, place)
        content = extra[place + 4 : place + 4 + length]
        if mark == 1:
            numbers = iter(struct.unpack(f"<{len(content) // 8}Q", content[: len(content) // 8 * 8]))
            return [next(numbers, value) if value == _FULL_32 else value for value in values]
        place += 4 + length
    return values


def _content(stream: BinaryIO, entry: Entry) -> bytes:
    stream.seek(entry.start)
    head = stream.read(30)
    if len(head) < 30 or head[:4] != b"PK\3\4":
        raise ValueError("an entry of the zip is damaged")
    stream.seek(sum(struct.unpack("<HH", head[26:30])), 1)
    content = stream.read(entry.size)
    if entry.checksum not in (0, zlib.crc32(content)):  # PyTorch does not look
        raise ValueError("its description of the tensors is damaged: it does not fit its checksum")
    return content
