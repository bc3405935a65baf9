"""What the evidence page stands on: answers that are kept, intervals, grids, the page itself."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict

import bootstrap
import grid
import numpy as np
import page
import pytest
import run
import text_tasks
import torch
from analyses import ANALYSES, preservation
from efficientnet import Body
from families import make_family
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import Job
from probe import probed
from rows import Evaluated
from suite import Answers

import superpose
from superpose.demo.splits import Example
from superpose.maths.svd import thin_svd

answers = st.lists(st.booleans(), min_size=1, max_size=70)


@given(answers)
def test_answers_come_back_as_they_were_packed(right):
    found = Answers.unpacked(Answers(right).packed())
    assert list(found.right) == right
    assert found.accuracy == sum(right) / len(right)


def test_answers_that_lack_some_are_refused():
    count, digits = Answers([True] * 9).packed().split(":")
    with pytest.raises(ValueError, match="9 answers, where 10"):
        Answers.unpacked(f"{int(count) + 1}:{digits}")


def packed(right):
    return {task: Answers(list(row)).packed() for task, row in enumerate(right)}


DRAWN = 40_000


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_the_interval_is_that_of_drawing_examples_one_by_one(seed):
    generator = np.random.default_rng(seed)
    first = generator.random((2, 3, 60)) < 0.7  # seeds, tasks, examples
    second = generator.random((2, 3, 60)) < 0.6
    found = bootstrap.difference([packed(one) for one in first], [packed(one) for one in second], draws=DRAWN)
    drawn = generator.integers(0, 60, (DRAWN, 3, 60))
    better = (first.astype(float) - second).mean(axis=0)
    means = np.mean([better[task][drawn[:, task]].mean(axis=1) for task in range(3)], axis=0)
    assert found.value == pytest.approx(first.mean() - second.mean())
    # A quantile in the tail is known 2.7 times worse than a mean, and both sides are drawn: six of their standard
    # errors are never seen. What is drawn moves in steps, of one answer.
    error = 6 * math.sqrt(2) * 2.7 * means.std() / math.sqrt(DRAWN) + 1 / (2 * 3 * 60)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=error)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=error)


def test_a_merge_compared_with_itself_differs_by_nothing():
    one = [packed(np.random.default_rng(0).random((3, 40)) < 0.5)]
    found = bootstrap.difference(one, one, draws=100)
    assert (found.value, found.low, found.high, found.above) == (0, 0, 0, 0.5)
    assert not found.is_clear


def test_merges_of_other_tasks_are_not_compared():
    with pytest.raises(ValueError, match="differ"):
        bootstrap.difference([{"a": "1:3"}], [{"b": "1:3"}])


def test_every_method_is_in_the_table_or_left_out_with_a_reason():
    known = {method.name for method in superpose.list_methods()}
    found = {one.default.method for one in grid.variants(8, sorted(known), data=True)}
    assert found | set(grid.LEFT_OUT) == known


@pytest.mark.parametrize("tasks", [3, 8])
def test_every_setting_is_one_that_its_method_takes(tmp_path, tasks):
    folders = make_family(tmp_path, tasks=tasks)
    models = [str(folder) for folder in folders[1:]]
    known = [method.name for method in superpose.list_methods()]
    for variant in grid.variants(tasks, known, data=False, kernels=True):
        for setting in (variant.default, *variant.grid):
            recipe = {"base": str(folders[0]), "models": models, "method": setting.method}
            superpose.plan({**recipe, "options": dict(setting.options)})
        assert len({setting.text for setting in variant.grid}) == len(variant.grid)


class FamilyAsSuite:
    """A family of small models whose merges are "right" where entries of the first tensor are positive."""

    name, tasks, mark, rules = "small", ("first", "second"), "four weights", ()

    def __init__(self, root):
        self.base, *self.models = make_family(root, tasks=2)
        self.scored = []

    def finetune(self, task, seed):
        return self.models[self.tasks.index(task)]

    def tuned(self, seed):
        return self.models

    def data(self, setting, task, seed):
        return {}

    def answers(self, model, tasks, seed, part):
        from safetensors.torch import load_file

        self.scored.append((model, tuple(tasks)))
        tensors = load_file(next(model.glob("*.safetensors")))
        first = tensors[min(tensors)].flatten().float()
        return {task: Answers((first[:50] > 0.01 * len(task)).tolist()) for task in tasks}


def test_a_row_is_made_once_and_kept(tmp_path):
    suite = FamilyAsSuite(tmp_path / "models")
    setting = grid.Setting("task_arithmetic", {"scaling_factor": 0.5})
    made = Evaluated(suite, tmp_path / "rows").row(setting, 0, "test")
    assert list(made.answers) == ["first", "second"]
    assert len(suite.scored) == 1
    assert Evaluated(suite, tmp_path / "rows").row(setting, 0, "test") == made
    assert len(suite.scored) == 1
    other = Evaluated(suite, tmp_path / "rows").row(setting, 0, "validation")
    assert other.part == "validation"
    assert Evaluated(suite, tmp_path / "rows").row(setting, 1, "test").seed == 1
    assert Evaluated(suite, tmp_path / "rows").row("fine-tuned", 0, "test").accuracy.keys() == {"first", "second"}
    assert {model for model, _ in suite.scored[-2:]} == set(suite.models)


def row(name, right, seed=0):
    return {
        "name": name, "seed": seed, "answers": {"a": Answers(right).packed(), "b": Answers(right[::-1]).packed()},
        "merge_seconds": 1.5, "made_by": {"code": "c0de", "torch": "2", "transformers": "5"},
    }  # fmt: skip


def results(*methods, alone):
    return {
        "command": "a command", "machine": "a machine", "rows": 3, "minutes_of_rows": 1,
        "originals": [row("fine-tuned", alone)],
        "methods": [{"name": name, "looks_at_data": False, "default": [row(name, right)]} for name, right in methods],
    }  # fmt: skip


def test_methods_are_added_to_published_results_or_made_anew():
    good, bad = [True] * 9 + [False], [False] * 9 + [True]
    published = results(("average", bad), ("ties", bad), alone=good)
    both = run.added(published, results(("ties", good), ("two words", bad), alone=good))
    assert both["originals"] == published["originals"]
    assert [one["name"] for one in both["methods"]] == ["average", "ties", "two words"]
    assert both["methods"][1]["default"][0]["answers"] == row("ties", good)["answers"]
    assert [one["command"] for one in both["added"]] == ["a command --add --methods ties 'two words'"]
    again = run.added(both, results(("two words", good), alone=good))
    assert [one["methods"] for one in again["added"]] == [["ties"], ["two words"]]


@pytest.fixture
def running(tmp_path, monkeypatch):
    """Return a function that calls run.py with results made up; it returns what was published at each page's making."""

    def call(*arguments, found):
        published = []
        monkeypatch.setattr(run, "run", lambda *_: iter(found))
        monkeypatch.setattr(run, "working_on", lambda *_: nullcontext())
        monkeypatch.setattr(run, "known_variants", lambda _: [grid.Variant("ties", grid.Setting("ties"), ())])
        monkeypatch.setattr(page, "RESULTS", tmp_path)
        monkeypatch.setattr(page, "write", lambda: published.append(json.loads((tmp_path / "text.json").read_text())))
        monkeypatch.setattr(sys, "argv", ["run.py", "text", "--out", str(tmp_path / "out"), *arguments])
        run.main()
        return published

    return call


def test_results_are_published_once_they_are_whole(running, tmp_path):
    part, whole = results(("average", [True] * 3), alone=[True] * 3), results(("ties", [True] * 3), alone=[True] * 3)
    assert running(found=[part, whole]) == [whole]
    assert running("--methods", "ties", found=[part]) == []
    assert json.loads((tmp_path / "text.json").read_text()) == whole
    assert json.loads((tmp_path / "out" / "text.json").read_text()) == part


def test_a_method_that_is_not_in_the_table_is_refused(running, capsys):
    with pytest.raises(SystemExit):
        running("--methods", "tise", found=[])
    assert "tise: not among ties" in capsys.readouterr().err


def test_methods_of_other_fine_tunes_are_not_added(tmp_path):
    made = Evaluated(FamilyAsSuite(tmp_path / "models"), tmp_path / "rows").row("fine-tuned", 0, "test")
    other = {task: Answers([not one for one in Answers.unpacked(text).right]) for task, text in made.answers.items()}
    run.check_same([asdict(made)], [made])
    with pytest.raises(SystemExit, match="fine-tuned, seed 0: answers otherwise"):
        run.check_same([{**asdict(made), "answers": {task: one.packed() for task, one in other.items()}}], [made])


def test_the_page_has_the_numbers_of_the_results(tmp_path, monkeypatch):
    good, fair, bad = [True] * 9 + [False], [True] * 8 + [False] * 2, [True] * 3 + [False] * 7
    content = {
        "benchmark": "text", "machine": "a machine", "command": "a command", "mark": "a mark", "seeds": [0],
        "tasks": ["a", "b"], "sizes": {"a": [9, 5, 7]}, "grid_size": 8, "rows": 6, "minutes_of_rows": 9,
        "added": [{"methods": ["average"], "command": "a later command", "machine": "another machine", "rows": 2,
                   "minutes_of_rows": 3}],
        "originals": [row("pretrained", bad), row("fine-tuned", good)],
        "methods": [
            {"name": "stf", "looks_at_data": False, "default": [row("stf", bad)],
             "chosen": [row("stf (density 1)", fair)], "validation": {}},
            {"name": "average", "looks_at_data": True, "default": [row("average", bad)], "chosen": [],
             "validation": {}},
        ],
    }  # fmt: skip
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "text.json").write_text(json.dumps(content), encoding="utf-8")
    removed = [{"end": end, "share": 0.5, "mean": 0.25} for end in ("remove_smallest", "remove_largest")]
    made = {"command": "analyse", "made_by": {"code": "c0de", "at": "today"}, "machine": "a machine"}
    analyses = {"removed_features": {"found": {"none": 0.5, "removed": removed}, **made}}
    (tmp_path / "evidence" / "text-analyses.json").write_text(json.dumps(analyses), encoding="utf-8")
    summary = "STF {text_stf}, {text_fine_tuned} alone, {text_stf_less_average}.\n"
    (tmp_path / "evidence" / "summary.md").write_text(summary, encoding="utf-8")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "evidence")
    text = page.page()
    assert "STF 0.800, 0.900 alone, +0.500 (+0." in text
    assert "`average` came later, by `a later command`, on another machine (3 minutes for 2 rows)" in text
    assert "| **stf** | 0.800 | 0.800 | 0.800 |  | 0.889 |" in text
    assert "| average (sees data) | 0.300 | 0.300 | 0.300 |  | 0.333 | +0.500 (+0." in text
    assert "| the weakest | 0.250 |" in text
    assert "`analyse`; superpose code c0de, today UTC, a machine." in text
    assert text.index("| **stf** | 0.800") < text.index("| average (sees data) | 0.300")
    (tmp_path / "evidence" / "summary.md").write_text("{text_ties}", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"summary.md: \{text_ties\} is in no result"):
        page.page()


def test_the_network_has_the_published_layout():
    body = Body().eval()
    names = set(body.state_dict())
    assert "_blocks.15._project_conv.weight" in names
    assert len([name for name in names if name.endswith("running_mean")]) == 49
    with torch.inference_mode():
        assert body(torch.zeros(2, 3, 64, 64)).shape == (2, 1280)


def test_jobs_that_differ_in_their_factor_or_examples_alone_are_solved_together():
    def job(part="test", seed=0, merged=(), **options):
        return Job(grid.Setting("stf", options), seed, part, merged)

    one = job(density=1.0, scaling_factor=0.5)
    assert one.solved_with == job("validation", scaling_factor=1, density=1.0).solved_with
    others = [
        job(density=0.2),
        job(density=1.0, seed=1),
        job(density=1.0, merged=("a", "b")),
        job(ridge=0.1, density=1.0),
    ]
    assert len({one.solved_with, *(other.solved_with for other in others)}) == 5
    assert Job("pretrained", 0, "test").solved_with != Job("fine-tuned", 0, "test").solved_with


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 10), (2, 20), (5, 21)], 1.0),
        ([(1, 3), (2, 2), (3, 1)], -1.0),
        ([(1, 1), (1, 2), (2, 3), (3, 3)], 8 / 9),  # ranks 1.5 1.5 3 4 and 1 2 3.5 3.5
        ([(1, 2), (2, 1), (3, 4), (4, 3)], 0.6),
    ],
)
def test_correlations_are_of_ranks(pairs, expected):
    found = preservation.rank_correlation(pairs)
    assert found["methods"] == len(pairs)
    assert found["correlation"] == pytest.approx(expected)


def test_a_probe_finds_what_features_tell_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    centres = torch.randn(4, 10, generator=generator)
    telling = centres[labels] + 0.1 * torch.randn(200, 10, generator=generator)
    assert probed((telling[:100], labels[:100]), (telling[100:], labels[100:])).accuracy == 1
    silent = torch.randn(200, 10, generator=generator)
    assert 0.1 < probed((silent[:100], labels[:100]), (silent[100:], labels[100:])).accuracy < 0.45


def test_all_strength_is_left_of_one_task_and_a_part_of_others():
    generator = torch.Generator().manual_seed(1)
    task = torch.randn(6, 5, generator=generator)
    assert preservation.share_answered(task, [thin_svd(task)]) == pytest.approx(1)
    assert preservation.share_answered(task / 4, [thin_svd(task)]) == pytest.approx(1 / 4)
    assert preservation.share_answered(task, [thin_svd(task), thin_svd(-task)]) == pytest.approx(0, abs=1e-6)


def accuracies(mean):
    return {"name": "stf (density 1)", "mean": mean, "accuracy": {"a": mean - 0.1, "b": mean + 0.1}}


DIFFERENCE = {"value": 0.05, "low": 0.01, "high": 0.09, "above": 1.0}
FOUND = {
    "matrices": [accuracies(0.5), accuracies(0.25)],
    "control": [
        {"at": "here", "density": 0.2, "scaling_factor": 0.8, "stf": {"a": 0.75}, "control": {"a": 0.5},
         "difference": DIFFERENCE}
    ],
    "variations": [
        {"to": "the chosen", "change": change, **accuracies(0.5), "difference": DIFFERENCE}
        for change in ({}, {"ridge": 0.1})
    ],
    "removed_features": {
        "none": 0.5,
        "removed": [{"end": end, "share": 0.5, "mean": 0.25} for end in ("remove_smallest", "remove_largest")],
    },
    "density_and_factor": [
        {"method": "ties", "density": 0.2, "scaling_factor": 0.5, "mean": 0.25},
        {"method": "ties", "density": 0.2, "scaling_factor": 1.0, "mean": 0.5, "test": 0.45, "stf_less_it": DIFFERENCE},
        {"method": "pcb", "density": 0.2, "scaling_factor": 0.5, "mean": 0.25},
    ],
    "number_of_tasks": [
        {"tasks": 2, "merged": ["a", "b"], "method": method, "normalised": share, "mean": 0.5, "factor": factor}
        for method, share, factor in (("stf", 0.75, 0.8), ("stf", 0.25, 0.4), ("iso_share", 0.9, None))
    ],
    "preservation": {
        "methods": {
            "stf": {"setting": "", "mean": 0.75,
                    "layers": {"w": {"at_factor_1": 0.001, "of_trimmed": 0.0, "relative": 0.5, "answered": 0.25}}}
        },
        "correlations": {
            measure: {"correlation": -0.5, "methods": 9} for measure in preservation.MEASURES
        },
    },
    "held_out": {
        name: {"accuracy": {"a": 0.25, "b": 0.75}, "less pretrained": DIFFERENCE} for name in ("pretrained", "stf")
    },
    "times": {"stf": 3.25, "ties": 1.5},
}  # fmt: skip
"""What each analysis finds, made up, and in the page below."""
SAID = {
    "matrices": "| stf (density 1) | 0.150 | 0.350 | 0.250 |",
    "control": "| here | 0.2 | 0.8 | 0.750 | 0.500 | +0.050 (+0.010 to +0.090) | +0.250 |",
    "variations": "| the chosen | ridge 0.1 | 0.500 | +0.050 (+0.010 to +0.090) |",
    "removed_features": "| the weakest | 0.250 |",
    "density_and_factor": "| ties | 0.2 | 1 | 0.500 | 0.250 to 0.500 | 0.450 | +0.050 (+0.010 to +0.090) |\n"
    "| pcb | 0.2 | 0.5 | 0.250 | 0.250 to 0.250 |  |  |",
    "number_of_tasks": "| best factor of STF | 0.6 |",
    "preservation": "| stf | 1.00 | 0.00 | 0.500 | 0.250 | 0.750 |",
    "held_out": "| stf | 0.250 | 0.750 | 0.500 | +0.050 (+0.010 to +0.090) |",
    "times": "| ties | 1.5 |\n| stf | 3.2 |",
}


@pytest.mark.parametrize("name", list(ANALYSES))
def test_the_page_has_what_each_analysis_found(name):
    made = {"command": "a command", "made_by": {"code": "c0de", "at": "today"}, "machine": "a machine"}
    text = "\n".join(page.sections("text", {name: {"found": FOUND[name], **made}}))
    assert SAID[name] in text
    assert "`a command`; superpose code c0de, today UTC, a machine." in text


def test_the_summary_can_name_what_a_variation_changes_and_what_solving_is_worth():
    difference = "+0.050 (+0.010 to +0.090)"
    assert ANALYSES["variations"].numbers(FOUND["variations"]) == {"chosen_ridge_0_1": difference}
    assert ANALYSES["density_and_factor"].numbers(FOUND["density_and_factor"]) == {
        "ties_test": "0.450", "stf_less_ties": difference,
    }  # fmt: skip
    assert ANALYSES["control"].numbers(FOUND["control"]) == {"here": difference, "here_mean": "0.750"}


def test_what_one_task_is_asked_is_no_others_to_learn(tmp_path, monkeypatch):
    shared = [f"a text that two sources have, number {number}" for number in range(30)]

    def task(name, learnt, rest):
        def read(folder):
            labelled = [[Example(text, "good" if len(text) % 2 else "bad") for text in part] for part in (learnt, rest)]
            return labelled[0], labelled[1]

        return text_tasks.TextTask(name, "made up", "none", read)

    own = [f"only here {number}" for number in range(20)]
    tasks = (
        task("first", own, shared),
        task("second", [*own, *(text.upper() for text in shared)], ["an odd one", "one"]),
    )
    monkeypatch.setattr(text_tasks, "TASKS", tasks)
    monkeypatch.setattr(text_tasks, "HELD_OUT", ())
    monkeypatch.setattr(text_tasks, "fetch", lambda archive, folder: folder)
    first, second = (text_tasks.load(one, tmp_path, train=99, validation=10, test=5) for one in tasks)
    asked = {text for text, _ in (*first.validation, *first.test)}
    assert len(asked) == 15
    learnt = {text.lower() for text, _ in second.train}
    assert not asked & learnt
    assert len(learnt) == 20 + 30 - 15  # what nobody is asked stays
