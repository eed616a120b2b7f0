"""From the settings of a run to samples: which sources, which tokenizer, how a record becomes a sample."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from multiway.data import annotations, builtin
from multiway.data.collate import Sample, Words
from multiway.data.embedded import Digits, Scenes
from multiway.data.image import Decoder, View, colour_jitter
from multiway.data.index import Index, build
from multiway.data.index import Source as Indexed
from multiway.data.order import generator
from multiway.data.sources import discover
from multiway.data.text import TextTokenizer
from multiway.data.views import StoredViews, store_views, views_hash
from multiway.errors import ConfigError, DataError, MissingInputError
from multiway.run import Data

KINDS = ("image", "pair", "text")

SCENES = 20_000
"""Embedded scenes of the training split: about two seconds to render.

Half of them hold one digit. Where there are more, colours and places tell scenes apart, and contrast never learns to
read; among scenes of one digit it has to.
"""

HELD_OUT_DIGITS = 1000

EXAMPLES = 3
"""Records named in an error about many."""

TRIES = 8
"""Records that are asked for a text which does not belong to another one."""

FITTING = {
    "image": "pictures",
    "pair": "pictures with captions (NAME.txt beside NAME.jpg, a table with image and text, or tar shards with both)",
    "text": "texts (plain text, or a table with text)",
}
"""What a root needs for each kind of sample."""

FIT_PICTURES, FIT_PATCHES = 4_000, 20_000
"""Pictures and patches a patch codebook is fitted on."""


Source = Indexed | Scenes | Digits
"""Records of one kind: of an index, or the embedded scenes."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Everything a run reads: sources and their weights by kind, the tokenizer, names of classes, a hash of it all.

    Pictures alone and texts alone are those of the pairs where there are no others. ``tokenizer``: None = there are no
    texts; ``classes``: names of the classes by root, of the roots that have some.
    """

    sources: Mapping[str, Sequence[Source]]
    weights: Mapping[str, Sequence[float] | None]
    tokenizer: TextTokenizer | None
    hash: str
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes by number; () = no record has one. Raises ConfigError when roots have other classes."""
        (first, labels), *others = [*self.classes.items()] or [("", ())]
        for root, found in others:
            if found != labels:
                only = sorted(set(found) ^ set(labels))[:3]
                raise ConfigError(
                    f"{first} has {len(labels)} classes and {root} has {len(found)}, expected the same ones; not in "
                    f"both: {', '.join(only)}. Train on one of them, or name their classes alike and index again"
                )
        return labels

    def words(self, data: Data) -> Words:
        """What collate needs to know of the vocabulary; raises ConfigError without a tokenizer."""
        t = self.tokenizer
        if t is None:
            raise ConfigError(f"{data.root} has no texts and data.tokenizer names none: masked words need one")
        return words_of(t, data.text_tokens, data.window)


def words_of(t: TextTokenizer, longest: int, window: int) -> Words:
    """What collate needs to know of a tokenizer's vocabulary, and how long texts of pairs and texts alone may be."""
    return Words(
        bos=t.bos, eos=t.eos, mask_id=t.hide, first=t.words[0], stop=t.words[1],
        longest=longest, window=window, begins=t.begins,
    )  # fmt: skip


def scene_corpus(seed: int) -> Corpus:
    """The embedded scenes of the training writers, and a tokenizer trained on their captions."""
    half = SCENES // 2
    sets = [
        builtin.scenes("train", half, seed=seed, digits=(1, 1)),
        builtin.scenes("train", half, seed=seed, start=half),
    ]
    captions = [caption for scenes in sets for own in scenes.captions for caption in own]
    tokenizer = TextTokenizer.train(captions, vocab=512, model="bpe")
    digest = hashlib.sha256(b"".join(scenes.images.tobytes() for scenes in sets))
    digest.update("\n".join([tokenizer.hash, *captions]).encode())
    sources = [Scenes(scenes, tokenizer) for scenes in sets]
    return Corpus(
        sources=dict.fromkeys(KINDS, sources),
        weights=dict.fromkeys(KINDS),
        tokenizer=tokenizer,
        hash=digest.hexdigest(),
    )


def digit_corpus(seed: int, held_out: bool = False) -> Corpus:
    """Embedded scenes of one digit each, to be classified: of the training writers, or of those held out."""
    if held_out:
        scenes, digits = builtin.one_digit_scenes(HELD_OUT_DIGITS, seed)
    else:
        scenes = builtin.scenes("train", SCENES // 2, seed=seed, digits=(1, 1))
        digits = np.array([objects[0].digit for objects in scenes.objects])
    return Corpus(
        sources={"image": [Digits(scenes.images, digits)], "pair": [], "text": []},
        weights=dict.fromkeys(KINDS),
        tokenizer=None,
        hash=hashlib.sha256(scenes.images.tobytes() + digits.tobytes()).hexdigest(),
        classes={"scenes": tuple(builtin.DIGITS)},
    )


def open_corpus(data: Data, folder: Path, split: str | None = None) -> Corpus:
    """The indexed records of ``data.root`` and ``data.more``; what is not an index yet is indexed below ``folder``.

    ``split``: which split to take instead of ``data.split``. One tokenizer serves all roots: ``data.tokenizer``, else
    that of the first index that has texts, else one trained on the first root's texts.
    Pictures alone need none. Raises ConfigError when indices were made with different tokenizers, DataError (65) over
    ``data.max_bad``.
    """
    assert data.root is not None
    tokenizer = TextTokenizer.load(data.tokenizer) if data.tokenizer else None
    sources: dict[str, list[Source]] = {kind: [] for kind in KINDS}
    weights: dict[str, list[float]] = {kind: [] for kind in KINDS}
    hashes, classes = [], {}
    for root, weight in {data.root: 1.0, **data.more}.items():
        found = index_of(Path(root), split or data.split, folder, tokenizer, data)
        if found.tokenizer is not None:
            tokenizer = tokenizer or found.tokenizer
            if tokenizer.hash != found.tokenizer.hash:
                raise ConfigError(
                    f"{root} was indexed with tokenizer {found.tokenizer.hash[:12]}, expected {tokenizer.hash[:12]} of "
                    "the others: index it again with --tokenizer"
                )
        for source in found.sources:
            sources[source.kind].append(source)
            weights[source.kind].append(weight)
        hashes.append(found.hash)
        if found.labels:
            classes[root] = found.labels
    for kind in ("image", "text"):
        sources[kind] = sources[kind] or sources["pair"]
        weights[kind] = weights[kind] or weights["pair"]
    return Corpus(
        sources=sources,
        weights={kind: own if data.more else None for kind, own in weights.items()},
        tokenizer=tokenizer,
        hash=hashlib.sha256("".join([*hashes, tokenizer.hash if tokenizer else ""]).encode()).hexdigest(),
        classes=classes,
    )


def require_labels(corpus: Corpus) -> None:
    """Raise DataError unless every picture has a class, ConfigError unless all roots have the same classes.

    Pictures with captions count: of a folder where some have captions and some have none, all are meant.
    """
    without, total = [], 0
    for source in dict.fromkeys([*corpus.sources["image"], *corpus.sources["pair"]]):
        total += len(source)
        without += [source.key(record) for record in range(len(source)) if source.label(record) is None]
    if without or not corpus.labels:
        first = "".join(f"\n  {key}" for key in without[:EXAMPLES])
        raise DataError(
            f"{len(without)} of {total} pictures have no class. Expected one of each: a folder per class, a label "
            f"column, or KEY.cls in tar shards; then index again. The first:{first}"
        )


def splits(root: str | Path, task: str | None = None) -> list[str]:
    """Which of the splits ``train`` and ``val`` a root has, of raw data or as folders that are indices; ``task``: of
    examples.
    """
    found = []
    for name in ("train", "val"):
        try:
            if (Path(root) / name / "manifest.json").is_file():
                found.append(name)
                continue
            annotations.discover(root, task, name) if task else discover(root, name)
        except MissingInputError:
            continue
        found.append(name)
    return found


def index_of(
    root: Path,
    split: str | None,
    folder: Path,
    tokenizer: TextTokenizer | None,
    data: Data,
    task: str | None = None,
) -> Index:
    """Open a root that is an index, or the index of it below ``folder``, or make that one; ``task``: of examples."""
    if (root / "manifest.json").is_file():
        return Index.open(root).of(task)
    if split is None and len(splits(root, task)) > 1:
        split = "train"
    if split and (root / split / "manifest.json").is_file():
        return Index.open(root / split).of(task)
    place = hashlib.sha256(f"{root.resolve()}{task or ''}".encode()).hexdigest()[:8]
    own = folder / f"{root.name or 'data'}-{split or 'all'}-{place}"
    if (own / "manifest.json").is_file():
        return Index.open(own)
    return build(
        root, own, split=split, tokenizer=tokenizer, vocab=data.vocab, window=data.window,
        max_bad_fraction=data.max_bad, workers=data.workers, task=task,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Load:
    """``load(kind, source, record, epoch)``: the sample, everything random in it drawn from (seed, epoch, record).

    ``views``: how pictures of a kind are shown; ``stored``: by kind, for every source its stored views, or None;
    ``decoder``: who decodes plain JPEGs; ``mismatch``: probability that a pair has the text of another record.
    """

    corpus: Corpus
    views: Mapping[str, View]
    seed: int
    stored: Mapping[str, Sequence[StoredViews | None]] = field(default_factory=dict)
    decoder: Decoder = "pillow"
    mismatch: float = 0.0

    def __post_init__(self) -> None:
        if self.decoder == "simplejpeg" and importlib.util.find_spec("simplejpeg") is None:
            raise ConfigError('data.decoder simplejpeg is not installed: pip install "multiway[fast]"')

    def __call__(self, kind: str, source: int, record: int, epoch: int) -> Sample:
        """Read, choose a caption, draw the view."""
        rng = generator(self.seed, kind, source, epoch, record)
        origin = self.corpus.sources[kind][source]
        image = code = text = None
        if kind != "text":
            image, code = self.picture(kind, source, record, rng)
        if kind != "image":
            captions = [origin.window(record)] if origin.kind == "text" else origin.texts(record)
            text = captions[int(rng.integers(len(captions)))]
        match = kind != "pair" or not self.mismatch or rng.random() >= self.mismatch
        if not match:
            other = self.other(kind, source, record, rng)
            text, match = (text, True) if other is None else (other, False)
        label = None if kind == "text" else origin.label(record)
        return Sample(image=image, text=text, code=code, label=label, match=match, record=record, rng=rng)

    def other(self, kind: str, source: int, record: int, rng: np.random.Generator) -> np.ndarray | None:
        """A text of another record of the source that is none of this one's; None where none was found in few tries."""
        origin = self.corpus.sources[kind][source]
        own = [text.tolist() for text in origin.texts(record)]
        for _ in range(TRIES):
            texts = origin.texts(int(rng.integers(len(origin))))
            text = texts[int(rng.integers(len(texts)))]
            if text.tolist() not in own:
                return text
        return None

    def picture(self, kind: str, source: int, record: int, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """A view of a picture, and its visual tokens if the view is a stored one."""
        origin, view = self.corpus.sources[kind][source], self.views[kind]
        stored = self.stored[kind][source] if kind in self.stored else None
        if stored is None:
            return view(origin.image(record, view.source_px, self.decoder), rng), None
        image, code = stored.draw(origin.image(record, None, self.decoder), record, view.px, rng)
        return (colour_jitter(image, view.jitter, rng) if view.jitter else image), code


def stored_views(
    corpus: Corpus,
    tokenizer: Callable[[Tensor], Tensor],
    identity: str,
    views: Mapping[str, View],
    *,
    each: int,
    seed: int,
    out: Path,
    track: Callable[[Iterable[Any]], Iterable[Any]],
) -> tuple[dict[str, list[StoredViews | None]], str]:
    """``each`` stored views of every picture by kind and source, and a hash of them all; made where they are missing.

    They are kept in the index, where every run with the same views, seed and image tokenizer finds them; those of
    embedded scenes, or of an index that cannot be written, below ``out``. ``identity``: names the image tokenizer.
    Kinds that show pictures alike share them. Raises ConfigError for a view that is not a bicubic crop of true colours.
    """
    stored: dict[str, list[StoredViews | None]] = {kind: [] for kind in views}
    made: dict[Path, StoredViews] = {}
    for kind, found in stored.items():
        view = views[kind]
        if view.share is not None or view.augment is not None or view.interpolation != "bicubic":
            raise ConfigError(f"stored views are plain bicubic crops: set objective.views to 0; found {view}")
        drawn = (view.px, view.scale, view.ratio, view.flip)
        name = hashlib.sha256(f"{identity} {drawn} {each} {seed}".encode()).hexdigest()[:16]
        for number, source in enumerate(corpus.sources[kind]):
            home = source.home or out / "views" / str(number)
            beside = home.parent if home.parent.exists() else home.parents[1]
            if source.home and not os.access(beside, os.W_OK):
                home = out / "views" / hashlib.sha256(str(home).encode()).hexdigest()[:8]
            folder = home / name
            if folder not in made:
                made[folder] = store_views(
                    folder, source.image, len(source), tokenizer, view, views=each, seed=seed, track=track
                )
            found.append(made[folder])
    return stored, "".join(views_hash(folder) for folder in made)


def fit_patch_codebook(sources: Sequence[Source], codes: int, patch: int, view: View, seed: int) -> np.ndarray:
    """Mean patches by k-means over pictures of the sources: float32 (codes, 3 * patch * patch) in [0, 1].

    Seconds, with scikit-learn (extra ``quickstart``). Raises ConfigError when it is not installed, or when there are
    fewer patches than codes.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ConfigError('a patch codebook needs scikit-learn: pip install "multiway[quickstart]"') from error
    rng = generator(seed, "codebook")
    total = sum(len(source) for source in sources)
    patches = []
    for number in np.sort(rng.choice(total, min(total, FIT_PICTURES), replace=False)):
        source = 0
        while number >= len(sources[source]):
            number, source = number - len(sources[source]), source + 1
        image = view(sources[source].image(int(number), view.source_px), rng)
        rows = image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4)
        patches.append(rows.reshape(-1, 3 * patch * patch).numpy())
    flat = np.concatenate(patches)
    if len(flat) < codes:
        raise ConfigError(f"{len(flat)} patches cannot make {codes} codes: lower model.codes, or give more pictures")
    flat = flat[rng.choice(len(flat), min(len(flat), FIT_PATCHES), replace=False)].astype(np.float32) / 255
    with threadpool_limits(1):  # its own threads wait for each other: minutes instead of seconds on a busy machine
        means = MiniBatchKMeans(codes, random_state=0, n_init="auto", batch_size=2048, max_iter=20).fit(flat)
    return np.asarray(means.cluster_centers_, dtype=np.float32)


def describe(corpus: Corpus) -> dict[str, Any]:
    """Records of each kind, for logs."""
    return {kind: sum(len(source) for source in sources) for kind, sources in corpus.sources.items()}
