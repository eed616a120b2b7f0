"""CLIP's text vocabulary: byte-pair merges over bytes, words ending in ``</w>``, everything lower case.

Its ids follow from the merges alone: 256 bytes, the same at the end of a word, one per merge, and the two specials.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from multiway.errors import DataError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
MERGES = 49152 - 256 - 2
"""How many of the merges in OpenAI's file are used; it holds more."""
MAX_BYTES = 64 * 2**20
"""Most bytes of a file of merges, unpacked."""
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What is a word before merging (masked.md 8.4)."""


def alphabet() -> list[str]:
    """The characters that stand for bytes, in the order of their ids: printable ones for themselves, then the rest.

    Source: GPT-2's byte-level BPE.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clip_bpe(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """The tokenizer of these merges, in order of their rank; it frames texts as CLIP reads them.

    Source: masked.md 8.4, as transformers' CLIPTokenizer; OpenAI's also repairs and unescapes the text beforehand.
    """
    letters = alphabet()
    pieces = [*letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in merges), START, END]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    known = {*letters, *(letter + WORD_END for letter in letters)}
    for a, b in merges:
        if a not in known or b not in known:
            raise DataError(f"merge {a!r} {b!r} is of a piece that no earlier merge made: these are not CLIP's merges")
        known.add(a + b)
    bpe = models.BPE(vocab=vocab, merges=list(merges), unk_token=END, end_of_word_suffix=WORD_END)
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(PIECES), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    ends = (END, vocab[END]), (START, vocab[START])
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of ``merges.txt`` or OpenAI's ``bpe_simple_vocab_16e6.txt``, perhaps packed by gzip.

    The first line is a heading. Raises DataError for a file that is no such list.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        lines = content.decode("utf-8").split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no list of merges: {error}") from error
    merges = [tuple(line.split(" ")) for line in lines if line]
    wrong = next((line for line in lines if line and len(line.split(" ")) != 2), None)
    if len(content) > MAX_BYTES or not merges or wrong is not None:
        raise DataError(f"{path}: no list of merges; expected two pieces in a line, found {wrong!r}")
    return merges  # type: ignore[return-value]
