"""The choices of questions as what a model reads: each text once, and the tokens that are asked for in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from superpose.errors import SuperposeError
from superpose.evaluators.templates import Asked
from superpose.inference import Example, LiveModel
from superpose.inference.encoders import decoder_inputs


@dataclass(frozen=True)
class Reading:
    """How prompts and choices become tokens.

    Args:
        tokenizer: of the model.
        live: the model.
        most: tokens that are read.
        delimiter: between prompt and choice, for causal models.
        end_token: "yes", "no" or "auto": whether a choice ends with the end-of-text token.
    """

    tokenizer: Any
    live: LiveModel
    most: int
    delimiter: str
    end_token: str


@dataclass
class Requests:
    """Examples to be read, each once, and which tokens are asked for in them.

    Args:
        examples: what is read.
        asked: for each example: (question, choice, first position, tokens).
        cut: prompts that were too long.
    """

    examples: list[Example] = field(default_factory=list)
    asked: list[list[tuple[int, int, int, list[int]]]] = field(default_factory=list)
    cut: int = 0

    def add(self, key: dict[tuple, int], inputs: dict[str, list[int]], asked: tuple[int, int, int, list[int]]) -> None:
        """Ask for tokens; what reads the same as an example before it, such as choices of one token, is read once."""
        known = tuple((name, *ids) for name, ids in inputs.items())
        if known not in key:
            key[known] = len(self.examples)
            tensors = {name: torch.tensor(ids) for name, ids in inputs.items()}
            tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
            self.examples.append(Example(tensors, None, sum(len(ids) for ids in inputs.values())))
            self.asked.append([])
        self.asked[key[known]].append(asked)


def requests_for(questions: Sequence[Asked], reading: Reading, where: str) -> Requests:
    """Return what a model has to read to score every choice of every question.

    Args:
        questions: prompts and choices.
        reading: how they become tokens.
        where: the data and the template, for errors.

    Returns:
        The requests.

    Raises:
        SuperposeError: a choice has no tokens, or more than are read.
    """
    requests, known = Requests(), {}
    both = bool(getattr(getattr(reading.live.module, "config", None), "is_encoder_decoder", False))
    for number, question in enumerate(questions):
        cut = False
        for choice, text in enumerate(question.choices):
            encoded = (_encoder_decoder if both else _causal)(question.prompt, text, reading)
            if not encoded.wanted or encoded.start < 0:
                what = f"choice {text!r} has {len(encoded.wanted)} tokens, of {reading.most} that are read"
                raise SuperposeError(what, where=where, mend="mend the choice, or raise --max-length")
            cut = cut or encoded.cut
            requests.add(known, encoded.inputs, (number, choice, encoded.start, encoded.wanted))
        requests.cut += cut
    return requests


@dataclass(frozen=True)
class _Encoded:
    """What is read; the position that answers with the choice's first token; its tokens; whether the prompt was cut."""

    inputs: dict[str, list[int]]
    start: int
    wanted: list[int]
    cut: bool


def _causal(prompt: str, choice: str, reading: Reading) -> _Encoded:
    # The choice's tokens are those that come on top of the prompt's: where words begin with their space,
    # " yes" is one token, and "yes" after a space is another.
    known = len(_open_ended(reading.tokenizer, prompt))
    whole = _open_ended(reading.tokenizer, f"{prompt}{reading.delimiter}{choice}")
    read, wanted = whole[:known], whole[known:]
    if wanted and reading.end_token == "yes":
        wanted.append(_end(reading.tokenizer))
    room = max(reading.most - len(wanted) + 1, 0)  # the last token is asked for, not read
    kept = read[len(read) - min(room, len(read)) :]
    return _Encoded({"input_ids": kept + wanted[:-1]}, len(kept) - 1, wanted, len(kept) < len(read))


def _encoder_decoder(prompt: str, choice: str, reading: Reading) -> _Encoded:
    tokenizer, most = reading.tokenizer, reading.most
    whole = tokenizer(prompt)["input_ids"]
    read = whole if len(whole) <= most else tokenizer(prompt, truncation=True, max_length=most)["input_ids"]
    wanted = list(tokenizer(text_target=choice)["input_ids"])
    if reading.end_token == "no" and wanted and wanted[-1] == tokenizer.eos_token_id:
        wanted.pop()
    shifted = decoder_inputs(reading.live.module, torch.tensor(wanted)).tolist() if wanted else []
    return _Encoded({"input_ids": read, "decoder_input_ids": shifted}, 0, wanted, len(read) < len(whole))


def _open_ended(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _end(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        mend = "choose --end-token no"
        raise SuperposeError("the tokenizer has no end-of-text token", where="end_token=yes", mend=mend)
    return tokenizer.eos_token_id
