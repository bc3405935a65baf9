"""Random numbers go by seed, tensor name, task name and place: never by order, device or piece."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.randomness import Generator, drop_and_rescale

GENERATOR = Generator(7, "layers.0.weight", ("math", "code", "chinese"))
MANY = 40_000


def correlation(first, second):
    return float(np.corrcoef(first.numpy(), second.numpy())[0, 1])


def test_uniform_numbers_fill_the_unit_interval():
    numbers = GENERATOR.uniform(0, (200, 200))
    assert numbers.shape == (200, 200)
    assert numbers.dtype == torch.float64
    assert 0 <= float(numbers.min()) < 1e-3
    assert 1 - 1e-3 < float(numbers.max()) < 1
    # Mean and variance of a uniform number, to four standard errors.
    assert abs(float(numbers.mean()) - 1 / 2) < 4 * (1 / 12 / MANY) ** 0.5
    assert abs(float(numbers.var()) - 1 / 12) < 4 * (1 / 180 / MANY) ** 0.5


def test_uniform_numbers_are_spread_evenly():
    counts = np.histogram(GENERATOR.uniform(1, (MANY,)).numpy(), bins=20, range=(0, 1))[0]
    chi_squared = float(((counts - MANY / 20) ** 2 / (MANY / 20)).sum())
    assert chi_squared < 19 + 4 * (2 * 19) ** 0.5


def test_numbers_are_multiples_of_two_to_the_minus_32():
    scaled = GENERATOR.uniform(0, (1000,)) * 2.0**32
    assert torch.equal(scaled, scaled.round())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 5), (2, 3, 1, 7)])
def test_any_shape_can_be_drawn(shape):
    assert GENERATOR.uniform(0, shape).shape == shape
    for probability in (0.0, 0.5, 1.0):
        kept = GENERATOR.keeps(0, probability, shape)
        assert kept.shape == shape
        assert kept.dtype == torch.bool


def test_shape_does_not_matter_to_the_numbers():
    assert torch.equal(GENERATOR.uniform(0, (4, 6)).reshape(-1), GENERATOR.uniform(0, (24,)))


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_keeps_about_as_many_as_the_probability_says(probability):
    kept = float(GENERATOR.keeps(0, probability, (MANY,)).double().mean())
    assert abs(kept - probability) < 4 * (probability * (1 - probability) / MANY) ** 0.5


@pytest.mark.parametrize("probability", [0.001, 0.3, 0.5, 0.9])
def test_keeps_where_the_uniform_number_is_below_the_probability(probability):
    assert torch.equal(GENERATOR.keeps(1, probability, (999,)), GENERATOR.uniform(1, (999,)) < probability)


def test_keeps_none_at_zero_and_all_at_one():
    assert not GENERATOR.keeps(0, 0.0, (MANY,)).any()
    assert GENERATOR.keeps(0, 1.0, (MANY,)).all()


@pytest.mark.parametrize("short", [1e-6, 1e-9, 1e-10, 1e-12, 2.0**-53])
def test_keeps_nearly_all_just_below_one(short):
    assert int((~GENERATOR.keeps(0, 1 - short, (MANY,))).sum()) <= 5


def test_keeps_nearly_none_just_above_zero():
    assert int(GENERATOR.keeps(0, 1e-12, (MANY,)).sum()) == 0
    assert int(GENERATOR.keeps(0, 1e-6, (MANY,)).sum()) <= 5


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 70), st.integers(0, 40), st.integers(0, 2))
def test_pieces_have_the_numbers_of_the_whole(start, size, task):
    whole = GENERATOR.uniform(task, (110,))
    piece = GENERATOR.within(start)
    assert torch.equal(piece.uniform(task, (size,)), whole[start : start + size])
    assert torch.equal(piece.keeps(task, 0.4, (size,)), (whole < 0.4)[start : start + size])


def test_piece_of_a_piece_begins_where_both_say():
    assert torch.equal(GENERATOR.within(13).within(9).uniform(0, (5,)), GENERATOR.within(22).uniform(0, (5,)))


def test_far_places_are_reached_without_drawing_those_before():
    far = GENERATOR.within(10**12 + 3)
    assert torch.equal(far.uniform(0, (9,))[4:], GENERATOR.within(10**12 + 7).uniform(0, (5,)))


def test_numbers_go_with_the_name_of_the_task():
    turned = replace(GENERATOR, tasks=("chinese", "math", "code"))
    for place, task in enumerate([2, 0, 1]):
        assert torch.equal(turned.uniform(place, (50,)), GENERATOR.uniform(task, (50,)))


OTHERS = {
    "seed": replace(GENERATOR, seed=8),
    "tensor": replace(GENERATOR, name="layers.1.weight"),
    "task": replace(GENERATOR, tasks=("maths", "code", "chinese")),
    "names run together": replace(GENERATOR, name="layers.0.weightm", tasks=("ath", "code", "chinese")),
    "large seed": replace(GENERATOR, seed=7 + 2**64),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_other_seeds_and_names_give_independent_numbers(other):
    assert abs(correlation(GENERATOR.uniform(0, (MANY,)), other.uniform(0, (MANY,)))) < 4 / MANY**0.5


def test_tasks_have_independent_numbers():
    rows = [GENERATOR.uniform(task, (MANY,)) for task in range(3)]
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        assert abs(correlation(rows[first], rows[second])) < 4 / MANY**0.5


@pytest.mark.parametrize("lag", [1, 2, 8, 64])
def test_neighbours_have_independent_numbers(lag):
    numbers = GENERATOR.uniform(0, (MANY,))
    assert abs(correlation(numbers[lag:], numbers[:-lag])) < 4 / MANY**0.5


def test_second_draw_gives_the_same_numbers():
    assert torch.equal(GENERATOR.uniform(0, (77,)), GENERATOR.uniform(0, (77,)))


def test_golden_numbers_never_change():
    """Philox, keyed by the first half of the SHA-256 of the JSON list [seed, tensor name, task name]."""
    words = (GENERATOR.uniform(1, (8,)) * 2.0**32).long()
    assert words.tolist() == [
        2464396283, 1238162844, 4040705995, 3137217030, 1226109431, 2222426269, 1841926122, 846907147
    ]  # fmt: skip
    text = b'[7, "layers.0.weight", "code"]'
    philox = np.random.Philox(key=int.from_bytes(hashlib.sha256(text).digest()[:16], "little"))
    pairs = [(word & 0xFFFFFFFF, word >> 32) for word in map(int, philox.random_raw(4))]
    assert words.tolist() == [half for pair in pairs for half in pair]


def test_drop_and_rescale_divides_what_is_kept_by_the_density():
    task_vectors = torch.randn(3, 20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dropped = drop_and_rescale(task_vectors, 0.3, GENERATOR)
    for task in range(3):
        kept = GENERATOR.keeps(task, 0.3, (20, 30))
        assert torch.equal(dropped[task] != 0, kept)
        assert torch.equal(dropped[task][kept], task_vectors[task][kept] / 0.3)


def test_drop_and_rescale_at_density_one_returns_the_values():
    task_vectors = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drop_and_rescale(task_vectors, 1.0, GENERATOR), task_vectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_and_rescale_keeps_the_dtype_and_the_inputs(dtype):
    task_vectors = torch.ones(3, 50, dtype=dtype)
    dropped = drop_and_rescale(task_vectors, 0.25, GENERATOR)
    assert dropped.dtype == dtype
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert torch.equal(task_vectors, torch.ones(3, 50, dtype=dtype))
