"""Options: what a dataclass declares, and how what a user gives is checked and converted."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from superpose.errors import SuperposeError
from superpose.options import OptionSpec, Range, build_options, option_specs


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a method that exists in these tests alone."""

    density: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of each task vector's entries
    kept."""
    rank: Annotated[int | None, Range(1, 100)] = None
    """Most features kept."""
    steps: int = 3
    rescale: bool = False
    """Whether what is left is scaled up."""
    tie: Literal["zero", "positive"] = "zero"
    """Sign of exact ties."""
    fallback: Literal["sum", "mean"] | None = None
    label: str = "plain"


@dataclass(frozen=True, kw_only=True)
class MoreOptions(Options):
    """Options that take over those of another method."""

    density: Annotated[float, Range(0, 1)] = 0.5
    temperature: float = 1.0
    """Softness."""


SPECS = {spec.name: spec for spec in option_specs(Options)}


def build(**given):
    return build_options(Options, given, where="recipe.yaml, line 7", owner="method probe")


def built(**given):
    options, problems = build(**given)
    assert problems == []
    return options


def refusal(**given):
    """Return the one problem with what is given; the options must then be the defaults."""
    options, (problem,) = build(**given)
    assert options == Options()
    assert isinstance(problem, SuperposeError)
    return problem


# What is declared.


def test_options_are_listed_in_order():
    assert list(SPECS) == ["density", "rank", "steps", "rescale", "tie", "fallback", "label"]


def test_declaration_is_read_in_full():
    assert SPECS["density"] == OptionSpec(
        name="density",
        type=float,
        default=0.2,
        range=Range(0, 1),
        choices=(),
        optional=False,
        help="Fraction of each task vector's entries kept.",
    )
    assert SPECS["rank"] == OptionSpec("rank", int, None, Range(1, 100), (), True, "Most features kept.")
    assert SPECS["tie"] == OptionSpec("tie", str, "zero", None, ("zero", "positive"), False, "Sign of exact ties.")
    assert SPECS["rescale"].type is bool
    assert SPECS["fallback"].choices == ("sum", "mean")
    assert SPECS["fallback"].optional


def test_help_belongs_to_the_field_above_it():
    assert SPECS["steps"].help == ""
    assert SPECS["rescale"].help == "Whether what is left is scaled up."


def test_options_are_inherited_with_their_help():
    specs = {spec.name: spec for spec in option_specs(MoreOptions)}
    assert list(specs) == [*SPECS, "temperature"]
    assert specs["density"].default == 0.5
    assert specs["density"].help == SPECS["density"].help
    assert specs["temperature"].help == "Softness."
    assert specs["tie"] == SPECS["tie"]


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("density", "[0, 1]"),
        ("rank", "integer in [1, 100] or none"),
        ("steps", "integer"),
        ("rescale", "true | false"),
        ("tie", "zero | positive"),
        ("fallback", "sum | mean or none"),
        ("label", "text"),
    ],
)
def test_what_is_allowed_is_said_in_words(name, allowed):
    assert SPECS[name].allowed == allowed


def test_range_holds_its_ends():
    assert 0 in Range(0, 1)
    assert 1 in Range(0, 1)
    assert -1e-12 not in Range(0, 1)
    assert 1 + 1e-12 not in Range(0, 1)
    assert float("nan") not in Range(0, 1)
    assert str(Range(0.001, 1_000)) == "[0.001, 1000]"


# What is given.


def test_nothing_given_gives_the_defaults():
    assert built() == Options()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("density", "1e-3", 0.001),
        ("density", "1", 1.0),
        ("density", "0", 0.0),
        ("rank", "12", 12),
        ("rank", "none", None),
        ("rank", "Null", None),
        ("steps", "-4", -4),
        ("rescale", "true", True),
        ("rescale", "False", False),
        ("tie", "positive", "positive"),
        ("fallback", "mean", "mean"),
        ("fallback", "none", None),
        ("label", "true", "true"),
        ("label", "1e-3", "1e-3"),
    ],
)
def test_text_is_converted_to_the_type_of_the_option(name, text, value):
    found = getattr(built(**{name: text}), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [("density", 1, 1.0), ("rank", 3.0, 3), ("rank", None, None), ("rank", 100, 100), ("label", 5, "5")],
)
def test_values_are_converted_to_the_type_of_the_option(name, given, value):
    found = getattr(built(**{name: given}), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("density", 20),
        ("density", -0.1),
        ("density", "1.5"),
        ("density", "nan"),
        ("density", float("inf")),
        ("density", "dense"),
        ("density", ""),
        ("density", None),
        ("density", True),
        ("density", "true"),
        ("density", [0.5]),
        ("rank", 0),
        ("rank", 101),
        ("rank", 2.5),
        ("rank", "2.5"),
        ("steps", "none"),
        ("steps", "1e400"),
        ("rescale", 1),
        ("rescale", "yes"),
        ("rescale", None),
        ("tie", "negative"),
        ("tie", "none"),
        ("tie", None),
        ("tie", "Zero"),
        ("tie", 0),
        ("fallback", "max"),
        ("label", None),
    ],
)
def test_what_is_not_allowed_is_refused(name, value):
    problem = refusal(**{name: value})
    assert problem.what == f"{name}={value} is not allowed: method probe takes {SPECS[name].allowed}"
    assert problem.where == "recipe.yaml, line 7"


def test_refusal_says_what_to_choose_and_what_the_default_is():
    assert str(refusal(density=20)) == (
        "density=20 is not allowed: method probe takes [0, 1]\n"
        "where: recipe.yaml, line 7\n"
        "mend: choose density from [0, 1]; the default is 0.2"
    )


def test_unknown_option_names_the_nearest():
    problem = refusal(densty=0.5)
    assert problem.what == "method probe has no option 'densty'"
    assert problem.where == "recipe.yaml, line 7"
    assert problem.mend == ("nearest match is 'density'; known: density, fallback, label, rank, rescale, steps, tie")


def test_option_like_no_other_names_all():
    assert refusal(xyz=1).mend == "known: density, fallback, label, rank, rescale, steps, tie"


def test_dashes_stand_for_underscores():
    @dataclass(frozen=True, kw_only=True)
    class Scaled:
        scaling_factor: float = 1.0

    options, problems = build_options(Scaled, {"scaling-factor": "0.5"}, where="", owner="method probe")
    assert problems == []
    assert options.scaling_factor == 0.5


def test_all_problems_are_found_together_and_the_rest_is_taken():
    options, problems = build(density=20, densty=1, tie="none", rank=7)
    assert [problem.what.split()[0] for problem in problems] == ["density=20", "method", "tie=none"]
    assert options == Options(rank=7)
