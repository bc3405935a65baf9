"""Interpolation on the sphere and mean angles, against loops over the entries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.sphere import gram_matrix, mean_cosine, slerp


def unit(angle, dtype=torch.float64):
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=dtype)


def in_double(*entries):
    return torch.tensor(entries, dtype=torch.float64)


@settings(deadline=None, max_examples=100)
@given(st.floats(0.04, 3.1), st.floats(0, 1), st.floats(-3, 3))
def test_unit_vectors_turn_at_a_constant_speed(angle, t, turned):
    """Beyond 0.032 radians from parallel or opposite the arc is taken."""
    found = slerp(unit(turned), unit(turned + angle), t)
    np.testing.assert_allclose(found.numpy(), unit(turned + t * angle).numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("cosine", "on_the_arc"), [(0.9994, True), (0.9996, False), (-0.9994, True), (-0.9996, False)])
def test_straight_line_is_taken_beyond_the_limit(cosine, on_the_arc):
    first, second = unit(0.0), unit(math.acos(cosine))
    found = slerp(first, second, 0.25)
    expected = unit(0.25 * math.acos(cosine)) if on_the_arc else 0.75 * first + 0.25 * second
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 5), (2, 3, 2, 2)])
def test_ends_and_equal_vectors_come_back_bit_for_bit(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, *shape, dtype=dtype, generator=generator)
    assert torch.equal(slerp(first, second, 0.0), first)
    assert torch.equal(slerp(first, second, 1.0), second)
    for t in (0.1, 0.3, 0.5, 0.7):
        assert torch.equal(slerp(first, first, t), first)


def test_vectors_without_direction_are_joined_by_the_straight_line():
    vector = in_double(3.0, -4.0)
    for nothing in (torch.zeros(2, dtype=torch.float64), in_double(1e-9, 0)):
        np.testing.assert_allclose(slerp(nothing, vector, 0.25).numpy(), 0.25 * vector.numpy(), rtol=1e-8)
        np.testing.assert_allclose(slerp(vector, nothing, 0.25).numpy(), 0.75 * vector.numpy(), rtol=1e-8)
    assert not slerp(torch.zeros(3), torch.zeros(3), 0.5).any()


def test_opposite_vectors_meet_at_zero():
    vector = in_double(3.0, -4.0)
    assert slerp(vector, -vector, 0.5).tolist() == [0, 0]
    np.testing.assert_allclose(slerp(vector, -vector, 0.25).numpy(), 0.5 * vector.numpy(), rtol=1e-14)


@pytest.mark.parametrize("size", [1e-6, 1e15])
def test_size_does_not_matter_to_the_angle_in_float32(size):
    first, second = size * unit(0.0, torch.float32), size * unit(1.0, torch.float32)
    np.testing.assert_allclose(slerp(first, second, 0.5).double().numpy() / size, unit(0.5).numpy(), rtol=1e-6)


def test_inputs_are_left_alone_and_not_handed_out():
    first, second = in_double(1.0, 2.0), in_double(3.0, -1.0)
    before = first.clone(), second.clone()
    for t in (0.0, 0.5, 1.0):
        slerp(first, second, t).mul_(7)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


def test_gram_matrix_equals_the_inner_products():
    rows = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))
    exact = rows.double().numpy()
    expected = np.array([[[sum(a * b) for b in stack] for a in stack] for stack in exact])
    found = gram_matrix(rows)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)


def test_gram_matrix_of_long_rows_is_added_up_piece_by_piece():
    rows = torch.ones(2, (1 << 18) + 5)
    assert gram_matrix(rows).tolist() == [[(1 << 18) + 5] * 2] * 2
    assert gram_matrix(torch.ones(2, 0)).tolist() == [[0, 0], [0, 0]]


def test_mean_cosine_is_over_all_pairs():
    """The three angles are 90, 45 and 45 degrees."""
    rows = in_double(1, 0, 0, 2, 3, 3).reshape(3, 2)
    assert float(mean_cosine(gram_matrix(rows))) == pytest.approx(2 / 3 / 2**0.5, abs=1e-15)


def test_mean_cosine_counts_pairs_with_a_zero_vector_as_orthogonal():
    rows = in_double(1, 1, 0, 0, 2, 2).reshape(3, 2)
    assert float(mean_cosine(gram_matrix(rows))) == pytest.approx(1 / 3, abs=1e-15)
    assert float(mean_cosine(torch.zeros(2, 2, dtype=torch.float64))) == 0


def test_mean_cosine_of_each_stack():
    rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    np.testing.assert_allclose(mean_cosine(gram_matrix(rows)).numpy(), [1, 0, -1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e30])
def test_mean_cosine_does_not_depend_on_the_size_in_float32(size):
    rows = size * torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert float(mean_cosine(gram_matrix(rows))) == pytest.approx(0.5, abs=1e-6)
