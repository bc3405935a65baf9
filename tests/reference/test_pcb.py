"""PCB-Merging: each entry by its strength and its agreement (Du et al. 2024, arXiv:2410.02396, the root script).

The strength is that of the clipped magnitude also where an entry is zero, whose sign then clears it.
"""

import math
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
from superpose.maths.streaming import TensorChunks
from superpose.methods.pcb import PcbOptions, PcbSurvey, pcb

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (15, 20), (7, 3, 2, 2)]
CHOICES = [(0.001, 0.0), (0.1, 0.0001), (0.1, 0.01), (0.5, 0.0), (0.3, 0.25), (1.0, 0.0), (1.0, 0.4)]
MODEL = {"w": (6, 5), "conv": (3, 2, 2, 2), "norm": (5,), "bias": (1,), "experts": (2, 3, 4), "nil": (0, 4)}
KIND_OF = {"w": "linear", "conv": "conv", "norm": "norm", "bias": "bias", "experts": "linear", "nil": "embedding"}


def clipped(row, clip):
    """Return the magnitudes, none below and none above the two that the authors' code picks."""
    ordered, share = sorted(abs(value) for value in row), Fraction(str(clip))
    high = max(int(len(row) * (1 - share) - 1), 0)
    low = min(int(len(row) * share), high)
    return [min(max(abs(value), ordered[low]), ordered[high]) for value in row]


def betas_of(row, together, tasks, clip):
    magnitudes = clipped(row, clip)
    low, span = min(magnitudes), max(magnitudes) - min(magnitudes)
    strengths = [(value - low) / span if span else 0.0 for value in magnitudes]
    pairs = zip(strengths, row * together, strict=True)
    return [math.exp(tasks * strength**2) * math.tanh(product) for strength, product in pairs]


def scales_of(betas, density):
    threshold = sorted(betas)[min(math.floor(len(betas) * (1 - Fraction(str(density)))), len(betas) - 1)]
    raised = [max(beta, threshold) for beta in betas]
    span = max(raised) - threshold
    if span:
        return [(beta - threshold) / span for beta in raised]
    return [float(beta == threshold > 0) for beta in betas]


def pcb_by_entry(rows, *, density=0.1, scaling_factor=1.0, clip=0.0001, weights=None):
    together = rows.sum(axis=0)
    weighted, total = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    if not rows.size:
        return weighted
    for row, weight in zip(rows, weights or [1.0] * len(rows), strict=True):
        scales = np.array(scales_of(betas_of(row, together, len(rows), clip), density))
        weighted += weight * np.sign(row) * clipped(row, clip) * scales
        total += scales
    return scaling_factor * weighted / np.maximum(total, 1e-12)


def merge(task_vectors, weights=None, **options):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    options = {"scaling_factor": 1.0, **options}
    return pcb(torch.as_tensor(task_vectors), PcbOptions(**options), weights=given).tensor


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(5))


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy().ravel(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tasks", [1, 8])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("density", "clip"), CHOICES)
def test_equals_the_formula(density, clip, weighted, tasks, shape, dtype, tolerance):
    task_vectors = 0.3 * random_stack(tasks, *shape, dtype=dtype)
    options = {"density": density, "clip": clip, "scaling_factor": 0.7}
    weights = [0.5, 2.0, 0.0, 1.0, -1.0, 1.5, 1.0, 0.25][:tasks] if weighted else None
    merged = merge(task_vectors, weights, **options)
    assert merged.shape == shape
    assert merged.dtype == dtype
    rows = task_vectors.double().numpy().reshape(tasks, -1)
    assert_close(merged, pcb_by_entry(rows, weights=weights, **options), tolerance)


# Quarters keep the products where the hyperbolic tangent still tells them apart in float64.
@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 5),
    st.integers(1, 14),
    st.integers(0, 2**32),
    st.sampled_from([0.001, 0.1, 0.25, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.0001, 0.1, 0.25, 0.4]),
)
def test_equals_the_formula_where_magnitudes_tie_and_sums_cancel(tasks, entries, seed, density, clip):
    rows = np.random.default_rng(seed).integers(-3, 4, (tasks, entries)) / 4
    merged = merge(rows, density=density, clip=clip)
    assert_close(merged, pcb_by_entry(rows, density=density, clip=clip), 1e-12)
    largest = [max(clipped(row, clip)) for row in rows]
    assert merged.abs().max() <= max(largest) * (1 + 1e-12)


@pytest.mark.parametrize(("entries", "clip"), [(100, 0.29), (100, 0.07), (200, 0.07), (5000, 0.001), (10_000, 0.0001)])
def test_equals_the_formula_where_the_places_of_the_quantiles_are_whole_numbers(entries, clip):
    """In binary 100 * 0.29 is less than 29."""
    rows = 0.3 * np.random.default_rng(entries).standard_normal((2, entries))
    options = {"density": 1.0, "clip": clip}
    assert_close(merge(rows, **options), pcb_by_entry(rows, **options), 1e-12)


def model_of(dtype, tasks=3):
    rng = np.random.default_rng(8)
    tuned = {
        name: torch.from_numpy(rng.standard_normal((tasks, *shape)) / 3).to(dtype) for name, shape in MODEL.items()
    }
    tuned["norm"][:, ::2] = 0
    return tuned


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("density", "clip"), CHOICES[1::2])
def test_model_equals_the_formula_on_the_flattened_model(density, clip, dtype, tolerance):
    stacks, weights = model_of(dtype), [1.0, 0.5, 2.0]
    base = {name: torch.zeros(shape, dtype=dtype) for name, shape in MODEL.items()}
    tuned = [{name: stack[task] for name, stack in stacks.items()} for task in range(3)]
    options = {"density": density, "clip": clip, "scaling_factor": 1.2}
    merged = merge_tensors(
        base, tuned, "pcb", kinds={name: Kind(kind) for name, kind in KIND_OF.items()}, weights=weights, **options
    )
    whole = torch.cat([stack.flatten(1) for stack in stacks.values()], dim=1).double().numpy()
    expected = pcb_by_entry(whole, weights=weights, **options)
    assert_close(torch.cat([merged[name].flatten() for name in MODEL]), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), choice=st.sampled_from(CHOICES))
def test_model_read_three_entries_at_a_time_equals_the_formula(seed, choice, dtype, tolerance):
    rng, survey = np.random.default_rng(seed), PcbSurvey()
    options = PcbOptions(density=choice[0], clip=choice[1], scaling_factor=1.0)
    stacks = [torch.from_numpy(rng.integers(-3, 4, (2, size)) / 4).to(dtype) for size in (4, 0, 11)]
    chunks = [TensorChunks(*stack.shape, 3, lambda a, b, stack=stack: stack[:, a:b]) for stack in stacks]
    state = None
    for step in range(survey.passes(options, dtype)):
        values = [survey.measure(step, "", tensor, state, options) for tensor in chunks]
        state = survey.finish(step, reduce(iadd, values), state, options, dtype)
    numbers = survey.for_tensor("", chunks[0], state, options)
    pieces = [
        pcb(chunk, options, survey=numbers.within(start, start + chunk.shape[1])).tensor
        for tensor in chunks
        for start, chunk in tensor
    ]
    expected = pcb_by_entry(torch.cat(stacks, dim=1).double().numpy(), density=choice[0], clip=choice[1])
    assert_close(torch.cat(pieces), expected, tolerance)


def test_defaults_are_those_of_the_authors():
    options = PcbOptions()
    assert (options.density, options.scaling_factor, options.clip) == (0.1, 1.2, 0.0001)


def test_worked_example_of_two_tasks():
    task_vectors = in_double([1, 2, -3, 4], [2, -1, -3, 0.5])
    assert_close(merge(task_vectors, density=0.5, clip=0.0), np.array([0, 0, -3, 4]), 1e-14)
    assert merge(task_vectors[:1], density=0.5, clip=0.0).tolist() == [0, 0, 0, 4]


def test_worked_example_any_clip_brings_the_largest_entry_down_to_the_second():
    assert_close(merge(in_double([1, 2, -3, 4]), density=1.0, clip=0.0001), np.array([0, 2, -3, 3]), 1e-14)


def test_worked_example_weights_multiply_the_task_vectors_alone():
    task_vectors = random_stack(3, 60)
    one, other, rest = (merge(task_vectors, weights) for weights in ([1, 0, 0], [0, 1, 0], [0, 0, 1]))
    expected = (0.5 * one + 2 * other - rest).numpy()
    assert_close(merge(task_vectors, [0.5, 2, -1]), expected, 1e-13)


def strongest(row, density, clip):
    """Return the clipped entries beyond number floor((1 - density) d) of the ascending magnitudes."""
    places = sorted(range(len(row)), key=lambda place: abs(row[place]))
    kept = np.zeros(len(row))
    for place in places[math.floor(len(row) * (1 - Fraction(str(density)))) + 1 :]:
        kept[place] = np.sign(row[place]) * clipped(row, clip)[place]
    return kept


@pytest.mark.parametrize(("density", "clip"), [(0.1, 0.0001), (0.5, 0.1), (1.0, 0.0)])
def test_breaks_single_one_task_comes_back_on_its_strongest_entries(density, clip):
    row = 0.3 * random_stack(1, 90)
    assert_close(merge(row, density=density, clip=clip), strongest(row[0].numpy(), density, clip), 1e-14)


@pytest.mark.parametrize(("density", "clip"), [(0.1, 0.0001), (0.5, 0.1), (1.0, 0.0)])
def test_breaks_same_identical_tasks_come_back_on_their_strongest_entries(density, clip):
    row = 0.3 * random_stack(1, 90)
    merged = merge(row.expand(4, 90), density=density, clip=clip)
    assert_close(merged, strongest(row[0].numpy(), density, clip), 1e-14)


def test_breaks_zero_one_task_of_zeros_more_counts_in_the_exponent():
    rows = random_stack(2, 50).numpy()
    with_zeros = np.concatenate([rows, np.zeros((1, 50))])
    together, weighted, total = rows.sum(axis=0), 0, 0
    for row in rows:
        scales = np.array(scales_of(betas_of(row, together, 3, 0.0001), 0.3))
        weighted, total = weighted + np.sign(row) * clipped(row, 0.0001) * scales, total + scales
    merged = merge(with_zeros, density=0.3)
    assert_close(merged, weighted / np.maximum(total, 1e-12), 1e-12)
    assert not torch.allclose(merged, merge(rows, density=0.3), rtol=1e-3)


def test_breaks_scale_only_small_task_vectors_let_a_factor_out():
    small = 1e-5 * random_stack(3, 80)
    # tanh(x) = x - x^3 / 3: of products near 1e-9, in float64 the products themselves.
    assert_close(merge(4 * small, density=0.5), 4 * merge(small, density=0.5).numpy(), 1e-12)
    large = random_stack(3, 80)
    assert not torch.allclose(merge(4 * large, density=0.5), 4 * merge(large, density=0.5), rtol=1e-3)


@pytest.mark.parametrize(("density", "clip"), CHOICES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base(shape, density, clip):
    merged = merge(torch.zeros(3, *shape), density=density, clip=clip)
    assert merged.shape == shape
    assert not merged.any()


@pytest.mark.parametrize(("density", "clip"), CHOICES)
def test_degenerate_task_of_zeros_takes_nothing_from_one_task(density, clip):
    row = 0.3 * random_stack(1, 30)
    with_zeros = torch.cat([row, torch.zeros(1, 30, dtype=torch.float64)])
    assert_close(merge(with_zeros, density=density, clip=clip), merge(row, density=density, clip=clip).numpy(), 1e-12)


def test_degenerate_opposite_tasks_leave_the_base():
    row = random_stack(1, 30)
    assert not merge(torch.cat([row, -row]), density=1.0).any()


@pytest.mark.parametrize(("density", "clip"), CHOICES)
@pytest.mark.parametrize("value", [2.0, -2.0, 1e-9, 1e-30])
def test_degenerate_constant_rows_and_single_entries_come_back(value, density, clip):
    """All magnitudes are equal, and all betas: nothing is set apart."""
    for entries in (1, 7):
        constant = torch.full((2, entries), value, dtype=torch.float64)
        assert torch.equal(merge(constant, density=density, clip=clip), constant[0])


def test_degenerate_single_entry_that_disagrees_with_the_sum_does_not_count():
    assert merge(in_double([3], [-1])).tolist() == [3]


def test_degenerate_updates_mostly_rounded_away_in_bfloat16_equal_the_formula():
    base = random_stack(1, 400, dtype=torch.float32).bfloat16()
    tuned = base + (3e-3 * random_stack(3, 400, dtype=torch.float32)).bfloat16()
    task_vectors = tuned.double() - base.double()
    assert (task_vectors == 0).double().mean() > 0.3
    for density, clip in CHOICES:
        expected = pcb_by_entry(task_vectors.numpy(), density=density, clip=clip)
        assert_close(merge(task_vectors, density=density, clip=clip), expected, 1e-12)


def test_degenerate_task_that_clipping_leaves_nothing_of_is_warned_of():
    task_vectors = torch.tensor([[0.0, 0, 0, 5], [1, 2, 3, 4]], dtype=torch.float64)
    merged = pcb(task_vectors, PcbOptions(density=0.5))
    (caution,) = merged.cautions
    assert caution.tasks == (0,)
    assert "clip 0" in caution.text
    assert not pcb(task_vectors, PcbOptions(density=0.5, clip=0.0)).cautions
    assert pcb(task_vectors[:1], PcbOptions(density=0.5, clip=0.0)).tensor.tolist() == [0, 0, 0, 6]
