"""Masks of one bit an entry, against NumPy's and against shifts written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.bits import pack, packed_bytes, unpack


def packed_by_hand(mask):
    """Return the bytes, the first entry in the lowest bit."""
    return [sum(bit << place for place, bit in enumerate(mask[at : at + 8])) for at in range(0, len(mask), 8)]


@pytest.mark.parametrize("length", range(41))
def test_every_length_comes_back(length):
    mask = torch.rand(length, generator=torch.Generator().manual_seed(length)) < 0.5
    packed = pack(mask)
    assert (packed.dtype, packed.shape) == (torch.uint8, (packed_bytes(length),))
    assert packed.tolist() == packed_by_hand(mask.tolist())
    assert packed.tolist() == np.packbits(mask.numpy(), bitorder="little").tolist()
    found = unpack(packed, length)
    assert (found.dtype, found.shape) == (torch.bool, (length,))
    assert torch.equal(found, mask)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), max_size=300))
def test_any_mask_comes_back(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    assert pack(mask).tolist() == packed_by_hand(bits)
    assert unpack(pack(mask), len(bits)).tolist() == bits


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
def test_last_byte_is_filled_up_with_zeros(length, value):
    mask = torch.full((length,), value)
    assert np.unpackbits(pack(mask).numpy(), bitorder="little").sum() == length * value
    assert unpack(pack(mask), length).tolist() == [value] * length


def test_shape_is_flattened_in_the_order_of_rows():
    mask = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(pack(mask), pack(mask.reshape(-1)))
    assert torch.equal(pack(mask.transpose(0, 2)), pack(mask.transpose(0, 2).contiguous()))
    assert torch.equal(unpack(pack(mask), 30).reshape(3, 5, 2), mask)


@pytest.mark.parametrize("cut", [8, 16, 24])
def test_pieces_that_begin_with_a_byte_pack_to_the_bytes_of_the_whole(cut):
    mask = torch.rand(37, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(torch.cat([pack(mask[:cut]), pack(mask[cut:])]), pack(mask))
    assert torch.equal(unpack(pack(mask)[cut // 8 :], 37 - cut), mask[cut:])


def test_unpacking_leaves_the_bytes_as_they_are_and_shares_no_memory():
    packed = pack(torch.ones(9, dtype=torch.bool))
    unpack(packed, 9).zero_()
    assert packed.tolist() == [255, 1]


def test_bytes_of_a_mask():
    assert [packed_bytes(count) for count in (0, 1, 7, 8, 9, 16, 17, 2**40)] == [0, 1, 1, 1, 2, 2, 3, 2**37]
