"""Trimmed task arithmetic: scaled sum of the trimmed task vectors, mean for norms, entry by entry.

The control of STF (Qiu et al. 2025, arXiv:2502.10698v2): Algorithm 2 with a sum in place of the linear system.
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
from superpose.kinds import Kind
from superpose.maths.streaming import MagnitudeSurvey, TensorChunks
from superpose.methods.stf import StfOptions, stf
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from superpose.methods.trimmed_task_arithmetic import TrimmedTaskArithmeticOptions, trimmed_task_arithmetic

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]
SUMMED = [kind for kind in Kind if kind not in (Kind.NORM, Kind.BUFFER)]


def trimmed(rows, density):
    kept = np.zeros(rows.shape)
    count = int(Fraction(str(density)) * rows.shape[1])
    count = max(1, count) if density > 0 else 0
    for row, out in zip(rows, kept, strict=True):
        for place in sorted(range(len(row)), key=lambda place: (-abs(row[place]), place))[:count]:
            out[place] = row[place]
    return kept


def summed_or_averaged(kept, scaling_factor, is_norm):
    """Return the scaled sum of each entry; of a norm's the mean, unscaled."""
    return np.array([sum(column) / len(column) if is_norm else scaling_factor * sum(column) for column in kept.T])


def merge(task_vectors, kind=Kind.LINEAR, **options):
    return trimmed_task_arithmetic(torch.as_tensor(task_vectors), TrimmedTaskArithmeticOptions(**options), kind=kind)


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy().ravel(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trim_norm", [True, False])
@pytest.mark.parametrize("kind", [Kind.LINEAR, Kind.BIAS, Kind.NORM])
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.0, 0.07, 0.29, 1.0])
def test_equals_the_formula(density, scope, kind, trim_norm, shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    options = {"density": density, "density_scope": scope, "trim_norm": trim_norm, "scaling_factor": 0.7}
    merged = merge(task_vectors, kind, **options)
    assert merged.shape == shape
    assert merged.dtype == dtype
    rows = task_vectors.double().numpy().reshape(3, -1)
    is_norm = kind is Kind.NORM
    kept = rows if is_norm and not trim_norm else trimmed(rows, density)
    assert_close(merged, summed_or_averaged(kept, 0.7, is_norm), tolerance)


@settings(deadline=None, max_examples=120)
@given(st.integers(1, 5), st.integers(1, 15), st.integers(0, 2**32), st.integers(0, 10), st.sampled_from(list(Kind)))
def test_equals_the_formula_where_magnitudes_tie_and_sums_cancel(tasks, entries, seed, tenths, kind):
    rows = np.random.default_rng(seed).integers(-2, 3, (tasks, entries)).astype(float)
    expected = summed_or_averaged(trimmed(rows, tenths / 10), 0.8, kind is Kind.NORM)
    assert_close(merge(rows, kind, density=tenths / 10), expected, 1e-14)


def merge_model(tensors, kinds, options, dtype):
    """Merge tensors after the survey's passes over all of them, reading three entries at a time."""
    survey = MagnitudeSurvey()
    stacks = {name: torch.from_numpy(rows).to(dtype) for name, rows in tensors.items()}
    chunks = {
        name: TensorChunks(*stack.shape, 3, lambda start, stop, stack=stack: stack[:, start:stop], kind=kinds[name])
        for name, stack in stacks.items()
    }
    state = None
    for step in range(survey.passes(options, dtype)):
        values = [survey.measure(step, name, chunks[name], state, options) for name in chunks]
        state = survey.finish(step, reduce(iadd, values), state, options, dtype)
    merged = []
    for name, stack in stacks.items():
        cuts = survey.for_tensor(name, chunks[name], state, options)
        merged.append(trimmed_task_arithmetic(stack, options, kind=kinds[name], survey=cuts).double().numpy())
    return np.concatenate(merged)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    density=st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]),
    scope=st.sampled_from(["model", "tensor"]),
    trim_norm=st.booleans(),
)
def test_model_equals_the_formula_on_the_flattened_model(seed, density, scope, trim_norm, dtype, tolerance):
    """Norms are counted among the entries of the model even where they are left untrimmed."""
    rng = np.random.default_rng(seed)
    kinds = {"a": Kind.LINEAR, "b": Kind.NORM, "c": Kind.BIAS, "nil": Kind.BIAS}
    sizes = {"a": 9, "b": 5, "c": 3, "nil": 0}
    tensors = {name: rng.integers(-3, 4, (3, size)).astype(float) for name, size in sizes.items()}
    whole = trimmed(np.concatenate(list(tensors.values()), axis=1), density)
    expected = []
    for name, part in zip(tensors, np.split(whole, np.cumsum(list(sizes.values()))[:-1], axis=1), strict=True):
        kept = part if scope == "model" else trimmed(tensors[name], density)
        is_norm = kinds[name] is Kind.NORM
        kept = tensors[name] if is_norm and not trim_norm else kept
        expected.append(summed_or_averaged(kept, 0.8, is_norm))
    given = {"density": density, "density_scope": scope, "trim_norm": trim_norm}
    merged = merge_model(tensors, kinds, TrimmedTaskArithmeticOptions(**given), dtype)
    assert_close(torch.from_numpy(merged), np.concatenate(expected), tolerance)
    base = {name: torch.zeros(size, dtype=dtype) for name, size in sizes.items()}
    tuned = [{name: torch.from_numpy(rows[task]).to(dtype) for name, rows in tensors.items()} for task in range(3)]
    by_name = merge_tensors(base, tuned, "trimmed_task_arithmetic", kinds=kinds, **given)
    assert_close(torch.cat([by_name[name] for name in tensors]), np.concatenate(expected), tolerance)


def test_defaults_are_those_of_stf():
    options, of_stf = TrimmedTaskArithmeticOptions(), StfOptions()
    assert (options.density, options.scaling_factor) == (0.2, 0.8) == (of_stf.density, of_stf.scaling_factor)
    assert (options.density_scope, options.trim_norm) == ("tensor", True)
    assert (of_stf.density_scope, of_stf.trim_norm) == ("tensor", True)


def test_worked_example_the_larger_half_of_each_is_added_up():
    task_vectors = in_double([3, -1, 0.5, 2], [-2, -1.5, 0.1, 1])
    assert merge(task_vectors, density=0.5, scaling_factor=1.0).tolist() == [1, -1.5, 0, 2]
    assert merge(task_vectors, density=0.5, scaling_factor=0.5).tolist() == [0.5, -0.75, 0, 1]
    assert merge(task_vectors, Kind.NORM, density=0.5, scaling_factor=7.0).tolist() == [0.5, -0.75, 0, 1]
    assert merge(task_vectors, Kind.NORM, density=0.5, trim_norm=False).tolist() == [0.5, -1.25, 0.3, 1.5]


def test_worked_example_where_stf_has_no_system_the_two_are_equal():
    for kind in (Kind.NORM, Kind.BIAS, Kind.EMBEDDING):
        task_vectors = random_stack(4, 30)
        assert_close(merge(task_vectors, kind), stf(task_vectors, StfOptions(), kind=kind).tensor.numpy(), 1e-14)


def test_worked_example_tasks_that_share_no_directions_equal_stf():
    task_vectors = torch.zeros(2, 4, 6, dtype=torch.float64)
    task_vectors[0, :2, :3], task_vectors[1, 2:, 3:] = random_stack(2, 2, 3)
    merged = merge(task_vectors, density=1.0)
    expected = stf(task_vectors, StfOptions(density=1.0), kind=Kind.LINEAR).tensor
    assert_close(merged, expected.numpy().ravel(), 1e-12)


@pytest.mark.parametrize("kind", SUMMED)
def test_untrimmed_it_is_task_arithmetic(kind):
    task_vectors = random_stack(3, 5, 6)
    expected = task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=0.3))
    assert_close(merge(task_vectors, kind, density=1.0, scaling_factor=0.3), expected.numpy().ravel(), 1e-14)


@pytest.mark.parametrize("kind", SUMMED)
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_breaks_same_identical_tasks_add_up(tasks, kind):
    task_vector = random_stack(1, 40)
    one = merge(task_vector, kind, scaling_factor=1.0).numpy()
    assert_close(merge(task_vector.expand(tasks, 40), kind, scaling_factor=1.0), tasks * one, 1e-14)
    assert_close(merge(task_vector.expand(tasks, 40), kind, scaling_factor=1 / tasks), one, 1e-14)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_breaks_same_not_for_norms(tasks):
    task_vector = random_stack(1, 40)
    one = merge(task_vector, Kind.NORM).numpy()
    assert_close(merge(task_vector.expand(tasks, 40), Kind.NORM), one, 1e-14)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_breaks_zero_the_base_takes_a_share_of_norms_alone(tasks):
    task_vectors = random_stack(tasks, 40)
    with_base = torch.cat([task_vectors, torch.zeros(1, 40, dtype=torch.float64)])
    assert_close(merge(with_base, Kind.NORM), tasks / (tasks + 1) * merge(task_vectors, Kind.NORM).numpy(), 1e-14)
    for kind in SUMMED:
        assert_close(merge(with_base, kind), merge(task_vectors, kind).numpy(), 1e-14)


@pytest.mark.parametrize("kind", [Kind.LINEAR, Kind.NORM])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base(shape, kind):
    merged = merge(torch.zeros(3, *shape), kind)
    assert merged.shape == shape
    assert not merged.any()


@pytest.mark.parametrize("numel", [1, 2, 19])
def test_degenerate_small_tensors_keep_one_entry_at_least(numel):
    assert int(merge(random_stack(1, numel), density=0.001).count_nonzero()) == 1


def test_degenerate_constant_rows_are_trimmed_by_place():
    assert merge(torch.full((2, 5), -1.5), density=0.4, scaling_factor=1.0).tolist() == [-3, -3, 0, 0, 0]


def test_degenerate_one_task_untrimmed_comes_back():
    task_vectors = random_stack(1, 5, 6)
    for kind in (Kind.LINEAR, Kind.NORM):
        assert torch.equal(merge(task_vectors, kind, density=1.0, scaling_factor=1.0), task_vectors[0])
