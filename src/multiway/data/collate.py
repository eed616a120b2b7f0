"""From samples to a batch: the plan, what is hidden, and the draws of stochastic depth. What a batch is stands in
`multiway.types`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from multiway.data.hide import hide_blocks, hide_words, smallest_block
from multiway.data.text import framed
from multiway.errors import ConfigError
from multiway.plan import make_plan
from multiway.types import Batch


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record as the loader hands it over.

    ``image``: uint8 (3, H, W) or None; ``text``: int (N,) ids without specials, or None; ``code``: int64 (P,) visual
    tokens of exactly this view, or None; ``label``: number of its class, or None; ``match``: whether its picture and
    its text belong together; ``record``: its number in its source; ``rng``: the sample's own generator, a function of
    (seed, epoch, record).
    """

    image: Tensor | None = None
    text: np.ndarray | None = None
    code: Tensor | None = None
    label: int | None = None
    match: bool = True
    record: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))


Samples = Mapping[str, Sequence[Sample]]
"""Samples by kind: ``image``, ``pair``, ``text``."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """The ids collate needs of a text vocabulary: ``<s>`` and ``<mask>``, -1 where it has none, ``</s>``, the range
    [first, stop) of words; the greatest number of tokens, with the specials, of a text of a pair (``longest``) and
    alone (``window``); ``begins``: bool (vocab,), True = this piece begins a word, None = not known."""

    bos: int
    eos: int
    mask_id: int
    first: int
    stop: int
    longest: int
    window: int
    begins: np.ndarray | None = field(default=None, compare=False)

    def framed(self, ids: np.ndarray, kind: str) -> np.ndarray:
        """``<s> ids </s>`` as int64, cut to the longest of its kind."""
        return framed(ids, self.bos, self.eos, self.window if kind == "text" else self.longest)

    def require_hiding(self, whole: bool) -> None:
        """Raise ConfigError unless words can be hidden, or whole words."""
        if self.mask_id < 0:
            raise ConfigError("this tokenizer has no <mask>, so no words can be hidden: take another tokenizer")
        if whole and self.begins is None:
            raise ConfigError("this tokenizer's pieces do not tell where words begin, so none can be hidden whole")


@dataclass(frozen=True, kw_only=True)
class MaskedCollate:
    """Batches for masked data modelling: every kind of sample, patches and words hidden.

    ``grid``: (rows, columns) of patches; ``image_ratio``: share of patches hidden; ``text_ratio``, ``pair_ratio``:
    share of words hidden in texts alone and in texts of pairs; ``branches``: residual branches that stochastic depth
    may drop (2 L), 0 = no draws. ``contrast``: also lay out picture and text of every pair apart, nothing hidden, to be
    matched with each other; then a pair is read jointly and hidden with probability ``joint``. ``whole_words``: kinds
    whose words are hidden whole, else piece by piece; ``leading``: tokens in front of the patches of a picture that is
    read with a text; ``match``: also say of every such pair whether it is one: of others nothing is to be predicted.
    """

    words: Words
    grid: tuple[int, int]
    image_ratio: float = 0.4
    text_ratio: float = 0.15
    pair_ratio: float = 0.5
    branches: int = 0
    contrast: bool = False
    joint: float = 1.0
    whole_words: frozenset[str] = frozenset()
    leading: int = 1
    match: bool = False

    def __post_init__(self) -> None:
        self.words.require_hiding(bool(self.whole_words))

    def __call__(self, samples: Samples) -> Batch:
        """Draw what is hidden from each sample's generator and lay everything out."""
        layout = self.layout(samples)
        lengths: dict[str, dict[str, list[int]]] = {}
        patches = self.grid[0] * self.grid[1]
        hides, predicted, texts, hidden, targets = [], [], [], [], []
        before = 0  # text tokens of earlier samples
        for kind, entries in layout.items():
            lengths[kind] = {}
            for sample, hides_some in entries:
                if kind != "text":
                    hides.append(self.hide_patches(sample.rng) if hides_some else np.zeros(patches, dtype=bool))
                    predicted.append(sample.match)
                    leading = self.leading if kind == "pair" else 1
                    lengths[kind].setdefault("image", []).append(patches + leading)
                if kind != "image":
                    ids = self.words.framed(_text(sample), kind)
                    shown, places = self.hide_words(ids, kind, sample.rng) if hides_some else (ids, ids[:0])
                    lengths[kind].setdefault("text", []).append(len(ids))
                    places = places if sample.match else places[:0]
                    texts.append(shown)
                    hidden.append(places + before)
                    targets.append(ids[places])
                    before += len(ids)
        flat = {kind: [sample for sample, _ in entries] for kind, entries in layout.items()}
        batch: Batch = {"plan": make_plan(lengths), **basics(flat, self.branches)}
        if hides:
            hide = np.stack(hides)
            batch["image_hide"] = torch.from_numpy(hide)
            batch["image_hidden"] = torch.from_numpy(np.flatnonzero(hide & np.array(predicted)[:, None]))
        if texts:
            batch["text"] = torch.from_numpy(np.concatenate(texts))
            batch["text_hidden"] = torch.from_numpy(np.concatenate(hidden))
            batch["text_target"] = torch.from_numpy(np.concatenate(targets))
        if self.match:
            batch["match"] = torch.tensor([s.match for s, _ in layout.get("pair", ())], dtype=torch.bool)
        if self.contrast:
            count, pairs = len(samples.get("pair", ())), len(layout.get("pair", ()))
            batch["image_match"] = torch.arange(count) + len(samples.get("image", ()))
            batch["text_match"] = torch.arange(count) + pairs + len(samples.get("text", ()))
        return batch

    def layout(self, samples: Samples) -> dict[str, list[tuple[Sample, bool]]]:
        """Samples by kind in plan order, each with whether something of it is hidden."""
        layout = {kind: [(sample, True) for sample in samples.get(kind, ())] for kind in ("image", "pair", "text")}
        if self.contrast:
            apart = [(sample, False) for sample in samples.get("pair", ())]
            layout["image"] += apart
            layout["text"] += apart
            layout["pair"] = [(s, True) for s in samples.get("pair", ()) if s.rng.random() < self.joint]
        return {kind: entries for kind, entries in layout.items() if entries}

    def hide_patches(self, rng: np.random.Generator) -> np.ndarray:
        """Block-wise hidden patches of one picture, bool (P,), exactly ``round(image_ratio * P)`` of them."""
        patches = self.grid[0] * self.grid[1]
        return hide_blocks(self.grid, round(self.image_ratio * patches), smallest_block(patches), rng)

    def hide_words(self, ids: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Corrupted ids of one text and its hidden places, at the ratio of its kind."""
        ratio = self.pair_ratio if kind == "pair" else self.text_ratio
        begins = self.words.begins if kind in self.whole_words else None
        return hide_words(ids, ratio, (self.words.first, self.words.stop), self.words.mask_id, rng, begins)


@dataclass(frozen=True, kw_only=True)
class DualCollate:
    """Batches for contrast: picture and text of each pair apart, as image-only and text-only, nothing hidden.

    The i-th picture belongs to the i-th text. ``branches`` as in `MaskedCollate`; ``keep``: share of the patches of
    each picture that are read, drawn anew every time (FLIP, arXiv 2212.00794); ``causal``: whether tokens of a text see
    none behind them (CLIP).
    """

    words: Words
    grid: tuple[int, int]
    branches: int = 0
    keep: float = 1.0
    causal: bool = False

    def __call__(self, samples: Samples) -> Batch:
        """Lay out the pairs as two kinds of samples."""
        pairs = samples["pair"]
        texts = [self.words.framed(_text(sample), "pair") for sample in pairs]
        apart = {"image": pairs, "text": pairs}
        patches = self.grid[0] * self.grid[1]
        kept = max(1, round(self.keep * patches))
        lengths = {"image": {"image": [kept + 1] * len(pairs)}, "text": {"text": [len(t) for t in texts]}}
        batch = {"plan": make_plan(lengths, causal_text=self.causal), **basics(apart, self.branches)}
        if kept < patches:
            drawn = np.stack([sample.rng.permutation(patches)[:kept] for sample in pairs])
            batch["image_keep"] = torch.from_numpy(np.sort(drawn, axis=1))
        batch["text"] = torch.from_numpy(np.concatenate(texts))
        return batch


@dataclass(frozen=True, kw_only=True)
class MatchCollate(DualCollate):
    """As `DualCollate`, with words of every text hidden, and what it takes to read each pair together: with its words
    hidden, whole, with another picture, and with another text, whose length is not known yet.

    ``ratio``: share of the words that are hidden; ``whole_words``: whole ones, else piece by piece.
    """

    ratio: float = 0.15
    whole_words: bool = False

    def __post_init__(self) -> None:
        self.words.require_hiding(self.whole_words)

    def __call__(self, samples: Samples) -> Batch:
        """Lay out the pairs apart and together, hide words and draw."""
        batch, ordinary = super().__call__(samples), (self.words.first, self.words.stop)
        begins = self.words.begins if self.whole_words else None
        texts, hidden, targets, before = [], [], [], 0
        for sample in samples["pair"]:
            ids = self.words.framed(_text(sample), "pair")
            shown, places = hide_words(ids, self.ratio, ordinary, self.words.mask_id, sample.rng, begins)
            texts.append(shown)
            hidden.append(places + before)
            targets.append(ids[places])
            before += len(ids)
        batch["text"] = torch.from_numpy(np.concatenate(texts))
        batch["text_hidden"] = torch.from_numpy(np.concatenate(hidden))
        batch["text_target"] = torch.from_numpy(np.concatenate(targets))
        own, picture = [len(ids) for ids in texts], [self.grid[0] * self.grid[1] + 1]
        words = {"image": picture * 4 * len(own), "text": own * 3 + [self.words.longest] * len(own)}
        batch["match_plan"] = make_plan({"pair": words})
        draws = [sample.rng.random(2, dtype=np.float32) for sample in samples["pair"]]
        batch["match_draw"] = torch.from_numpy(np.stack(draws))
        return batch


def _text(sample: Sample) -> np.ndarray:
    assert sample.text is not None, "a sample of this kind has a text"
    return sample.text


def basics(samples: Samples, branches: int) -> Batch:
    """What every batch has: pictures, their codes if all are stored, record numbers, draws of stochastic depth."""
    flat = [sample for kind in samples for sample in samples[kind]]
    pictured = [sample for kind in samples if kind != "text" for sample in samples[kind]]
    batch: Batch = {"sample": torch.tensor([sample.record for sample in flat])}
    if pictured:
        images = torch.stack([sample.image for sample in pictured if sample.image is not None])
        batch["image"] = images.contiguous()  # one layout, however the pictures lay
        codes = [sample.code for sample in pictured if sample.code is not None]
        if len(codes) == len(pictured):
            batch["image_code"] = torch.stack(codes)
    if branches:
        draws = np.stack([sample.rng.random(branches, dtype=np.float32) for sample in flat], axis=1)
        batch["drop_path"] = torch.from_numpy(draws)
    return batch
