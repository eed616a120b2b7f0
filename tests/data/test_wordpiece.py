"""BERT's WordPiece against transformers', on many scripts; its special ids; where words begin; files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, trainers

from multiway.data.text import TextTokenizer, sanitize
from multiway.data.wordpiece import read_pieces, wordpiece
from multiway.errors import DataError
from tests.data.test_bpe import TEXTS

SPECIALS = ["[PAD]", *(f"[unused{i}]" for i in range(3)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MORE = [
    "Hello, WORLD!! naïve café-au-lait",
    "e\u0301 \u00e9 \u200b \ufeff \x07 tab\tnew\nline",
    "x" * 101,
    "##ing [SEP]",
]


def learned(lower: bool) -> list[str]:
    """Pieces of the texts, found by the library BERT's tokenizers are made with, behind the specials."""
    like = wordpiece([*SPECIALS, "a" if lower else "A"])
    learner = Tokenizer(models.WordPiece({}, unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    trainer = trainers.WordPieceTrainer(vocab_size=450, special_tokens=SPECIALS, show_progress=False)
    learner.train_from_iterator(TEXTS, trainer)
    return sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def pieces(request: pytest.FixtureRequest) -> list[str]:
    return learned(request.param)


def written(pieces: list[str], folder: Path) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return path


@pytest.mark.parity
def test_ids_equal_transformers_on_many_scripts(pieces: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lower = "A" not in pieces
    theirs = transformers.BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=lower)
    theirs.save_pretrained(tmp_path)
    ours = TextTokenizer.load(written(pieces, tmp_path))
    file = TextTokenizer.load(tmp_path / "tokenizer.json")
    known = 0
    for text in [*TEXTS, *MORE[:-1]]:
        # Letters with accents are one character here; in lower case BERT takes the accents off anyway.
        want = theirs(text if lower else sanitize(text)[0])["input_ids"]
        for words in (ours, file):
            assert [words.bos, *words.ids(text), words.eos] == want, text
        known += sum(i > len(SPECIALS) for i in want)
    assert known > 200
    for field in ("bos", "eos", "pad", "unk", "hide", "vocab", "words"):
        assert getattr(ours, field) == getattr(file, field)


def test_special_ids_are_berts(tmp_path: Path) -> None:
    """Places as in bert-base-uncased, whose specials stand behind 99 unused pieces."""
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [f"[unused{i}]" for i in range(99, 994)] + [f"piece{i}" for i in range(29523)]
    words = TextTokenizer.load(written(pieces, tmp_path))
    assert (words.pad, words.unk, words.bos, words.eos, words.hide) == (0, 100, 101, 102, 103)
    assert words.vocab == 30522 and words.words == (104, 30522)


def test_pieces_say_where_words_begin(pieces: list[str], tmp_path: Path) -> None:
    words = TextTokenizer(wordpiece(pieces))
    assert words.begins is not None and words.begins.tolist() == [not piece.startswith("##") for piece in pieces]
    ids = words.ids("grinning faces with, 大眼")
    assert words.begins[ids].sum() == 6  # four words of letters and signs, two characters
    words.save(tmp_path / "tokenizer.json")
    again = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert again.hash == words.hash and np.array_equal(again.begins, words.begins)


def test_other_tokenizers_say_it_too() -> None:
    words = TextTokenizer.train(["the dog runs through snow", "大きな目の笑顔 smile"] * 30, 96)
    assert words.begins is not None
    assert words.begins[words.ids("the dog runs")].sum() == 3
    begins = words.begins[words.ids("大きな目")]
    assert begins.all() and len(begins) > 1
    from multiway.data.bpe import clip_bpe

    assert TextTokenizer(clip_bpe([])).begins is None  # a piece begins a word where the one before ended one


def test_no_text_becomes_a_special_id(pieces: list[str]) -> None:
    words = TextTokenizer(wordpiece(pieces))
    for text in ("[SEP]", "[MASK] [CLS]", "a [PAD]"):
        assert not np.isin(words.ids(text), [words.bos, words.pad, words.eos, words.hide]).any()
    assert words.text(words.ids("grinning face")).lower() == "grinning face"


def test_damaged_vocabularies_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab.txt: no vocabulary of BERT: 1 pieces stand twice, \['\[MASK\]'\]"):
        read_pieces(written(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "a"], tmp_path))
    assert read_pieces(written(["heading", "a b"], tmp_path)) is None
    assert read_pieces(tmp_path / "none") is None
