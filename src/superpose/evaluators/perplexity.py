"""Perplexity of a language model: how surprised it is, per token, by texts or by the answers to prompts.

nll = the mean over all predicted tokens of -log p(token | tokens before it), in nats; perplexity = exp(nll).

A text is one document, cut to `--max-length` tokens. Its first token has nothing before it and is not predicted, unless
the tokenizer puts a begin-of-text token before it. With `--target` the tokens of that column alone are predicted, given
the text; for an encoder-decoder it is needed. Numbers compare only between models with one tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from superpose.errors import SuperposeError
from superpose.evaluators.live import load_language_model, row_facts, scored
from superpose.evaluators.registry import Measured, Report, evaluator
from superpose.inference import IGNORED, TaskData, read_rows


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """It has no options beyond the data's."""


@evaluator(
    "perplexity",
    options=PerplexityOptions,
    better={"perplexity": "lower", "nll": "lower"},
    reads=("text", "target"),
    # A batch's scores take batch x positions x vocabulary numbers: 0.4 GB for these and 50,000 tokens.
    data_defaults={"max_length": 1024, "batch_size": 2},
    packages=("transformers", "datasets"),
)
def perplexity(
    model: str, options: PerplexityOptions, *, task: TaskData, device: torch.device, report: Report
) -> Measured:
    """Return perplexity, and the negative log-likelihood per token that it comes from.

    Args:
        model: folder, hub id, or MODEL+ADAPTER.
        options: none.
        task: the data and its columns.
        device: where the model goes.
        report: called with the documents done, and all.

    Returns:
        The metrics, and how many tokens were predicted.

    Raises:
        SuperposeError: it is no language model, or no text has a token that is predicted.
    """
    del options
    rows = read_rows(task, list(task.columns().values()))  # before a model that may take minutes to load
    live = load_language_model(model, task, device)
    examples = [live.encode(row) for row in rows.rows]
    count = sum(int((example.target != IGNORED).sum()) for example in examples if example.target is not None)
    if not count:
        mend = "give texts of two tokens or more, or raise --max-length"
        raise SuperposeError("no text has a token that is predicted", where=task.data, mend=mend)
    losses = [0.0] * len(examples)
    for batch, scores in scored(live, examples, task.batch_size, device, report):
        assert batch.targets is not None, "a language model's examples have targets"
        for number, found, wanted in zip(batch.numbers, scores, batch.targets, strict=True):
            each = cross_entropy(found, wanted, ignore_index=IGNORED, reduction="none")
            losses[number] = float(each.double().sum())
    nll = math.fsum(losses) / count
    facts = {**row_facts(rows), "tokens_predicted": count, "tokens_read": sum(example.tokens for example in examples)}
    # math.exp refuses what float64 cannot hold; infinity is then named as what is wrong.
    return Measured({"perplexity": math.exp(nll) if nll < 700 else math.inf, "nll": nll}, facts)
