"""Metrics of generated text against values that were worked out by hand, or published."""

from __future__ import annotations

import math
import shutil
import subprocess

import pytest

from superpose.errors import SuperposeError
from superpose.evaluators import text_metrics
from superpose.evaluators.text_metrics import bleu, chosen_metrics, cider, meteor, nist, rouge_l, ter

TEXTS = ["the cat sat on the mat", "a dog runs in the park", "hello there you"]
REFERENCES = [["a cat sat", "the cat sat on the mat"], ["a dog runs in the park"], ["hello there you", "hi you"]]
JAVA = shutil.which("java") and not subprocess.run(["java", "-version"], capture_output=True, check=False).returncode


def test_the_references_themselves_are_best():
    assert bleu(TEXTS, REFERENCES) == pytest.approx(100)
    assert ter(TEXTS, REFERENCES) == 0
    assert rouge_l(TEXTS, REFERENCES) == 1
    # Over three prompts no word of the first occurs in the others but "the", and each has one text like it or more.
    assert cider(TEXTS, [[text] for text in TEXTS]) > 5


def test_what_has_nothing_in_common_is_worst():
    texts, references = ["x x x x x"] * 2, [["a b c d e"], ["f g h i j"]]
    assert bleu(texts, references) < 10  # smoothing leaves a little
    assert ter(texts, references) == 100
    assert [metric(texts, references) for metric in (nist, rouge_l, cider)] == [0, 0, 0]


def test_bleu_by_hand():
    # 5 words against 6: matches of 1 to 4 words 5/5, 4/4, 3/3, 2/2; the brevity penalty is exp(1 - 6/5).
    assert bleu(["the cat sat on the"], [["the cat sat on the mat"]]) == pytest.approx(100 * math.exp(-0.2))
    # A second reference of 5 words takes the penalty away.
    assert bleu(["the cat sat on the"], [["the cat sat on the mat", "a b c d e"]]) == pytest.approx(100)
    # Counts are summed over the corpus: 6/7, 4/5, 3/3 and 2/2 n-grams match, 7 words stand against 8.
    found = bleu(["the cat sat on the", "hello you"], [["the cat sat on the mat"], ["hello there"]])
    assert found == pytest.approx(100 * math.exp(1 - 8 / 7) * (6 / 7 * 4 / 5) ** 0.25)


def test_ter_by_hand():
    assert ter(["a b x d"], [["a b c d"]]) == pytest.approx(25)  # one substitution, four words
    assert ter(["c d a b"], [["a b c d"]]) == pytest.approx(25)  # one shift
    assert ter(["a b c d e"], [["a b c d"]]) == pytest.approx(25)  # one deletion
    assert ter(["a b"], [["a b c d", "a b c"]]) == pytest.approx(100 / 3.5)  # the fewest edits, over the mean length


def test_rouge_l_by_hand():
    # The longest common subsequence of "police kill the gunman" and "police killed the gunman" has 3 of 4 words.
    assert rouge_l(["police kill the gunman"], [["police killed the gunman"]]) == pytest.approx(0.75)
    # "the gunman" is 2 of 4 words in order.
    assert rouge_l(["the gunman kill police"], [["police killed the gunman"]]) == pytest.approx(0.5)
    # Precision 1, recall 1/2; and the best of the references counts.
    assert rouge_l(["a b"], [["a b c d"]]) == pytest.approx(2 / 3)
    assert rouge_l(["a b"], [["x y", "a b c d", "b"]]) == pytest.approx(2 / 3)
    assert rouge_l(["a b", "q"], [["a b"], ["r"]]) == pytest.approx(0.5)


def test_nist_as_published():
    # The example that nltk's documentation gives, 3.3709, of papers on BLEU and NIST.
    text = "It is a guide to action which ensures that the military always obeys the commands of the party"
    references = [
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    assert nist([text], [references]) == pytest.approx(3.3709, abs=1e-4)


def test_nist_by_hand():
    # One word of two is right; it occurs once in the references' four words, so it tells log2(4) bits. Its 2-gram has
    # no match. Texts and references have two words each: no penalty.
    assert nist(["a x", "y z"], [["a b"], ["c d"]]) == pytest.approx(math.log2(4) / 4)
    assert nist([""], [["a b"]]) == 0


def cider_d(texts, references):
    """CIDEr-D once more, as the paper has it: clipped cosines of tf-idf n-gram vectors, a Gaussian of the lengths."""

    def grams(text, size):
        words = text.split()
        found = {}
        for place in range(len(words) - size + 1):
            gram = tuple(words[place : place + size])
            found[gram] = found.get(gram, 0) + 1
        return found

    total = 0.0
    for text, each in zip(texts, references, strict=True):
        for size in range(1, 5):
            documents = [{gram for reference in every for gram in grams(reference, size)} for every in references]

            def weigh(text, size=size, documents=documents):
                return {
                    gram: count * math.log(len(texts) / max(1, sum(gram in document for document in documents)))
                    for gram, count in grams(text, size).items()
                }

            own = weigh(text)
            for reference in each:
                other = weigh(reference)
                norm = math.hypot(*own.values(), 0) * math.hypot(*other.values(), 0)
                product = sum(min(own[gram], other[gram]) * other[gram] for gram in own if gram in other)
                length = math.exp(-((len(text.split()) - len(reference.split())) ** 2) / (2 * 6.0**2))
                total += (product / norm if norm else product) * length / len(each) / 4
    return 10 * total / len(texts)


def test_cider_is_its_formula():
    texts = ["the cat sat on a mat", "a dog in the park runs", "hello you there now"]
    assert cider(texts, REFERENCES) == pytest.approx(cider_d(texts, REFERENCES), rel=1e-6)
    assert 0 < cider(texts, REFERENCES) < cider(TEXTS, REFERENCES) < 10


def test_cider_needs_two_prompts():
    with pytest.raises(SuperposeError, match="CIDEr weighs words by how many prompts have them"):
        cider(["a"], [["a"]])


@pytest.mark.slow
@pytest.mark.skipif(not JAVA, reason="METEOR is a Java program, and there is no java that runs")
def test_meteor():
    assert meteor(TEXTS, REFERENCES) == pytest.approx(1.0)
    # An empty text, what would break the program's lines, and a stem, for which exact matches alone are not enough.
    texts, references = ["", "x ||| y", "the dog runs"], [["a b"], ["x\ny", "z"], ["the dog running"]]
    assert 0.5 < meteor(texts, references) < 1


def test_without_java_meteor_is_refused(monkeypatch):
    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: None)
    with pytest.raises(SuperposeError) as raised:
        meteor(["a"], [["a"]])
    assert raised.value.what == "meteor needs the program java"
    assert "default-jre-headless" in raised.value.mend


@pytest.mark.parametrize(
    ("name", "module"),
    [("bleu", "sacrebleu"), ("nist", "nltk"), ("rouge_l", "rouge_score"), ("cider", "pycocoevalcap")],
)
def test_a_missing_package_is_named_with_its_extra(name, module, monkeypatch):
    import sys

    for loaded in [known for known in sys.modules if known.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SuperposeError) as raised:
        text_metrics.METRICS[name].check()
    assert raised.value.what == f"the metric {name} needs {module}, which is not installed"
    assert raised.value.mend == "pip install 'superpose[nlg]'"


def test_metrics_are_chosen_by_name():
    assert chosen_metrics("bleu, ter,bleu") == ["bleu", "ter"]
    with pytest.raises(SuperposeError, match="no metric is named 'rouge'") as raised:
        chosen_metrics("rouge")
    assert raised.value.mend.startswith("nearest match is 'rouge_l'")
    with pytest.raises(SuperposeError, match="no metric is named"):
        chosen_metrics(" ,")
