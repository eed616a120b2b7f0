"""MAE against transformers: predictions, loss, gradients, files both ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from multiway.systems.mae import LAYOUTS, MAE, Config, MaskedAutoencoding
from multiway.types import Batch
from tests.contracts.toys import randomize
from tests.parity.originals import check_gradients, fill, saved, saved_gradients

pytestmark = pytest.mark.parity
SMALL = Config(
    dim=48, depth=3, heads=4, hidden=96, patch=8, image_px=32, decoder_dim=32, decoder_depth=2, decoder_heads=2
)


def original(config: Config) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = transformers.ViTMAEConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden,
        image_size=config.image_px,
        patch_size=config.patch,
        decoder_hidden_size=config.decoder_dim,
        decoder_num_hidden_layers=config.decoder_depth,
        decoder_num_attention_heads=config.decoder_heads,
        decoder_intermediate_size=4 * config.decoder_dim,
        norm_pix_loss=config.normed,
        layer_norm_eps=1e-6,
    )
    return transformers.ViTMAEForPreTraining(settings).eval()


def as_on_the_hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 writes the decoder's blocks under a name that no file on the hub has."""
    return {key.replace("decoder_encoder.layer.", "decoder_layers."): value for key, value in state.items()}


def drawn(noise: Tensor, ratio: float = 0.75) -> Batch:
    """Random pictures; patches with the least noise are kept, as the original says."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (len(noise), 3, 32, 32), generator=generator, dtype=torch.uint8)
    keep = noise.argsort(1)[:, : int(noise.shape[1] * (1 - ratio))].sort(1).values
    hide = torch.ones_like(noise, dtype=torch.bool).scatter(1, keep, False)
    return {"image": image, "image_keep": keep, "image_hidden": hide.flatten().nonzero()[:, 0]}


@pytest.mark.parametrize("normed", [True, False])
def test_predictions_loss_gradients_and_files_equal_transformers(normed: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, normed=normed)
    theirs, objective = randomize(original(config)), MaskedAutoencoding(MAE(config))
    fill(objective.model, as_on_the_hub(saved(theirs, tmp_path / "weights")), LAYOUTS["transformers"])

    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    batch = drawn(noise)
    want = theirs(pixel_values=objective.model.pixels(batch["image"]), noise=noise)
    predicted = objective.model.predict(batch["image"], batch["image_keep"], batch["image_hidden"])
    assert torch.equal(want.mask.flatten().nonzero()[:, 0], batch["image_hidden"])
    assert want.logits.std() > 0.2
    torch.testing.assert_close(predicted, want.logits.flatten(0, 1)[batch["image_hidden"]], rtol=0, atol=1e-5)

    loss = objective(batch, objective.counts(batch)).loss
    torch.testing.assert_close(loss, want.loss, rtol=1e-6, atol=0)
    loss.backward()
    want.loss.backward()
    theirs_gradients = as_on_the_hub(saved_gradients(theirs, tmp_path / "gradients"))
    check_gradients(objective.model, theirs_gradients, LAYOUTS["transformers"])
