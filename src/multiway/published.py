"""Published weights as those of a model of ours: which layout explains every name in a file, and which config."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from multiway.errors import ConfigError, ConversionError, MissingInputError
from multiway.models import blank, model_named, presets
from multiway.nn.position import sincos_positions
from multiway.told import CONFIGS, TOKENIZERS, VOCAB, whole_patches
from multiway.weights.google import to_timm
from multiway.weights.rename import WeightMap, faults, to_ours
from multiway.weights.untrusted import Published, read_published

GOOGLE, TIMM = "google", "timm"
"""The layout of Google's ``.npz``, and the one it is read as."""

HEADS: Mapping[str, tuple[str, ...]] = {
    "classes": ("head.weight",),
    "masked": (
        "mim_head.weight", "mlm_head.weight", "mlm_head.decoder.weight", "heads.text.decoder.weight", "decoder.weight"
    ),
    "match": ("match_head.weight",),
    "answers": ("answer_head.out.weight", "answer_head.weight"),
    "contrast": ("vision_head.weight",),
    "teacher_dim": ("projection.weight",),
    "codes": ("mim_head.weight", "heads.image.decoder.weight"),
}  # fmt: skip
"""Settings that say how many rows one of these weights has, or whether there is one."""
WORDS_HEAD = ("mlm_head.weight",)
"""Without ``codes`` beside it, it is of words alone."""
CONTRASTS = {"both": "joint_image_projection.weight", "alone": "image_projection.weight"}
"""Words for the setting ``contrast`` where it is one, and the weight that each needs."""
TEXTS = {"vocab": "language.words.weight", "text_tokens": "language.positions", "text_positions": "language.positions"}
"""Settings of texts that say how many rows a table has."""
GRIDS: Mapping[str, Callable[[int], int]] = {"positions": lambda n: n * n, "table": lambda n: (2 * n - 1) ** 2}
"""Weights that grow with the picture: how many rows they have for n x n patches, besides those of class tokens."""
MOST_PATCHES = 512
"""On a side."""
SINE_ERROR = 1e-3
NEAR = 0.7
"""Only models are looked at closely that share this much, of what the nearest shares, of a file's names."""
STAGE = re.compile(r"layers\.(\d+)\.")

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
BESIDE = (*CONFIGS, *TOKENIZERS, VOCAB)
WEIGHTS = (
    ["open_clip_model*.safetensors", "open_clip_model.safetensors.index.json"],
    ["model*.safetensors", "model.safetensors.index.json"],
    ["open_clip_pytorch_model*.bin"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)
"""What is downloaded of a hub model besides `BESIDE`: the first of these that is there."""


@dataclass(frozen=True)
class Match:
    """A model that a file may be: the preset's ``name`` and ``system``, the config it must have, and a layout.

    ``changed``: how many settings differ from the preset's; ``wrong``: the keys that keep it from being this one, with
    shapes, by kind; none = it explains every key.
    """

    name: str
    system: ModuleType
    config: Any
    layout: str
    weights: WeightMap
    changed: int = 0
    wrong: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def faults(self) -> int:
        """Number of keys that do not fit."""
        return sum(map(len, self.wrong.values()))


def located(source: str | Path, patterns: Sequence[str]) -> Path:
    """The local file or folder of that name, else the hub's folder, of which files with these patterns are downloaded.

    Raises MissingInputError when neither is there.
    """
    path = Path(source)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(source)):
        raise MissingInputError(f"{source}: no such file or folder, and not a hub id such as 'owner/model'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:  # its own errors and those of its HTTP client
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise MissingInputError(f"{source}: no such folder, and the hub does not give it either ({reason})") from error


def located_weights(source: str | Path) -> Path:
    """As `located`, with weights of one kind, and the configs and tokenizers beside them."""
    path = Path(source)
    for patterns in WEIGHTS:
        path = located(source, [*BESIDE, *patterns])
        if Path(source).exists() or any(path.glob(patterns[0])):
            break
    return path


def read(path: Path) -> Published:
    """Read a published file or folder as `read_published`; Google's arrays as timm's tensors."""
    found = read_published(path)
    return dataclasses.replace(found, state=to_timm(found.state)) if found.format == "npz" else found


def layouts(system: ModuleType, published: Published, only: str | None = None) -> dict[str, WeightMap]:
    """The layouts of a system that a file may be in; ``only``: this one, None = any."""
    known: Mapping[str, WeightMap] = getattr(system, "LAYOUTS", {})
    if published.format == "npz":
        known = {GOOGLE: known[TIMM]} if TIMM in known else {}
    return {name: weights for name, weights in known.items() if only in (None, name)}


def matches(published: Published, name: str | None, layout: str | None, told: Mapping[str, Any]) -> list[Match]:
    """What a file may be, the best first: fewest keys that do not fit, then fewest settings changed.

    ``name``, ``layout``: this one, None = any; ``told``: settings that are known from elsewhere. Raises ConfigError for
    a model or layout that does not exist.
    """
    known = presets() if name is None else {name: model_named(name)}
    options = [
        (_alike(system, shape, weights, published), own, system, shape, kind, weights)
        for own, (system, shape) in known.items()
        for kind, weights in layouts(system, published, layout).items()
    ]
    near = NEAR * max((alike for alike, *_ in options), default=0.0)
    found = []
    for option in options:
        if option[0] >= near:
            with suppress(ConfigError, ConversionError):  # this kind of file has no such model
                found.append(_match(*option[1:], published, told))
    if not found:
        raise ConfigError(f"no {name or 'model'} is known in layout {layout or published.format}")
    return sorted(found, key=lambda match: (match.faults, match.changed))


def filled(path: Path, name: str, system: ModuleType, config: Any) -> nn.Module:
    """The model ``name`` with exactly this config, filled from a published file or folder.

    Raises ConversionError as `adopt`, MissingInputError as `read_published`.
    """
    published = read(path)
    found = []
    for layout, weights in layouts(system, published).items():
        if all(getattr(config, key, value) == value for key, value in weights.config.items()):
            with suppress(ConversionError):  # this layout has no such model
                wrong = faults(aligned(published.state, weights), weights, _weights(system, config))
                found.append(Match(name, system, config, layout, weights, wrong=wrong))
    if not found:
        raise ConversionError(f"{path}: no layout of {name} is known for {published.format} files")
    result = blank(system, config)
    result.load_state_dict(adopt(published, min(found, key=lambda match: match.faults)), assign=True)
    assert not any(x.is_meta for x in chain(result.parameters(), result.buffers())), "all weights are published"
    return result


def adopt(published: Published, match: Match) -> dict[str, Tensor]:
    """The weights under our names, floats in float32.

    Raises ConversionError when the file is another model, or has numbers that are not finite.
    """
    like = _weights(match.system, match.config)
    state = {
        key: (value.float() if value.is_floating_point() else value).contiguous()
        for key, value in to_ours(aligned(published.state, match.weights), match.weights, like).items()
    }
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ConversionError(f"{len(broken)} weights are not finite, {broken[0]} among them: the file is spoilt")
    return state


def aligned(state: Mapping[str, Tensor], weights: WeightMap) -> Mapping[str, Tensor]:
    """Their state dict with the prefix that the layout's rules have, where the file goes without."""
    if not weights.prefix or any(name.startswith(weights.prefix) for name in state):
        return state
    return {weights.prefix + name: tensor for name, tensor in state.items()}


@lru_cache(maxsize=256)
def _weights(system: ModuleType, config: Any) -> Mapping[str, Tensor]:
    """The names and shapes of a model's weights."""
    return blank(system, config).state_dict()


def _alike(system: ModuleType, preset: Any, weights: WeightMap, published: Published) -> float:
    """Share of the names that a file and a model have in common, with equal shapes where nothing is fused."""
    state = aligned(published.state, weights)
    common, count = 0, 0
    for key, own in _weights(system, preset).items():
        names, shape = weights.names(key), weights.shape(key, own.shape)
        count += len(names)
        common += sum(name in state and (len(names) > 1 or state[name].shape == shape) for name in names)
    return common / max(1, count, len(state))


def _match(
    name: str,
    system: ModuleType,
    preset: Any,
    layout: str,
    weights: WeightMap,
    published: Published,
    told: Mapping[str, Any],
) -> Match:
    """What a file is under one preset and layout, its config from the shapes."""
    state = aligned(published.state, weights)
    names = {f.name for f in dataclasses.fields(preset)}
    known = {key: value for key, value in {**weights.config, **told}.items() if key in names}
    if "image_px" in known and getattr(preset, "patch", 0):
        known["image_px"] = whole_patches(known["image_px"], known.get("patch", preset.patch))
    config = dataclasses.replace(preset, **known)
    config = dataclasses.replace(config, **_heads(config, state, weights))
    config = dataclasses.replace(config, **_sizes(system, config, state, weights))
    wrong = faults(state, weights, _weights(system, config)) or _unlike_fixed(system, config, state, weights)
    changed = sum(getattr(config, name) != getattr(preset, name) for name in names)
    changed += sum(told.get(name, value) != value for name, value in weights.config.items())
    return Match(name, system, config, layout, weights, changed, wrong)


def _unlike_fixed(
    system: ModuleType, config: Any, state: Mapping[str, Tensor], weights: WeightMap
) -> dict[str, list[str]]:
    """Positions that the model has fixed, as sines, and the file has otherwise: then they were learned."""
    made: Any = blank(system, config)
    wrong = []
    for key, own in made.named_buffers():
        if key.endswith("positions"):
            [theirs] = weights.names(key)
            sines = sincos_positions(own.shape[-1], made.encoder.grid, prefix=1)
            if (state[theirs].reshape(own.shape) - sines).abs().max() > SINE_ERROR:
                wrong.append(f"{theirs} {tuple(state[theirs].shape)}, learned ones instead of sines")
    return {"of another kind": wrong} if wrong else {}


def _heads(config: Any, state: Mapping[str, Tensor], weights: WeightMap) -> dict[str, Any]:
    """Settings by the rows of heads; a head that the file has not is not wanted, but some models have codes always."""
    usual = {f.name: f.default for f in dataclasses.fields(config)}

    def rows(keys: Sequence[str]) -> int:
        theirs = [their for key in keys for their in weights.names(key)]
        return sum(len(state[their]) for their in theirs if their in state and state[their].ndim)

    found: dict[str, Any] = {}
    for name, keys in HEADS.items():
        if name not in usual or isinstance(usual[name], str) or not any(map(weights.names, keys)):
            continue
        count = rows(keys)
        if count or name != "codes" or usual[name] == 0 or rows(WORDS_HEAD):
            found[name] = bool(count) if isinstance(usual[name], bool) else count
    if isinstance(usual.get("contrast"), str):
        found["contrast"] = next((kind for kind, key in CONTRASTS.items() if rows((key,))), "none")
    return found


def _sizes(system: ModuleType, config: Any, state: Mapping[str, Tensor], weights: WeightMap) -> dict[str, Any]:
    """Sizes of tables of texts, of pictures and windows, the latter from buffers of indices or the rows of positions;
    what cannot be told is left.
    """
    if getattr(config, "window", 0):
        return _windows(config, state)
    found = _texts(system, config, state, weights)
    if not isinstance(config.image_px, int):
        return found
    for key, own in _weights(system, config).items():
        rows, theirs = GRIDS.get(key.rpartition(".")[2]), weights.names(key)
        if rows is None or len(theirs) != 1 or theirs[0] not in state or "language" in key:
            continue
        extra = len(own) - rows(config.image_px // config.patch)
        want = state[theirs[0]].numel() // own.shape[-1] - extra
        side = next((n for n in range(1, MOST_PATCHES) if rows(n) == want), None)
        if side:
            return {**found, "image_px": side * config.patch}
    return found


def _texts(system: ModuleType, config: Any, state: Mapping[str, Tensor], weights: WeightMap) -> dict[str, Any]:
    """Settings by the rows of tables of words and of their positions."""
    found = {}
    for key, own in _weights(system, config).items():
        for name, ending in TEXTS.items():
            theirs = [their for their in weights.names(key) if their in state and state[their].ndim]
            if theirs and key.endswith(ending) and len(own) == getattr(config, name, None):
                found[name] = len(state[theirs[0]])
    return found


def _windows(config: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What Swin's buffers tell: the window by the index of its pairs, the picture by the number of windows, and Swin
    V2's window in training by the distances in its table.
    """
    windows: dict[int, int] = {}
    trained: dict[int, int] = {}
    found: dict[str, Any] = {}
    for name, value in state.items():
        stage = int(match[1]) if (match := STAGE.search(name)) else -1
        if name.endswith("relative_position_index") and value.ndim == 2 and len(value):
            windows[stage] = math.isqrt(len(value))
        elif name.endswith("attn_mask") and value.ndim == 3 and stage == 0 and value.numel():
            found["image_px"] = math.isqrt(value.shape[0] * value.shape[1]) * config.patch
        elif name.endswith("relative_coords_table") and value.ndim == 4 and 0 < float(value.max()) < MOST_PATCHES:
            reach = 8 ** float(value.max()) - 1  # 8 (M - 1) / (M in training - 1)
            trained[stage] = round(8 * (value.shape[1] // 2) / reach) + 1
    if windows:
        found["window"] = max(windows.values())
    if trained and "pretrained_window" in {f.name for f in dataclasses.fields(config)}:
        found["pretrained_window"] = () if trained == windows else tuple(trained[stage] for stage in sorted(trained))
    return found
