"""Headers of safetensors files that say what is not so: an error that names the file, in little memory and time."""

from __future__ import annotations

import json
import time

import pytest
from families import save, tuned_tensors

from faults.damage import (
    NAME,
    REFUSED,
    header_of,
    merge_refused,
    merged_or_refused,
    refused_by_the_command_line,
    small_base,
    small_family,
    with_bytes,
    with_header,
    write_header,
)
from superpose.checkpoints.compare import align
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.headers import LONGEST_NAME, MOST_TENSORS, TensorHeader
from superpose.kinds import Kind

GROUP = "Broken inputs"


def shard(name, start, stop, *, dtype="F32", shape=None):
    return {name: {"dtype": dtype, "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}}


def twice(header):
    return json.dumps(header)[:-1].encode() + b", " + json.dumps({NAME: header[NAME]})[1:].encode()


def swap(header):
    header[NAME]["data_offsets"], header["lm_head.weight"]["data_offsets"] = (
        header["lm_head.weight"]["data_offsets"],
        header[NAME]["data_offsets"],
    )


HEADERS = {
    "overlapping offsets": with_header(lambda h: h[NAME].update(data_offsets=[0, 768])),
    "offsets past the end": with_header(lambda h: h[NAME].update(data_offsets=[10**6, 10**6 + 768])),
    "offsets beyond any file": with_header(lambda h: h[NAME].update(data_offsets=[2**62, 2**62 + 768])),
    "offsets that are not aligned": with_header(
        lambda h: h[NAME].update(data_offsets=[o + 1 for o in h[NAME]["data_offsets"]])
    ),
    "offsets of two tensors swapped": with_header(swap),
    "shape beyond memory": with_header(lambda h: h[NAME].update(shape=[2**40, 2**20])),
    "shape below zero": with_header(lambda h: h[NAME].update(shape=[-24, -8])),
    "unknown dtype": with_header(lambda h: h[NAME].update(dtype="F24")),
    "dtype of other width": with_header(lambda h: h[NAME].update(dtype="F64")),
    "integers in place of numbers": with_header(lambda h: h[NAME].update(dtype="I32")),
    "name that is no text": with_header(lambda h: h.update({"\ud800": h.pop(NAME)})),
    "name without end": with_header(lambda h: h.update({"norm" * LONGEST_NAME: h.pop(NAME)})),
    "a tensor less": with_header(lambda h: h.pop(NAME)),
    "a tensor twice": lambda file: write_header(file, twice(header_of(file)[0]), header_of(file)[1]) and None,
    "no UTF-8": with_bytes(lambda content: content.replace(b"up_proj", b"up_\xffroj")),
    "length of 2^60": with_bytes(lambda content: (2**60).to_bytes(8, "little") + content[8:]),
    "length of 2^64 - 1": with_bytes(lambda content: b"\xff" * 8 + content[8:]),
    "length of 0": with_bytes(lambda content: bytes(8) + content[8:]),
    "length of the file": with_bytes(lambda content: (len(content) - 8).to_bytes(8, "little") + content[8:]),
    "bytes behind the last tensor": with_bytes(lambda content: content + bytes(5)),
    "bytes before the file": with_bytes(lambda content: b"\xef\xbb\xbf" + content),
    "line ends of another system": with_bytes(lambda content: content.replace(b"\n", b"\r\n") + b"\r\n"),
}


@pytest.mark.parametrize("role", ["base", "fine-tune"])
@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_says_what_is_not_so_is_refused(tmp_path, tally, fault, role):
    base, tuned = small_family(tmp_path)
    file = base / "model.safetensors" if role == "base" else tuned
    HEADERS[fault](file)
    with tally(GROUP, f"header: {fault}", role) as injection:
        injection.outcome = merged_or_refused(base, [tuned.parent], tmp_path / "out", [str(file.parent)])
        assert injection.outcome == REFUSED


def test_the_command_line_refuses_overlapping_offsets(tmp_path, tally, forks):
    base, file = small_family(tmp_path)
    HEADERS["overlapping offsets"](file)
    with tally(GROUP, "header: overlapping offsets", "command line") as injection:
        injection.outcome = merge_refused(forks, tmp_path, base, file.parent, names=[str(file)])


ABSURD = {
    "length of 2^60": lambda file: HEADERS["length of 2^60"](file),
    "a shape of 2^62 bytes": with_header(
        lambda h: h.update(shard("huge", 0, 2**62, shape=[2**60])),
    ),
    "lists in a hundred million bytes": lambda file: write_header(
        file, b'{"a": [' + b"[]," * 33_000_000 + b"[]]}", b""
    ),
    "short texts in a hundred million bytes": lambda file: write_header(
        file, b'{"a": [' + b'"ab",' * 19_000_000 + b'""]}', b""
    ),
}


@pytest.mark.parametrize("fault", ABSURD)
def test_an_absurd_header_takes_no_memory(tmp_path, tally, forks, fault):
    """With 400 MB more than the program itself has, it ends in an error, and not for want of memory."""
    base, file = small_family(tmp_path)
    ABSURD[fault](file)
    with tally(GROUP, f"absurd header: {fault}", "command line") as injection:
        injection.outcome = merge_refused(forks, tmp_path, base, file.parent, names=[str(file)], memory=400_000_000)


def test_a_million_tensors_are_refused_in_seconds(tmp_path, tally, forks):
    base, file = small_family(tmp_path)
    entries = ",".join(
        f'"layers.{number}.w":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * number},{4 * number + 4}]}}'
        for number in range(1_000_000)
    )
    write_header(file, b"{" + entries.encode() + b"}", bytes(4_000_000))
    assert 60_000_000 < file.stat().st_size < 100_000_000
    with tally(GROUP, "a million tensors", "command line") as injection:
        begun = time.monotonic()
        names = [str(file), f"more than {MOST_TENSORS}"]
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "plan", base, file.parent, names=names, memory=1_200_000_000
        )
        assert time.monotonic() - begun < 60


def test_tensors_beyond_the_most_are_counted_over_all_shards(tmp_path, tally, monkeypatch):
    monkeypatch.setattr("superpose.checkpoints.folder.MOST_TENSORS", 5)
    base = save(tmp_path / "base", small_base(), shards=3)
    tuned = save(tmp_path / "tuned", tuned_tensors(small_base(), 1))
    with tally(GROUP, "too many tensors", "shards") as injection:
        injection.outcome = merged_or_refused(base, [tuned], tmp_path / "out", [str(base)])
        assert injection.outcome == REFUSED


def test_comparing_names_takes_time_in_proportion(tmp_path):
    """A model of experts has a hundred thousand tensors; their square would be minutes."""
    headers = {
        f"layers.{number}.w": TensorHeader(f"layers.{number}.w", "F32", (1,), tmp_path) for number in range(20_000)
    }
    models = [Checkpoint(name, tmp_path, "", headers, {}, {}, ()) for name in ("base", "tuned")]
    begun = time.process_time()
    found = align(*models, dict.fromkeys(headers, Kind.LINEAR), tied={}, dropped=lambda _: False)
    assert len(found.sources) == 20_000
    assert time.process_time() - begun < 5
