"""STF: the shortest M with u_a . M v_a = s_a for every singular triplet (u_a, s_a, v_a) of every task matrix.

Qiu et al. 2025, arXiv:2502.10698v2: M = sum_a alpha_a u_a v_a^T, where alpha solves equation (3), G alpha = s
with G_ab = (u_a . u_b)(v_a . v_b). Numbers in the examples were worked out by hand or with NumPy alone.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from stf_formula import assert_close, low_rank, merge, orthonormal, random_tensors, shortest, superposed, triplets

from superpose.kinds import Kind
from superpose.maths.linear_system import SMALL
from superpose.maths.sparsify import find_cuts
from superpose.maths.svd import svd_of_product, thin_svd
from superpose.methods.stf import StfOptions, stf, superpose_features

DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
every_dtype = pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)


def trimmed(task_vector, density):
    flat = task_vector.ravel()
    count = max(1, int(Fraction(str(density)) * flat.size)) if density else 0
    kept = np.zeros_like(flat)
    places = sorted(range(flat.size), key=lambda place: (-abs(flat[place]), place))[:count]
    kept[places] = flat[places]
    return kept.reshape(task_vector.shape)


def stf_by_kind(task_vectors, kind, density, scaling_factor, trim_norm=True):
    """Return Algorithm 2's merged task vector; task_vectors (tasks, *shape)."""
    trims = kind is not Kind.NORM or trim_norm
    kept = [trimmed(task_vector, density) if trims else task_vector for task_vector in task_vectors]
    shape = task_vectors.shape[1:]
    if kind is Kind.NORM:
        return np.mean(np.array(kept, float), axis=0)
    if kind is Kind.LINEAR and len(shape) == 3:
        return scaling_factor * np.array([superposed(members) for members in zip(*kept, strict=True)])
    if kind is Kind.LINEAR or (kind is Kind.CONV and shape[1] > 1):
        return scaling_factor * superposed([one.reshape(shape[0], -1) for one in kept]).reshape(shape)
    return scaling_factor * np.sum(np.array(kept, float), axis=0)


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


SHAPES = [
    (Kind.LINEAR, (12, 10)),
    (Kind.LINEAR, (3, 8, 11)),
    (Kind.CONV, (6, 4, 3)),
    (Kind.CONV, (6, 4, 3, 3)),
    (Kind.CONV, (9, 7, 1, 1)),
    (Kind.CONV, (8, 1, 3, 3)),
    (Kind.NORM, (9,)),
    (Kind.BIAS, (9,)),
    (Kind.EMBEDDING, (11, 4)),
    (Kind.HEAD, (4, 9)),
    (Kind.SCALAR, ()),
]


@every_dtype
@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_equals_the_formula(density, kind, shape, dtype, tolerance):
    task_vectors = random_tensors(3, *shape, dtype=dtype, seed=1)
    before = task_vectors.clone()
    merged = stf(task_vectors, StfOptions(density=density, scaling_factor=0.7), kind=kind).tensor
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert_close(merged, stf_by_kind(task_vectors.numpy(), kind, density, 0.7), tolerance)
    assert torch.equal(task_vectors, before)


def test_defaults_are_those_of_the_paper():
    options = StfOptions()
    assert (options.density, options.scaling_factor, options.density_scope) == (0.2, 0.8, "tensor")
    assert (options.ridge, options.matrices, options.trim_norm) == (0.0, "task", True)
    assert (options.rank, options.energy, options.remove_smallest, options.remove_largest) == (None, 1, 0, 0)


# What M has to satisfy.


@every_dtype
@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (33, 33)])
def test_every_feature_keeps_its_strength(shape, dtype, tolerance):
    matrices = random_tensors(4, *shape, dtype=dtype)
    merged = merge(matrices)
    u, s, v = triplets(matrices.numpy())
    answers = np.einsum("ia,ij,ja->a", u, merged.tensor.double().numpy(), v)
    assert np.abs(answers - s).max() <= tolerance * s.max()
    assert merged.stats["worst"] <= tolerance
    assert merged.stats["features"] == merged.stats["rank"] == 4 * min(shape)
    assert merged.cautions == ()


@every_dtype
def test_is_the_shortest_matrix_that_answers_every_feature(dtype, tolerance):
    matrices = random_tensors(3, 9, 12, dtype=dtype)
    assert_close(merge(matrices).tensor, shortest(matrices.numpy()), tolerance)


def test_norm_is_that_of_the_strengths_in_the_inverse_gram_matrix():
    matrices = random_tensors(3, 9, 12)
    u, s, v = triplets(matrices.numpy())
    squared = s @ np.linalg.solve((u.T @ u) * (v.T @ v), s)
    assert float(merge(matrices).tensor.square().sum()) == pytest.approx(squared, rel=1e-10)


def test_earlier_form_with_scaled_columns_gives_the_same():
    """Version 1 of the paper: (S o U o V) alpha' = s with S_ab = s_b; M = sum_a alpha'_a s_a u_a v_a^T."""
    matrices = random_tensors(3, 9, 12)
    u, s, v = triplets(matrices.numpy())
    alpha = np.linalg.solve(np.tile(s, (len(s), 1)) * (u.T @ u) * (v.T @ v), s)
    assert_close(merge(matrices).tensor, (u * (alpha * s)) @ v.T)


# Laws.


@every_dtype
@pytest.mark.parametrize("shape", [(7, 7), (1, 5), (5, 1), (1, 1)])
def test_one_task_comes_back_bit_for_bit(shape, dtype, tolerance):
    matrices = random_tensors(1, *shape, dtype=dtype)
    merged = merge(matrices)
    assert torch.equal(merged.tensor, matrices[0])
    assert merged.stats["rank"] == min(shape)


def test_repeating_a_task_changes_nothing():
    matrices = random_tensors(3, 9, 12)
    expected = merge(matrices).tensor
    for places in ([0, 1, 2, 1], [0, 0, 0, 1, 2, 2]):
        merged = merge(matrices[places])
        assert_close(merged.tensor, expected)
        assert merged.stats["rank"] == 27
        assert merged.cautions == ()


def test_order_of_the_tasks_does_not_matter():
    matrices = random_tensors(4, 9, 12)
    assert_close(merge(matrices[[2, 0, 3, 1]]).tensor, merge(matrices).tensor)


def test_task_of_zeros_changes_nothing():
    matrices = random_tensors(3, 9, 12)
    with_zeros = torch.cat([torch.zeros(1, 9, 12).double(), matrices[:1], torch.zeros(1, 9, 12), matrices[1:]])
    assert torch.equal(merge(with_zeros).tensor, merge(matrices).tensor)
    assert torch.equal(merge(with_zeros[:3]).tensor, matrices[0])


@every_dtype
@pytest.mark.parametrize("tasks", [1, 3])
def test_degenerate_tasks_of_zeros_leave_the_base(tasks, dtype, tolerance):
    merged = merge(torch.zeros(tasks, 5, 6, dtype=dtype))
    assert torch.equal(merged.tensor, torch.zeros(5, 6, dtype=dtype))
    assert merged.stats["features"] == 0


@every_dtype
@pytest.mark.parametrize("tasks", [2, 5])
def test_identical_tasks_give_that_task(tasks, dtype, tolerance):
    """G = ones (x) I is singular, yet the system has a solution; task arithmetic gives T times the task."""
    matrix = random_tensors(8, 6, dtype=dtype)
    merged = merge([matrix] * tasks)
    assert_close(merged.tensor, matrix, tolerance)
    assert merged.stats["rank"] == 6
    assert merged.stats["residual"] < tolerance
    assert merged.cautions == ()


@pytest.mark.parametrize("shared", ["columns", "rows"])
def test_tasks_in_orthogonal_spaces_are_added_up(shared):
    """Orthogonal row spaces suffice where the column spaces are the same, and the other way round."""
    spaces = orthonormal(12, 12).split(4, dim=1)
    matrices = [space @ random_tensors(4, 10, seed=i) for i, space in enumerate(spaces)]
    if shared == "columns":
        matrices = [matrix.T for matrix in matrices]
    assert_close(merge(matrices).tensor, sum(matrices))


def test_transposed_tasks_merge_to_the_transposed_matrix():
    matrices = random_tensors(3, 9, 12)
    assert_close(merge(matrices.mT).tensor, merge(matrices).tensor.T)


def test_rotated_tasks_merge_to_the_rotated_matrix():
    matrices, left, right = random_tensors(3, 9, 12), orthonormal(9, 9), orthonormal(12, 12)
    assert_close(merge(left @ matrices @ right.T).tensor, left @ merge(matrices).tensor @ right.T)


@pytest.mark.parametrize("factor", [2.0, 1e-6, 1e6, -1.0, -0.3])
def test_common_factor_comes_out_whatever_its_sign(factor):
    matrices = random_tensors(3, 9, 12)
    assert_close(merge(factor * matrices).tensor, factor * merge(matrices).tensor)


# Examples worked out by hand.


def test_worked_example_two_features_with_a_common_input_direction():
    """G_12 = 0.6; task arithmetic gives the first column (2.6, 0.8)."""
    matrices = in_double([[2, 0], [0, 0]], [[0.6, 0], [0.8, 0]])
    assert_close(merge(matrices).tensor, [[2, 0], [-0.25, 0]], 1e-13)
    found = superpose_features([thin_svd(matrix) for matrix in matrices])
    assert_close(found.solution.x, [2.1875, -0.3125], 1e-13)


def test_worked_example_matrices_of_one_row():
    """<tau_i / |tau_i|, w> = |tau_i|: w = (17/3, 2, 0)."""
    matrices = in_double([[3, 4, 0]], [[0, 2, 0]])
    assert_close(merge(matrices).tensor, [[17 / 3, 2, 0]], 1e-13)
    assert_close(merge(matrices.mT).tensor, [[17 / 3], [2], [0]], 1e-13)


def test_features_of_numerical_rank_alone_take_part():
    """Null directions would forbid what other tasks do there: with them the merge is another."""
    matrices = torch.stack([low_rank(2, 12, 10, seed=seed) for seed in range(3)])
    merged = merge(matrices)
    assert merged.stats["features"] == merged.stats["rank"] == 6
    assert_close(merged.tensor, superposed(matrices.numpy()))


def test_random_tasks_merge_to_nearly_their_sum():
    """Singular bases of random tasks are nearly orthogonal: 37% from the sum at 64 x 64 and 8 tasks."""
    matrices = random_tensors(8, 64, 64)
    merged, summed = merge(matrices).tensor, matrices.sum(dim=0)
    assert float((merged - summed).norm() / summed.norm()) == pytest.approx(0.37, abs=0.03)


# Tasks that share features.


def on_one_direction(*strengths, seed=0):
    """Return a matrix of norm and rank one, and tasks that are these multiples of it."""
    u, v = orthonormal(6, 1, seed=seed), orthonormal(5, 1, seed=seed + 1)
    return u @ v.T, [strength * u @ v.T for strength in strengths]


@every_dtype
@pytest.mark.parametrize(
    ("strengths", "merged_strength"),
    [((3, 1), 2), ((1, 2, 6), 3), ((3, -1), 1), ((2, -2), 0), ((4, 4), 4)],
)
def test_worked_example_strengths_on_one_direction_are_averaged(strengths, merged_strength, dtype, tolerance):
    """With opposite signs it is the signed mean."""
    direction, matrices = on_one_direction(*strengths)
    merged = merge([matrix.to(dtype) for matrix in matrices])
    assert float((merged.tensor - merged_strength * direction).norm()) < 10 * tolerance
    assert merged.stats["rank"] == 1


@every_dtype
def test_conflict_is_told_with_the_tasks_concerned(dtype, tolerance):
    """Tasks 1 and 4 use one direction with strengths 3 and 1; tasks 0 and 3 are apart, task 2 is zero."""
    direction, (first, second) = on_one_direction(3, 1)
    apart = [low_rank(2, 6, 5, seed=seed) for seed in (10, 20)]
    merged = merge([part.to(dtype) for part in (apart[0], first, 0 * first, apart[1], second)])
    (caution,) = merged.cautions
    assert caution.tasks == (1, 4)
    assert "contradict" in caution.text
    assert "ridge" in caution.text
    assert float((direction * merged.tensor).sum()) == pytest.approx(2, rel=10 * tolerance)


def test_conflict_of_several_tasks_names_those_farthest_from_the_answer():
    (caution,) = merge(on_one_direction(1, 2, 6)[1]).cautions  # answered with 3
    assert {0, 2} <= set(caution.tasks)


def test_conflict_of_opposite_tasks_is_told():
    _, matrices = on_one_direction(3, -1)
    assert [caution.tasks for caution in merge(matrices).cautions] == [(0, 1)]


def test_ridge_and_agreement_give_no_caution():
    assert merge(on_one_direction(3, 1)[1], ridge=0.01).cautions == ()
    assert merge(on_one_direction(3, 3)[1]).cautions == ()


def test_consistent_relation_between_features_is_satisfied():
    """Three inputs in one plane, one output: (e1, 3), (e2, 1) and their diagonal with (3 + 1) / sqrt(2)."""
    u = orthonormal(6, 1)
    rows = in_double([3, 0, 0], [0, 1, 0], [2, 2, 0])
    merged = merge([u @ row[None] for row in rows])
    assert_close(merged.tensor, u @ in_double([3, 1, 0]))
    assert merged.stats["rank"] == 2
    assert merged.cautions == ()


def test_inconsistent_relation_between_features_is_least_squares_and_told():
    u = orthonormal(6, 1)
    rows = in_double([3, 0, 0], [0, 1, 0], [4, 4, 0])
    matrices = torch.stack([u @ row[None] for row in rows])
    merged = merge(matrices)
    assert_close(merged.tensor, shortest(matrices.numpy()))
    assert merged.stats["rank"] == 2
    assert len(merged.cautions) == 1


def at_cosine(cosine):
    """Return two rank-one tasks of strengths 3 and 1 whose features have this inner product."""
    u = orthonormal(6, 1)
    second = u @ in_double([cosine, (1 - cosine**2) ** 0.5, 0])
    return torch.stack([u @ in_double([3, 0, 0]), second])


@pytest.mark.parametrize(("cosine", "norm"), [(0.9, 4.9), (0.99, 14.3), (0.999, 44.8), (1.0, 2.0)])
def test_nearly_parallel_features_that_disagree_have_a_large_answer(cosine, norm):
    merged = merge(at_cosine(cosine))
    assert float(merged.tensor.norm()) == pytest.approx(norm, rel=0.005)
    if cosine < 1:
        exact = ((9 + 1 - 2 * 3 * cosine) / (1 - cosine**2)) ** 0.5
        assert float(merged.tensor.norm()) == pytest.approx(exact, rel=1e-10)
        assert merged.stats["condition"] == pytest.approx((1 + cosine) / (1 - cosine), rel=1e-8)
        assert merged.stats["growth"] == pytest.approx(exact / (3 + 1), rel=1e-10)
        (caution,) = merged.cautions  # larger than the sum of both tasks can be
        assert caution.tasks == (0, 1)
        assert "ridge" in caution.text


def test_answer_no_larger_than_the_tasks_together_is_not_warned_of():
    assert merge(at_cosine(0.5)).cautions == ()


def test_condition_beyond_ten_thousand_is_told():
    (caution,) = merge(at_cosine(1 - 1e-5)).cautions
    assert caution.tasks == (0, 1)
    assert "nearly parallel" in caution.text
    assert "ridge" in caution.text


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0])
def test_ridge_bounds_the_answer_of_nearly_parallel_features(ridge):
    """Along the sum of both features G has 1 + c, along their difference 1 - c."""
    cosine = 0.999
    along, across = 4 / 2**0.5 / (1 + cosine + ridge), 2 / 2**0.5 / (1 - cosine + ridge)
    expected = ((1 + cosine) * along**2 + (1 - cosine) * across**2) ** 0.5
    assert float(merge(at_cosine(cosine), ridge=ridge).tensor.norm()) == pytest.approx(expected, rel=1e-9)


@every_dtype
@pytest.mark.parametrize(("tasks", "shape"), [(5, (2, 2)), (7, (3, 2)), (4, (1, 3)), (70, (8, 8))])
def test_degenerate_more_features_than_entries_are_answered_in_least_squares(tasks, shape, dtype, tolerance):
    matrices = random_tensors(tasks, *shape, dtype=dtype, seed=3)
    merged = merge(matrices)
    assert_close(merged.tensor, shortest(matrices.numpy()), 10 * tolerance)
    assert merged.stats["rank"] == shape[0] * shape[1]
    (caution,) = merged.cautions
    assert set(caution.tasks) <= set(range(tasks))
    assert caution.tasks


@every_dtype
def test_large_singular_systems_give_the_task_or_the_mean(dtype, tolerance):
    matrix = random_tensors(130, 140, dtype=dtype)
    for strengths, expected in (((1, 1, 1, 1, 1), 1), ((1, 1, 1, 1, 6), 2)):
        merged = merge([strength * matrix for strength in strengths])
        assert_close(merged.tensor, expected * matrix, 10 * tolerance)
        assert merged.stats["features"] == 650 > SMALL
        assert merged.stats["rank"] == 130
        assert [4 in caution.tasks for caution in merged.cautions] == ([] if expected == 1 else [True])


# Options.


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0])
def test_ridge_minimises_the_misses_and_the_norm_together(ridge):
    """argmin_M sum_a (u_a . M v_a - s_a)^2 + ridge |M|^2, by its normal equations over all entries of M."""
    matrices = random_tensors(4, 5, 6)
    u, s, v = triplets(matrices.numpy())
    rows = np.einsum("ia,ja->aij", u, v).reshape(len(s), -1)
    expected = np.linalg.solve(rows.T @ rows + ridge * np.eye(30), rows.T @ s).reshape(5, 6)
    assert_close(merge(matrices, ridge=ridge).tensor, expected)
    assert_close(superposed(matrices.numpy(), ridge), expected)


def test_ridge_shrinks_one_task_too():
    matrices = random_tensors(1, 5, 6)
    assert_close(merge(matrices, ridge=0.25).tensor, matrices[0] / 1.25)


def test_small_ridge_approaches_the_least_squares_answer():
    _, matrices = on_one_direction(1, 2, 6)
    assert_close(merge(matrices, ridge=1e-7).tensor, merge(matrices).tensor, 1e-6)


@every_dtype
@pytest.mark.parametrize("size", [(30, 40), (200, 210)])
def test_solvers_agree(size, dtype, tolerance):
    tasks = [thin_svd(matrix) for matrix in random_tensors(3, *size, dtype=dtype)]
    found = {solver: superpose_features(tasks, solver=solver) for solver in ("auto", "cg", "direct", "eigh")}
    assert (3 * min(size) > SMALL) == (size == (200, 210))
    for solver, superposition in found.items():
        assert_close(superposition.matrix, found["eigh"].matrix, tolerance)
        assert superposition.solution.solver == solver or solver == "auto"
        assert superposition.worst <= tolerance


@pytest.mark.parametrize("solver", ["auto", "cg", "direct", "eigh"])
def test_solver_is_taken_from_the_options(solver):
    merged = merge(random_tensors(3, 9, 12), solver=solver)
    assert merged.stats["solver"] == ("eigh" if solver == "auto" else solver)
    conflict = merge(on_one_direction(3, 1)[1], solver=solver)
    assert_close(conflict.tensor, merge(on_one_direction(3, 1)[1]).tensor)


@every_dtype
def test_adapters_superpose_from_their_factors_as_dense_matrices_do(dtype, tolerance):
    factors = [
        (
            random_tensors(20, rank, seed=rank, dtype=dtype),
            random_tensors(rank, 15, seed=9 * rank, dtype=dtype),
        )
        for rank in (2, 3, 4)
    ]
    scales = (0.5, 2.0, 1.0)
    found = superpose_features([svd_of_product(scale * b, a) for scale, (b, a) in zip(scales, factors, strict=True)])
    assert found.features == 9
    dense = [scale * b.double() @ a.double() for scale, (b, a) in zip(scales, factors, strict=True)]
    assert_close(found.matrix, merge(dense).tensor, tolerance)


def with_features(matrix, first, last):
    """Return the matrix made of its features first..last, by strength."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, first:last] * s[first:last]) @ vh[first:last]


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({"rank": 1}, 0, 1),
        ({"rank": 4}, 0, 4),
        ({"rank": 100}, 0, 10),
        ({"remove_smallest": 0.8}, 0, 2),
        ({"remove_smallest": 0.35}, 0, 7),
        ({"remove_largest": 0.05}, 0, 10),
        ({"remove_largest": 0.29}, 2, 10),
        ({"remove_largest": 0.2, "remove_smallest": 0.3}, 2, 7),
        ({"remove_smallest": 0.3, "rank": 3}, 0, 3),
        ({"remove_largest": 0.2, "rank": 3}, 2, 5),
    ],
)
def test_features_are_removed_by_number_before_the_solve(options, first, last, tasks):
    matrices = random_tensors(tasks, 12, 10)
    expected = superposed([with_features(matrix, first, last) for matrix in matrices.numpy()])
    merged = merge(matrices, **options)
    assert_close(merged.tensor, expected)
    assert merged.stats["features"] == tasks * (last - first)


@pytest.mark.parametrize("options", [{"remove_smallest": 1.0}, {"remove_largest": 0.6, "remove_smallest": 0.6}])
def test_degenerate_removing_every_feature_leaves_the_base(options):
    assert torch.equal(merge(random_tensors(2, 5, 6), **options).tensor, torch.zeros(5, 6).double())


@pytest.mark.parametrize("energy", [0.0, 0.5, 0.9, 0.999])
def test_energy_keeps_the_fewest_features_that_hold_it(energy):
    matrices = random_tensors(3, 12, 10)
    expected = []
    for matrix in matrices.numpy():
        squares = np.linalg.svd(matrix, compute_uv=False) ** 2
        count = next(k for k in range(1, 11) if squares[:k].sum() >= energy * squares.sum())
        expected.append(with_features(matrix, 0, count))
    assert_close(merge(matrices, energy=energy).tensor, superposed(expected))


def test_equal_finetuned_matrices_come_back():
    base, task_vector = random_tensors(8, 6), random_tensors(8, 6, seed=1)
    options = StfOptions(matrices="finetuned")
    merged = stf(task_vector.expand(3, 8, 6), options, kind=Kind.LINEAR, base=base)
    assert_close(base + merged.tensor, base + task_vector)


def test_finetuned_matrices_are_superposed_untrimmed_and_unscaled():
    base, task_vectors = random_tensors(8, 4, 2), random_tensors(3, 8, 4, 2, seed=1)
    tuned = (base + task_vectors).reshape(3, 8, 8)
    options = StfOptions(matrices="finetuned", density=0.2, scaling_factor=0.8)
    merged = stf(task_vectors, options, kind=Kind.CONV, base=base)
    assert_close((base + merged.tensor).reshape(8, 8), superposed(tuned.numpy()))


def test_finetuned_matrices_need_the_base():
    with pytest.raises(ValueError, match="needs the base"):
        stf(random_tensors(2, 3, 4), StfOptions(matrices="finetuned"), kind=Kind.LINEAR)


@pytest.mark.parametrize(("kind", "shape"), [part for part in SHAPES if part[0] not in (Kind.LINEAR, Kind.CONV)])
def test_what_is_no_matrix_is_merged_alike_for_finetuned_matrices(kind, shape):
    task_vectors = random_tensors(3, *shape)
    task, finetuned = [
        stf(task_vectors, StfOptions(matrices=matrices), kind=kind, base=random_tensors(*shape, seed=2)).tensor
        for matrices in ("task", "finetuned")
    ]
    assert torch.equal(task, finetuned)


def test_survey_says_where_to_cut():
    task_vectors = random_tensors(3, 8, 9)
    cut = stf(task_vectors, StfOptions(density=0.1), kind=Kind.LINEAR, survey=find_cuts(task_vectors, 0.5))
    assert torch.equal(cut.tensor, stf(task_vectors, StfOptions(density=0.5), kind=Kind.LINEAR).tensor)


# What is no matrix.


def test_norms_are_averaged_without_the_scaling_factor():
    task_vectors = in_double([4, 1, 0, 0], [0, 0, 2, 6])
    trimmed_mean, plain_mean = [
        stf(task_vectors, StfOptions(density=0.25, scaling_factor=0.5, trim_norm=trim), kind=Kind.NORM).tensor
        for trim in (True, False)
    ]
    assert trimmed_mean.tolist() == [2, 0, 0, 3]
    assert plain_mean.tolist() == [2, 0.5, 1, 3]


def test_norms_left_untrimmed_are_not_cut_by_a_survey_either():
    task_vectors = in_double([4, 1], [0, 2])
    options = StfOptions(trim_norm=False)
    merged = stf(task_vectors, options, kind=Kind.NORM, survey=find_cuts(task_vectors, 0.5))
    assert merged.tensor.tolist() == [2, 1.5]


def test_breaks_zero_for_norms_whose_mean_shrinks():
    """For norms the law "zero" does not hold: the paper averages them."""
    task_vectors = in_double([4, 1], [0, 2], [0, 0])
    assert stf(task_vectors, StfOptions(density=1.0), kind=Kind.NORM).tensor.tolist() == [4 / 3, 1]


@pytest.mark.parametrize("kind", [Kind.BIAS, Kind.EMBEDDING, Kind.HEAD, Kind.SCALAR])
def test_breaks_same_where_there_is_no_matrix(kind):
    """For what is no matrix the law "same" does not hold: the paper adds it up."""
    task_vectors = in_double([4], [4], [4])
    assert stf(task_vectors, StfOptions(density=1.0), kind=kind).tensor.tolist() == pytest.approx([0.8 * 12])


def test_convolutions_merge_as_their_flattened_matrices():
    kernels = random_tensors(3, 6, 4, 3, 3)
    options = StfOptions()
    merged = stf(kernels, options, kind=Kind.CONV)
    flattened = stf(kernels.flatten(2), options, kind=Kind.LINEAR)
    assert torch.equal(merged.tensor, flattened.tensor.reshape(6, 4, 3, 3))
    assert merged.stats == flattened.stats


@pytest.mark.parametrize("shape", [(8, 1, 3), (8, 1, 3, 3)])
def test_depthwise_convolutions_are_added_up(shape):
    kernels = random_tensors(3, *shape)
    merged = stf(kernels, StfOptions(density=1.0, scaling_factor=0.5), kind=Kind.CONV)
    assert_close(merged.tensor, 0.5 * kernels.sum(dim=0))


def test_stacks_of_linear_maps_are_merged_one_by_one():
    """The second member's tasks conflict, and the caution of the stack says so."""
    _, conflicting = on_one_direction(3, 1)
    stacks = torch.stack([random_tensors(2, 6, 5), torch.stack(conflicting), random_tensors(2, 6, 5, seed=1)], 1)
    merged = merge(stacks)
    members = [merge(stacks[:, member]) for member in range(3)]
    assert torch.equal(merged.tensor, torch.stack([member.tensor for member in members]))
    assert [caution.tasks for caution in merged.cautions] == [(0, 1)]
    assert merged.stats["features"] == 10 + 2 + 10
    assert merged.stats["rank"] == 10 + 1 + 10
    assert merged.stats["residual"] == members[1].stats["residual"] > 0
