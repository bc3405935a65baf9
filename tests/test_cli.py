"""The command line: what it accepts, what it prints where, how it ends, and that help is fast."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from textwrap import dedent

import pytest
import torch
import typer
from families import base_tensors, make_family, save
from typer.testing import CliRunner

from superpose import api
from superpose.cli import app
from superpose.cli.common import exit_codes
from superpose.options import option_specs

COMMANDS = ("merge", "plan", "methods", "inspect", "demo")
METHODS = api.list_methods()


def run(*arguments):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_in_python(code):
    """Run code in a fresh process and return what it prints."""
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def output_of(*arguments):
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def planned(*arguments):
    """Return the recipe and the options of the first tensor that a plan of these arguments has."""
    content = json.loads(output_of("plan", "--json", *arguments))
    return content["recipe"], content["items"][0]["options"]


def refused(*arguments):
    """Return the error text of a command that ends with exit code 2, no traceback, and nothing on stdout."""
    done = run(*arguments)
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"), tasks=2)


def write_recipe(folder, family, **more):
    content = {"base": str(family[0]), "models": [str(path) for path in family[1:]], **more}
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return folder / "recipe.yaml"


@pytest.fixture
def _interruptible():
    """Python's own handler, which it does not install where the tests were begun with interruptions ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interruption_that_comes_out_as_another_error_is_still_one(capsys, tmp_path):
    """Native code that is interrupted can turn the interruption into an error of its own."""

    def native_code():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    with pytest.raises(typer.Exit) as ended, exit_codes(kept=tmp_path):
        native_code()
    assert ended.value.exit_code == 130
    assert f"kept in {tmp_path}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ValueError, match="shape"), exit_codes():
        raise ValueError("shape")


# Help.


def test_help_of_every_command_imports_no_torch():
    printed = run_in_python(
        f"""
        import sys
        from typer.testing import CliRunner
        from superpose.cli import app
        calls = [["--help"], ["--version"], [], *([name, "--help"] for name in {COMMANDS!r})]
        for call in calls:
            CliRunner().invoke(app, call)
        heavy = {{"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "rich.progress"}}
        print(sorted(heavy & sys.modules.keys()))
        """
    )
    assert printed.strip() == "[]"


def test_importing_the_package_imports_no_torch():
    assert run_in_python("import sys, superpose; print('torch' in sys.modules)").strip() == "False"


def test_help_runs_as_a_module_and_lists_all_commands():
    done = subprocess.run([sys.executable, "-m", "superpose", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    text = output_of(command, "--help")
    assert f"Usage: superpose {command}" in text
    assert len(text.splitlines()) > 5


def test_every_common_flag_is_explained():
    for command in ("merge", "plan"):
        lines = output_of(command, "--help").splitlines()
        for flag in ("--device", "--backend", "--workers", "--memory", "--dtype", "--seed", "--overwrite", "--json"):
            (line,) = [line for line in lines if line.strip().startswith(flag)]
            assert line.split()[-1] != flag


def test_version_is_shown():
    assert output_of("--version") == f"superpose {version('superpose')}\n"


def test_without_a_command_help_is_shown():
    done = run()
    assert done.exit_code == 2
    assert "merge" in done.stderr + done.stdout


def test_an_unknown_command_names_the_nearest():
    assert "Did you mean 'merge'?" in refused("merg")


# Methods.


def test_methods_lists_all():
    lines = output_of("methods").splitlines()
    for method in METHODS:
        (line,) = [line for line in lines if line.split()[0] == method.name]
        assert method.summary[:40] in line


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_shows_its_options_and_its_source(method):
    text = output_of("methods", method.name)
    assert text.startswith(f"{method.name}\n")
    assert method.source in text
    for spec in option_specs(method.options):
        flag = f"--{spec.name.replace('_', '-')}"
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [flag]]
        assert str(spec.default) in line
        assert spec.allowed in line
        assert spec.help
        assert spec.help.split()[0] in line
    if not option_specs(method.options):
        assert "It has no options." in text


def test_methods_as_json():
    content = json.loads(output_of("methods", "--json"))
    assert [entry["name"] for entry in content] == [method.name for method in METHODS]
    for entry, method in zip(content, METHODS, strict=True):
        assert entry["source"] == method.source
        assert entry["summary"] == method.summary
        specs = {spec.name: spec for spec in option_specs(method.options)}
        assert [option["name"] for option in entry["options"]] == list(specs)
        for option in entry["options"]:
            spec = specs[option["name"]]
            assert option["default"] == spec.default
            assert option["range"] == ([spec.range.low, spec.range.high] if spec.range else None)
            assert option["choices"] == list(spec.choices)
    (ties,) = json.loads(output_of("methods", "ties", "--json"))
    assert ties["name"] == "ties"


def test_an_unknown_method_names_the_nearest():
    assert "no method is named 'tis'\n" in refused("methods", "tis")
    assert "nearest match is 'ties'" in refused("methods", "tis")


# Inspect.


def test_inspect_shows_tensors_layers_drawn_together(family):
    lines = output_of("inspect", family[0]).splitlines()
    (line,) = [line for line in lines if line.startswith("layers.*.mlp.up_proj.weight")]
    assert line.split()[1:] == ["2", "linear", "name", "48x16", "F32", "6.0", "KiB"]
    (line,) = [line for line in lines if line.startswith("logit_scale")]
    assert line.split()[1:] == ["1", "scalar", "name", "scalar", "F32", "4", "B"]
    tensors = base_tensors()
    assert lines[-1].startswith(f"{len(tensors)} tensors, ")
    assert lines[-1].endswith("in 1 file(s)")


def test_inspect_shows_every_tensor_if_asked(family):
    text = output_of("inspect", family[0], "--every")
    assert all(name in text for name in base_tensors())


def test_inspect_as_json(family):
    content = json.loads(output_of("inspect", family[0], "--json"))
    tensors = base_tensors()
    assert content["path"] == str(family[0])
    assert content["files"] == [str(family[0] / "model.safetensors")]
    assert content["problems"] == []
    assert {entry["name"]: (entry["shape"], entry["dtype"], entry["bytes"]) for entry in content["tensors"]} == {
        name: (list(tensor.shape), "F32", tensor.nbytes) for name, tensor in tensors.items()
    }


def test_inspect_shows_aliases(tmp_path):
    shared = torch.zeros(4, 2)
    torch.save({"embed.weight": shared, "lm_head.weight": shared}, tmp_path / "pytorch_model.bin")
    assert "tied: lm_head.weight is embed.weight" in output_of("inspect", tmp_path)
    assert json.loads(output_of("inspect", tmp_path, "--json"))["tied"] == {"lm_head.weight": "embed.weight"}


def test_inspect_shows_what_can_be_read_and_ends_with_the_problems(tmp_path):
    file = save(tmp_path / "model", base_tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    done = run("inspect", tmp_path / "model")
    assert done.exit_code == 2
    assert "embed_tokens.weight" in done.stdout
    assert done.stderr.startswith("error: truncated: 10 of ")
    assert f"\nwhere: {file}" in done.stderr
    assert "\nmend: " in done.stderr
    done = run("inspect", tmp_path / "model", "--json")
    assert done.exit_code == 2
    assert "truncated" in json.loads(done.stdout)["problems"][0]


@pytest.mark.parametrize("path", ["nosuch", "/dev/null", "x" * 5000], ids=["missing", "a device", "too long"])
def test_what_is_no_checkpoint_is_refused_without_a_traceback(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    done = run("inspect", path)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert "\nmend: " in done.stderr


# Arguments of merge and plan.


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ([], {}),
        (["--density=0.5"], {"density": 0.5}),
        (["--density", "0.5"], {"density": 0.5}),
        (["--density", "1e-2"], {"density": 0.01}),
        (["--scaling-factor", "-0.5"], {"scaling_factor": -0.5}),
        (["--scaling-factor=-0.5"], {"scaling_factor": -0.5}),
        (["--scaling-factor", "-5e-1"], {"scaling_factor": -0.5}),
        (["--scaling_factor", "2"], {"scaling_factor": 2.0}),
        (["--density-scope", "tensor", "--density", "1"], {"density_scope": "tensor", "density": 1.0}),
        (["--density", "0.1", "--density", "0.9"], {"density": 0.9}),
    ],
    ids=" ".join,
)
def test_options_of_the_method_are_read(family, arguments, changed):
    _, defaults = planned(*family, "--method", "ties")
    for order in ([*family, "--method", "ties", *arguments], [*arguments, "-m", "ties", *family]):
        assert planned(*order)[1] == {**defaults, **changed}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--density"], "option --density has no value"),
        (["--density", "--scaling-factor", "1"], "option --density has no value"),
        (["--density", ""], "option --density has no value"),
        (["--density="], "density= is not allowed"),
        (["--density", "20"], "density=20 is not allowed: method ties takes [0, 1]"),
        (["--density", "dense"], "density=dense is not allowed"),
        (["--densty", "0.5"], "nearest match is 'density'"),
        (["--scaling-facto=1"], "nearest match is 'scaling_factor'"),
        (["--weights", "1"], "'1' is not one weight per fine-tune"),
        (["--weights", "1,x"], "write 2 numbers with commas"),
        (["--weights", ""], "write 2 numbers with commas"),
        (["--weights", "1,nan"], "weight"),
        (["--memory", "lots"], "'lots' is no size"),
        (["--shard-size", "huge"], "'huge' is no size"),
        (["--dtype", "fp8"], "bfloat16"),
        (["--seed", "x"], "--seed"),
        (["--workers", "0"], "--workers"),
        (["--device", "tpu9"], "is no device"),
        (["--backend", "thread"], "nearest match is 'threads'"),
        (["--method", "tis"], "nearest match is 'ties'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_an_argument_is_said(family, tmp_path, arguments, text):
    assert text in refused("plan", *family, "--method", "ties", *arguments)
    assert text in refused("merge", *family, "-o", tmp_path / "out", "--method", "ties", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_several_sorts_are_shown_together(family):
    text = refused("plan", *family, "--method", "ties", "--densty", "1", "--backend", "thread", "--device", "tpu9")
    assert all(part in text for part in ("'densty'", "'thread'", "'tpu9'"))
    assert text.count("mend: ") == 3


@pytest.mark.parametrize("text", ["0.5,2", "0.5, 2", ".5,2e0"])
def test_weights_are_one_number_per_fine_tune(family, text):
    recipe, _ = planned(*family, "--method", "average", "--weights", text)
    assert [model["weight"] for model in recipe["models"]] == [0.5, 2.0]


def test_a_negative_weight_is_no_option(family):
    recipe, _ = planned(*family, "--method", "average", "--weights", "-1,3")
    assert [model["weight"] for model in recipe["models"]] == [-1.0, 3.0]


def test_the_default_method_is_stf(family):
    assert planned(*family)[0]["method"] == "stf"


@pytest.mark.parametrize("command", ["merge", "plan"])
def test_missing_arguments_are_said(family, tmp_path, command):
    output = ["-o", tmp_path / "out"]
    assert "Missing argument" in refused(command, *output)
    assert "a base and at least one fine-tune are needed" in refused(command, family[0], *output)
    assert "a base and at least one fine-tune are needed" in refused(command, "--density", "0.5", *output)


def test_merge_needs_an_output(family):
    assert "--output" in refused("merge", *family)


def test_a_path_that_does_not_exist_names_who_named_it(family):
    text = refused("plan", family[0], family[1].with_name("ft11"))
    assert "ft11' does not exist" in text
    assert "nearest match is 'ft1'" in text


# Recipes.


def test_a_recipe_file_is_read(family, tmp_path):
    recipe, options = planned(write_recipe(tmp_path, family, method="ties", options={"density": 0.5}, seed=3))
    assert recipe["method"] == "ties"
    assert recipe["seed"] == 3
    assert options["density"] == 0.5


def test_flags_override_what_a_recipe_says(family, tmp_path):
    file = write_recipe(
        tmp_path,
        family,
        method="ties",
        options={"density": 0.5, "scaling_factor": 0.3},
        rules=[{"kind": "norm", "keep": "base"}],
        dtype="float32",
        seed=3,
        output={"shard_size": "1GB"},
    )
    flags = ["--density", "0.7", "--dtype", "bfloat16", "--seed", "4", "--shard-size", "2GB"]
    recipe, options = planned(file, *flags)
    assert (recipe["method"], recipe["dtype"], recipe["seed"]) == ("ties", "bfloat16", 4)
    assert recipe["output"]["shard_size"] == 2 * 10**9
    assert recipe["rules"][0]["kind"] == "norm"
    assert (options["density"], options["scaling_factor"]) == (0.7, 0.3)
    assert planned(file, "--method", "ties", "--seed", "0")[1]["density"] == 0.5
    assert planned(file, "--method", "ties", "--seed", "0")[0]["seed"] == 0


def test_another_method_on_the_command_line_takes_its_own_options(family, tmp_path):
    file = write_recipe(tmp_path, family, method="ties", options={"density_scope": "tensor"})
    recipe, _ = planned(file, "--method", "average", "--weights", "1,2")
    assert recipe["options"] == {}
    assert [model["weight"] for model in recipe["models"]] == [1.0, 2.0]


def test_naming_the_method_that_a_recipe_has_by_default_keeps_its_options(family, tmp_path):
    file = write_recipe(tmp_path, family, options={"density": 0.7})
    assert planned(file)[1]["density"] == 0.7
    assert planned(file, "--method", "stf")[1]["density"] == 0.7


def test_mistakes_in_a_recipe_are_shown_with_their_lines(tmp_path):
    (tmp_path / "recipe.yml").write_text("base: b\nmodels: [t]\nmetod: ties\ndtype: fp8\n")
    text = refused("merge", tmp_path / "recipe.yml", "-o", tmp_path / "out")
    assert text.startswith("error: ")
    assert f"where: {tmp_path / 'recipe.yml'}, line 3" in text
    assert f"where: {tmp_path / 'recipe.yml'}, line 4" in text
    assert "nearest match is 'method'" in text


def test_an_infinite_option_of_a_recipe_is_refused_as_what_it_is(family, tmp_path):
    file = tmp_path / "recipe.yaml"
    models = "".join(f"  - {folder}\n" for folder in family[1:])
    file.write_text(f"base: {family[0]}\nmodels:\n{models}options:\n  scaling_factor: .inf\n", encoding="utf-8")
    said = refused("plan", file)
    assert "scaling_factor" in said
    assert "inf" in said
    assert "None" not in said


def test_a_recipe_that_does_not_exist_is_named(tmp_path):
    assert "cannot be read" in refused("plan", tmp_path / "nosuch.yaml")


# What is printed where, and how it ends.


def test_merge_prints_one_line_and_keeps_stderr_for_the_rest(family, tmp_path):
    done = run("merge", *family, "-o", tmp_path / "out", "--method", "ties", "--quiet")
    assert done.exit_code == 0
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path / 'out'}: {len(base_tensors())} tensors merged by ties, 0 copied; ")
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())


def test_merge_as_json_prints_the_record(family, tmp_path):
    done = run("merge", *family, "-o", tmp_path / "out", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "run.json").read_text())


def test_an_output_that_exists_is_kept_unless_it_may_be_replaced(family, tmp_path):
    arguments = ["merge", *family, "-o", tmp_path / "out"]
    assert run(*arguments).exit_code == 0
    before = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    assert "the output exists already" in refused(*arguments)
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns == before
    assert run(*arguments, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns != before


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_an_interrupted_merge_ends_with_130_and_says_what_is_kept(family, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "merge", failing(KeyboardInterrupt()))
    done = run("merge", *family, "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert "kept" not in done.stderr
    (tmp_path / "out.partial").mkdir()
    done = run("merge", *family, "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert f"kept in {tmp_path / 'out.partial'}; run the same command again" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_disk_that_refuses_is_no_traceback(family, tmp_path, monkeypatch, number):
    monkeypatch.setattr(api, "merge", failing(OSError(number, os.strerror(number), "some/file")))
    text = refused("merge", *family, "-o", tmp_path / "out")
    assert text.startswith(f"error: {os.strerror(number)}\nwhere: some/file\nmend: ")


def test_our_own_bugs_end_with_1(family, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "merge", failing(ZeroDivisionError("a bug")))
    done = run("merge", *family, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert isinstance(done.exception, ZeroDivisionError)


def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "superpose", "methods", "--json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert done.returncode == 0
    assert done.stderr == ""
