"""What the configs beside published weights tell that names and shapes do not, in the settings of our models.

Three programs write them: transformers ``config.json`` and ``preprocessor_config.json``, timm ``config.json``,
open_clip ``open_clip_config.json``. Whatever two of them say must agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multiway import config as settings
from multiway.data.bpe import clip_bpe, read_merges
from multiway.data.records import parse_json
from multiway.errors import ConfigError, ConversionError, RecordError
from multiway.nn.activation import Activation

CONFIG, PIXELS, OPEN_CLIP = "config.json", "preprocessor_config.json", "open_clip_config.json"
CONFIGS = (CONFIG, PIXELS, OPEN_CLIP)
MERGES, VOCAB = "merges.txt", "vocab.json"
"""CLIP's tokenizer, and its ids, which follow from the merges."""
TOKENIZERS = ("tokenizer.json", "vocab.txt", MERGES, "bpe_simple_vocab_16e6.txt.gz", "beit3.spm")
"""Tokenizers that come along, the first of these that is there."""
MAX_CONFIG = 2**24
"""Longest config beside weights, in bytes."""

HEAD, RATIO, STRIDE = 64, 4.0, 32
"""What open_clip takes where its config does not say it: width of a head, hidden over width, patch of a ResNet."""
TOWERS = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
"""transformers' kinds of two towers, and the activation where the config does not say it."""
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"
}  # fmt: skip
TOWER = {
    "dim": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads", "hidden": "intermediate_size"
}  # fmt: skip

Saying = tuple[str, Any, str]
"""A setting of ours, its value, and the file and key that say it."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    """The settings that configs may tell, as our models name them."""

    image_px: int | tuple[int, int] | None = None
    window: int | None = None
    pretrained_window: list[int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    share: float | None = None
    activation: Activation | None = None
    out: int | None = None
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    hidden: int | None = None
    patch: int | None = None
    stages: tuple[int, ...] | None = None
    text_dim: int | None = None
    text_depth: int | None = None
    text_heads: int | None = None
    text_hidden: int | None = None
    text_tokens: int | None = None
    vocab: int | None = None


@dataclass(frozen=True)
class Told:
    """What is known of a model: ``values`` by our settings, and ``places``, the file and key that say each."""

    values: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def check(self, config: Any, means: Mapping[str, Any], usual: Activation) -> None:
        """Compare with the ``config`` that the weights have, and with what their layout ``means``.

        ``usual``: the activation of a system that has no setting for it. Raises ConversionError naming file and key.
        """
        for name, value in self.values.items():
            theirs = usual if name == "activation" else value
            found = means.get(name, getattr(config, name, theirs))
            if name == "image_px":
                value = whole_patches(value, config.patch)
            if value != found:
                raise ConversionError(
                    f"{self.places[name]} says {value}, the weights are of {name} {found}: one of them belongs to "
                    "another model; correct the config or name another layout"
                )


def whole_patches(image_px: Any, patch: int) -> Any:
    """The part of a picture that is read where patches do not fill it: SigLIP's 384 are 27 patches of 14."""
    return image_px // patch * patch if isinstance(image_px, int) else tuple(n // patch * patch for n in image_px)


def read_told(folder: Path) -> Told:
    """What the configs in a folder tell; of a file, nothing.

    Raises ConversionError for configs that are damaged, make no sense, or contradict each other, naming file and key.
    """
    found: dict[str, Any] = {}
    places: dict[str, str] = {}
    try:
        sayings = list(_sayings(folder))
    except (TypeError, ArithmeticError) as error:
        raise ConversionError(f"{folder}: the configs beside the weights are not such: {error}") from error
    for name, value, place in sayings:
        if name in found and found[name] != value:
            raise ConversionError(
                f"{folder}: {places[name]} says {found[name]}, but {place} says {value}: correct the one that is wrong"
            )
        found[name], places[name] = value, place
    try:
        told = dataclasses.asdict(settings.apply(_Known(), found))
    except ConfigError as error:
        raise ConversionError(f"{folder}: the configs beside the weights are not such: {error}") from error
    if told["pretrained_window"] is not None:
        told["pretrained_window"] = tuple(told["pretrained_window"]) if any(told["pretrained_window"]) else ()
    return Told({name: value for name, value in told.items() if value is not None}, places)


def named(folder: Path) -> str | None:
    """What timm's config in a folder calls the model."""
    name = _json(folder / CONFIG).get("architecture")
    return name if isinstance(name, str) else None


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer in a folder, None where there is none.

    Raises ConversionError where `VOCAB` has other ids than the merges beside it make.
    """
    path = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
    if path is not None and path.name == MERGES and (folder / VOCAB).is_file():
        own, theirs = clip_bpe(read_merges(path)).get_vocab(), _json(folder / VOCAB)
        wrong = sorted(piece for piece in own.keys() | theirs.keys() if own.get(piece) != theirs.get(piece))
        if wrong:
            raise ConversionError(
                f"{folder / VOCAB}: {wrong[0]!a} has id {theirs.get(wrong[0])}, {path.name} makes it "
                f"{own.get(wrong[0])}; {len(wrong)} pieces differ, so they are not of one tokenizer"
            )
    return path


def _sayings(folder: Path) -> Iterator[Saying]:
    """Everything that is said, of whatever type, without what is not."""
    config, pixels, clip = (_json(folder / name) for name in CONFIGS)
    for say, prefix in (
        (_timm(config), CONFIG),
        (_transformers(config), CONFIG),
        (_pixels(pixels), PIXELS),
        (_open_clip(clip), OPEN_CLIP),
    ):
        yield from ((name, value, f"{prefix}: {key}") for name, value, key in say if value is not None)


def _timm(config: Mapping[str, Any]) -> Iterator[Saying]:
    own = _part(config, "pretrained_cfg")
    for name, key in (("mean", "mean"), ("std", "std"), ("share", "crop_pct")):
        yield name, _plain(own.get(key)), f"pretrained_cfg.{key}"


def _pixels(config: Mapping[str, Any]) -> Iterator[Saying]:
    for name in ("mean", "std"):
        yield name, _plain(config.get(f"image_{name}")), f"image_{name}"


def _transformers(config: Mapping[str, Any]) -> Iterator[Saying]:
    for name, key in (
        ("image_px", "image_size"), ("window", "window_size"), ("pretrained_window", "pretrained_window_sizes")
    ):  # fmt: skip
        yield name, _plain(config.get(key)), key
    for own in ("vision_config", "image_config"):
        yield "image_px", _plain(_part(config, own).get("image_size")), f"{own}.image_size"
    usual = TOWERS.get(str(config.get("model_type")))
    for own in ("", *(("vision_config", "text_config") if usual else ())):
        said = (_part(config, own) if own else config).get("hidden_act", usual if own else None)
        yield (
            "activation",
            ACTIVATIONS.get(said, said) if isinstance(said, str) else said,
            f"{own}.hidden_act".removeprefix("."),
        )
    if usual is None:
        return
    vision, text = _part(config, "vision_config"), _part(config, "text_config")
    yield from ((name, vision.get(key), f"vision_config.{key}") for name, key in TOWER.items())
    yield "patch", vision.get("patch_size"), "vision_config.patch_size"
    yield from ((f"text_{name}", text.get(key), f"text_config.{key}") for name, key in TOWER.items())
    yield "text_tokens", text.get("max_position_embeddings"), "text_config.max_position_embeddings"
    yield "vocab", text.get("vocab_size"), "text_config.vocab_size"
    yield "out", config.get("projection_dim"), "projection_dim"


def _open_clip(config: Mapping[str, Any]) -> Iterator[Saying]:
    model, pixels = _part(config, "model_cfg"), _part(config, "preprocess_cfg")
    vision, text = _part(model, "vision_cfg"), _part(model, "text_cfg")
    for name in ("mean", "std"):
        yield name, _plain(pixels.get(name)), f"preprocess_cfg.{name}"
    if not model or "timm_model_name" in vision or "hf_model_name" in text:
        return
    quick = model.get("quick_gelu", False)
    yield "activation", {True: "quick_gelu", False: "gelu"}.get(quick, quick), "model_cfg.quick_gelu"
    yield "out", model.get("embed_dim"), "model_cfg.embed_dim"
    yield "image_px", _plain(vision.get("image_size")), "model_cfg.vision_cfg.image_size"
    yield "text_tokens", text.get("context_length"), "model_cfg.text_cfg.context_length"
    yield "vocab", text.get("vocab_size"), "model_cfg.text_cfg.vocab_size"
    resnet = isinstance(vision.get("layers"), list)
    towers = (("", vision, "vision_cfg"), ("text_", text, "text_cfg"))
    yield "stages", tuple(vision["layers"]) if resnet else None, "model_cfg.vision_cfg.layers"
    yield "patch", STRIDE if resnet else vision.get("patch_size"), "model_cfg.vision_cfg.patch_size"
    for prefix, own, key in towers:
        width, ratio = own.get("width"), own.get("mlp_ratio", RATIO)
        yield f"{prefix}dim", width, f"model_cfg.{key}.width"
        if resnet and not prefix:
            continue
        heads = own.get("heads") or (width // own.get("head_width", HEAD) if prefix == "" else None)
        yield f"{prefix}depth", own.get("layers"), f"model_cfg.{key}.layers"
        yield f"{prefix}heads", heads, f"model_cfg.{key}.heads"
        yield f"{prefix}hidden", int(width * ratio), f"model_cfg.{key}.mlp_ratio"


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key, an empty one where there is none."""
    own = config.get(key)
    return own if isinstance(own, dict) else {}


def _plain(value: Any) -> Any:
    """A value that can be compared: lists as tuples."""
    return tuple(value) if isinstance(value, list) else value


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_CONFIG:
        raise ConversionError(f"{path} has more than {MAX_CONFIG} bytes: no config")
    try:
        return parse_json(path.read_bytes())
    except RecordError as error:
        raise ConversionError(f"{path}: {error}") from error
