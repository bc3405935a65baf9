"""The verb and the function `evaluate`: what they accept, print and refuse; the table of evaluators."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_bert, some_texts, write_rows
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

import superpose
from superpose.cli import app
from superpose.errors import Problems, SuperposeError
from superpose.evaluators import Measured, evaluator, registered_evaluators
from superpose.evaluators.classify import ClassifyOptions
from superpose.options import option_specs
from superpose.task_data import TaskData

NAMES = ["classify", "command", "generate", "lm_eval", "perplexity", "rank"]


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def refused(*arguments):
    """The error text of a command that ends with exit code 2, no traceback, and nothing on stdout."""
    done = run(*arguments)
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"text": text, "label": number % 3} for number, text in enumerate(some_texts(12))]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """Two bodies, each with a head of its own beside it."""
    root = tmp_path_factory.mktemp("headed")
    for seed, name in enumerate(["one", "two"]):
        whole = make_bert(root / f"{name}-whole", seed=seed)
        AutoModel.from_pretrained(whole).save_pretrained(root / name / "body")
        AutoTokenizer.from_pretrained(whole).save_pretrained(root / name / "body")
        torch.manual_seed(seed)
        save_file({"weight": torch.randn(3, 32), "bias": torch.randn(3)}, root / name / "head.safetensors")
    return [root / name / "body" for name in ("one", "two")]


def test_models_are_rows_of_a_table(headed, data):
    done = run(
        *headed, "--with", "classify", "--data", data, "--label", "label", "--head", "{model}/../head.safetensors"
    )
    assert done.exit_code == 0, done.stderr
    assert "accuracy" in done.stdout
    assert "(higher is better)" in done.stdout
    assert "classify: 12 rows of" in done.stdout
    for body in headed:
        task = {"data": data, "label": "label", "head": str(body.parent / "head.safetensors")}
        found = superpose.evaluate(body, "classify", data=task)
        line = next(line for line in done.stdout.splitlines() if line.startswith(str(body)))
        assert line.split()[1:] == [f"{found.metrics['accuracy']:.4f}", f"{found.metrics['macro_f1']:.4f}"]


def test_the_result_is_also_json(bert, data):
    arguments = (bert, "--with", "classify", "--data", data, "--label", "label", "--examples", 5, "--seed", 3, "--json")
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    (found,) = json.loads(done.stdout)
    task = TaskData(data=data, label="label", examples=5, seed=3)
    expected = superpose.evaluate(bert, "classify", data=task)
    assert found["model"] == str(bert)
    assert found["evaluator"] == "classify"
    assert found["metrics"] == expected.metrics
    assert found["better"] == {"accuracy": "higher", "macro_f1": "higher"}
    assert found["facts"]["data"] == {"data": data, "label": "label", "examples": 5, "seed": 3}
    assert (found["facts"]["rows"], found["facts"]["rows_in_data"]) == (5, 12)
    assert found["facts"]["versions"]["torch"] == torch.__version__


def test_many_metrics_are_rows(bert, tmp_path):
    code = "import json; print(json.dumps({f'm{n}': n / 7 for n in range(9)}))"
    done = run(bert, bert, "--with", "command", "--command", f'{sys.executable} -c "{code}" {{model}}', "--lower", "m3")
    assert done.exit_code == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert lines["m3"] == ["lower", "0.4286", "0.4286"]
    assert lines["m8"] == ["higher", "1.1429", "1.1429"]


def test_what_was_measured_before_an_error_is_shown(bert, data, tmp_path):
    done = run(bert, tmp_path / "none", "--with", "classify", "--data", data, "--label", "label")
    assert done.exit_code == 2
    assert str(bert) in done.stdout
    assert "none" in done.stderr


def test_evaluators_are_listed(bert):
    for arguments in (["--list"], []):
        done = run(*arguments)
        assert done.exit_code == 0
        assert [line.split()[0] for line in done.stdout.splitlines()[1:7]] == NAMES
    assert [one["name"] for one in json.loads(run("--list", "--json").stdout)] == NAMES
    assert "choose one: --with classify | command |" in refused(bert)


@pytest.mark.parametrize("one", registered_evaluators(), ids=lambda one: one.name)
def test_an_evaluator_describes_itself(one):
    done = run("--list", "--with", one.name)
    assert done.exit_code == 0
    assert one.summary in done.stdout
    for spec in option_specs(one.options):
        assert f"--{spec.name.replace('_', '-')}" in done.stdout
        assert spec.help, f"{spec.name} has no help"


LABELLED = "--data DATA --label label"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("clasify", "no evaluator is named 'clasify'\nwhere: --with\nmend: nearest match is 'classify'"),
        ("classify", "no data is named"),
        ("classify --data DATA", "classify needs the column 'label'"),
        ("classify --data DATA --label labl", "there is no column 'labl'\nwhere: DATA, line 1"),
        (f"classify {LABELLED} --target text", "classify does not read 'target'"),
        (f"classify {LABELLED} --batch-size 0", "batch_size=0 is not allowed"),
        (f"classify {LABELLED} --device tpux", "'tpux' is no device"),
        (f"classify {LABELLED} --pooling men", "pooling=men is not allowed"),
        ("perplexity --data no.jsonl", "there is no data at 'no.jsonl'"),
        ("generate --data DATA --target text --num-beam 3", "mend: nearest match is 'num_beams'"),
        ("generate --data DATA --target text --num-beams 0", "num_beams=0 is not allowed"),
        ("lm_eval --tasks a --label b", "lm_eval does not read --label"),
        ("lm_eval --tasks", "option --tasks has no value"),
        ("lm_eval --batch-size 0", "batch_size=0 is not allowed: evaluator lm_eval takes integer in"),
    ],
)
def test_what_is_wrong_is_told_in_three_lines(arguments, told, bert, data):
    text = refused(bert, "--with", *(data if word == "DATA" else word for word in arguments.split()))
    assert told.replace("DATA", data) in text
    assert text.startswith("error: ")
    assert "\nmend: " in text


def test_a_switch_may_stand_alone(bert):
    # The evaluator gets as far as its tasks: the switch took no model for its value.
    assert "lm_eval runs tasks, and none are named" in refused("--with", "lm_eval", "--allow-code", bert)


def test_no_model_is_an_error(data):
    assert "no model is named" in refused("--with", "perplexity", "--data", data)


def test_several_problems_are_told_together(bert, data):
    with pytest.raises(Problems) as raised:
        superpose.evaluate(bert, "perplexity", data={"data": data, "pair": "a", "image": "b"}, beams=3)
    assert len(raised.value.problems) == 3


def test_a_mapping_of_what_is_no_data_is_refused(bert):
    with pytest.raises(SuperposeError, match="a task's data has no 'lable'") as raised:
        superpose.evaluate(bert, "classify", data={"data": "a", "lable": "b"})
    assert raised.value.mend.startswith("nearest match is 'label'")


def test_a_new_evaluator_is_a_function(bert, monkeypatch):
    from superpose.evaluators import registry

    monkeypatch.setattr(registry, "_EVALUATORS", {})

    @evaluator("letters", options=ClassifyOptions, better={"letters": "lower"})
    def letters(model, options):
        return Measured({"letters": len(model)}, {"counted": "the name"})

    found = superpose.evaluate(bert, "letters")
    assert found.metrics == {"letters": float(len(str(bert)))}
    assert found.better == {"letters": "lower"}
    assert found.facts["counted"] == "the name"
    with pytest.raises(SuperposeError, match="letters reads no data of yours"):
        superpose.evaluate(bert, "letters", data={"data": "a"})

    @evaluator("broken", options=ClassifyOptions, better={"share": "higher"})
    def broken(model, options):
        return Measured({"share": float("nan")})

    with pytest.raises(SuperposeError, match="share is nan"):
        superpose.evaluate(bert, "broken")
    with pytest.raises(ValueError, match="nothing is handed over as"):
        evaluator("odd", options=ClassifyOptions)(lambda model, options, rows: Measured({}))


def test_importing_evaluators_brings_no_heavy_library():
    heavy = ("transformers", "lm_eval", "nltk", "datasets")
    code = f"import sys, superpose.evaluators; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
