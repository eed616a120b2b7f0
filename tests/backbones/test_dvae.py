"""DALL-E's encoder: its size, its pixels, the names of its files, and transformers' copy of it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from multiway.backbones.dvae import DiscreteVAE, lanczos
from multiway.errors import ConfigError, ConversionError
from tests.contracts.toys import randomize

SMALL = {"codes": 23, "dim": 16}


def pictures(height: int = 64, width: int = 48) -> Tensor:
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_it_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = DiscreteVAE()
    assert sum(p.numel() for p in model.parameters()) == 53_786_240


@pytest.mark.parametrize(("height", "width"), [(32, 24), (16, 12), (64, 48)])
def test_pictures_are_resized_as_pillow_does(height: int, width: int) -> None:
    found = lanczos(pictures(), height, width)
    for image, own in zip(pictures(), found, strict=True):
        want = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.LANCZOS)
        apart = np.abs(np.asarray(want).astype(int) - own.permute(1, 2, 0).numpy())
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def test_codes_are_those_of_transformers_copy() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.FlavaImageCodebook(
        transformers.FlavaImageCodebookConfig(hidden_size=16, vocab_size=23)
    ).eval()
    randomize(theirs)
    ours = DiscreteVAE(**SMALL).load_published(theirs.state_dict())
    x = lanczos(pictures(), 32, 24) / 255 * 0.8 + 0.1
    want = theirs(x)
    assert want.std() > 0.1
    torch.testing.assert_close(ours.logits(x), want, rtol=1e-5, atol=1e-5)
    codes = ours(pictures())
    assert codes.shape == (2, 4 * 3) and len(codes.unique()) > 1
    assert torch.equal(codes, theirs.get_codebook_indices(x).flatten(1))


def published(model: DiscreteVAE, hub: bool) -> dict[str, Tensor]:
    """A state dict under the names of masked.md 3."""
    rules = (
        (r"stem\.", "blocks.input."),
        (r"head\.", "blocks.output.conv."),
        (r"stages\.(\d)\.(\d)\.", r"blocks.group_\1.group.block_\2." if hub else r"blocks.group_\1.block_\2."),
        (r"convs\.(\d)", r"res_path.path.conv_\1" if hub else r"res_path.conv_\1"),
        ("shortcut", "id_path"),
        (("weight", "weight"), ("bias", "bias")) if hub else (("weight$", "w"), ("bias$", "b")),
    )
    result = {}
    for name, tensor in model.state_dict().items():
        for rule in (*rules[:-1], *rules[-1]):
            name = re.sub(*rule, name)
        result[name] = tensor
    return result


@pytest.mark.parametrize("hub", [True, False], ids=["hub", "openai"])
def test_files_of_both_layouts_are_read(hub: bool) -> None:
    source = randomize(DiscreteVAE(**SMALL))
    state = published(source, hub)
    kind = ("weight", "group.block_1.res_path.path") if hub else ("w", "block_1.res_path")
    assert f"blocks.group_3.{kind[1]}.conv_1.{kind[0]}" in state and f"blocks.output.conv.{kind[0]}" in state
    model = DiscreteVAE(**SMALL).load_published(state)
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in model.state_dict().items())


def test_other_files_and_other_pixels_are_refused() -> None:
    model = DiscreteVAE(**SMALL)
    state = published(model, hub=True)
    del state["blocks.input.bias"]
    with pytest.raises(ConversionError, match="not those of DALL-E's encoder(?s:.*)stem.bias"):
        model.load_published(state)
    with pytest.raises(ConfigError, match="0 to 255; the picture is torch.float32"):
        model(pictures().float())
