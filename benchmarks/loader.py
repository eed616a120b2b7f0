"""Samples per second and core: JPEGs and captions of a tar shard to augmented batches, beside webdataset.

    python benchmarks/loader.py
    python benchmarks/loader.py --pictures 128 --repeats 3   # a first look

The photographs are made here: 1/f noise, encoded so that they are as large as photographs of their size are. Both sides
read the same shard on one thread and show every picture alike: a crop of 50-100 % of the area, resized to 224 px
(antialiased bicubic), mirrored half of the time; no jitter, nothing hidden.

peer: webdataset, Pillow decode, Pillow resize of the crop, float32 normalisation in numpy, stack; captions as strings.
The normalisation is the usual line with a mean and a deviation per channel; the ``lean`` figures have a peer that does
it as fast as numpy can, in place and with one number for all channels.
ours: index -> load -> collate as in training, in random order, to the uint8 batch and the token ids that a model reads
(it normalises on its own device); with Pillow decoding, and with simplejpeg where it is installed.

A figure is peer / ours in CPU seconds, so 2 is twice as fast; samples per second of every side stand in the last line,
which is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import math
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timing import Figure, options, parsed, ratio, report, take_turns

from multiway.data.collate import DualCollate
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import Corpus, Load, open_corpus
from multiway.run import Data

SIZES = {"256x256": (256, 256), "500x375": (500, 375)}  # width, height
QUALITY, COLOUR = 88, 0.4
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PX, SCALE, RATIO = 224, (0.5, 1.0), (3 / 4, 4 / 3)
BATCH = 64
DECODERS = ("pillow", "simplejpeg") if importlib.util.find_spec("simplejpeg") else ("pillow",)
PEER = "tarfile, for want of webdataset"
if importlib.util.find_spec("webdataset") and importlib.util.find_spec("braceexpand"):
    PEER = f"webdataset {importlib.metadata.version('webdataset')}"
WORDS = "a man woman dog child two people on in the with red blue grass street water running playing ball"


def landscape(rng: np.random.Generator, side: int = 1536) -> np.ndarray:
    """A field whose spectrum falls as a photograph's, most of it grey, some of it colour: float32 (side, side, 3)."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))) + 1 / side
    grey, *colours = (np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) / frequency).real for _ in range(4))
    return np.stack([grey + COLOUR * colour for colour in colours], axis=2).astype(np.float32)


def photograph(field: np.ndarray, rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of some part of the field, its contrast stretched to the full range."""
    top, left = (int(rng.integers(len(field) - edge + 1)) for edge in (height, width))
    part = field[top : top + height, left : left + width]
    part = (part - part.min()) / (part.max() - part.min()) * 255
    buffer = io.BytesIO()
    Image.fromarray(part.astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write(path: Path, pictures: int, size: tuple[int, int]) -> float:
    """A tar shard of photographs with captions; mean bytes of a photograph."""
    rng = np.random.default_rng(0)
    field = landscape(rng)
    total = 0
    with tarfile.open(path, "w") as tar:
        for i in range(pictures):
            caption = " ".join(rng.choice(WORDS.split(), int(rng.integers(8, 16))))
            jpeg = photograph(field, rng, *size)
            total += len(jpeg)
            for suffix, content in (("jpg", jpeg), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return total / pictures


def ours(corpus: Corpus, pictures: int, batch: int, decoder: str) -> Callable[[], None]:
    """The training path for pairs."""
    view = View(px=PX, scale=SCALE, ratio=RATIO, flip=0.5)
    load = Load(corpus=corpus, views={"pair": view}, seed=0, decoder=decoder)
    collate = DualCollate(words=corpus.words(Data()), grid=(14, 14))
    stream = Stream(kind="pair", sources=corpus.sources["pair"], items=batch, seed=0)
    batches = Batches([stream], load, collate)

    def deliver() -> None:
        for step in range(pictures // batch):
            found, faults = batches.batch(step)
            assert found["image"].shape == (batch, 3, PX, PX) and not faults

    return deliver


def peer(shard: Path, batch: int, normalise: Callable[[Image.Image], np.ndarray]) -> Callable[[], None]:
    """webdataset over the shard; tarfile and the same steps where it is not installed."""
    rng = np.random.default_rng(0)

    def augmented(picture: Image.Image) -> np.ndarray:
        return normalise(augment(picture, rng))

    def plain() -> Iterator[tuple[np.ndarray, list[str]]]:
        pictures, captions = [], []
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith(".txt"):
                    captions.append(content.decode())
                    continue
                pictures.append(augmented(Image.open(io.BytesIO(content)).convert("RGB")))
                if len(pictures) == batch:
                    yield np.stack(pictures), captions
                    pictures, captions = [], []

    def batches() -> Iterable[tuple[np.ndarray, list[str]]]:
        if not PEER.startswith("webdataset"):
            return plain()
        import webdataset

        data = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
        return data.map_tuple(augmented, str).batched(batch, partial=False)

    def deliver() -> None:
        for images, _ in batches():
            assert torch.from_numpy(images).shape == (batch, 3, PX, PX) and images.dtype == np.float32

    return deliver


def usual(picture: Image.Image) -> np.ndarray:
    """Normalised, float32 (3, H, W)."""
    x = np.asarray(picture, dtype=np.float32) / 255
    return ((x - MEAN) / DEVIATION).transpose(2, 0, 1)


def lean(picture: Image.Image) -> np.ndarray:
    """`usual` in place, for a mean and a deviation of 0.5 in every channel."""
    x = np.asarray(picture, dtype=np.float32)
    x *= 1 / 127.5
    x -= 1
    return x.transpose(2, 0, 1)


def augment(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Random resized crop and flip."""
    width, height = picture.size
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*SCALE), math.exp(rng.uniform(*np.log(RATIO)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    picture = picture.resize((PX, PX), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    return ImageOps.mirror(picture) if rng.random() < 0.5 else picture


def compare(size: str, args: argparse.Namespace) -> tuple[dict[str, Figure], dict[str, float]]:
    """Figures for one size of photographs, and kilobytes and rates behind them."""
    batch = min(BATCH, args.pictures)
    pictures = args.pictures // batch * batch
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "data", "photographs.tar")
        shard.parent.mkdir()
        facts = {"kilobytes": write(shard, pictures, SIZES[size]) / 1000}
        corpus = open_corpus(Data(root=str(shard.parent), vocab=64), Path(folder, "index"))
        sides = {"peer": peer(shard, batch, usual), "lean peer": peer(shard, batch, lean)}
        sides |= {decoder: ours(corpus, pictures, batch, decoder) for decoder in DECODERS}
        took = take_turns(sides, args)
    facts |= {f"{side} per second": pictures / statistics.median(own) for side, own in took.items()}
    figures = {f"{size} {decoder}": ratio(took["peer"], took[decoder]) for decoder in DECODERS}
    figures |= {f"{size} {decoder}, lean": ratio(took["lean peer"], took[decoder]) for decoder in DECODERS}
    return figures, facts


def main() -> None:
    """Both sizes, on one thread."""
    parser = options(__doc__)
    parser.set_defaults(clock="cpu")
    parser.add_argument("--pictures", type=int, default=512)
    args = parsed(parser)
    figures: dict[str, Figure] = {}
    facts = {}
    for size in SIZES:
        found, facts[size] = compare(size, args)
        figures |= found
    versions = {name: importlib.metadata.version(name) for name in ("pillow", *DECODERS[1:])}
    report(args, figures, peer=PEER, **versions, by_size=facts)


if __name__ == "__main__":
    main()
