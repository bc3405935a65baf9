"""Perplexity against plain loops over transformers, with padded batches."""

from __future__ import annotations

import math

import adapters
import pytest
import torch
from tiny_models import some_texts, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import superpose
from superpose.errors import SuperposeError

TEXTS = some_texts(24, longest=6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"text": text, "answer": text[::-1]} for text in TEXTS]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def padded(lists, value):
    tensors = [torch.tensor(each) for each in lists]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def plain_nll(logits, labels):
    logs = logits.log_softmax(dim=-1)
    wanted = labels.clamp(min=0)[..., None]
    each = -logs.gather(-1, wanted)[..., 0].double() * (labels >= 0)
    return float(each.sum()) / int((labels >= 0).sum())


def causal_nll(folder, cut=10_000, answers=None):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    read = [tokenizer(text)["input_ids"] for text in TEXTS]
    known = [0] * len(read)
    if answers:
        known = [len(ids) for ids in read]
        read = [
            ids + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
            for ids, answer in zip(read, answers, strict=True)
        ]
    read = [ids[:cut] for ids in read]
    labels = [[-100] * start + ids[start:] for ids, start in zip(read, known, strict=True)]
    ids = padded(read, 0)
    mask = padded([[1] * len(each) for each in read], 0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return plain_nll(logits[:, :-1], padded(labels, -100)[:, 1:])


@pytest.mark.parametrize("cut", [1024, 9])
def test_documents_of_a_causal_model(llama, data, cut):
    found = superpose.evaluate(llama, "perplexity", data={"data": data, "max_length": cut})
    nll = causal_nll(llama, cut)
    assert found.metrics["nll"] == pytest.approx(nll, rel=1e-6)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert found.better == {"perplexity": "lower", "nll": "lower"}
    assert found.facts["tokens_predicted"] == sum(min(len(text), cut) - 1 for text in TEXTS)
    assert found.facts["data"]["max_length"] == cut


def test_answers_of_a_causal_model(llama, data):
    found = superpose.evaluate(llama, "perplexity", data={"data": data, "target": "answer"})
    assert found.metrics["nll"] == pytest.approx(causal_nll(llama, answers=[text[::-1] for text in TEXTS]), rel=1e-6)
    assert found.facts["tokens_predicted"] == sum(len(text) + 1 for text in TEXTS)


def test_answers_of_an_encoder_decoder(t5, data):
    found = superpose.evaluate(t5, "perplexity", data={"data": data, "target": "answer"})
    tokenizer, model = AutoTokenizer.from_pretrained(t5), AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    read = tokenizer(TEXTS, padding=True, return_tensors="pt")
    wanted = tokenizer(text_target=[text[::-1] for text in TEXTS])["input_ids"]
    with torch.no_grad():
        logits = model(
            input_ids=read["input_ids"], attention_mask=read["attention_mask"], labels=padded(wanted, -100)
        ).logits
    assert found.metrics["nll"] == pytest.approx(plain_nll(logits, padded(wanted, -100)), rel=1e-5)


def test_a_model_that_knows_the_texts_is_not_surprised(learnt, tmp_path):
    known = write_rows(tmp_path / "known.jsonl", [{"text": "1 + 2 =", "answer": " #### 3"}])
    other = write_rows(tmp_path / "other.jsonl", [{"text": "1 + 2 =", "answer": " zzzz"}])
    first, second = (
        superpose.evaluate(learnt, "perplexity", data={"data": data, "target": "answer"}) for data in (known, other)
    )
    assert 1 < first.metrics["perplexity"] < 1.1
    assert second.metrics["perplexity"] > 10


def test_an_adapter_on_its_model_is_evaluated(llama, tmp_path, data):
    adapters.adapter(tmp_path / "adapter", llama, seed=1)
    merged = AutoModelForCausalLM.from_pretrained(llama)
    merged.load_state_dict(adapters.folded(llama, tmp_path / "adapter"))
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "merged")
    found = superpose.evaluate(f"{llama}+{tmp_path / 'adapter'}", "perplexity", data={"data": data})
    assert found.metrics["nll"] == pytest.approx(causal_nll(tmp_path / "merged"), rel=1e-5)
    assert found.metrics["nll"] != pytest.approx(causal_nll(llama), rel=1e-3)


def test_texts_without_a_predicted_token_are_refused(llama, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(SuperposeError) as raised:
        superpose.evaluate(llama, "perplexity", data={"data": data})
    assert raised.value.what == "no text has a token that is predicted"
    assert raised.value.where == data


def test_a_text_longer_than_the_model_knows_is_refused(llama, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 600}])
    with pytest.raises(SuperposeError, match="a text has 600 tokens, and the model knows 512 positions") as raised:
        superpose.evaluate(llama, "perplexity", data={"data": data})
    assert raised.value.mend == "cut the texts: --max-length 512"


def test_a_classifier_is_no_language_model(bert, data):
    with pytest.raises(SuperposeError, match="no language model: it answers with classes"):
        superpose.evaluate(bert, "perplexity", data={"data": data})


def test_an_encoder_decoder_needs_a_target(t5, data):
    with pytest.raises(SuperposeError, match="an encoder-decoder reads two texts") as raised:
        superpose.evaluate(t5, "perplexity", data={"data": data})
    assert "--target" in raised.value.mend
