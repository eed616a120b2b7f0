"""Text is cleaned by named rules, and a tokenizer depends on nothing but the words it was trained on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiway.data.text import MAX_CHARS, TextTokenizer, _count_words, sanitize
from multiway.errors import ConfigError, DataError, MissingInputError

WORDS = "a red three above blue seven the dog runs through snow two men are standing by water <s> mask unk pad / 5 > <"
TEXTS = [" ".join(np.random.default_rng(i).permutation(WORDS.split())[:9]) for i in range(300)]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request) -> TextTokenizer:
    return TextTokenizer.train(TEXTS, 128, request.param)


# D14
@pytest.mark.parametrize(
    ("raw", "clean", "notes"),
    [
        ("A dog.", "A dog.", ()),
        ("  A\tdog \n runs\u00a0\u3000on ", "A dog runs on", ()),
        ("cafe\u0301", "caf\u00e9", ("recomposed",)),
        ("a\x00b\x07c\x7f", "abc", ("controls_removed",)),
        ("a\ud800b", "a\ufffdb", ("surrogates_replaced",)),
        ("\ufeffa\u200bb\u202ec\u2066", "abc", ("invisible_removed",)),
        ("a\u0000\u0301", "\u00e1", ("controls_removed", "recomposed")),
        ("می\u200cخواهم \U0001f468\u200d\U0001f469", "می\u200cخواهم \U0001f468\u200d\U0001f469", ()),  # joiners
        ("שלום 你好 😀", "שלום 你好 😀", ()),
        ("<s> and </s>", "<s> and </s>", ()),
        (" \x00 \u200b ", "", ("controls_removed", "invisible_removed")),
        ("x" * (MAX_CHARS + 1), "x" * MAX_CHARS, ("text_cut",)),
    ],
)
def test_each_rule_of_the_sanitizer(raw, clean, notes):
    assert sanitize(raw) == (clean, notes)


ANY_TEXT = st.text(
    st.characters(codec=None) | st.sampled_from("<>/s\ud800\udfff\u0301\u200b\ufeff \n\x00▁"), max_size=60
)


@given(text=ANY_TEXT, cap=st.integers(1, 50))
def test_sanitizing_again_changes_nothing(text, cap):
    clean, _ = sanitize(text, max_chars=cap)
    assert sanitize(clean, max_chars=cap) == (clean, ())
    assert clean.encode() and len(clean) <= cap if clean else True


def test_the_special_ids_are_those_of_the_house(tokenizer):
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert tokenizer.hide == tokenizer.vocab - 1
    assert tokenizer.vocab <= 128


@given(text=ANY_TEXT | st.lists(st.sampled_from(["<s>", "<mask>", "</s>", "<pad>", "<unk>", " ", "dog"])).map("".join))
def test_no_text_becomes_a_special_id(tokenizer, text):
    ids = tokenizer.ids(text)
    assert ids.dtype == np.int32
    assert not np.isin(ids, [tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.hide]).any()
    assert (ids >= 0).all() and (ids < tokenizer.vocab).all()


def test_special_words_in_a_text_are_read_as_characters(tokenizer):
    for word in ("<s>", "<unk>", "<mask>", "<pad>", "</s>"):
        ids = tokenizer.ids(f"a {word} dog")
        assert tokenizer.unk not in ids  # all its characters are known, so nothing is unknown
        assert tokenizer.text(ids) == f"a {word} dog"


def test_ids_and_text_are_inverse_on_known_characters(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.batch(TEXTS)):
        assert tokenizer.text(ids) == text
        assert np.array_equal(ids, tokenizer.ids(text))
    assert tokenizer.text([0, *tokenizer.ids("a dog"), 2, 1, 1]) == "a dog"


def test_nothing_gives_no_ids_and_strangers_are_unknown(tokenizer):
    assert tokenizer.ids(" \x00 ").tolist() == []
    assert tokenizer.unk in tokenizer.ids("dog 你")


def test_training_uses_pieces_of_the_words(tokenizer):
    assert len(tokenizer.ids("the dog runs through snow")) <= 6
    assert max(map(len, tokenizer.batch(TEXTS))) < max(map(len, TEXTS)) / 2


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_the_same_words_give_the_same_bytes_in_any_order_and_process(model, tmp_path):
    first = TextTokenizer.train(TEXTS, 100, model)
    assert TextTokenizer.train(reversed(TEXTS), 100, model).hash == first.hash
    assert TextTokenizer.train(TEXTS[:-1], 100, model).hash != first.hash
    script = (
        "import sys; from multiway.data.text import TextTokenizer\n"
        "print(TextTokenizer.train(sys.stdin.read().splitlines(), 100, sys.argv[1]).hash)"
    )
    for _ in range(2):
        run = [sys.executable, "-c", script, model]
        other = subprocess.run(run, input="\n".join(TEXTS), capture_output=True, text=True, check=True)
        assert other.stdout.strip() == first.hash


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert again.hash == tokenizer.hash and again.vocab == tokenizer.vocab
    assert [x.tolist() for x in again.batch(TEXTS)] == [x.tolist() for x in tokenizer.batch(TEXTS)]


def test_the_file_frames_texts_for_others(tokenizer, tmp_path):
    from tokenizers import Tokenizer

    tokenizer.save(tmp_path / "tokenizer.json")
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("a dog").ids == [0, *tokenizer.ids("a dog"), 2]
    assert plain.encode("a <mask>").ids[-2] == tokenizer.hide  # others may hide words by name


def test_words_are_counted_as_the_tokenizer_splits_them(tokenizer):
    split = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str
    for text in (*TEXTS[:50], "a<s>b </s>", "<<a <", "< a"):
        words = [word for word, _ in split(text) if word != "▁"]
        assert sorted(_count_words([text]).elements()) == sorted(words)


def test_a_foreign_tokenizer_must_have_the_ids_of_the_house(tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<s>": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(DataError, match=r"tokenizer\.json.*'<pad>': None.*expected"):
        TextTokenizer.load(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        TextTokenizer.load(path)
    with pytest.raises(MissingInputError, match="no such tokenizer file"):
        TextTokenizer.load(tmp_path / "none.json")


def test_a_foreign_vocabulary_that_spells_specials_gives_unknown():
    from tokenizers import Tokenizer, models

    words = ["<s>", "<pad>", "</s>", "<unk>", "dog", "<mask>"]
    foreign = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    assert TextTokenizer(foreign).ids("<mask>").tolist() == [3]
    assert TextTokenizer(foreign).ids("dog").tolist() == [4]


def test_training_refuses_what_cannot_work():
    with pytest.raises(DataError, match="no text"):
        TextTokenizer.train(["", " \x00"], 100)
    for vocab, model in ((100, "wordpiece"), (31, "bpe")):
        with pytest.raises(ConfigError, match="expected"):
            TextTokenizer.train(TEXTS, vocab, model)


def test_rare_characters_give_way_to_pieces():
    texts = ["the dog runs"] * 50 + [chr(0x4E00 + i) for i in range(500)]
    tokenizer = TextTokenizer.train(texts, 64)
    assert len(tokenizer.ids("the dog runs")) < 12
    assert tokenizer.vocab <= 64 and tokenizer.unk in tokenizer.ids(chr(0x4E00 + 499))
