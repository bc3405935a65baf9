"""Iso-CTS: common directions of the sum and each task's own, isotropic (Marczak et al. 2025, arXiv:2502.04959).

Directions are those of numerical rank; where they coincide, the polar factor of smallest norm is meant.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.kinds import Kind
from superpose.methods.iso_c import IsoCOptions, iso_c
from superpose.methods.iso_cts import IsoCtsOptions, iso_cts

# Own and common vectors, side by side, are nearly dependent where they fill the space: the polar factor amplifies the
# rounding of each vector by one over the smallest singular value.
DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
LINEAR, CONV, NORM = Kind.LINEAR, Kind.CONV, Kind.NORM
TENSORS = [
    (LINEAR, (9, 7)), (LINEAR, (30, 8)), (LINEAR, (8, 30)), (LINEAR, (12, 12)), (LINEAR, (150, 20)),
    (LINEAR, (20, 150)), (LINEAR, (1, 5)), (LINEAR, (1, 1)), (LINEAR, (3, 10, 6)), (Kind.EMBEDDING, (40, 6)),
    (Kind.HEAD, (5, 9)), (Kind.EMBEDDING, (7,)), (CONV, (6, 3, 2, 2)), (NORM, (9,)), (Kind.BIAS, (1,)),
    (Kind.SCALAR, ()),
]  # fmt: skip
FRACTIONS = [0.0, 0.29, 0.5, 0.8, 1.0]


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


def shares_of(directions, tasks, fraction):
    """Return how many directions are common and how many each task has of its own; together they are all."""
    rest = directions - int(Fraction(str(fraction)) * directions)
    own = round(Fraction(rest, tasks))
    own = own if own * tasks <= directions else own - 1
    return directions - own * tasks, own


def iso_cts_of_matrices(matrices, eps, fraction):
    common_count, own_count = shares_of(min(matrices.shape[1:]), len(matrices), fraction)
    common = leading(matrices.sum(axis=0), common_count, eps)
    parts = [common]
    for matrix in matrices:
        left_over = matrix - common[0] @ (common[0].T @ matrix)
        u, s, vh = leading(left_over, own_count, eps)
        count = int((s > max(matrix.shape) * eps * np.linalg.norm(matrix)).sum())
        parts.append((u[:, :count], s[:count], vh[:count]))
    us, ss, vhs = zip(*parts, strict=True)
    left, right = polar_of(np.concatenate(us, axis=1), eps), polar_of(np.concatenate(vhs).T, eps)
    s = np.concatenate(ss)
    return s.sum() / max(len(s), 1) * left @ right.T


def iso_cts_by_svd(stack, kind, eps, fraction=0.8):
    if not is_decomposed(kind, stack):
        return stack.mean(axis=0)
    if stack.ndim == 4:
        return np.stack([iso_cts_of_matrices(stack[:, expert], eps, fraction) for expert in range(stack.shape[1])])
    return iso_cts_of_matrices(stack, eps, fraction)


def merge(task_vectors, kind=LINEAR, **options):
    return iso_cts(torch.as_tensor(task_vectors), IsoCtsOptions(**options), kind=kind)


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
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_equals_the_formula(fraction, tasks, kind, shape, dtype, tolerance):
    task_vectors = random_stack(tasks, *shape, dtype=dtype)
    merged = merge(task_vectors, kind, scaling_factor=0.7, common_fraction=fraction).tensor
    assert merged.dtype == dtype
    expected = iso_cts_by_svd(task_vectors.double().numpy(), kind, torch.finfo(dtype).eps, fraction)
    assert_close(merged, 0.7 * expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("out", "in_"), [(40, 30), (150, 24), (24, 150)])
def test_equals_the_formula_for_low_rank_updates(out, in_, dtype, tolerance):
    """3 of the sum's 6 directions are common; two more of every task lie in the same 6 dimensions."""
    task_vectors = low_rank_stack(3, out, 2, in_).to(dtype)
    found = merge(task_vectors, common_fraction=0.1)
    assert found.stats == {"common": 3, "own": 6}
    expected = iso_cts_by_svd(task_vectors.double().numpy(), LINEAR, torch.finfo(dtype).eps, 0.1)
    assert_close(found.tensor, expected, tolerance)


# The same examples every time: of all stacks there are, some are as ill-conditioned as one likes.
@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32), st.sampled_from(FRACTIONS))
def test_equals_the_formula_on_small_stacks(tasks, out, in_, seed, fraction):
    task_vectors = np.random.default_rng(seed).standard_normal((tasks, out, in_))
    expected = iso_cts_by_svd(task_vectors, LINEAR, 2.0**-52, fraction)
    assert_close(merge(task_vectors, common_fraction=fraction).tensor, expected, 1e-9)


def test_defaults_are_those_of_the_paper():
    assert (IsoCtsOptions().scaling_factor, IsoCtsOptions().common_fraction) == (1.0, 0.8)


@pytest.mark.parametrize(
    ("directions", "tasks", "fraction", "common", "own"),
    [(10, 2, 0.8, 8, 1), (768, 8, 0.8, 616, 19), (100, 3, 0.29, 28, 24), (3, 8, 0.8, 3, 0), (4, 3, 0.0, 1, 1)],
)
def test_worked_example_directions_are_shared_out(directions, tasks, fraction, common, own):
    """Of 768, int(0.8 * 768) = 614 leave 154 to 8 tasks: 19 each, and 616 in common."""
    assert shares_of(directions, tasks, fraction) == (common, own)
    found = merge(random_stack(tasks, directions, directions), common_fraction=fraction) if directions < 200 else None
    assert found is None or found.stats == {"common": common, "own": tasks * own}


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (150, 20)])
def test_worked_example_all_singular_values_are_equal(shape, dtype, tolerance):
    merged = merge(random_stack(4, *shape, dtype=dtype)).tensor
    s = np.linalg.svd(merged.double().numpy(), compute_uv=False)
    assert_close(s, np.full(min(shape), s.mean()), tolerance)


def test_worked_example_everything_in_common_is_iso_c():
    task_vectors = random_stack(3, 12, 9)
    expected = iso_c(task_vectors, IsoCOptions(), kind=LINEAR).tensor
    assert_close(merge(task_vectors, common_fraction=1.0).tensor, expected, 1e-12)


def test_worked_example_kernels_norms_and_vectors_are_averaged():
    for kind, shape in [(CONV, (4, 3, 2, 2)), (NORM, (5,)), (Kind.EMBEDDING, (6,))]:
        task_vectors = random_stack(3, *shape)
        assert_close(merge(task_vectors, kind, scaling_factor=0.5).tensor, 0.5 * task_vectors.mean(dim=0), 1e-14)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_breaks_single_the_task_is_made_isotropic(fraction):
    diagonal = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))[None]
    assert_close(merge(diagonal, common_fraction=fraction).tensor, np.diag([2.0, 2.0]), 1e-14)
    task_vector = random_stack(1, 9, 6)
    expected = iso_c(task_vector, IsoCOptions(), kind=LINEAR).tensor
    assert_close(merge(task_vector, common_fraction=fraction).tensor, expected, 1e-11)


def test_breaks_same_own_directions_of_identical_tasks_are_one_and_count_each_time():
    """Of 10 directions 4 are common, with 3 times the strength; 2 come up in each of the 3 tasks."""
    task_vector = random_stack(1, 10, 12)
    u, s, vh = leading(task_vector[0].numpy(), 10, 1e-16)
    mean = (3 * s[:4].sum() + 3 * s[4:6].sum()) / 10
    merged = merge(task_vector.expand(3, 10, 12), common_fraction=0.4).tensor
    assert_close(merged, mean * u[:, :6] @ vh[:6], 1e-11)


@pytest.mark.parametrize("law", ["single", "same"])
def test_breaks_single_and_same_not_for_what_is_averaged(law):
    for kind, shape in [(CONV, (4, 3, 2, 2)), (NORM, (5,)), (Kind.SCALAR, ())]:
        task_vector = random_stack(1, *shape)
        tasks = task_vector.expand(3, *shape) if law == "same" else task_vector
        assert_close(merge(tasks, kind).tensor, task_vector[0], 1e-14)


def test_breaks_zero_one_task_more_leaves_fewer_directions_to_each():
    """Of 10 directions, int(0.4 * 10) = 4 leave 6: 3 to each of two tasks, 2 to each of three."""
    task_vectors = random_stack(2, 10, 12)
    with_zeros = torch.cat([task_vectors, torch.zeros_like(task_vectors[:1])])
    assert merge(task_vectors, common_fraction=0.4).stats == {"common": 4, "own": 6}
    assert merge(with_zeros, common_fraction=0.4).stats == {"common": 4, "own": 4}
    norms = random_stack(3, 5)
    with_zeros = torch.cat([norms, torch.zeros_like(norms[:1])])
    assert_close(merge(with_zeros, NORM).tensor, 3 / 4 * norms.mean(dim=0), 1e-14)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_degenerate_opposite_tasks_cancel(fraction):
    """Nothing is common, and of what both have of their own one side agrees and the other is opposite."""
    task_vector = random_stack(1, 9, 8)
    found = merge(torch.cat([task_vector, -task_vector]), common_fraction=fraction)
    assert found.stats["common"] == 0
    assert found.tensor.abs().max() <= 1e-13 * task_vector.abs().max()


def test_degenerate_low_rank_tasks_of_common_directions_have_none_of_their_own():
    task_vectors = low_rank_stack(2, 150, 2, 20)
    for dtype in (torch.float32, torch.float64):
        found = merge(task_vectors.to(dtype))
        assert found.stats == {"common": 4, "own": 0}
        expected = iso_c(task_vectors.to(dtype), IsoCOptions(), kind=LINEAR).tensor
        assert_close(found.tensor, expected, 1e-5 if dtype == torch.float32 else 1e-12)


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
    assert_close(merged, iso_cts_by_svd(task_vectors.numpy(), LINEAR, 2.0**-52), 1e-10)


def test_degenerate_updates_mostly_rounded_away_in_bfloat16_equal_the_formula():
    base = random_stack(1, 30, 20).bfloat16()
    tuned = base + (3e-3 * random_stack(3, 30, 20, seed=7)).bfloat16()
    task_vectors = tuned.double() - base.double()
    assert (task_vectors == 0).double().mean() > 0.3
    assert_close(merge(task_vectors).tensor, iso_cts_by_svd(task_vectors.numpy(), LINEAR, 2.0**-52), 1e-10)


def test_model_in_memory_is_merged_tensor_by_tensor():
    shapes = {"w": (9, 6), "experts": (2, 6, 5), "norm": (4,), "conv": (3, 2, 2, 2)}
    kinds = {"w": LINEAR, "experts": LINEAR, "norm": NORM, "conv": CONV}
    stacks = {name: random_stack(3, *shape) for name, shape in shapes.items()}
    tuned = [{name: stack[task] for name, stack in stacks.items()} for task in range(3)]
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    merged = merge_tensors(base, tuned, "iso_cts", kinds=kinds, scaling_factor=0.5)
    for name, stack in stacks.items():
        assert_close(merged[name], 0.5 * iso_cts_by_svd(stack.numpy(), kinds[name], 2.0**-52), 1e-10)


def test_order_of_the_tasks_does_not_matter():
    task_vectors = random_stack(3, 9, 8)
    assert_close(merge(task_vectors[[2, 0, 1]]).tensor, merge(task_vectors).tensor, 1e-12)


def test_kernels_that_mix_channels_can_be_matrices():
    kernels, depthwise = random_stack(3, 6, 4, 2, 2), random_stack(3, 6, 1, 2, 2)
    options = IsoCtsOptions(convolutions="matrix")
    as_matrices = iso_cts(kernels.reshape(3, 6, 16), IsoCtsOptions(), kind=LINEAR).tensor
    assert torch.equal(iso_cts(kernels, options, kind=CONV).tensor, as_matrices.reshape(6, 4, 2, 2))
    assert_close(iso_cts(depthwise, options, kind=CONV).tensor, depthwise.mean(dim=0), 1e-14)
    assert_close(iso_cts(kernels, IsoCtsOptions(), kind=CONV).tensor, kernels.mean(dim=0), 1e-14)
