"""The streaming search keeps the very entries that a sort of the whole model keeps."""

from dataclasses import dataclass
from functools import reduce
from operator import iadd

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.samples import take_sample
from superpose.maths.sparsify import apply_cuts, keep_largest
from superpose.maths.streaming import MagnitudeSurvey, TensorChunks

quick = settings(deadline=None, max_examples=50)
TINIEST = {np.float32: 1.401298464324817e-45, np.float64: 5e-324}


@dataclass(frozen=True)
class Options:
    density: float
    density_scope: str = "model"


@dataclass(frozen=True)
class Model:
    """Task vectors by tensor, each an array (tasks, entries), all of one dtype."""

    tensors: dict[str, np.ndarray]

    @property
    def whole(self):
        return np.concatenate(list(self.tensors.values()), axis=1)


def kept_by_sorting(model, density):
    """Return the model with each task's entries cut by a stable sort of all of them."""
    whole = model.whole
    kept = np.zeros_like(whole)
    count = max(1, int(density * whole.shape[1] + 1e-9)) if density else 0
    for row, out in zip(whole, kept, strict=True):
        order = np.argsort(-np.abs(row), kind="stable")[:count]
        out[order] = row[order]
    ends = np.cumsum([array.shape[1] for array in model.tensors.values()])
    return dict(zip(model.tensors, np.split(kept, ends[:-1], axis=1), strict=True))


def kept_by_streaming(model, options, size):
    """Return the model cut in the passes of a survey, reading and cutting `size` entries at a time."""
    survey, dtype = MagnitudeSurvey(), torch.from_numpy(model.whole).dtype
    chunks = {name: chunks_of(array, size) for name, array in model.tensors.items()}
    state = None
    for step in range(survey.passes(options, dtype)):
        values = [survey.measure(step, name, chunks[name], state, options) for name in chunks]
        state = survey.finish(step, reduce(iadd, values), state, options, dtype)
    kept = {}
    for name, array in model.tensors.items():
        cuts = survey.for_tensor(name, chunks[name], state, options)
        pieces = [apply_cuts(chunk, cuts.within(start, start + chunk.shape[1])) for start, chunk in chunks[name]]
        kept[name] = torch.cat(pieces, dim=1).numpy() if pieces else array
    return kept


def chunks_of(array, size):
    tensor = torch.from_numpy(array)
    return TensorChunks(*array.shape, size, lambda start, stop: tensor[:, start:stop])


def assert_same(kept, expected):
    assert kept.keys() == expected.keys()
    for name in expected:
        assert kept[name].dtype == expected[name].dtype
        assert np.array_equal(kept[name], expected[name]), name


@st.composite
def models(draw):
    """Up to four tensors with many ties, zeros, denormals and neighbouring floats."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    tasks = draw(st.integers(1, 3))
    near = [1.0, np.nextafter(dtype(1), dtype(2)), np.nextafter(dtype(1), dtype(0)), 1.0 + 2e-4]
    values = [0.0, -0.0, *near, -1.0, TINIEST[dtype], -3 * TINIEST[dtype], 1e30, -5.0]
    sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=4))
    return Model(
        {
            f"tensor{index}": np.array(
                draw(st.lists(st.sampled_from(values), min_size=tasks * size, max_size=tasks * size)), dtype
            ).reshape(tasks, size)
            for index, size in enumerate(sizes)
        }
    )


@quick
@given(models(), st.integers(0, 20), st.integers(1, 11))
def test_one_threshold_over_the_model_equals_a_sort_of_it(model, twentieths, size):
    density = twentieths / 20
    assert_same(kept_by_streaming(model, Options(density), size), kept_by_sorting(model, density))


@quick
@given(models(), st.integers(0, 20), st.integers(1, 11))
def test_scope_tensor_equals_keeping_the_largest_of_each_tensor(model, twentieths, size):
    density = twentieths / 20
    expected = {name: keep_largest(torch.from_numpy(array), density).numpy() for name, array in model.tensors.items()}
    assert_same(kept_by_streaming(model, Options(density, "tensor"), size), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("digits", [1, 12])
def test_many_entries_equal_a_sort(dtype, digits):
    """So many that digits are counted in bins; rounded to one digit, thousands of entries tie."""
    rng = np.random.default_rng(digits)
    model = Model(
        {
            name: np.round(rng.standard_normal((2, size)), digits).astype(dtype)
            for name, size in [("first", 150_001), ("second", 70_003), ("third", 1)]
        }
    )
    assert_same(kept_by_streaming(model, Options(0.2), 140_001), kept_by_sorting(model, 0.2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_generic_entries_of_a_wide_range_equal_a_sort(dtype):
    rng = np.random.default_rng(3)
    exponents = rng.uniform(-40, 30, (3, 5_000))
    model = Model({"all": (rng.choice([-1, 1], exponents.shape) * 10.0**exponents).astype(dtype)})
    for density in (1e-9, 0.001, 0.37, 0.9999):
        assert_same(kept_by_streaming(model, Options(density), 999), kept_by_sorting(model, density))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_tensors_without_entries_are_passed_over(density, scope):
    model = Model({"none": np.zeros((2, 0)), "some": np.arange(20.0).reshape(2, 10), "nil": np.zeros((2, 0))})
    assert_same(kept_by_streaming(model, Options(density, scope), 3), kept_by_sorting(model, density))


def test_zero_is_the_threshold_where_more_is_kept_than_there_is():
    model = Model({"a": np.array([[0.0, 2.0, 0.0]]), "b": np.array([[0.0, -1.0, 0.0]])})
    assert_same(kept_by_streaming(model, Options(0.9), 2), model.tensors)


def test_uncut_models_and_tensors_by_themselves_take_no_passes_and_float32_one_as_a_rule():
    survey = MagnitudeSurvey()
    assert survey.reads(Options(0.2), torch.float32) == 1
    assert survey.reads(Options(0.2), torch.float64) == 3
    for options in (Options(0.0), Options(1.0), Options(0.2, "tensor")):
        assert survey.passes(options, torch.float32) == survey.reads(options, torch.float32) == 0


SIZE = 300_001
RNG = np.random.default_rng(7)


def skewed(values):
    """Sampled entries tell nothing of the others: zeros and ones, where others are `values`."""
    tensor = torch.full((1, SIZE), float("nan"))
    sampled = torch.zeros(SIZE, dtype=torch.bool)

    def read(start, stop):
        sampled[start:stop] = True
        return tensor[:, start:stop]

    take_sample(TensorChunks(1, SIZE, SIZE, read), 32)
    array = values.astype(np.float32).copy()
    array[:, sampled.numpy()] = RNG.integers(0, 2, (len(values), int(sampled.sum())))
    return array


DISTRIBUTIONS = {
    "normal": RNG.standard_normal((2, SIZE)),
    "few values": RNG.integers(-4, 5, (2, SIZE)) * 2.0**-13,
    "common values among others": np.where(RNG.random((2, SIZE)) < 0.9, 0.5, RNG.standard_normal((2, SIZE))),
    "all alike": np.full((2, SIZE), -3.0),
    "zeros": np.zeros((2, SIZE)),
    "nearly all zero": np.where(RNG.random((2, SIZE)) < 1e-4, 1.0, 0.0),
    "wide": 10.0 ** RNG.uniform(-44, 38, (2, SIZE)),
    "rows of their own scale": np.repeat(10.0 ** RNG.uniform(-3, 3, (2, 301)), 1000, axis=1)[:, :SIZE]
    * RNG.standard_normal((2, 301_000))[:, :SIZE],
    "sampled small": skewed(RNG.uniform(5, 6, (2, SIZE))),
    "sampled large": skewed(RNG.uniform(1e-9, 1e-8, (2, SIZE))),
    "sampled between": skewed(np.where(RNG.random((2, SIZE)) < 0.5, 0.25, 7.0)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.999])
def test_whatever_the_sample_says_the_cut_is_that_of_a_sort(name, scope, density):
    array = DISTRIBUTIONS[name].astype(np.float32)
    parts = (
        {"all": array} if scope == "tensor" else dict(zip("abc", np.split(array, (1, 280_000), axis=1), strict=True))
    )
    model = Model(parts)
    assert_same(kept_by_streaming(model, Options(density, scope), 1 << 20), kept_by_sorting(model, density))


@quick
@given(st.integers(1, 5), st.lists(st.integers(0, 9_000), min_size=1, max_size=6), st.integers(0, 2**31))
def test_pieces_of_a_model_with_many_ties_cut_it_alike(tasks, sizes, seed):
    rng = np.random.default_rng(seed)
    model = Model(
        {str(n): rng.integers(-5, 6, (tasks, size)).astype(np.float32) / 7 for n, size in enumerate([*sizes, 40_000])}
    )
    assert_same(kept_by_streaming(model, Options(0.3), 4_099), kept_by_sorting(model, 0.3))


def test_passes_after_the_threshold_is_found_read_nothing():
    array = DISTRIBUTIONS["few values"].astype(np.float32)
    survey, options, reads = MagnitudeSurvey(), Options(0.2), []

    def read(start, stop):
        reads[-1] += stop - start
        return torch.from_numpy(array)[:, start:stop]

    chunks, state = TensorChunks(2, SIZE, 1 << 20, read), None
    for step in range(survey.passes(options, torch.float32)):
        reads.append(0)
        state = survey.finish(step, survey.measure(step, "all", chunks, state, options), state, options, torch.float32)
    assert reads[0] < SIZE / 200
    assert reads[1:] == [SIZE, 0, 0, 0]


def test_partial_sums_may_be_formed_in_groups():
    """Workers add up what neighbours measured; the grouping changes no cut."""
    rng = np.random.default_rng(5)
    model = Model({name: rng.integers(-3, 4, (2, 11)).astype(np.float32) for name in "abcd"})
    survey, options = MagnitudeSurvey(), Options(0.35)
    chunks = {name: chunks_of(array, 4) for name, array in model.tensors.items()}
    states = {"left": None, "pairs": None}
    for step in range(survey.passes(options, torch.float32)):
        for grouping, state in states.items():
            a, b, c, d = [survey.measure(step, name, chunks[name], state, options) for name in chunks]
            groups = [a, b, c, d] if grouping == "left" else [iadd(a, b), iadd(c, d)]
            total = reduce(iadd, groups)
            states[grouping] = survey.finish(step, total, state, options, torch.float32)
    for name in chunks:
        left, pairs = [survey.for_tensor(name, chunks[name], state, options) for state in states.values()]
        assert left == pairs
