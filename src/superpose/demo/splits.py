"""Cleaning texts and splitting them, the same way on every machine.

Texts that differ only in case, punctuation or links count as one. Which examples are held out, and which ones
a smaller number takes, is decided by a digest of the text, or of the group it belongs to.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

TEST_FRACTION = 0.25
LINK = re.compile(r"https?:?//\S+|\bt\.co/\S+")


class Example(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


def fraction(text: str) -> float:
    """Return a number in [0, 1) that looks random and depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def in_digest_order(examples: Iterable[Example], purpose: str) -> list[Example]:
    """Return the examples in an order that depends on their texts alone.

    Args:
        examples: the examples.
        purpose: orders for different purposes are unrelated. Were they one, the texts that one choice leaves
            would be those that the next prefers.

    Returns:
        The examples, ordered.
    """
    return sorted(examples, key=lambda example: fraction(f"{purpose}|{example.text}"))


def clean(text: str) -> str:
    """Return the text without links, each run of white space being one space."""
    return re.sub(r"\s+", " ", LINK.sub("", text)).strip()


def sameness(text: str) -> str:
    """Return the words of a text, which alone decide whether it was seen before."""
    return " ".join(re.findall(r"\w+", text.lower()))


def split(groups: Iterable[tuple[Example, str]]) -> tuple[list[Example], list[Example]]:
    """Split examples in those to learn from and those held out, without repeated texts.

    Args:
        groups: each example with the name of its group; a group is never torn apart.

    Returns:
        The examples to learn from, and those held out.
    """
    seen: set[str] = set()
    learnt, scored = [], []
    for example, group in groups:
        words = sameness(example.text)
        if words and words not in seen:
            seen.add(words)
            (scored if fraction(f"split|{group}") < TEST_FRACTION else learnt).append(example)
    return learnt, scored


def balanced(examples: Iterable[Example]) -> list[Example]:
    """Return as many examples of each class as the rarest has."""
    examples = list(examples)
    rarest = min(Counter(example.label for example in examples).values())
    taken: Counter[str] = Counter()
    kept = []
    for example in in_digest_order(examples, "balance"):
        taken[example.label] += 1
        if taken[example.label] <= rarest:
            kept.append(example)
    return kept
