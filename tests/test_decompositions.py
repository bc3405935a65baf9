"""The cache of decompositions: the same bytes with it and without, whatever happens to its folder."""

import importlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from tests.families import make_family
from tests.families import superpose as run

import superpose
import superpose.api
from superpose.decompositions import DecompositionCache, open_cache
from superpose.errors import SuperposeError
from superpose.kinds import Kind
from superpose.registry import Remembered, find_method, registered


def entry(size=100, number=1.0):
    return Remembered({"x": torch.full((size,), number)}, {"n": [1, "two"]})


def remember(cache, what="it", tensors=(), number=1.0, **options):
    """Return what the cache gives, and whether it was computed."""
    computed = []

    def compute():
        computed.append(True)
        return entry(number=number)

    found = cache.remember(what, tensors or [torch.zeros(3)], compute, **options)
    return found, bool(computed)


def files(folder):
    return sorted(path for path in Path(folder).iterdir() if path.suffix == ".entry")


def test_what_is_remembered_comes_back_as_it_was(tmp_path):
    cache = open_cache(tmp_path / "new" / "folder", 10**6)
    tensors = {"a": torch.randn(3, 5).T, "b": torch.arange(4, dtype=torch.float64), "none": torch.zeros(0, 2)}
    cache.remember("it", [torch.ones(2)], lambda: Remembered(tensors, {"n": 3, "text": "é"}))
    found = cache.remember("it", [torch.ones(2)], lambda: pytest.fail("computed again"))
    assert found.numbers == {"n": 3, "text": "é"}
    assert {name: torch.equal(tensor, tensors[name]) for name, tensor in found.tensors.items()} == dict.fromkeys(
        tensors, True
    )
    assert cache.problems() == ()


def test_anything_else_that_goes_in_is_another_entry(tmp_path):
    cache = open_cache(tmp_path, 10**6)
    x = torch.arange(6.0)
    inputs = [
        ("it", [x]), ("that", [x]), ("it", [x + 1e-7]), ("it", [x.reshape(2, 3)]), ("it", [x.double()]),
        ("it", [x, x]), ("it", [x[:3], x[3:]]), ("it", [-x]),
    ]  # fmt: skip
    assert all(remember(cache, what, tensors)[1] for what, tensors in inputs)
    assert not any(remember(cache, what, tensors)[1] for what, tensors in inputs)
    # The layout in memory is not content.
    assert not remember(cache, "it", [x.reshape(2, 3).T.contiguous().T])[1]


def test_entries_of_other_code_are_not_used(tmp_path, monkeypatch):
    cache = open_cache(tmp_path, 10**6)
    remember(cache)
    monkeypatch.setattr("superpose.decompositions.code_digest", lambda: "other")
    assert remember(cache)[1]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "header"])
def test_damaged_entry_is_computed_anew_and_said(tmp_path, damage):
    cache = open_cache(tmp_path, 10**6)
    remember(cache)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-7] ^= 1
    path.write_bytes(
        {"truncated": content[:-9], "empty": b"", "foreign": b"x" * 500, "header": content[:20]}.get(damage, content)
    )
    found, computed = remember(cache, number=1.0)
    assert computed
    assert torch.equal(found.tensors["x"], torch.ones(100))
    (problem,) = cache.problems()
    assert path.name in problem
    assert "anew" in problem
    assert cache.problems() == ()
    assert not remember(cache)[1]


def test_least_recently_used_entries_go_when_room_is_needed(tmp_path):
    cache = open_cache(tmp_path, 3000)
    for number in range(4):
        remember(cache, f"{number}")
        os.utime(max(files(tmp_path), key=lambda path: path.stat().st_mtime_ns), (number, number))
    assert not remember(cache, "0")[1]  # used just now
    for number in range(4, 7):
        remember(cache, f"{number}")
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3000
    assert not remember(cache, "0")[1]
    assert remember(cache, "1")[1]


def test_entry_larger_than_the_limit_is_not_kept(tmp_path):
    cache = open_cache(tmp_path, 100)
    assert remember(cache)[1]
    assert remember(cache)[1]
    assert files(tmp_path) == []


def test_limit_counts_what_other_runs_have_written(tmp_path):
    for number in range(5):
        remember(open_cache(tmp_path, 10**6), f"{number}")
    remember(open_cache(tmp_path, 2000), "last")
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 2000


def test_files_of_dead_runs_are_cleared_away_and_those_of_live_ones_kept(tmp_path):
    cache = open_cache(tmp_path, 10**6)
    old, new = tmp_path / "old.tmp", tmp_path / "new.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    remember(cache)
    assert not old.exists()
    assert new.exists()


def test_steps_are_kept_only_where_they_are_asked_for(tmp_path):
    cache = open_cache(tmp_path, 10**6, keep_steps=False)
    assert remember(cache, step=True)[1]
    assert remember(cache, step=True)[1]
    assert files(tmp_path) == []


def test_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SuperposeError, match="--cache"):
        open_cache(tmp_path / "file" / "folder", 10**6)


def test_failure_to_write_does_not_stop_the_merge_and_is_said(tmp_path):
    cache = DecompositionCache(tmp_path / "cache", 10**6)
    cache.folder.mkdir()
    remember(cache)
    cache.folder.rename(tmp_path / "away")
    found, computed = remember(cache, "that")
    assert computed
    assert found.tensors["x"].tolist() == [1.0] * 100
    assert any("cannot be written" in problem for problem in cache.problems())


def test_folder_that_is_taken_away_does_not_stop_the_merge(tmp_path):
    cache = open_cache(tmp_path / "cache", 10**6)
    cache.folder.rmdir()
    assert remember(cache)[1]
    assert any("cannot be written" in problem for problem in cache.problems())


def test_folders_in_the_folder_are_left_alone(tmp_path):
    cache = open_cache(tmp_path, 700)
    (tmp_path / "odd.entry").mkdir()
    for number in range(3):
        remember(cache, f"{number}")
    assert cache.problems() == ()
    assert (tmp_path / "odd.entry").is_dir()


def _fill(folder):
    cache = open_cache(Path(folder), 8000)
    for step in range(60):
        found = cache.remember(f"{step % 20}", [torch.zeros(1)], lambda step=step: entry(number=float(step % 20)))
        assert found.tensors["x"].tolist() == [float(step % 20)] * 100
    assert not [problem for problem in cache.problems() if "damaged" in problem]


def test_several_runs_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fill, args=(str(tmp_path),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob("*.tmp"))


# Merges with a cache.


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def weights_of(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def recipe_of(family, **more):
    return {"base": str(family[0]), "models": [{"path": str(path)} for path in family[1:]], **more}


def merged(family, output, **settings):
    recipe = recipe_of([family[0], *settings.pop("tuned", family[1:])])
    asked = {"method": settings.pop("method", "stf"), "options": settings.pop("options", {})}
    record = superpose.merge(recipe | asked, output, **settings)
    return weights_of(output), record


def stats_of(record):
    return {tensor.name: dict(tensor.stats) for tensor in record.tensors}


CACHING = ("stf", "tsv", "iso_c", "iso_cts", "iso_share")
OTHER_OPTIONS = {"stf": {"rank": 5}, "iso_cts": {"common_fraction": 0.5}, "iso_share": {"background": 0.4}}


def test_every_method_that_asks_for_a_cache_is_tested_with_one():
    assert sorted(CACHING) == [method.name for method in registered() if "cache" in method.wants]


def count_decompositions(monkeypatch, method):
    """Return a list that grows with every decomposition of a matrix by the method."""
    module = importlib.import_module(f"superpose.methods.{method}")
    done, decompose = [], module.thin_svd
    monkeypatch.setattr(module, "thin_svd", lambda *args: (done.append(1), decompose(*args))[1])
    return done


@pytest.mark.parametrize("method", CACHING)
def test_bytes_and_stats_are_the_same_with_a_cache_full_or_empty(family, tmp_path, method, monkeypatch):
    plain, record = merged(family, tmp_path / "plain", method=method)
    done = count_decompositions(monkeypatch, method)
    counts = []
    for name in ("empty", "full"):
        cached, again = merged(family, tmp_path / name, method=method, cache=tmp_path / "cache")
        assert cached == plain
        assert stats_of(again) == stats_of(record)
        counts.append(len(done))
    assert counts[0] > 0
    assert counts[1] == counts[0]
    assert any(stats_of(record).values())
    assert files(tmp_path / "cache")


@pytest.mark.parametrize("method", CACHING)
def test_another_method_or_option_is_another_entry(family, tmp_path, method):
    for other in CACHING:
        merged(family, tmp_path / other, method=other, cache=tmp_path / "cache")
    options = OTHER_OPTIONS.get(method, {}) | {"scaling_factor": 0.7}
    plain, record = merged(family, tmp_path / "plain", method=method, options=options)
    cached, again = merged(family, tmp_path / "cached", method=method, options=options, cache=tmp_path / "cache")
    assert cached == plain
    assert stats_of(again) == stats_of(record)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "iso_share"])
@pytest.mark.parametrize(("kind", "shape"), [(Kind.LINEAR, (2, 7, 5)), (Kind.CONV, (6, 3, 2, 2))])
def test_stacks_and_kernels_are_remembered_map_by_map(tmp_path, monkeypatch, method, kind, shape):
    found = find_method(method)
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    convolutions = {} if method == "iso_share" else {"convolutions": "matrix"}
    options, cache = found.options(scaling_factor=0.7, **convolutions), open_cache(tmp_path, 10**6)
    plain = found(stack, options, kind=kind)
    done = count_decompositions(monkeypatch, method)
    first = found(stack, options, kind=kind, cache=cache)
    once = len(done)
    again = found(stack, options, kind=kind, cache=cache)
    assert len(files(tmp_path)) == (2 if kind is Kind.LINEAR else 1)
    assert len(done) == once > 0
    for one in (first, again):
        assert torch.equal(one.tensor, plain.tensor)
        assert one.stats == plain.stats


def test_another_subset_and_another_ridge_decompose_nothing_again(family, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    merged(family, tmp_path / "all", cache=cache)
    plain, _ = merged(family, tmp_path / "plain", tuned=family[1:3], options={"ridge": 0.01})
    monkeypatch.setattr("superpose.methods.stf.thin_svd", lambda matrix: pytest.fail("decomposed again"))
    cached, _ = merged(family, tmp_path / "two", tuned=family[1:3], options={"ridge": 0.01}, cache=cache)
    assert cached == plain
    # Another factor does not even solve again.
    monkeypatch.setattr("superpose.methods.stf.superpose_features", lambda *_, **__: pytest.fail("solved again"))
    merged(family, tmp_path / "scaled", cache=cache, options={"scaling_factor": 0.3})


def test_damaged_cache_gives_the_same_bytes_and_a_warning(family, tmp_path):
    cache = tmp_path / "cache"
    plain, _ = merged(family, tmp_path / "plain", cache=cache)
    for path in files(cache):
        path.write_bytes(path.read_bytes()[:-1])
    cached, record = merged(family, tmp_path / "again", cache=cache)
    assert cached == plain
    assert any("damaged" in warning for warning in record.warnings)


def test_several_scaling_factors_are_made_at_once_from_the_command_line(family, tmp_path):
    paths = [str(path) for path in family]
    done = run(
        "merge", *paths, "--scaling-factor", "0.4", "1", "-o", str(tmp_path / "out-{scaling_factor}"), "--density", "1"
    )
    assert done.returncode == 0, done.stderr
    for factor in ("0.4", "1"):
        single, record = merged(
            family, tmp_path / f"single-{factor}", options={"scaling_factor": float(factor), "density": 1}
        )
        assert weights_of(tmp_path / f"out-{factor}") == single
        assert record.recipe["options"]["scaling_factor"] == float(factor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.4", "out-1", "single-0.4", "single-1"]


@pytest.mark.parametrize("method", CACHING)
def test_several_scaling_factors_are_decomposed_once_to_the_same_bytes(family, tmp_path, monkeypatch, method):
    done = count_decompositions(monkeypatch, method)
    singles = {
        factor: merged(family, tmp_path / f"single-{factor}", method=method, options={"scaling_factor": factor})
        for factor in (0.3, 0.7)
    }
    once = len(done) // 2
    records = superpose.merge_scaled(recipe_of(family, method=method), tmp_path / "x-{scaling_factor}", [0.3, 0.7])
    assert once > 0
    assert len(done) == 3 * once
    for record, (factor, (single, alone)) in zip(records, singles.items(), strict=True):
        assert weights_of(tmp_path / f"x-{factor}") == single
        assert stats_of(record) == stats_of(alone)


def test_several_scaling_factors_are_solved_once(family, tmp_path, monkeypatch):
    from superpose.methods import stf

    solved = []
    solve = stf.superpose_features
    monkeypatch.setattr(
        "superpose.methods.stf.superpose_features", lambda *args, **kw: (solved.append(1), solve(*args, **kw))[1]
    )
    recipe = recipe_of(family)
    superpose.merge(recipe, tmp_path / "one")
    once = len(solved)
    records = superpose.merge_scaled(recipe, tmp_path / "x-{scaling_factor}", [0.2, 0.5, 0.8])
    assert once > 0
    assert len(solved) == 2 * once
    assert [record.recipe["options"]["scaling_factor"] for record in records] == [0.2, 0.5, 0.8]


def test_one_factor_left_goes_on_with_what_is_solved(family, tmp_path, monkeypatch):
    recipe = recipe_of(family)
    run_plan = superpose.api.run_plan
    monkeypatch.setattr(
        "superpose.api.run_plan",
        lambda plan, place, *rest: run_plan(plan, place, *rest) if place.name == "x-0.2" else pytest.fail("stopped"),
    )
    with pytest.raises(pytest.fail.Exception):
        superpose.merge_scaled(recipe, tmp_path / "x-{scaling_factor}", [0.2, 0.5])
    assert (tmp_path / "x-all-factors.partial").is_dir()
    monkeypatch.undo()
    monkeypatch.setattr("superpose.methods.stf.superpose_features", lambda *_, **__: pytest.fail("solved again"))
    paths = [str(path) for path in family]
    done = run("merge", *paths, "--scaling-factor", "0.5", "-o", tmp_path / "x-{scaling_factor}")
    assert "x-0.5" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.2", "x-0.5"]


def test_scaling_factors_must_be_some(family, tmp_path):
    recipe = {"base": str(family[0]), "models": [str(path) for path in family[1:]]}
    for output, factors in (("x-{scaling_factor}", []), ("x", [0.5])):
        with pytest.raises(SuperposeError, match="a folder each"):
            superpose.merge_scaled(recipe, tmp_path / output, factors)


def test_cache_inside_the_output_is_refused(family, tmp_path):
    with pytest.raises(SuperposeError, match="part of the output"):
        merged(family, tmp_path / "out", cache=tmp_path / "out.partial" / "cache")


def test_size_of_the_cache_is_named_when_it_is_none(family, tmp_path):
    with pytest.raises(SuperposeError, match="--cache-size"):
        merged(family, tmp_path / "out", cache=tmp_path / "cache", cache_size="lots")


@pytest.mark.parametrize("output", ["out", "out-{scaling_factor}"])
def test_scaling_factors_need_a_folder_each(family, tmp_path, output):
    factors = ["0.4", "0.4"] if "{" in output else ["0.4", "0.8"]
    paths = [str(path) for path in family]
    done = run("merge", *paths, "--scaling-factor", *factors, "-o", tmp_path / output, check=False)
    assert done.returncode == 2
    assert "{scaling_factor}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_scaling_factors_of_a_method_without_one_are_refused(family, tmp_path):
    paths = [str(path) for path in family]
    output = str(tmp_path / "out-{scaling_factor}")
    done = run("merge", *paths, "-m", "slerp", "--scaling-factor", "0.4", "0.8", "-o", output, check=False)
    assert done.returncode == 2
    assert "scaling_factor" in done.stderr
    assert list(tmp_path.iterdir()) == []
