"""How near generated texts come to references: BLEU, TER, NIST, ROUGE-L, CIDEr, METEOR, over a whole corpus.

Each function takes the texts and, for each, one reference or more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superpose.errors import SuperposeError, nearest
from superpose.evaluators.packages import the_package
from superpose.evaluators.registry import Better

Texts = Sequence[str]
References = Sequence[Sequence[str]]


def bleu(texts: Texts, references: References) -> float:
    """Return corpus BLEU by sacrebleu, 0 to 100: cased, 13a tokens, up to 4-grams, exponential smoothing."""
    metric = the_package("sacrebleu", extra="nlg", what="BLEU").BLEU()
    return float(metric.corpus_score(list(texts), _streams(references)).score)


def ter(texts: Texts, references: References) -> float:
    """Return the translation edit rate by sacrebleu, in percent of the references' words; 0 is best."""
    metric = the_package("sacrebleu", extra="nlg", what="TER").TER()
    return float(metric.corpus_score(list(texts), _streams(references)).score)


def nist(texts: Texts, references: References) -> float:
    """Return corpus NIST by nltk: cased, 13a tokens, up to 5-grams, or the longest text's where that is shorter."""
    corpus_nist = the_package("nltk.translate.nist_score", extra="nlg", what="NIST").corpus_nist
    found = [_words(text) for text in texts]
    longest = min(5, max(map(len, found), default=0))
    if not longest:
        return 0.0
    return float(corpus_nist([[_words(text) for text in each] for each in references], found, longest))


def rouge_l(texts: Texts, references: References) -> float:
    """Return ROUGE-L by rouge-score, 0 to 1: F1 of the longest common subsequence, the best reference's, averaged."""
    scorer = the_package("rouge_score.rouge_scorer", extra="nlg", what="ROUGE-L").RougeScorer(["rougeL"])
    scores = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in each)
        for text, each in zip(texts, references, strict=True)
    ]
    return sum(scores) / len(scores)


def cider(texts: Texts, references: References) -> float:
    """Return CIDEr-D by pycocoevalcap, 0 to 10: 13a tokens in lower case."""
    if len(texts) < 2:
        mend = "give two prompts or more, or leave cider out"
        raise SuperposeError("CIDEr weighs words by how many prompts have them", where="metrics", mend=mend)
    metric = the_package("pycocoevalcap.cider.cider", extra="nlg", what="CIDEr").Cider()
    score, _ = metric.compute_score(*_by_number(texts, references, lambda text: " ".join(_words(text.lower()))))
    return float(score)


def meteor(texts: Texts, references: References) -> float:
    """Return METEOR 1.5 by the program in pycocoevalcap, 0 to 1: English, normalised; needs Java and 2 GB."""
    METRICS["meteor"].check()
    wanted, found = _by_number(texts, references, lambda text: " ".join(text.replace("|||", " ").split()))
    metric = the_package("pycocoevalcap.meteor.meteor", extra="nlg", what="METEOR").Meteor()
    try:
        score, _ = metric.compute_score(wanted, found)
    except (OSError, ValueError) as error:  # the program ended, or answered with what is no number
        mend = "check that java runs and has 2 GB of memory"
        raise SuperposeError(f"METEOR's program failed: {error}", where="metrics", mend=mend) from error
    finally:
        # Ended by the library when the object goes; its pipes would stay open.
        metric.meteor_p.kill()
        metric.meteor_p.communicate()
    return float(score)


@dataclass(frozen=True)
class TextMetric:
    """A metric, which way it is better, and the module that computes it."""

    measure: Callable[[Texts, References], float]
    better: Better
    module: str
    program: str = ""

    def check(self) -> None:
        """Raise what is missing for it: it is told before a model writes for hours."""
        the_package(self.module, extra="nlg", what=f"the metric {self.measure.__name__}")
        if self.program and shutil.which(self.program) is None:
            mend = f"install it (Debian: apt-get install default-jre-headless), or leave {self.measure.__name__} out"
            raise SuperposeError(
                f"{self.measure.__name__} needs the program {self.program}", where="metrics", mend=mend
            )


METRICS: Mapping[str, TextMetric] = {
    "bleu": TextMetric(bleu, "higher", "sacrebleu"),
    "ter": TextMetric(ter, "lower", "sacrebleu"),
    "nist": TextMetric(nist, "higher", "nltk.translate.nist_score"),
    "rouge_l": TextMetric(rouge_l, "higher", "rouge_score.rouge_scorer"),
    "cider": TextMetric(cider, "higher", "pycocoevalcap.cider.cider"),
    "meteor": TextMetric(meteor, "higher", "pycocoevalcap.meteor.meteor", "java"),
}
"""The metrics by name."""


def chosen_metrics(names: str) -> list[str]:
    """Return the metrics that a list with commas names.

    Args:
        names: the list.

    Returns:
        The names, each once.

    Raises:
        SuperposeError: a metric is unknown, or none is named.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise SuperposeError("no metric is named", where="metrics", mend=f"name some of {', '.join(METRICS)}")
    for name in chosen:
        if name not in METRICS:
            raise SuperposeError(f"no metric is named '{name}'", where="metrics", mend=nearest(name, METRICS))
    return chosen


def _streams(references: References) -> list[list[str | None]]:
    """Return the first reference of every text, the second, ...: None where a text has fewer."""
    most = max(map(len, references))
    return [[each[place] if place < len(each) else None for each in references] for place in range(most)]


def _words(text: str) -> list[str]:
    tokenizer = the_package("sacrebleu.tokenizers.tokenizer_13a", extra="nlg", what="the metric").Tokenizer13a()
    return tokenizer(text).split()


def _by_number(texts: Texts, references: References, clean: Callable[[str], str]) -> tuple[Any, Any]:
    wanted = {number: [clean(text) for text in each] for number, each in enumerate(references)}
    return wanted, {number: [clean(text)] for number, text in enumerate(texts)}
