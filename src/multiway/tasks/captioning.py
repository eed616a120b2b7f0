"""Captioning: a model fills in one hidden word behind the other (BEiT-3), with beam search.

Where we differ from the released training: it drops the worst 20 % of the token losses of every batch of every process
by itself, so that what is learned depends on how a step is split. Which losses are the worst of a whole step is known
only when all of its micro-batches are done; here those are dropped that lie above the 80 % quantile of the step before,
and the sum of the others is divided by 80 % of the number of all. Steps are alike, so about as many are dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multiway.errors import ConfigError, NumericsError
from multiway.metrics.caption import Unit, scores
from multiway.objectives.masked import masked_cross_entropy
from multiway.tasks.needs import check
from multiway.types import Across, Batch, Objective, StepOutput

NEEDS = frozenset({frozenset({"image", "text"})})
"""What a model must encode: a picture with a text."""

LONGEST, BEAMS, LENGTH_PENALTY = 32, 3, 0.6
"""Tokens of a caption with ``<s>`` and ``</s>``, and how it is searched for (masked.md 6.3)."""

CANDIDATES = 3
"""Continuations looked at in every step, per beam: more than enough, since only one of a beam's is its end."""

BINS, BINS_PER_NAT = 4096, 128
"""Of the histogram of token losses, for their quantile: up to 32 nats."""


def require(model: Any) -> None:
    """Raise ConfigError, saying what would fit, unless a model can write captions."""
    check(model, NEEDS, "captioning")
    if not (hasattr(model, "advance") and model.config.masked):
        raise ConfigError(
            f"captioning needs a model that fills in hidden words, such as a BEiT-3 with model.masked; this "
            f"{type(model).__name__} does not: take a pre-trained one, or tune one with a captioning recipe"
        )


class Captioning(Objective):
    """Predict the hidden words of captions from the picture and the words before: masked.md 6.3.

    ``smoothing``: share of the probability spread over the other words; losses are divergences from that. ``drop``:
    share of the token losses, the worst, that do not count in steps after the number ``drop_after`` (from 0).
    ``limit``: losses from there on are dropped; ``seen``: histogram of the losses of this step. Batches are
    `CaptionCollate`'s. Term: ``caption``, of all tokens; ``caption/dropped``: share of them that did not count.
    """

    limit: Tensor
    seen: Tensor

    def __init__(self, model: Any, smoothing: float = 0.1, drop: float = 0.2, drop_after: int = 12_000) -> None:
        super().__init__()
        require(model)
        self.model = model
        self.smoothing, self.drop, self.drop_after = smoothing, drop, drop_after
        self.register_buffer("limit", torch.tensor(math.inf))
        self.register_buffer("seen", torch.zeros(BINS))

    def init_weights(self) -> None:
        """Initialise the model; nothing is dropped."""
        self.model.init_weights()
        self.limit.fill_(math.inf)
        self.seen.zero_()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden words."""
        return {"caption": len(batch["text_hidden"])}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """The divergence of every hidden word's prediction, but for the worst ones."""
        tokens = self.model(batch["plan"], image=batch["image"], text=batch["text"], draws=batch.get("drop_path"))
        words, vocab = partial(self.model.text_logits, tokens), self.model.config.vocab
        losses, hits = masked_cross_entropy(words, batch["text_hidden"], batch["text_target"], vocab, self.smoothing)
        losses = losses - smoothed_entropy(self.smoothing, vocab)
        if self.training and self.drop:
            place = (losses.detach() * BINS_PER_NAT).long().clamp(0, BINS - 1)
            self.seen += across.total(torch.zeros_like(self.seen).index_add_(0, place, torch.ones_like(losses)))
        kept = losses.detach() < self.limit
        share = torch.where(self.limit.isfinite(), 1 - self.drop, 1.0)
        sums = {"caption": losses.sum().detach(), "caption/accuracy": hits.sum(), "caption/dropped": (~kept).sum()}
        return StepOutput((losses * kept).sum() / (share * counts["caption"]), sums)

    def after_step(self, step: int) -> None:
        """Set the limit for the next step."""
        if self.drop and step >= self.drop_after:
            below = self.seen.cumsum(0) < (1 - self.drop) * self.seen.sum()
            self.limit.copy_((below.sum() + 1) / BINS_PER_NAT)
        self.seen.zero_()


def smoothed_entropy(smoothing: float, classes: int) -> float:
    """Entropy in nats of a class with ``smoothing`` of its probability spread over all others."""
    rest = smoothing * math.log(smoothing / (classes - 1)) if smoothing else 0.0
    return -(1 - smoothing) * math.log1p(-smoothing) - rest


Advance = Callable[[Tensor, Tensor | None], Tensor]
"""Last words and parents of all beams, int64 (B, K) each -> scores of their next words (B, K, V)."""


def beam_search(
    advance: Advance,
    start: Tensor,
    eos: int,
    *,
    longest: int = LONGEST,
    beams: int = BEAMS,
    length_penalty: float = LENGTH_PENALTY,
) -> tuple[list[list[int]], Tensor]:
    """The best text for each of B pictures, without its first and last token, and its score: float (B,).

    ``start``: int64 (B,), the first tokens; ``longest``: of a text, with both. The score is the sum of the words'
    log-probabilities, that of ``eos`` too, over (their number, with ``start`` and without ``eos``) ** length_penalty. A
    beam ends with ``eos``, or when ``longest`` - 3 words stand there, whatever comes next; the search ends when for no
    picture a running beam can become better than the best that ended. One beam without length penalty takes the best
    word each time.

    Raises NumericsError when scores are not finite. Source: masked.md 6.3.
    """
    texts = start[:, None, None].expand(-1, beams, 1)
    sums = torch.full(texts.shape[:2], -math.inf, device=start.device)
    sums[:, 0] = 0.0  # all beams are the same at first
    best = sums.new_full((len(start),), -math.inf)
    result = start.new_full((len(start), longest), eos)
    parent = None
    for length in range(1, longest - 1):
        logits = advance(texts[..., -1], parent).float()
        vocab = logits.shape[2]
        total = (sums[..., None] + logits.log_softmax(-1)).flatten(1)
        found, place = total.topk(min(CANDIDATES * beams, beams * vocab))
        parent, word = place // vocab, place % vocab
        if (best >= found[:, 0] / (longest - 1) ** length_penalty).all():
            break

        # Candidates are taken, the best first, until as many as there are beams go on.
        ends = (word == eos) | (length + 2 == longest)
        taken = (~ends).cumsum(1) - (~ends).long() < beams
        ended = ends & taken
        first = ended.int().argmax(1, keepdim=True)
        score = found.gather(1, first)[:, 0] / length**length_penalty
        better = ended.any(1) & (score > best)
        best = torch.where(better, score, best)
        text = texts.take_along_dim(parent.gather(1, first)[..., None], 1)[:, 0]
        padded = torch.cat([text, result.new_full((len(text), longest - length), eos)], dim=1)
        result = torch.where(better[:, None], padded, result)

        going = ends.int().argsort(dim=1, stable=True)[:, :beams]
        sums, parent, word = (x.gather(1, going) for x in (found, parent, word))
        texts = torch.cat([texts.take_along_dim(parent[..., None], 1), word[..., None]], dim=2)
    if not best.isfinite().all():
        raise NumericsError("the scores of words are not finite: the model has diverged")
    return [ids[1 : ids.index(eos, 1)] for ids in result.tolist()], best


@torch.inference_mode()
def generate(
    model: Any,
    image: Tensor,
    *,
    bos: int,
    eos: int,
    mask_id: int,
    longest: int = LONGEST,
    beams: int = BEAMS,
    length_penalty: float = LENGTH_PENALTY,
) -> list[list[int]]:
    """Ids of a caption for each picture uint8 (B, 3, H, W), without ``<s>`` and ``</s>``, as `beam_search`.

    ``model``: answers ``begin(image, places)`` and ``advance(cache, words, parents, mask_id)``.
    """
    cache = model.begin(image, (longest - 1) * beams)
    start = torch.full((len(image),), bos, device=image.device)
    advance = partial(model.advance, cache, mask_id=mask_id)
    return beam_search(advance, start, eos, longest=longest, beams=beams, length_penalty=length_penalty)[0]


def evaluate(captions: Sequence[str], references: Sequence[Sequence[str]], unit: Unit = "words") -> dict[str, Any]:
    """BLEU, ROUGE-L and CIDEr-D of a caption for each picture, and what one caption for all pictures would get.

    ``references``: of each picture, at least one; ``unit``: what is compared, ``characters`` for Chinese. Returns
    ``{"bleu1", ..., "bleu4", "rouge_l", "cider_d", "pictures", "different", "floor": {"caption", "bleu1", ...}}``;
    ``different``: how many different captions there are; the floor's caption is the most frequent of the references.
    """
    constant = Counter(text for own in references for text in own).most_common(1)[0][0] if references else ""
    return {
        **scores(captions, references, unit),
        "pictures": len(captions),
        "different": len(set(captions)),
        "floor": {"caption": constant, **scores([constant] * len(references), references, unit)},
    }
