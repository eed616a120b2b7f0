"""How pictures and texts become what a model reads: the settings that travel with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from multiway import config as settings
from multiway.data.text import TextTokenizer
from multiway.errors import ConfigError

TEXT_TOKENS = 64
"""Longest text a model reads unless its preprocessor says otherwise, with ``<s>`` and ``</s>``."""


def longest_text(shape: Any) -> int:
    """Tokens of the longest text that a model with this config can read; BEiT-3 has two positions it never uses."""
    return getattr(shape, "text_tokens", 0) or getattr(shape, "text_positions", TEXT_TOKENS + 2) - 2


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """How pictures and texts become inputs: the content of ``preprocessor_config.json``.

    ``image_px``: side in pixels, or height and width; ``mean``, ``std``: per RGB channel in [0, 1], what the model
    itself subtracts and divides by (stated for other programs); ``interpolation``: of the resize, always antialiased;
    ``share``: of the shorter side that is looked at, in the centre, None = the whole picture squeezed;
    ``labels``: names of the classes of a classifier or of the answers, in order; ``task``: what is answered, "" =
    nothing; ``text_tokens``: longest text with its ``<s>`` and
    ``</s>``; then the tokenizer's special ids, None without one.
    """

    image_px: int | tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Literal["bicubic"] = "bicubic"
    share: float | None = None
    labels: list[str] = field(default_factory=list)
    task: str = ""
    text_tokens: int = TEXT_TOKENS
    bos: int | None = None
    pad: int | None = None
    eos: int | None = None
    unk: int | None = None
    hide: int | None = None

    @classmethod
    def of(cls, shape: Any, tokenizer: TextTokenizer | None, given: Mapping[str, Any] | None = None) -> Preprocessor:
        """The preprocessor of a model with config ``shape``, with the ``given`` values instead of the usual ones.

        Raises ConfigError for an unknown or mistyped value, and for one that does not fit model and tokenizer.
        """
        own = {name: getattr(tokenizer, name, -1) for name in ("bos", "pad", "eos", "unk", "hide")}
        ids: dict[str, Any] = {name: None if special < 0 else special for name, special in own.items()}
        longest = longest_text(shape)
        usual = cls(
            image_px=shape.image_px, mean=shape.mean, std=shape.std, share=getattr(shape, "share", None),
            text_tokens=getattr(shape, "text_tokens", min(TEXT_TOKENS, longest)), **ids,
        )  # fmt: skip
        result = settings.apply(usual, given or {})
        fixed = ("image_px", "mean", "std", *ids)
        wrong = {name: getattr(result, name) for name in fixed if getattr(result, name) != getattr(usual, name)}
        if wrong:
            expected = {name: getattr(usual, name) for name in wrong}
            raise ConfigError(f"preprocessor says {wrong}, but the model and its tokenizer have {expected}")
        classes = getattr(shape, "classes", 0) or getattr(shape, "answers", 0)
        if result.labels and len(result.labels) != classes:
            raise ConfigError(f"preprocessor: {len(result.labels)} labels, but the model has {classes} classes")
        if not 2 <= result.text_tokens <= longest:
            raise ConfigError(f"preprocessor: text_tokens is {result.text_tokens}, expected 2 to {longest}")
        if tokenizer is not None and tokenizer.vocab > getattr(shape, "vocab", tokenizer.vocab):
            raise ConfigError(f"the tokenizer has {tokenizer.vocab} ids, more than the {shape.vocab} rows of the model")
        return result
