"""Bits in bytes, and back."""

import pytest
import torch

from fxprune.rewrite.files.packing import pack, unpack


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (9,), (3, 5), (2, 3, 3, 7), ()])
def test_there_and_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_the_order_of_bits_is_that_of_files_written_before():
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 1] = mask[1, 7] = True
    assert pack(mask).tolist() == [2, 128]


def test_a_mask_that_is_not_contiguous():
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack(pack(mask.t()), torch.Size([6, 4])), mask.t())


def test_bits_beyond_the_end():
    with pytest.raises(ValueError, match="beyond the end"):
        unpack(torch.tensor([8], dtype=torch.uint8), torch.Size([3]))
