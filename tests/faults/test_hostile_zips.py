"""Zips that pack much into little, or are two things at once: refused by name, soon and in little memory."""

from __future__ import annotations

import pickle
import struct
import time
import zipfile
import zlib
from pathlib import Path

import pytest

from faults.damage import MERGED, SOON, merge_refused, merged_or_refused, repacked, small_family

GROUP = "Hostile inputs"


def zeros_packed(size: int) -> bytes:
    """Return a deflated stream of a megabyte of zeros, times as many as asked for."""
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    press.compress(bytes(1 << 20))
    part = press.flush(zlib.Z_FULL_FLUSH)
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = press.compress(bytes(1 << 20)) + press.flush(zlib.Z_FULL_FLUSH)
    return part * (size >> 20) + b"\x03\x00"


def write_zip(file: Path, entries: list[tuple], *, comment: bytes = b"", count: int | None = None) -> Path:
    """Write a zip of entries (name, content, what changes of its description), whatever that says."""
    body, directory, starts = b"", b"", {}
    for name, content, *more in entries:
        said = {"method": 0, "packed": len(content), "size": len(content), "start": None, **(more[0] if more else {})}
        start = said["start"] if said["start"] is not None else len(body)
        starts[name] = start
        fixed = struct.pack("<4H3L", 0, said["method"], 0, 0, zlib.crc32(content), said["packed"], said["size"])
        if said["start"] is None:
            body += b"PK\3\4" + struct.pack("<H", 20) + fixed + struct.pack("<HH", len(name), 0) + name + content
        directory += b"PK\1\2" + struct.pack("<HH", 20, 20) + fixed
        directory += struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, start) + name
    number = len(entries) if count is None else count
    end = struct.pack("<4H2LH", 0, 0, number, number, len(directory), len(body), len(comment))
    file.write_bytes(body + directory + b"PK\5\6" + end + comment)
    return file


def entries_of(file: Path) -> list[tuple[bytes, bytes]]:
    with zipfile.ZipFile(file) as archive:
        return [(info.filename.encode(), archive.read(info)) for info in archive.infolist()]


def packed_pickle(file: Path) -> None:
    stream = zeros_packed(10 << 30)
    said = {"method": 8, "size": 2**32 - 2, "packed": len(stream)}
    others = [entry for entry in entries_of(file) if not entry[0].endswith(b"data.pkl")]
    write_zip(file, [(b"m/data.pkl", stream, said), *others])


def packed_data(file: Path) -> None:
    stream = zeros_packed(1 << 30)
    said = {"method": 8, "size": 1 << 30, "packed": len(stream)}
    write_zip(
        file, [(name, stream, said) if b"/data/" in name else (name, content) for name, content in entries_of(file)]
    )


def size_beyond(file: Path) -> None:
    write_zip(
        file,
        [
            (name, content, {"size": 2**31, "packed": 2**31} if name.endswith(b"data.pkl") else {})
            for name, content in entries_of(file)
        ],
    )


def in_each_other(file: Path) -> None:
    entries = entries_of(file)
    first = next(name for name, _ in entries if b"/data/" in name)
    prefix = first.rpartition(b"/")[0]
    write_zip(file, [*entries, *((b"%s/%d" % (prefix, 1000 + n), entries[-1][1], {"start": 0}) for n in range(5000))])


def two_pickles(file: Path) -> None:
    entries = entries_of(file)
    write_zip(file, [*entries, *((name.upper(), b".") for name, _ in entries if name.endswith(b"data.pkl"))])


def two_directories(file: Path) -> None:
    """A zip behind a zip: some readers see the first, some the last."""
    sound = file.read_bytes()
    other = write_zip(file.with_name("other"), [(b"m/data.pkl", pickle.dumps({}, 2))])
    file.write_bytes(sound + other.read_bytes())
    other.unlink()


def hidden_in_comment(file: Path) -> None:
    inner = write_zip(file.with_name("other"), [(b"m/data.pkl", pickle.dumps({}, 2))])
    write_zip(file, entries_of(file), comment=inner.read_bytes())
    inner.unlink()


def more_than_counted(file: Path) -> None:
    write_zip(file, entries_of(file), count=2)


def a_directory_of_gigabytes(file: Path) -> None:
    end = struct.pack("<4H2LH", 0, 0, 60_000, 60_000, 2**31, 0, 0)
    with file.open("r+b") as stream:
        stream.truncate(2**31)
        stream.seek(2**31)
        stream.write(b"PK\5\6" + end)


def a_million_entries(file: Path) -> None:
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    with file.open("wb") as stream:
        stream.write(b"PK\3\4" + bytes(26))
        start = stream.tell()
        stream.write(entry * 1_000_000)
        length = stream.tell() - start
        place = stream.tell()
        stream.write(b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, 10**6, 10**6, length, start))
        stream.write(b"PK\6\7" + struct.pack("<LQL", 0, place, 1))
        stream.write(b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))


ZIPS = {
    "a pickle of 10 GB in 10 MB": packed_pickle,
    "data of 1 GB in 1 MB": packed_data,
    "a pickle larger than the file": size_beyond,
    "entries in each other": in_each_other,
    "two pickles": two_pickles,
    "two tables of contents": two_directories,
    "a zip in the comment": hidden_in_comment,
    "more entries than counted": more_than_counted,
    "a table of contents of 2 GB": a_directory_of_gigabytes,
    "a million entries": a_million_entries,
    "all entries packed": lambda file: repacked(file, lambda _, content: content, zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("fault", ZIPS)
def test_a_zip_that_is_a_trap_is_refused_in_little_memory(tmp_path, tally, forks, fault):
    base, file = small_family(tmp_path, ".bin")
    ZIPS[fault](file)
    with tally(GROUP, f"zip: {fault}", "command line") as injection:
        begun = time.monotonic()
        injection.outcome = merge_refused(forks, tmp_path, base, file.parent, names=[str(file)], memory=200_000_000)
        assert time.monotonic() - begun < SOON


def test_the_zips_above_are_refused_for_what_is_wrong_with_them(tmp_path):
    """The test above would pass if every zip that Python writes were refused."""
    base, file = small_family(tmp_path, ".bin")
    write_zip(file, entries_of(file))
    assert merged_or_refused(base, [file.parent], tmp_path / "out") == MERGED
