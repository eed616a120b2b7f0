"""The outputs of the program that weights were published for, beside ours: a process of its own, started by `convert`.

``python -m multiway.reference PROGRAM FOLDER OURS NAME``: ``FOLDER`` holds the weights in the program's own names (and
for transformers its config), ``OURS`` the converted model; what is found is printed as one line of JSON. Only here are
those programs imported.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from multiway.pretrained import load

PICTURES = 2


def main(program: str, folder: str, ours: str, name: str) -> None:
    """Print the largest difference between the program's outputs and ours, or why there is none."""
    try:
        version = importlib.import_module(program).__version__
    except ImportError as error:
        print(json.dumps({"reference": f"{program} is not installed: {error}"}))
        return
    model: Any = load(ours).model
    size = model.config.image_px
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(PICTURES, 3, height, width, generator=torch.Generator().manual_seed(0))
    run: Callable[[Path, str, Any, Tensor], Tensor | str] = {"timm": _timm, "transformers": _transformers}[program]
    with torch.inference_mode():
        theirs = run(Path(folder), name, model.config, pixels)
        tokens = model.classify(pixels) if model.config.classes else model.encode(image=pixels).dense("image")[0]
    found: dict[str, Any] = {"reference": theirs if isinstance(theirs, str) else f"{program} {version}"}
    if isinstance(theirs, Tensor) and theirs.numel() != tokens.numel():
        found["reference"] += f" gives {tuple(theirs.shape)}, ours is {tuple(tokens.shape)}: not compared"
    elif isinstance(theirs, Tensor):
        found["difference"] = (theirs.reshape(tokens.shape) - tokens).abs().max().item()
        found["largest"] = tokens.abs().max().item()
    print(json.dumps(found))


def _timm(folder: Path, name: str, config: Any, pixels: Tensor) -> Tensor | str:
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        return f"timm has no {name}"
    model = timm.create_model(name, num_classes=config.classes)
    wrong = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    missing = [key for key in wrong.missing_keys if key in dict(model.named_parameters())]
    if missing or wrong.unexpected_keys:
        return f"timm's {name} has other weights: {[*missing, *wrong.unexpected_keys][:3]}"
    return model.eval()(pixels) if config.classes else model.eval().forward_features(pixels)


def _transformers(folder: Path, name: str, config: Any, pixels: Tensor) -> Tensor | str:
    transformers = importlib.import_module("transformers")
    kinds = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    kind = getattr(transformers, str(kinds[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return f"transformers has no {kinds[0]}"
    model: Any = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()
    if config.classes:
        return model(pixel_values=pixels).logits
    base, named = model.base_model, {}
    if hasattr(base.config, "mask_ratio"):  # MAE reads every patch, in its place
        base.config.mask_ratio = 0.0
        patches = (pixels.shape[2] // base.config.patch_size) * (pixels.shape[3] // base.config.patch_size)
        named["noise"] = torch.arange(patches).float().expand(len(pixels), -1)
    tokens = base(pixel_values=pixels, **named).last_hidden_state
    norm = getattr(model, "layernorm", None) if base is not model else None  # of models that predict visual tokens
    return tokens if norm is None else norm(tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
