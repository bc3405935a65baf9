"""What a file of torch.save would make of memory and time, told before PyTorch opens it.

PyTorch keeps a pickle from running code, but not from filling the memory: a megabyte of zeros can be packed into a
kilobyte, and a few hundred instructions can build a value that takes for ever to look up. Files that torch.save writes
do neither: their entries are stored as they are, one behind the other, and nest a few levels deep.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

LARGEST_DIRECTORY = LARGEST_PICKLE = 100_000_000
"""Bytes; of a file's table of contents, and of its description of the tensors."""
MOST_INSTRUCTIONS = 5_000_000
"""Of a pickle: about forty make a tensor."""
MOST_WORK = 50_000_000
"""Values that a pickle puts somewhere, counted through what they hold; fourfold for calls, which copy them."""
MOST_NESTED = 1_000_000
"""Values that one tuple may stand for: looked up as a key, it takes that many steps."""
_END, _END_64, _LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_FULL_16, _FULL_32 = 2**16 - 1, 2**32 - 1


class Entry(NamedTuple):
    """One file in a zip.

    Args:
        name: with the folder that torch.save puts all entries into.
        start: of the entry in the zip.
        size: bytes of its content.
    """

    name: bytes
    start: int
    size: int


def check_zip(file: Path) -> None:
    """See that a file is a zip as torch.save writes it, and that its pickle is of bounded effort.

    Args:
        file: the file.

    Raises:
        ValueError: it is not, in words.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        entries = _entries(stream, size)
        pickles = [entry for entry in entries if entry.name.lower().endswith(b"/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("the zip has no data.pkl, or several")
        others = sum(entry.size for entry in entries if b"/data/" not in entry.name)
        if others > LARGEST_PICKLE:
            raise ValueError(f"its description of the tensors takes {others} bytes")
        check_pickle(_content(stream, pickles[0]))


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
    mark, flags, method, packed, size, start = head[0], head[3], head[4], head[8], head[9], head[16]
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
    return Entry(name, start, size), stop


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
    return stream.read(entry.size)


# Bytes that follow an instruction, by how the stack changes: those that push a value that holds no others, ...
_PLAIN = {ord("N"): 0, 0x88: 0, 0x89: 0, ord("J"): 4, ord("K"): 1, ord("M"): 2, ord("G"): 8}
_NEW = frozenset(b"])}\x8f")  # ... an empty container, ...
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}  # ... a tuple of the topmost values, ...
_ITEM = {ord("a"): 1, ord("b"): 1, ord("s"): 2}  # ... those that put the topmost values into what lies below, ...
_ITEMS = frozenset(b"eu")  # ... and those that put all above a mark there.
# Of the calls that PyTorch allows, these make as many bytes out of a number or a short text as they are told to.
_COSTLY = frozenset({b"bytearray", b"encode"})


def check_pickle(pickled: bytes) -> None:
    """See that a pickle of tensors is read in bounded time and memory.

    The instructions are followed with numbers in place of values: how many a value stands for, what it holds counted
    as often as it holds it. What no file of torch.save has, or is damaged, is left to PyTorch to refuse.

    Args:
        pickled: the pickle.

    Raises:
        ValueError: it is not, in words.
    """
    try:
        _follow(pickled)
    except (IndexError, KeyError, TypeError, struct.error):  # damaged: PyTorch comes to the same place, and says so
        return


def _follow(pickled: bytes) -> None:
    # A value is a list of one number, so that what is put into a container later counts wherever it is held.
    stack: list[list[int]] = []
    marked: list[list[list[int]]] = []
    memo: dict[int, list[int]] = {}
    one, work, place = [1], 0, 0
    for _ in range(MOST_INSTRUCTIONS):
        code = pickled[place]
        place += 1
        if code in _PLAIN:
            place += _PLAIN[code]
            stack.append(one)
        elif code == ord("q") or code == ord("r"):  # remember
            at, place = _number(pickled, place, 1 if code == ord("q") else 4)
            memo[at] = stack[-1]
        elif code == ord("h") or code == ord("j"):  # recall
            at, place = _number(pickled, place, 1 if code == ord("h") else 4)
            stack.append(memo[at])
        elif code == ord("X") or code == ord("U") or code == 0x8A:  # a text, bytes, a long number
            length, place = _number(pickled, place, 4 if code == ord("X") else 1)
            place += length
            stack.append([1 + length])
        elif code == ord("("):
            marked.append(stack)
            stack = []
        elif code in _NEW:
            stack.append([1])
        elif code in _TUPLES or code == ord("t"):
            count = _TUPLES.get(code, len(stack))
            if count > len(stack):
                raise IndexError(place)
            held = sum(value[0] for value in stack[len(stack) - count :])
            del stack[len(stack) - count :]
            stack = marked.pop() if code == ord("t") else stack
            if held > MOST_NESTED:
                raise ValueError("its pickle holds tuples in tuples beyond counting")
            stack.append([1 + held])
        elif code in _ITEMS:
            held, stack = sum(value[0] for value in stack), marked.pop()
            work += held
            stack[-1][0] += held
        elif code in _ITEM:
            held = sum(stack.pop()[0] for _ in range(_ITEM[code]))
            work += held
            stack[-1][0] += held
        elif code == ord("R") or code == 0x81:
            held = stack.pop()[0]
            work += 4 * held
            stack[-1] = [1 + held]
        elif code == ord("Q"):
            stack[-1] = [stack[-1][0]]
        elif code == ord("c"):
            name = pickled.find(b"\n", place) + 1
            end = pickled.find(b"\n", name)
            if not name or end < 0:
                raise IndexError(place)
            if pickled[name:end] in _COSTLY:
                raise ValueError(f"its pickle calls {pickled[name:end].decode()}")
            place = end + 1
            stack.append(one)
        elif code == 0x80:
            place += 1
        else:  # the end, or what PyTorch does not know
            return
        if work > MOST_WORK:
            raise ValueError("its pickle copies its values over and over")
    raise ValueError(f"its pickle has more than {MOST_INSTRUCTIONS} instructions")


def _number(pickled: bytes, place: int, length: int) -> tuple[int, int]:
    if place + length > len(pickled):
        raise IndexError(place)
    return int.from_bytes(pickled[place : place + length], "little"), place + length
