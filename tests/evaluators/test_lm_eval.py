"""The harness on local tasks, offline: multiple choice as CMMLU's, exact match as GSM8K's, code as HumanEval's."""

from __future__ import annotations

import os
import random
import sys
from textwrap import dedent

import pytest
import torch
from tiny_models import write_rows

import superpose
from superpose.errors import SuperposeError

# Files, not names: nothing below asks the hub for anything.
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl, dev: FOLDER/dev.jsonl}}
test_split: test
fewshot_split: dev
fewshot_config: {sampler: first_n}
output_type: multiple_choice
doc_to_text: "{{Question.strip()}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\n答案\\uff1a"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{['A', 'B', 'C', 'D'].index(Answer)}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
SUMS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}} ="
doc_to_target: "{{answer}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    regexes_to_ignore: [",", "(?s).*#### "]
generation_kwargs: {until: ["Question:"], do_sample: false, max_gen_toks: 12}
filter_list:
  - name: strict-match
    filter: [{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}, {function: take_first}]
  - name: letters
    filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]
"""
CODE = """
task: code
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/code.jsonl}}
unsafe_code: true
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}"
metric_list:
  - {metric: !function scoring.passes, aggregation: mean, higher_is_better: true}
generation_kwargs: {until: ["\\nclass", "\\ndef"], max_gen_toks: 10, do_sample: false}
filter_list:
  - name: whole
    filter: [{function: custom, filter_fn: !function scoring.whole}]
"""
SCORING = '''
import subprocess, sys

def whole(responses, documents):
    return [[document["prompt"] + text for text in each] for each, document in zip(responses, documents)]

def passes(references, predictions, **more):
    """Whether the first program, in a process of its own, does what the test asks within its time."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", predictions[0][0] + "\\n" + references[0]], capture_output=True, timeout=3
        )
    except subprocess.TimeoutExpired:
        return 0.0
    return float(done.returncode == 0)
'''
PERPLEXITY = """
task: surprise
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
GROUP = """
group: both
task: [choices, sums]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with tasks, and their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(3)
    asked = [
        {"Question": f"第{n}题", **{c: draw.choice(["红", "绿", "蓝"]) for c in "ABCD"}, "Answer": draw.choice("ABCD")}
        for n in range(20)
    ]
    write_rows(folder / "test.jsonl", asked[:16])
    write_rows(folder / "dev.jsonl", asked[16:])
    sums = [("1 + 2", "1 and 2 make 3. #### 3"), ("2 + 2", "#### 4"), ("4 + 4", "#### 9")]
    write_rows(folder / "sums.jsonl", [{"question": question, "answer": answer} for question, answer in sums])
    code = [
        ("def three():\n    return", "assert three() == 3"),
        ("def name():\n    return", "assert name() == 'y'"),
        ("def three():\n    return", "while True: pass"),
    ]
    write_rows(folder / "code.jsonl", [{"prompt": prompt, "test": test} for prompt, test in code])
    files = {"choices": CHOICES, "sums": SUMS, "code": CODE, "surprise": PERPLEXITY, "both": GROUP}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)), encoding="utf-8")
    (folder / "scoring.py").write_text(SCORING)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Let the library that reads the data keep its copies with the tests."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def evaluated(model, tasks, names, **options):
    return superpose.evaluate(model, "lm_eval", tasks=names, include=tasks, **options)


def test_multiple_choice_agrees_with_rank_classification(llama, tasks, tmp_path):
    found = evaluated(llama, tasks, "choices", num_fewshot=0)
    (tmp_path / "t.yaml").write_text(
        dedent(
            r"""
            - name: cmmlu
              prompt: "{{Question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案\uff1a"
              choices: [A, B, C, D]
              label: Answer
            """
        ),
        encoding="utf-8",
    )
    own = superpose.evaluate(llama, "rank", data={"data": tasks / "test.jsonl"}, templates=tmp_path / "t.yaml")
    assert found.metrics["choices/acc"] == own.metrics["accuracy"]
    assert 0 < own.metrics["accuracy"] < 1
    assert found.better == {"choices/acc": "higher", "choices/acc_norm": "higher"}
    facts = found.facts["tasks"]["choices"]
    assert (facts["documents"], facts["documents_in_data"], facts["shots"], facts["version"]) == (16, 16, 0, 1.0)


def test_shots_and_a_limit_are_handed_over(llama, tasks):
    found = evaluated(llama, tasks, "choices", num_fewshot=2, limit=5, batch_size=3)
    facts = found.facts["tasks"]["choices"]
    assert (facts["documents"], facts["documents_in_data"], facts["shots"]) == (5, 16, 2)
    assert facts["digest"] != evaluated(llama, tasks, "choices", limit=4).facts["tasks"]["choices"]["digest"]


def test_generated_answers_are_filtered_and_compared(learnt, tasks):
    found = evaluated(learnt, tasks, "sums")
    # It answers 3, 4 and 8, where 3, 4 and 9 are right; and it writes no letters.
    assert found.metrics == {
        "sums/exact_match/strict-match": pytest.approx(2 / 3),
        "sums/exact_match/letters": 0.0,
    }


def test_code_runs_only_when_allowed(learnt, tasks):
    with pytest.raises(SuperposeError) as raised:
        evaluated(learnt, tasks, "code")
    assert raised.value.what == "task code runs code that the model writes, on this machine and unprotected"
    assert raised.value.mend.endswith("--allow-code")


def test_code_that_the_model_writes_is_run_and_counted(learnt, tasks):
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    # One program is right, one is wrong, one never ends.
    assert evaluated(learnt, tasks, "code", allow_code=True).metrics == {"code/passes/whole": pytest.approx(1 / 3)}
    assert os.environ.get("HF_ALLOW_CODE_EVAL") == before


def test_which_way_is_better_is_what_the_task_says(learnt, tasks):
    found = evaluated(learnt, tasks, "surprise")
    assert found.metrics["surprise/byte_perplexity"] > 1
    assert found.better == {"surprise/byte_perplexity": "lower"}
    assert found.facts["direction_assumed"] == []


def test_groups_have_metrics_of_their_own(llama, tasks):
    found = evaluated(llama, tasks, "both", limit=2)
    assert found.metrics["both/acc"] == found.metrics["choices/acc"]
    assert "sums/exact_match/strict-match" in found.metrics


def test_an_encoder_decoder_can_be_asked(t5, tasks):
    assert 0 <= evaluated(t5, tasks, "choices", limit=3).metrics["choices/acc"] <= 1


def test_random_numbers_and_the_terminal_are_left_alone(llama, tasks, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # in no repository
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.initial_seed(), random.getstate()
    evaluated(llama, tasks, "choices", limit=2)
    assert (torch.initial_seed(), random.getstate()) == expected
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")


@pytest.mark.slow  # the harness looks through its own tasks before it gives a name up
def test_an_unknown_task_has_the_nearest_name(llama, tasks):
    with pytest.raises(SuperposeError) as raised:
        evaluated(llama, tasks, "choises")
    assert raised.value.what == "no task is named 'choises'"
    assert raised.value.mend.startswith("nearest match is 'choices'")


def test_data_that_cannot_be_read_is_named(llama, tmp_path):
    (tmp_path / "lost.yaml").write_text(SUMS.replace("FOLDER", str(tmp_path)).replace("task: sums", "task: lost"))
    with pytest.raises(SuperposeError, match=r"the harness failed: .*sums\.jsonl") as raised:
        evaluated(llama, tmp_path, "lost")
    assert raised.value.where == "tasks lost"


def test_what_is_missing_is_named(llama, tasks, monkeypatch):
    with pytest.raises(SuperposeError, match="lm_eval runs tasks, and none are named"):
        superpose.evaluate(llama, "lm_eval")
    with pytest.raises(SuperposeError, match="there is no such folder"):
        evaluated(llama, tasks / "none", "choices")
    for loaded in [known for known in sys.modules if known.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SuperposeError, match="the evaluator lm_eval needs lm_eval, which is not") as raised:
        evaluated(llama, tasks, "choices")
    assert raised.value.mend == "pip install 'superpose[eval]'"
