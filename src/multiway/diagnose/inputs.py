"""What a diagnosis looks at: models by folder or name, and pictures in their own size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multiway.config import nearest
from multiway.data import builtin
from multiway.data.image import Limits, decode
from multiway.data.index import Index, Source
from multiway.data.records import Fault, Record, read_bytes
from multiway.data.shards import IMAGE_PARTS
from multiway.data.sources import discover
from multiway.errors import ConfigError, DataError, MissingInputError, RecordError
from multiway.nn.pixels import sides
from multiway.preprocessor import Preprocessor
from multiway.pretrained import Pretrained, create_model, list_models, load

BATCH = 32
RANDOM = ", random weights"
"""Behind the name of a model that was never trained."""
MOST = 2
"""Models that one plot compares."""


def open_model(name: str) -> Pretrained:
    """A model by its folder, run folder or hub id; by the name of a preset with random weights.

    Raises MissingInputError for a name that is none of them, with the nearest, otherwise as `multiway.pretrained.load`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if Path(name).exists() or "/" in name:
        return load(name, device=device)
    if name not in list_models():
        raise MissingInputError(f"{name}: no such folder, and no model of that name{nearest(name, list_models())}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(name).eval().to(device)
    return Pretrained(model, None, Preprocessor.of(model.config, None), f"{name}{RANDOM}")


def open_models(names: Sequence[str]) -> list[Pretrained]:
    """One or two different ones. Raises ConfigError for more."""
    if len(names) > MOST or len(set(names)) < len(names):
        raise ConfigError(f"a plot shows one model or compares {MOST} different ones, got {', '.join(names)}")
    return [open_model(name) for name in names]


@dataclass(frozen=True)
class Pictures:
    """Pictures in their own size: ``read[i]()`` is ``names[i]``, uint8 (3, H, W); ``origin``: where they come from."""

    names: Sequence[str]
    read: Sequence[Callable[[], Tensor]]
    origin: str

    def __len__(self) -> int:
        return len(self.read)

    def original(self, i: int, px: int | tuple[int, int]) -> Tensor:
        """One of them, for a model that looks at ``px``. Raises DataError for one that would have to be enlarged."""
        image = self.read[i]()
        needed = sides(px)
        if image.shape[1] < needed[0] or image.shape[2] < needed[1]:
            raise DataError(
                f"{self.origin}: {self.names[i]} has {image.shape[1]}x{image.shape[2]} pixels, the model looks at "
                f"{needed[0]}x{needed[1]}: an enlarged picture says little, give --data with larger ones"
            )
        return image

    def batches(self, models: Sequence[Pretrained], size: int = BATCH) -> Iterator[list[Tensor]]:
        """As every model sees them: uint8 (B, 3, H, W) on its device, batch by batch."""
        heights, widths = zip(*(sides(model.preprocessor.image_px) for model in models), strict=True)
        for start in range(0, len(self), size):
            images = [self.original(i, (max(heights), max(widths))) for i in range(start, min(start + size, len(self)))]
            yield [torch.stack([model.picture(image) for image in images]).to(model.device) for model in models]


def open_pictures(data: str | None, split: str | None, count: int) -> Pictures:
    """At most ``count`` pictures, evenly spread over a folder, file or index as `multiway.data.sources` reads it, or a
    single picture; None = embedded scenes.

    Raises MissingInputError and ConfigError as `discover`, DataError where there is no picture or a bad record.
    """
    if count < 1:
        raise ConfigError(f"at least one picture is needed, got a count of {count}")
    if data is None:
        scenes = torch.from_numpy(builtin.one_digit_scenes(count)[0].images)
        names = [f"scene {i}" for i in range(count)]
        return Pictures(names, [partial(lambda i: scenes[i], i) for i in range(count)], "embedded scenes")
    path = Path(data)
    if path.is_file() and path.suffix[1:].lower() in IMAGE_PARTS:
        return Pictures([path.name], [partial(_read, path.resolve())], data)
    found = _indexed(path) if (path / "manifest.json").is_file() else _raw(path, split)
    if not found:
        raise DataError(f"{data}: there is no picture in it")
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    names, read = zip(*(found[i] for i in chosen), strict=True)
    return Pictures(names, read, data)


def _indexed(path: Path) -> list[tuple[str, Callable[[], Tensor]]]:
    sources: list[Source] = [source for source in Index.open(path).of().sources if source.kind != "text"]
    return [(source.key(i), partial(source.image, i)) for source in sources for i in range(len(source))]


def _raw(path: Path, split: str | None) -> list[tuple[str, Callable[[], Tensor]]]:
    found = []
    for item in itertools.chain.from_iterable(discover(path, split)):
        if isinstance(item, Fault):
            raise DataError(f"{path}: {item}; a diagnosis skips no bad record")
        if isinstance(item, Record) and item.image is not None:
            found.append((item.where.key, partial(_read, item.root / item.image.file, *item.image[1:])))
    return found


def _read(path: Path, offset: int = 0, length: int | None = None) -> Tensor:
    try:
        return decode(read_bytes(path, offset, length, most=Limits().max_bytes).data).image
    except RecordError as error:
        raise RecordError(f"{path}: {error}", reason=error.reason) from error
