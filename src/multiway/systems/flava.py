"""FLAVA: a foundational language and vision alignment model (Singh et al., 2022, arXiv 2112.04482).

An encoder of pictures, one of texts, and one that reads both together, from what the other two make of them. Five
losses: hidden patches and hidden words, each alone (MIM, MLM) and in pairs (MMM), the contrast of pictures and texts
over all processes (GC), and whether a picture and a text belong together (ITM). Every step takes its records from one
kind: pictures, texts, or pairs.

Where we differ: texts are packed, so padding is seen by no token, in the joint encoder neither (as transformers;
torchmultimodal lets its joint encoder see padding); where no pair of a step matches, nothing of its pairs is predicted
(the original then takes some that do not match); of the published heads, whose norms have an epsilon of 1e-12 in
transformers and 1e-5 in torchmultimodal, the former's. Visual tokens come from any `ImageTokenizer`; the paper's is
`multiway.backbones.dvae`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multiway.backbones.dual import BELOW, DualModel
from multiway.backbones.joint import JointEncoder, build_joint
from multiway.backbones.vit import check_shape
from multiway.errors import ConfigError
from multiway.nn.head import AnswerHead, Pooler, TokenHead
from multiway.nn.linear import Linear
from multiway.nn.patch import PatchEmbed
from multiway.nn.pixels import CLIP_MEAN, CLIP_STD, HALF, Colour
from multiway.nn.quantize import ImageTokenizer
from multiway.objectives.contrastive import symmetric_cross_entropy
from multiway.objectives.masked import masked_cross_entropy
from multiway.plan import Plan, Tokens, plan_of
from multiway.types import Across, Batch, Objective, StepOutput
from multiway.weights.flava import LAYOUTS as LAYOUTS

NORM_EPS = 1e-12
MAX_LOGIT_SCALE = math.log(100)
FIRST_LOGIT_SCALE = math.log(1 / 0.07)
MASKED = ("image", "text", "pair_image", "pair_text")
"""The masked losses: of pictures and texts alone, and of those of pairs."""
TERMS = (*MASKED, "contrast", "match")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a FLAVA and which heads it carries.

    All three encoders share ``dim``, ``heads`` and ``hidden`` (width inside the FFNs); ``depth``, ``text_depth``,
    ``joint_depth``: blocks of the encoder of pictures, of texts, of both; ``text_tokens``: longest text with its two
    specials; ``out``: width of the space of the contrast; ``drop_path``: rate of the last block of each encoder;
    ``codes``: visual vocabulary; ``masked``: carry the heads of pre-training (masked and matching); ``answers``: of a
    head that answers texts with so many ``pictures`` each (0, 1 or 2), 0 = none; ``mean``, ``std``: of the pixels;
    ``share``: of the shorter side that evaluation looks at; ``init_std``: deviation of the initial weights, more than
    .02 for narrow models.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_px: int | tuple[int, int] = 224
    text_depth: int = 12
    joint_depth: int = 6
    vocab: int = 30522
    text_tokens: int = 512
    out: int = 768
    drop_path: float = 0.0
    codes: int = 8192
    masked: bool = True
    answers: int = 0
    pictures: int = 1
    mean: Colour = CLIP_MEAN
    std: Colour = CLIP_STD
    share: float = 1.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_shape("FLAVA", self)
        if self.pictures not in (0, 1, 2):
            raise ConfigError(f"FLAVA answers texts with 0, 1 or 2 pictures each, got pictures {self.pictures}")


# masked.md 9.1: 241,356,288 parameters, 62,502,775 more in heads and temperature. Tiny is ours, for CPUs.
PRESETS: Mapping[str, Config] = {
    "flava_tiny_patch16_64": Config(
        dim=128, depth=3, heads=4, hidden=512, image_px=64, text_depth=3, joint_depth=2, vocab=512, text_tokens=64,
        out=128, codes=512, mean=HALF, std=HALF, init_std=0.06,
    ),
    "flava_base_patch16_224": Config(),
}  # fmt: skip


class States(NamedTuple):
    """What `FLAVA.forward` returns: rows before the final norms of all ``pictures``, (B, 1 + P, D), and of all
    ``texts``, each a sequence of its own; final tokens of the pairs (``joint``). None where there are none."""

    pictures: Tensor | None
    texts: Tokens | None
    joint: Tokens | None


class FLAVA(DualModel):
    """Three encoders and the heads its config asks for."""

    accepts: ClassVar[frozenset[frozenset[str]]] = frozenset(
        {frozenset({"image"}), frozenset({"text"}), frozenset({"image", "text"})}
    )
    leading: ClassVar[int] = 2
    """Tokens in front of the patches of a pair: the joint encoder's class token, and that of the picture."""
    encoder: JointEncoder
    answer_head: Linear | AnswerHead

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_joint(
            image_px=config.image_px, patch=config.patch, vocab=config.vocab, longest=config.text_tokens,
            dim=config.dim, heads=config.heads, hidden=config.hidden, out=config.out, drop_path=config.drop_path,
            depths=(config.depth, config.text_depth, config.joint_depth), eps=NORM_EPS,
        )  # fmt: skip
        self.logit_scale = nn.Parameter(torch.full((1,), FIRST_LOGIT_SCALE))
        dim = config.dim
        if config.masked:
            sizes = {term: config.codes if term.endswith("image") else config.vocab for term in MASKED}
            self.heads = nn.ModuleDict({term: TokenHead(dim, size, NORM_EPS) for term, size in sizes.items()})
            self.match_pooler = Pooler(dim, nn.Identity())
            self.match_head = Linear(dim, 2)
        if config.answers and config.pictures == 0:
            self.answer_head = Linear(dim, config.answers)
        elif config.answers:
            self.answer_head = AnswerHead(config.pictures * dim, 2 * dim, config.answers, NORM_EPS)

    def forward(
        self,
        plan: Plan,
        *,
        image: Tensor | None = None,
        text: Tensor | None = None,
        hide: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> States:
        """All kinds of samples in one pass; a pair goes through all three encoders.

        plan: pictures of pairs have 2 + P tokens, those alone 1 + P; image: uint8 (B, 3, H, W), those of pairs last;
        text: int64 (R,), packed, those of pairs first; hide: bool (B, P), True = hidden patch; draws: (2 L, S) for
        stochastic depth, the joint encoder's last, None = nothing dropped.
        """
        encoder, pictures, texts, joint = self.encoder, None, None, None
        upper = 2 * len(encoder.joint.blocks)
        below, above = (None, None) if draws is None else (draws[:-upper], draws[-upper:])
        if image is not None:
            own = None if below is None else self.own(below[:, : len(image)], encoder.vision)
            pictures = encoder.vision.trunk(self.pixels(image), hide, draws=own)
        if text is not None:
            alone = plan.texts()
            own = None if below is None else self.own(below[:, plan.samples - alone.samples :], encoder.language)
            texts = Tokens(encoder.language.states(text, alone, own), alone)
        if pictures is not None and texts is not None and any(group.kind == "pair" for group in plan.groups):
            pairs = plan.of("pair")
            first = plan.samples - texts.plan.samples  # number of the first pair
            own = None if above is None else above[:, first : first + pairs.samples]
            rows = texts.values[: pairs.part("text", "pair")]
            joint = encoder.joint(pictures[len(pictures) - pairs.samples :], rows, pairs, own)
        return States(pictures, texts, joint)

    def encode(
        self, *, image: Tensor | None = None, text: Sequence[Tensor] | None = None, draws: Tensor | None = None
    ) -> Tokens:
        """Final tokens of pictures uint8 (B, 3, H, W), of texts (int64 ids with their specials), or of pairs, then with
        the class token of the pair in front.

        draws: (2 L, B) for stochastic depth, None = nothing dropped.
        """
        if image is None or text is None:
            return super().encode(image=image, text=text, draws=draws)
        tokens = self.leading + math.prod(self.encoder.vision.trunk.grid)
        plan = plan_of(len(image), tokens, text, self.config.text_tokens)
        joint = self(plan.to(self.logit_scale.device), image=image, text=torch.cat(list(text)), draws=draws).joint
        assert joint is not None
        return joint

    def patches(self, tokens: Tokens) -> Tensor:
        """The patches of pictures that were encoded alone, without the class token: (B, P, D)."""
        return tokens.dense("image")[0][:, 1:]

    def logits(self, term: str, seen: States, places: Tensor) -> Tensor:
        """Scores of a masked head at hidden places, int64 (M,) flat into the patches (B, P) or the packed text of the
        pictures, texts or pairs it is for -> (M, codes or vocab).
        """
        patches = math.prod(self.encoder.vision.trunk.grid)
        if term == "image":
            assert seen.pictures is not None
            rows = seen.pictures.flatten(0, 1).index_select(0, places + places // patches + 1)
            rows = self.encoder.vision.norm(rows)
        elif term == "text":
            assert seen.texts is not None
            rows = self.encoder.language.normed(seen.texts.rows(places))
        else:
            assert seen.joint is not None
            before = (
                self.leading * (places // patches + 1) if term == "pair_image" else seen.joint.plan.extent("text")[0]
            )
            rows = seen.joint.rows(places + before)
        return self.heads[term](rows)

    def match(self, plan: Plan, *, image: Tensor, text: Tensor, draws: Tensor | None = None) -> Tensor:
        """Log-odds (B,) that picture and text of each pair of the plan belong together; the rest as `forward`."""
        if not self.config.masked:
            raise ConfigError("this FLAVA judges no pairs: it was saved without the heads of pre-training")
        joint = self(plan, image=image, text=text, draws=draws).joint
        wrong, right = self.matches(joint).float().unbind(1)
        return right - wrong

    def matches(self, joint: Tokens) -> Tensor:
        """Scores of pairs that they do not belong together, and that they do: (B, 2)."""
        return self.match_head(self.match_pooler(joint.prefix("image")))

    def vectors(self, seen: States, image_match: Tensor, text_match: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (A, E) of some of the pictures and of some of the texts, by number."""
        assert seen.pictures is not None and seen.texts is not None
        vision, language = self.encoder.vision, self.encoder.language
        image = vision.norm(seen.pictures[:, 0].index_select(0, image_match))
        text = language.normed(seen.texts.prefix("text").index_select(0, text_match))
        return tuple(  # type: ignore[return-value]
            F.normalize(tower.projection(own).float(), dim=-1) for tower, own in ((vision, image), (language, text))
        )

    def answer(self, plan: Plan, *, text: Tensor, image: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """Scores of all answers to B texts: (B, answers).

        plan: a text with one picture (2 + P tokens), ``pictures`` times for each of the B, or without one; the rest as
        `forward`. Read is the class token of the pair, of both pairs, or the pooled one of the text (masked.md 9.4; two
        pictures are ours). Raises ConfigError without a head of answers.
        """
        if not self.config.answers:
            raise ConfigError("this FLAVA answers nothing: tune it with a recipe such as _vqa first")
        seen = self(plan, image=image, text=text, draws=draws)
        if self.config.pictures == 0:
            assert seen.texts is not None
            language = self.encoder.language
            return self.answer_head(language.pooler(language.normed(seen.texts.prefix("text"))))
        assert seen.joint is not None
        return self.answer_head(seen.joint.prefix("image").view(-1, self.config.pictures * self.config.dim))

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Keep the factor on cosines within 1 and 100; called after every step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @property
    def layers(self) -> int:
        """Blocks a pair goes through, of the deeper of the two encoders below and of the joint one."""
        return max(self.config.depth, self.config.text_depth) + self.config.joint_depth

    def layer_of(self, name: str) -> int:
        """0 for patches, words and positions, ``layers`` for the last block of the joint encoder, less below it, and
        ``layers`` + 1 for the rest.
        """
        config, below = self.config, self.layers - self.config.joint_depth
        first = {"vision.trunk": below - config.depth, "language": below - config.text_depth, "joint": below}
        block = re.match(r"encoder\.(vision\.trunk|language|joint)\.blocks\.(\d+)\.", name)
        if block:
            return first[block[1]] + int(block[2]) + 1
        return 0 if name.startswith(BELOW) else self.layers + 1

    def no_decay(self, name: str) -> bool:
        """Matrices without weight decay: those that are a lone vector."""
        return name.endswith(("cls_token", "hide_token"))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normals of deviation ``init_std`` in matrices, tables and tokens, biases 0, norms 1 and 0 (masked.md 9.1)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | PatchEmbed):
                nn.init.normal_(module.weight, std=self.config.init_std)
                if not isinstance(module, nn.Embedding) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        trunk, words, joint = self.encoder.vision.trunk, self.encoder.language.words, self.encoder.joint
        for table in (
            trunk.cls_token,
            trunk.hide_token,
            trunk.positions,
            words.positions,
            words.types,
            joint.cls_token,
        ):
            nn.init.normal_(table, std=self.config.init_std)  # type: ignore[arg-type]
        nn.init.constant_(self.logit_scale, FIRST_LOGIT_SCALE)


class MaskedContrastiveMatching(Objective):
    """FLAVA's pre-training: masked pictures, texts and pairs, global contrast, and matching.

    ``tokenizer``: image -> codes, asked when the batch carries none, or None; a network goes into `Frozen` first;
    ``weights``: of the losses ``image text pair_image pair_text contrast match``, 1 where not named. Batches are
    `MaskedCollate`'s with ``contrast``, ``match``, ``leading`` 2 and ``joint`` 1, of one kind of samples or of several.
    Terms as the weights. Of pairs that do not match (``match``) nothing is predicted, and their picture and their text
    look for no partner, but are among those that the others choose from. Source: masked.md 9.2.

    Several micro-batches are one large batch, as in `multiway.tasks.retrieval.ImageTextContrast`.
    """

    splittable: bool = False
    joins: bool = True

    def __init__(
        self, model: FLAVA, tokenizer: ImageTokenizer | None, weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        unknown = set(weights or ()) - set(TERMS)
        if unknown or not model.config.masked:
            raise ConfigError(f"FLAVA's losses are {' '.join(TERMS)} (model.masked), got weights of {sorted(unknown)}")
        self.model = model
        self.tokenizer = tokenizer
        self.weights = {**dict.fromkeys(TERMS, 1.0), **(weights or {})}

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden patches and words alone and of pairs, pairs that match, and all pairs."""
        counts: dict[str, int] = dict.fromkeys(TERMS, 0)
        for modality, border in zip(("image", "text"), self.borders(batch), strict=True):
            hidden = batch.get(f"{modality}_hidden", torch.zeros(0))
            first = int((hidden < border).sum())
            both = (first, len(hidden) - first) if modality == "image" else (len(hidden) - first, first)
            counts[modality], counts[f"pair_{modality}"] = both
        if "match" in batch:
            counts["contrast"], counts["match"] = int(batch["match"].sum()), len(batch["match"])
        return counts

    def borders(self, batch: Batch) -> tuple[int, int]:
        """Number of patches of pictures alone, and of words of pairs: where the terms part in the flat indices."""
        patches = math.prod(self.model.encoder.vision.trunk.grid)
        plan = batch["plan"]
        return patches * _samples(plan, "image", "image"), plan.part("text", "pair")

    def forward(
        self, batch: Batch | Sequence[Batch], counts: Mapping[str, float], across: Across = Across()
    ) -> StepOutput:
        """All losses of a batch, or of the micro-batches of a step; ``contrast`` against the pairs of all ranks."""
        if isinstance(batch, Mapping):
            parts = [self.part(batch, counts)]
        else:
            again = partial(checkpoint, self.part, use_reentrant=False, preserve_rng_state=False)
            parts = [again(own, counts) for own in batch]
        loss = torch.stack([own for own, *_ in parts]).sum()
        sums = {name: torch.stack([own[name] for _, own, *_ in parts]).sum() for name in parts[0][1]}
        if len(parts[0]) > 2:
            image, text, match = (torch.cat(own) for own in zip(*(part[2:] for part in parts), strict=True))
            losses, hits = symmetric_cross_entropy(image, text, self.model.temperature(), across.gather, across.rank)
            total = (losses * match).sum()
            loss = loss + self.weights["contrast"] * total / max(1.0, counts["contrast"])
            sums |= {"contrast": total.detach(), "contrast/accuracy": (hits * match).sum()}
        return StepOutput(loss, sums)

    def part(self, batch: Batch, counts: Mapping[str, float]) -> tuple:
        """Of a micro-batch: the losses that compare no pairs, their sums, and, of pairs, unit vectors (A, E) of the
        pictures and the texts and whether they match.
        """
        plan = batch["plan"]
        seen = self.model(
            plan, image=batch.get("image"), text=batch.get("text"), hide=batch.get("image_hide"),
            draws=batch.get("drop_path"),
        )  # fmt: skip
        sums: dict[str, Tensor] = {}
        loss = self.model.logit_scale.new_zeros(())
        for term in self.predicted(batch):
            loss = loss + self.predict(term, seen, batch, counts, sums)
        if seen.joint is None:
            return loss, sums
        match, scores = batch["match"].long(), self.model.matches(seen.joint)
        with torch.autocast(loss.device.type, enabled=False):
            losses = F.cross_entropy(scores.float(), match, reduction="none")
        sums |= {"match": losses.sum().detach(), "match/accuracy": (scores.argmax(-1) == match).float().sum()}
        loss = loss + self.weights["match"] * losses.sum() / max(1.0, counts["match"])
        return loss, sums, *self.model.vectors(seen, batch["image_match"], batch["text_match"]), batch["match"]

    def predicted(self, batch: Batch) -> list[str]:
        """The masked terms a batch has samples of; copies of pairs apart are none."""
        plan, copies = batch["plan"], len(batch["image_match"])
        alone = {m: _samples(plan, m, m) > copies for m in ("image", "text")}
        paired = _samples(plan, "image", "pair") > 0
        return [term for term in MASKED if (paired if term.startswith("pair_") else alone[term])]

    def predict(
        self, term: str, seen: States, batch: Batch, counts: Mapping[str, float], sums: dict[str, Tensor]
    ) -> Tensor:
        """The loss of a masked term; its sums are noted.

        The places of others, where a batch has some, are scored as well and count nothing: so no size depends on what
        was drawn.
        """
        model, modality = self.model, "image" if term.endswith("image") else "text"
        patches, words = self.borders(batch)
        places = hidden = batch[f"{modality}_hidden"]
        if modality == "image":  # those of pairs come last
            own = (hidden >= patches) == (term == "pair_image")
            places = (hidden - patches).clamp(min=0) if term == "pair_image" else hidden
        else:  # those of pairs come first
            own = (hidden < words) == (term == "pair_text")
            places = hidden.clamp(max=words - 1) if term == "pair_text" else hidden
        classes = model.config.codes if modality == "image" else model.config.vocab
        target = self.codes(batch).flatten()[hidden] if modality == "image" else batch["text_target"]
        losses, hits = masked_cross_entropy(partial(model.logits, term, seen), places, target, classes)
        total = (losses * own).sum()
        sums |= {term: total.detach(), f"{term}/accuracy": (hits * own).sum()}
        return self.weights[term] * total / max(1.0, counts[term])

    def codes(self, batch: Batch) -> Tensor:
        """Visual tokens of every patch, int64 (B, P): the stored ones, else the tokenizer's, of copies apart zeros."""
        if "image_code" in batch:
            return batch["image_code"]
        if self.tokenizer is None:
            raise ConfigError("masked image modelling needs an image tokenizer, or codes stored with the data")
        image, copies = batch["image"], len(batch["image_match"])
        alone = _samples(batch["plan"], "image", "image") - copies
        codes = self.tokenizer(torch.cat([image[:alone], image[alone + copies :]]))
        return torch.cat([codes[:alone], codes.new_zeros(copies, codes.shape[1]), codes[alone:]])

    def after_step(self, step: int) -> None:
        """Keep the temperature within its limits."""
        self.model.limit_temperature()


def _samples(plan: Plan, modality: str, kind: str) -> int:
    """Number of sequences of a modality in one kind of sample."""
    return sum(s.samples for s in plan.segments if (s.modality, s.kind) == (modality, kind))
