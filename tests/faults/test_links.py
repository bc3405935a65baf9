"""Links in checkpoints: weights are read through them, and nothing else outside of the folder is shown or copied."""

from __future__ import annotations

import json
import shutil

import pytest

import superpose as library
from faults.damage import MERGED, REFUSED, merged_or_refused, small_family
from superpose import SuperposeError

GROUP = "Broken inputs"


def test_weights_through_links_are_read_wherever_they_lie(tmp_path, tally):
    """People link weights into several folders; of what a link leads to, numbers of a sound weight file are read."""
    base, file = small_family(tmp_path)
    (tmp_path / "store").mkdir()
    file.rename(tmp_path / "store" / "weights-of-mine")
    file.symlink_to(tmp_path / "store" / "weights-of-mine")
    with tally(GROUP, "weights through a link") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out")
        assert injection.outcome == MERGED


SECRET = "root:x:0:0:a secret of this machine"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_link_to_a_file_of_the_system_shows_nothing_of_it(tmp_path, tally, name):
    base, file = small_family(tmp_path)
    (tmp_path / "passwd").write_text(SECRET)
    file.unlink()
    (file.parent / name).symlink_to(tmp_path / "passwd")
    with tally(GROUP, "a link to a file of the system", name) as injection:
        with pytest.raises(SuperposeError) as caught:
            library.merge({"base": str(base), "models": [str(file.parent)]}, tmp_path / "out")
        assert "secret" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        injection.outcome = REFUSED


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt"])
def test_nothing_is_copied_through_a_link_out_of_the_folder(tmp_path, tally, name):
    base, file = small_family(tmp_path)
    (tmp_path / "credentials").write_text(json.dumps({"token": SECRET}))
    (base / name).symlink_to(tmp_path / "credentials")
    with tally(GROUP, "a link to credentials", name) as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out")
        assert injection.outcome == (REFUSED if name == "config.json" else MERGED)
        for written in tmp_path.glob("out*/**/*"):
            assert written.is_dir() or SECRET.encode() not in written.read_bytes()


def test_the_hubs_links_are_followed(tmp_path, tally):
    base, file = small_family(tmp_path)
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    shutil.copy(base / "model.safetensors", repository / "blobs" / "1")
    (repository / "blobs" / "2").write_text(json.dumps({"hidden_size": 8}))
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    with tally(GROUP, "links of the hub's cache") as injection:
        injection.outcome = merged_or_refused(snapshot, [file.parent], tmp_path / "out")
        assert injection.outcome == MERGED
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"hidden_size": 8}
