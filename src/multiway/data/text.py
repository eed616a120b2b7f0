"""Text: cleaned by fixed rules, then cut into the ids of a tokenizer that is trained on the user's own words."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from multiway.data.bpe import clip_bpe, read_merges
from multiway.data.sentencepiece import sentencepiece
from multiway.data.wordpiece import read_pieces, wordpiece
from multiway.errors import ConfigError, DataError, MissingInputError

MAX_CHARS = 100_000
"""Longest text that is tokenized in one piece, in characters."""

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
BOS, EOS, UNK = 0, 2, 3
HIDE = "<mask>"
OURS: Mapping[str, str] = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "hide": HIDE}
OTHERS: Sequence[Mapping[str, str]] = (
    {"bos": "<|startoftext|>", "pad": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    {"pad": "</s>", "eos": "</s>", "unk": "<unk>"},
    {"bos": "[CLS]", "pad": "[PAD]", "eos": "[SEP]", "unk": "[UNK]", "hide": "[MASK]"},
)
"""What the special ids are called: here; by CLIP and SigLIP, which have no ``<mask>``; by BERT."""
MAX_PIECE = 16  # characters, as SentencePiece
CANDIDATES = 3  # candidate pieces for each one the vocabulary will have
SHRINK = 0.75  # what survives one round of pruning
CHUNK = 100_000  # words segmented at once

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")
_UNSPACED = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Scripts without spaces: Thai, Lao, kana, Chinese characters."""
_WORD = re.compile(r"^▁<|<|▁?[^<▁]{1,64}|▁")  # words without end would take training hours


def sanitize(text: str, *, max_chars: int = MAX_CHARS) -> tuple[str, tuple[str, ...]]:
    """Return the text as the tokenizer may see it, and the names of the rules that changed it.

    Rules, in this order: ``surrogates_replaced`` (lone ones, by U+FFFD), ``controls_removed`` (NUL and all others but
    white space), ``invisible_removed`` (byte-order marks, zero-width spaces, direction marks; joiners stay, scripts
    and emoji need them), ``recomposed`` (to NFC), then runs of white space become one space (not counted), and
    ``text_cut`` (to ``max_chars`` characters). Idempotent.
    """
    notes = []
    if not (text.isascii() and text.isprintable()):
        for name, pattern, other in (
            ("surrogates_replaced", _SURROGATE, "\ufffd"),
            ("controls_removed", _CONTROL, ""),
            ("invisible_removed", _INVISIBLE, ""),
        ):
            text, changes = pattern.subn(other, text)
            if changes:
                notes.append(name)
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            notes.append("recomposed")
    text = " ".join(text.split())
    if len(text) > max_chars:
        text = text[:max_chars].rstrip()
        notes.append("text_cut")
    return text, tuple(notes)


def framed(ids: np.ndarray, bos: int, eos: int, longest: int) -> np.ndarray:
    """``<s> ids </s>`` as int64, cut so that it has at most ``longest`` ids; bos: -1 = without."""
    start = () if bos < 0 else (bos,)
    return np.concatenate([start, ids[: longest - len(start) - 1], (eos,)]).astype(np.int64)


class TextTokenizer:
    """Text to ids and back: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, pieces, ``<mask>`` last.

    No text ever becomes a special id other than ``<unk>``: what spells one is read as ordinary characters.
    ``bos pad eos unk hide``: the special ids, -1 where it has none; ``words``: first and one past the last id of
    ordinary pieces; ``vocab``: number of ids; ``hash``: sha256 of its JSON; ``begins``: bool (vocab,), True = this
    piece begins a word, or None where that depends on the piece before (CLIP). Tokenizers of CLIP, SigLIP and BERT have
    their own special ids, `OTHERS`.

    Raises DataError when a tokenizer has other ids.

    Source: ids as XLM-R and BEiT-3 have them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab: int = tokenizer.get_vocab_size()
        every: dict[str, Any] = {
            token: tokenizer.token_to_id(token) for names in (OURS, *OTHERS) for token in names.values()
        }
        names = next((names for names in (OURS, *OTHERS) if None not in map(every.get, names.values())), OURS)
        if names is OURS or ("bos" not in names and every["<s>"] is not None):
            expected = {**{token: i for i, token in enumerate(SPECIALS)}, HIDE: self.vocab - 1}
            found = {token: every[token] for token in expected}
            if found != expected:
                raise DataError(f"tokenizer has the special ids {found}, expected {expected}: convert it first")
        ids: dict[str, int] = {name: every[token] for name, token in names.items()}
        self.bos, self.pad, self.eos, self.unk, self.hide = (ids.get(name, -1) for name in OURS)
        self._special = sorted(set(ids.values()))
        gaps = itertools.pairwise([-1, *self._special, self.vocab])
        before, stop = max(gaps, key=lambda gap: gap[1] - gap[0])
        self.words: tuple[int, int] = before + 1, stop
        self.begins: np.ndarray | None = _begins(tokenizer)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.hash: str = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int, model: str = "unigram") -> TextTokenizer:
        """Train on texts, reproducibly: the same texts, in whatever order, give the same bytes.

        ``vocab``: number of ids wanted; fewer result when the texts do not have as many pieces. ``model``:
        ``"unigram"`` (pieces by byte-pair merges, kept and scored by how often the best segmentation uses them) or
        ``"bpe"``. The most frequent characters, at most half of the vocabulary, are pieces; others become
        ``<unk>``.

        Raises ConfigError for another model or a vocabulary below 32, DataError when there is no text.

        Source: SentencePiece's unigram model; here with Viterbi counts over whole numbers, because the trainer of
        ``tokenizers`` gives other bytes in every process.
        """
        if model not in ("unigram", "bpe") or vocab < 32:
            raise ConfigError(f"model {model!r} with {vocab} ids: expected 'unigram' or 'bpe' with 32 or more")
        words = _count_words(texts)
        if not words:
            raise DataError("no text to train a tokenizer on: give a tokenizer, or sources with text")
        room = vocab - len(SPECIALS) - 1
        alphabet = _alphabet(words, room // 2)
        wanted = room if model == "bpe" else room * CANDIDATES
        bpe = models.BPE(unk_token=SPECIALS[UNK], fuse_unk=True)
        merged = Tokenizer(bpe)
        trainer = trainers.BpeTrainer(
            vocab_size=wanted + len(SPECIALS),
            special_tokens=list(SPECIALS),
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            max_token_length=MAX_PIECE,
            min_frequency=2,
            show_progress=False,
        )
        merged.train_from_iterator((word for word, n in sorted(words.items()) for _ in range(n)), trainer)
        if model == "bpe":
            return cls(_assemble(merged.model))
        pieces = [piece for piece in merged.get_vocab() if piece not in SPECIALS]
        scores = _unigram_scores(words, pieces, room)
        return cls(_assemble(models.Unigram([*((s, 0.0) for s in SPECIALS), *scores], unk_id=UNK)))

    @classmethod
    def load(cls, path: Path | str) -> TextTokenizer:
        """Read a ``tokenizer.json``, or what was published: BERT's pieces, ``vocab.txt``, CLIP's merges, ``merges.txt``
        or ``bpe_simple_vocab_16e6.txt.gz``, and BEiT-3's ``beit3.spm``.

        Raises MissingInputError without the file, DataError when it is not such a file or has other special ids.
        """
        if not Path(path).is_file():
            raise MissingInputError(f"{path}: no such tokenizer file, expected a tokenizer.json")
        if Path(path).suffix in (".spm", ".model"):
            return cls(sentencepiece(Path(path)))
        if Path(path).suffix in (".txt", ".gz"):
            pieces = read_pieces(Path(path))
            return cls(wordpiece(pieces) if pieces else clip_bpe(read_merges(Path(path))))
        try:
            return cls(Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a tokenizer.json: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write a ``tokenizer.json``, which the ``tokenizers`` library reads as it is."""
        Path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")

    def ids(self, text: str) -> np.ndarray:
        """Ids of one text after `sanitize`, int32 (n,), without ``<s>`` and ``</s>``; n may be 0."""
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`ids` of many texts at once."""
        cleaned = [sanitize(text)[0] for text in texts]
        encoded = self._tokenizer.encode_batch_fast(cleaned, add_special_tokens=False)
        return [self._ordinary(np.array(x.ids, dtype=np.int32)) for x in encoded]

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that ids (n,) stand for; special ids are left out."""
        text = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        end = getattr(self._tokenizer.model, "end_of_word_suffix", None)
        return text.replace(end, " ").rstrip() if end else text

    def _ordinary(self, ids: np.ndarray) -> np.ndarray:
        """Read pieces that spell a special token (a foreign vocabulary may match them) as unknown."""
        for special in self._special:
            ids[ids == special] = self.unk
        return ids


def _begins(tokenizer: Tokenizer) -> np.ndarray | None:
    """Whether each piece begins a word; a character of a script without spaces does."""
    model: Any = tokenizer.model
    if getattr(model, "end_of_word_suffix", None):
        return None
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda piece: piece[1])
    if isinstance(model, models.WordPiece):
        within = model.continuing_subword_prefix
        return np.array([not piece.startswith(within) for piece, _ in pieces])
    return np.array([piece.startswith("▁") or bool(_UNSPACED.match(piece)) for piece, _ in pieces])


def _count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, split as the tokenizer splits: before spaces, shown as ``▁``, and around ``<``."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_WORD.findall("▁" + sanitize(text)[0].replace(" ", "▁")))
    words.pop("▁", None)
    return words


def _alphabet(words: Counter[str], most: int) -> list[str]:
    """The ``most`` most frequent characters, ties by code point."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for character in word:
            counts[character] += n
    return sorted(sorted(counts, key=lambda c: (-counts[c], c))[:most])


def _unigram_scores(words: Counter[str], pieces: list[str], room: int) -> list[tuple[str, float]]:
    """Log-probabilities of the ``room`` most used pieces, characters always kept; most probable first.

    Every round segments all words by the current scores, counts the pieces used and drops the least used: whole
    numbers and a fixed order among equals, so that the result depends on nothing else.
    """
    scores = [(piece, -1.0) for piece in sorted(pieces)]  # equal at first: the fewest pieces win
    while True:
        counts = _count_pieces(words, scores)
        ranked = sorted(counts, key=lambda p: (len(p) > 1, -counts[p], p))
        kept = ranked[: max(room, int(len(ranked) * SHRINK))]
        total = sum(counts.values())
        # Six digits survive the library's JSON reader, all of them do not.
        scores = [(piece, round(math.log(max(counts[piece], 0.5) / total), 6)) for piece in kept]
        if len(kept) == len(ranked):
            return sorted(scores, key=lambda score: (-score[1], score[0]))


def _count_pieces(words: Counter[str], scores: list[tuple[str, float]]) -> dict[str, int]:
    """How often each piece is used when all words are segmented by the scores."""
    model = Tokenizer(models.Unigram([(SPECIALS[3], -100.0), *scores], unk_id=0))
    counts = np.zeros(len(scores) + 1, np.int64)
    distinct = sorted(words)
    for start in range(0, len(distinct), CHUNK):
        chunk = distinct[start : start + CHUNK]
        for word, found in zip(chunk, model.encode_batch_fast(chunk, add_special_tokens=False), strict=True):
            for i in found.ids:
                counts[i] += words[word]
    return {piece: int(n) for (piece, _), n in zip(scores, counts[1:], strict=True)}


def _assemble(model: models.Model) -> Tokenizer:
    """Put a trained model between the fixed parts."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    # "<" is always a word of its own, so that no piece can spell a special token.
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("<", "isolated"), spaces])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([*SPECIALS, HIDE])
    bos, eos = SPECIALS[BOS], SPECIALS[EOS]
    special = [(bos, BOS), (eos, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} {eos} $B {eos}", special_tokens=special
    )
    return tokenizer
