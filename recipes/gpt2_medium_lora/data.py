"""The test sets of E2E, DART and WebNLG as prompts and references, worded as the adapters were trained.

A prompt is what is to be told, and GPT-2's separator after it. A row has one reference; rows with one prompt are one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

SEPARATOR = "<|endoftext|>"
FILES = {
    "e2e": "e2e/test.txt",
    "dart": "dart/dart-v1.1.1-full-test.json",
    "webnlg": "webnlg_challenge_2017/test.json",
}
Pairs = Iterator[tuple[str, str]]


def write_rows(name: str, raw: Path, file: Path) -> Path:
    """Write a test set as superpose's `generate` reads it.

    Args:
        name: which of the three.
        raw: its file, as published.
        file: where to.

    Returns:
        The file.
    """
    text = raw.read_text(encoding="utf-8")
    pairs = {"e2e": _e2e, "dart": _dart, "webnlg": _webnlg}[name](text)
    rows = [json.dumps({"text": told + SEPARATOR, "target": wanted}) + "\n" for told, wanted in pairs]
    file.write_text("".join(rows), encoding="utf-8")
    return file


def _e2e(text: str) -> Pairs:
    for line in text.splitlines():
        told, _, wanted = line.strip().partition("||")
        yield told, wanted


def _dart(text: str) -> Pairs:
    for entry in json.loads(text):
        triples = [(subject, relation.lower(), thing) for subject, relation, thing in entry["tripleset"]]
        for sentence in entry["annotations"]:
            yield _as_text(triples), sentence["text"]


def _webnlg(text: str) -> Pairs:
    for number, numbered in enumerate(json.loads(text)["entries"], 1):
        entry = numbered[str(number)]
        triples = [(each["subject"], each["property"], each["object"]) for each in entry["modifiedtripleset"]]
        for sentence in entry["lexicalisations"]:
            if sentence["comment"] == "good":
                yield _as_text(triples), sentence["lex"]


def _as_text(triples: list[tuple[str, str, str]]) -> str:
    return " | ".join(" : ".join(triple) for triple in triples)
