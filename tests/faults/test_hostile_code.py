"""Code that comes with a model: no command runs it."""

from __future__ import annotations

import json

import pytest
from families import tuned_tensors
from safetensors.torch import load_file, save_file

from faults.damage import REFUSED, assert_says, error_in

GROUP = "Hostile inputs"


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A model that brings code for its config, its modules, its tokenizer and its processor; and data."""
    from evaluators.tiny_models import make_bert, write_rows

    root = tmp_path_factory.mktemp("coded")
    folder = make_bert(root / "model")
    canary = root / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    ours = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "evil.Evil")
    files = {
        "config.json": {"auto_map": ours},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        "preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "evil.Evil", "AutoProcessor": "evil.Evil"}},
    }
    for name, more in files.items():
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**known, **more}))
    tuned = root / "tuned"
    tuned.mkdir()
    for file in folder.iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    tensors = tuned_tensors(load_file(folder / "model.safetensors"), 1)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    rows = write_rows(root / "rows.jsonl", [{"text": "red green", "label": at % 3} for at in range(6)])
    return folder, tuned, rows, canary


COMMANDS = {
    "plan": lambda folder, tuned, rows, out: ["plan", folder, tuned],
    "merge": lambda folder, tuned, rows, out: ["merge", folder, tuned, "-o", out],
    "inspect": lambda folder, tuned, rows, out: ["inspect", folder],
    "compare": lambda folder, tuned, rows, out: ["compare", folder, tuned],
    "extract": lambda folder, tuned, rows, out: ["extract", folder, tuned, "-o", out],
    "statistics": lambda folder, tuned, rows, out: ["statistics", "fisher", tuned, "--data", rows, "--label", "label",
                                                    "-o", out.with_suffix(".safetensors")],
    "evaluate": lambda folder, tuned, rows, out: ["evaluate", tuned, "--data", rows, "--label", "label"],
    "evaluate pictures": lambda folder, tuned, rows, out: ["evaluate", tuned, "--data", rows, "--label", "label",
                                                           "--image", "text"],
}  # fmt: skip


IN_ONE_PROCESS = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
from superpose.cli import app
told = {{}}
for name, arguments in json.loads({commands!r}).items():
    done = CliRunner().invoke(app, arguments)
    failure = done.exception if not isinstance(done.exception, SystemExit) else None
    told[name] = repr(failure) if failure else done.exit_code, done.output, Path({canary!r}).exists()
Path({out!r}).write_text(json.dumps(told))
sys.argv = ["superpose", "--version"]
"""
"""Several commands, one after the other: to import transformers anew for each takes most of the time."""


@pytest.mark.parametrize("known", ["bert", "evil"])
def test_code_of_a_model_is_never_run(tmp_path, tally, forks, coded, known):
    folder, tuned, rows, canary = coded
    for place in (folder, tuned):
        content = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**content, "model_type": known}))
    made = {
        name: [str(one) for one in command(folder, tuned, rows, tmp_path / name)] for name, command in COMMANDS.items()
    }
    script = IN_ONE_PROCESS.format(commands=json.dumps(made), canary=str(canary), out=str(tmp_path / "told"))
    done = forks.run(["--version"], tmp_path, script=script)
    assert done.status == 0, done.text
    for command, (code, written, has_run) in json.loads((tmp_path / "told").read_text()).items():
        with tally(GROUP, f"code of a model of type {known}", f"superpose {command}") as injection:
            assert not has_run
            assert code in (0, 2), (command, code, written)
            assert "Traceback" not in written
            assert code == 0 or assert_says(error_in(written)) is None
            injection.outcome = "not run, " + (REFUSED if code else "done without")
    assert (tmp_path / "merge" / "evil.py").read_bytes() == (folder / "evil.py").read_bytes()


def test_the_code_would_have_run(coded, tmp_path):
    folder, _, _, canary = coded
    scope = {}
    exec((folder / "evil.py").read_text(), scope)
    assert canary.exists()
    canary.unlink()
