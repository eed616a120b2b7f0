"""SentencePiece's model files as tokenizers, with the ids of XLM-R, which BEiT-3 has: piece number plus one.

A model file is a message of protocol buffers: pieces with scores, what they were trained as, and how texts are
normalised. It is read as data, by the few rules of that format, and nothing else of it is looked at.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from multiway.data.bpe import MAX_BYTES
from multiway.errors import DataError

FIRST = ("<unk>", "<s>", "</s>")
"""The first pieces of a model file."""
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""What XLM-R has in their place; the rest follows, and ``<mask>``."""
HIDE, SPACE = "<mask>", "\u2581"
SPELT = r"<(?=(?:/?s|pad|unk|mask)>)"
"""The beginning of what spells a special token; it is kept apart, so that no text becomes one."""
NORMAL, USER, BYTE = 1, 4, 6
"""Kinds of pieces: learned, given by its trainers and always kept whole, and a byte of what is unknown."""
UNIGRAM = 1
NEVER = "\0"
"""Before pieces that stand for no text, such as control symbols; no text has it (`sanitize`)."""
VARINT, WIDE, COUNTED, NARROW = 0, 1, 2, 5
"""How a field's value is written."""


class Piece(NamedTuple):
    """A piece with the logarithm of its probability and its kind."""

    text: str
    score: float
    kind: int


def sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a unigram model file such as ``beit3.spm``.

    Raises DataError for a file that is none, is not of unigrams, or begins with other pieces. Source: masked.md 6.4.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        pieces, charsmap, prefix = _parsed(data)
        return _assembled(pieces, charsmap, prefix)
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise DataError(f"{path}: no model of SentencePiece that is read here: {error}") from error


def _parsed(data: bytes) -> tuple[list[Piece], bytes, bool]:
    """Pieces in order, the table of the normaliser, and whether texts begin with a space."""
    pieces, charsmap, prefix = [], b"", True
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            own = dict(_fields(value))
            text, score = own.get(1, b""), own.get(2, b"\0\0\0\0")
            if not isinstance(text, bytes) or not isinstance(score, bytes) or not text:
                raise ValueError(f"piece {len(pieces)} has no text")
            [value] = struct.unpack("<f", score)
            if not math.isfinite(value):
                raise ValueError(f"piece {len(pieces)} has the score {value}")
            pieces.append(Piece(text.decode(), value, int(own.get(3, NORMAL))))
        elif number == 2 and isinstance(value, bytes):
            kind = dict(_fields(value)).get(3, UNIGRAM)
            if kind != UNIGRAM:
                raise ValueError(f"its model is of kind {kind!r}, expected {UNIGRAM}, unigrams")
        elif number == 3 and isinstance(value, bytes):
            own = dict(_fields(value))
            table, prefix = own.get(2, b""), bool(own.get(3, 1))
            charsmap = table if isinstance(table, bytes) else b""
    return pieces, charsmap, prefix


def _assembled(pieces: list[Piece], charsmap: bytes, prefix: bool) -> Tokenizer:
    """The tokenizer of these pieces; six digits of a score survive the library's JSON reader, all of them do not."""
    first = tuple(piece.text for piece in pieces[: len(FIRST)])
    if first != FIRST or any(piece.kind == BYTE for piece in pieces):
        raise ValueError(f"its pieces begin with {first!a}, expected {FIRST}, and none that are bytes")
    own = pieces[len(FIRST) :]
    most = max((piece.score for piece in own if piece.kind == NORMAL), default=0.0)
    vocab = [(text, 0.0) for text in SPECIALS]
    for text, score, kind in own:
        score = len(text) * most - 0.1 if kind == USER else score  # as SentencePiece: more than its parts
        vocab.append((text if kind in (NORMAL, USER) else NEVER + text, round(score, 6)))
    vocab.append((HIDE, 0.0))
    if len({text for text, _ in vocab}) < len(vocab):
        raise ValueError("a piece is there twice, or is called as a special token")
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=SPECIALS.index("<unk>")))
    table = [_table(charsmap)] if charsmap else []
    spaces = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([*table, *spaces])
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPELT), "isolated"), pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    tokenizer.add_special_tokens([*SPECIALS, HIDE])
    bos, eos = SPECIALS[0], SPECIALS[2]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} {eos} $B {eos}", special_tokens=[(bos, 0), (eos, 2)]
    )
    return tokenizer


def _table(charsmap: bytes) -> normalizers.Normalizer:
    try:
        return normalizers.Precompiled(charsmap)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the table of its normaliser is damaged: {error}") from error


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields; raises ValueError, IndexError where it is damaged."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        if tag & 7 == VARINT:
            value, place = _varint(data, place)
        else:
            length = {WIDE: 8, NARROW: 4}.get(tag & 7, 0)
            if tag & 7 == COUNTED:
                length, place = _varint(data, place)
            if (not length and tag & 7 != COUNTED) or place + length > len(data):
                raise ValueError(f"damaged at byte {place}")
            value, place = data[place : place + length], place + length
        yield tag >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, the last byte below 128, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {place}")
