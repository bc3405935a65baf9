"""KnOTS: task matrices in one shared basis, merged there (Stoica et al. 2024, arXiv:2410.19735, equations (4), (5)).

The reference merges a whole model: a tensor alone is a model of one.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.kinds import Kind
from superpose.maths.randomness import Generator
from superpose.methods.knots import KnotsOptions, knots

# float32: each product with a rounded basis, and the basis itself, add one rounding to the merger's own.
DTYPES = [(torch.float32, 2e-6), (torch.float64, 1e-12)]
LINEAR, CONV, NORM = Kind.LINEAR, Kind.CONV, Kind.NORM
TENSORS = [
    (LINEAR, (6, 5)), (LINEAR, (20, 4)), (LINEAR, (4, 30)), (LINEAR, (150, 12)), (LINEAR, (12, 60)),
    (LINEAR, (1, 1)), (LINEAR, (2, 4, 5)), (CONV, (6, 3, 2, 2)), (CONV, (8, 1, 3, 3)), (NORM, (9,)),
    (Kind.SCALAR, ()), (Kind.EMBEDDING, (7, 3)), (Kind.HEAD, (3, 7)),
]  # fmt: skip
MERGERS = [
    {"merger": "ties", "density": 0.2},
    {"merger": "ties", "density": 1.0},
    {"merger": "ties", "density": 0.0},
    {"merger": "task_arithmetic"},
    {"merger": "dare_ties", "density": 1.0, "dare_density": 0.7},
    {"merger": "dare_ties", "density": 0.3, "dare_density": 0.5},
]
MODEL = {
    "a": (LINEAR, (6, 5)), "b": (NORM, (7,)), "c": (CONV, (4, 3, 2, 2)), "d": (LINEAR, (2, 3, 4)),
    "e": (CONV, (5, 1, 3, 3)), "f": (Kind.EMBEDDING, (5, 4)), "g": (Kind.BIAS, (1,)), "h": (LINEAR, (140, 5)),
}  # fmt: skip


def maps_of(kind, stack):
    """Return the task matrices of each map a tensor holds; none where it is no matrix."""
    shape = stack.shape[1:]
    if kind not in (LINEAR, CONV) or len(shape) < 2 or (kind is CONV and shape[1] == 1):
        return []
    if kind is LINEAR and len(shape) == 3:
        return [stack[:, number] for number in range(shape[0])]
    return [stack.reshape(len(stack), shape[0], -1)]


def basis_of(matrices, eps):
    side_by_side = np.concatenate(list(matrices), axis=1)
    u, s, _ = np.linalg.svd(side_by_side, full_matrices=False)
    kept = s > max(side_by_side.shape) * eps * s[0]
    return u[:, kept], s[kept]


def kept_by_ties(rows, density):
    kept = np.zeros(rows.shape)
    count = max(1, int(Fraction(str(density)) * rows.shape[1])) if density > 0 else 0
    for row, out in zip(rows, kept, strict=True):
        places = np.argsort(-np.abs(row), kind="stable")[:count]
        out[places] = row[places]
    return kept


def elected_mean(rows, weights):
    """Return the weighted mean of what has the sign of the weighted sum; 0 where the sum is 0."""
    weighted = weights[:, None] * rows
    agrees = weighted * weighted.sum(axis=0) > 0
    total = (agrees * weights[:, None]).sum(axis=0)
    return (weighted * agrees).sum(axis=0) / np.where(total > 0, total, 1)


def knots_of_model(
    model, eps, *, merger="ties", density=0.2, scaling_factor=1.0, density_scope="model", weight_by_sigma=True,
    dare_density=0.9, weights=None, keeps=None,
):  # fmt: skip
    """Merge tensors, each given as its kind and its stack of task vectors, under their names.

    What DARE keeps is random, and given as a function of the tensor's name, the task and the number of entries.
    """
    bases, aligned = {}, {}
    for name, (kind, stack) in model.items():
        maps = maps_of(kind, stack)
        bases[name] = [basis_of(matrices, eps) for matrices in maps]
        parts = [stack.reshape(len(stack), -1)]
        if maps:
            strengths = [s[:, None] if not weight_by_sigma else 1.0 for _, s in bases[name]]
            turned = [u.T @ m / strength for (u, _), m, strength in zip(bases[name], maps, strengths, strict=True)]
            parts = [part.reshape(len(stack), -1) for part in turned]
        rows = np.concatenate(parts, axis=1)
        if merger == "dare_ties":
            rows = rows * [keeps(name, task, rows.shape[1]) for task in range(len(rows))] / dare_density
        aligned[name] = rows
    weights = np.ones(len(rows)) if weights is None else np.array(weights)
    if merger != "task_arithmetic":
        if density_scope == "model":
            sizes = np.cumsum([rows.shape[1] for rows in aligned.values()])[:-1]
            whole = kept_by_ties(np.concatenate(list(aligned.values()), axis=1), density)
            aligned = dict(zip(aligned, np.split(whole, sizes, axis=1), strict=True))
        else:
            aligned = {name: kept_by_ties(rows, density) for name, rows in aligned.items()}
    results = {}
    for name, (_, stack) in model.items():
        rows = aligned[name]
        merged = weights @ rows if merger == "task_arithmetic" else elected_mean(rows, weights)
        if bases[name]:
            ends = np.cumsum([u.shape[1] * stack.shape[-1] for u, _ in bases[name]])[:-1]
            turned = [
                (u if weight_by_sigma else u * s) @ part.reshape(u.shape[1], -1)
                for (u, s), part in zip(bases[name], np.split(merged, ends) if len(ends) else [merged], strict=True)
            ]
            merged = np.stack(turned)
        results[name] = scaling_factor * merged.reshape(stack.shape[1:])
    return results


def keeps_of(names, dare_density=0.9, **options):
    del options
    return lambda name, task, entries: Generator(0, name, names).keeps(task, dare_density, (entries,)).numpy()


def merge(task_vectors, kind=LINEAR, weights=None, generator=None, **options):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    options = KnotsOptions(**{"scaling_factor": 1.0, **options})
    return knots(torch.as_tensor(task_vectors), options, kind=kind, weights=given, generator=generator)


def random_stack(tasks, *shape, dtype=torch.float64, seed=6):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def low_rank_stack(tasks, out, rank, in_):
    return random_stack(tasks, out, rank) @ random_stack(tasks, rank, in_, seed=7)


def assert_close(actual, expected, tolerance):
    actual, expected = (np.asarray(values, float) for values in (actual, expected))
    assert actual.shape == expected.shape
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("kind", "shape"), TENSORS)
@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize(("weights", "weight_by_sigma"), [(None, True), ([0.5, 2.0, 1.0], False)])
def test_equals_the_formula(weights, weight_by_sigma, merger, kind, shape, dtype, tolerance):
    task_vectors, names = random_stack(3, *shape, dtype=dtype), ("x", "y", "z")
    options = {**merger, "weight_by_sigma": weight_by_sigma, "scaling_factor": 0.6}
    found = merge(task_vectors, kind, weights, Generator(0, "w", names), **options)
    assert found.tensor.dtype == dtype
    model = {"w": (kind, task_vectors.double().numpy())}
    expected = knots_of_model(
        model, torch.finfo(dtype).eps, weights=weights, keeps=keeps_of(names, **options), **options
    )
    assert_close(found.tensor, expected["w"], tolerance)


# The same examples every time: of all stacks there are, some are as ill-conditioned as one likes.
@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32), st.sampled_from(MERGERS[:4]))
def test_equals_the_formula_on_small_stacks(tasks, out, in_, seed, merger):
    task_vectors = np.random.default_rng(seed).standard_normal((tasks, out, in_))
    expected = knots_of_model({"w": (LINEAR, task_vectors)}, 2.0**-52, **merger)
    # A gap between singular values may be small by chance, and turns the basis by rounding over the gap.
    assert_close(merge(task_vectors, **merger).tensor, expected["w"], 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("merger", "density_scope", "weight_by_sigma"),
    [
        (MERGERS[0], "model", True),
        (MERGERS[0], "model", False),
        (MERGERS[0], "tensor", True),
        (MERGERS[1], "model", False),
        (MERGERS[3], "model", True),
        (MERGERS[5], "model", True),
        (MERGERS[5], "tensor", False),
    ],
)
def test_model_equals_the_formula_on_the_whole_model(merger, density_scope, weight_by_sigma, dtype, tolerance):
    rng, names, weights = np.random.default_rng(9), ("model 1", "model 2", "model 3"), [1.0, 0.5, 2.0]
    stacks = {name: torch.from_numpy(rng.standard_normal((3, *shape))).to(dtype) for name, (_, shape) in MODEL.items()}
    base = {name: torch.zeros(shape, dtype=dtype) for name, (_, shape) in MODEL.items()}
    tuned = [{name: stack[task] for name, stack in stacks.items()} for task in range(3)]
    options = {**merger, "weight_by_sigma": weight_by_sigma, "density_scope": density_scope, "scaling_factor": 0.6}
    kinds = {name: kind for name, (kind, _) in MODEL.items()}
    merged = merge_tensors(base, tuned, "knots", kinds=kinds, weights=weights, **options)
    model = {name: (kinds[name], stack.double().numpy()) for name, stack in stacks.items() if name != "d"}
    # Experts are merged as if each were stored by itself.
    model |= {f"d#{expert}": (LINEAR, stacks["d"][:, expert].double().numpy()) for expert in range(2)}
    expected = knots_of_model(
        model, torch.finfo(dtype).eps, weights=weights, keeps=keeps_of(names, **options), **options
    )
    merged |= {f"d#{expert}": merged["d"][expert] for expert in range(2)}
    for name, result in expected.items():
        assert_close(merged[name], result, tolerance)


def test_defaults_are_those_of_the_authors():
    options = KnotsOptions()
    assert (options.merger, options.density, options.scaling_factor) == ("ties", 0.2, 0.6)
    assert (options.density_scope, options.dare_density, options.weight_by_sigma) == ("model", 0.9, True)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (7, 7)])
def test_worked_example_shared_basis_is_orthonormal_and_returns_each_task(shape):
    """One task among zeros, untrimmed: its own column block U diag(s) W_i."""
    task_vectors = random_stack(3, *shape)
    u, s = basis_of(task_vectors.numpy(), 2.0**-52)
    assert_close(u.T @ u, np.eye(len(s)), 1e-14)
    for weights, task_vector in zip(np.eye(3).tolist(), task_vectors, strict=True):
        assert_close(merge(task_vectors, weights=weights, density=1.0).tensor, task_vector, 1e-13)


@pytest.mark.parametrize("weight_by_sigma", [True, False])
@pytest.mark.parametrize("weights", [None, [0.5, -1.0, 2.0, 1.0]])
def test_worked_example_linear_merger_is_task_arithmetic(weights, weight_by_sigma):
    task_vectors = low_rank_stack(4, 10, 2, 7)
    merged = merge(task_vectors, weights=weights, merger="task_arithmetic", weight_by_sigma=weight_by_sigma)
    assert_close(merged.tensor, np.tensordot(weights or [1.0] * 4, task_vectors.numpy(), 1), 1e-13)
    assert merged.stats["rank"] == 8


@pytest.mark.parametrize("weight_by_sigma", [True, False])
def test_worked_example_one_task_untrimmed_comes_back(weight_by_sigma):
    task_vector = random_stack(1, 8, 6)
    assert_close(merge(task_vector, density=1.0, weight_by_sigma=weight_by_sigma).tensor, task_vector[0], 1e-13)


def test_worked_example_strength_decides_what_is_trimmed():
    """The strengths are 5 and 1; without them the aligned rows are (.8, .6, 0) and (0, 0, 1). Two entries stay."""
    task_vector = torch.tensor([[[4.0, 3.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    assert_close(merge(task_vector, density=0.4).tensor, [[4, 3, 0], [0, 0, 0]], 1e-14)
    assert_close(merge(task_vector, density=0.4, weight_by_sigma=False).tensor, [[4, 0, 0], [0, 0, 1]], 1e-14)
    both = [merge(low_rank_stack(3, 6, 2, 5), density=1.0, weight_by_sigma=given).tensor for given in (True, False)]
    assert_close(*both, 1e-12)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_worked_example_order_of_the_tasks_and_signs_of_the_basis_change_nothing(density):
    """Permuting the tasks permutes the columns, and mirroring the outputs turns the basis with them."""
    task_vectors, mirror = random_stack(3, 7, 5), torch.tensor([1, -1, 1, 1, -1, -1, 1]).double()[:, None]
    merged = merge(task_vectors, density=density).tensor
    assert_close(merge(task_vectors[[2, 0, 1]], density=density).tensor, merged, 1e-12)
    assert_close(mirror * merge(mirror * task_vectors, density=density).tensor, merged, 1e-12)


def test_breaks_nothing_but_with_a_linear_merger_identical_tasks_add_up():
    task_vector = random_stack(1, 6, 5)
    assert_close(merge(task_vector.expand(3, 6, 5), density=1.0).tensor, task_vector[0], 1e-13)
    assert_close(merge(task_vector.expand(3, 6, 5), merger="task_arithmetic").tensor, 3 * task_vector[0], 1e-13)


@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize(("kind", "shape"), [*TENSORS, (LINEAR, (0, 3)), (LINEAR, (3, 0)), (NORM, (0,))])
def test_degenerate_task_vectors_of_zeros_leave_the_base(kind, shape, merger):
    merged = merge(torch.zeros(3, *shape), kind, **merger).tensor
    assert merged.shape == shape
    assert not merged.any()


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_degenerate_task_of_zeros_changes_nothing(density):
    task_vectors = low_rank_stack(2, 9, 2, 6)
    with_zeros = torch.cat([task_vectors[:1], torch.zeros(1, 9, 6, dtype=torch.float64), task_vectors[1:]])
    assert_close(merge(with_zeros, density=density).tensor, merge(task_vectors, density=density).tensor, 1e-12)


@pytest.mark.parametrize("weight_by_sigma", [True, False])
def test_degenerate_opposite_tasks_cancel_and_leave_the_rest(weight_by_sigma):
    """Rounding may leave something of a sum that cancels: no more of the entries than they were made of."""
    task_vectors = low_rank_stack(2, 9, 2, 6)
    opposite = torch.stack([task_vectors[0], -task_vectors[0]])
    merged = merge(opposite, density=1.0, weight_by_sigma=weight_by_sigma).tensor
    assert not merged.any()


@pytest.mark.parametrize("density", [0.001, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (3, 2)])
def test_degenerate_more_tasks_than_directions_keep_something(shape, density):
    merged = merge(random_stack(7, *shape), density=density).tensor
    assert merged.isfinite().all()
    assert merged.any()


def test_degenerate_repeated_low_rank_tasks_have_no_arbitrary_directions():
    task_vectors = low_rank_stack(2, 150, 2, 20)
    repeated = torch.cat([task_vectors, task_vectors])
    found = merge(repeated, density=0.3)
    assert found.stats["rank"] == 4
    assert_close(found.tensor, merge(task_vectors, density=0.3).tensor, 1e-12)
    assert merge(repeated.float()).stats["rank"] == 4


def test_degenerate_updates_mostly_rounded_away_in_bfloat16_equal_the_formula():
    base = random_stack(1, 30, 20).bfloat16()
    tuned = base + (3e-3 * random_stack(3, 30, 20, seed=7)).bfloat16()
    task_vectors = tuned.double() - base.double()
    assert (task_vectors == 0).double().mean() > 0.3
    expected = knots_of_model({"w": (LINEAR, task_vectors.numpy())}, 2.0**-52)["w"]
    assert_close(merge(task_vectors).tensor, expected, 1e-12)
