"""MetaGPT: coefficients by shares of the squared norm, entry by entry (Zhou et al. 2024, arXiv:2406.11385, (16)).

The norms are those of the whole model, after what `process` leaves out.
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
from superpose.methods.metagpt import MetaGptOptions, MetaGptSurvey, metagpt

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]
PROCESSES = ["trim", "ties", "dare"]
NAMES = ("model 1", "model 2", "model 3")
GENERATOR = Generator(0, "layers.0.weight", NAMES)


def trimmed(rows, density):
    kept = np.zeros(rows.shape)
    count = max(1, int(Fraction(str(density)) * rows.shape[1]))
    for row, out in zip(rows, kept, strict=True):
        for place in sorted(range(len(row)), key=lambda place: (-abs(row[place]), place))[:count]:
            out[place] = row[place]
    return kept


def processed_by_entry(rows, process, density, keeps):
    if process == "dare":
        return np.where(keeps, rows / density, 0.0)
    kept = trimmed(rows, density)
    if process == "ties":
        signs = [np.sign(sum(column)) for column in kept.T]
        kept = np.array([[v if v * s > 0 else 0.0 for v, s in zip(row, signs, strict=True)] for row in kept])
    return kept.reshape(rows.shape)


def combined(processed):
    norms = [sum(float(value) ** 2 for value in row) for row in processed]
    shares = [norm / sum(norms) if sum(norms) else 1 / len(norms) for norm in norms]
    return sum(share * row for share, row in zip(shares, processed, strict=True))


def keeps_of(generator, density, rows):
    return np.stack([generator.keeps(task, density, rows.shape[1:]).numpy() for task in range(len(rows))])


def merge(task_vectors, generator=GENERATOR, **options):
    return metagpt(torch.as_tensor(task_vectors), MetaGptOptions(**options), generator=generator)


def random_stack(tasks, *shape, dtype=torch.float64):
    """Return tasks of different norms."""
    rows = torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))
    return rows * torch.arange(1, tasks + 1).reshape(tasks, *[1] * len(shape))


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy().ravel(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("density", [0.001, 0.29, 0.55, 1.0])
def test_equals_the_formula(density, process, scope, shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    merged = merge(task_vectors, density=density, process=process, density_scope=scope)
    assert merged.shape == shape
    assert merged.dtype == dtype
    rows = task_vectors.double().numpy().reshape(3, -1)
    processed = processed_by_entry(rows, process, density, keeps_of(GENERATOR, density, rows))
    assert_close(merged, combined(processed), tolerance)


@settings(deadline=None, max_examples=120)
@given(
    st.integers(1, 3),
    st.integers(1, 15),
    st.integers(0, 2**32),
    st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    st.sampled_from(PROCESSES),
)
def test_equals_the_formula_where_magnitudes_tie_and_sums_cancel(tasks, entries, seed, density, process):
    rows = np.random.default_rng(seed).integers(-2, 3, (tasks, entries)).astype(float)
    generator = replace(GENERATOR, seed=seed)
    expected = combined(processed_by_entry(rows, process, density, keeps_of(generator, density, rows)))
    assert_close(merge(rows, generator, density=density, process=process), expected, 1e-13)


def merge_model(tensors, options, dtype):
    """Merge tensors after the survey's passes over all of them, reading three entries at a time."""
    survey = MetaGptSurvey()
    stacks = {name: torch.from_numpy(rows).to(dtype) for name, rows in tensors.items()}
    chunks = {
        name: TensorChunks(
            *stack.shape, 3, lambda start, stop, stack=stack: stack[:, start:stop],
            generator=Generator(0, name, NAMES),
        )
        for name, stack in stacks.items()
    }  # fmt: skip
    state = None
    for step in range(survey.passes(options, dtype)):
        values = [survey.measure(step, name, chunks[name], state, options) for name in chunks]
        state = survey.finish(step, reduce(iadd, values), state, options, dtype)
    merged = []
    for name, stack in stacks.items():
        numbers = survey.for_tensor(name, chunks[name], state, options)
        merged.append(metagpt(stack, options, generator=Generator(0, name, NAMES), survey=numbers).double().numpy())
    return np.concatenate(merged)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    density=st.sampled_from([0.1, 0.3, 0.75, 1.0]),
    process=st.sampled_from(PROCESSES),
    scope=st.sampled_from(["model", "tensor"]),
)
def test_model_equals_the_formula_on_the_flattened_model(seed, density, process, scope, dtype, tolerance):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.integers(-3, 4, (3, size)).astype(float) for name, size in (("a", 4), ("b", 11), ("nil", 0))}
    keeps = {name: keeps_of(Generator(0, name, NAMES), density, rows) for name, rows in tensors.items()}
    if scope == "model":
        whole, all_keeps = (np.concatenate(list(rows.values()), axis=1) for rows in (tensors, keeps))
        processed = processed_by_entry(whole, process, density, all_keeps)
    else:
        parts = [processed_by_entry(rows, process, density, keeps[name]) for name, rows in tensors.items() if rows.size]
        processed = np.concatenate(parts, axis=1)
    expected = combined(processed)
    merged = merge_model(tensors, MetaGptOptions(density=density, process=process, density_scope=scope), dtype)
    assert_close(torch.from_numpy(merged), expected, tolerance)
    base = {name: torch.zeros(rows.shape[1], dtype=dtype) for name, rows in tensors.items()}
    tuned = [{name: torch.from_numpy(rows[task]).to(dtype) for name, rows in tensors.items()} for task in range(3)]
    by_name = merge_tensors(base, tuned, "metagpt", density=density, process=process, density_scope=scope)
    assert_close(torch.cat([by_name[name] for name in tensors]), expected, tolerance)


def test_defaults_process_nothing():
    options = MetaGptOptions()
    assert (options.density, options.process, options.density_scope) == (1.0, "trim", "model")


def test_worked_example_squared_norms_one_and_four():
    assert_close(merge(in_double([1, 0], [0, 2])), np.array([0.2, 1.6]), 1e-15)


def test_worked_example_equal_norms_give_the_average():
    assert_close(merge(in_double([3, 4], [-5, 0], [0, 5])), np.array([-2 / 3, 3]), 1e-15)


def test_worked_example_one_task_comes_back():
    task_vectors = random_stack(1, 6, 7, dtype=torch.float32)
    assert torch.equal(merge(task_vectors), task_vectors[0])


def test_coefficients_add_up_to_one():
    survey, task_vectors = MetaGptSurvey(), random_stack(3, 50)
    chunks = TensorChunks(3, 50, 7, lambda start, stop: task_vectors[:, start:stop])
    value = survey.measure(0, "weight", chunks, None, MetaGptOptions())
    shares = survey.finish(0, value, None, MetaGptOptions(), torch.float64)
    assert sum(shares.coefficients) == pytest.approx(1, abs=1e-15)


def test_norms_are_those_of_the_model_and_not_of_each_tensor():
    base = {name: torch.zeros(1, dtype=torch.float64) for name in ("a", "b")}
    tuned = [{"a": in_double(1), "b": in_double(0)}, {"a": in_double(0), "b": in_double(2)}]
    merged = merge_tensors(base, tuned, "metagpt")
    assert_close(torch.cat([merged["a"], merged["b"]]), np.array([0.2, 1.6]), 1e-15)


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_identical_tasks_come_back_bit_for_bit(tasks):
    task_vector = random_stack(1, 40, dtype=torch.float32)
    assert torch.equal(merge(task_vector.expand(tasks, 40)), task_vector[0])


@pytest.mark.parametrize("process", ["trim", "ties"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_degenerate_task_of_zeros_changes_nothing(place, process):
    task_vectors = random_stack(3, 40)
    zeros = torch.zeros(1, 40, dtype=torch.float64)
    with_zeros = torch.cat([task_vectors[:place], zeros, task_vectors[place:]])
    expected = merge(task_vectors, None, density=0.55, process=process)
    assert_close(merge(with_zeros, None, density=0.55, process=process), expected.numpy(), 1e-14)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base(shape, process):
    merged = merge(torch.zeros(3, *shape), process=process, density=0.55)
    assert merged.shape == shape
    assert not merged.any()


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e30])
def test_degenerate_sizes_neither_overflow_nor_vanish_in_float32(factor):
    task_vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0]]) * factor
    np.testing.assert_allclose(merge(task_vectors).double().numpy() / factor, [0.2, 1.6], rtol=1e-5)


def test_degenerate_small_share_of_a_task_is_not_lost_in_rounding():
    """Where the task of largest norm leaves a tensor alone, a small share of another's update is all there is."""
    base = {name: torch.zeros(1) for name in ("a", "b")}
    tuned = [{"a": torch.ones(1), "b": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.full((1,), 1000.0)}]
    merged = merge_tensors(base, tuned, "metagpt")
    assert float(merged["a"]) == pytest.approx(1 / (1 + 1e6), rel=1e-6)


def test_dropping_needs_random_numbers():
    with pytest.raises(ValueError, match="needs random numbers"):
        merge(random_stack(2, 5), None, process="dare", density=0.5)


@pytest.mark.parametrize("size", [1, 3, 8, 29])
def test_pieces_have_the_bytes_of_the_whole(size):
    task_vectors, options = random_stack(3, 64, dtype=torch.float32), MetaGptOptions(density=0.5, process="dare")
    survey = MetaGptSurvey()

    def read(start, stop):
        return task_vectors[:, start:stop]

    chunks = TensorChunks(3, 64, size, read, generator=GENERATOR)
    state = survey.finish(0, survey.measure(0, "weight", chunks, None, options), None, options, torch.float32)
    numbers = survey.for_tensor("weight", chunks, state, options)
    pieces = [
        metagpt(chunk, options, generator=GENERATOR.within(start), survey=numbers.within(start, start + size))
        for start, chunk in chunks
    ]
    whole = metagpt(task_vectors, options, generator=GENERATOR, survey=numbers)
    assert torch.equal(torch.cat(pieces), whole)
    assert_close(merge(task_vectors, density=0.5, process="dare"), whole.numpy(), 1e-6)


@pytest.mark.parametrize("change", [{"seed": 6}, {"name": "layers.1.weight"}, {"tasks": ("a", "b", "c")}])
def test_other_seed_tensor_or_task_drops_others(change):
    task_vectors, options = random_stack(3, 50), {"process": "dare", "density": 0.5}
    assert not torch.equal(merge(task_vectors, replace(GENERATOR, **change), **options), merge(task_vectors, **options))
    order = [2, 0, 1]
    turned = replace(GENERATOR, tasks=tuple(NAMES[task] for task in order))
    assert_close(merge(task_vectors[order], turned, **options), merge(task_vectors, **options).numpy(), 1e-14)
