"""DARE: drop entries at random, rescale, add up, entry by entry (Yu et al. 2024, arXiv:2311.03099, (1) to (3)).

Which entries are kept is drawn from the tensor's generator and handed to the reference.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.maths.randomness import Generator
from superpose.methods.dare import DareOptions, dare
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from superpose.planning import CHUNK

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]
NAMES = ("math", "code", "law", "art")
GENERATOR = Generator(5, "layers.0.weight", NAMES)


def dare_by_entry(task_vectors, keeps, density, scaling_factor, weights):
    merged = np.zeros(task_vectors.shape[1:])
    for place in np.ndindex(merged.shape):
        for task_vector, kept, weight in zip(task_vectors, keeps, weights, strict=True):
            if kept[place]:
                merged[place] += scaling_factor * weight * float(task_vector[place]) / density
    return merged


def keeps_of(generator, density, tasks, shape):
    return np.stack([generator.keeps(task, density, shape).numpy() for task in range(tasks)])


def merge(task_vectors, weights=None, generator=GENERATOR, **options):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return dare(torch.as_tensor(task_vectors), DareOptions(**options), generator=generator, weights=given)


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, [0.3, -1.7, 1.0]])
@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 0.9, 1.0])
def test_equals_the_formula(density, weights, shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    merged = merge(task_vectors, weights, density=density, scaling_factor=0.7)
    assert merged.shape == shape
    assert merged.dtype == dtype
    keeps = keeps_of(GENERATOR, density, 3, shape)
    expected = dare_by_entry(task_vectors.double().numpy(), keeps, density, 0.7, weights or [1.0] * 3)
    assert_close(merged, expected, tolerance)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**32), st.sampled_from([0.125, 0.5, 0.75, 1.0]))
def test_equals_the_formula_where_entries_are_small_integers(tasks, entries, seed, density):
    task_vectors = np.random.default_rng(seed).integers(-2, 3, (tasks, entries)).astype(float)
    generator = replace(GENERATOR, seed=seed)
    merged = merge(task_vectors, generator=generator, density=density, scaling_factor=0.5)
    keeps = keeps_of(generator, density, tasks, (entries,))
    assert_close(merged, dare_by_entry(task_vectors, keeps, density, 0.5, [1.0] * tasks), 1e-14)


def test_defaults_are_those_of_fusion_bench_and_of_task_arithmetic():
    assert (DareOptions().density, DareOptions().scaling_factor) == (0.5, 0.3)


def test_worked_example_at_density_one_is_task_arithmetic():
    task_vectors = random_stack(3, 5, 6)
    expected = task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=0.3))
    assert torch.equal(merge(task_vectors, density=1.0), expected)
    assert torch.equal(merge(task_vectors[:1], density=1.0, scaling_factor=1.0), task_vectors[0])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_worked_example_survivors_are_the_entries_over_the_density(density):
    task_vectors = random_stack(1, 200, 100)
    merged = merge(task_vectors, density=density, scaling_factor=1.0)
    kept = merged != 0
    torch.testing.assert_close(merged[kept], task_vectors[0][kept] / density, rtol=1e-14, atol=0)
    share, deviation = float(kept.double().mean()), (density * (1 - density) / kept.numel()) ** 0.5
    assert abs(share - density) < 4 * deviation


def test_worked_example_mean_over_seeds_tends_to_the_task_vector():
    task_vectors, seeds, density = random_stack(2, 60), 1500, 0.4
    total = torch.zeros(60, dtype=torch.float64)
    for seed in range(seeds):
        total += merge(task_vectors, generator=replace(GENERATOR, seed=seed), density=density, scaling_factor=1.0)
    # One entry has the variance sum_i tau_i^2 (1 - density) / density.
    error = ((1 - density) / density * task_vectors.square().sum(dim=0) / seeds).sqrt()
    assert float(((total / seeds - task_vectors.sum(dim=0)) / error).abs().max()) < 4.5


def test_breaks_same_identical_tasks_add_up():
    """Each task draws for itself, so that it is T times the task in the mean, and exactly where nothing is dropped."""
    task_vectors = random_stack(1, 40).expand(4, 40)
    one = merge(task_vectors[:1], density=1.0, scaling_factor=1.0)
    assert_close(merge(task_vectors, density=1.0, scaling_factor=1.0), 4 * one.numpy(), 1e-14)
    assert_close(merge(task_vectors, density=1.0, scaling_factor=1 / 4), one.numpy(), 1e-14)
    draws = [merge(task_vectors, generator=replace(GENERATOR, seed=seed), scaling_factor=1.0) for seed in range(900)]
    # The variance of an entry over its square is 4 (1 - 0.5) / 0.5 = 4.
    ratios = torch.stack(draws).mean(dim=0) / task_vectors[0]
    assert float((ratios - 4).abs().max()) < 4.5 * (4 / 900) ** 0.5


@pytest.mark.parametrize("size", [1, 3, 8, 29, 64])
def test_pieces_have_the_bytes_of_the_whole(size):
    task_vectors = random_stack(3, 64, dtype=torch.float32)
    whole = merge(task_vectors, density=0.4)
    pieces = [
        merge(task_vectors[:, start : start + size], generator=GENERATOR.within(start), density=0.4)
        for start in range(0, 64, size)
    ]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_merged_in_pieces_has_the_bytes_of_each_tensor_as_a_whole(dtype):
    sizes = {"long.weight": (3, CHUNK // 2 + 5), "short.bias": (7,)}
    stacks = {name: random_stack(2, *shape, dtype=dtype) for name, shape in sizes.items()}
    base = {name: torch.zeros(shape, dtype=dtype) for name, shape in sizes.items()}
    tuned = [{name: stack[task] for name, stack in stacks.items()} for task in range(2)]
    merged = merge_tensors(base, tuned, "dare", weights=[0.5, 2.0], seed=9)
    for name, stack in stacks.items():
        whole = merge(stack, [0.5, 2.0], generator=Generator(9, name, ("model 1", "model 2")))
        assert torch.equal(merged[name], whole)


def test_order_of_the_tasks_goes_with_their_names():
    task_vectors, order = random_stack(4, 50), [2, 0, 3, 1]
    turned = replace(GENERATOR, tasks=tuple(NAMES[task] for task in order))
    merged = merge(task_vectors[order], [1.0, 2.0, 3.0, 4.0], generator=turned)
    assert_close(merged, merge(task_vectors, [2.0, 4.0, 1.0, 3.0]).numpy(), 1e-14)


@pytest.mark.parametrize("change", [{"seed": 6}, {"name": "layers.1.weight"}, {"tasks": ("a", "b", "c", "d")}])
def test_other_seed_tensor_or_task_drops_others(change):
    task_vectors = random_stack(3, 50)
    assert not torch.equal(merge(task_vectors, generator=replace(GENERATOR, **change)), merge(task_vectors))
    assert torch.equal(merge(task_vectors), merge(task_vectors))


def test_task_of_zeros_changes_nothing():
    task_vectors = random_stack(3, 50)
    with_zeros = torch.cat([task_vectors, torch.zeros(1, 50, dtype=torch.float64)])
    assert torch.equal(merge(with_zeros), merge(task_vectors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (5, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base(shape, dtype):
    merged = merge(torch.zeros(3, *shape, dtype=dtype), density=0.001)
    assert merged.shape == shape
    assert not merged.any()


@pytest.mark.parametrize("density", [1 - 1e-6, 1 - 1e-9, 1 - 1e-10, 1 - 1e-12])
def test_degenerate_density_just_below_one_keeps_nearly_all(density):
    task_vectors = random_stack(1, 1000)
    assert int(merge(task_vectors, density=density).count_nonzero()) >= 998


def test_degenerate_single_entry_is_kept_as_often_as_the_density_says():
    kept = [bool(merge(torch.ones(1, 1), generator=replace(GENERATOR, seed=seed), density=0.3)) for seed in range(2000)]
    assert abs(sum(kept) / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


def test_degenerate_updates_rounded_in_bfloat16_equal_the_formula():
    base = random_stack(1, 8, 9, dtype=torch.float32).bfloat16()
    tuned = base + (2e-3 * random_stack(3, 8, 9, dtype=torch.float32)).bfloat16()
    task_vectors = tuned.double() - base.double()
    expected = dare_by_entry(task_vectors.numpy(), keeps_of(GENERATOR, 0.5, 3, (8, 9)), 0.5, 0.3, [1.0] * 3)
    assert_close(merge(task_vectors), expected, 1e-12)
