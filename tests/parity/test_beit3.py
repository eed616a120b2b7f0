"""Our decoupled BEiT-3 against torchscale's, the code the released weights were trained with."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from multiway.plan import make_plan
from multiway.systems.beit3 import LAYOUTS, PRESETS, BEiT3, Config
from multiway.weights.rename import to_ours, to_theirs

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("torchscale") is None, reason="torchscale is not installed"),
]
HERE = Path(__file__).parent
CONFIG = Config(dim=48, depth=3, heads=4, hidden=192, patch=8, image_px=32, vocab=61, text_positions=40, masked=False)


def reference(command: str, path: Path) -> None:
    """Run the original in a process of its own, so that its stubs poison nothing."""
    env = os.environ | {"PYTHONPATH": str(HERE / "stubs"), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(HERE / "beit3_reference.py"), command, str(path)]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("beit3") / "reference.safetensors"
    reference("pass", path)
    return load_file(path)


@pytest.fixture(scope="module")
def ours(original: dict[str, Tensor]) -> tuple[BEiT3, dict[str, Tensor], Tensor]:
    """Our model with the original's weights, our tokens per kind as padded batches, and the same loss."""
    model = BEiT3(CONFIG)
    model.load_state_dict(to_ours(group(original, "state"), LAYOUTS["official"], model.state_dict()))
    inputs = group(original, "input")
    lengths = {kind: (~inputs[f"{kind}.pad"]).sum(1).tolist() for kind in ("pair", "text")}
    ids = [inputs[f"{kind}.ids"][i, :n] for kind in ("pair", "text") for i, n in enumerate(lengths[kind])]
    plan = make_plan(
        {
            "image": {"image": [17] * len(inputs["image.pixels"])},
            "pair": {"image": [17] * len(inputs["pair.pixels"]), "text": lengths["pair"]},
            "text": {"text": lengths["text"]},
        }
    )
    tokens = model(
        plan,
        image=torch.cat([inputs["image.pixels"], inputs["pair.pixels"]]),
        text=torch.cat(ids),
        hide=torch.cat([inputs["image.hide"], inputs["pair.hide"]]),
    )
    image, _ = tokens.dense("image")
    text, _ = tokens.dense("text")
    pictures, pairs = len(inputs["image.pixels"]), len(lengths["pair"])
    outputs = {
        "image": image[:pictures],
        "pair": torch.cat([image[pictures:], text[:pairs, : max(lengths["pair"])]], dim=1),
        "text": text[pairs:, : max(lengths["text"])],
    }
    loss = sum(((outputs[kind] * original[f"weight.{kind}"]).sum() for kind in outputs), torch.zeros(()))
    return model, outputs, loss


@pytest.mark.parametrize("kind", ["image", "pair", "text"])
def test_outputs_equal_the_originals_at_every_real_token(original, ours, kind: str) -> None:
    want, got = original[f"output.{kind}"], ours[1][kind].detach()
    assert want.shape == got.shape
    if kind != "image":
        pad = group(original, "input")[f"{kind}.pad"]
        real = torch.cat([torch.ones(len(pad), want.shape[1] - pad.shape[1], dtype=torch.bool), ~pad], dim=1)
        want, got = want[real], got[real]
    assert want.std() > 0.5, "outputs of constants would compare nothing"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_gradients_equal_the_originals(original, ours) -> None:
    model, _, loss = ours
    parameters = dict(model.named_parameters())
    got = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)))
    want = to_ours(group(original, "grad"), LAYOUTS["official"], model.state_dict())
    assert got.keys() == want.keys()
    for key in want:
        assert want[key].norm() > 0, f"{key} does not take part"
        assert (got[key] - want[key]).norm() <= 1e-5 * want[key].norm(), key


def test_conversion_is_lossless_both_ways(original) -> None:
    theirs = group(original, "state")
    with torch.device("meta"):
        like = BEiT3(CONFIG).state_dict()
    converted = to_ours(theirs, LAYOUTS["official"], like)
    back = to_theirs(converted, LAYOUTS["official"])
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)
    again = to_ours(back, LAYOUTS["official"], like)
    assert all(torch.equal(again[key], converted[key]) for key in converted)


def test_base_and_large_have_the_originals_keys_and_shapes(tmp_path: Path) -> None:
    reference("keys", tmp_path / "keys.json")
    heads = {"mlm_head.weight", "mlm_head.bias", "mim_head.weight", "mim_head.bias"}
    for size, want in json.loads((tmp_path / "keys.json").read_text()).items():
        with torch.device("meta"):
            state = to_theirs(BEiT3(PRESETS[f"beit3_{size}_patch16_224"]).state_dict(), LAYOUTS["official"])
        got = {key: list(value.shape) for key, value in state.items()}
        assert got == want | {key: got[key] for key in heads}
