"""Our Swin and Swin V2 against transformers' and timm's: scores, all gradients, and weights there and back."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from multiway.systems import swin, swin_v2
from multiway.weights.rename import WeightMap, to_ours, to_theirs
from tests.contracts.toys import randomize

pytestmark = pytest.mark.parity
HERE = Path(__file__).parent
SHAPE = {"dim": 16, "heads": 1, "classes": 7}
OURS: dict[str, Any] = {"swin": swin.Swin, "swin_v2": swin_v2.SwinV2}


def check(model: nn.Module, image: Tensor, want: dict[str, Any], weights: WeightMap) -> None:
    """Load their ``state``, compare ``scores`` of the picture and all gradients under a random loss, and go back."""
    model.load_state_dict(to_ours(want["state"], weights, model.state_dict()))
    image = image.detach().clone().requires_grad_()
    scores = model.classify(image)  # type: ignore[operator]
    assert want["scores"].std() > 0.3, "scores of constants would compare nothing"
    torch.testing.assert_close(scores, want["scores"], rtol=0, atol=1e-5)
    (scores * want["weight"]).sum().backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()} | {"image": image.grad}
    wanted = to_ours(want["grad"], weights, model.state_dict()) | {"image": want["grad_image"]}
    assert got.keys() == wanted.keys()
    for key, theirs in wanted.items():
        assert theirs.norm() > 0, f"{key} does not take part"
        assert (got[key] - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6, key  # type: ignore[operator]
    back = to_theirs(model.state_dict(), weights)
    assert back.keys() == want["state"].keys()
    assert all(torch.equal(back[key], value) for key, value in want["state"].items())


HF_CASES = {
    # (pixels of the model, of the picture, window, depths, pre-training windows)
    "swin": [
        (224, (224, 224), 7, (2, 2, 2, 2), ()),
        (100, (100, 100), 4, (2, 2, 2), ()),  # maps of 25, 13 and 7 places: padded windows, odd merges
        (64, (90, 121), 4, (2, 2, 2), ()),
    ],
    "swin_v2": [
        (64, (64, 64), 4, (2, 2, 2, 2), ()),  # the last map is smaller than a window
        (100, (100, 100), 4, (2, 2, 2), ()),
        (100, (90, 121), 4, (2, 2, 2), ()),
        (128, (128, 128), 8, (2, 2, 2), (4, 4, 2)),
    ],
}


def published(model: Any, folder: Path) -> dict[str, Tensor]:
    """What a model's file on the hub has: the names in memory are others."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(("kind", "case"), [(kind, i) for kind, cases in HF_CASES.items() for i in range(len(cases))])
def test_transformers_model_is_equal(kind: str, case: int, tmp_path: Path) -> None:
    import transformers

    px, size, window, depths, before = HF_CASES[kind][case]
    name = {"swin": "Swin", "swin_v2": "Swinv2"}[kind]
    stages = len(depths)
    extra = {"pretrained_window_sizes": list(before)} if before else {}
    settings = getattr(transformers, f"{name}Config")(
        image_size=px, patch_size=4, embed_dim=16, depths=list(depths), num_heads=[2**s for s in range(stages)],
        window_size=window, num_labels=7, **extra,
    )  # fmt: skip
    theirs = randomize(getattr(transformers, f"{name}ForImageClassification")(settings).eval())
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, *size, generator=generator).requires_grad_()
    scores = theirs(pixel_values=image).logits
    weight = torch.randn(scores.shape, generator=generator)
    (scores * weight).sum().backward()
    gradients = copy.deepcopy(theirs)
    with torch.no_grad():
        for holder, parameter in zip(gradients.parameters(), theirs.parameters(), strict=True):
            holder.copy_(parameter.grad)  # type: ignore[arg-type]
    want = {"state": published(theirs, tmp_path / "weights"), "grad": published(gradients, tmp_path / "gradients")}
    want |= {"scores": scores.detach(), "weight": weight, "grad_image": image.grad}
    module = swin if kind == "swin" else swin_v2
    moved = {"pretrained_window": before} if before else {}
    config = module.Config(**SHAPE, depths=depths, image_px=px, window=window, **moved)
    check(OURS[kind](config), image, want, module.LAYOUTS["transformers"])


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    path = tmp_path_factory.mktemp("swin") / "reference.safetensors"
    env = os.environ | {"PYTHONPATH": str(HERE / "stubs"), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(HERE / "swin_reference.py"), str(path)]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("name", ["swin", "swin_wide", "swin_v2", "swin_v2_moved"])
def test_timm_model_is_equal(timm_file: Path, name: str) -> None:
    with safe_open(timm_file, "pt") as file:
        settings = json.loads(file.metadata()[name])
    found = {key.removeprefix(f"{name}/"): x for key, x in load_file(timm_file).items() if key.startswith(f"{name}/")}
    want: dict[str, Any] = {key: found[key] for key in ("scores", "weight", "grad_image")}
    for part in ("state", "grad"):
        want[part] = {key.removeprefix(f"{part}."): x for key, x in found.items() if key.startswith(f"{part}.")}
    kind = "swin_v2" if name.startswith("swin_v2") else "swin"
    module = swin if kind == "swin" else swin_v2
    size = settings["img_size"]
    moved = {"pretrained_window": tuple(settings.get("pretrained_window_sizes", ()))} if kind == "swin_v2" else {}
    config = module.Config(
        **SHAPE, depths=tuple(settings["depths"]), window=settings["window_size"],
        image_px=tuple(size) if isinstance(size, list) else size, **moved,
    )  # fmt: skip
    check(OURS[kind](config), found["image"], want, module.LAYOUTS["timm"])
