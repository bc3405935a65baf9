"""Files of torch.save whose pickle or zip is broken, each named; and odd but sound ones, which are read."""

from __future__ import annotations

import random
import zipfile

import pytest
import torch

from faults.damage import MERGED, REFUSED, merged_or_refused, repacked, small_family, with_pickle
from superpose.checkpoints.torch_pickle import FORMAT

GROUP = "Broken inputs"

PICKLES = {
    "nothing": b"",
    "an instruction that is none": b"\x80\x02\xfe.",
    "a text that is cut off": b"\x80\x02X\xff\xff\xff\x7fab.",
    "a call of nothing": b"\x80\x02NNR.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a number as a key": b"\x80\x02}K\x01Ns.",
    "nothing remembered": b"\x80\x02h\x05.",
    "noise": bytes(random.Random(5).randrange(256) for _ in range(200)),
}


@pytest.mark.parametrize("fault", PICKLES)
def test_a_broken_pickle_is_named(tmp_path, tally, fault):
    base, file = small_family(tmp_path, ".bin")
    with_pickle(file, PICKLES[fault])
    with tally(GROUP, f"pickle: {fault}", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file)])
        assert injection.outcome == REFUSED


def test_a_pickle_that_points_at_no_entry_is_named(tmp_path, tally):
    base, file = small_family(tmp_path, ".bin")
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as target:
        for name, content in entries.items():
            if "/data/3" not in name:
                target.writestr(name, content)
    with tally(GROUP, "pickle: an entry is missing", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file)])
        assert injection.outcome == REFUSED


def test_an_entry_shorter_than_its_tensor_is_named(tmp_path, tally):
    base, file = small_family(tmp_path, ".bin")
    repacked(file, lambda name, content: content[: len(content) // 2] if "/data/" in name else content)
    with tally(GROUP, "pickle: entries too short", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file)])
        assert injection.outcome == REFUSED


def test_a_file_with_more_entries_than_a_plain_zip_holds_is_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(3.0)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(66_000):
            archive.writestr(f"pytorch_model/.more/{number}", b"")
    assert b"PK\6\7" in file.read_bytes()
    found = FORMAT.headers(file)
    assert found.problems == ()
    assert torch.equal(FORMAT.open(file).read("a"), torch.arange(3.0))


def test_a_file_without_checksums_is_read(tmp_path, tally):
    config = pytest.importorskip("torch.utils.serialization.config")
    config.save.compute_crc32 = False
    try:
        base, file = small_family(tmp_path, ".bin")
    finally:
        config.save.compute_crc32 = True
    with tally(GROUP, "no checksums", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out")
        assert injection.outcome == MERGED
