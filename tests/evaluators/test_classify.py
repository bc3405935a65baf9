"""Accuracy and macro-F1 against plain loops over transformers, with padded batches."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import make_bert, some_texts, write_rows
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import superpose
from superpose.errors import SuperposeError
from superpose.evaluators.classify import macro_f1

COUNT = 60


@pytest.fixture(scope="module")
def rows():
    draw = random.Random(1)
    pairs = some_texts(COUNT, seed=2)
    return [
        {"text": text, "other": other, "label": draw.randrange(3)}
        for text, other in zip(some_texts(COUNT), pairs, strict=True)
    ]


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def plain_predictions(folder, rows, *, pair=False):
    """What a script with nothing but transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for start in range(0, len(rows), 7):
        part = rows[start : start + 7]
        others = [row["other"] for row in part] if pair else None
        inputs = tokenizer([row["text"] for row in part], others, padding=True, return_tensors="pt")
        with torch.no_grad():
            found += model(**inputs).logits.argmax(dim=-1).tolist()
    return found


def plain_scores(labels, predicted):
    """Accuracy, and macro-F1 from precision and recall."""
    scores = []
    for one in sorted({*labels, *predicted}):
        hits = sum(a == b == one for a, b in zip(labels, predicted, strict=True))
        precision = hits / predicted.count(one) if one in predicted else 0.0
        recall = hits / labels.count(one) if one in labels else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    right = sum(a == b for a, b in zip(labels, predicted, strict=True))
    return right / len(labels), sum(scores) / len(scores)


@pytest.mark.parametrize("pair", [False, True], ids=["text", "pair"])
def test_a_classifier_scores_what_a_plain_script_says(bert, rows, data, pair):
    found = superpose.evaluate(
        bert, "classify", data={"data": data, "label": "label", "batch_size": 5, **({"pair": "other"} if pair else {})}
    )
    predicted = plain_predictions(bert, rows, pair=pair)
    accuracy, f1 = plain_scores([row["label"] for row in rows], predicted)
    assert len(set(predicted)) > 1
    assert found.metrics["accuracy"] == accuracy
    assert found.metrics["macro_f1"] == pytest.approx(f1, abs=1e-12)
    assert found.better == {"accuracy": "higher", "macro_f1": "higher"}
    assert found.facts["rows"] == COUNT
    assert found.facts["data"]["label"] == "label"
    assert len(found.facts["digest"]) == 64


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_an_encoder_with_a_head_scores_what_a_plain_script_says(bert, rows, data, tmp_path, pooling):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    body = AutoModel.from_pretrained(bert).eval()
    body.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    weight, bias = torch.randn(3, 32), torch.randn(3)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    task = {"data": data, "label": "label", "head": "{model}/../head.safetensors", "pooling": pooling}
    found = superpose.evaluate(tmp_path / "body", "classify", data=task)
    predicted = []
    for start in range(0, COUNT, 8):
        inputs = tokenizer([row["text"] for row in rows[start : start + 8]], padding=True, return_tensors="pt")
        with torch.no_grad():
            states = body(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].float()
        features = (states * mask).sum(dim=1) / mask.sum(dim=1) if pooling == "mean" else states[:, 0]
        predicted += (features @ weight.T + bias).argmax(dim=-1).tolist()
    accuracy, f1 = plain_scores([row["label"] for row in rows], predicted)
    assert found.metrics["accuracy"] == accuracy
    assert found.metrics["macro_f1"] == pytest.approx(f1, abs=1e-12)


def test_labels_may_be_names(tmp_path, rows):
    names = {0: "bad", 1: "fair", 2: "good"}
    folder = make_bert(tmp_path / "named", id2label=names, label2id={name: n for n, name in names.items()})
    numbered = write_rows(tmp_path / "numbered.jsonl", rows)
    named = write_rows(tmp_path / "named.jsonl", [{**row, "label": names[row["label"]]} for row in rows])
    first = superpose.evaluate(folder, "classify", data={"data": numbered, "label": "label"})
    second = superpose.evaluate(folder, "classify", data={"data": named, "label": "label"})
    assert first.metrics == second.metrics
    assert second.facts["classes"] == ["bad", "fair", "good"]


def test_images_are_classified(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=2, initializer_range=1.0,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "vit")
    draw, rows, labels, predicted = random.Random(0), [], [], []
    for number in range(10):
        image = Image.new("RGB", (16, 16), tuple(draw.randrange(256) for _ in range(3)))
        image.save(tmp_path / f"{number}.png")
        with torch.no_grad():
            scores = model(**processor(images=image, return_tensors="pt")).logits
        predicted.append(int(scores.argmax()))
        labels.append(draw.randrange(2))
        rows.append({"file": f"{number}.png", "class": labels[-1]})
    data = {"data": write_rows(tmp_path / "rows.jsonl", rows), "image": "file", "label": "class"}
    found = superpose.evaluate(tmp_path / "vit", "classify", data=data)
    assert found.metrics["accuracy"] == plain_scores(labels, predicted)[0]


def test_macro_f1_counts_the_classes_that_occur():
    # Class 0: precision 1, recall 1/2; class 1: precision 1/2, recall 1; class 2 is predicted, and never right.
    assert macro_f1([0, 0, 1], [0, 1, 1]) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert macro_f1([0, 0, 1], [0, 2, 1]) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert macro_f1([4, 4], [4, 4]) == 1.0


def test_a_wrong_label_is_named_with_its_line(bert, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "red", "label": 0}, {"text": "red", "label": 3}])
    with pytest.raises(SuperposeError) as raised:
        superpose.evaluate(bert, "classify", data={"data": data, "label": "label"})
    assert raised.value.what == "label 3 in column 'label' is no class; the model has 3 classes: 0 to 2"
    assert raised.value.where == f"{data}, line 2"


def test_a_missing_column_is_named_with_the_nearest(bert, data):
    with pytest.raises(SuperposeError) as raised:
        superpose.evaluate(bert, "classify", data={"data": data, "label": "lable"})
    assert raised.value.what == "there is no column 'lable'"
    assert raised.value.where == f"{data}, line 1"
    assert raised.value.mend.startswith("nearest match is 'label'")


def test_a_language_model_is_no_classifier(llama, data):
    with pytest.raises(SuperposeError, match="no classifier: it answers with tokens"):
        superpose.evaluate(llama, "classify", data={"data": data, "label": "label"})


def test_a_broken_model_is_told_from_a_bad_one(tmp_path, data, bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    model.classifier.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SuperposeError, match="NaN or infinite scores"):
        superpose.evaluate(tmp_path, "classify", data={"data": data, "label": "label"})


def test_a_loader_makes_the_model(bert, rows, data, tmp_path):
    (tmp_path / "always.py").write_text(
        "import torch\n"
        "from superpose.inference import Example, LiveModel\n"
        "def load(folder, task):\n"
        "    module = torch.nn.Linear(1, 3)\n"
        "    encode = lambda row: Example({'x': torch.ones(1)}, torch.tensor([row.values[task.label]]))\n"
        "    return LiveModel(module, encode, lambda inputs: torch.eye(3)[[1] * len(inputs['x'])])\n"
    )
    task = {"data": data, "label": "label", "loader": f"{tmp_path / 'always.py'}:load"}
    found = superpose.evaluate(bert, "classify", data=task)
    assert found.metrics["accuracy"] == sum(row["label"] == 1 for row in rows) / COUNT
