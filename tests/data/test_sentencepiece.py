"""Model files of SentencePiece, written here field by field, become tokenizers with XLM-R's ids."""

from __future__ import annotations

import itertools
import math
import random
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from multiway.data.text import TextTokenizer
from multiway.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
FIRST = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
LETTERS = [(letter, -8.0 - i / 16, NORMAL) for i, letter in enumerate("▁abcdogst<>/mknp")]
PIECES = [*FIRST, ("▁a", -2.0, NORMAL), ("▁cat", -4.0, NORMAL), ("s", -3.5, NORMAL), ("▁do", -5.0, NORMAL),
          *((text, score, kind) for text, score, kind in LETTERS if text != "s")]  # fmt: skip


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def counted(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: str, score: float, kind: int) -> bytes:
    """A piece; kind 1 is what is meant without one."""
    own = counted(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
    return counted(1, own + (varint(3 << 3) + varint(kind) if kind != NORMAL else b""))


def written(path: Path, pieces: list[tuple[str, float, int]] = PIECES, *, kind: int = 1, table: bytes = b"") -> Path:
    """A model file, with fields that nobody reads, too."""
    trainer = counted(1, b"corpus.txt") + varint(3 << 3) + varint(kind) + varint(10 << 3 | 5) + struct.pack("<f", 0.9)
    normalizer = counted(1, b"nmt_nfkc") + (counted(2, table) if table else b"") + varint(3 << 3) + varint(1)
    content = b"".join(piece(*own) for own in pieces) + counted(2, trainer) + counted(3, normalizer)
    path.write_bytes(content + varint(9 << 3 | 1) + bytes(8))
    return path


def lowering(letter: bytes, other: bytes) -> bytes:
    """A normaliser's table with one rule: a trie of bytes in an array, and the texts its leaves point into."""
    units = [0] * 512
    units[0] = 0x100 << 10
    units[0x100 ^ letter[0]] = 2 << 10 | 1 << 8 | letter[0]
    units[0x100 ^ letter[0] ^ 2] = 1 << 31
    return struct.pack("<L512L", 2048, *units) + other + b"\0"


def best(text: str, scores: Mapping[str, float]) -> float:
    """The highest sum of scores of pieces that make a text, tried out."""
    sums = [0.0] + [-math.inf] * len(text)
    for start, stop in itertools.combinations(range(len(text) + 1), 2):
        sums[stop] = max(sums[stop], sums[start] + scores.get(text[start:stop], -math.inf))
    return sums[-1]


def test_ids_are_numbers_of_pieces_plus_one(tmp_path: Path) -> None:
    words = TextTokenizer.load(written(tmp_path / "beit3.spm"))
    assert (words.bos, words.pad, words.eos, words.unk) == (0, 1, 2, 3)
    assert words.vocab == len(PIECES) + 2 and words.hide == len(PIECES) + 1
    assert words.words == (4, words.hide)
    ids = {text: i + 1 for i, (text, *_) in enumerate(PIECES)}
    assert words.ids("a cats").tolist() == [ids["▁a"], ids["▁cat"], ids["s"]]
    assert words.ids("  dog ").tolist() == [ids["▁do"], ids["g"]]
    assert words.ids("a \u4e16").tolist() == [ids["▁a"], ids["▁"], words.unk]
    assert words.text(words.ids("a cats dog")) == "a cats dog"
    assert len(words.ids("")) == 0


def test_what_is_written_reads_the_same(tmp_path: Path) -> None:
    words = TextTokenizer.load(written(tmp_path / "beit3.spm"))
    words.save(tmp_path / "tokenizer.json")
    again = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert again.hash == words.hash and again.ids("a cats dog").tolist() == words.ids("a cats dog").tolist()


def test_pieces_are_the_likeliest(tmp_path: Path) -> None:
    """Against all ways to cut random words."""
    draw = random.Random(0)
    more = {"".join(draw.choices("abcdogst", k=draw.randint(2, 3))): round(-9 * draw.random(), 3) for _ in range(40)}
    pieces = [*PIECES, *((text, score, NORMAL) for text, score in more.items() if len(text) > 1)]
    words, scores = TextTokenizer.load(written(tmp_path / "m.model", pieces)), {text: own for text, own, _ in pieces}
    for _ in range(200):
        word = "".join(draw.choices("abcdogst", k=draw.randint(1, 9)))
        found = sum(pieces[i - 1][1] for i in words.ids(word))
        assert found == pytest.approx(best("▁" + word, scores), abs=1e-4), word


def test_no_text_becomes_a_special_token(tmp_path: Path) -> None:
    pieces = [*PIECES, ("<control>", 0.0, CONTROL), ("unused", -1.0, UNUSED), ("dogma", -20.0, USER)]
    words = TextTokenizer.load(written(tmp_path / "beit3.spm", pieces))
    for text in ("<s>", "</s> a", "a <mask> s", "<pad>", "<unk>", "<control>", "unused"):
        ids = words.ids(text).tolist()
        assert not {words.bos, words.pad, words.eos, words.hide, len(PIECES) + 1, len(PIECES) + 2} & set(ids), text
    ids = {text: i + 1 for i, (text, *_) in enumerate(pieces)}
    assert words.ids("<s>").tolist() == [ids["▁"], ids["<"], ids["s"], ids[">"]]
    assert words.ids("a dogma").tolist() == [ids["▁a"], ids["▁"], ids["dogma"]], "given pieces are kept whole"


def test_the_table_of_the_normaliser_is_used(tmp_path: Path) -> None:
    plain = TextTokenizer.load(written(tmp_path / "plain.spm"))
    lower = TextTokenizer.load(written(tmp_path / "lower.spm", table=lowering(b"A", b"a")))
    assert plain.ids("A cat").tolist() != plain.ids("a cat").tolist()
    assert lower.ids("A cat").tolist() == plain.ids("a cat").tolist()
    with pytest.raises(DataError, match="table of its normaliser is damaged"):
        TextTokenizer.load(written(tmp_path / "bad.spm", table=b"\xff\xff\xff\xff"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "begin with"),
        (b"\xff" * 20, "more than 64 bits"),
        (b"\x0a\x7f", "damaged at byte"),
        (b"\x0b", "damaged at byte"),
        (b"\x0a\x02\x0a\x00", "piece 0 has no text"),
        (piece("a", math.nan, NORMAL), "piece 0 has the score nan"),
        (b"".join(piece(*own) for own in PIECES[1:]), "begin with"),
        (b"".join(piece(*own) for own in [*PIECES, ("<0x41>", 0.0, BYTE)]), "none that are bytes"),
        (b"".join(piece(*own) for own in [*PIECES, ("a", 0.0, NORMAL)]), "is there twice"),
        (b"".join(piece(*own) for own in [*PIECES, ("<mask>", 0.0, NORMAL)]), "called as a special token"),
        (b"".join(piece(*own) for own in PIECES) + counted(2, b"\x18\x02"), "of kind 2, expected 1"),
        (b"<html>", "no model of SentencePiece"),
    ],
)
def test_what_is_no_model_is_told(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "beit3.spm").write_bytes(content)
    with pytest.raises(DataError, match=why):
        TextTokenizer.load(tmp_path / "beit3.spm")


def test_any_changed_byte_is_told_or_read(tmp_path: Path) -> None:
    content = written(tmp_path / "beit3.spm").read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        (tmp_path / "beit3.spm").write_bytes(changed)
        try:
            TextTokenizer.load(tmp_path / "beit3.spm")
        except DataError as error:
            assert "beit3.spm" in str(error)
