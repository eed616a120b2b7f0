"""Models by name, and as Hugging Face folders: made, saved, loaded, and asked for vectors.

A folder holds everything a model needs to be used: ``config.json`` (which system, and its config),
``model.safetensors`` (or numbered parts and their index), ``tokenizer.json``, ``preprocessor_config.json``
(`Preprocessor`) and ``README.md`` (the card). All of it is data with a closed schema; nothing in it is ever run.

The names of models are those of `multiway.models`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from multiway import config as settings
from multiway import published
from multiway.data.image import View
from multiway.data.picture import Picture, whole_picture
from multiway.data.records import parse_json
from multiway.data.text import TextTokenizer, framed
from multiway.errors import ConfigError, MissingInputError, RecordError, WriteError
from multiway.models import all_systems, blank, model_class, model_named, presets
from multiway.preprocessor import Preprocessor
from multiway.published import located, located_weights
from multiway.tasks import zero_shot
from multiway.tasks.needs import check
from multiway.tasks.prompts import BARE, filled
from multiway.weights.card import model_card
from multiway.weights.io import read_weights, unlike, write, write_weights

T = TypeVar("T")

FORMAT = 1
BATCH = 64

CONFIG, TOKENIZER, PREPROCESSOR, CARD = "config.json", "tokenizer.json", "preprocessor_config.json", "README.md"
HUB_FILES = [CONFIG, TOKENIZER, PREPROCESSOR, "model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class Pretrained:
    """A model with everything that belongs to it: what `load` returns.

    ``name``: the folder or hub id it came from; ``precision``: of the matrix products, ``"bf16"`` runs under autocast.
    """

    model: nn.Module
    tokenizer: TextTokenizer | None
    preprocessor: Preprocessor
    name: str = ""
    precision: Literal["fp32", "bf16"] = "fp32"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of config, preprocessor, tokenizer and weights: equal ones give comparable vectors."""
        described = {**_described(self.model), **dataclasses.asdict(self.preprocessor)}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        digest.update(self.tokenizer.hash.encode() if self.tokenizer else b"")
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def source_px(self) -> int:
        """Side to decode pictures at, at least, so that nothing is enlarged."""
        return View(px=self.preprocessor.image_px, share=self.preprocessor.share).source_px

    def picture(self, picture: Picture) -> Tensor:
        """One picture as the model sees it: uint8 (3, H, W) of ``image_px``.

        Raises as `whole_picture`.
        """
        return whole_picture(picture, self.preprocessor.image_px, self.preprocessor.share)

    def classify(self, images: Picture | Iterable[Picture], *, batch: int = BATCH) -> Tensor:
        """Probabilities of the classes (N, classes) float32, on the CPU, of one or many pictures; the classes' names
        are the preprocessor's ``labels``.

        Raises ConfigError for no picture, and for a model without a classifier; otherwise as `picture`.
        """
        model: Any = self.model
        if not getattr(model.config, "classes", 0):
            raise ConfigError(f"{self.name or type(model).__name__} has no classifier: tune it to classes first")
        return _joined(
            [model.classify(some).float().softmax(-1).cpu() for some in self._batches(images, batch)], "picture"
        )

    def zero_shot(
        self,
        images: Picture | Iterable[Picture],
        classes: Sequence[str],
        prompts: Sequence[str] = (BARE,),
        *,
        batch: int = BATCH,
    ) -> Tensor:
        """Probabilities (N, C) float32, on the CPU, of classes that words describe: the softmax of the cosines, times
        the model's temperature.

        ``prompts``: templates with ``{}`` for the name of a class, which is described by all of them together. Raises
        ConfigError for a model that does not compare pictures and texts, no class, and a template without ``{}``;
        otherwise as `encode_image` and `encode_text`.
        """
        model: Any = self.model
        check(model, zero_shot.NEEDS, "zero-shot classification")
        weights = zero_shot.classifier(self.encode_text, filled(classes, prompts))
        scale = model.temperature().detach().float().cpu()
        return (scale * (self.encode_image(images, batch=batch) @ weights.T)).softmax(-1)

    def encode_image(self, images: Picture | Iterable[Picture], *, batch: int = BATCH) -> Tensor:
        """Unit vectors (N, D) float32, on the CPU, of one or many pictures; also of uint8 (N, 3, H, W).

        Raises ConfigError for no picture at all, otherwise as `picture`.
        """
        model: Any = self.model
        some = self._batches(images, batch)
        return _joined([model.embed(model.encode(image=own), "image").float().cpu() for own in some], "picture")

    def _batches(self, images: Picture | Iterable[Picture], batch: int) -> Iterator[Tensor]:
        """Pictures as the model sees them, on its device; whoever takes one computes in its precision meanwhile."""
        single = isinstance(images, str | Path | bytes | Image.Image) or (
            isinstance(images, Tensor) and images.ndim == 3
        )
        items = iter([images] if single else images)  # type: ignore[arg-type]
        while some := list(itertools.islice(items, batch)):
            pixels = torch.stack([self.picture(item) for item in some]).to(self.device)
            with torch.inference_mode(), self._precision():
                yield pixels

    def encode_text(self, texts: str | Sequence[str], *, batch: int = BATCH) -> Tensor:
        """Unit vectors (N, D) float32, on the CPU, of one or many texts; texts of like length are computed together.

        What is longer than the preprocessor's ``text_tokens`` is cut. Raises ConfigError for no text at all, and
        without a tokenizer.
        """
        model: Any = self.model
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokenizer, longest = self.tokenizer, self.preprocessor.text_tokens
        if tokenizer is None:
            raise ConfigError(
                "texts need the model's tokenizer: pass what multiway.load() returns, of a folder with one"
            )
        inner = tokenizer.batch(texts)
        ids = [torch.from_numpy(framed(own, tokenizer.bos, tokenizer.eos, longest)) for own in inner]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = []
        for start in range(0, len(ids), batch):
            some = [ids[i].to(self.device) for i in order[start : start + batch]]
            with torch.inference_mode(), self._precision():
                vectors.append(model.embed(model.encode(text=some), "text").float().cpu())
        joined = _joined(vectors, "text")
        return torch.empty_like(joined).index_copy_(0, torch.tensor(order), joined)

    def save_pretrained(self, folder: str | Path, *, card: Mapping[str, Any] | str = "") -> None:
        """`save_pretrained` of all its parts."""
        given = dataclasses.asdict(self.preprocessor)
        save_pretrained(self.model, folder, tokenizer=self.tokenizer, preprocessor=given, card=card)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def encode(
    model: Pretrained | nn.Module,
    *,
    image: Picture | Iterable[Picture] | None = None,
    text: str | Sequence[str] | None = None,
    batch: int = BATCH,
) -> Tensor:
    """Unit vectors (N, D) float32 of pictures or of texts: inner products are cosines, within and across both.

    ``model``: what `load` returns, or for pictures the bare model; exactly one of ``image`` and ``text``, one or
    many each (`Picture`), because retrieval vectors are made of either alone. ``batch``: computed at once.

    Raises ConfigError for both or neither, otherwise as `Pretrained.encode_image` and its sister.
    """
    if not isinstance(model, Pretrained):
        shape: Any = model.config
        model = Pretrained(model, None, Preprocessor.of(shape, None))
    if image is not None and text is None:
        return model.encode_image(image, batch=batch)
    if text is not None and image is None:
        return model.encode_text(text, batch=batch)
    raise ConfigError("encode takes image=... or text=..., exactly one of them: vectors are made of either alone")


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows and that match a pattern such as ``"beit3*"``, sorted."""
    return sorted(fnmatch.filter(presets(), pattern))


def create_model(name: str, pretrained: str | Path | None = None, **overrides: Any) -> nn.Module:
    """Make a model by name, with settings of its config overridden.

    ``pretrained``: None = initialised from torch's global generator, else weights that fit exactly: a folder or hub id
    of ours (`load` takes the shape from there, too), or a file, folder or hub id in a layout of the system.

    Raises ConfigError for an unknown name or setting, with the nearest one, or a bad value; ConversionError for
    published weights that are unsafe, damaged, or of another model; else as `load`.
    """
    system, preset = model_named(name)
    shape = settings.apply(preset, overrides)
    if pretrained is not None:
        folder = _folder(pretrained)
        if folder.is_file() or not is_ours(folder):
            return published.filled(located_weights(pretrained), name, system, shape)
        return _filled(system, shape, folder, torch.device("cpu"))
    model = model_class(system)(shape)
    model.init_weights()
    return model


def load(
    source: str | Path, *, device: str | torch.device = "cpu", precision: Literal["fp32", "bf16"] = "fp32"
) -> Pretrained:
    """Load a model with its tokenizer and preprocessor from a folder, or by its Hugging Face hub id.

    A folder of that name comes first, of a run its ``final/``; a hub model is downloaded once and kept by
    ``huggingface_hub``.

    Raises MissingInputError when neither is there or a file is missing, ConfigError for settings that are unknown or do
    not fit together, CheckpointError for weights that are damaged or belong to another shape.
    """
    folder = _folder(source)
    values = _read_json(folder / CONFIG)
    found, known = (values.pop("system", None), values.pop("format", None)), all_systems()
    if found[0] not in known or found[1] != FORMAT:
        raise ConfigError(
            f"{folder / CONFIG}: system {found[0]!r} in format {found[1]!r}, expected one of {', '.join(known)} in "
            f"format {FORMAT}: it was written by another program or a later version"
        )
    system = known[found[0]]
    shape = _inside(folder / CONFIG, lambda: settings.apply(system.Config(), values))
    tokenizer = TextTokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    given = _read_json(folder / PREPROCESSOR)
    preprocessor = _inside(folder / PREPROCESSOR, lambda: Preprocessor.of(shape, tokenizer, given))
    model = _filled(system, shape, folder, torch.device(device)).eval()
    return Pretrained(model, tokenizer, preprocessor, str(source), precision)


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: TextTokenizer | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as a Hugging Face folder that `load` and the hub understand, over one that is there.

    ``preprocessor``: values of `Preprocessor` that differ from those model and tokenizer imply; ``card``: as
    `model_card` takes it; ``weights``: the state dict to write instead of the model's own
    (averaged or gathered weights). The config goes last: a folder without it is one whose writing was cut short.

    Raises ConfigError when config, weights, tokenizer and preprocessor do not fit together, WriteError when the disk
    refuses.
    """
    folder = Path(folder)
    described, shape = _described(model), getattr(model, "config")  # noqa: B009  pyright takes it for a module
    values = Preprocessor.of(shape, tokenizer, preprocessor)
    state = dict(model.state_dict() if weights is None else weights)
    differences = unlike(state, blank(all_systems()[described["system"]], shape).state_dict())
    if differences:
        raise ConfigError(
            f"the weights are not those of the model's config: {differences}; make the config say what it is"
        )
    text = model_card(described["system"], card)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (CONFIG, TOKENIZER):
            (folder / old).unlink(missing_ok=True)
        write_weights(folder, state)
        if tokenizer is not None:
            write(folder / TOKENIZER, tokenizer.save)
        _write_text(folder / PREPROCESSOR, json.dumps(dataclasses.asdict(values), indent=2) + "\n")
        _write_text(folder / CARD, text)
        _write_text(folder / CONFIG, json.dumps(described, indent=2) + "\n")
    except OSError as error:
        raise WriteError(f"cannot write the model to {folder}: {error}") from error


# ------------------------------------------------------------------------------------------------------------- systems


def _described(model: nn.Module) -> dict[str, Any]:
    """The content of ``config.json``; a wrapper that is a subclass, such as FSDP's, does not count."""
    modules = {cls.__module__ for cls in type(model).__mro__}
    names = [name for name, system in all_systems().items() if system.__name__ in modules]
    if not names:
        raise ConfigError(
            f"{type(model).__name__} is no model of multiway.systems, which has {', '.join(all_systems())}"
        )
    shape: Any = model.config
    return {"system": names[0], "format": FORMAT, **settings.plain(shape)}


def _filled(system: ModuleType, shape: Any, folder: Path, device: torch.device) -> nn.Module:
    """The model with the weights of a folder, in the dtypes they were saved in."""
    model = blank(system, shape)
    model.load_state_dict(read_weights(folder, model.state_dict(), device), assign=True)
    assert not any(x.is_meta for x in itertools.chain(model.parameters(), model.buffers())), "all weights are saved"
    return model


# -------------------------------------------------------------------------------------------------------------- folders


def _folder(source: str | Path) -> Path:
    """The local folder, or the hub's, downloaded."""
    folder = Path(source)
    if folder.is_dir():
        final = folder / "final"
        return final if (final / CONFIG).is_file() and not (folder / CONFIG).exists() else folder
    return located(source, HUB_FILES)


def is_ours(folder: Path) -> bool:
    """Whether a folder is one of ours, or of nobody."""
    return not (folder / CONFIG).is_file() or "system" in _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file; the folder is not a model's, or its writing was cut short")
    return _inside(path, lambda: parse_json(path.read_bytes()))


def _inside(path: Path, work: Callable[[], T]) -> T:
    """Do some work on the content of a file, which its errors then name."""
    try:
        return work()
    except (ConfigError, RecordError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------- vectors


def _joined(vectors: list[Tensor], what: str) -> Tensor:
    if not vectors:
        raise ConfigError(f"encode got no {what}, expected one or more")
    return torch.cat(vectors)
