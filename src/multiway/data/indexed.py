"""An index that was built: what is left of raw data when every record was read once, checked, hashed and measured.

A folder of memory-mapped columns, ``tokenizer.json``, ``quarantine.jsonl`` (every bad record) and ``manifest.json``
(every file with its size and hash, all counts). Pictures stay where they are and are read by (file, offset, length).
Per source and kind, with N records and M captions in all:

============================  ==========================  ==========================================================
column                        type, shape                 meaning
============================  ==========================  ==========================================================
``file offset length``        int32 (N,), int64, int64    where the picture's bytes lie; ``file`` counts ``files``
``width height``              int32 (N,)                  of the upright picture, in pixels
``hash``                      uint8 (N, 16)               BLAKE2b of the picture's bytes
``label``                     int32 (N,)                  number in ``Index.labels``; -1 = none
``key key_end``               uint8, int64 (N,)           the record's name
``caption_end``               int64 (N,)                  pairs, examples: captions (texts) up to and with this record
``string string_end``         uint8, int64 (M,)           pairs: the captions
``token token_end``           int32, int64 (M,)           pairs: their ids without specials
``token``                     int32 (T,)                  texts: the ids of all documents, ``</s>`` after each
``picture_end answer_end``    int64 (N,)                  examples: pictures, and answers, up to and with this record;
                                                          columns of pictures have a row for each of them
``answer``                    int32 (A,)                  examples: numbers in ``Index.labels``
============================  ==========================  ==========================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from multiway.data import columns
from multiway.data.columns import piece, string
from multiway.data.image import Decoder, Limits, decode
from multiway.data.records import Fingerprint, content_hash, read_bytes
from multiway.data.text import TextTokenizer
from multiway.errors import ConfigError, DataError, MissingInputError, RecordError

FORMAT = 1

FILES = 1024
"""Files of raw data whose paths and fingerprints are kept at hand."""


def digest(value: Any) -> str:
    """SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Source:
    """The records of one kind of one source: kind ``image``, ``pair`` or ``text``.

    Its length is the number of records; of texts, the number of windows. Raises RecordError when a picture is no
    longer what was indexed.
    """

    def __init__(self, index: Index, number: int) -> None:
        entry = index.manifest["sources"][number]
        self.name: str = entry["name"]
        self.kind: str = entry["kind"]
        self._index, self._number, self._format = index, number, entry["format"]
        self._columns = columns.load(index.folder, entry["columns"], content=index.verified)
        self._stride: int = index.window - 2

    def __len__(self) -> int:
        if self.kind == "text":
            return -(-self._stream // self._stride)
        return len(self._columns["file"])

    def __reduce__(self) -> Any:
        return _reopen, (self._index.folder, self._index.roots, self._number)

    @property
    def home(self) -> Path:
        """Where things made from this source are kept with it: ``views/HASH-NUMBER`` in the index."""
        return self._index.folder / "views" / f"{self._index.hash[:12]}-{self._number}"

    @property
    def _stream(self) -> int:
        """Number of ids of all documents, without the last ``</s>``."""
        return len(self._columns["token"]) - 1

    @property
    def blocks(self) -> list[int] | None:
        """Number of records in each tar shard, in record order; None for other sources."""
        if self._format != "tar" or self.kind == "text":
            return None
        return np.unique(self._columns["file"], return_counts=True)[1].tolist()

    @cached_property
    def token_lengths(self) -> np.ndarray:
        """Number of ids, without specials: int64 (M,), of every caption in record order, or of every window."""
        if self.kind == "text":
            ends = np.minimum(np.arange(1, len(self) + 1) * self._stride, self._stream)
        else:
            ends = self._columns.get("token_end", np.zeros(0, np.int64))
        return np.diff(ends, prepend=0)

    def key(self, i: int) -> str:
        """Name of record ``i`` for people: its path or member; of a window, its number."""
        return f"window {i}" if self.kind == "text" else string(self._columns, "key", i)

    def label(self, i: int) -> int | None:
        """Number of the record's class in ``Index.labels``, or None."""
        label = -1 if self.kind == "text" else int(self._columns["label"][i])
        return None if label < 0 else label

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of the upright picture, in pixels."""
        row = self._picture(i)
        return int(self._columns["height"][row]), int(self._columns["width"][row])

    def image_hash(self, i: int) -> bytes:
        """BLAKE2b-128 of the picture's encoded bytes."""
        return self._columns["hash"][self._picture(i)].tobytes()

    def image(self, i: int, px: int | None = None, decoder: Decoder = "pillow") -> Tensor:
        """The picture, uint8 (3, H, W), as `decode` with ``px`` and ``decoder`` gives it.

        Raises RecordError: ``changed`` when its file is no longer the indexed one and neither are its bytes,
        otherwise as `read_bytes`.
        """
        return self._read(i, self._picture(i), px, decoder)

    def _picture(self, i: int) -> int:
        """Row of the record's picture in the columns of pictures."""
        return i

    def _read(self, i: int, row: int, px: int | None, decoder: Decoder) -> Tensor:
        """The picture of one row, which is record ``i``'s."""
        path, indexed = self._index.file(int(self._columns["file"][row]))
        length = int(self._columns["length"][row])
        try:
            content = read_bytes(path, int(self._columns["offset"][row]), length)
            found = content.fingerprint
            if found != indexed and content_hash(content.data) != self._columns["hash"][row].tobytes():
                raise RecordError(f"changed since it was indexed: was {indexed}, is {found}", reason="changed")
            return decode(content.data, limits=self._index.limits, px=px, decoder=decoder).image
        except RecordError as error:
            raise RecordError(f"{path}, record {i} ({self.key(i)}): {error}", reason=error.reason) from error

    def texts(self, i: int) -> list[np.ndarray]:
        """Ids of the record's captions, int32 (n,) each, without specials; [] without captions."""
        return [piece(self._columns["token"], self._columns["token_end"], j) for j in self._captions(i)]

    def strings(self, i: int) -> list[str]:
        """The record's captions; of a window, its text."""
        if self.kind == "text" and self._index.tokenizer is not None:
            return [self._index.tokenizer.text(self.window(i))]
        return [string(self._columns, "string", j) for j in self._captions(i)]

    def window(self, i: int) -> np.ndarray:
        """Window ``i`` of the documents, int32 (n,), at most ``window - 2`` ids; ``</s>`` between two documents."""
        if self.kind != "text" or not 0 <= i < len(self):
            raise IndexError(f"window {i} of {self.kind} source {self.name!r} with {len(self)} records")
        start = i * self._stride
        return self._columns["token"][start : min(start + self._stride, self._stream)]

    def _captions(self, i: int) -> range:
        return _rows(self._columns["caption_end"], i) if self.kind in ("pair", "example") else range(0)


class Examples(Source):
    """The labelled examples of a task, of one source: kind ``example``.

    Each has as many pictures and as many texts as the others. ``labels``: names of the answers by number, those of its
    index. `image`, `size` and `image_hash` are those of the first picture, `label` is the only answer.
    """

    def __len__(self) -> int:
        return len(self._columns["key_end"])

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the answers of all sources of the index, as written and in order."""
        return self._index.labels

    def pictures(self, i: int) -> int:
        """Number of pictures of example ``i``: 0, 1 or 2."""
        return len(_rows(self._columns["picture_end"], i))

    def images(self, i: int, px: int | None = None, decoder: Decoder = "pillow") -> list[Tensor]:
        """Its pictures in order, each as `image` gives one, with the same errors."""
        return [self._read(i, row, px, decoder) for row in _rows(self._columns["picture_end"], i)]

    def image_hashes(self, i: int) -> list[bytes]:
        """BLAKE2b-128 of the encoded bytes of each of its pictures."""
        return [self._columns["hash"][row].tobytes() for row in _rows(self._columns["picture_end"], i)]

    def texts(self, i: int) -> tuple[np.ndarray, ...]:
        """Ids of its texts in order, int32 (n,) each, without specials."""
        return tuple(super().texts(i))

    def strings(self, i: int) -> tuple[str, ...]:
        """Its texts in order."""
        return tuple(super().strings(i))

    def answers(self, i: int) -> tuple[int, ...]:
        """Numbers of its answers in `labels`, in the order they were given in; () = nobody answered."""
        return tuple(piece(self._columns["answer"], self._columns["answer_end"], i).tolist())

    def label(self, i: int) -> int | None:
        """Number of its answer, or None when it has none or several."""
        found = self.answers(i)
        return found[0] if len(found) == 1 else None

    def _picture(self, i: int) -> int:
        return _rows(self._columns["picture_end"], i)[0]


def _rows(ends: np.ndarray, i: int) -> range:
    """Rows of record ``i`` in a column that has several of each, ending at ``ends``."""
    return range(int(ends[i - 1]) if i else 0, int(ends[i]))


class Index:
    """An index that was built: ``sources``, ``labels``, ``tokenizer`` (None without texts), ``limits``, ``window``.

    ``task``: what its examples are examples of, None = it has pictures and texts to train on. ``hash``: identity of all
    that training reads, wherever it lies; ``manifest``: everything known about it.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], roots: Sequence[Path], verify: bool) -> None:
        self.folder, self.manifest, self.roots, self.verified = folder, manifest, tuple(roots), verify
        self.hash: str = manifest["hash"]
        self.window: int = manifest["window"]
        self.labels: tuple[str, ...] = tuple(manifest["labels"])
        self.task: str | None = manifest.get("task")
        limits = manifest["limits"]
        self.limits = Limits(**limits | {"formats": tuple(limits["formats"])})
        self.tokenizer = TextTokenizer.load(folder / "tokenizer.json") if manifest["tokenizer"] else None
        self._files = columns.load(folder, manifest["files"], content=verify)
        self.file = lru_cache(FILES)(self._file)  # a shard has many records
        self.sources = tuple(
            (Examples if entry["kind"] == "example" else Source)(self, i) for i, entry in enumerate(manifest["sources"])
        )

    @classmethod
    def open(cls, folder: Path | str, *, roots: Sequence[Path | str] | None = None, verify: bool = True) -> Index:
        """Open an index and verify every file of it by size and, with ``verify``, by hash.

        ``roots``: where the raw data lie now, in the order of ``Index.roots``; None = where they were.

        Raises MissingInputError without one, DataError when a file of it is missing or altered.
        """
        folder = Path(folder).resolve()
        path = folder / "manifest.json"
        if not path.is_file():
            raise MissingInputError(f"{folder} is no index, it has no manifest.json: run `multiway data index` first")
        try:
            manifest = json.loads(path.read_bytes())
            expected = manifest.pop("manifest_hash")
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error!r}: build the index again") from error
        if expected != digest(manifest) or manifest["format"] != FORMAT:
            raise DataError(f"{path} is altered or not of format {FORMAT}: build the index again")
        at = [Path(root).resolve() for root in (manifest["roots"] if roots is None else roots)]
        if len(at) != len(manifest["roots"]):
            raise ConfigError(f"{folder} has the roots {manifest['roots']}: expected as many, found {len(at)}")
        index = cls(folder, manifest, at, verify)
        if index.tokenizer is not None and index.tokenizer.hash != manifest["tokenizer"]:
            raise DataError(f"{folder / 'tokenizer.json'} is not the tokenizer of this index: build the index again")
        return index

    def of(self, task: str | None = None) -> Index:
        """This index; raises ConfigError unless it has examples of the task, or None: pictures and texts."""
        if self.task != task:
            names = [f"examples ({name})" if name else "pictures and texts" for name in (self.task, task)]
            raise ConfigError(f"{self.folder} is an index of {names[0]}, expected one of {names[1]}: index others")
        return self

    def __reduce__(self) -> Any:
        return _reopen, (self.folder, self.roots, None)

    def _file(self, number: int) -> tuple[Path, Fingerprint]:
        """Path of a file of raw data, and its fingerprint when it was indexed."""
        table = self._files
        path = self.roots[int(table["root"][number])] / string(table, "name", number)
        return path, Fingerprint(int(table["size"][number]), int(table["mtime_ns"][number]))


def _reopen(folder: Path, roots: Sequence[Path], source: int | None) -> Index | Source:
    """Unpickle: map the same columns again, which were verified when they were opened first."""
    index = Index.open(folder, roots=roots, verify=False)
    return index if source is None else index.sources[source]


def overlap(a: Index, b: Index) -> list[tuple[str, str]]:
    """Pictures that are in both, byte for byte: (key in ``a``, key in ``b``), for instance of a train and a test split.

    The same picture encoded anew is another one here.
    """
    seen: dict[bytes, tuple[Source, int]] = {}
    for digest, source, i in _hashes(a):
        seen.setdefault(digest, (source, i))
    found = []
    for digest, source, i in _hashes(b):
        if (first := seen.get(digest)) is not None:
            found.append((first[0].key(first[1]), source.key(i)))
    return found


def _hashes(index: Index) -> Iterator[tuple[bytes, Source, int]]:
    """Every picture's hash with the record that shows it."""
    for source in (s for s in index.sources if s.kind != "text"):
        for i in range(len(source)):
            for digest in source.image_hashes(i) if isinstance(source, Examples) else [source.image_hash(i)]:
                yield digest, source, i


def describe(index: Index) -> list[dict[str, str | int]]:
    """A row per source for people: kind, records, size in pixels, captions or windows, token lengths, unknown share."""
    rows = []
    for source, entry in zip(index.sources, index.manifest["sources"], strict=True):
        row: dict[str, str | int] = {"source": source.name, "kind": source.kind, "records": entry["records"]}
        if source.kind != "text":
            cells = entry["columns"]
            sizes = columns.load(index.folder, {n: cells[n] for n in ("width", "height")}, content=False)
            if len(sizes["width"]):
                row["pixels"] = " x ".join(_range(sizes[n]) for n in ("width", "height"))
        if len(source.token_lengths):
            row["texts"] = len(source.token_lengths)
            row["tokens"] = entry["tokens"]
            row["tokens per text"] = _range(source.token_lengths)
            row["unknown"] = f"{entry['unknown_tokens'] / max(1, entry['tokens']):.2%}"
        rows.append(row)
    return rows


def _range(values: np.ndarray) -> str:
    """Least, median and greatest."""
    return "-".join(str(int(x)) for x in dict.fromkeys((values.min(), np.median(values), values.max())))
