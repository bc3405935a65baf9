"""What evaluators that run a model in memory share: a language model, scores that are numbers, facts about rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from superpose.errors import SuperposeError
from superpose.evaluators.registry import Report
from superpose.inference import Batch, Example, LiveModel, Rows, TaskData, batches, load_model


def load_language_model(model: str, task: TaskData, device: torch.device) -> LiveModel:
    """Return a model that answers with tokens.

    Args:
        model: folder, hub id, or MODEL+ADAPTER.
        task: which columns it reads.
        device: where it goes.

    Returns:
        The model.

    Raises:
        SuperposeError: there is no such model, or it is no language model.
    """
    live = load_model(model, task, device)
    if live.answers != "tokens":
        mend = "give a causal or encoder-decoder model, or use the evaluator classify"
        raise SuperposeError(f"no language model: it answers with {live.answers}", where=model, mend=mend)
    return live


def tokenizer_of(live: LiveModel, model: str) -> Any:
    """Return a language model's tokenizer; an error where its loader gave none."""
    if live.tokenizer is None:
        mend = "let the loader set LiveModel.tokenizer"
        raise SuperposeError("the model has no tokenizer to read other texts with", where=model, mend=mend)
    return live.tokenizer


def scored(
    live: LiveModel, examples: Sequence[Example], size: int, device: torch.device, report: Report
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield every batch of examples with its scores, on the device.

    Args:
        live: the model.
        examples: what it reads.
        size: most examples of a batch.
        device: of the model.
        report: called after each batch.

    Yields:
        The batch, and scores before the softmax, (examples, positions, classes).

    Raises:
        SuperposeError: an example is longer than the model can read, or a score is no number.
    """
    _check_lengths(live, examples)
    done = 0
    for batch in batches(examples, size):
        here = batch.to(device)
        with torch.inference_mode():
            scores = live.scores(here)
        if not torch.isfinite(scores).all():
            mend = "look for NaN and huge values in the model's tensors"
            raise SuperposeError("the model answers with NaN or infinite scores", mend=mend)
        yield here, scores
        done += len(batch)
        report(done, len(examples))


def row_facts(rows: Rows) -> dict[str, Any]:
    """Return what the record says of the rows that were read."""
    return {"rows": len(rows.rows), "rows_in_data": rows.total, "digest": rows.digest}


def positions_of(live: LiveModel) -> int | None:
    """Return how many positions a model knows, if its configuration limits them."""
    config = getattr(live.module, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _check_lengths(live: LiveModel, examples: Sequence[Example]) -> None:
    most = positions_of(live)
    longest = max((len(ids) for e in examples if (ids := e.inputs.get("input_ids")) is not None), default=0)
    if most is not None and longest > most:
        what = f"a text has {longest} tokens, and the model knows {most} positions"
        raise SuperposeError(what, where="max_length", mend=f"cut the texts: --max-length {most}")
