"""The outputs of the program that weights were published for, beside ours: a process of its own, started by `convert`.

``python -m multiway.reference PROGRAM FOLDER OURS NAME``: ``FOLDER`` holds the weights in the program's own names (and
for transformers its config), ``OURS`` the converted model; what is found is printed as one line of JSON. Only here are
those programs imported.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from multiway.pretrained import load

PICTURES = 2
FIRST_WORD = 3
"""Ids below are specials of one tokenizer or another."""
OLD_EOS = 2
"""What configs of the first CLIPs on the hub call the end of a text; transformers then takes the largest id for it."""


@dataclass(frozen=True)
class Inputs:
    """Pictures, normalised (B, 3, H, W), and as many texts: int64 ids with their specials, empty for other models."""

    pixels: Tensor
    texts: list[Tensor]

    def padded(self, longest: int, fill: int) -> Tensor:
        """The texts, filled to one length: (B, longest)."""
        whole = torch.full((longest,), fill)
        return pad_sequence([*self.texts, whole], batch_first=True, padding_value=fill)[:-1]


Outputs = dict[str, Tensor]


def main(program: str, folder: str, ours: str, name: str) -> None:
    """Print the largest differences between the program's outputs and ours, or why there are none."""
    try:
        version = importlib.import_module(program).__version__
    except ImportError as error:
        print(json.dumps({"reference": f"{program} is not installed: {error}"}))
        return
    model: Any = load(ours).model
    path = Path(folder)
    config = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
    inputs = _inputs(model.config, config)
    run: Callable[[Path, str, Any, Inputs], Outputs | str] = {
        "timm": _timm, "transformers": _transformers, "open_clip": _open_clip
    }[program]  # fmt: skip
    with torch.inference_mode():
        theirs = run(path, name, model.config, inputs)
        found = {"reference": theirs} if isinstance(theirs, str) else compared(theirs, _ours(model, inputs))
    if "outputs" in found:
        found["reference"] = f"{program} {version}"
    print(json.dumps(found))


def compared(theirs: Outputs, ours: Outputs) -> dict[str, Any]:
    """The largest difference of each output and the largest output itself; those of all."""
    outputs = {}
    for name, value in theirs.items():
        if value.numel() != ours[name].numel():
            return {"reference": f"{name}: {tuple(value.shape)}, ours is {tuple(ours[name].shape)}: not compared"}
        difference = (value.reshape(ours[name].shape) - ours[name]).abs().max().item()
        outputs[name] = [difference, ours[name].abs().max().item()]
    return {
        "outputs": outputs,
        "difference": max(own[0] for own in outputs.values()),
        "largest": max(own[1] for own in outputs.values()),
    }


def _inputs(shape: Any, config: Mapping[str, Any]) -> Inputs:
    """Random pictures and texts, one as long as the model reads, the others shorter; ``config``: transformers'."""
    height, width = (shape.image_px, shape.image_px) if isinstance(shape.image_px, int) else shape.image_px
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(PICTURES, 3, height, width, generator=generator)
    longest = getattr(shape, "text_tokens", 0)
    if not longest:
        return Inputs(pixels, [])
    text = config.get("text_config")
    said = text.get("eos_token_id") if isinstance(text, dict) else None
    end = said if isinstance(said, int) and OLD_EOS < said < shape.vocab else shape.vocab - 1
    texts = []
    for i in range(PICTURES):
        ids = torch.randint(FIRST_WORD, shape.vocab - 1, (max(2, longest // (i + 1)),), generator=generator)
        ids = torch.where(ids == end, ids - 1, ids)
        ids[-1] = end
        texts.append(ids)
    return Inputs(pixels, texts)


def _ours(model: Any, inputs: Inputs) -> Outputs:
    """Scores of classes, else vectors of pictures and texts and what a joint encoder makes of both, else all tokens."""
    if getattr(model.config, "classes", 0):
        return {"classes": model.classify(inputs.pixels)}
    if not inputs.texts:
        return {"tokens": model.encode(image=inputs.pixels).dense("image")[0]}
    image = model.embed(model.encode(image=inputs.pixels), "image")
    text = model.embed(model.encode(text=inputs.texts), "text")
    logits = model.temperature() * image @ text.T + getattr(model, "logit_bias", 0)
    found = {"image": image, "text": text, "logits": logits}
    if frozenset({"image", "text"}) in model.accepts:
        found["joint"] = model.encode(image=inputs.pixels, text=inputs.texts).prefix("image")
    return found


def _timm(folder: Path, name: str, config: Any, inputs: Inputs) -> Outputs | str:
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        return f"timm has no {name}"
    model = timm.create_model(name, num_classes=config.classes)
    wrong = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    missing = [key for key in wrong.missing_keys if key in dict(model.named_parameters())]
    if missing or wrong.unexpected_keys:
        return f"timm's {name} has other weights: {[*missing, *wrong.unexpected_keys][:3]}"
    if config.classes:
        return {"classes": model.eval()(inputs.pixels)}
    return {"tokens": model.eval().forward_features(inputs.pixels)}


def _open_clip(folder: Path, name: str, config: Any, inputs: Inputs) -> Outputs | str:
    open_clip = importlib.import_module("open_clip")
    vision: dict[str, Any] = {"image_size": config.image_px, "width": config.dim}
    if config.stages:
        vision["layers"] = config.stages
    else:
        vision |= {"layers": config.depth, "patch_size": config.patch, "head_width": config.dim // config.heads}
        vision["mlp_ratio"] = (config.hidden + 0.5) / config.dim  # it is rounded down
    text = {"width": config.text_dim, "layers": config.text_depth, "heads": config.text_heads}
    text |= {"context_length": config.text_tokens, "vocab_size": config.vocab}
    text["mlp_ratio"] = (config.text_hidden + 0.5) / config.text_dim
    quick = config.activation == "quick_gelu"
    model = open_clip.CLIP(config.out, vision, text, quick_gelu=quick)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    image = model.encode_image(inputs.pixels, normalize=True)
    texts = model.encode_text(inputs.padded(config.text_tokens, 0), normalize=True)
    return {"image": image, "text": texts, "logits": model.logit_scale.exp() * image @ texts.T}


def _transformers(folder: Path, name: str, config: Any, inputs: Inputs) -> Outputs | str:
    transformers = importlib.import_module("transformers")
    kinds = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    kind = getattr(transformers, str(kinds[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return f"transformers has no {kinds[0]}"
    model: Any = kind.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    ).eval()
    pixels = inputs.pixels
    if model.base_model_prefix == "flava":
        return _flava(getattr(model, "flava", model), config, inputs)
    if inputs.texts:
        ids = inputs.padded(config.text_tokens, getattr(config, "fill", 0))
        found = model(pixel_values=pixels, input_ids=ids)
        return {"image": found.image_embeds, "text": found.text_embeds, "logits": found.logits_per_image}
    if config.classes:
        return {"classes": model(pixel_values=pixels).logits}
    base, named = model.base_model, {}
    if hasattr(base.config, "mask_ratio"):  # MAE reads every patch, in its place
        base.config.mask_ratio = 0.0
        patches = (pixels.shape[2] // base.config.patch_size) * (pixels.shape[3] // base.config.patch_size)
        named["noise"] = torch.arange(patches).float().expand(len(pixels), -1)
    tokens = base(pixel_values=pixels, **named).last_hidden_state
    norm = getattr(model, "layernorm", None) if base is not model else None  # of models that predict visual tokens
    return {"tokens": tokens if norm is None else norm(tokens)}


def _flava(model: Any, config: Any, inputs: Inputs) -> Outputs:
    """Vectors of the contrast, scores, and the joint encoder's class token."""
    seen = torch.tensor([[i < len(ids) for i in range(config.text_tokens)] for ids in inputs.texts])
    ids = inputs.padded(config.text_tokens, 0)
    found = model(pixel_values=inputs.pixels, input_ids=ids, attention_mask=seen.long())
    image = F.normalize(model.image_projection(found.image_embeddings[:, 0]), dim=-1)
    text = F.normalize(model.text_projection(found.text_embeddings[:, 0]), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T
    return {"image": image, "text": text, "logits": logits, "joint": found.multimodal_embeddings[:, 0]}


if __name__ == "__main__":
    main(*sys.argv[1:])
