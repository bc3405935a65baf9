"""Every registered method keeps the laws of merging: a new method is covered by being there.

    single   one task, nothing trimmed, scaling factor 1: that task comes back
    same     identical tasks give that task
    perm     the order of the tasks does not matter
    zero     a task that is the base changes nothing
    scale    a common positive factor of all task vectors comes out

A method names in `breaks` the laws it breaks by design; its reference test holds what it does instead.
"""

from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import superpose.methods  # noqa: F401 - registers the methods
from superpose.kinds import MATRIX_KINDS, Kind
from superpose.maths.randomness import Generator
from superpose.maths.streaming import TensorChunks
from superpose.options import build_options, option_specs
from superpose.registry import LAWS, registered

METHODS = registered()
KINDS = [kind for kind in Kind if kind is not Kind.BUFFER]
SHAPES = {
    Kind.LINEAR: [(4, 5), (1, 6), (6, 1), (1, 1), (2, 3, 4)],
    Kind.CONV: [(4, 3, 2), (3, 2, 2, 2), (1, 2, 3), (5, 1, 3), (1, 1, 1, 1)],
    Kind.NORM: [(7,), (1,)],
    Kind.BIAS: [(7,), (1,)],
    Kind.EMBEDDING: [(6, 4), (1, 5), (5, 1), (7,)],
    Kind.HEAD: [(3, 6), (1, 6), (6, 1), (1, 1)],
    Kind.SCALAR: [(), (1,)],
}
NAMES = ("first", "second", "third", "fourth", "fifth", "sixth")
# Methods whose `density` counts other entries than those of the tensor, or none exactly.
COUNTED_OTHERWISE = {
    "dare": "density is a probability",
    "dare_ties": "density is a probability",
    "della": "density is a probability",
    "pcb": "the entry at the threshold gets scale 0",
}

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def numbers(tasks, names=None):
    """Return the random numbers of a tensor for so many tasks."""
    return Generator(0, "weight", tuple(names or NAMES[:tasks]))


def merge(method, task_vectors, options, kind, *, base=None, weights=None, names=None):
    """Return the merged task vector, also of a method that acts on weights."""
    base = normal(task_vectors.shape[1:], task_vectors.dtype, seed=99) if base is None else base
    given = {"kind": kind, "base": base, "weights": weights, "generator": numbers(len(task_vectors), names)}
    if method.acts_on == "task_vectors":
        return method(task_vectors, options, **given).tensor
    return method(base + task_vectors, options, **given).tensor - base


def fitting(method, tasks):
    """Return a number of tasks that the method can merge, near to `tasks`."""
    fewest, most = method.models
    return max(fewest, min(tasks, most or tasks))


def normal(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def matrix_shape(kind, out, in_):
    """Return a shape of that kind; kernels have two input channels or more, so that they act as matrices."""
    if kind is Kind.SCALAR:
        return ()
    if kind in (Kind.NORM, Kind.BIAS):
        return (out,)
    return (out, in_ + 1, 2) if kind is Kind.CONV else (out, in_)


def assert_close(actual, expected, tolerance=1e-8):
    """Compare to the size of the weights (about 1) or of what is expected, whichever is larger."""
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def single(merged, task_vectors, factor):
    return merged(task_vectors[:1]), task_vectors[0]


def same(merged, task_vectors, factor):
    return merged(task_vectors[:1].expand(task_vectors.shape)), task_vectors[0]


def perm(merged, task_vectors, factor):
    order = torch.arange(len(task_vectors)).flip(0).roll(1, 0)
    names = [NAMES[index] for index in order.tolist()]
    return merged(task_vectors[order], names=names), merged(task_vectors)


def zero(merged, task_vectors, factor):
    zeros = torch.zeros_like(task_vectors[:1])
    return merged(torch.cat([task_vectors[:1], zeros, task_vectors[1:]])), merged(task_vectors)


def scale(merged, task_vectors, factor):
    return merged(factor * task_vectors), factor * merged(task_vectors)


CHECKS = {"single": single, "same": same, "perm": perm, "zero": zero, "scale": scale}


def applies(method, law):
    """Whether the method can merge as many tasks as the law is about."""
    fewest, most = method.models
    needed = {"single": 1, "zero": fewest + 1}.get(law, fewest)
    return fewest <= needed <= (most or needed)


HELD = [
    pytest.param(method, law, kind, id=f"{method.name}-{law}-{kind}")
    for method in METHODS
    for law in LAWS
    for kind in KINDS
    if method.holds(law, kind) and applies(method, law)
]
BROKEN = [
    pytest.param(method, law, breach, id=f"{method.name}-{law}")
    for method in METHODS
    for law, breach in method.breaks.items()
]


def test_every_law_has_its_check():
    assert set(CHECKS) == set(LAWS)


@pytest.mark.parametrize(("method", "law", "kind"), HELD)
@settings(deadline=None, max_examples=8)
@given(
    tasks=st.integers(1, 5),
    out=st.integers(1, 7),
    in_=st.integers(1, 7),
    seed=st.integers(0, 2**32),
    factor=st.sampled_from([1e-3, 0.5, 3.0, 1e3]),
)
def test_law_holds(method, law, kind, tasks, out, in_, seed, factor):
    check_law(method, law, kind, normal((tasks, *matrix_shape(kind, out, in_)), seed=seed), factor, 1e-8)


def check_law(method, law, kind, task_vectors, factor, tolerance):
    """Check a law on as many of the task vectors as the method can merge and the law is about."""
    fewest, most = method.models
    fewest = max(fewest, 2) if law == "same" and "single" in method.breaks else fewest
    task_vectors = task_vectors[: most - (law == "zero") if most else None]
    if len(task_vectors) < fewest:
        return
    merged = partial(merge_plain, method, method.plain_options(), kind)
    actual, expected = CHECKS[law](merged, task_vectors, factor)
    assert_close(actual, expected, tolerance)


def merge_plain(method, options, kind, task_vectors, names=None):
    return merge(method, task_vectors, options, kind, names=names)


@pytest.mark.parametrize(("method", "law", "kind"), HELD)
def test_law_holds_in_float32(method, law, kind):
    check_law(method, law, kind, normal((3, *matrix_shape(kind, 12, 9)), torch.float32), 3.0, 1e-5)


@pytest.mark.parametrize(("method", "law", "breach"), BROKEN)
def test_declared_breach_is_one(method, law, breach):
    """A law that holds for a kind must not be declared broken for it; a scalar may be too small to show it."""
    for kind in set(KINDS) & breach.kinds - {Kind.SCALAR}:
        # A common part, without which tasks have nothing to agree on.
        task_vectors = 1 + normal((fitting(method, breach.tasks), *matrix_shape(kind, 12, 9)))
        options = method.plain_options()
        actual, expected = CHECKS[law](partial(merge_plain, method, options, kind), task_vectors, 3.0)
        assert float((actual - expected).abs().max()) > 1e-3, kind


@every_method
@every_kind
def test_weights_go_with_their_tasks(method, kind):
    order = [index for index in (2, 0, 1) if index < fitting(method, 3)]
    task_vectors = normal((len(order), *matrix_shape(kind, 6, 5)))
    weights = torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)[: len(order)]
    options, names = method.options(), [NAMES[index] for index in order]
    assert_close(
        merge(method, task_vectors[order], options, kind, weights=weights[order], names=names),
        merge(method, task_vectors, options, kind, weights=weights),
    )


@every_method
@every_kind
@every_dtype
def test_shape_and_dtype_are_kept_and_inputs_left_alone(method, kind, dtype):
    for shape in SHAPES[kind]:
        tasks = fitting(method, 3)
        task_vectors, base = normal((tasks, *shape), dtype), normal(shape, dtype, seed=1)
        weights = torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)[:tasks]
        before = task_vectors.clone(), base.clone(), weights.clone()
        for options in (method.options(), method.plain_options()):
            inputs = task_vectors if method.acts_on == "task_vectors" else base + task_vectors
            given = inputs.clone()
            available = {"kind": kind, "base": base, "weights": weights, "generator": numbers(tasks)}
            merged = method(inputs, options, **available).tensor
            assert merged.shape == shape
            assert merged.dtype == dtype
            assert merged.isfinite().all()
            assert torch.equal(inputs, given)
            merged.mul_(2).add_(1)  # and the result is nobody else's memory
        for tensor, copy in zip((task_vectors, base, weights), before, strict=True):
            assert torch.equal(tensor, copy)


def degenerate_inputs(shape, dtype):
    """Yield task vectors that real checkpoints have and that random numbers are not."""
    task_vectors = normal((3, *shape), dtype)
    yield torch.zeros(3, *shape, dtype=dtype)
    yield torch.zeros(1, *shape, dtype=dtype)
    for task in range(3):
        yield torch.where((torch.arange(3) == task).reshape(3, *[1] * len(shape)), 0, task_vectors)
    yield task_vectors[:1].expand(3, *shape)
    yield torch.stack([task_vectors[0], -task_vectors[0]])
    yield torch.ones(3, *shape, dtype=dtype)
    yield torch.eye(3, dtype=dtype).reshape(3, 3, *[1] * len(shape)).expand(3, 3, *shape)[:, 0]
    # Small updates of weights stored in bfloat16: most vanish, the others are few distinct values.
    weights = normal(shape, dtype, seed=5)
    tuned = (weights.bfloat16() + 2e-3 * task_vectors.bfloat16()).to(dtype)
    yield tuned - weights.bfloat16().to(dtype)
    yield 1e-38 * task_vectors
    yield 1e18 * task_vectors


@every_method
@every_kind
@every_dtype
def test_results_are_finite(method, kind, dtype):
    for shape in SHAPES[kind]:
        for drawn in degenerate_inputs(shape, dtype):
            task_vectors = drawn[: fitting(method, len(drawn))]
            if len(task_vectors) < method.models[0]:
                continue
            for options in (method.options(), method.plain_options()):
                merged = merge(method, task_vectors, options, kind)
                assert merged.shape == shape
                assert merged.isfinite().all()


def values_of(spec):
    """Return the ends of an option's range, or all its choices."""
    ends = [] if spec.range is None else [spec.range.low, spec.range.high]
    flags = [False, True] if spec.type is bool else []
    return [*ends, *flags, *spec.choices, *([None] if spec.optional else [])]


OPTIONS = [
    pytest.param(method, spec.name, value, id=f"{method.name}-{spec.name}-{value}")
    for method in METHODS
    for spec in option_specs(method.options)
    for value in values_of(spec)
]


@pytest.mark.parametrize(("method", "name", "value"), OPTIONS)
def test_ends_of_ranges_and_all_choices_are_accepted_and_give_finite_results(method, name, value):
    accepted = []
    for others in ({}, method.plain):
        options, problems = build_options(method.options, {**others, name: value}, where="", owner=method.name)
        accepted += [] if problems else [options]
        # Refused is an end only together with another option, which the message names.
        assert all(problem.what.count("=") == 0 and name in problem.what for problem in problems)
    for options in accepted:
        for kind in KINDS:
            for shape in SHAPES[kind]:
                task_vectors = normal((fitting(method, 3), *shape), torch.float32)
                assert merge(method, task_vectors, options, kind).isfinite().all()


@every_method
def test_every_option_has_a_help_text_and_a_default_that_is_allowed(method):
    for spec in option_specs(method.options):
        assert spec.help, spec.name
        options, problems = build_options(method.options, {spec.name: spec.default}, where="", owner="")
        assert problems == []
        assert options == method.options()


@every_method
@every_kind
def test_second_run_is_bit_for_bit_the_first(method, kind):
    for shape in SHAPES[kind]:
        task_vectors = normal((fitting(method, 4), *shape), torch.float32)
        first, second = [merge(method, task_vectors.clone(), method.options(), kind) for _ in range(2)]
        assert torch.equal(first, second)


WITH_DENSITY = [
    method
    for method in METHODS
    if "density" in {spec.name for spec in option_specs(method.options)} and method.name not in COUNTED_OTHERWISE
]


@pytest.mark.parametrize("method", WITH_DENSITY, ids=lambda method: method.name)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MATRIX_KINDS], ids=str)
@pytest.mark.parametrize("density", ["0.01", "0.2", "0.29", "0.5", "0.99", "1"])
def test_as_many_entries_are_kept_as_asked_for(method, kind, density):
    options = replace(method.plain_options(), density=float(density))
    for numel in range(1, 101):
        merged = merge(method, normal((1, numel), seed=numel), options, kind)
        assert int(merged.count_nonzero()) == max(1, int(Fraction(density) * numel))


def numbers_of(method, task_vectors, options, kind):
    """Return what the method's survey finds in a model of this one tensor, read seven entries at a time."""
    flat = task_vectors.reshape(len(task_vectors), -1)
    chunks = TensorChunks(
        *flat.shape, 7, lambda start, stop: flat[:, start:stop],
        shape=tuple(task_vectors.shape[1:]), kind=kind, generator=numbers(len(flat)),
    )  # fmt: skip
    state = None
    for step in range(method.survey.passes(options, flat.dtype)):
        value = method.survey.measure(step, "weight", chunks, state, options)
        state = method.survey.finish(step, value, state, options, flat.dtype)
    return method.survey.for_tensor("weight", chunks, state, options)


def merge_in_pieces(method, inputs, options, kind, base, survey):
    """Merge flattened inputs four entries at a time."""
    pieces = []
    for start in range(0, inputs.shape[1], 4):
        stop = min(start + 4, inputs.shape[1])
        available = {"kind": kind, "base": base[start:stop], "generator": numbers(len(inputs)).within(start)}
        if survey is not None:
            available["survey"] = survey.within(start, stop)
        pieces.append(method(inputs[:, start:stop], options, **available).tensor)
    return torch.cat(pieces)


def variants(method):
    """Return the default options and each of their choices."""
    specs = option_specs(method.options)
    changed = [{spec.name: value} for spec in specs for value in spec.choices]
    return [method.options(**{**others, **change}) for change in ({}, *changed) for others in ({}, method.plain)]


@every_method
@every_kind
def test_surveyed_pieces_equal_the_whole(method, kind):
    """Where a tensor may come in pieces, each entry depends on that entry and the survey alone."""
    shape = matrix_shape(kind, 6, 5)
    stack = normal((fitting(method, 3), *shape), torch.float32)
    base = normal(shape, torch.float32, seed=1)
    flat = stack.reshape(len(stack), -1)
    inputs = flat if method.acts_on == "task_vectors" else flat + base.reshape(-1)
    for options in variants(method):
        whole_available = {"kind": kind, "base": base, "generator": numbers(len(flat))}
        whole = method(inputs.reshape(stack.shape), options, **whole_available).tensor
        survey = None if method.survey is None else numbers_of(method, stack, options, kind)
        if method.sees_whole(kind):
            surveyed = method(inputs.reshape(stack.shape), options, **whole_available, survey=survey).tensor
        else:
            surveyed = merge_in_pieces(method, inputs, options, kind, base.reshape(-1), survey)
        assert torch.equal(surveyed.reshape(shape), whole)
