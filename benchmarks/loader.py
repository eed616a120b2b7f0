"""Records per second and core: what the loader delivers, beside what a training step consumes.

JPEGs of two sizes are made here (1/f noise, as photographs have), indexed, and read through the very path training
uses: index -> decode -> crop, flip, jitter -> collate with hidden patches and words. Beside it, in the same run and
interleaved: the usual path, Pillow decode, Pillow resize, flip, float normalisation in numpy (no jitter, nothing
hidden), and what a training step of the small model takes in on the same core. Last line: one JSON object.

    python benchmarks/loader.py [--pictures 400] [--repeats 5]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from multiway.data.collate import MaskedCollate
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import Corpus, Load, open_corpus
from multiway.nn.quantize import PatchCodebook
from multiway.recipes import beit3
from multiway.recipes.beit3 import view_settings
from multiway.run import Data
from multiway.systems.beit3 import MaskedDataModeling

SIZES = {"256x256": (256, 256), "500x375": (500, 375)}
STEPS = 4
"""Optimiser steps whose batches are loaded in one measurement."""


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of quality 85 whose spectrum falls as a photograph's."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))) + 1 / max(width, height)
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, height, width))) / frequency).real
    noise = (noise - noise.min()) / (noise.max() - noise.min()) * 255
    buffer = io.BytesIO()
    Image.fromarray(noise.transpose(1, 2, 0).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write(folder: Path, pictures: int, size: tuple[int, int]) -> None:
    """Pictures and a ``train.jsonl`` with captions of photographs' usual length."""
    rng = np.random.default_rng(0)
    words = [
        "a",
        "man",
        "woman",
        "dog",
        "child",
        "two",
        "people",
        "on",
        "in",
        "the",
        "with",
        "red",
        "blue",
        "grass",
        "street",
        "water",
        "running",
        "playing",
        "ball",
    ]
    lines = []
    for i in range(pictures):
        (folder / f"{i}.jpg").write_bytes(photograph(rng, *size))
        lines.append(json.dumps({"image": f"{i}.jpg", "text": " ".join(rng.choice(words, int(rng.integers(8, 16))))}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def ours(corpus: Corpus, items: int) -> Callable[[], int]:
    """The training path for pairs of the base recipe."""
    run = beit3.base()
    load = Load(corpus=corpus, views=view_settings(run), seed=0)
    collate = MaskedCollate(words=corpus.words(run.data), grid=run.model.grid, branches=2 * run.model.depth)
    streams = [Stream(kind="pair", sources=corpus.sources["pair"], items=items, seed=0)]
    batches = Batches(streams, load, collate)

    def deliver() -> int:
        return sum(batches.batch(step)[0]["plan"].samples for step in range(STEPS))

    return deliver


def usual(folder: Path, items: int) -> Callable[[], int]:
    """Pillow decode, random crop, Pillow bicubic resize, flip, float32 normalisation."""
    files = sorted(folder.glob("*.jpg"))
    rng = np.random.default_rng(0)

    def one(path: Path) -> np.ndarray:
        picture = Image.open(path).convert("RGB")
        side = int(min(picture.size) * rng.uniform(0.7, 1))
        left, top = (int(rng.integers(edge - side + 1)) for edge in picture.size)
        picture = picture.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        x = np.asarray(picture, dtype=np.float32) / 255
        x = x[:, ::-1] if rng.random() < 0.5 else x
        return np.ascontiguousarray(((x - 0.5) / 0.5).transpose(2, 0, 1))

    def deliver() -> int:
        for step in range(STEPS):
            chosen = [files[(step * items + i) % len(files)] for i in range(items)]
            torch.from_numpy(np.stack([one(path) for path in chosen]))
        return STEPS * items

    return deliver


def consumed(corpus: Corpus) -> float:
    """Pairs per second and core that a training step of the small model takes in, forward and backward."""
    run = beit3.small()
    items = 8
    load = Load(corpus=corpus, views=view_settings(run), seed=0)
    collate = MaskedCollate(words=corpus.words(run.data), grid=run.model.grid)
    batch, _ = Batches([Stream(kind="pair", sources=corpus.sources["pair"], items=items, seed=0)], load, collate).batch(
        0
    )
    objective = MaskedDataModeling(beit3.build_model(run), PatchCodebook(run.model.codes, run.model.patch))
    objective.init_weights()
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        objective(batch, {name: float(n) for name, n in objective.counts(batch).items()}).loss.backward()
        seconds.append(time.process_time() - begun)
    return items / min(seconds)


def main() -> None:
    """Measure both paths on both sizes, interleaved, one thread, CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {"benchmark": "loader", "threads": 1, "pictures": given.pictures}
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "data").mkdir()
            write(root / "data", given.pictures, size)
            corpus = open_corpus(Data(root=str(root / "data"), vocab=64), root / "index")
            paths = {
                "ours": ours(corpus, given.pictures // STEPS),
                "usual": usual(root / "data", given.pictures // STEPS),
            }
            result.setdefault("consumed_by_small", round(consumed(corpus), 1))
            rates: dict[str, list[float]] = {key: [] for key in paths}
            for _ in range(given.repeats):
                for key, deliver in paths.items():
                    begun = time.process_time()
                    count = deliver()
                    rates[key].append(count / (time.process_time() - begun))
            medians = {key: statistics.median(values) for key, values in rates.items()}
            print(f"{name}: ours {medians['ours']:.0f}/s, usual {medians['usual']:.0f}/s per core")
            result[name] = {key: round(value, 1) for key, value in medians.items()} | {
                "ratio": round(medians["ours"] / medians["usual"], 2),
                "spread": [round(min(rates["ours"]), 1), round(max(rates["ours"]), 1)],
            }
    print(f"a training step of beit3_small takes in {result['consumed_by_small']} pairs/s on the same core")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
