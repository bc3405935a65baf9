"""Recipes and patterns made to do harm: they end soon, run nothing, and are read up to a size."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from families import save
from safetensors.torch import load_file, save_file

import superpose as library
from faults.damage import (
    BASE,
    MERGED,
    REFUSED,
    SOON,
    TUNED,
    adapter,
    assert_says,
    merged_or_refused,
    refused_by_the_command_line,
    small_base,
    small_family,
)
from superpose import SuperposeError
from superpose.recipe import LARGEST_RECIPE, load_recipe

GROUP = "Hostile inputs"


def recipe_text(root: Path, more: str) -> str:
    return f"base: {root / BASE}\nmodels: [{root / TUNED}]\nmethod: average\n{more}"


RECIPES = {
    "a call": "options: !!python/object/apply:os.system ['touch {canary}']\n",
    "a call of an old form": "options: !!python/object/new:os.system ['touch {canary}']\n",
    "a module": "options: !!python/module:os\n",
    "a name": "options: !!python/name:os.system\n",
    "a tuple": "options: !!python/tuple [1, 2]\n",
    "a class of its own": "options: !Canary {{a: 1}}\n",
    "aliases within aliases": "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        + [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, 30)]
    ).replace("{", "{{").replace("}", "}}"),
    "aliases merged into aliases": "\n".join(
        ["a0: &a0 {{x0: 1}}"] + [f"a{at}: &a{at} {{{{<<: [*a{at - 1}, *a{at - 1}], x{at}: 1}}}}" for at in range(1, 30)]
    ),
    "a value in itself": "options: &a {{density: *a}}\n",
    "a list fifty thousand deep": "options: " + "[" * 50_000,
    "a mapping a thousand deep": "options: " + "{{a: " * 1000 + "1" + "}}" * 1000,
    "lines a thousand deep": "options:\n" + "".join(" " * at + "a:\n" for at in range(1, 1000)),
    "a number of a hundred thousand digits": "seed: " + "9" * 100_000 + "\n",
    "a number to the power of a billion": "options: {{scaling_factor: 1e1000000000}}\n",
    "a name of a path without end": "learned: " + "a/" * 100_000 + "\n",
    "a name with a zero byte": 'learned: "a\\0b"\n',
    "a pattern of a hundred stars": "rules: [{{match: '" + "*a" * 100 + "b', keep: base}}]\n",
    "a pattern of sets": "rules: [{{match: '" + "[z-a]" * 100 + "', keep: base}}]\n",
    "two thousand rules": "rules:\n" + "- {{match: x, keep: base}}\n" * 2_000,
}  # fmt: skip


@pytest.mark.parametrize("fault", RECIPES)
def test_a_recipe_that_is_a_trap_ends_soon_and_runs_nothing(tmp_path, tally, fault):
    canary = tmp_path / "canary"
    small_family(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(tmp_path, RECIPES[fault].format(canary=canary)))
    with tally(GROUP, f"recipe: {fault}") as injection:
        begun = time.process_time()
        try:
            library.merge(file, tmp_path / "out", backend="serial")
            injection.outcome = MERGED
        except SuperposeError as error:
            assert_says(str(error))
            injection.outcome = REFUSED
        assert time.process_time() - begun < SOON
        assert not canary.exists()
        assert injection.outcome == REFUSED or fault.startswith(("a pattern", "two thousand rules"))


def test_a_pattern_of_a_hundred_stars_is_matched_in_no_time(tmp_path, tally):
    """Every star doubles the work of a matcher that goes back."""
    tensors = {**small_base(), "a" * 400 + ".weight": torch.ones(3, 3)}
    save(tmp_path / BASE, tensors)
    save(tmp_path / TUNED, tensors)
    with tally(GROUP, "recipe: a pattern of many stars") as injection:
        begun = time.process_time()
        injection.outcome = merged_or_refused(
            tmp_path / BASE, [tmp_path / TUNED], tmp_path / "out", rules=[{"match": "*a" * 60 + "b", "keep": "base"}]
        )
        assert time.process_time() - begun < SOON


@pytest.mark.parametrize("pattern", ["(a|b|ab)*", "(.*.*.*)x", "(a+)+", ".*.*.*x", "a{1,9}{1,9}", "(?:a?){99}b"])
def test_a_pattern_of_an_adapter_is_matched_in_no_time_or_refused(tmp_path, tally, pattern):
    base, _ = small_family(tmp_path)
    folder = adapter(tmp_path / "adapter", rank_pattern={pattern: 2, **{f"{pattern}{at}": 2 for at in range(200)}})
    tensors = load_file(folder / "adapter_model.safetensors")
    place = "base_model.model." + ".".join("a" * 9 for _ in range(40))
    tensors |= {f"{place}{at}.lora_A.weight": torch.ones(2, 8) for at in range(50)}
    tensors |= {f"{place}{at}.lora_B.weight": torch.ones(24, 2) for at in range(50)}
    save_file(tensors, folder / "adapter_model.safetensors")
    with tally(GROUP, "adapter: a slow pattern") as injection:
        begun = time.process_time()
        injection.outcome = merged_or_refused(base, [folder], tmp_path / "out", [str(folder)], method="task_arithmetic")
        assert injection.outcome == REFUSED
        assert time.process_time() - begun < SOON


@pytest.mark.parametrize("kind", ["/dev/zero", "a pipe", "a socket of nobody", "ten gigabytes", "a folder"])
def test_a_recipe_that_is_no_file_of_a_recipes_size_is_refused(tmp_path, tally, forks, kind):
    small_family(tmp_path)
    file = tmp_path / "recipe.yaml"
    if kind == "/dev/zero":
        file.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a socket of nobody":
        os.mknod(file, 0o140600)
    elif kind == "a folder":
        file.mkdir()
    else:
        with file.open("wb") as stream:
            stream.truncate(10 << 30)
    with tally(GROUP, f"recipe: {kind}", "command line") as injection:
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "merge", file, "-o", tmp_path / "out", names=["the recipe cannot be read"],
            memory=100_000_000,
        )  # fmt: skip


def test_a_recipe_of_any_size_below_the_limit_is_read(tmp_path):
    text = recipe_text(tmp_path, "# " + "x" * 60 + "\n")
    (tmp_path / "recipe.yaml").write_text(text + "#" * (LARGEST_RECIPE - len(text)))
    assert load_recipe(tmp_path / "recipe.yaml").method == "average"
    (tmp_path / "recipe.yaml").write_text(text + "#" * (LARGEST_RECIPE - len(text) + 1))
    with pytest.raises(SuperposeError, match="larger than"):
        load_recipe(tmp_path / "recipe.yaml")
