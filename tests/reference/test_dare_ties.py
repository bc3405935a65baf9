"""DARE with TIES: drop at random, rescale, trim, elect, merge, entry by entry (arXiv:2311.03099 and 2306.01708).

Which entries are kept is drawn from each tensor's generator and handed to the reference.
"""

from dataclasses import replace
from fractions import Fraction
from functools import reduce
from operator import iadd

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.maths.randomness import Generator
from superpose.maths.streaming import TensorChunks
from superpose.methods.dare_ties import DareTiesOptions, DareTiesSurvey, dare_ties

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]
NAMES = ("model 1", "model 2", "model 3", "model 4")
GENERATOR = Generator(5, "layers.0.weight", NAMES)


def trimmed(row, ties_density):
    """Return the row with the floor of its share kept, at least one, ties to the lowest index."""
    count = int(Fraction(str(ties_density)) * len(row))
    count = max(1, count) if ties_density > 0 else 0
    kept = np.zeros(len(row))
    for place in sorted(range(len(row)), key=lambda place: (-abs(row[place]), place))[:count]:
        kept[place] = row[place]
    return kept


def dropped(rows, keeps, density):
    return np.where(keeps, rows / density, 0.0)


def elected_and_merged(kept, weights, scaling_factor, aggregate):
    merged = np.zeros(kept.shape[1])
    for place, column in enumerate(kept.T):
        values = [weight * value for weight, value in zip(weights, column, strict=True)]
        sign = np.sign(sum(values))
        agreeing = [(value, weight) for value, weight in zip(values, weights, strict=True) if value * sign > 0]
        if agreeing:
            divisor = sum(weight for _, weight in agreeing) if aggregate == "mean" else 1.0
            merged[place] = scaling_factor * sum(value for value, _ in agreeing) / divisor
    return merged


def dare_ties_by_entry(rows, keeps, density, ties_density, scaling_factor, aggregate, weights):
    kept = np.stack([trimmed(row, ties_density) for row in dropped(rows, keeps, density)])
    return elected_and_merged(kept, weights, scaling_factor, aggregate)


def keeps_of(generator, density, tasks, entries):
    return np.stack([generator.keeps(task, density, (entries,)).numpy() for task in range(tasks)])


def merge(task_vectors, weights=None, generator=GENERATOR, **options):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return dare_ties(torch.as_tensor(task_vectors), DareTiesOptions(**options), generator=generator, weights=given)


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy().ravel(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, [0.3, 1.7, 1.0]])
@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize(("density", "ties_density"), [(0.5, 1.0), (0.5, 0.3), (0.1, 0.0), (1.0, 0.2), (0.9, 0.5)])
def test_equals_the_formula(density, ties_density, aggregate, weights, shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    options = {"density": density, "ties_density": ties_density, "scaling_factor": 0.7, "aggregate": aggregate}
    merged = merge(task_vectors, weights, **options)
    assert merged.shape == shape
    assert merged.dtype == dtype
    rows = task_vectors.double().numpy().reshape(3, -1)
    keeps = keeps_of(GENERATOR, density, 3, rows.shape[1])
    assert_close(merged, dare_ties_by_entry(rows, keeps, weights=weights or [1.0] * 3, **options), tolerance)


@settings(deadline=None, max_examples=120)
@given(
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(0, 2**32),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.integers(0, 10),
    st.sampled_from(["mean", "sum"]),
)
def test_equals_the_formula_where_magnitudes_tie_and_sums_cancel(tasks, entries, seed, density, tenths, aggregate):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, (tasks, entries)).astype(float)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], tasks).tolist()
    options = {"density": density, "ties_density": tenths / 10, "scaling_factor": 1.0, "aggregate": aggregate}
    generator = replace(GENERATOR, seed=seed)
    expected = dare_ties_by_entry(rows, keeps_of(generator, density, tasks, entries), weights=weights, **options)
    assert_close(merge(rows, weights, generator, **options), expected, 1e-14)


def merge_model(tensors, options, weights):
    """Merge tensors after the survey's passes over all of them, reading three entries at a time."""
    survey, tasks = DareTiesSurvey(), len(weights)
    generators = {name: Generator(0, name, NAMES[:tasks]) for name in tensors}
    chunks = {
        name: TensorChunks(
            tasks, array.shape[1], 3, lambda a, b, t=array: torch.from_numpy(t[:, a:b]), weights,
            generator=generators[name],
        )
        for name, array in tensors.items()
    }  # fmt: skip
    state = None
    for step in range(survey.passes(options, torch.float64)):
        values = [survey.measure(step, name, chunks[name], state, options) for name in chunks]
        state = survey.finish(step, reduce(iadd, values), state, options, torch.float64)
    given = torch.tensor(weights, dtype=torch.float64)
    merged = []
    for name, array in tensors.items():
        numbers = survey.for_tensor(name, chunks[name], state, options)
        stack = torch.from_numpy(array)
        merged.append(dare_ties(stack, options, generator=generators[name], weights=given, survey=numbers).numpy())
    return np.concatenate(merged)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]), st.sampled_from(["model", "tensor"]))
def test_model_equals_the_formula_on_the_flattened_model(seed, ties_density, scope):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.integers(-3, 4, (3, size)).astype(float) for name, size in (("a", 4), ("b", 11), ("nil", 0))}
    options = DareTiesOptions(ties_density=ties_density, density_scope=scope)
    weights = (1.0, 0.5, 2.0)
    left = [
        dropped(rows, keeps_of(Generator(0, name, NAMES), 0.5, 3, rows.shape[1]), 0.5)
        for name, rows in tensors.items()
        if rows.size
    ]
    pieces = [np.concatenate(left, axis=1)] if scope == "model" else left
    kept = np.concatenate([np.stack([trimmed(row, ties_density) for row in piece]) for piece in pieces], axis=1)
    expected = elected_and_merged(kept, weights, 1.0, "mean")
    np.testing.assert_allclose(merge_model(tensors, options, weights), expected, rtol=1e-12, atol=0)
    for dtype, tolerance in DTYPES:
        stacks = {name: torch.from_numpy(rows).to(dtype) for name, rows in tensors.items()}
        base = {name: torch.zeros_like(stack[0]) for name, stack in stacks.items()}
        tuned = [{name: stack[task] for name, stack in stacks.items()} for task in range(3)]
        given = {"ties_density": ties_density, "density_scope": scope}
        whole = merge_tensors(base, tuned, "dare_ties", weights=weights, **given)
        assert_close(torch.cat([whole[name] for name in tensors]), expected, tolerance)


def test_defaults_trim_nothing_after_the_dropping():
    options = DareTiesOptions()
    assert (options.density, options.ties_density, options.scaling_factor) == (0.5, 1.0, 1.0)
    assert (options.density_scope, options.aggregate) == ("model", "mean")


def test_worked_example_nothing_dropped_is_ties():
    task_vectors = torch.tensor([[3, -1, 0.5, 2], [-2, -1.5, 0.1, 1]], dtype=torch.float64)
    assert merge(task_vectors, density=1.0, ties_density=0.5).tolist() == [3, -1.5, 0, 2]


def test_worked_example_opposite_tasks_leave_what_one_of_them_dropped():
    keeps = keeps_of(GENERATOR, 0.5, 2, 60)
    row = torch.arange(1.0, 61, dtype=torch.float64)
    merged = merge(torch.stack([row, -row]))
    assert torch.equal(merged, 2 * row * torch.from_numpy(keeps[0].astype(float) - keeps[1]))


def test_survivors_of_one_task_are_the_entries_over_the_density():
    task_vectors = random_stack(1, 20_000)
    for density in (0.1, 0.5, 0.9):
        merged = merge(task_vectors, density=density)
        kept = merged != 0
        torch.testing.assert_close(merged[kept], task_vectors[0][kept] / density, rtol=1e-14, atol=0)
        assert abs(float(kept.double().mean()) - density) < 4 * (density * (1 - density) / 20_000) ** 0.5


def test_mean_over_seeds_of_one_task_tends_to_it():
    task_vectors, seeds = random_stack(1, 60), 1000
    draws = [merge(task_vectors, generator=replace(GENERATOR, seed=seed)) for seed in range(seeds)]
    # The variance of an entry over its square is (1 - 0.5) / 0.5 = 1.
    ratios = torch.stack(draws).mean(dim=0) / task_vectors[0]
    assert float((ratios - 1).abs().max()) < 4.5 * (1 / seeds) ** 0.5


@pytest.mark.parametrize("size", [1, 3, 8, 29, 64])
def test_pieces_have_the_bytes_of_the_whole(size):
    task_vectors = random_stack(3, 64, dtype=torch.float32)
    pieces = [
        merge(task_vectors[:, start : start + size], generator=GENERATOR.within(start)) for start in range(0, 64, size)
    ]
    assert torch.equal(torch.cat(pieces), merge(task_vectors))


def test_order_of_the_tasks_goes_with_their_names():
    task_vectors, order = random_stack(4, 50), [2, 0, 3, 1]
    turned = replace(GENERATOR, tasks=tuple(NAMES[task] for task in order))
    merged = merge(task_vectors[order], [1.0, 2.0, 3.0, 4.0], generator=turned)
    assert_close(merged, merge(task_vectors, [2.0, 4.0, 1.0, 3.0]).numpy(), 1e-14)


@pytest.mark.parametrize("change", [{"seed": 6}, {"name": "layers.1.weight"}, {"tasks": ("a", "b", "c", "d")}])
def test_other_seed_tensor_or_task_drops_others(change):
    task_vectors = random_stack(3, 50)
    assert not torch.equal(merge(task_vectors, generator=replace(GENERATOR, **change)), merge(task_vectors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (5, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base(shape, dtype):
    merged = merge(torch.zeros(3, *shape, dtype=dtype), density=0.001, ties_density=0.2)
    assert merged.shape == shape
    assert not merged.any()


def test_degenerate_identical_tasks_give_the_task_over_the_density_where_any_keeps_it():
    row = random_stack(1, 40)
    kept = keeps_of(GENERATOR, 0.5, 3, 40).any(axis=0)
    assert_close(merge(row.expand(3, 40)), np.where(kept, 2 * row[0].numpy(), 0.0), 1e-14)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_degenerate_trimming_leaves_one_entry_at_least_of_what_is_not_dropped(scope):
    for seed in range(30):
        generator = replace(GENERATOR, seed=seed)
        merged = merge(random_stack(1, 7), generator=generator, ties_density=0.01, density_scope=scope)
        assert int(merged.count_nonzero()) == int(keeps_of(generator, 0.5, 1, 7).any())
