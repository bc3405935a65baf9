"""Iso-Share: directions shared out among the tasks, a flat spectrum, the tasks' own strength (docs/iso-share.md)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.kinds import Kind
from superpose.maths.low_rank import LowRank
from superpose.maths.side_by_side import Crew
from superpose.methods.iso_share import AVERAGED, IsoShareOptions, _in_factors, iso_share

# The factor of a polar decomposition is as exact as the weakest direction of what is decomposed.
DTYPES = [(torch.float32, 3e-4), (torch.float64, 1e-10)]
LINEAR, CONV, NORM = Kind.LINEAR, Kind.CONV, Kind.NORM
MATRICES = [
    (LINEAR, (9, 7)), (LINEAR, (30, 8)), (LINEAR, (8, 30)), (LINEAR, (12, 12)), (LINEAR, (150, 20)), (LINEAR, (1, 5)),
    (LINEAR, (1, 1)), (LINEAR, (3, 10, 6)), (CONV, (6, 3, 2, 2)), (CONV, (6, 3, 1, 1)),
]  # fmt: skip
OTHERS = [(NORM, (9,)), (Kind.BIAS, (1,)), (Kind.SCALAR, ()), (Kind.EMBEDDING, (40, 6)), (Kind.HEAD, (5, 9)),
          (CONV, (6, 1, 3, 3))]  # fmt: skip


def by_the_formula(stack, background=0.3, eps=2.0**-52):
    """The docstring's lines, with inverses and whole matrices."""
    left, right, weighted, squares = 0, 0, 0, 0.0
    out, in_ = stack.shape[1:]
    features = []
    for matrix in stack:
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        kept = s > max(out, in_) * eps * s.max(initial=0)
        u, s, vh = u[:, kept], s[kept], vh[kept]
        if not len(s):
            continue
        features.append((u, s, vh))
        of_left = u @ np.diag(s / s.mean()) @ u.T + background * np.eye(out)
        of_right = vh.T @ np.diag(s / s.mean()) @ vh + background * np.eye(in_)
        left, right, weighted = left + of_left, right + of_right, weighted + of_left @ matrix @ of_right
        squares += (s**2).sum()
    if not features:
        return np.zeros((out, in_))
    shared = np.linalg.inv(left) @ weighted @ np.linalg.inv(right)
    u, s, vh = np.linalg.svd(shared, full_matrices=False)
    kept = s > max(out, in_) * eps * s[0]
    flat = u[:, kept] @ vh[kept]
    answered = sum(abs(s[k] * (u[:, k] @ flat @ vh[k])) for u, s, vh in features for k in range(len(s)))
    return min(squares / answered, max(s[0] for _, s, _ in features)) * flat


def maps_by_the_formula(stack, kind, **more):
    if kind is LINEAR and stack.ndim == 4:
        return np.stack([by_the_formula(stack[:, number], **more) for number in range(stack.shape[1])])
    return by_the_formula(stack.reshape(len(stack), stack.shape[1], -1), **more).reshape(stack.shape[1:])


def merge(task_vectors, kind=LINEAR, scaling_factor=1.0, **options):
    return iso_share(
        torch.as_tensor(task_vectors), IsoShareOptions(scaling_factor=scaling_factor, **options), kind=kind
    )


def random_stack(tasks, *shape, dtype=torch.float64, seed=4):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, tolerance):
    actual, expected = (np.asarray(values, float) for values in (actual, expected))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * float(np.abs(expected).max(initial=0.0)))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("kind", "shape"), MATRICES)
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_equals_the_formula(tasks, kind, shape, dtype, tolerance):
    task_vectors = random_stack(tasks, *shape, dtype=dtype)
    found = merge(task_vectors, kind, scaling_factor=0.7, background=0.3).tensor
    assert found.dtype == dtype
    expected = maps_by_the_formula(task_vectors.double().numpy(), kind, background=0.3, eps=torch.finfo(dtype).eps)
    assert_close(found, 0.7 * expected, tolerance)


@pytest.mark.parametrize(("kind", "shape"), OTHERS)
def test_what_is_no_matrix_is_averaged(kind, shape):
    task_vectors = random_stack(3, *shape)
    assert_close(merge(task_vectors, kind, scaling_factor=0.5).tensor, 0.5 * task_vectors.mean(dim=0), 1e-14)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32))
def test_equals_the_formula_on_small_stacks(tasks, out, in_, seed):
    task_vectors = np.random.default_rng(seed).standard_normal((tasks, out, in_))
    assert_close(merge(task_vectors).tensor, by_the_formula(task_vectors), 1e-6)


def test_defaults_are_those_that_were_chosen():
    assert IsoShareOptions() == IsoShareOptions(scaling_factor=0.85, background=0.3)


def test_worked_example_diagonal():
    """diag(3, 1): the squares are 10, the answers 3 + 1, so that the strength is 10 / 4."""
    found = merge(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))[None])
    assert_close(found.tensor, np.diag([2.5, 2.5]), 1e-14)
    assert found.stats["rank"] == 2
    assert found.stats["singular_value"] == pytest.approx(2.5)


def test_worked_example_two_tasks_with_directions_of_their_own():
    """diag(3, 1, 0, 0) and diag(0, 0, 2, 2): nothing is shared, and the strength is (10 + 8) / (4 + 4)."""
    tasks = torch.stack([torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([3.0, 1, 0, 0], [0.0, 0, 2, 2])])
    assert_close(merge(tasks).tensor, np.diag([2.25] * 4), 1e-12)


def test_worked_example_a_shared_direction_goes_to_the_task_that_uses_it_more():
    """One output direction, two inputs: with no background to speak of the merged row is the tasks' weighted mean."""
    tasks = torch.zeros(2, 2, 2, dtype=torch.float64)
    tasks[0] = torch.diag(torch.tensor([9.0, 1.0]))
    tasks[1, 0, 1], tasks[1, 1, 0] = 1.0, 9.0  # the same outputs and inputs, crossed
    merged = merge(tasks, background=1e-6).tensor
    assert_close(merged, by_the_formula(tasks.numpy(), background=1e-6), 1e-9)
    assert merged[0, 0] > merged[0, 1]
    assert merged[1, 0] > merged[1, 1]


def test_the_tasks_features_are_answered_as_they_were_on_the_average():
    task_vectors = random_stack(4, 80, 3) @ random_stack(4, 3, 60, seed=5)
    merged = merge(task_vectors).tensor
    squares = answers = 0.0
    for matrix in task_vectors:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, vh = u[:, :3], s[:3], vh[:3]
        squares += float((s**2).sum())
        answers += float((s * torch.einsum("ok,oi,ki->k", u, merged, vh).abs()).sum())
    assert answers == pytest.approx(squares)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 2**32))
def test_rotations_and_transposition_carry_over(seed):
    generator = np.random.default_rng(seed)
    tasks = generator.standard_normal((3, 6, 5))
    first, second = (np.linalg.qr(generator.standard_normal((size, size)))[0] for size in (6, 5))
    merged = merge(tasks).tensor.numpy()
    assert_close(merge(first @ tasks @ second).tensor, first @ merged @ second, 1e-6)
    assert_close(merge(tasks.transpose(0, 2, 1)).tensor, merged.T, 1e-6)
    assert_close(merge(-2.5 * tasks).tensor, -2.5 * merged, 1e-6)
    assert_close(merge(tasks[[2, 0, 1]]).tensor, merged, 1e-6)


@pytest.mark.parametrize(("out", "in_"), [(40, 30), (24, 150), (7, 5)])
def test_factors_give_what_matrices_do(out, in_):
    lefts, rights = random_stack(3, out, 3), random_stack(3, 3, in_, seed=5)
    tasks = [LowRank(left, right) for left, right in zip(lefts, rights, strict=True)]
    found = _in_factors(tasks, IsoShareOptions(scaling_factor=0.6), LINEAR)
    dense = merge(lefts @ rights, scaling_factor=0.6)
    assert_close(found.update.matrix(), dense.tensor, 1e-8)
    assert found.stats["rank"] == dense.stats["rank"]


def test_breaks_single_the_task_is_made_isotropic():
    task_vector = random_stack(1, 8, 5)
    u, s, vh = np.linalg.svd(task_vector[0].numpy(), full_matrices=False)
    assert_close(merge(task_vector).tensor, (s @ s) / s.sum() * u @ vh, 1e-12)


def test_breaks_same_identical_tasks_give_what_one_gives():
    task_vector = random_stack(1, 8, 5)
    assert_close(merge(task_vector.expand(3, 8, 5)).tensor, merge(task_vector).tensor, 1e-10)


def test_breaks_zero_what_is_averaged_shrinks_and_matrices_do_not():
    for kind in sorted(AVERAGED - {Kind.BUFFER}):
        task_vectors = random_stack(3, 8)
        with_zeros = torch.cat([task_vectors, torch.zeros_like(task_vectors[:1])])
        assert_close(merge(with_zeros, kind).tensor, 3 / 4 * merge(task_vectors, kind).tensor, 1e-14)
    task_vectors = random_stack(3, 8, 5)
    with_zeros = torch.cat([task_vectors, torch.zeros_like(task_vectors[:1])])
    assert torch.equal(merge(with_zeros).tensor, merge(task_vectors).tensor)


@pytest.mark.parametrize("shape", [(9, 8), (60, 40), (384, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_opposite_tasks_cancel(dtype, shape):
    task_vector = random_stack(1, *shape).to(dtype)
    assert not merge(torch.cat([task_vector, -task_vector])).tensor.any()


def test_degenerate_tasks_that_nearly_contradict_each_other_stay_within_their_strength():
    task_vector = random_stack(1, 9, 8)
    other = -task_vector + 1e-9 * random_stack(1, 9, 8, seed=6)
    merged = merge(torch.cat([task_vector, other]))
    assert merged.stats["singular_value"] <= float(torch.linalg.svdvals(task_vector[0])[0]) * (1 + 1e-6)


@pytest.mark.parametrize(("kind", "shape"), [*MATRICES, *OTHERS, (LINEAR, (0, 3)), (LINEAR, (3, 0)), (NORM, (0,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_task_vectors_of_zeros_leave_the_base(dtype, kind, shape):
    merged = merge(torch.zeros(3, *shape, dtype=dtype), kind).tensor
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert not merged.any()


@pytest.mark.parametrize("shape", [(300, 140), (140, 300), (9, 7)])
def test_bytes_do_not_depend_on_helpers(shape):
    task_vectors = random_stack(5, *shape, dtype=torch.float32)
    alone = merge(task_vectors)
    crew = Crew(3)
    with crew.at_work():
        together = merge(task_vectors)
    crew.close()
    assert torch.equal(together.tensor, alone.tensor)
    assert together.stats == alone.stats


def test_model_in_memory_is_merged_tensor_by_tensor():
    shapes = {"w": (9, 6), "experts": (2, 6, 5), "norm": (4,), "conv": (3, 2, 2, 2)}
    kinds = {"w": LINEAR, "experts": LINEAR, "norm": NORM, "conv": CONV}
    stacks = {name: random_stack(3, *shape) for name, shape in shapes.items()}
    tuned = [{name: stack[task] for name, stack in stacks.items()} for task in range(3)]
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    merged = merge_tensors(base, tuned, "iso_share", kinds=kinds, scaling_factor=1.0)
    for name, stack in stacks.items():
        whole = stack.mean(dim=0).numpy() if name == "norm" else maps_by_the_formula(stack.numpy(), kinds[name])
        assert_close(merged[name], whole, 1e-9)
