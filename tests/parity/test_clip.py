"""CLIP and SigLIP against transformers, CLIP against open_clip: vectors, loss, gradients, files both ways."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from multiway.plan import make_plan
from multiway.systems import clip, siglip
from multiway.tasks.retrieval import ImageTextContrast, ImageTextSigmoid
from multiway.types import Batch
from tests.contracts.toys import randomize
from tests.parity.originals import HERE, check_gradients, fill, group, saved, saved_gradients

pytestmark = pytest.mark.parity
LENGTHS = [5, 12, 3, 9]
BOS, EOS, VOCAB = 38, 39, 40
SIZES = {"dim": 48, "depth": 3, "heads": 4, "hidden": 96, "patch": 8, "image_px": 32, "vocab": VOCAB}
CLIP = clip.Config(
    **SIZES, out=20, text_dim=32, text_depth=2, text_heads=2, text_hidden=80, text_tokens=12
)  # fmt: skip
SIGLIP = siglip.Config(**SIZES, text_tokens=12)


def pairs(causal: bool) -> tuple[Batch, Tensor]:
    """Pictures and packed texts as our batch, and the same texts padded with zeros behind their end."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(len(LENGTHS), 3, 32, 32, generator=generator)
    padded = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in zip(padded, LENGTHS):
        row[:length] = torch.randint(1, BOS, (length,), generator=generator)
        row[0], row[length - 1] = BOS, EOS
    plan = make_plan({"image": {"image": [17] * len(LENGTHS)}, "text": {"text": LENGTHS}}, causal_text=causal)
    text = torch.cat([row[:length] for row, length in zip(padded, LENGTHS)])
    return {"plan": plan, "image": image, "text": text}, padded


def compare(ours: Any, batch: Batch, image: Tensor, text: Tensor, loss: Tensor) -> None:
    """Vectors and loss are the original's; gradients of ours are made."""
    got = ours.embed(batch)
    assert image.std() > 0.05, "vectors of constants would compare nothing"
    torch.testing.assert_close(got[0], image, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], text, rtol=0, atol=1e-5)
    own = ours(batch, ours.counts(batch)).loss
    torch.testing.assert_close(own, loss, rtol=1e-5, atol=1e-5)
    own.backward()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(activation: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": VOCAB, "max_position_embeddings": 12, "bos_token_id": BOS, "eos_token_id": EOS}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    settings = transformers.CLIPConfig(
        text_config=text | {"hidden_act": activation, "pad_token_id": 0},
        vision_config=vision | {"hidden_act": activation},
        projection_dim=20,
    )
    theirs = randomize(transformers.CLIPModel(settings)).eval()
    model = clip.CLIP(dataclasses.replace(CLIP, activation=activation))
    layout = clip.LAYOUTS["transformers"]
    fill(model, saved(theirs, tmp_path / "weights"), layout)
    batch, padded = pairs(causal=True)
    output = theirs(pixel_values=batch["image"], input_ids=padded, return_loss=True)
    compare(ImageTextContrast(model), batch, output.image_embeds, output.text_embeds, output.loss)
    output.loss.backward()
    check_gradients(model, saved_gradients(theirs, tmp_path / "gradients"), layout)


def test_siglip_equals_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = text | {"image_size": 32, "patch_size": 8}
    text |= {"vocab_size": VOCAB, "max_position_embeddings": 12, "bos_token_id": BOS, "eos_token_id": EOS}
    settings = transformers.SiglipConfig(text_config=text | {"pad_token_id": 1}, vision_config=vision)
    theirs = randomize(transformers.SiglipModel(settings)).eval()
    model, layout = siglip.SigLIP(SIGLIP), siglip.LAYOUTS["transformers"]
    fill(model, saved(theirs, tmp_path / "weights"), layout)
    batch, padded = pairs(causal=False)
    filled = torch.where(padded == 0, SIGLIP.fill, padded)
    output = theirs(pixel_values=batch["image"], input_ids=filled, return_loss=True)
    compare(ImageTextSigmoid(model), batch, output.image_embeds, output.text_embeds, output.loss)
    output.loss.backward()
    check_gradients(model, saved_gradients(theirs, tmp_path / "gradients"), layout)


def open_clips(settings: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """What `open_clip_reference.py` writes of a model."""
    env = os.environ | {"PYTHONPATH": str(HERE / "stubs"), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(HERE / "open_clip_reference.py"), json.dumps(settings), str(path)]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return load_file(path)


VIT = {"layers": 3, "width": 48, "head_width": 12, "mlp_ratio": 2.0, "patch_size": 8, "image_size": 32}
RESNET = {"layers": [2, 1, 1, 1], "width": 8, "image_size": 64}
TEXT = {"context_length": 12, "vocab_size": VOCAB, "width": 32, "heads": 2, "layers": 2}


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
@pytest.mark.parametrize(("vision", "quick"), [(VIT, False), (VIT, True), (RESNET, False)], ids=["vit", "quick", "rn"])
def test_clip_equals_open_clip(vision: dict[str, Any], quick: bool, tmp_path: Path) -> None:
    settings = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": quick}
    theirs = open_clips(settings, tmp_path / "reference.safetensors")
    shape = dataclasses.replace(CLIP, text_hidden=128, activation="quick_gelu" if quick else "gelu")
    if vision is RESNET:
        shape = dataclasses.replace(shape, dim=8, stages=(2, 1, 1, 1), patch=32, image_px=64)
    model, layout = clip.CLIP(shape).eval(), clip.LAYOUTS["openai" if quick else "open_clip"]
    fill(model, group(theirs, "state."), layout)
    batch, _ = pairs(causal=True)
    batch |= {"image": theirs["image"], "text": theirs["text"]}
    compare(ImageTextContrast(model), batch, theirs["image_vectors"], theirs["text_vectors"], theirs["loss"])
    # The positions of the pooled ResNet are only compared with each other: their gradient is a small difference.
    check_gradients(model, group(theirs, "grad."), layout, within=2e-5 if vision is RESNET else 1e-5)
