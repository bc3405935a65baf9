"""Multiple choice by rank classification: the choice that the model finds likeliest after the prompt.

score(choice) = the sum over the choice's tokens of log p(token | prompt, tokens before it), not divided by its length;
the highest wins, of equal ones the first. Accuracy is given for each prompt template, and averaged over them.

Templates are a YAML file (`--templates`): a list of {name, prompt, choices or choices_column, label}, Jinja2 in a
sandbox, the row's columns its variables. Outer whitespace of prompts and choices does not count; between them stands
`--delimiter`. An encoder-decoder reads the prompt and is asked for the choice, with its end-of-text token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from superpose.errors import SuperposeError
from superpose.evaluators.choices import Reading, Requests, requests_for
from superpose.evaluators.live import load_language_model, row_facts, scored, tokenizer_of
from superpose.evaluators.registry import Better, Measured, Report, evaluator
from superpose.evaluators.templates import Asked, read_templates
from superpose.inference import LiveModel, TaskData, read_rows


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """How questions are put."""

    templates: str = ""
    """YAML file of prompt templates."""
    delimiter: str = " "
    """Between prompt and choice, for causal models."""
    end_token: Literal["auto", "yes", "no"] = "auto"
    """Whether a choice ends with the end-of-text token; auto: for encoder-decoders."""


@evaluator(
    "rank",
    options=RankOptions,
    reads=("label",),
    data_defaults={"max_length": 512, "batch_size": 8},
    packages=("transformers", "datasets", "jinja2"),
)
def rank(model: str, options: RankOptions, *, task: TaskData, device: torch.device, report: Report) -> Measured:
    """Return the accuracy by rank classification, for each template and on average.

    Args:
        model: folder, hub id, or MODEL+ADAPTER.
        options: the templates, and how questions are put.
        task: the data.
        device: where the model goes.
        report: called with how much is done, and of how much.

    Returns:
        The metrics.

    Raises:
        SuperposeError: it is no language model, or a template, a row or a label is not as it should be.
    """
    if not options.templates:
        mend = "name a YAML file: --templates FILE"
        raise SuperposeError("rank asks by templates, and none are named", where="evaluator rank", mend=mend)
    templates, digest = read_templates(Path(options.templates).expanduser(), task.label)
    rows = read_rows(task, sorted(frozenset().union(*(template.columns for template in templates))))
    # An encoder-decoder wants a target's column to be named, though no row is read by it here.
    live = load_language_model(model, task.model_copy(update={"target": "choice"}), device)
    reading = Reading(tokenizer_of(live, model), live, task.max_length, options.delimiter, options.end_token)
    metrics, cut = {}, 0
    for place, template in enumerate(templates):
        questions = [template.ask(row) for row in rows.rows]
        where = f"{task.data}, template {template.name}"
        requests = requests_for(questions, reading, where)
        before = place * len(rows.rows)

        def shown(done: int, total: int, before: int = before) -> None:
            report(before + done * len(rows.rows) // total, len(templates) * len(rows.rows))

        scores = _scores(questions, requests, live, task.batch_size, device, shown)
        best = [max(range(len(each)), key=each.__getitem__) for each in scores]
        right = sum(found == question.right for found, question in zip(best, questions, strict=True))
        metrics[f"accuracy/{template.name}"] = right / len(questions)
        cut += requests.cut
    metrics = {"accuracy": math.fsum(metrics.values()) / len(metrics), **metrics}
    facts = {**row_facts(rows), "templates": len(templates), "templates_digest": digest, "prompts_cut": cut}
    better: dict[str, Better] = dict.fromkeys(metrics, "higher")
    return Measured(metrics, facts, better)


def _scores(
    questions: Sequence[Asked], requests: Requests, live: LiveModel, size: int, device: torch.device, report: Report
) -> list[list[float]]:
    """Return each choice's summed log-probability."""
    found = [[0.0] * len(question.choices) for question in questions]
    for batch, scores in scored(live, requests.examples, size, device, report):
        for number, answered in zip(batch.numbers, scores, strict=True):
            for question, choice, start, wanted in requests.asked[number]:
                found[question][choice] = _summed(answered[start : start + len(wanted)], wanted)
    return found


def _summed(scores: Tensor, wanted: Sequence[int]) -> float:
    logs = scores.log_softmax(dim=-1)
    return float(logs.gather(1, torch.tensor(wanted, device=logs.device)[:, None]).double().sum())
