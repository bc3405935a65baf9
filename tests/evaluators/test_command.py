"""Any program as an evaluator: what it may print, and what is said when it does not."""

from __future__ import annotations

import shlex
import sys
import time

import pytest

import superpose
from superpose.errors import SuperposeError


@pytest.fixture
def model(tmp_path):
    (tmp_path / "a model").mkdir()
    (tmp_path / "a model" / "size").write_text("7")
    return tmp_path / "a model"


def run(model, code, **options):
    return superpose.evaluate(model, "command", command=f"{sys.executable} -c {shlex.quote(code)} {{model}}", **options)


def refused(model, code, **options):
    with pytest.raises(SuperposeError) as raised:
        run(model, code, **options)
    return raised.value


def test_the_last_line_that_is_not_empty_counts(model):
    code = """
import json, pathlib, sys
print("reading", sys.argv[1])
print(json.dumps({"size": int(pathlib.Path(sys.argv[1], "size").read_text()), "loss": 0.25}))
print()
"""
    found = run(model, code, lower="loss")
    assert found.metrics == {"size": 7.0, "loss": 0.25}
    assert found.better == {"size": "higher", "loss": "lower"}
    assert found.facts["command"][-1] == str(model)


def test_an_object_over_several_lines_is_read(model):
    assert run(model, "import json; print(json.dumps({'a': 1}, indent=2))").metrics == {"a": 1.0}


def test_no_shell_reads_the_line(model):
    code = shlex.quote("import json, sys; print(json.dumps({'n': len(sys.argv)}))")
    found = superpose.evaluate(model, "command", command=f"{sys.executable} -c {code} --m={{model}} ';' $HOME *")
    assert found.facts["command"][-4:] == [f"--m={model}", ";", "$HOME", "*"]
    assert found.metrics == {"n": 5.0}


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("print('a')", "the program's last line is no JSON: a"),
        ("print(3)", "the program printed int, no metrics"),
        ("print('{}')", "the program printed dict, no metrics"),
        ("print('{\"a\": NaN}')", "a is NaN, no finite number"),
        ('print(\'{"a": "1"}\')', 'a is "1", no finite number'),
        ("print('{\"a\": true}')", "a is true, no finite number"),
        ("print('{\"a\": 1' + '0' * 400 + '}')", "a is 1000"),
        ("pass", "the program printed nothing"),
        ("import sys; sys.exit('out of luck')", "the program ended with exit code 1"),
    ],
)
def test_what_is_no_result_is_refused(model, code, what):
    assert refused(model, code).what.startswith(what)


def test_the_end_of_its_stderr_is_shown(model):
    error = refused(model, "import sys; sys.exit('x' * 1000 + ' out of luck')")
    assert error.mend.endswith("xxx out of luck")
    assert len(error.mend) < 700


def test_a_program_that_takes_too_long_is_stopped(model):
    began = time.monotonic()
    error = refused(model, "import time; time.sleep(60)", timeout=0.5)
    assert error.what == "the program took more than 0.5 s"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("", "the evaluator command runs a program, and none is named"),
        ("score.py", "no argument holds {model}"),
        ("score.py '{model}", "the command cannot be split: No closing quotation"),
        ("no-such-program {model}", "no-such-program cannot be run: No such file or directory"),
    ],
)
def test_what_is_no_command_is_refused(model, command, what):
    with pytest.raises(SuperposeError) as raised:
        superpose.evaluate(model, "command", command=command)
    assert raised.value.what == what


def test_a_metric_that_it_does_not_print_cannot_be_better_low(model):
    error = refused(model, "print('{\"loss\": 1}')", lower="los")
    assert error.what == "'los' is none of its metrics"
    assert error.mend.startswith("nearest match is 'loss'")


def test_an_adapter_on_a_model_is_no_folder(model):
    with pytest.raises(SuperposeError, match="a program is given one folder"):
        superpose.evaluate(f"{model}+{model}", "command", command="true {model}")


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SuperposeError, match="nothing"):
        superpose.evaluate(tmp_path / "nothing", "command", command="true {model}")
