"""SimMIM against the specification in plain operations, against transformers' Swin, and its ResNet against timm's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.data.hide import hide_cells
from multiway.nn.position import relative_index
from multiway.systems.simmim import LAYOUTS, Config, MaskedImageModeling, SimMIM
from multiway.types import Batch
from multiway.weights.rename import to_theirs
from tests.contracts.toys import randomize
from tests.parity.originals import HERE, check_gradients, fill, saved, saved_gradients

VIT = Config(dim=32, depths=(3,), heads=4, patch=8, image_px=32)
SWIN = Config(encoder="swin", dim=16, depths=(2, 2, 2), heads=2, patch=4, window=4, image_px=64)


def batch(config: Config) -> Batch:
    rng = np.random.default_rng(0)
    hide = np.stack([hide_cells(config.grid, config.stride // config.patch, 0.6, rng) for _ in range(3)])
    image = torch.from_numpy(rng.integers(0, 256, (3, 3, config.image_px, config.image_px), dtype=np.uint8))
    return {
        "image": image,
        "image_hide": torch.from_numpy(hide),
        "image_hidden": torch.from_numpy(np.flatnonzero(hide)),
    }


def vit_loss(p: dict[str, Tensor], x: Tensor, hide: Tensor, heads: int, patch: int, depth: int) -> Tensor:
    """vision.md 7.1 for a ViT: official names, normalised pictures (B, 3, H, W), hide bool (B, h, w)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)

    tokens = F.conv2d(x, p["encoder.patch_embed.proj.weight"], p["encoder.patch_embed.proj.bias"], stride=patch)
    tokens = torch.where(hide[:, None], p["encoder.mask_token"].view(1, -1, 1, 1), tokens).flatten(2).transpose(1, 2)
    z = torch.cat([p["encoder.cls_token"].expand(len(x), -1, -1), tokens], dim=1)
    table = p["encoder.rel_pos_bias.relative_position_bias_table"]
    bias = table[relative_index(tuple(hide.shape[1:]), 1)].permute(2, 0, 1)
    for i in range(depth):
        at = f"encoder.blocks.{i}."
        q_bias, v_bias = p[at + "attn.q_bias"], p[at + "attn.v_bias"]
        qkv = norm(z, at + "norm1") @ p[at + "attn.qkv.weight"].T + torch.cat([q_bias, 0 * q_bias, v_bias])
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2) @ p[at + "attn.proj.weight"].T + p[at + "attn.proj.bias"]
        z = z + p[at + "gamma_1"] * mixed
        wide = F.gelu(norm(z, at + "norm2") @ p[at + "mlp.fc1.weight"].T + p[at + "mlp.fc1.bias"])
        z = z + p[at + "gamma_2"] * (wide @ p[at + "mlp.fc2.weight"].T + p[at + "mlp.fc2.bias"])
    maps = norm(z, "encoder.norm")[:, 1:].transpose(1, 2).unflatten(2, hide.shape[1:])
    found = F.pixel_shuffle(F.conv2d(maps, p["decoder.0.weight"], p["decoder.0.bias"]), patch)
    inside = hide.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    return ((x - found).abs() * inside).sum() / (inside.sum() + 1e-5) / 3


def test_a_vits_loss_and_gradients_are_those_of_the_specification() -> None:
    given, objective = batch(VIT), MaskedImageModeling(randomize(SimMIM(VIT)))
    theirs = to_theirs(objective.model.state_dict(), LAYOUTS["official"])
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in theirs.items()}
    pixels = objective.model.pixels(given["image"])
    want = vit_loss(theirs, pixels, given["image_hide"].view(-1, *VIT.grid), VIT.heads, VIT.patch, VIT.depth)
    loss = objective(given, objective.counts(given)).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    want.backward()
    loss.backward()
    check_gradients(objective.model, {name: x.grad for name, x in theirs.items()}, LAYOUTS["official"])


@pytest.mark.parity
def test_a_swins_loss_gradients_and_files_equal_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4,
        drop_path_rate=0.0, encoder_stride=16,
    )  # fmt: skip
    theirs, objective = randomize(transformers.SwinForMaskedImageModeling(settings)), MaskedImageModeling(SimMIM(SWIN))
    fill(objective.model, saved(theirs, tmp_path / "weights"), LAYOUTS["transformers"])

    given = batch(SWIN)
    want = theirs(objective.model.pixels(given["image"]), bool_masked_pos=given["image_hide"])
    assert want.reconstruction.std() > 0.2
    found = objective.model.reconstruct(given["image"], given["image_hide"])
    torch.testing.assert_close(found, want.reconstruction, rtol=1e-5, atol=1e-5)
    loss = objective(given, objective.counts(given)).loss
    torch.testing.assert_close(loss, want.loss, rtol=1e-5, atol=0)
    loss.backward()
    want.loss.backward()
    check_gradients(objective.model, saved_gradients(theirs, tmp_path / "gradients"), LAYOUTS["transformers"])


RESNET = """
import dataclasses, json, timm, torch
from multiway.systems.simmim import LAYOUTS, PRESETS, SimMIM
from multiway.weights.rename import to_ours, to_theirs
torch.manual_seed(0)
theirs = timm.create_model("resnet50")
config = dataclasses.replace(PRESETS["simmim_resnet50_192"], masked=False, classes=1000)
ours = SimMIM(config)
ours.load_state_dict(to_ours(theirs.state_dict(), LAYOUTS["torchvision"], ours.state_dict()))
image, weight = torch.randn(2, 3, 64, 64), torch.randn(2, 1000)
apart = {}
for mode in (True, False):
    theirs.train(mode), ours.train(mode)
    theirs.zero_grad(), ours.zero_grad()
    want, found = theirs(image), ours.classify(image)
    apart[f"out {mode}"] = float((found - want).abs().max() / want.abs().max())
    (want * weight).sum().backward(), (found * weight).sum().backward()
    grads = to_theirs({name: p.grad for name, p in ours.named_parameters()}, LAYOUTS["torchvision"])
    for name, p in theirs.named_parameters():
        apart[f"{name} {mode}"] = float((grads[name] - p.grad).norm() / p.grad.norm())
state = to_theirs(ours.state_dict(), LAYOUTS["torchvision"])
apart["state"] = max(float((state[name] - x).abs().max()) for name, x in theirs.state_dict().items())
print(json.dumps(apart))
"""


@pytest.mark.parity
def test_a_resnet50_is_timms() -> None:
    """Outputs, gradients and running statistics; in a process of its own, because timm needs a stand-in there."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    env = os.environ | {"PYTHONPATH": str(HERE / "stubs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", RESNET], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    apart = json.loads(done.stdout.splitlines()[-1])
    assert len(apart) == 2 * (161 + 1) + 1
    assert max(apart.values()) < 1e-4, max(apart.items(), key=lambda item: item[1])
