"""Our windows are timm's where nothing is padded, and take pictures of any size."""

from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock

from detrcli.nn.swin import PaddedBlock, PaddedMerging


@torch.no_grad()
def drawn(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("size", [(7, 7), (14, 35), (28, 7)])
def test_whole_windows_attend_as_timms(shift, size):
    block = drawn(
        SwinTransformerBlock(
            16, size, num_heads=4, window_size=7, shift_size=shift, always_partition=True, dynamic_mask=True
        )
    )
    x = torch.randn(2, *size, 16, generator=torch.Generator().manual_seed(1))
    theirs = block(x)
    block.__class__ = PaddedBlock
    torch.testing.assert_close(block(x), theirs, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 8), (7, 8), (5, 1)])
def test_maps_are_merged_as_timms(size):
    merging = drawn(PatchMerging(16))
    x = torch.randn(2, *size, 16, generator=torch.Generator().manual_seed(1))
    theirs = merging(x)
    merging.__class__ = PaddedMerging
    torch.testing.assert_close(merging(x), theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_of_a_map_is_not_seen_by_the_rest_of_it_but_through_attention():
    """Of a map of 7 x 10 the first window is whole: what is padded on the right changes nothing there."""
    block = drawn(SwinTransformerBlock(16, (7, 7), num_heads=4, window_size=7, always_partition=True))
    block.__class__ = PaddedBlock
    x = torch.randn(1, 7, 10, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block(x)[:, :, :7], block(x[:, :, :7]), rtol=0, atol=1e-5)
