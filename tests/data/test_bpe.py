"""CLIP's byte-level BPE against transformers', on many scripts; its special ids; files that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, trainers

from multiway.data.bpe import END, START, WORD_END, alphabet, clip_bpe, read_merges
from multiway.data.collate import MaskedCollate, Words
from multiway.data.text import TextTokenizer, framed, sanitize
from multiway.errors import ConfigError, DataError

TEXTS = [
    "A photo of a cat, it's 25 cats!!", "grinning face with big eyes", "visage très souriant avec de grands yeux",
    "großes grinsendes Gesicht", "grinsendes Gesicht mit großen Augen", "ухмыляющееся лицо с большими глазами",
    "πρόσωπο με πλατύ χαμόγελο και μεγάλα μάτια", "وجه مبتسم بعينين كبيرتين", "פרצוף מחייך עם עיניים גדולות",
    "बड़ी आँखों वाला मुस्कुराता चेहरा", "বড় চোখ সহ মুচকি হাসির মুখ", "大きな目の笑顔", "大眼睛的笑脸", "큰 눈으로 웃는 얼굴",
    "หน้ายิ้มตาโต", "mặt cười toe toét với mắt to", "yüz: İstanbul'da gülümseyen ışık", "emoji 😀 👩‍👩‍👧 🇩🇪 ½ ² Ⅷ",
    "don't we'll I'VE  x\ty\n z", "e\u0301galite\u0301 ﬁ \u00a0 end", "<|endoftext> <|startoftext|", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def merges() -> list[tuple[str, str]]:
    """Learned on the texts by the library CLIP's tokenizers are made with."""
    like = clip_bpe([])
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=900, end_of_word_suffix=WORD_END, initial_alphabet=alphabet(), special_tokens=[START, END],
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(TEXTS, trainer)
    return [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]


@pytest.fixture(scope="module")
def words(merges: list[tuple[str, str]]) -> TextTokenizer:
    return TextTokenizer(clip_bpe(merges))


@pytest.mark.parity
def test_ids_equal_transformers_on_many_scripts(merges: list[tuple[str, str]], words: TextTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    vocab = json.loads(clip_bpe(merges).to_str())["model"]["vocab"]
    theirs = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (words.bos, words.eos)
    longest = 0
    for text in TEXTS:
        want = theirs(text)["input_ids"]
        assert [words.bos, *words.ids(text), words.eos] == want, text
        assert sanitize(text)[0].casefold() == "" or len(want) > 2
        longest = max(longest, len(want))
    assert len(merges) > 100 and longest > 20


@pytest.mark.parity
def test_a_file_of_transformers_gives_the_same_ids(
    merges: list[tuple[str, str]], words: TextTokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    vocab = json.loads(clip_bpe(merges).to_str())["model"]["vocab"]
    transformers.CLIPTokenizer(vocab=vocab, merges=merges).save_pretrained(tmp_path)
    found = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert (found.bos, found.eos, found.vocab, found.words) == (words.bos, words.eos, words.vocab, words.words)
    for text in TEXTS:
        assert found.ids(text).tolist() == words.ids(text).tolist()


def test_ids_are_bytes_then_bytes_at_an_end_then_merges_then_the_specials() -> None:
    words = TextTokenizer(clip_bpe([("h", "i</w>")]))
    assert (words.bos, words.eos, words.pad, words.unk, words.hide) == (513, 514, 514, 514, -1)
    assert words.words == (0, 513) and words.vocab == 515
    assert words.ids("!").tolist() == [256]  # the first byte, at the end of a word
    assert words.ids("HI hi").tolist() == [512, 512]
    assert words.ids("é").tolist() == [alphabet().index("Ã"), 256 + alphabet().index("©")]  # two bytes


def test_every_text_survives_the_way_back_in_lower_case(words: TextTokenizer) -> None:
    for text in ("a photo of 2 cats", "großes gesicht", "大きな 目", "πρόσωπο"):
        assert words.text(words.ids(text)).replace(" ", "") == text.replace(" ", "")
    assert words.text(words.ids("Two Cats")) == "two cats"


def test_no_text_becomes_a_special_id(words: TextTokenizer) -> None:
    for text in (START, END, f"a {END}{END} b"):
        ids = words.ids(text)
        assert len(ids) > 3 and max(ids) < words.bos


def test_texts_are_framed_and_cut_with_their_end(words: TextTokenizer) -> None:
    ids = words.ids("a photo of a cat")
    assert framed(ids, words.bos, words.eos, 77).tolist() == [words.bos, *ids, words.eos]
    assert framed(ids, words.bos, words.eos, 4).tolist() == [words.bos, *ids[:2], words.eos]
    assert framed(ids, -1, words.eos, 4).tolist() == [*ids[:3], words.eos]
    assert framed(ids[:0], words.bos, words.eos, 4).tolist() == [words.bos, words.eos]


def test_published_lists_of_merges_are_read(
    merges: list[tuple[str, str]], words: TextTokenizer, tmp_path: Path
) -> None:
    content = "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n"
    (tmp_path / "merges.txt").write_text(content, encoding="utf-8")
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("merges.txt", "bpe.txt.gz"):
        assert read_merges(tmp_path / name) == merges
        assert TextTokenizer.load(tmp_path / name).hash == words.hash


def test_openais_list_is_cut_to_the_merges_it_uses(tmp_path: Path) -> None:
    (tmp_path / "bpe.txt").write_text('"heading\n' + "a b\n" * 60_000)
    assert len(read_merges(tmp_path / "bpe.txt")) == 48_894
    letters = alphabet()
    many = [(a, b) for a in letters for b in letters][:48_894]
    assert TextTokenizer(clip_bpe(many)).vocab == 49_408
    assert TextTokenizer(clip_bpe(many)).eos == 49_407


@pytest.mark.parametrize("content", [b"", b"heading\n", b"heading\na b c\n", b"\xff\xfe", b"heading\nalone\n"])
@pytest.mark.parametrize("name", ["merges.txt", "bpe.gz"])
def test_other_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="no list of merges"):
        TextTokenizer.load(tmp_path / name)


def test_merges_of_unknown_pieces_are_refused() -> None:
    with pytest.raises(DataError, match="no earlier merge made"):
        clip_bpe([("th", "e")])


def test_siglips_special_ids_are_known() -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁b", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    words = TextTokenizer(tokenizer)
    assert (words.bos, words.pad, words.eos, words.unk, words.hide) == (-1, 1, 1, 2, -1)
    assert words.words == (3, 5)


def test_words_cannot_be_hidden_without_a_mask() -> None:
    words = Words(bos=0, eos=1, mask_id=-1, first=2, stop=9, longest=8, window=8)
    with pytest.raises(ConfigError, match="has no <mask>"):
        MaskedCollate(words=words, grid=(2, 2))
