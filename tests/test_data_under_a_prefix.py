"""Fine-tunes saved under a head, their names prefixed, of a base that is a body: the usual classifiers of an encoder.

Statistics and task models are those of the fine-tune's files, the merged tensors have the base's names.
"""

from pathlib import Path

import pytest
import torch
from evaluators.tiny_models import word_tokenizer
from families import load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import classified, make_bert
from transformers import AutoModel

import superpose
from superpose.checkpoints.statistics_files import open_statistics
from superpose.reading import read_tensor

DROP = [{"match": "classifier.*", "drop": True}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A body, two classifiers of it, and rows for each."""
    root = tmp_path_factory.mktemp("prefixed")
    whole = make_bert(root / "whole")
    body = AutoModel.from_pretrained(whole)
    body.save_pretrained(root / "base")
    word_tokenizer().save_pretrained(root / "base")
    entries = []
    for seed, name in enumerate(("one", "two")):
        folder = make_bert(root / name)
        tensors = load(folder)
        draw = torch.Generator().manual_seed(seed)
        noise = {key: 0.05 * torch.randn(tensor.shape, generator=draw) for key, tensor in tensors.items()}

        moved = {key: tensor + noise[key] for key, tensor in tensors.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
        data = classified(root / f"{name}.jsonl", 12, seed=seed)
        entries.append({"path": str(folder), "name": name, "task": {"data": str(data), "label": "label"}})
    return root, entries


def recipe(models, method, entries, **options):
    return {"base": str(models[0] / "base"), "models": entries, "method": method, "options": options, "rules": DROP}


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_statistics_are_found_under_the_names_of_the_fine_tune(models, tmp_path, method, kind):
    root, entries = models
    told, statistics = [], []
    for entry in entries:
        file = tmp_path / f"{entry['name']}.safetensors"
        superpose.compute_statistics(kind, entry["path"], entry["task"], file, threads=1)
        told.append({"path": entry["path"], "name": entry["name"], "statistics": str(file)})
        statistics.append({name.removeprefix("bert."): tensor for name, tensor in _all(file).items()})
    superpose.merge(recipe(models, method, told), tmp_path / "out")
    names = load(root / "base")
    tuned = [{name: load(Path(entry["path"]))[f"bert.{name}"] for name in names} for entry in entries]
    # Norms of Fisher information are over the merged tensors, without the heads.
    inside = [{name: tensor for name, tensor in known.items() if name in names} for known in statistics]
    expected = superpose.merge_tensors(names, tuned, method, statistics=inside, names=["one", "two"])
    assert {name: tensor.tolist() for name, tensor in load(tmp_path / "out").items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }


def _all(file):
    """Return the tensors of a file of statistics, those that maps share under each name."""

    kind = "gram" if _is_gram(file) else "fisher"
    return {name: read_tensor(header) for name, header in open_statistics(file, kind, "test").tensors.items()}


def _is_gram(file):

    with safe_open(str(file), framework="pt") as opened:
        return '"statistics": "gram"' in opened.metadata()["superpose"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adamerging", {"steps": 3, "learning_rate": 0.05}),
        ("localize_and_stitch", {"masks": "learned", "epochs": 2, "initial_density": 0.3}),
        ("lorahub", {"evaluations": 6}),
    ],
)
def test_what_is_learned_reaches_every_tensor(models, tmp_path, method, options):
    record = superpose.merge(recipe(models, method, models[1], **options), tmp_path / "out")
    assert all("learned" not in warning or "learns first" in warning for warning in record.warnings)
    merged, base = load_file(tmp_path / "out" / "model.safetensors"), load(models[0] / "base")
    assert merged.keys() == base.keys()
    if method == "adamerging":
        learned = load_file(tmp_path / "out" / "learned.safetensors")
        # Tensors that predictions depend on have left the coefficients that they began with.
        moved = [name for name, row in learned.items() if bool((row - 0.3).abs().max() > 1e-6)]
        assert len(moved) > 0.8 * len(learned)
