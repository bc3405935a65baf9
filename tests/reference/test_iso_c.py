"""Iso-C: the summed task matrices with all singular values equal (Marczak et al. 2025, arXiv:2502.04959).

The mean and the directions are those of numerical rank: an arbitrary null direction gets nothing.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.kinds import Kind
from superpose.methods.iso_c import IsoCOptions, iso_c

# float32: a product of two rounded factors, whose entries are small beside the vectors' own.
DTYPES = [(torch.float32, 2e-6), (torch.float64, 1e-12)]
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


def isotropic(matrix, eps):
    u, s, vh = leading(matrix, min(matrix.shape), eps)
    return s.sum() / max(len(s), 1) * u @ vh


def iso_c_by_svd(stack, kind, eps):
    if not is_decomposed(kind, stack):
        return stack.mean(axis=0)
    total = stack.sum(axis=0)
    return np.stack([isotropic(matrix, eps) for matrix in total]) if total.ndim == 3 else isotropic(total, eps)


def merge(task_vectors, kind=LINEAR, scaling_factor=1.0):
    return iso_c(torch.as_tensor(task_vectors), IsoCOptions(scaling_factor=scaling_factor), kind=kind)


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
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_equals_the_formula(tasks, kind, shape, dtype, tolerance):
    task_vectors = random_stack(tasks, *shape, dtype=dtype)
    merged = merge(task_vectors, kind, 0.7).tensor
    assert merged.dtype == dtype
    # The sum is formed in the dtype of the tensors, and its rounding is the input of the decomposition.
    summed = task_vectors.sum(dim=0, keepdim=True) if is_decomposed(kind, task_vectors) else task_vectors
    expected = iso_c_by_svd(summed.double().numpy(), kind, torch.finfo(dtype).eps)
    assert_close(merged, 0.7 * expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("out", "in_"), [(40, 30), (150, 24), (24, 150)])
def test_equals_the_formula_for_low_rank_updates(out, in_, dtype, tolerance):
    task_vectors = low_rank_stack(1, out, 6, in_).to(dtype)
    found = merge(task_vectors)
    assert found.stats["rank"] == 6
    # Rounding each entry gives the other directions what lies below the cut.
    expected = iso_c_by_svd(task_vectors.double().numpy(), LINEAR, torch.finfo(dtype).eps)
    assert_close(found.tensor, expected, tolerance)


# The same examples every time: of all stacks there are, some are as ill-conditioned as one likes.
@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32))
def test_equals_the_formula_on_small_stacks(tasks, out, in_, seed):
    task_vectors = np.random.default_rng(seed).standard_normal((tasks, out, in_))
    # A nearly singular sum amplifies the rounding of its own addition.
    assert_close(merge(task_vectors).tensor, iso_c_by_svd(task_vectors, LINEAR, 2.0**-52), 1e-10)


def test_defaults_are_those_of_the_paper():
    assert IsoCOptions().scaling_factor == 1.0


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (150, 20)])
def test_worked_example_singular_values_are_equal_and_the_nuclear_norm_preserved(shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    summed = np.linalg.svd(task_vectors.sum(dim=0).double().numpy(), compute_uv=False)
    merged = np.linalg.svd(merge(task_vectors).tensor.double().numpy(), compute_uv=False)
    assert_close(merged, np.full(min(shape), summed.mean()), tolerance)
    assert merged.sum() == pytest.approx(summed.sum(), rel=tolerance)


def test_worked_example_diagonal():
    merged = merge(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))[None])
    assert_close(merged.tensor, np.diag([2.0, 2.0]), 1e-15)
    assert merged.stats == {"rank": 2, "singular_value": 2.0}


def test_worked_example_kernels_norms_and_vectors_are_averaged():
    for kind, shape in [(CONV, (4, 3, 2, 2)), (NORM, (5,)), (Kind.EMBEDDING, (6,))]:
        task_vectors = random_stack(3, *shape)
        assert_close(merge(task_vectors, kind, 0.5).tensor, 0.5 * task_vectors.mean(dim=0), 1e-14)


@pytest.mark.parametrize("kind", [LINEAR, Kind.EMBEDDING, Kind.HEAD])
def test_breaks_single_the_task_is_made_isotropic(kind):
    task_vector = random_stack(1, 8, 5)
    assert_close(merge(task_vector, kind).tensor, isotropic(task_vector[0].numpy(), 2.0**-52), 1e-12)


@pytest.mark.parametrize("law", ["single", "same"])
def test_breaks_single_and_same_not_for_what_is_averaged(law):
    for kind, shape in [(CONV, (4, 3, 2, 2)), (NORM, (5,)), (Kind.SCALAR, ())]:
        task_vector = random_stack(1, *shape)
        tasks = task_vector.expand(3, *shape) if law == "same" else task_vector
        assert_close(merge(tasks, kind).tensor, task_vector[0], 1e-14)


def test_breaks_same_identical_tasks_give_t_times_the_task_made_isotropic():
    task_vector = random_stack(1, 8, 5)
    expected = 3 * isotropic(task_vector[0].numpy(), 2.0**-52)
    assert_close(merge(task_vector.expand(3, 8, 5)).tensor, expected, 1e-12)


def test_breaks_zero_what_is_averaged_shrinks():
    for kind, shape in [(CONV, (4, 3, 2, 2)), (NORM, (5,))]:
        task_vectors = random_stack(3, *shape)
        with_zeros = torch.cat([task_vectors, torch.zeros_like(task_vectors[:1])])
        assert_close(merge(with_zeros, kind).tensor, 3 / 4 * merge(task_vectors, kind).tensor, 1e-14)


@pytest.mark.parametrize("kind", [LINEAR, Kind.EMBEDDING, Kind.HEAD])
def test_breaks_zero_not_for_matrices(kind):
    task_vectors = random_stack(3, 8, 5)
    with_zeros = torch.cat([task_vectors, torch.zeros_like(task_vectors[:1])])
    assert_close(merge(with_zeros, kind).tensor, merge(task_vectors, kind).tensor, 1e-13)


def test_degenerate_opposite_tasks_cancel():
    task_vector = random_stack(1, 9, 8)
    assert not merge(torch.cat([task_vector, -task_vector])).tensor.any()


def test_degenerate_constant_rows_come_back():
    """Of rank one there is one singular value, and it is the mean."""
    assert_close(merge(torch.full((2, 6, 4), -1.5)).tensor, np.full((6, 4), -3.0), 1e-6)


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
    assert_close(merged, iso_c_by_svd(task_vectors.numpy(), LINEAR, 2.0**-52), 1e-10)


def test_degenerate_updates_mostly_rounded_away_in_bfloat16_equal_the_formula():
    base = random_stack(1, 30, 20).bfloat16()
    tuned = base + (3e-3 * random_stack(3, 30, 20, seed=7)).bfloat16()
    task_vectors = tuned.double() - base.double()
    assert (task_vectors == 0).double().mean() > 0.3
    assert_close(merge(task_vectors).tensor, iso_c_by_svd(task_vectors.numpy(), LINEAR, 2.0**-52), 1e-10)


def test_model_in_memory_is_merged_tensor_by_tensor():
    shapes = {"w": (9, 6), "experts": (2, 6, 5), "norm": (4,), "conv": (3, 2, 2, 2)}
    kinds = {"w": LINEAR, "experts": LINEAR, "norm": NORM, "conv": CONV}
    stacks = {name: random_stack(3, *shape) for name, shape in shapes.items()}
    tuned = [{name: stack[task] for name, stack in stacks.items()} for task in range(3)]
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    merged = merge_tensors(base, tuned, "iso_c", kinds=kinds, scaling_factor=0.5)
    for name, stack in stacks.items():
        assert_close(merged[name], 0.5 * iso_c_by_svd(stack.numpy(), kinds[name], 2.0**-52), 1e-10)


def test_order_of_the_tasks_does_not_matter():
    task_vectors = random_stack(3, 9, 8)
    assert_close(merge(task_vectors[[2, 0, 1]]).tensor, merge(task_vectors).tensor, 1e-12)


def test_kernels_that_mix_channels_can_be_matrices():
    kernels, depthwise = random_stack(3, 6, 4, 2, 2), random_stack(3, 6, 1, 2, 2)
    options = IsoCOptions(convolutions="matrix")
    as_matrices = iso_c(kernels.reshape(3, 6, 16), IsoCOptions(), kind=LINEAR).tensor
    assert torch.equal(iso_c(kernels, options, kind=CONV).tensor, as_matrices.reshape(6, 4, 2, 2))
    assert_close(iso_c(depthwise, options, kind=CONV).tensor, depthwise.mean(dim=0), 1e-14)
    assert_close(iso_c(kernels, IsoCOptions(), kind=CONV).tensor, kernels.mean(dim=0), 1e-14)
