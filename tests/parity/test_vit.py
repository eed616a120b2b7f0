"""ViT against transformers and timm: scores, gradients, files both ways; and the sizes that are published."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from multiway.nn.pixels import HALF, IMAGENET_MEAN, IMAGENET_STD
from multiway.systems.vit import LAYOUTS, Config, ViT
from tests.contracts.toys import randomize
from tests.parity.originals import check_gradients, fill, group, saved, saved_gradients, timms

pytestmark = pytest.mark.parity
SMALL = Config(dim=48, depth=3, heads=4, hidden=192, patch=8, image_px=32, classes=7)


def test_scores_gradients_and_files_equal_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.ViTConfig(
        hidden_size=SMALL.dim,
        num_hidden_layers=SMALL.depth,
        num_attention_heads=SMALL.heads,
        intermediate_size=SMALL.hidden,
        image_size=32,
        patch_size=SMALL.patch,
        num_labels=SMALL.classes,
        layer_norm_eps=1e-6,  # its own, 1e-12, is not what the weights were trained with
    )
    theirs, ours = randomize(transformers.ViTForImageClassification(settings)).eval(), ViT(SMALL)
    fill(ours, saved(theirs, tmp_path / "weights"), LAYOUTS["transformers"])

    image = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    want, got = theirs(pixel_values=image.float() / 127.5 - 1).logits, ours.classify(image)
    assert want.std() > 0.2, "scores of constants would compare nothing"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    for scores in (want, got):
        (scores * weight).sum().backward()
    check_gradients(ours, saved_gradients(theirs, tmp_path / "gradients"), LAYOUTS["transformers"])


VARIANTS = {
    "class token": ("vit_base_patch16_224", {}, "timm", {"mean": HALF, "std": HALF}),
    "mean of patches": (
        "vit_base_patch16_224.mae",
        {"global_pool": "avg"},
        "mae",
        {"pool": "mean", "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    ),
}


@pytest.mark.parametrize(("name", "settings", "layout", "own"), VARIANTS.values(), ids=VARIANTS)
def test_scores_gradients_and_files_equal_timms(
    name: str, settings: dict, layout: str, own: dict, tmp_path: Path
) -> None:
    shape = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}
    theirs = timms(name, tmp_path / "reference.safetensors", **shape, **settings)
    ours = ViT(dataclasses.replace(SMALL, image_px=(32, 48), **own))
    fill(ours, group(theirs, "state."), LAYOUTS[layout])
    scores = ours.classify(theirs["image"])
    assert theirs["scores"].std() > 0.2
    torch.testing.assert_close(scores, theirs["scores"], rtol=0, atol=1e-5)
    (scores * theirs["weight"]).sum().backward()
    check_gradients(ours, group(theirs, "grad."), LAYOUTS[layout])
