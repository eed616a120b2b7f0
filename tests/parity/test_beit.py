"""BEiT against transformers, BEiT-2's classifier against timm: scores, gradients, and files both ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from multiway.systems.beit import LAYOUTS, BEiT, Config
from tests.contracts.toys import randomize
from tests.parity.originals import check_gradients, fill, group, saved, saved_gradients, timms

pytestmark = pytest.mark.parity
SMALL = Config(dim=48, depth=3, heads=4, hidden=192, patch=8, image_px=32)
MIM = dataclasses.replace(SMALL, bias="shared", codes=19)
CONFIGS = {
    "masked": MIM,
    "masked, with positions": dataclasses.replace(MIM, bias="none", positions="learned", layer_scale=0.0),
    "classifier": dataclasses.replace(SMALL, classes=7),
}


def hidden_patches() -> Tensor:
    return torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.4


def original(config: Config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    settings = transformers.BeitConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden,
        image_size=config.image_px,
        patch_size=config.patch,
        vocab_size=config.codes or 1,
        num_labels=config.classes or 2,
        layer_norm_eps=1e-6,  # its own, 1e-12, is not what the weights were trained with
        use_mask_token=bool(config.codes),
        use_absolute_position_embeddings=config.positions == "learned",
        use_relative_position_bias=config.bias == "layer",
        use_shared_relative_position_bias=config.bias == "shared",
        layer_scale_init_value=config.layer_scale,
    )
    kind = transformers.BeitForImageClassification if config.classes else transformers.BeitForMaskedImageModeling
    return randomize(kind(settings)).eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scores_gradients_and_files_equal_transformers(config: Config, tmp_path: Path) -> None:
    theirs, ours = original(config), BEiT(config)
    fill(ours, saved(theirs, tmp_path / "weights"), LAYOUTS["transformers"])

    image = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    if config.classes:
        want, got = theirs(pixel_values=image.float() / 127.5 - 1).logits, ours.classify(image)
    else:
        want = theirs(pixel_values=image.float() / 127.5 - 1, bool_masked_pos=hidden_patches()).logits
        got = ours.code_logits(ours.encoder(ours.pixels(image), hide=hidden_patches())[:, 1:])
    assert want.std() > 0.2, "scores of constants would compare nothing"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    for scores in (want, got):
        (scores * weight).sum().backward()
    check_gradients(ours, saved_gradients(theirs, tmp_path / "gradients"), LAYOUTS["transformers"])


def test_beit2s_classifier_equals_timms(tmp_path: Path) -> None:
    shape = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}
    theirs = timms("beitv2_base_patch16_224", tmp_path / "reference.safetensors", **shape)
    ours = BEiT(dataclasses.replace(SMALL, image_px=(32, 48), classes=7, mean=IMAGENET_MEAN, std=IMAGENET_STD))
    fill(ours, group(theirs, "state."), LAYOUTS["timm"])
    scores = ours.classify(theirs["image"])
    assert theirs["scores"].std() > 0.2
    torch.testing.assert_close(scores, theirs["scores"], rtol=0, atol=1e-5)
    (scores * theirs["weight"]).sum().backward()
    check_gradients(ours, group(theirs, "grad."), LAYOUTS["timm"])
