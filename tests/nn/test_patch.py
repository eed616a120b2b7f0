from __future__ import annotations

import torch
import torch.nn.functional as F

from multiway.nn.patch import PatchEmbed, patchify, unpatchify

IMAGE = torch.arange(2 * 3 * 6 * 4, dtype=torch.float32).view(2, 3, 6, 4)


def test_patches_are_row_major_and_hold_channel_row_column() -> None:
    patches = patchify(IMAGE, 2)
    assert patches.shape == (2, 6, 12)
    for i, (row, column) in enumerate((r, c) for r in range(3) for c in range(2)):
        block = IMAGE[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patches[1, i], block.flatten())


def test_unpatchify_is_the_inverse() -> None:
    assert torch.equal(unpatchify(patchify(IMAGE, 2), 2, (3, 2)), IMAGE)


def test_the_embedding_is_a_strided_convolution() -> None:
    torch.manual_seed(0)
    embed, image = PatchEmbed(2, 5), torch.randn(2, 3, 6, 4)
    want = F.conv2d(image, embed.weight, embed.bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(image), want)
