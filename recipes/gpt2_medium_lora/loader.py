"""GPT-2 as the adapters were trained: its end-of-text token stands between a prompt and what is written."""

from __future__ import annotations

from pathlib import Path

from superpose.inference import LiveModel, TaskData, load_model


def load(folder: Path, task: TaskData) -> LiveModel:
    """Return the model with a tokenizer that names no end of text.

    superpose takes an end-of-text token off a prompt, as of a text that tokenizers end by themselves. Here it has been
    written on purpose. What is generated still ends with it: the model's config says so.

    Args:
        folder: of the model.
        task: its columns.

    Returns:
        The model.
    """
    live = load_model(str(folder), task.model_copy(update={"loader": ""}))
    live.tokenizer.eos_token = None
    return live
