"""Consensus: the multi-task vector where enough tasks rely on it, entry by entry (Wang et al. 2024, arXiv:2405.07813).

The multi-task vector is the sum of the task vectors, or TIES' sum of the agreeing trimmed entries.
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
from superpose.maths.streaming import TensorChunks
from superpose.maths.trim_survey import TrimSurvey
from superpose.methods.consensus import ConsensusOptions, consensus, consensus_notes
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]
OVER = ["task_arithmetic", "ties"]


def trimmed(rows, density):
    """Return each row with its floor(density * n) largest entries, at least one, ties to the lowest index."""
    kept = np.zeros(rows.shape)
    count = int(Fraction(str(density)) * rows.shape[1])
    count = max(1, count) if density > 0 else 0
    for row, out in zip(rows, kept, strict=True):
        for place in sorted(range(len(row)), key=lambda place: (-abs(row[place]), place))[:count]:
            out[place] = row[place]
    return kept


def multi_task_vector(rows, kept, over):
    if over == "task_arithmetic":
        return np.array([sum(column) for column in rows.T])
    signs = [np.sign(sum(column)) for column in kept.T]
    agreeing = [[v for v in column if v * sign > 0] for column, sign in zip(kept.T, signs, strict=True)]
    return np.array([float(sum(values)) for values in agreeing])


def masked(rows, multi_task, threshold, agreement, scaling_factor):
    merged = np.zeros(rows.shape[1])
    for place, whole in enumerate(multi_task):
        relying = sum(abs(value) > threshold * abs(whole - value) for value in rows[:, place])
        if relying >= min(agreement, len(rows)):
            merged[place] = scaling_factor * whole
    return merged


def consensus_by_entry(rows, *, over="task_arithmetic", ties_density=0.2, **options):
    return masked(rows, multi_task_vector(rows, trimmed(rows, ties_density), over), **options)


def merge(task_vectors, **options):
    return consensus(torch.as_tensor(task_vectors), ConsensusOptions(**options)).tensor


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy().ravel(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("over", "scope"), [("task_arithmetic", "model"), ("ties", "model"), ("ties", "tensor")])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6, 10.0])
@pytest.mark.parametrize("agreement", [0, 1, 2, 4, 1000])
def test_equals_the_formula(agreement, threshold, over, scope, shape, dtype, tolerance):
    task_vectors = random_stack(4, *shape, dtype=dtype)
    options = {"over": over, "threshold": threshold, "agreement": agreement, "scaling_factor": 0.7, "ties_density": 0.3}
    merged = merge(task_vectors, density_scope=scope, **options)
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert_close(merged, consensus_by_entry(task_vectors.double().numpy().reshape(4, -1), **options), tolerance)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.25, 0.4, 0.5, 1.0]),
    st.integers(0, 6),
    st.integers(0, 10),
    st.sampled_from(OVER),
)
def test_equals_the_formula_where_both_sides_of_the_masks_tie(tasks, entries, seed, threshold, agreement, tenths, over):
    rows = np.random.default_rng(seed).integers(-2, 3, (tasks, entries)).astype(float)
    options = {"over": over, "threshold": threshold, "agreement": agreement, "ties_density": tenths / 10}
    expected = consensus_by_entry(rows, scaling_factor=1.0, **options)
    assert np.array_equal(merge(rows, scaling_factor=1.0, **options).numpy(), expected)


def merge_model(tensors, options, dtype):
    """Merge tensors after the survey's passes over all of them, reading three entries at a time."""
    survey = TrimSurvey()
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
        pieces = [
            consensus(chunk, options, survey=cuts.within(start, start + chunk.shape[1])).tensor
            for start, chunk in chunks[name]
        ]
        whole = consensus(stack, options, survey=cuts).tensor
        assert torch.equal(torch.cat([stack.new_zeros(0), *pieces]), whole)
        merged.append(whole.double().numpy())
    return np.concatenate(merged)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    density=st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]),
    over=st.sampled_from(OVER),
    scope=st.sampled_from(["model", "tensor"]),
)
def test_model_equals_the_formula_on_the_flattened_model(seed, density, over, scope, dtype, tolerance):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.integers(-3, 4, (3, size)).astype(float) for name, size in (("a", 4), ("b", 11), ("nil", 0))}
    whole = np.concatenate(list(tensors.values()), axis=1)
    by_tensor = np.concatenate([trimmed(rows, density) for rows in tensors.values()], axis=1)
    kept = trimmed(whole, density) if scope == "model" else by_tensor
    expected = masked(whole, multi_task_vector(whole, kept, over), 0.5, 2, 0.3)
    given = {"over": over, "threshold": 0.5, "ties_density": density, "density_scope": scope}
    merged = merge_model(tensors, ConsensusOptions(**given), dtype)
    assert_close(torch.from_numpy(merged), expected, tolerance)
    base = {name: torch.zeros(rows.shape[1], dtype=dtype) for name, rows in tensors.items()}
    tuned = [{name: torch.from_numpy(rows[task]).to(dtype) for name, rows in tensors.items()} for task in range(3)]
    by_name = merge_tensors(base, tuned, "consensus", **given)
    assert_close(torch.cat([by_name[name] for name in tensors]), expected, tolerance)


def test_defaults_are_those_without_validation_data():
    options = ConsensusOptions()
    assert (options.over, options.threshold, options.agreement) == ("task_arithmetic", 0.4, 2)
    assert (options.scaling_factor, options.ties_density, options.density_scope) == (0.3, 0.2, "model")


def test_worked_example_entries_on_which_both_rely_are_kept():
    """The masks are (1, 0, 0, 1) and (1, 1, 0, 1); the two that disagree in the last entry cancel there."""
    task_vectors = in_double([1, 0.1, 0, -1], [0.8, 1, 0, 1])
    assert merge(task_vectors, scaling_factor=1.0).tolist() == [1.8, 0, 0, 0]
    assert merge(task_vectors, agreement=1, scaling_factor=1.0).tolist() == [1.8, 1.1, 0, 0]
    assert_close(merge(task_vectors), np.array([0.54, 0, 0, 0]), 1e-14)


def test_worked_example_agreement_zero_is_task_arithmetic():
    task_vectors = random_stack(4, 5, 6)
    expected = task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=0.3))
    assert_close(merge(task_vectors, agreement=0), expected.numpy().ravel(), 1e-14)


def test_worked_example_agreement_of_more_than_all_is_of_all():
    task_vectors = random_stack(3, 200)
    assert torch.equal(merge(task_vectors, agreement=7), merge(task_vectors, agreement=3))
    assert torch.equal(merge(task_vectors[:1], agreement=2, scaling_factor=1.0), task_vectors[0])
    assert consensus_notes(ConsensusOptions(agreement=3), 3) == []
    (note,) = consensus_notes(ConsensusOptions(agreement=4), 3)
    assert "agreement 4 is more than the 3 fine-tunes: all have to agree" in note


def test_worked_example_masks_are_strict():
    """Of two equal tasks each entry is exactly as large as the rest of the sum."""
    task_vectors = in_double([1, -2], [1, -2])
    assert merge(task_vectors, threshold=1.0, scaling_factor=1.0).tolist() == [0, 0]
    assert merge(task_vectors, threshold=0.999, scaling_factor=1.0).tolist() == [2, -4]


def test_ties_compares_what_is_not_trimmed_with_its_sum():
    """The second task's 1 is trimmed, yet the task relies on the entry: 1 > 0.4 * |3 - 1|."""
    task_vectors = in_double([3, 0], [1, 2])
    merged = merge(task_vectors, over="ties", ties_density=0.5, scaling_factor=1.0)
    assert merged.tolist() == [3, 0]


@pytest.mark.parametrize("tasks", [2, 3, 4, 6])
@pytest.mark.parametrize("threshold", [0.25, 0.4, 0.6])
def test_breaks_same_identical_tasks_add_up_where_they_rely_on_an_entry(threshold, tasks):
    """Each is |tau| against (T - 1) |tau|: all of them are relied on, or none is."""
    task_vector = random_stack(1, 40)
    merged = merge(task_vector.expand(tasks, 40), threshold=threshold, scaling_factor=1.0)
    factor = tasks if threshold * (tasks - 1) < 1 else 0
    assert_close(merged, factor * task_vector[0].numpy(), 1e-14)


def test_breaks_same_holds_with_the_scaling_factor_of_an_average():
    task_vector = random_stack(1, 40)
    assert_close(merge(task_vector.expand(3, 40), scaling_factor=1 / 3), task_vector[0].numpy(), 1e-14)


@pytest.mark.parametrize("over", OVER)
def test_breaks_zero_of_one_task_and_the_base_nothing_is_left(over):
    task_vectors = torch.stack([random_stack(1, 40)[0], torch.zeros(40, dtype=torch.float64)])
    options = {"over": over, "ties_density": 1.0, "scaling_factor": 1.0}
    found = consensus(task_vectors, ConsensusOptions(**options))
    assert not found.tensor.any()
    (caution,) = found.cautions
    assert "relied on by 2 tasks: the base stays" in caution.text
    assert torch.equal(merge(task_vectors, agreement=1, **options), task_vectors[0])


@pytest.mark.parametrize("over", OVER)
def test_breaks_zero_not_with_two_tasks_or_more(over):
    task_vectors = random_stack(3, 40)
    with_zeros = torch.cat([task_vectors, torch.zeros(1, 40, dtype=torch.float64)])
    assert torch.equal(merge(with_zeros, over=over), merge(task_vectors, over=over))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("agreement", [0, 1, 2])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base_without_a_warning(shape, agreement, over):
    found = consensus(torch.zeros(3, *shape), ConsensusOptions(over=over, agreement=agreement))
    assert found.tensor.shape == shape
    assert not found.tensor.any()
    assert found.cautions == ()


def test_degenerate_single_entries_agree_or_oppose():
    assert merge(in_double([2], [2]), scaling_factor=1.0).tolist() == [4]
    assert merge(in_double([2], [-2]), scaling_factor=1.0).tolist() == [0]


@pytest.mark.parametrize("over", OVER)
def test_degenerate_updates_rounded_in_bfloat16_equal_the_formula(over):
    base = random_stack(1, 72, dtype=torch.float32).bfloat16()
    tuned = base + (2e-3 * random_stack(3, 72, dtype=torch.float32)).bfloat16()
    task_vectors = tuned.double() - base.double()
    options = {"over": over, "threshold": 0.4, "agreement": 2, "scaling_factor": 0.3}
    assert_close(merge(task_vectors, **options), consensus_by_entry(task_vectors.numpy(), **options), 1e-12)
