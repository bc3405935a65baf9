"""Accuracy and macro-F1 of a classifier on labelled texts, pairs of texts, or images.

The classifier is a folder with a classification head, an encoder with a linear head of its own (`--head`, `--pooling`),
or what a loader makes. Nothing is padded. Macro-F1 is the unweighted mean of F1 over the classes that occur among the
labels or the predictions; a class that is never predicted, or never right, counts as 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from superpose.errors import SuperposeError
from superpose.evaluators.live import row_facts, scored
from superpose.evaluators.registry import Measured, Report, evaluator
from superpose.inference import TaskData, load_model, read_rows


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
    """It has no options beyond the data's."""


@evaluator(
    "classify",
    options=ClassifyOptions,
    better={"accuracy": "higher", "macro_f1": "higher"},
    reads=("text", "pair", "label", "image", "head", "pooling"),
    needs=("label",),
    packages=("transformers", "datasets"),
)
def classify(model: str, options: ClassifyOptions, *, task: TaskData, device: torch.device, report: Report) -> Measured:
    """Return accuracy and macro-F1.

    Args:
        model: folder, hub id, or MODEL+ADAPTER.
        options: none.
        task: the data and its columns.
        device: where the model goes.
        report: called with the examples done, and all.

    Returns:
        The metrics.

    Raises:
        SuperposeError: the model is no classifier, or a row or label is not as it should be.
    """
    del options
    rows = read_rows(task, list(task.columns().values()))  # before a model that may take minutes to load
    live = load_model(model, task, device)
    if live.answers != "classes":
        mend = "give a model with a classification head, or its body with --head FILE"
        raise SuperposeError(f"no classifier: it answers with {live.answers}", where=model, mend=mend)
    examples = [live.encode(row) for row in rows.rows]
    predicted = [0] * len(examples)
    for batch, scores in scored(live, examples, task.batch_size, device, report):
        for number, found in zip(batch.numbers, scores[:, 0].argmax(dim=-1).tolist(), strict=True):
            predicted[number] = found
    labels = [int(example.target[0]) for example in examples if example.target is not None]
    known = {"classes": list(live.classes)} if live.classes else {}
    facts = {**row_facts(rows), **known, "tokens": sum(example.tokens for example in examples)}
    return Measured({"accuracy": accuracy(labels, predicted), "macro_f1": macro_f1(labels, predicted)}, facts)


def accuracy(labels: Sequence[int], predicted: Sequence[int]) -> float:
    """Return the share of predictions that are right."""
    return sum(label == found for label, found in zip(labels, predicted, strict=True)) / len(labels)


def macro_f1(labels: Sequence[int], predicted: Sequence[int]) -> float:
    """Return the mean F1 over the classes that occur among labels or predictions."""
    there, named = Counter(labels), Counter(predicted)
    right = Counter(label for label, found in zip(labels, predicted, strict=True) if label == found)
    classes = there.keys() | named.keys()
    # F1 = 2 right / (labelled + predicted), which is the harmonic mean of precision and recall.
    return sum(2 * right[c] / (there[c] + named[c]) for c in sorted(classes)) / len(classes)
