"""EMR-Merging: one vector, a mask of one bit and one scale per task (Huang et al. 2024, arXiv:2405.17461, eq. 2 to 5).

The sums in the scales are over the whole model, and where the tasks' sum cancels no sign is elected.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import superpose
from superpose.maths.bits import unpack
from superpose.maths.streaming import TensorChunks
from superpose.methods.emr import EmrOptions, EmrSurvey, emr, mask_name, mask_names

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]


def elected(rows):
    """Return the unified vector and the masks, entry by entry."""
    unified, masks = np.zeros(rows.shape[1]), np.zeros(rows.shape, bool)
    for place, column in enumerate(rows.T):
        sign = np.sign(sum(column))
        agreeing = [abs(value) for value in column if np.sign(value) == sign]
        if sign != 0 and agreeing:
            unified[place] = sign * max(agreeing)
            masks[:, place] = np.sign(column) == sign
    return unified, masks


def scales_of(rows, unified, masks):
    shared = [sum(abs(unified[mask])) for mask in masks]
    return [sum(abs(row)) / total if total > 0 else 1.0 for row, total in zip(rows, shared, strict=True)]


def merge(rows):
    """Return unified vector, masks and scales of a tensor that is the whole model."""
    task_vectors = torch.as_tensor(rows)
    merged = emr(task_vectors, EmrOptions())
    masks = [unpack(packed, task_vectors[0].numel()).numpy() for packed in merged.beside]
    return merged.tensor, np.array(masks), merged.stats["scales"]


def random_rows(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("shape", [(37,), (6, 9), (3, 2, 3, 3)])
def test_equals_the_formula(shape, tasks, dtype, tolerance):
    task_vectors = random_rows(tasks, *shape, dtype=dtype)
    unified, masks, scales = merge(task_vectors)
    rows = task_vectors.double().numpy().reshape(tasks, -1)
    expected, expected_masks = elected(rows)
    assert (unified.shape, unified.dtype) == (shape, dtype)
    np.testing.assert_allclose(unified.double().numpy().ravel(), expected, rtol=tolerance, atol=0)
    np.testing.assert_array_equal(masks, expected_masks)
    np.testing.assert_allclose(scales, scales_of(rows, expected, expected_masks), rtol=tolerance)


def integer_rows(tasks, entries):
    values = st.lists(st.integers(-2, 2), min_size=tasks * entries, max_size=tasks * entries)
    return values.map(lambda numbers: np.array(numbers, float).reshape(tasks, entries))


@settings(deadline=None, max_examples=150)
@given(st.tuples(st.integers(1, 5), st.integers(1, 19)).flatmap(lambda size: integer_rows(*size)))
def test_equals_the_formula_where_magnitudes_tie_and_sums_cancel(rows):
    unified, masks, scales = merge(rows)
    expected, expected_masks = elected(rows)
    np.testing.assert_array_equal(unified.numpy(), expected)
    np.testing.assert_array_equal(masks, expected_masks)
    np.testing.assert_allclose(scales, scales_of(rows, expected, expected_masks), rtol=1e-14)


def rebuilt_by_formula(base, tuned):
    """Return each task's model by the formula on the flattened model, and the scales."""
    flat = [np.concatenate([model[name].double().numpy().ravel() for name in base]) for model in (base, *tuned)]
    rows = np.array(flat[1:]) - flat[0]
    unified, masks = elected(rows)
    scales = scales_of(rows, unified, masks)
    models = [flat[0] + scale * mask * unified for scale, mask in zip(scales, masks, strict=True)]
    ends = np.cumsum([tensor.numel() for tensor in base.values()])[:-1]
    return [dict(zip(base, np.split(model, ends), strict=True)) for model in models], scales


def whole_numbers(rng, dtype):
    """Return a model whose differences to another are exact."""
    shapes = {"a.weight": (3, 7), "b.bias": (5,), "c.norm.weight": (9,), "d.scale": (), "e.weight": (1, 1)}
    return {name: torch.from_numpy(np.array(rng.integers(-3, 4, shape))).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_equals_the_formula_on_the_flattened_model(dtype, tolerance, seed, tasks):
    rng = np.random.default_rng(seed)
    base, *tuned = (whole_numbers(rng, dtype) for _ in range(tasks + 1))
    made = superpose.merge_to_set(base, tuned)
    models, scales = rebuilt_by_formula(base, tuned)
    np.testing.assert_allclose(made.scales, scales, rtol=1e-12)
    for name, expected in zip(made.names, models, strict=True):
        found = made.model(name, base)
        assert found.keys() == base.keys()
        for key, tensor in found.items():
            assert (tensor.shape, tensor.dtype) == (base[key].shape, dtype)
            np.testing.assert_allclose(tensor.double().numpy().ravel(), expected[key], rtol=tolerance, atol=tolerance)


def test_survey_in_pieces_sums_over_the_whole_model():
    rng, survey = np.random.default_rng(1), EmrSurvey()
    stacks = [torch.from_numpy(rng.standard_normal((3, size))) for size in (4, 0, 11)]
    chunks = [TensorChunks(3, stack.shape[1], 3, lambda a, b, s=stack: s[:, a:b]) for stack in stacks]
    assert survey.passes(EmrOptions(), torch.float64) == 1
    total = sum(survey.measure(0, "any", part, None, EmrOptions()) for part in chunks)
    state = survey.finish(0, total, None, EmrOptions(), torch.float64)
    whole = torch.cat(stacks, dim=1).numpy()
    np.testing.assert_allclose(state.by_task, scales_of(whole, *elected(whole)), rtol=1e-12)
    # Not each tensor's own sums, and not the means of the authors' code for CLIP.
    merged = emr(stacks[0], EmrOptions(), survey=survey.for_tensor("any", chunks[0], state, EmrOptions()).within(0, 4))
    assert merged.stats["scales"] == list(state.by_task)


def test_worked_example_of_the_specification():
    rows = np.array([[1, -2, 0.5], [3, 1, -0.1]])
    unified, masks, scales = merge(rows)
    assert unified.tolist() == [3, -2, 0.5]
    assert masks.tolist() == [[True, True, True], [True, False, False]]
    np.testing.assert_allclose(scales, [3.5 / 5.5, 4.1 / 3], rtol=1e-14)
    np.testing.assert_allclose(scales, [0.6364, 1.3667], atol=5e-5)


def test_one_task_comes_back():
    task_vector = random_rows(1, 23)
    unified, masks, scales = merge(task_vector)
    assert torch.equal(unified, task_vector[0])
    assert masks.all()
    assert scales == [1.0]


def test_identical_tasks_come_back():
    task_vector = random_rows(1, 23)
    unified, masks, scales = merge(task_vector.expand(4, 23))
    assert torch.equal(unified, task_vector[0])
    assert masks.all()
    assert scales == [1.0] * 4


def test_order_of_the_tasks_orders_masks_and_scales_alone():
    rows = torch.randint(-5, 6, (4, 60), generator=torch.Generator().manual_seed(2)).double()
    order = [2, 0, 3, 1]
    (unified, masks, scales), turned = merge(rows), merge(rows[order])
    assert torch.equal(turned[0], unified)
    np.testing.assert_array_equal(turned[1], masks[order])
    np.testing.assert_allclose(turned[2], np.array(scales)[order], rtol=1e-14)


def test_task_of_zeros_has_scale_one_and_an_empty_mask_and_changes_nothing():
    rows = random_rows(3, 40)
    with_zeros = torch.cat([rows[:1], torch.zeros(1, 40, dtype=torch.float64), rows[1:]])
    (unified, masks, scales), found = merge(rows), merge(with_zeros)
    assert torch.equal(found[0], unified)
    assert not found[1][1].any()
    np.testing.assert_array_equal(np.delete(found[1], 1, axis=0), masks)
    assert found[2] == [scales[0], 1.0, *scales[1:]]


@pytest.mark.parametrize("factor", [0.25, 8, -2])
def test_scaling_all_tasks_scales_the_unified_vector_alone(factor):
    rows = random_rows(3, 40)
    (unified, masks, scales), found = merge(rows), merge(factor * rows)
    assert torch.equal(found[0], factor * unified)
    np.testing.assert_array_equal(found[1], masks)
    assert found[2] == scales


def test_degenerate_all_zero():
    unified, masks, scales = merge(np.zeros((3, 12)))
    assert not unified.any()
    assert not masks.any()
    assert scales == [1.0] * 3


def test_degenerate_opposite_tasks_elect_nothing():
    """The authors' code takes -1 for the sign where the sum is 0."""
    unified, masks, scales = merge(np.array([[1.0, -2, 0], [-1, 2, 0]]))
    assert unified.tolist() == [0, 0, 0]
    assert not masks.any()
    assert scales == [1.0, 1.0]


def test_degenerate_task_that_is_outvoted_everywhere_keeps_nothing():
    unified, masks, scales = merge(np.array([[3.0, -3], [-1, 1]]))
    assert unified.tolist() == [3, -3]
    assert masks.tolist() == [[True, True], [False, False]]
    assert scales == [1.0, 1.0]


@pytest.mark.parametrize("entries", [0, 1, 7, 8, 9])
def test_degenerate_sizes_around_a_byte(entries):
    rows = np.random.default_rng(entries).standard_normal((3, entries))
    merged = emr(torch.from_numpy(rows), EmrOptions())
    expected, masks = elected(rows)
    assert merged.tensor.tolist() == expected.tolist()
    assert [packed.shape for packed in merged.beside] == [((entries + 7) // 8,)] * 3
    assert [unpack(packed, entries).tolist() for packed in merged.beside] == masks.tolist()
    assert mask_names("w", entries, 3) == [(mask_name("w", i), "U8", ((entries + 7) // 8,)) for i in range(3)]


@pytest.mark.parametrize("first", ["a.weight", "z.weight"])
def test_degenerate_tensor_without_entries_first_or_last(first):
    base = {first: torch.zeros(0, 4), "m.weight": torch.zeros(2, 2)}
    tuned = [{first: torch.zeros(0, 4), "m.weight": torch.tensor([[1.0, 2], [3, -4]])} for _ in range(2)]
    made = superpose.merge_to_set(base, tuned)
    assert made.scales == (1.0, 1.0)
    rebuilt = made.model("model 2", base)
    assert rebuilt[first].shape == (0, 4)
    assert torch.equal(rebuilt["m.weight"], tuned[1]["m.weight"])


def test_degenerate_bfloat16_with_many_entries_that_did_not_move():
    base = {"w": random_rows(1, 30, 30, dtype=torch.float32)[0].bfloat16()}
    noise = random_rows(4, 30, 30, dtype=torch.float32)[1:]
    tuned = [{"w": (base["w"].float() + 0.002 * step).bfloat16()} for step in noise]
    assert 0.3 < (tuned[0]["w"] == base["w"]).float().mean() < 1
    made = superpose.merge_to_set(base, tuned)
    models, scales = rebuilt_by_formula(base, tuned)
    np.testing.assert_allclose(made.scales, scales, rtol=1e-12)
    for name, expected in zip(made.names, models, strict=True):
        found = made.model(name, base)["w"]
        assert found.dtype == torch.bfloat16
        np.testing.assert_allclose(found.double().numpy().ravel(), expected["w"], rtol=2**-8, atol=0)


def test_degenerate_tiny_and_large_values():
    for size in (1e-38, 1e37):  # a sum of squares, or of magnitudes in float32, would leave its range
        rows = (size * random_rows(3, 100)).float()
        _, masks, scales = merge(rows)
        exact = rows.double().numpy()
        expected, expected_masks = elected(exact)
        np.testing.assert_array_equal(masks, expected_masks)
        np.testing.assert_allclose(scales, scales_of(exact, expected, expected_masks), rtol=1e-6)


def test_tied_tensors_come_back_under_each_of_their_names():
    shared = torch.zeros(3, 4)
    base = {"embed.weight": shared, "head.weight": shared}
    moved = torch.arange(12.0).reshape(3, 4)
    made = superpose.merge_to_set(base, [{"embed.weight": moved, "head.weight": moved}])
    rebuilt = made.model("model 1", base)
    assert rebuilt.keys() == base.keys()
    assert torch.equal(rebuilt["head.weight"], moved)


def test_defaults_there_are_no_options():
    assert dataclasses.fields(EmrOptions) == ()
    with pytest.raises(superpose.SuperposeError, match="scaling_factor"):
        superpose.merge_tensors({"w": torch.zeros(2)}, [{"w": torch.ones(2)}], "emr", scaling_factor=2.0)
