"""Recipes: YAML as its users mean it, and every mistake named with its line and what was probably meant."""

from __future__ import annotations

import contextlib
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose.errors import Problems, SuperposeError
from superpose.kinds import Kind
from superpose.recipe import ModelEntry, Output, Recipe, Rule, load_recipe, parse_bytes

SMALLEST = {"base": "base", "models": ["tuned"]}


def written(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(dedent(text), encoding="utf-8")
    return file


def loaded(folder, text):
    return load_recipe(written(folder, text))


def problems_of(source):
    """Return the problems of a recipe: each in one line, each with what would mend it."""
    with pytest.raises(SuperposeError) as caught:
        load_recipe(source)
    problems = caught.value.problems if isinstance(caught.value, Problems) else (caught.value,)
    for problem in problems:
        assert problem.what
        assert problem.mend
        assert "\n" not in problem.what
    return problems


def problem_of(source):
    (problem,) = problems_of(source)
    return problem


def option(folder, text):
    """Return the value that an option written this way has."""
    return loaded(folder, f"base: b\nmodels: [t]\noptions:\n  x: {text}\n").options["x"]


# What a recipe says.


def test_the_smallest_recipe_has_defaults(tmp_path):
    recipe = loaded(tmp_path, "base: base\nmodels: [tuned]\n")
    assert recipe == Recipe(base="base", models=(ModelEntry(path="tuned", weight=1.0, name=""),))
    assert (recipe.method, recipe.options, recipe.rules) == ("stf", {}, ())
    assert (recipe.dtype, recipe.seed) == ("base", 0)
    assert recipe.output == Output(form="model", shard_size=5 * 10**9, tokenizer="base")


def test_a_full_recipe_is_read(tmp_path):
    recipe = loaded(
        tmp_path,
        """
        base: org/base@v1.0
        models:
          - path: org/math
            weight: 0.5
            name: math
          - ./code
        method: ties
        options: {density: 0.2, scaling_factor: 1e-1}
        rules:
          - {match: "*.lm_head.weight", kind: head}
          - {match: "model.layers.[0-3].*", method: average}
          - {kind: norm, keep: base}
        dtype: bfloat16
        seed: 7
        output: {shard_size: 250MB}
        """,
    )
    assert recipe.base == "org/base@v1.0"
    assert recipe.models == (ModelEntry(path="org/math", weight=0.5, name="math"), ModelEntry(path="./code"))
    assert recipe.method == "ties"
    assert recipe.options == {"density": 0.2, "scaling_factor": 0.1}
    assert recipe.rules == (
        Rule(match="*.lm_head.weight", kind=Kind.HEAD),
        Rule(match="model.layers.[0-3].*", method="average"),
        Rule(kind=Kind.NORM, keep="base"),
    )
    assert (recipe.dtype, recipe.seed, recipe.output.shard_size) == ("bfloat16", 7, 250 * 10**6)


def test_a_mapping_a_recipe_and_a_path_as_text_are_taken_too(tmp_path):
    recipe = load_recipe(SMALLEST)
    assert recipe == loaded(tmp_path, "base: base\nmodels: [tuned]\n")
    assert load_recipe(recipe) is recipe
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_paths_in_a_mapping_may_be_paths():
    recipe = load_recipe({"base": Path("base"), "models": [Path("a"), {"path": Path("b")}]})
    assert recipe.base == "base"
    assert [entry.path for entry in recipe.models] == ["a", "b"]


def test_a_mapping_is_left_as_it_is():
    given_mapping = {"base": "base", "models": ["a", {"path": "b"}], "options": {"density": 1}}
    load_recipe(given_mapping)
    assert given_mapping == {"base": "base", "models": ["a", {"path": "b"}], "options": {"density": 1}}


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(SMALLEST).method = "ties"


FULL = {
    "base": "org/base@main",
    "models": [{"path": "a", "weight": 0.5, "name": "first"}, "b"],
    "method": "ties",
    "options": {"density": 0.2, "density_scope": "tensor", "flag": True, "none": None},
    "rules": [
        {"match": "*.bias", "keep": "base"},
        {"match": "x", "kind": "head"},
        {"kind": "norm", "options": {"a": 1}},
    ],
    "dtype": "float32",
    "seed": 3,
    "output": {"shard_size": "1GiB"},
}


@pytest.mark.parametrize("content", [SMALLEST, FULL], ids=["smallest", "full"])
@pytest.mark.parametrize("exclude_unset", [False, True])
def test_a_recipe_survives_being_written_and_read(content, exclude_unset):
    recipe = load_recipe(content)
    assert load_recipe(recipe.model_dump(mode="json", exclude_unset=exclude_unset)) == recipe


# Names of tasks.


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["a/math", "b/code"], ("math", "code")),
        (["a/model", "b/model", "c/model"], ("a", "b", "c")),
        (["runs/1/last", "runs/2/last"], ("1", "2")),
        (["model", "b/model", "c/model"], ("model", "model-2", "model-3")),
        (["org/name@v1", "org/name@v2"], ("name", "name-2")),
        (["x/model.safetensors"], ("model.safetensors",)),
        ([{"path": "a", "name": "b"}, "b"], ("b", "b-2")),
        (["b", {"path": "a", "name": "b"}], ("b-2", "b")),
        (["a", "a-2", "a"], ("a", "a-2", "a-3")),
        (["/", ".."], ("model", "..")),
    ],
)
def test_every_task_has_a_name_of_its_own(models, names):
    found = load_recipe({"base": "base", "models": models}).task_names
    assert len(set(found)) == len(models)
    assert found == names


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "a-2", "x/a", "/"]), st.sampled_from(["", "a", "b", "a-2"]))))
def test_names_of_tasks_are_distinct_whatever_the_models_are_called(entries):
    own = [name for _, name in entries if name]
    if entries and len(set(own)) == len(own):
        recipe = load_recipe({"base": "base", "models": [{"path": path, "name": name} for path, name in entries]})
        assert len(set(recipe.task_names)) == len(entries)


def test_two_models_of_one_name_are_refused():
    models = [{"path": "a", "name": "math"}, {"path": "b", "name": "math"}]
    assert "two models are named math" in problem_of({"base": "base", "models": models}).what


# YAML as its users mean it.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("+1", 1),
        ("5.", 5.0),
        ("0", 0),
        ("-4", -4),
        ("010", 10),
        ("08", 8),
        ("-007", -7),
        ("off", "off"),
        ("no", "no"),
        ("No", "No"),
        ("yes", "yes"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("12:30:00", "12:30:00"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("0o10", "0o10"),
        ("1_000", "1_000"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1.2.3", "1.2.3"),
        (".", "."),
        ("=", "="),
        ("v1.0", "v1.0"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(tmp_path, text, value):
    found = option(tmp_path, text)
    assert found == value
    assert type(found) is type(value)


def test_infinity_is_a_number_and_no_weight(tmp_path):
    assert option(tmp_path, "-.inf") == float("-inf")
    for weight in (".inf", ".nan"):
        text = f"base: b\nmodels:\n  - path: t\n    weight: {weight}\n"
        assert "weight" in problem_of(written(tmp_path, text)).what


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("base: a\nmodels: [t]\nbase: b\n", "base", 3),
        ("base: a\nmodels: [t]\noptions:\n  density: 1\n  scaling_factor: 1\n  density: 2\n", "density", 6),
        ("base: a\nmodels:\n  - path: t\n    path: u\n", "path", 4),
        ("base: a\nmodels: [t]\nrules: [{match: x, keep: base, match: y}]\n", "match", 3),
    ],
    ids=["recipe", "options", "model", "rule in braces"],
)
def test_a_key_that_occurs_twice_is_refused_with_its_line(tmp_path, text, key, line):
    problem = problem_of(written(tmp_path, text))
    assert f"{key} occurs twice" in problem.what
    assert problem.where.endswith(f"recipe.yaml, line {line}")


def test_a_value_may_be_used_twice(tmp_path):
    recipe = loaded(
        tmp_path,
        """
        base: b
        models: [t]
        rules:
          - {match: a, method: ties, options: &same {density: 0.5}}
          - {match: c, method: ties, options: *same}
        """,
    )
    assert recipe.rules[0].options == recipe.rules[1].options == {"density": 0.5}


def test_text_of_any_language_is_read(tmp_path):
    assert loaded(tmp_path, "base: Modelle/größer\nmodels: [模型]\n").models[0].path == "模型"
    assert loaded(tmp_path, "\ufeffbase: b\nmodels: [t]\n").base == "b"


BROKEN = {
    "tab": ("base: b\nmodels:\n\t- t\n", 3),
    "open bracket": ("base: b\nmodels: [t\n", None),
    "open quote": ('base: "b\nmodels: [t]\n', None),
    "colon in a value": ("base: b\nmodels: [t]\nmethod: a: b\n", 3),
    "two documents": ("base: b\nmodels: [t]\n---\nbase: c\n", 3),
    "unknown alias": ("base: b\nmodels: [*t]\n", 2),
    "an object": ("base: b\nmodels: [t]\noptions: !!python/object/apply:os.system ['true']\n", 3),
    "number of letters": ("base: b\nmodels: [t]\nseed: !!int abc\n", None),
    "time of letters": ("base: b\nmodels: [t]\nseed: !!timestamp abc\n", None),
    "braces of a template": ("base: b\nmodels: [t]\noptions: {{density: 0.5}}\n", None),
    "list as a key": ("base: b\nmodels: [t]\noptions:\n  ? [a, b]\n  : 1\n", None),
    "value inside itself": ("base: b\nmodels: [t]\noptions: &a {density: *a}\n", None),
    "deep": ("base: " + "[" * 5000, None),
    "no character": ("base: b\0\nmodels: [t]\n", None),
}


@pytest.mark.parametrize(("text", "line"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_yaml_is_named(tmp_path, text, line):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    problem = problem_of(file)
    assert str(file) in problem.where
    assert line is None or problem.where.endswith(f", line {line}")


def test_an_object_in_a_recipe_is_not_made(tmp_path):
    marker = tmp_path / "marker"
    problem_of(written(tmp_path, f"base: !!python/object/apply:os.system ['touch {marker}']\nmodels: [t]\n"))
    assert not marker.exists()


@pytest.mark.parametrize("text", ["", "# only words\n", "[base, models]", "base", "7", "null"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    problem = problem_of(written(tmp_path, text))
    assert problem.what == "a recipe is a mapping"
    assert "recipe.yaml" in problem.where


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert "cannot be read" in problem_of(tmp_path / "nosuch.yaml").what
    assert "cannot be read" in problem_of(tmp_path).what
    (tmp_path / "latin.yaml").write_bytes("base: größer".encode("latin-1"))
    problem = problem_of(tmp_path / "latin.yaml")
    assert "cannot be read" in problem.what
    assert problem.where == str(tmp_path / "latin.yaml")


def test_a_recipe_of_mergekit_gets_an_answer_of_its_own(tmp_path):
    problem = problem_of(
        written(
            tmp_path,
            """
            merge_method: ties
            base_model: mistralai/Mistral-7B-v0.1
            models:
              - model: org/one
                parameters: {density: 0.5, weight: 0.3}
              - model: org/two
            parameters: {normalize: true}
            dtype: bfloat16
            """,
        )
    )
    assert "mergekit" in problem.what
    assert "models: [{path: ...}]" in problem.mend


# Mistakes.


@pytest.mark.parametrize(
    ("text", "key", "line", "nearest"),
    [
        ("base: b\nmodels: [t]\nmetod: ties\n", "metod", 3, "method"),
        ("base: b\nmodels: [t]\noption:\n  density: 1\n", "option", 3, "options"),
        ("base: b\nmodels:\n  - path: t\n    wieght: 0.5\n", "models.0.wieght", 4, "weight"),
        ("base: b\nmodels:\n  - t\n  - {path: u,\n     nam: x}\n", "models.1.nam", 5, "name"),
        (
            "base: b\nmodels: [t]\nrules:\n  - match: x\n    keep: base\n    optons: {}\n",
            "rules.0.optons",
            6,
            "options",
        ),
        ("base: b\nmodels: [t]\noutput:\n  shardsize: 1GB\n", "output.shardsize", 4, "shard_size"),
    ],
    ids=["recipe", "mapping in a recipe", "model", "model in braces", "rule", "output"],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest(tmp_path, text, key, line, nearest):
    problem = problem_of(written(tmp_path, text))
    assert problem.what == f"'{key}' is no key of a recipe"
    assert problem.where.endswith(f"recipe.yaml, line {line}")
    assert f"nearest match is '{nearest}'" in problem.mend


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base": None}, "base"),
        ({"base": 7}, "base"),
        ({"base": ["b"]}, "base"),
        ({"models": []}, "models"),
        ({"models": "t"}, "models"),
        ({"models": None}, "models"),
        ({"models": {"path": "t"}}, "models"),
        ({"models": [7]}, "models.0"),
        ({"models": [None]}, "models.0"),
        ({"models": [["t"]]}, "models.0"),
        ({"models": [{}]}, "models.0.path"),
        ({"models": [{"path": "t", "weight": "heavy"}]}, "models.0.weight"),
        ({"models": [{"path": "t", "weight": None}]}, "models.0.weight"),
        ({"models": [{"path": "t", "weight": float("nan")}]}, "models.0.weight"),
        ({"method": None}, "method"),
        ({"method": ["ties"]}, "method"),
        ({"options": ["density"]}, "options"),
        ({"options": None}, "options"),
        ({"options": {1: 2}}, "options.1"),
        ({"rules": {"match": "x"}}, "rules"),
        ({"rules": ["x"]}, "rules.0"),
        ({"rules": [{"match": "x", "kind": "norms"}]}, "rules.0.kind"),
        ({"rules": [{"match": "x", "keep": "tuned"}]}, "rules.0.keep"),
        ({"dtype": "float8"}, "dtype"),
        ({"dtype": "bf16"}, "dtype"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"output": {"form": "picture"}}, "output.form"),
        ({"output": {"shard_size": "big"}}, "output.shard_size"),
        ({"output": {"shard_size": 0}}, "output.shard_size"),
        ({"output": {"shard_size": None}}, "output.shard_size"),
        ({"output": {"shard_size": "1e999GB"}}, "output.shard_size"),
        ({"output": {"tokenizer": "union"}}, "output.tokenizer"),
        ({1: 2}, "1"),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_named(change, named):
    problem = problem_of({**SMALLEST, **change})
    assert named in problem.what
    assert problem.where == "the recipe"


@pytest.mark.parametrize("key", ["base", "models"])
def test_what_is_missing_is_named(key):
    content = {name: value for name, value in SMALLEST.items() if name != key}
    problem = problem_of(content)
    assert problem.what == f"'{key}' is missing"
    assert f"add {key}:" in problem.mend


def test_a_value_that_does_not_fit_is_shown_with_its_line(tmp_path):
    text = "base: b\nmodels:\n  - path: t\n    weight: heavy\noutput:\n  shard_size: big\n"
    lines = [problem.where.rpartition(", ")[2] for problem in problems_of(written(tmp_path, text))]
    assert lines == ["line 4", "line 6"]


def test_all_mistakes_are_found_together(tmp_path):
    problems = problems_of(
        written(
            tmp_path,
            """\
            base: b
            models:
              - path: t
                wieght: 1
              - {name: x}
            metod: ties
            dtype: float31
            rules:
              - {match: x}
            output: {shard_size: big}
            """,
        )
    )
    found = {problem.where.rpartition(", ")[2]: problem.what for problem in problems}
    assert found.keys() == {"line 4", "line 5", "line 6", "line 7", "line 9", "line 10"}
    assert "wieght" in found["line 4"]
    assert "'models.1.path' is missing" in found["line 5"]
    assert "metod" in found["line 6"]
    assert "float31" in found["line 7"] or "dtype" in found["line 7"]
    assert "rules.0" in found["line 9"]
    assert "'big' is no size" in found["line 10"]


# Rules.


@pytest.mark.parametrize(
    ("rule", "sets_kind"),
    [
        ({"match": "x", "kind": "head"}, True),
        ({"match": "x", "kind": "head", "keep": "base"}, False),
        ({"match": "x", "kind": "head", "method": "average"}, False),
        ({"match": "x", "kind": "head", "options": {"density": 1}}, False),
        ({"match": "x", "kind": "head", "drop": True}, False),
        ({"match": "x", "keep": "base"}, False),
        ({"kind": "head", "keep": "base"}, False),
    ],
    ids=str,
)
def test_a_rule_with_match_and_kind_alone_sets_the_kind(rule, sets_kind):
    assert Rule.model_validate(rule).sets_kind is sets_kind


@pytest.mark.parametrize(
    ("rule", "name", "kind", "applies"),
    [
        ({"match": "*.bias", "keep": "base"}, "layers.0.bias", Kind.BIAS, True),
        ({"match": "*.bias", "keep": "base"}, "bias", Kind.BIAS, False),
        ({"match": "*.bias", "keep": "base"}, "layers.0.Bias", Kind.BIAS, False),
        ({"match": "layers.[0-3].*", "keep": "base"}, "layers.3.weight", Kind.LINEAR, True),
        ({"match": "layers.[0-3].*", "keep": "base"}, "layers.4.weight", Kind.LINEAR, False),
        ({"match": "layers.[0-3].*", "keep": "base"}, "layers.13.weight", Kind.LINEAR, False),
        ({"match": "layers.?.w", "keep": "base"}, "layers.3.w", Kind.LINEAR, True),
        ({"kind": "norm", "keep": "base"}, "anything", Kind.NORM, True),
        ({"kind": "norm", "keep": "base"}, "anything", Kind.BIAS, False),
        ({"kind": "norm", "keep": "base"}, "anything", None, False),
        ({"match": "a*", "kind": "norm", "keep": "base"}, "abc", Kind.NORM, True),
        ({"match": "a*", "kind": "norm", "keep": "base"}, "xyz", Kind.NORM, False),
        ({"match": "a*", "kind": "norm", "keep": "base"}, "abc", Kind.BIAS, False),
        ({"match": "a*", "kind": "norm"}, "abc", Kind.BIAS, True),
        ({"match": "a*", "kind": "norm"}, "abc", None, True),
    ],
    ids=str,
)
def test_a_rule_applies_where_its_conditions_hold(rule, name, kind, applies):
    assert Rule.model_validate(rule).applies(name, kind) is applies


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ({}, "needs match, kind, or both"),
        ({"keep": "base"}, "needs match, kind, or both"),
        ({"drop": True}, "needs match, kind, or both"),
        ({"match": "x"}, "needs something to do"),
        ({"match": "x", "drop": False}, "needs something to do"),
        ({"kind": "norm"}, "kind alone does nothing"),
    ],
    ids=str,
)
def test_a_rule_that_says_nothing_is_refused(rule, what):
    problem = problem_of({**SMALLEST, "rules": [rule]})
    assert "rules.0" in problem.what
    assert what in problem.what


def test_a_rule_is_shown_as_it_was_written():
    assert str(Rule(match="*.bias", kind=Kind.BIAS, method="ties")) == "match: *.bias, kind: bias, method: ties"


# Sizes.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("4 GiB", 4 * 2**30),
        (" 4GiB ", 4 * 2**30),
        ("250MB", 250 * 10**6),
        ("250M", 250 * 10**6),
        ("250Mi", 250 * 2**20),
        ("1.5k", 1500),
        ("1.5KiB", 1536),
        ("2T", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        ("7", 7),
        ("7B", 7),
        ("5e9", 5 * 10**9),
        (5e9, 5 * 10**9),
        (7, 7),
        (".5k", 500),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size
    assert type(parse_bytes(text)) is int


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "4PiB", "4 bytes", "four", "-4GiB", "0", "0GB", 0, -1, "0.5", "1e-9", ".", "1.5.2GB", "1e999",
     "1e400GB", "nan", "inf", float("nan"), float("inf"), True, None, "4GiB4", "٤GB", "1,5GB", "0x10", [4], "9" * 400],
    ids=lambda text: repr(text)[:20],
)  # fmt: skip
def test_what_is_no_size_is_refused_in_words(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


@given(st.integers(1, 2**53))
def test_every_number_of_bytes_is_read_back(number):
    assert parse_bytes(number) == number
    assert parse_bytes(str(number)) == number
    assert parse_bytes(f"{number}B") == number


@given(st.integers(1, 2**20), st.sampled_from([("k", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12)]))
def test_units_are_powers_of_ten_or_two(number, unit):
    letter, power = unit
    assert parse_bytes(f"{number}{letter}") == parse_bytes(f"{number} {letter}B") == number * power
    exponent = "kMGT".index(letter) + 1
    assert parse_bytes(f"{number}{letter}iB") == parse_bytes(f"{number}{letter}i") == number * 1024**exponent


@given(st.text(max_size=8) | st.from_regex(r"[0-9.e]{1,6} ?[kmgt]?i?b?", fullmatch=True) | st.floats() | st.booleans())
def test_a_size_is_a_positive_number_or_refused(text):
    size = 1
    with contextlib.suppress(ValueError):
        size = parse_bytes(text)
    assert type(size) is int
    assert size >= 1


def test_aliases_within_aliases_take_no_time(tmp_path):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join(rows))
    assert len(problems_of(tmp_path / "recipe.yaml")) == 14  # base and models are missing, twelve keys are unknown
