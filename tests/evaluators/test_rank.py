"""Rank classification against plain loops over transformers, and what templates may say."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_models import some_texts, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import superpose
from superpose.errors import SuperposeError
from superpose.evaluators.templates import read_templates
from superpose.inference import Row

TEMPLATES = """
- name: listed
  prompt: "{{ question }} Which?"
  choices_column: answers
  label: right
- name: fixed
  prompt: |
    {{ question }}
    Is it {{ answers[0] }}?
  choices: [yes, no, "not {{ answers[1] }}"]
  label: right
"""


@pytest.fixture(scope="module")
def rows():
    draw = random.Random(5)
    return [
        {"question": text, "answers": some_texts(3, seed=number, longest=3), "right": draw.randrange(3)}
        for number, text in enumerate(some_texts(20, longest=5))
    ]


@pytest.fixture(scope="module")
def files(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank")
    (folder / "templates.yaml").write_text(TEMPLATES)
    return write_rows(folder / "rows.jsonl", rows), str(folder / "templates.yaml")


def questions(rows):
    """The prompts and choices that the templates stand for, written out by hand."""
    listed = [(f"{row['question']} Which?", row["answers"], row["right"]) for row in rows]
    fixed = [
        (
            f"{row['question']}\nIs it {row['answers'][0]}?",
            ["yes", "no", f"not {row['answers'][1]}"],
            row["right"],
        )
        for row in rows
    ]
    return {"listed": listed, "fixed": fixed}


def pad(lists, value):
    tensors = [torch.tensor(each) for each in lists]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def causal_scores(folder, prompt, choices):
    """Summed log-probabilities of the choices' tokens after the prompt, in one padded batch."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    start = len(tokenizer(prompt)["input_ids"])
    read = [tokenizer(f"{prompt} {choice}")["input_ids"] for choice in choices]
    mask = pad([[1] * len(each) for each in read], 0)
    with torch.no_grad():
        logs = model(input_ids=pad(read, 0), attention_mask=mask).logits.log_softmax(dim=-1)
    return [
        sum(float(logs[number, place - 1, ids[place]]) for place in range(start, len(ids)))
        for number, ids in enumerate(read)
    ]


def seq2seq_scores(folder, prompt, choices):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    read = tokenizer([prompt] * len(choices), return_tensors="pt")
    wanted = [tokenizer(choice)["input_ids"] for choice in choices]
    with torch.no_grad():
        logs = model(**read, labels=pad(wanted, -100)).logits.log_softmax(dim=-1)
    return [sum(float(logs[n, place, token]) for place, token in enumerate(ids)) for n, ids in enumerate(wanted)]


@pytest.mark.parametrize(("model", "score"), [("llama", causal_scores), ("t5", seq2seq_scores)], ids=["causal", "t5"])
def test_accuracy_is_what_a_plain_script_says(model, score, rows, files, request):
    folder = request.getfixturevalue(model)
    found = superpose.evaluate(folder, "rank", data={"data": files[0], "batch_size": 3}, templates=files[1])
    expected = {}
    for name, asked in questions(rows).items():
        hits = []
        for prompt, choices, right in asked:
            scores = score(folder, prompt, choices)
            hits.append(scores.index(max(scores)) == right)
        expected[f"accuracy/{name}"] = sum(hits) / len(hits)
    expected["accuracy"] = sum(expected.values()) / 2
    assert found.metrics == pytest.approx(expected, abs=1e-12)
    assert set(found.better.values()) == {"higher"}
    assert found.facts["templates"] == 2
    assert found.facts["prompts_cut"] == 0
    assert 0 < found.metrics["accuracy"] < 1


def test_a_model_that_has_learnt_the_answers_is_right(learnt, tmp_path):
    rows = [{"question": "1 + 2 = ####", "answer": "3"}, {"question": "4 + 4 = ####", "answer": "8"}]
    (tmp_path / "t.yaml").write_text('- {name: sum, prompt: "{{ question }}", choices: ["3", "8", "11"]}')
    data = {"data": write_rows(tmp_path / "rows.jsonl", rows), "label": "answer"}
    assert superpose.evaluate(learnt, "rank", data=data, templates=tmp_path / "t.yaml").metrics["accuracy"] == 1.0


def test_length_is_not_divided_by(llama, tmp_path):
    # A choice that begins with another one can only be less likely, however likely its tokens are on average.
    rows = [{"question": text, "answer": 0} for text in some_texts(6)]
    (tmp_path / "t.yaml").write_text('- {name: a, prompt: "{{ question }}", choices: [red, red green], label: answer}')
    data = {"data": write_rows(tmp_path / "rows.jsonl", rows)}
    assert superpose.evaluate(llama, "rank", data=data, templates=tmp_path / "t.yaml").metrics["accuracy"] == 1.0


def test_of_equal_choices_the_first_wins(llama, tmp_path):
    rows = [{"question": "red", "right": 0}, {"question": "green", "right": 1}]
    (tmp_path / "t.yaml").write_text('- {name: a, prompt: "{{ question }}", choices: [same, same], label: right}')
    data = {"data": write_rows(tmp_path / "rows.jsonl", rows)}
    assert superpose.evaluate(llama, "rank", data=data, templates=tmp_path / "t.yaml").metrics["accuracy"] == 0.5


def test_prompts_that_are_too_long_are_counted(llama, files):
    found = superpose.evaluate(llama, "rank", data={"data": files[0], "max_length": 30}, templates=files[1])
    assert found.facts["prompts_cut"] > 0


def asked(text, values, tmp_path, label=""):
    """What the first template of a file asks about a row."""
    file = tmp_path / "templates.yaml"
    file.write_text(text)
    return read_templates(file, label)[0][0].ask(Row(values, "rows.jsonl, line 4"))


@pytest.mark.parametrize(
    ("label", "answer", "right"),
    [
        ("answer", 1, 1),
        ("answer", "1", 1),
        ("answer", "no", 1),
        ("answer|int - 1", "2", 1),
        ("codes.index(answer)", "b", 1),
    ],
)
def test_a_label_is_a_number_a_choice_or_an_expression(label, answer, right, tmp_path):
    text = f"- {{name: a, prompt: 'Well?', choices: [yes, no], label: '{label}'}}"
    found = asked(text, {"answer": answer, "codes": ["a", "b"]}, tmp_path)
    assert (found.choices, found.right) == (("yes", "no"), right)


def test_a_list_within_a_column_may_hold_the_choices(tmp_path):
    text = "- {name: a, prompt: '{{ q }}\n', choices_column: choices.text, label: choices.label.index(key)}"
    found = asked(text, {"q": " Who? ", "choices": {"text": ["me ", "you"], "label": ["A", "B"]}, "key": "B"}, tmp_path)
    assert (found.prompt, found.choices, found.right) == ("Who?", ("me", "you"), 1)


def test_the_columns_that_templates_read_are_known(files):
    templates, _ = read_templates(Path(files[1]), "")
    assert templates[0].columns == templates[1].columns == {"question", "answers", "right"}


GOOD = "name: a, prompt: '{{ q }}', choices: [yes, no], label: y"


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("name: a", "the file is no list of templates", "templates.yaml"),
        ("- name: [", "no valid YAML", "templates.yaml, line 1"),
        ("- red", "a template is a mapping", "line 1"),
        ("- {prompt: a, choices: [b, c], label: y}", "a template has no name", "line 1"),
        (f"- {{{GOOD}}}\n- {{{GOOD}, answer: b}}", "a template has no 'answer'", "line 2"),
        (f"- {{{GOOD}}}\n- {{{GOOD}}}", "two templates are named 'a'", "templates.yaml"),
        (f"- {{{GOOD}, choices_column: b}}", "a template has neither choices nor choices_column, or both", "line 1"),
        ("- {name: a, prompt: b, choices: [c], label: y}", "a template has choices that are not two", "line 1"),
        ("- {name: a, prompt: b, choices: [c, d]}", "a template has no label, and no --label", "line 1"),
        (f"- {{{GOOD.replace('{{ q }}', '{{ q')}}}", "no valid Jinja2", "line 1, template a"),
        (f"- {{{GOOD.replace('label: y', 'label: y +')}}}", "no valid expression", "line 1, template a"),
    ],
)
def test_a_wrong_template_is_named(text, what, where, tmp_path):
    with pytest.raises(SuperposeError) as raised:
        asked(text, {}, tmp_path)
    assert raised.value.what.startswith(what)
    assert raised.value.where.endswith(where)


@pytest.mark.parametrize(
    ("text", "values", "what"),
    [
        (GOOD, {"q": "x", "y": "maybe"}, "label 'maybe' is none of the choices 'yes', 'no'"),
        (GOOD, {"q": "x", "y": 2}, "label 2 is none of the choices"),
        (GOOD, {"q": " ", "y": 0}, "the prompt is empty"),
        (GOOD.replace("q }}", "q.deep.er }}"), {"q": {}, "y": 0}, "the template cannot be filled in: UndefinedError"),
        (
            "name: a, prompt: '{{ q }}', choices_column: q, label: y",
            {"q": "x", "y": 0},
            "choices_column 'q' holds no list",
        ),
        (GOOD.replace("label: y", "label: y.z"), {"q": "x", "y": {}}, "the template names what is not there: z"),
        (GOOD.replace("q }}", "q.__class__.__mro__ }}"), {"q": "x", "y": 0}, "the template cannot be filled in: Sec"),
    ],
)
def test_a_row_that_does_not_fit_is_named(text, values, what, tmp_path):
    with pytest.raises(SuperposeError) as raised:
        asked(f"- {{{text}}}", values, tmp_path)
    assert raised.value.what.startswith(what)
    assert raised.value.where == "rows.jsonl, line 4, template a"


def test_a_column_that_a_template_names_and_the_data_lacks(llama, files, tmp_path):
    (tmp_path / "t.yaml").write_text("- {name: a, prompt: '{{ questoin }}', choices: [yes, no], label: right}")
    with pytest.raises(SuperposeError, match="there is no column 'questoin'") as raised:
        superpose.evaluate(llama, "rank", data={"data": files[0]}, templates=tmp_path / "t.yaml")
    assert raised.value.mend.startswith("nearest match is 'question'")


def test_templates_are_asked_for(llama, files):
    with pytest.raises(SuperposeError, match="rank asks by templates, and none are named"):
        superpose.evaluate(llama, "rank", data={"data": files[0]})
