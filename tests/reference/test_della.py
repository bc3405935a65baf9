"""DELLA: drop at random by rank in the row, rescale, elect, merge, entry by entry (Deep et al. 2024, arXiv:2406.11617).

The uniform numbers are drawn from the tensor's generator and handed to the reference.
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
from superpose.methods.della import DellaOptions, della, keep_probabilities
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from superpose.methods.ties import TiesOptions, ties
from superpose.options import build_options

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (7, 1), (4, 3, 2, 2)]
NAMES = ("math", "code", "law", "art")
GENERATOR = Generator(5, "layers.0.weight", NAMES)


def probabilities_by_entry(task_vector, density, epsilon):
    """Rank each row's magnitudes, ties to the lowest index; one axis is one row, kernels are flattened to rows."""
    rows = task_vector.reshape(len(task_vector), -1) if task_vector.ndim > 1 else task_vector.reshape(1, -1)
    probabilities = np.full(rows.shape, float(density))
    entries = rows.shape[1]
    for row, out in zip(rows, probabilities, strict=True):
        ascending = sorted(range(entries), key=lambda place: (abs(row[place]), place))
        for rank, place in enumerate(ascending, 1):
            if entries > 1:
                out[place] = (density - epsilon) + 2 * epsilon * (rank - 1) / (entries - 1)
    return probabilities.reshape(task_vector.shape)


def della_by_entry(task_vectors, uniforms, density, epsilon, scaling_factor, merger, weights):
    survivors = []
    for task_vector, uniform in zip(task_vectors, uniforms, strict=True):
        q = probabilities_by_entry(task_vector, density, epsilon)
        survivors.append(np.where(uniform < q, task_vector / q, 0.0))
    merged = np.zeros(task_vectors.shape[1:])
    for place in np.ndindex(merged.shape):
        values = [weight * row[place] for weight, row in zip(weights, survivors, strict=True)]
        agreeing, divisor = values, 1.0
        if merger == "ties":
            sign = np.sign(sum(values))
            agreeing = [value for value in values if value * sign > 0]
            divisor = sum(weight for weight, value in zip(weights, values, strict=True) if value * sign > 0)
        merged[place] = scaling_factor * sum(agreeing) / divisor if agreeing else 0.0
    return merged


def uniforms_of(generator, tasks, shape):
    return np.stack([generator.uniform(task, shape).numpy() for task in range(tasks)])


def merge(task_vectors, weights=None, generator=GENERATOR, **options):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return della(torch.as_tensor(task_vectors), DellaOptions(**options), generator=generator, weights=given)


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, [0.3, 1.7, 1.0]])
@pytest.mark.parametrize("merger", ["ties", "task_arithmetic"])
@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.7, 0.07), (0.5, 0.499), (0.5, 0.5 - 1e-9), (1.0, 0.0), (0.01, 0.0)]
)
def test_equals_the_formula(density, epsilon, merger, weights, shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    options = {"density": density, "epsilon": epsilon, "scaling_factor": 0.7, "merger": merger}
    merged = merge(task_vectors, weights, **options)
    assert merged.shape == shape
    assert merged.dtype == dtype
    uniforms = uniforms_of(GENERATOR, 3, shape)
    expected = della_by_entry(task_vectors.double().numpy(), uniforms, weights=weights or [1.0] * 3, **options)
    assert_close(merged, expected, tolerance)


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6)),
    st.integers(0, 2**32),
    st.sampled_from([(0.5, 0.25), (0.75, 0.25), (1.0, 0.0)]),
    st.sampled_from(["ties", "task_arithmetic"]),
)
def test_equals_the_formula_where_magnitudes_tie_and_sums_cancel(shape, seed, probabilities, merger):
    rng = np.random.default_rng(seed)
    task_vectors = rng.integers(-2, 3, shape).astype(float)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], len(task_vectors)).tolist()
    generator = replace(GENERATOR, seed=seed)
    options = {"density": probabilities[0], "epsilon": probabilities[1], "scaling_factor": 1.0, "merger": merger}
    uniforms = uniforms_of(generator, shape[0], shape[1:])
    expected = della_by_entry(task_vectors, uniforms, weights=weights, **options)
    assert_close(merge(task_vectors, weights, generator, **options), expected, 1e-12)


def test_defaults_are_those_of_the_authors():
    options = DellaOptions()
    assert (options.density, options.epsilon, options.scaling_factor) == (0.7, 0.07, 1.1)
    assert options.merger == "ties"


def test_worked_example_of_the_probabilities():
    row = torch.tensor([0.3, -0.1, 0.5, 0.2, -0.4], dtype=torch.float64)
    probabilities = keep_probabilities(row, 0.5, 0.1)
    torch.testing.assert_close(probabilities.tolist(), [0.5, 0.4, 0.6, 0.45, 0.55], rtol=1e-14, atol=0)


def test_worked_example_of_the_survivors():
    """Each is kept about as often as its rank says, and is then the entry over that probability."""
    row, seeds = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0]], dtype=torch.float64), 3000
    options = {"density": 0.5, "epsilon": 0.1, "scaling_factor": 1.0}
    draws = torch.stack([merge(row, generator=replace(GENERATOR, seed=seed), **options) for seed in range(seeds)])
    expected = torch.tensor([0.4, 0.45, 0.5, 0.55, 0.6], dtype=torch.float64)
    share = (draws != 0).double().mean(dim=0)
    assert float(((share - expected).abs() / (expected * (1 - expected) / seeds).sqrt()).max()) < 4
    torch.testing.assert_close(draws.abs().amax(dim=0), row[0].abs() / expected, rtol=1e-14, atol=0)
    error = row[0].abs() * ((1 - expected) / expected / seeds).sqrt()
    assert float(((draws.mean(dim=0) - row[0]).abs() / error).max()) < 4


def test_worked_example_epsilon_zero_is_dare():
    task_vectors = random_stack(3, 8, 9)
    for density in (0.25, 0.5, 0.75):
        merged = merge(task_vectors, density=density, epsilon=0.0, scaling_factor=0.3, merger="task_arithmetic")
        dropped = dare(task_vectors, DareOptions(density=density, scaling_factor=0.3), generator=GENERATOR)
        assert_close(merged, dropped.numpy(), 1e-14)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_share_of_survivors_is_the_density_within_four_deviations(density):
    kept = merge(random_stack(1, 100, 200), density=density, epsilon=0.08) != 0
    assert abs(float(kept.double().mean()) - density) < 4 * (density * (1 - density) / kept.numel()) ** 0.5


def test_mean_over_seeds_of_the_sum_tends_to_the_sum_of_the_tasks():
    task_vectors, seeds = random_stack(2, 6, 10), 1500
    options = {"density": 0.5, "epsilon": 0.2, "scaling_factor": 1.0, "merger": "task_arithmetic"}
    draws = [merge(task_vectors, generator=replace(GENERATOR, seed=seed), **options) for seed in range(seeds)]
    q = torch.from_numpy(np.stack([probabilities_by_entry(row, 0.5, 0.2) for row in task_vectors.numpy()]))
    error = ((task_vectors.square() * (1 - q) / q).sum(dim=0) / seeds).sqrt()
    assert float(((torch.stack(draws).mean(dim=0) - task_vectors.sum(dim=0)) / error).abs().max()) < 4.5


def test_nothing_dropped_leaves_the_merger_alone():
    task_vectors, weights = random_stack(3, 5, 6), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    plain = DellaOptions(density=1.0, epsilon=0.0, scaling_factor=0.7)
    expected = ties(task_vectors, TiesOptions(density=1.0, scaling_factor=0.7), weights=weights)
    assert_close(della(task_vectors, plain, generator=GENERATOR, weights=weights), expected.numpy(), 1e-14)
    summed = task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=0.7), weights=weights)
    plain = replace(plain, merger="task_arithmetic")
    assert_close(della(task_vectors, plain, generator=GENERATOR, weights=weights), summed.numpy(), 1e-14)


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.95, 0.07), (1.0, 0.07), (0.05, 0.07), (0.07, 0.07), (0.25, 0.25), (0.75, 0.2501)]
)
def test_probabilities_outside_zero_to_one_are_refused(density, epsilon):
    options, (problem,) = build_options(
        DellaOptions, {"density": density, "epsilon": epsilon}, where="recipe.yaml, line 7", owner="method della"
    )
    assert options == DellaOptions()
    assert problem.what == (
        f"method della: density {density:g} with epsilon {epsilon:g} reaches outside (0, 1]:"
        " density - epsilon has to be above 0, and density + epsilon at most 1"
    )
    assert problem.where == "recipe.yaml, line 7"
    assert "epsilon is in [0, 0.5], 0.07 by default" in problem.mend


def test_probabilities_up_to_one_are_allowed():
    for thousandths in range(500, 1001):
        given = {"density": thousandths / 1000, "epsilon": (1000 - thousandths) / 1000}
        if thousandths > 500:
            assert build_options(DellaOptions, given, where="", owner="")[1] == []


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("merger", ["ties", "task_arithmetic"])
def test_other_order_of_the_tasks_goes_with_their_names(rows, merger):
    task_vectors, order = random_stack(4, rows, 20), [2, 0, 3, 1]
    turned = replace(GENERATOR, tasks=tuple(NAMES[task] for task in order))
    merged = merge(task_vectors[order], [1.0, 2.0, 3.0, 4.0], turned, merger=merger)
    assert_close(merged, merge(task_vectors, [2.0, 4.0, 1.0, 3.0], merger=merger).numpy(), 1e-14)


@pytest.mark.parametrize("change", [{"seed": 6}, {"name": "layers.1.weight"}, {"tasks": ("a", "b", "c", "d")}])
def test_other_seed_tensor_or_task_drops_others(change):
    task_vectors = random_stack(3, 50)
    assert not torch.equal(merge(task_vectors, generator=replace(GENERATOR, **change)), merge(task_vectors))
    assert torch.equal(merge(task_vectors), merge(task_vectors))


def test_model_draws_by_seed_tensor_and_task():
    names = ("model 1", "model 2", "model 3")
    stacks = {"a.weight": random_stack(3, 6, 9), "b.bias": random_stack(3, 7)}
    base = {name: torch.zeros_like(stack[0]) for name, stack in stacks.items()}
    tuned = [{name: stack[task] for name, stack in stacks.items()} for task in range(3)]
    merged = merge_tensors(base, tuned, "della", weights=[0.5, 1.0, 2.0], seed=9)
    for name, stack in stacks.items():
        uniforms = uniforms_of(Generator(9, name, names), 3, stack.shape[1:])
        expected = della_by_entry(stack.numpy(), uniforms, 0.7, 0.07, 1.1, "ties", [0.5, 1.0, 2.0])
        assert_close(merged[name], expected, 1e-12)


def test_numbers_begin_where_the_generator_says():
    task_vectors = random_stack(2, 30)
    expected = della_by_entry(
        task_vectors.numpy(), uniforms_of(GENERATOR, 2, (47,))[:, 17:], 0.7, 0.07, 1.1, "ties", [1.0, 1.0]
    )
    assert_close(merge(task_vectors, generator=GENERATOR.within(17)), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (5, 4)])
def test_degenerate_task_vectors_of_zeros_leave_the_base(shape, dtype):
    merged = merge(torch.zeros(3, *shape, dtype=dtype))
    assert merged.shape == shape
    assert not merged.any()


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (4, 1, 1)])
def test_degenerate_rows_of_one_entry_have_the_density_as_probability(shape):
    probabilities = keep_probabilities(torch.ones(shape), 0.7, 0.2)
    assert probabilities.shape == shape
    assert (probabilities == 0.7).all()


def test_degenerate_constant_rows_are_ranked_by_place():
    torch.testing.assert_close(keep_probabilities(torch.ones(5), 0.5, 0.1).tolist(), [0.4, 0.45, 0.5, 0.55, 0.6])


def test_degenerate_task_of_zeros_changes_nothing():
    task_vectors = random_stack(3, 50)
    with_zeros = torch.cat([task_vectors, torch.zeros(1, 50, dtype=torch.float64)])
    assert torch.equal(merge(with_zeros), merge(task_vectors))
