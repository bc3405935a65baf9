"""TSV-Merge: leading triplets of every task, vectors made orthonormal (Gargiulo et al. 2024, arXiv:2412.00081).

Where vectors coincide, or lack rank, the polar factor of smallest norm is meant: it depends on no arbitrary direction.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.kinds import Kind
from superpose.methods.tsv import TsvOptions, tsv

# Singular vectors of several tasks, side by side, are nearly dependent where they fill the space: the polar factor
# amplifies the rounding of each vector by one over the smallest singular value.
DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
LINEAR, CONV, NORM = Kind.LINEAR, Kind.CONV, Kind.NORM
TENSORS = [
    (LINEAR, (9, 7)), (LINEAR, (30, 8)), (LINEAR, (8, 30)), (LINEAR, (12, 12)), (LINEAR, (150, 20)),
    (LINEAR, (20, 150)), (LINEAR, (1, 5)), (LINEAR, (1, 1)), (LINEAR, (3, 10, 6)), (Kind.EMBEDDING, (40, 6)),
    (Kind.HEAD, (5, 9)), (Kind.EMBEDDING, (7,)), (CONV, (6, 3, 2, 2)), (NORM, (9,)), (Kind.BIAS, (1,)),
    (Kind.SCALAR, ()),
]  # fmt: skip


def is_decomposed(kind, stack):
    return (stack.ndim == 3 and kind in (LINEAR, Kind.EMBEDDING, Kind.HEAD)) or (stack.ndim == 4 and kind is LINEAR)


def leading(matrix, count, eps):
    """Return the leading triplets of numerical rank, at most `count`."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    count = min(count, int((s > max(matrix.shape) * eps * s[0]).sum()))
    return u[:, :count], s[:count], vh[:count]


def polar_of(matrix, eps):
    """Return the polar factor of smallest norm: what rounding leaves of coinciding vectors counts as nothing."""
    p, s, qh = np.linalg.svd(matrix, full_matrices=False)
    kept = s > 8 * max(eps, 1e-14) * s.max(initial=0.0)
    return p[:, kept] @ qh[kept]


def tsv_of_matrices(matrices, eps):
    count = min(matrices.shape[1:]) // len(matrices)
    if count == 0:
        return matrices.mean(axis=0)
    if len(matrices) == 1:
        return matrices[0]
    us, ss, vhs = zip(*[leading(matrix, count, eps) for matrix in matrices], strict=True)
    left, right = polar_of(np.concatenate(us, axis=1), eps), polar_of(np.concatenate(vhs).T, eps)
    return left * np.concatenate(ss) @ right.T


def tsv_by_svd(stack, kind, eps):
    if not is_decomposed(kind, stack):
        return stack.mean(axis=0)
    if stack.ndim == 4:
        return np.stack([tsv_of_matrices(stack[:, expert], eps) for expert in range(stack.shape[1])])
    return tsv_of_matrices(stack, eps)


def merge(task_vectors, kind=LINEAR, scaling_factor=1.0):
    return tsv(torch.as_tensor(task_vectors), TsvOptions(scaling_factor=scaling_factor), kind=kind)


def random_stack(tasks, *shape, dtype=torch.float64, seed=4):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def low_rank_stack(tasks, out, rank, in_):
    return random_stack(tasks, out, rank) @ random_stack(tasks, rank, in_, seed=5)


def assert_close(actual, expected, tolerance):
    actual, expected = (np.asarray(values, float) for values in (actual, expected))
    assert actual.shape == expected.shape
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("kind", "shape"), TENSORS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_the_formula(tasks, kind, shape, dtype, tolerance):
    task_vectors = random_stack(tasks, *shape, dtype=dtype)
    merged = merge(task_vectors, kind, 0.7).tensor
    assert merged.dtype == dtype
    expected = tsv_by_svd(task_vectors.double().numpy(), kind, torch.finfo(dtype).eps)
    assert_close(merged, 0.7 * expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("out", "in_"), [(40, 30), (150, 24), (24, 150)])
def test_equals_the_formula_for_low_rank_updates(out, in_, dtype, tolerance):
    """Rank 2 of up to 8 triplets each: the polar factors run over 6 vectors alone."""
    task_vectors = low_rank_stack(3, out, 2, in_).to(dtype)
    found = merge(task_vectors)
    assert found.stats == {"triplets": 6, "rank": 6}
    assert_close(found.tensor, tsv_by_svd(task_vectors.double().numpy(), LINEAR, torch.finfo(dtype).eps), tolerance)


# The same examples every time: of all stacks there are, some are as ill-conditioned as one likes.
@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32))
def test_equals_the_formula_on_small_stacks(tasks, out, in_, seed):
    task_vectors = np.random.default_rng(seed).standard_normal((tasks, out, in_))
    assert_close(merge(task_vectors).tensor, tsv_by_svd(task_vectors, LINEAR, 2.0**-52), 1e-9)


def test_defaults_are_those_of_the_paper():
    assert TsvOptions().scaling_factor == 1.0


def test_worked_example_one_task_comes_back():
    task_vector = random_stack(1, 9, 7)
    assert torch.equal(merge(task_vector).tensor, task_vector[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("out", "in_"), [(20, 15), (15, 20), (140, 30)])
def test_worked_example_tasks_in_orthogonal_spaces_are_added_up(out, in_, dtype, tolerance):
    left = torch.linalg.qr(random_stack(1, out, in_)[0]).Q[:, :12]
    right = torch.linalg.qr(random_stack(1, in_, in_)[0]).Q[:, :12]
    blocks = [slice(0, 4), slice(4, 8), slice(8, 12)]
    task_vectors = torch.stack([left[:, block] @ random_stack(1, 4, 4)[0] @ right[:, block].T for block in blocks])
    merged = merge(task_vectors.to(dtype)).tensor
    assert_close(merged, task_vectors.sum(dim=0), tolerance)


def test_worked_example_kernels_norms_and_vectors_are_averaged():
    for kind, shape in [(CONV, (4, 3, 2, 2)), (NORM, (5,)), (Kind.EMBEDDING, (6,))]:
        task_vectors = random_stack(3, *shape)
        assert_close(merge(task_vectors, kind, 0.5).tensor, 0.5 * task_vectors.mean(dim=0), 1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(12, 9), (150, 12)])
def test_breaks_same_identical_tasks_give_their_leading_triplets(shape, dtype, tolerance):
    task_vector = random_stack(1, *shape, dtype=dtype)
    u, s, vh = leading(task_vector[0].double().numpy(), min(shape) // 3, 1e-16)
    assert_close(merge(task_vector.expand(3, *shape)).tensor, (u * s) @ vh, tolerance)


def test_breaks_same_not_for_what_is_averaged():
    for kind, shape in [(CONV, (4, 3, 2, 2)), (NORM, (5,))]:
        task_vector = random_stack(1, *shape)
        assert_close(merge(task_vector.expand(3, *shape), kind).tensor, task_vector[0], 1e-14)


def test_breaks_zero_one_task_more_leaves_fewer_triplets_to_each():
    task_vectors = torch.cat([random_stack(1, 8, 6), torch.zeros(1, 8, 6, dtype=torch.float64)])
    u, s, vh = leading(task_vectors[0].numpy(), 3, 1e-16)
    assert_close(merge(task_vectors).tensor, (u * s) @ vh, 1e-12)
    norms = random_stack(3, 5)
    with_zeros = torch.cat([norms, torch.zeros(1, 5, dtype=torch.float64)])
    assert_close(merge(with_zeros, NORM).tensor, 3 / 4 * norms.mean(dim=0), 1e-14)


def test_breaks_zero_not_for_updates_of_low_rank():
    task_vectors = low_rank_stack(2, 12, 2, 9)
    with_zeros = torch.cat([task_vectors, torch.zeros(1, 12, 9, dtype=torch.float64)])
    assert_close(merge(with_zeros).tensor, merge(task_vectors).tensor, 1e-12)


def test_degenerate_opposite_tasks_cancel():
    task_vector = random_stack(1, 9, 8)
    merged = merge(torch.cat([task_vector, -task_vector])).tensor
    assert merged.abs().max() <= 1e-13 * task_vector.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_constant_rows_have_one_triplet(dtype):
    task_vectors = torch.ones(2, 6, 4, dtype=dtype) * torch.tensor([1.0, 3.0], dtype=dtype).reshape(2, 1, 1)
    found = merge(task_vectors)
    assert found.stats == {"triplets": 2, "rank": 1}
    assert_close(found.tensor, np.full((6, 4), 2.0), 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(("kind", "shape"), [*TENSORS, (LINEAR, (0, 3)), (LINEAR, (3, 0)), (NORM, (0,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_task_vectors_of_zeros_leave_the_base(dtype, kind, shape):
    merged = merge(torch.zeros(3, *shape, dtype=dtype), kind).tensor
    assert merged.shape == shape
    assert not merged.any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (3, 2)])
def test_degenerate_more_tasks_than_directions_keep_something(shape):
    task_vectors = random_stack(7, *shape)
    merged = merge(task_vectors).tensor
    assert merged.any()
    assert_close(merged, tsv_by_svd(task_vectors.numpy(), LINEAR, 2.0**-52), 1e-10)


def test_degenerate_updates_mostly_rounded_away_in_bfloat16_equal_the_formula():
    base = random_stack(1, 30, 20).bfloat16()
    tuned = base + (3e-3 * random_stack(3, 30, 20, seed=7)).bfloat16()
    task_vectors = tuned.double() - base.double()
    assert (task_vectors == 0).double().mean() > 0.3
    assert_close(merge(task_vectors).tensor, tsv_by_svd(task_vectors.numpy(), LINEAR, 2.0**-52), 1e-10)


def test_model_in_memory_is_merged_tensor_by_tensor():
    shapes = {"w": (9, 6), "experts": (2, 6, 5), "norm": (4,), "conv": (3, 2, 2, 2)}
    kinds = {"w": LINEAR, "experts": LINEAR, "norm": NORM, "conv": CONV}
    stacks = {name: random_stack(3, *shape) for name, shape in shapes.items()}
    tuned = [{name: stack[task] for name, stack in stacks.items()} for task in range(3)]
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    merged = merge_tensors(base, tuned, "tsv", kinds=kinds, scaling_factor=0.5)
    for name, stack in stacks.items():
        assert_close(merged[name], 0.5 * tsv_by_svd(stack.numpy(), kinds[name], 2.0**-52), 1e-10)


def test_order_of_the_tasks_does_not_matter():
    task_vectors = random_stack(3, 9, 8)
    assert_close(merge(task_vectors[[2, 0, 1]]).tensor, merge(task_vectors).tensor, 1e-12)


def test_kernels_that_mix_channels_can_be_matrices():
    kernels, depthwise = random_stack(3, 6, 4, 2, 2), random_stack(3, 6, 1, 2, 2)
    options = TsvOptions(convolutions="matrix")
    as_matrices = tsv(kernels.reshape(3, 6, 16), TsvOptions(), kind=LINEAR).tensor
    assert torch.equal(tsv(kernels, options, kind=CONV).tensor, as_matrices.reshape(6, 4, 2, 2))
    assert_close(tsv(depthwise, options, kind=CONV).tensor, depthwise.mean(dim=0), 1e-14)
    assert_close(tsv(kernels, TsvOptions(), kind=CONV).tensor, kernels.mean(dim=0), 1e-14)
