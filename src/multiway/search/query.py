"""Exact search: every vector is compared, in plain matrix products."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from multiway.data.shards import IMAGE_PARTS
from multiway.errors import ConfigError, MissingInputError
from multiway.pretrained import Pretrained, load
from multiway.search.store import Store

ROW_BITS = 32
ROWS = 2**ROW_BITS - 1
"""Most rows of a store: keys hold score and row in 64 bits."""


@dataclass(frozen=True)
class Hit:
    """A record that was found.

    ``score``: cosine; ``kind``: image or text; ``path``: its file, or None; ``key``: its name there.
    """

    score: float
    row: int
    kind: str
    key: str
    path: str | None
    captions: tuple[str, ...]

    @property
    def caption(self) -> str | None:
        """The first of its captions; of a text, the text."""
        return self.captions[0] if self.captions else None

    def __str__(self) -> str:
        place = self.path or self.key
        member = "" if place.endswith(self.key) else f" {self.key}"
        return f"{self.score:.4f}  {place}{member}" + (f"  {self.caption}" if self.caption else "")


def search(
    store: Store | str | Path, query: str | Path, k: int = 5, *, model: Pretrained | str | Path | None = None
) -> list[Hit]:
    """The k records nearest to words or to a picture, best first, equal ones by row.

    ``query``: a path, or words that name no file; ``model``: None = the one the store was made with, from where it was.

    Raises ConfigError when another model made the store, MissingInputError for a picture that is not there, otherwise
    as `Store.open <multiway.search.store.Store.open>` and `multiway.pretrained.load`.
    """
    store = store if isinstance(store, Store) else Store.open(store)
    encoder = model if isinstance(model, Pretrained) else load(model or store.manifest["model"])
    if encoder.fingerprint != store.fingerprint:
        raise ConfigError(
            f"{store.folder} was made by another model ({store.manifest['model']}, {store.fingerprint[:12]}) than "
            f"{encoder.name or 'this one'} ({encoder.fingerprint[:12]}): their vectors cannot be compared; use that "
            "model, or embed again into a new folder"
        )
    vector = encoder.encode_image(query) if _is_picture(query) else encoder.encode_text(str(query))
    scores, rows = nearest(store.parts, vector, k)
    found = zip(scores[0].tolist(), rows[0].tolist(), strict=True)
    return [_hit(score, row, store) for score, row in found]


def nearest(parts: Iterable[Tensor], queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows with the greatest inner products: scores float32 (Q, K) and rows int64 (Q, K), K = min(k, N).

    parts: float32 (n, D) each, together the N rows in order; queries: float32 (Q, D). Best first; of equal scores the
    lower row comes first. Raises ConfigError for k below 1 and for vectors of another width.
    """
    if k < 1:
        raise ConfigError(f"the number of results is {k}, expected 1 or more")
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    start = 0
    for part in parts:
        if len(part) == 0:
            continue
        if part.shape[1] != queries.shape[1]:
            raise ConfigError(f"queries of width {queries.shape[1]} in a store of width {part.shape[1]}")
        rows = torch.arange(start, start + len(part), device=queries.device)
        keys = _keys(queries @ part.to(queries.device).T, rows)
        best = torch.cat([best, keys.topk(min(k, len(part)), dim=1).values], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
        start += len(part)
    assert start <= ROWS, "rows fit into a key"
    return _scores(best), ROWS - (best & ROWS)


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """Integers in the order of (score, lower row): the bits of a float, made monotone, then the row, reversed."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
    return (_flip(bits) << ROW_BITS) | (ROWS - rows)


def _scores(keys: Tensor) -> Tensor:
    """The scores in keys."""
    return _flip(keys >> ROW_BITS).int().view(torch.float32)


def _flip(bits: Tensor) -> Tensor:
    """Bits of a float32 as int64 to integers that are ordered as it is, and back: negative ones run backwards."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _is_picture(query: str | Path) -> bool:
    """Whether a query is a file; what looks like a picture's name and is none is an error, not words."""
    text = str(query)
    try:
        if Path(text).is_file():
            return True
    except OSError:  # words longer than any name
        return False
    if isinstance(query, Path) or (" " not in text and text.rpartition(".")[2].lower() in IMAGE_PARTS and "." in text):
        raise MissingInputError(f"{query}: no such picture")
    return False


def _hit(score: float, row: int, store: Store) -> Hit:
    record = store.record(row)
    return Hit(score, row, record["kind"], record["key"], record["path"], tuple(record["captions"]))
