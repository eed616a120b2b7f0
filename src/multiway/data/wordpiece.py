"""BERT's text vocabulary: words and punctuation, cut greedily into the longest pieces; ``##`` marks those within words.

FLAVA and VLMo read it in lower case, 30,522 pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from multiway.data.bpe import MAX_BYTES
from multiway.errors import DataError

START, PAD, END, UNKNOWN, HIDE = "[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"
WITHIN = "##"
LONGEST = 100
"""Characters of a word beyond which it is unknown."""


def wordpiece(pieces: Sequence[str]) -> Tokenizer:
    """The tokenizer of a vocabulary, in the order of the ids; it frames texts as BERT reads them.

    A vocabulary without a capital letter is one of texts in lower case without accents. Source: transformers'
    BertTokenizer.
    """
    lower = not any(re.search("[A-Z]", piece) for piece in pieces if not piece.startswith("["))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(WITHIN)
    tokenizer.add_special_tokens([PAD, UNKNOWN, START, END, HIDE])
    tokenizer.post_processor = processors.BertProcessing((END, vocab[END]), (START, vocab[START]))
    return tokenizer


def read_pieces(path: Path) -> list[str] | None:
    """The pieces of BERT's ``vocab.txt``, one in a line; None of a file that is something else.

    Raises DataError for one that names a piece twice or lacks a special one.
    """
    try:
        with open(path, "rb") as file:
            pieces = file.read(MAX_BYTES).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    pieces = [piece.rstrip("\r") for piece in pieces[: -1 if pieces[-1] == "" else None]]
    if START not in pieces:
        return None
    twice = len(pieces) - len(set(pieces))
    lacking = [piece for piece in (PAD, UNKNOWN, END, HIDE) if piece not in pieces]
    if twice or lacking:
        raise DataError(f"{path}: no vocabulary of BERT: {twice} pieces stand twice, {lacking} are missing")
    return pieces
