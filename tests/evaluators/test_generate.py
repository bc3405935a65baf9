"""Generation: what is written is what transformers writes, and rows of one prompt are its references."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_models import some_texts, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import superpose
from superpose.errors import SuperposeError
from superpose.evaluators.text_metrics import bleu, rouge_l

ROWS = [
    {"text": "1 + 2 =", "target": "#### 3"},
    {"text": "2 + 2 =", "target": ["four", "#### 4"]},
    {"text": "1 + 2 =", "target": "three"},
    {"text": "4 + 4 =", "target": "#### 9"},
]


def test_rows_of_one_prompt_are_its_references(learnt, tmp_path):
    data = {"data": write_rows(tmp_path / "rows.jsonl", ROWS), "target": "target"}
    found = superpose.evaluate(learnt, "generate", data=data, metrics="rouge_l,ter", max_new_tokens=12)
    texts = {sample["prompt"]: sample["text"] for sample in found.facts["samples"]}
    assert texts == {"1 + 2 =": "#### 3", "2 + 2 =": "#### 4", "4 + 4 =": "#### 8"}
    assert (found.facts["rows"], found.facts["prompts"], found.facts["references"]) == (4, 3, 5)
    # rouge-score reads letters and digits alone: 3 and 4 are right, 8 is not 9.
    assert found.metrics["rouge_l"] == pytest.approx(2 / 3)
    assert found.better == {"rouge_l": "higher", "ter": "lower"}


@pytest.mark.parametrize("model", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 4])
def test_texts_are_what_transformers_writes(model, beams, request, tmp_path):
    folder = request.getfixturevalue(model)
    prompts = some_texts(6, longest=4)
    rows = [{"text": prompt, "target": prompt} for prompt in prompts]
    data = {"data": write_rows(tmp_path / "rows.jsonl", rows), "target": "target"}
    found = superpose.evaluate(
        folder, "generate", data=data, num_beams=beams, max_new_tokens=9, no_repeat_ngram_size=3, stop="e"
    )
    kind = AutoModelForCausalLM if model == "llama" else AutoModelForSeq2SeqLM
    plain, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    more = {"length_penalty": 0.8} if beams > 1 else {}
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            written = plain.generate(
                **inputs, max_new_tokens=9, num_beams=beams, do_sample=False, no_repeat_ngram_size=3, **more
            )
        new = written[0, inputs["input_ids"].shape[1] if model == "llama" else 0 :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True).partition("e")[0].strip())
    assert [sample["text"] for sample in found.facts["samples"]] == texts[:3]
    references = [[prompt] for prompt in prompts]
    assert found.metrics == {"bleu": bleu(texts, references), "rouge_l": rouge_l(texts, references)}


def test_the_tokens_that_end_a_text_are_read_from_the_folder(learnt, tmp_path):
    kind, tokenizer = AutoModelForCausalLM.from_pretrained(learnt), AutoTokenizer.from_pretrained(learnt)
    kind.generation_config.eos_token_id = [1, tokenizer("3")["input_ids"][0]]
    kind.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": "1 + 2 = #", "target": "x"}]
    data = {"data": write_rows(tmp_path / "rows.jsonl", rows), "target": "target"}
    found = superpose.evaluate(tmp_path / "model", "generate", data=data, max_new_tokens=12, num_beams=1)
    assert found.facts["samples"][0]["text"] == "### 3"


@pytest.mark.parametrize("target", [3, [], ["a", 1]])
def test_what_is_no_reference_is_named_with_its_line(learnt, tmp_path, target):
    data = write_rows(tmp_path / "rows.jsonl", [ROWS[0], {"text": "a", "target": target}])
    with pytest.raises(SuperposeError) as raised:
        superpose.evaluate(learnt, "generate", data={"data": data, "target": "target"})
    assert raised.value.what == "column 'target' holds neither a text nor a list of texts"
    assert raised.value.where == f"{data}, line 2"


def test_a_missing_package_is_told_before_anything_is_read(learnt, monkeypatch):
    for loaded in [known for known in sys.modules if known.partition(".")[0] == "sacrebleu"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(SuperposeError, match="the metric bleu needs sacrebleu, which is not installed") as raised:
        superpose.evaluate(learnt, "generate", data={"data": "no-such-file.jsonl", "target": "target"})
    assert raised.value.mend == "pip install 'superpose[nlg]'"


def test_a_text_that_the_model_has_no_positions_for_is_refused(learnt, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(SuperposeError, match="a prompt and the text need 607 tokens, and the model knows 512 pos"):
        superpose.evaluate(learnt, "generate", data={"data": data, "target": "target"}, max_new_tokens=600)
