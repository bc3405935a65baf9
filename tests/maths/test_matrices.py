"""Tensors as matrices: which act as one, and what is stacked where."""

import pytest
import torch

from superpose.kinds import Kind
from superpose.maths.matrices import acts_as_matrix, as_matrices, is_depthwise


@pytest.mark.parametrize(
    ("kind", "shape", "acts"),
    [
        (Kind.LINEAR, (4, 3), True),
        (Kind.LINEAR, (2, 4, 3), True),
        (Kind.LINEAR, (4,), False),
        (Kind.CONV, (4, 3, 2, 2), True),
        (Kind.CONV, (4, 3, 5), True),
        (Kind.CONV, (4, 1, 3, 3), False),
        (Kind.LINEAR, (4, 1), True),
        (Kind.EMBEDDING, (4, 3), False),
        (Kind.HEAD, (4, 3), False),
        (Kind.NORM, (4,), False),
        (Kind.SCALAR, (), False),
    ],
)
def test_linear_maps_and_mixing_convolutions_act_as_matrices(kind, shape, acts):
    assert acts_as_matrix(kind, shape) is acts


def test_only_convolutions_of_one_input_channel_are_depthwise():
    assert is_depthwise(Kind.CONV, (8, 1, 3, 3))
    assert not is_depthwise(Kind.CONV, (8, 2, 3, 3))
    assert not is_depthwise(Kind.LINEAR, (8, 1))


def numbered(*shape):
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_linear_map_is_one_matrix_of_every_task():
    stack = numbered(2, 4, 3)
    assert torch.equal(as_matrices(stack, Kind.LINEAR), stack[None])


def test_experts_are_as_many_matrices_of_every_task():
    stack = numbered(2, 5, 4, 3)
    maps = as_matrices(stack, Kind.LINEAR)
    assert maps.shape == (5, 2, 4, 3)
    for expert in range(5):
        assert torch.equal(maps[expert], stack[:, expert])


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 2, 2), (4, 3, 2, 2, 2)])
def test_convolution_maps_inputs_of_all_kernel_places_to_outputs(shape):
    stack = numbered(2, *shape)
    (matrices,) = as_matrices(stack, Kind.CONV)
    assert matrices.shape == (2, 4, stack[0, 0].numel())
    for task in range(2):
        for out in range(4):
            assert torch.equal(matrices[task, out], stack[task, out].flatten())


@pytest.mark.parametrize(
    ("kind", "shape"), [(Kind.LINEAR, (4, 3)), (Kind.LINEAR, (2, 4, 3)), (Kind.CONV, (4, 3, 2, 2))]
)
def test_merged_maps_reshaped_are_the_merged_tensor(kind, shape):
    stack = numbered(3, *shape)
    assert torch.equal(as_matrices(stack, kind).sum(dim=1).reshape(shape), stack.sum(dim=0))
