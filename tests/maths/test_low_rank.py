"""Low-rank matrices: what is done to their factors is what would be done to the matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.low_rank import LowRank, in_factor_space, of_features, side_by_side, total, zero
from superpose.maths.svd import thin_svd

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def draw(out, in_, rank, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(out, rank, generator=generator).to(dtype), torch.randn(rank, in_, generator=generator).to(dtype)
    )


def assert_equal(found, expected, tolerance):
    assert float((found.double() - expected.double()).norm()) <= tolerance * max(1e-30, float(expected.double().norm()))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 14), st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)  # fmt: skip
def test_features_are_those_of_the_matrix(out, in_, rank, dtype, seed):
    matrix = draw(out, in_, rank, dtype, seed)
    features = matrix.features()
    assert features.count == thin_svd(matrix.matrix()).count if rank else features.count == 0
    tolerance = 50 * TOLERANCE[dtype]
    assert_equal(features.matrix(), matrix.matrix(), tolerance)
    identity = torch.eye(features.count, dtype=dtype)
    assert torch.allclose(features.u.T @ features.u, identity, atol=tolerance)
    assert torch.allclose(features.vh @ features.vh.T, identity, atol=tolerance)
    assert bool((features.s.diff() <= 0).all())


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 1e-5])
def test_features_of_ill_conditioned_factors(spread):
    scales = torch.logspace(0, float(torch.log10(torch.tensor(spread))), 8, dtype=torch.float64)
    exact = draw(60, 40, 8)
    exact = LowRank(exact.left * scales, exact.right)
    found = LowRank(exact.left.float(), exact.right.float()).features()
    expected = torch.linalg.svdvals(exact.matrix())[:8]
    assert found.count == 8
    assert torch.allclose(found.s.double(), expected, rtol=1e-4, atol=1e-7 * float(expected[0]))
    assert torch.allclose(found.u.T @ found.u, torch.eye(8), atol=2e-6)


def test_padding_and_repeated_columns_are_no_features():
    one = draw(9, 7, 3, torch.float32)
    padded = total([one, LowRank(torch.zeros(9, 4), torch.zeros(4, 7)), one.times(2.0)])
    assert padded.rank == 10
    assert padded.features().count == 3
    assert_equal(padded.features().matrix(), 3 * one.matrix(), 1e-5)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=4))
def test_total_is_the_weighted_sum(factors):
    terms = [draw(5, 6, 1 + number, seed=number) for number in range(len(factors))]
    expected = sum(factor * term.matrix() for factor, term in zip(factors, terms, strict=True))
    assert_equal(total(terms, factors).matrix(), expected, 1e-12)


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_side_by_side_are_what_they_were_split_from(axis):
    matrix = draw(6, 9, 2)
    blocks = matrix.split(axis, [2, 1, 3] if axis == 0 else [4, 5])
    assert torch.allclose(torch.cat([block.matrix() for block in blocks], dim=axis), matrix.matrix())
    assert torch.allclose(side_by_side(blocks, axis).matrix(), matrix.matrix())


def test_norm_times_transpose_and_zero():
    matrix = draw(6, 9, 2)
    assert matrix.norm() == pytest.approx(float(matrix.matrix().norm()))
    assert_equal(matrix.times(-3.0).matrix(), -3 * matrix.matrix(), 1e-12)
    assert torch.equal(matrix.T.matrix(), matrix.matrix().T)
    nothing = zero((4, 5), matrix.left)
    assert nothing.norm() == 0
    assert torch.equal(nothing.matrix(), torch.zeros(4, 5, dtype=torch.float64))
    assert nothing.features().count == 0


def test_strengths_are_shared_between_the_factors():
    features = draw(8, 5, 3).features()
    made = of_features(features)
    assert_equal(made.matrix(), features.matrix(), 1e-12)
    assert torch.allclose(made.left.norm(dim=0), made.right.norm(dim=1))


def test_worked_example_of_cross_terms_in_factor_space():
    # The mean of the products is diag(.5, .5), the product of the means .25 * ones(2, 2).
    e = torch.eye(2, dtype=torch.float64)
    terms = [LowRank(e[:, :1], e[:1]), LowRank(e[:, 1:], e[1:])]
    assert torch.equal(total(terms, [0.5, 0.5]).matrix(), 0.5 * e)
    assert torch.equal(in_factor_space(terms, [0.5, 0.5], [0.5, 0.5]).matrix(), torch.full((2, 2), 0.25).double())
    with pytest.raises(ValueError, match="different ranks"):
        in_factor_space([terms[0], draw(2, 2, 2)], [1, 1], [1, 1])
