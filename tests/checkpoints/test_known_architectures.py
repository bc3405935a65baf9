"""An answer of transformers is kept, and used for the very same question alone."""

import json
import sys

import pytest

from superpose.checkpoints import known_architectures
from superpose.checkpoints.architecture import Architecture, read_architecture

CONFIG = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99,
}  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("SUPERPOSE_NO_CACHE")
    monkeypatch.setenv("SUPERPOSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "architectures"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def ask(folder, config=CONFIG, tensors=40):
    return read_architecture(folder, config, tensors)


def test_the_second_answer_is_the_first_without_transformers(cache, folder, monkeypatch):
    first = ask(folder)
    assert first.kinds
    assert not first.reason
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    assert ask(folder) == first
    assert all(type(kind).__name__ == "Kind" for kind in ask(folder).kinds.values())


def test_another_question_is_asked_anew(cache, folder, monkeypatch):
    ask(folder)
    versions = {"transformers": "0.1", "torch": "0.1"}
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert ask(folder, {**CONFIG, "vocab_size": 98}).reason
    assert ask(folder, tensors=41).reason
    monkeypatch.setattr(known_architectures, "version", versions.__getitem__)
    assert ask(folder).reason


def test_failures_and_versions_under_development_are_not_kept(cache, folder, monkeypatch):
    assert ask(folder, {**CONFIG, "architectures": ["NoSuchModel"]}).reason
    assert not cache.exists()
    monkeypatch.setattr(known_architectures, "version", lambda _: "5.0.0.dev0")
    assert not ask(folder).reason
    assert not cache.exists()


def test_it_can_be_turned_off(cache, folder, monkeypatch):
    monkeypatch.setenv("SUPERPOSE_NO_CACHE", "1")
    ask(folder)
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kinds": {"a": "no kind"}, "groups": {}, "tied": {}}', "\0"])
def test_what_is_damaged_is_asked_anew_and_mended(cache, folder, content):
    first = ask(folder)
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_text(content)
    assert ask(folder) == first
    assert file.read_text() == whole


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(cache, folder):
    cache.parent.write_text("a file where the folder should be")
    assert isinstance(ask(folder), Architecture)
    assert not ask(folder).reason
