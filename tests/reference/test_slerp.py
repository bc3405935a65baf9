"""SLERP: [sin((1 - t) angle) a + sin(t angle) b] / sin(angle) on weights, entry by entry (Shoemake 1985, section 3.3).

Nearly parallel tensors (|cos| > 0.9995) and those of norm below 1e-8 are interpolated along the straight line.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.methods.slerp import SlerpOptions, slerp

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (13,), (6, 9), (4, 3, 2, 2)]


def slerp_by_entry(first, second, t):
    a, b = [[float(entry) for entry in tensor.reshape(-1)] for tensor in (first, second)]
    norms = [math.sqrt(math.fsum(x * x for x in vector)) for vector in (a, b)]
    left, right = 1 - t, t
    if min(norms) >= 1e-8:
        cosine = math.fsum(x * y for x, y in zip(a, b, strict=True)) / (norms[0] * norms[1])
        if abs(cosine) <= 0.9995:
            angle = math.acos(cosine)
            left, right = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return np.array([left * x + right * y for x, y in zip(a, b, strict=True)]).reshape(first.shape)


def merge(first, second, t=0.5):
    return slerp(torch.stack([first, second]), SlerpOptions(t=t))


def pair(*shape, dtype=torch.float64):
    return torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def in_double(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("apart", [1.0, 0.1, 0.001])
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.73, 1.0])
def test_equals_the_formula(t, apart, shape, dtype, tolerance):
    first, other = pair(*shape, dtype=dtype)
    second = first + apart * other
    merged = merge(first, second, t)
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert_close(merged, slerp_by_entry(first.double().numpy(), second.double().numpy(), t), tolerance)


@settings(deadline=None, max_examples=120)
@given(st.integers(1, 6), st.integers(0, 2**32), st.integers(0, 8))
def test_equals_the_formula_where_tensors_are_zero_parallel_or_opposite(entries, seed, eighths):
    first, second = np.random.default_rng(seed).integers(-1, 2, (2, entries)).astype(float)
    merged = merge(torch.from_numpy(first), torch.from_numpy(second), eighths / 8)
    np.testing.assert_allclose(merged.numpy(), slerp_by_entry(first, second, eighths / 8), rtol=0, atol=1e-14)


def test_default_is_the_middle():
    assert SlerpOptions().t == 0.5


def test_worked_example_half_a_right_angle_between_lengths_one_and_two():
    merged = merge(in_double(1, 0), in_double(0, 2))
    np.testing.assert_allclose(merged.numpy(), [0.5**0.5, 2**0.5], rtol=1e-14)
    assert [round(entry, 4) for entry in merged.tolist()] == [0.7071, 1.4142]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_example_ends_and_equal_models_come_back_bit_for_bit(dtype):
    first, second = pair(5, 6, dtype=dtype)
    assert torch.equal(merge(first, second, 0.0), first)
    assert torch.equal(merge(first, second, 1.0), second)
    for t in (0.1, 0.3, 0.5, 0.9):
        assert torch.equal(merge(first, first, t), first)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_worked_example_swapped_models_with_the_other_share_give_the_same(t):
    first, second = pair(5, 6)
    assert_close(merge(second, first, 1 - t), merge(first, second, t).numpy(), 1e-14)


@pytest.mark.parametrize("cosine", [0.9992, 0.9994, 0.9996, -0.9994, -0.9996])
def test_straight_line_is_taken_beyond_the_limit_alone(cosine):
    first, second = np.array([1.0, 0.0]), 3 * np.array([cosine, (1 - cosine**2) ** 0.5])
    merged = merge(torch.from_numpy(first), torch.from_numpy(second), 0.25)
    np.testing.assert_allclose(merged.numpy(), slerp_by_entry(first, second, 0.25), rtol=0, atol=1e-11)


def test_tensors_of_one_norm_keep_it():
    first, second = pair(5, 6)
    second = second * first.norm() / second.norm()
    for t in (0.2, 0.5, 0.9):
        assert float(merge(first, second, t).norm()) == pytest.approx(float(first.norm()), rel=1e-13)


def test_angle_is_that_of_the_whole_tensor_and_not_of_its_rows():
    first, second = pair(5, 6)
    assert_close(merge(first, second).reshape(-1), merge(first.reshape(-1), second.reshape(-1)).numpy(), 1e-15)


def test_each_tensor_of_a_model_has_its_own_angle():
    names = ("a.weight", "b.weight")
    base = {name: torch.zeros(4, 5, dtype=torch.float64) for name in names}
    tuned = [dict(zip(names, pair(4, 5).roll(turn, 0) + turn, strict=True)) for turn in (0, 1)]
    merged = merge_tensors(base, tuned, "slerp", t=0.3)
    for name in names:
        expected = slerp_by_entry(tuned[0][name].numpy(), tuned[1][name].numpy(), 0.3)
        assert_close(merged[name], expected, 1e-12)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_breaks_single_one_model_is_interpolated_with_the_base(t):
    base, tuned = pair(5, 6)
    merged = slerp(tuned[None], SlerpOptions(t=t), base=base)
    assert torch.equal(merged, merge(base, tuned, t))
    assert_close(merged, slerp_by_entry(base.numpy(), tuned.numpy(), t), 1e-12)
    if t == 1:
        assert torch.equal(merged, tuned)


def test_second_model_that_is_the_base_is_the_other_end():
    base, tuned = pair(5, 6)
    merged = slerp(torch.stack([tuned, base]), SlerpOptions(t=0.3), base=base)
    assert_close(merged, slerp_by_entry(tuned.numpy(), base.numpy(), 0.3), 1e-12)
    assert torch.equal(slerp(torch.stack([tuned, base]), SlerpOptions(t=0.0), base=base), tuned)


def test_breaks_scale_the_angle_is_between_weights():
    """Along the base the straight line would do; across it the update grows slower than its factor."""
    base, update = in_double(1, 0), in_double(0, 1)
    near = slerp((base + update)[None], SlerpOptions(), base=base) - base
    far = slerp((base + 3 * update)[None], SlerpOptions(), base=base) - base
    assert float((far - 3 * near).abs().max()) > 0.05
    expected = slerp_by_entry(np.array([1.0, 0.0]), np.array([1.0, 3.0]), 0.5) - [1, 0]
    np.testing.assert_allclose(far.numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("factor", [1e-3, -1.0, 5.0])
def test_common_factor_of_the_weights_comes_out(factor):
    first, second = pair(5, 6)
    assert_close(merge(factor * first, factor * second, 0.3), factor * merge(first, second, 0.3).numpy(), 1e-14)


def test_more_than_two_models_or_one_without_a_base_are_refused():
    for tuned in (pair(5)[[0, 1, 0]], pair(5)[:1]):
        with pytest.raises(ValueError, match="between two models"):
            slerp(tuned, SlerpOptions())


def test_degenerate_tensor_of_zeros_is_left_along_the_straight_line():
    """With the angle taken for a right one, as in mergekit, the other would shrink by the sine."""
    first, zeros = pair(5, 6)[0], torch.zeros(5, 6, dtype=torch.float64)
    assert_close(merge(first, zeros, 0.25), 0.75 * first.numpy(), 1e-15)
    assert_close(merge(zeros, first, 0.25), 0.25 * first.numpy(), 1e-15)
    assert not merge(zeros, zeros).any()


@pytest.mark.parametrize("size", [1e-9, 1e-7])
def test_degenerate_tensor_of_tiny_norm_has_no_direction(size):
    merged = merge(in_double(size, 0), in_double(0, 2), 0.25)
    left, right = (0.75, 0.25) if size < 1e-8 else (math.cos(math.pi / 8), math.sin(math.pi / 8))
    np.testing.assert_allclose(merged.numpy(), [left * size, 2 * right], rtol=1e-13)


def test_degenerate_opposite_tensors_meet_at_zero():
    first = pair(5, 6)[0]
    assert not merge(first, -first, 0.5).any()
    assert_close(merge(first, -first, 0.25), 0.5 * first.numpy(), 1e-14)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_degenerate_single_entries_are_averaged(shape):
    first, second = torch.full(shape, 2.0), torch.full(shape, -4.0)
    assert merge(first, second, 0.25).tolist() == torch.full(shape, 0.5).tolist()


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_degenerate_tensors_without_entries_keep_their_shape(shape):
    assert merge(torch.zeros(shape), torch.zeros(shape)).shape == shape
