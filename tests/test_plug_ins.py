"""Methods from outside of superpose: one file in a folder, as docs/add-a-method.md tells it."""

import os
import re
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from families import load, make_family, superpose

from superpose.records import RunRecord

PAGE = Path(__file__).parent.parent / "docs" / "add-a-method.md"


@pytest.fixture
def folder(tmp_path):
    """A folder with the file that the page shows, and nothing else."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "median.py").write_text(block, encoding="utf-8")
    return tmp_path / "my_methods"


def refused(*arguments, **environment):
    done = superpose(*arguments, check=False, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_newcomer_merges_with_one_file_from_the_command_line(tmp_path, folder):
    folders = make_family(tmp_path)
    arguments = ["merge", *folders, "-o", tmp_path / "out", "--method", "median", "--scaling-factor", "0.5", "--quiet"]
    superpose(*arguments, SUPERPOSE_METHODS=str(folder))
    base, *tuned = map(load, folders)
    for name, tensor in load(tmp_path / "out").items():
        middle = torch.stack([model[name] for model in tuned]).sort(dim=0).values[1] - base[name]
        torch.testing.assert_close(tensor, base[name] + 0.5 * middle)


def test_it_is_listed_described_and_its_options_checked(folder, tmp_path):
    listed = superpose("methods", SUPERPOSE_METHODS=str(folder)).stdout
    assert "median" in listed
    assert "ties" in listed
    assert "--scaling-factor" in superpose("methods", "median", SUPERPOSE_METHODS=str(folder)).stdout
    folders = make_family(tmp_path)
    arguments = ["plan", *folders, "--method", "median", "--scaling-factor", "99"]
    assert "[-10, 10]" in refused(*arguments, SUPERPOSE_METHODS=str(folder))
    assert "no method is named 'median'" in refused(*arguments)


def test_the_record_says_which_code_merged_and_a_changed_plug_in_merges_anew(tmp_path, folder):
    folders = make_family(tmp_path, tasks=2)
    common = ["merge", *folders, "--method", "median", "--quiet", "-o"]
    superpose(*common, tmp_path / "a", SUPERPOSE_METHODS=str(folder))
    file = folder / "median.py"
    file.write_text(file.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    superpose(*common, tmp_path / "b", SUPERPOSE_METHODS=str(folder))
    first, second = (RunRecord.load(tmp_path / name).versions for name in "ab")
    assert first["code"] == second["code"]
    assert first["method median"] != second["method median"]


def test_a_single_file_and_several_places_can_be_named(tmp_path, folder):
    (tmp_path / "other").mkdir()
    text = (folder / "median.py").read_text(encoding="utf-8")
    (tmp_path / "other" / "upper.py").write_text(text.replace('"median"', '"upper"'), encoding="utf-8")
    (tmp_path / "other" / "_helper.py").write_text("raise RuntimeError('not a plug-in')", encoding="utf-8")
    places = os.pathsep.join([str(folder / "median.py"), str(tmp_path / "other")])
    listed = superpose("methods", SUPERPOSE_METHODS=places).stdout
    assert "median" in listed
    assert "upper" in listed


def test_an_installed_package_offers_a_method(tmp_path, folder):
    package = tmp_path / "site"
    (package / "mine-1.0.dist-info").mkdir(parents=True)
    (package / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "mine-1.0.dist-info" / "entry_points.txt").write_text("[superpose.methods]\nmine = mine\n")
    (package / "mine.py").write_text((folder / "median.py").read_text(encoding="utf-8"), encoding="utf-8")
    assert "median" in superpose("methods", PYTHONPATH=str(package)).stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = = 1", ["SyntaxError", "bad.py, line 1"]),
        ("import math\nimport no_such_module", ["ModuleNotFoundError", "bad.py, line 2"]),
        ("raise KeyError('x')", ["KeyError", "bad.py, line 1"]),
        (
            """
            from dataclasses import dataclass
            from superpose.registry import merge_method
            @dataclass(frozen=True)
            class Options: pass
            @merge_method("ties", options=Options, source="")
            def ties(task_vectors, options): return task_vectors[0]
            """,
            ["a method named ties exists"],
        ),
    ],
)
def test_a_broken_plug_in_is_named_with_the_line(tmp_path, folder, text, expected):
    (folder / "bad.py").write_text(dedent(text))
    said = refused("methods", SUPERPOSE_METHODS=str(folder))
    assert all(part in said for part in expected), said
    assert "SUPERPOSE_METHODS" in said


def test_a_place_that_does_not_exist_is_named_with_the_nearest(folder):
    said = refused("methods", SUPERPOSE_METHODS=f"{folder}s")
    assert "no folder or Python file" in said
    assert "my_methods" in said
