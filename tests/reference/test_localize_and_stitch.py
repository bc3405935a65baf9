"""Dataless Localize-and-Stitch: masks of largest magnitude, averaged on overlaps (He et al. 2024, arXiv:2408.13656).

An entry that is zero is in no mask: it would take part in the average and say nothing.
"""

from fractions import Fraction
from functools import reduce
from operator import iadd

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.maths.streaming import MagnitudeSurvey, TensorChunks
from superpose.methods.localize_and_stitch import LocalizeAndStitchOptions, localize_and_stitch

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]


def masks_of(rows, density):
    """Mask the floor(density * n) largest entries, at least one, ties to the lowest index, zeros left out."""
    masks = np.zeros(rows.shape, bool)
    count = int(Fraction(str(density)) * rows.shape[1])
    count = max(1, count) if density > 0 else 0
    for row, mask in zip(rows, masks, strict=True):
        for place in sorted(range(len(row)), key=lambda place: (-abs(row[place]), place))[:count]:
            mask[place] = row[place] != 0
    return masks


def stitched(rows, masks):
    merged = np.zeros(rows.shape[1])
    for place in range(rows.shape[1]):
        values = [row[place] for row, mask in zip(rows, masks, strict=True) if mask[place]]
        merged[place] = sum(values) / max(1, len(values))
    return merged


def merge(task_vectors, **options):
    return localize_and_stitch(torch.as_tensor(task_vectors), LocalizeAndStitchOptions(**options))


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy().ravel(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.29, 0.5, 1.0])
def test_equals_the_formula(density, scope, shape, dtype, tolerance):
    task_vectors = random_stack(4, *shape, dtype=dtype)
    merged = merge(task_vectors, density=density, density_scope=scope)
    assert merged.shape == shape
    assert merged.dtype == dtype
    rows = task_vectors.double().numpy().reshape(4, -1)
    assert_close(merged, stitched(rows, masks_of(rows, density)), tolerance)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 5), st.integers(1, 15), st.integers(0, 2**32), st.integers(0, 10))
def test_equals_the_formula_where_magnitudes_tie_and_zeros_are_many(tasks, entries, seed, tenths):
    rows = np.random.default_rng(seed).integers(-2, 3, (tasks, entries)).astype(float)
    assert_close(merge(rows, density=tenths / 10), stitched(rows, masks_of(rows, tenths / 10)), 1e-14)


def merge_model(tensors, options, dtype):
    """Merge tensors after the survey's passes over all of them, reading three entries at a time."""
    survey = MagnitudeSurvey()
    stacks = {name: torch.from_numpy(rows).to(dtype) for name, rows in tensors.items()}
    chunks = {
        name: TensorChunks(*stack.shape, 3, lambda start, stop, stack=stack: stack[:, start:stop])
        for name, stack in stacks.items()
    }
    state = None
    for step in range(survey.passes(options, dtype)):
        values = [survey.measure(step, name, chunks[name], state, options) for name in chunks]
        state = survey.finish(step, reduce(iadd, values), state, options, dtype)
    merged = []
    for name, stack in stacks.items():
        cuts = survey.for_tensor(name, chunks[name], state, options)
        merged.append(localize_and_stitch(stack, options, survey=cuts).double().numpy())
    return np.concatenate(merged)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    density=st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]),
    scope=st.sampled_from(["model", "tensor"]),
)
def test_model_equals_the_formula_on_the_flattened_model(seed, density, scope, dtype, tolerance):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.integers(-3, 4, (3, size)).astype(float) for name, size in (("a", 4), ("b", 11), ("nil", 0))}
    whole = np.concatenate(list(tensors.values()), axis=1)
    by_tensor = [masks_of(rows, density) for rows in tensors.values()]
    masks = masks_of(whole, density) if scope == "model" else np.concatenate(by_tensor, axis=1)
    expected = stitched(whole, masks)
    merged = merge_model(tensors, LocalizeAndStitchOptions(density=density, density_scope=scope), dtype)
    np.testing.assert_allclose(merged, expected, rtol=tolerance, atol=0)
    base = {name: torch.zeros(rows.shape[1], dtype=dtype) for name, rows in tensors.items()}
    tuned = [{name: torch.from_numpy(rows[task]).to(dtype) for name, rows in tensors.items()} for task in range(3)]
    by_name = merge_tensors(base, tuned, "localize_and_stitch", density=density, density_scope=scope)
    joined = torch.cat([by_name[name] for name in tensors]).double().numpy()
    np.testing.assert_allclose(joined, expected, rtol=tolerance, atol=0)


def test_defaults_are_those_of_the_authors_for_language():
    assert (LocalizeAndStitchOptions().density, LocalizeAndStitchOptions().density_scope) == (0.05, "model")


def test_worked_example_averages_the_overlap_and_copies_the_rest():
    """The masks are (1, 1) and (1, 0): the zero of the second task is in none."""
    assert merge(in_double([2, 4], [6, 0]), density=1.0).tolist() == [4, 4]


def test_worked_example_disjoint_masks_are_added_up():
    task_vectors = in_double([9, 0.1, 0.2, -8], [0.3, 7, -6, 0.4])
    assert merge(task_vectors, density=0.5).tolist() == [9, 7, -6, -8]


def test_worked_example_masks_of_everything_give_the_average():
    task_vectors = random_stack(5, 6, 7)
    assert_close(merge(task_vectors, density=1.0), task_vectors.mean(dim=0).numpy().ravel(), 1e-14)


def test_worked_example_one_task_with_everything_masked_comes_back():
    task_vectors = random_stack(1, 6, 7)
    assert torch.equal(merge(task_vectors, density=1.0), task_vectors[0])


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_worked_example_task_of_zeros_has_an_empty_mask(place, density):
    task_vectors = random_stack(3, 40)
    zeros = torch.zeros(1, 40, dtype=torch.float64)
    with_zeros = torch.cat([task_vectors[:place], zeros, task_vectors[place:]])
    assert torch.equal(merge(with_zeros, density=density), merge(task_vectors, density=density))


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_identical_tasks_give_the_masked_task(tasks):
    task_vector = random_stack(1, 40)
    merged = merge(task_vector.expand(tasks, 40), density=0.3)
    assert_close(merged, merge(task_vector, density=0.3).numpy(), 1e-14)
    assert int(merged.count_nonzero()) == 12


@pytest.mark.parametrize("factor", [1e-3, 3.0, 1e3])
def test_common_factor_and_order_of_the_tasks_come_out(factor):
    task_vectors = random_stack(4, 60)
    expected = factor * merge(task_vectors, density=0.3)
    assert_close(merge(factor * task_vectors.flip(0), density=0.3), expected.numpy(), 1e-14)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base(shape, scope):
    merged = merge(torch.zeros(3, *shape), density_scope=scope)
    assert merged.shape == shape
    assert not merged.any()


@pytest.mark.parametrize("numel", [1, 2, 19])
def test_degenerate_small_tensors_keep_one_entry_at_least(numel):
    assert int(merge(random_stack(1, numel), density=0.001, density_scope="tensor").count_nonzero()) == 1


def test_degenerate_constant_rows_are_masked_by_place():
    assert merge(torch.full((2, 5), -1.5), density=0.4).tolist() == [-1.5, -1.5, 0, 0, 0]


def test_degenerate_masks_beyond_the_nonzero_entries_hold_those_alone():
    """Updates rounded in bfloat16 are mostly exact zeros: a mask larger than what is left is that and no more."""
    rows = np.zeros((3, 20))
    rows[0, :2], rows[1, 1:4] = 3.0, -1.0
    assert merge(rows, density=0.9).tolist() == [3, 1, -1, -1] + [0] * 16


def test_worked_example_of_learned_masks():
    task_vectors = in_double([2, 4], [6, 0])
    masks = torch.tensor([[True, True], [True, False]])
    options = LocalizeAndStitchOptions(masks="learned")
    assert torch.equal(localize_and_stitch(task_vectors, options, learned=masks), in_double([4, 4])[0])
    named = {"layer.weight": task_vectors[:1]}
    merged = merge_tensors(
        {"layer.weight": torch.zeros(1, 2, dtype=torch.float64)},
        [named, {"layer.weight": task_vectors[1:]}],
        "localize_and_stitch",
        masks="learned",
        learned={"layer.weight": masks},
    )
    assert torch.equal(merged["layer.weight"], in_double([4, 4]))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula_for_learned_masks(shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    masks = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)) < 0.5
    merged = localize_and_stitch(task_vectors, LocalizeAndStitchOptions(masks="learned"), learned=masks)
    rows, told = task_vectors.double().numpy().reshape(3, -1), masks.numpy().reshape(3, -1) & True
    assert_close(merged, stitched(rows, told & (rows != 0)), tolerance)


def test_degenerate_all_masks_are_averaging_and_disjoint_ones_add_up():
    task_vectors = random_stack(3, 4, 5)
    options = LocalizeAndStitchOptions(masks="learned")
    everything = torch.ones(3, 4, 5, dtype=torch.bool)
    assert torch.allclose(localize_and_stitch(task_vectors, options, learned=everything), task_vectors.mean(dim=0))
    assert torch.equal(localize_and_stitch(task_vectors[:1], options, learned=everything[:1]), task_vectors[0])
    disjoint = torch.arange(20).reshape(4, 5) % 3 == torch.arange(3)[:, None, None]
    added = torch.where(disjoint, task_vectors, 0.0).sum(dim=0)
    assert torch.equal(localize_and_stitch(task_vectors, options, learned=disjoint), added)
