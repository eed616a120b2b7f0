"""VLMo: unified vision-language pre-training with mixture-of-modality-experts (Bao et al., 2021, arXiv 2111.02358).

One Transformer whose self-attention all modalities share; its FFNs are experts of pictures, of texts, and in the last
layers of pairs. It reads pictures and texts apart, to compare them, or together, to judge and answer. Trained in
stages: vision is BEiT's, then words are learned with everything else frozen, then pairs: hidden words, contrast, and
whether a picture and a text belong together, asked about the hardest wrong ones.

Where we differ: texts are packed, so nothing is computed for padding; pictures come before texts, which only names
places; embedded words are not dropped out. What is compared with whom is drawn with the batch, over all processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multiway.backbones.multiway import Biases, MultiwayTransformer
from multiway.backbones.vit import build_vit, check_shape
from multiway.errors import ConfigError
from multiway.nn.attention import Attention
from multiway.nn.block import Block
from multiway.nn.ffn import FeedForward, NormLinear
from multiway.nn.head import AnswerHead, Pooler, TokenHead
from multiway.nn.linear import Linear, QueryKeyValue
from multiway.nn.multiway import Multiway
from multiway.nn.pixels import HALF, Colour, Size, normalise
from multiway.nn.relative import JointBias
from multiway.nn.words import WordEmbedding
from multiway.objectives.contrastive import Negatives, symmetric_cross_entropy
from multiway.objectives.masked import masked_cross_entropy
from multiway.objectives.matching import draw_others
from multiway.plan import Plan, Tokens, plan_of
from multiway.types import Across, Batch, Objective, StepOutput
from multiway.weights.layouts import BEIT_BLOCK, TIMM_STEM, packed, under
from multiway.weights.rename import WeightMap

T = TypeVar("T")

NORM_EPS, WORD_EPS, HEAD_EPS = 1e-6, 1e-12, 1e-5
"""Of norms in the encoder, of BERT's, and in heads of answers."""
FIRST_LOGIT_SCALE = math.log(1 / 0.07)
WORDS_WEIGHT = 0.25
"""Of the loss of hidden words of pairs."""
LONGEST_TEXT = 196
"""Tokens that relative positions tell apart."""
READS_TEXT = ("language.", "types", "mlm_head.", "bias.", "encoder.norm.")
"""What the text stage trains, besides the experts of texts (masked.md 5.4)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a VLMo and which heads it carries.

    ``hidden``: width inside the FFNs; ``joint_layers``: how many last layers have experts of pairs; ``positions``:
    relative biases, one table for all layers, or positions added to patches and words; ``layer_scale``: first value of
    the factors on branches, 0 = no factors; ``text_tokens``: longest text with its two specials; ``masked``: carry the
    head of hidden words; ``contrast``: the vectors that are compared, of the modality's experts alone, or of those of
    pairs as well; ``match``: the judge of pairs; ``answers``: of a head that answers texts with so many ``pictures``
    each (0, 1 or 2), 0 = none; ``mean``, ``std``: of the pixels; ``share``: of the shorter side that evaluation looks
    at, None = the whole picture; ``init_std``: deviation of the initial weights.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_px: int | tuple[int, int] = 224
    joint_layers: int = 2
    positions: Literal["relative", "learned"] = "relative"
    layer_scale: float = 0.1
    vocab: int = 30522
    text_tokens: int = 40
    drop_path: float = 0.1
    masked: bool = True
    contrast: Literal["both", "alone", "none"] = "both"
    match: bool = True
    answers: int = 0
    pictures: int = 1
    mean: Colour = HALF
    std: Colour = HALF
    share: float | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_shape("VLMo", self)
        if not 0 < self.joint_layers <= self.depth:
            raise ConfigError(f"VLMo has 1 to {self.depth} joint_layers (its depth), got {self.joint_layers}")
        if self.positions == "relative" and self.text_tokens > LONGEST_TEXT:
            raise ConfigError(f"relative positions reach {LONGEST_TEXT} tokens, text_tokens is {self.text_tokens}")
        if self.pictures not in (0, 1, 2):
            raise ConfigError(f"VLMo answers texts with 0, 1 or 2 pictures each, got pictures {self.pictures}")


_PLUS: dict[str, Any] = {"dim": 544, "hidden": 2176, "positions": "learned", "layer_scale": 0.0}
_LARGE: dict[str, Any] = {"dim": 1024, "hidden": 4096}
_DEEP: dict[str, Any] = {"depth": 24, "heads": 16, "joint_layers": 3}

# masked.md 5.1. Tiny is ours, for CPUs.
PRESETS: Mapping[str, Config] = {
    "vlmo_tiny_patch16_64": Config(
        dim=128, depth=4, heads=4, hidden=256, image_px=64, joint_layers=1, vocab=512, text_tokens=64, drop_path=0.0,
        layer_scale=0.0, init_std=0.12,
    ),
    "vlmo_base_patch16_224": Config(),
    "vlmo_base_plus_patch16_224": Config(**_PLUS, **_DEEP),
    "vlmo_large_patch16_224": Config(**_LARGE, **_DEEP),
}  # fmt: skip


def build_encoder(config: Config) -> MultiwayTransformer:
    """Assemble the blocks: shared attention, FFNs with their norms per modality, in the last layers also of pairs."""
    dim, hidden = config.dim, config.hidden

    def norm() -> nn.Module:
        return nn.LayerNorm(dim, eps=NORM_EPS)

    blocks = []
    for layer in range(config.depth):
        joint = ["pair"] if layer >= config.depth - config.joint_layers else []
        qkv = Multiway(lambda: NormLinear(norm(), QueryKeyValue(dim)), ["shared"])
        ffn = Multiway(
            lambda: FeedForward(norm(), Linear(dim, hidden), nn.Identity(), Linear(hidden, dim)),
            ["image", "text", *joint],
        )
        attention = Attention(qkv, Multiway(lambda: Linear(dim, dim), ["shared"]), config.heads)
        rate = config.drop_path * layer / max(1, config.depth - 1)
        blocks.append(Block(attention, ffn, rate, (dim, config.layer_scale) if config.layer_scale else None))
    return MultiwayTransformer(blocks, Multiway(norm, ["shared"]))


def as_pairs(plan: Plan) -> Plan:
    """The same sequences, all of whose tokens go to the experts of pairs."""
    return dataclasses.replace(plan, segments=tuple(segment._replace(kind="pair") for segment in plan.segments))


class VLMo(nn.Module):
    """The model: embeddings, encoder, and the heads its config asks for."""

    accepts: ClassVar[frozenset[frozenset[str]]] = frozenset(
        {frozenset({"image"}), frozenset({"text"}), frozenset({"image", "text"})}
    )
    causal: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        dim, learned = config.dim, config.positions == "learned"
        self.vision = build_vit(
            image_px=config.image_px, patch=config.patch, dim=dim, depth=0, heads=config.heads, hidden=config.hidden,
            positions="learned" if learned else "none",
        )  # fmt: skip
        self.language = WordEmbedding(config.vocab, dim, config.text_tokens, 2, WORD_EPS, added=learned)
        self.types = nn.Parameter(torch.zeros(1 + max(1, config.pictures), dim))  # of texts, and of pictures
        self.encoder = build_encoder(config)
        self.bias = None if learned else JointBias(self.vision.grid, config.depth, config.heads, LONGEST_TEXT)
        self.pooler = Pooler(dim, nn.Identity())
        if config.masked:
            self.mlm_head = TokenHead(dim, config.vocab, WORD_EPS)
        if config.match:
            self.match_head = Linear(dim, 2)
        if config.contrast != "none":
            self.image_projection = Linear(dim, dim, bias=False)
            self.text_projection = Linear(dim, dim, bias=False)
            self.logit_scale = nn.Parameter(torch.full((1,), FIRST_LOGIT_SCALE))
        if config.contrast == "both":
            self.joint_image_projection = Linear(dim, dim, bias=False)
            self.joint_text_projection = Linear(dim, dim, bias=False)
            self.joint_logit_scale = nn.Parameter(torch.full((1,), FIRST_LOGIT_SCALE))
        if config.answers:
            read = 2 * dim if config.pictures == 2 else dim
            self.answer_head = (
                AnswerHead(read, 2 * dim, config.answers, HEAD_EPS) if config.pictures else Linear(dim, config.answers)
            )

    def rows(self, plan: Plan, image: Tensor | None, text: Tensor | None, together: int = 1) -> Tensor:
        """What the first block reads, (R, D); ``together``: pictures of one text, told apart by their types."""
        rows = {}
        if image is not None:
            x = self.vision.tokens(self.pixels(image)).unflatten(0, (-1, together))
            rows["image"] = (x + self.types[1 : 1 + together, None]).flatten(0, 2)
        if text is not None:
            start, stop = plan.extent("text")
            rows["text"] = self.language(text, plan.position[start:stop]) + self.types[0]
        return torch.cat([rows[name] for name in plan.modalities])

    def biases(self, plan: Plan) -> Biases | None:
        """The relative biases of every layer, None where positions are added."""
        return None if self.bias is None else self.bias(plan)

    def forward(
        self,
        plan: Plan,
        *,
        image: Tensor | None = None,
        text: Tensor | None = None,
        draws: Tensor | None = None,
        together: int = 1,
    ) -> Tokens:
        """All kinds of samples in one pass.

        image: uint8 (B, 3, H, W), those of pairs last; text: int64 (R,), packed, those of pairs first; draws: (2 L, S)
        for stochastic depth, None = nothing dropped; together: consecutive pictures that belong to one text.
        """
        return self.encoder(self.rows(plan, image, text, together), plan, draws, self.biases(plan))

    def encode(
        self, *, image: Tensor | None = None, text: Sequence[Tensor] | None = None, draws: Tensor | None = None
    ) -> Tokens:
        """Final tokens of pictures uint8 (B, 3, H, W), of texts (int64 ids with ``[CLS]`` and ``[SEP]``), or of pairs.

        draws: (2 L, S) for stochastic depth, None = nothing dropped.
        """
        count = None if image is None else len(image)
        plan = plan_of(count, self.picture_tokens, text, self.config.text_tokens)
        packed = None if text is None else torch.cat(list(text))
        return self(plan.to(self.types.device), image=image, text=packed, draws=draws)

    @property
    def picture_tokens(self) -> int:
        """Of a picture: its patches and the class token."""
        return self.vision.grid[0] * self.vision.grid[1] + 1

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised float32; floats are taken as normalised."""
        return normalise(image, self.config.mean, self.config.std)

    def patches(self, tokens: Tokens) -> Tensor:
        """The patches of pictures that were encoded alone, without the class token: (B, P, D)."""
        return tokens.dense("image")[0][:, 1:]

    def pool(self, tokens: Tokens) -> Tensor:
        """One vector per picture, (B, D): its class token."""
        return tokens.prefix("image")

    def embed(self, tokens: Tokens, modality: Literal["image", "text"]) -> Tensor:
        """Unit vectors (B, D) of pictures or texts that were encoded alone; cosine is similarity."""
        if self.config.contrast == "none":
            raise ConfigError("this VLMo compares nothing: tune it with a _retrieval recipe first")
        head = self.image_projection if modality == "image" else self.text_projection
        return F.normalize(head(tokens.prefix(modality)).float(), dim=-1)

    def embed_pairs(
        self, plan: Plan, *, image: Tensor, text: Tensor, keep: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) of pictures and of their texts, which the plan has apart; ``keep``: None, since relative
        biases are those of all patches; the rest as `forward`.
        """
        if keep is not None:
            raise ConfigError("VLMo reads every patch: set objective.keep to 1")
        tokens = self(plan, image=image, text=text, draws=draws)
        return self.embed(tokens, "image"), self.embed(tokens, "text")

    def embed_twice(
        self, plan: Plan, *, image: Tensor, text: Tensor, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `embed_pairs`, and once more after the last layers with the experts of pairs (masked.md 5.3): unit vectors
        of pictures and texts, then their others.
        """
        x, biases, start = self.rows(plan, image, text), self.biases(plan), self.layers - self.config.joint_layers
        x = self.encoder.run(x, plan, draws, biases, stop=start)
        alone, joint = (
            Tokens(self.encoder.norm(self.encoder.run(x, own, draws, biases, start=start), own), own)
            for own in (plan, as_pairs(plan))
        )
        others = self.joint_image_projection(joint.prefix("image")), self.joint_text_projection(joint.prefix("text"))
        return (
            self.embed(alone, "image"), self.embed(alone, "text"), *(F.normalize(x.float(), dim=-1) for x in others)
        )  # type: ignore[return-value]  # fmt: skip

    def text_logits(self, tokens: Tokens, hidden: Tensor) -> Tensor:
        """Scores of all words at hidden places: indices int64 (K,) into the packed text -> (K, vocab)."""
        return self.mlm_head(tokens.rows(hidden + tokens.plan.extent("text")[0]))

    def match(self, plan: Plan, *, image: Tensor, text: Tensor, draws: Tensor | None = None) -> Tensor:
        """Log-odds (B,) that picture and text of each pair of the plan belong together; the rest as `forward`."""
        if not self.config.match:
            raise ConfigError("this VLMo judges no pairs: it was saved without model.match")
        return self.matches(self(plan, image=image, text=text, draws=draws))

    def matches(self, tokens: Tokens) -> Tensor:
        """The log-odds (B,) of pairs from their tokens."""
        wrong, right = self.match_head(self.pooler(tokens.prefix("text"))).float().unbind(1)
        return right - wrong

    def answer(self, plan: Plan, *, text: Tensor, image: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """Scores of all answers to B texts: (B, answers).

        plan: a text with one picture, ``pictures`` times for each of the B, or without one; the rest as `forward`. Read
        is the pooled ``[CLS]``, of two pictures that beside each (masked.md 5.4; texts without pictures are ours).
        """
        if not self.config.answers:
            raise ConfigError("this VLMo answers nothing: tune it with a recipe such as _vqa or _nlvr2 first")
        together = max(1, self.config.pictures)
        tokens = self(plan, image=image, text=text, draws=draws, together=together)
        return self.answer_head(self.pooler(tokens.prefix("text")).view(-1, together * self.config.dim))

    def temperature(self) -> Tensor:
        """Factor on cosines, learned, not limited: (1,)."""
        return self.logit_scale.exp()

    def joint_temperature(self) -> Tensor:
        """The same of the vectors by experts of pairs."""
        return self.joint_logit_scale.exp()

    def set_image_size(self, image_px: Size) -> None:
        """Read pictures of another size from now on: biases are resized geometrically, positions bicubically."""
        self.vision.set_size(image_px, antialias=False)
        if self.bias is not None:
            self.bias.resize(self.vision.grid)
        self.config = dataclasses.replace(self.config, image_px=image_px)

    def adapt(self, config: Config) -> None:
        """Read pictures, texts and questions as a model of this config does, whose weights these become."""
        self.set_image_size(config.image_px)
        self.set_text_tokens(config.text_tokens)
        self.set_pictures(config.pictures)

    def set_text_tokens(self, longest: int) -> None:
        """Read texts of at most ``longest`` tokens from now on: positions are cut off; new ones, where they are not
        added, are zeros. Raises ConfigError for more than the learned ones.
        """
        given = self.language.positions.data
        if longest > len(given) and self.bias is None:
            raise ConfigError(f"this VLMo has learned {len(given)} places of words, it cannot read {longest}")
        self.language.positions = nn.Parameter(F.pad(given, (0, 0, 0, longest - len(given))))
        self.config = dataclasses.replace(self.config, text_tokens=longest)

    def set_pictures(self, pictures: int) -> None:
        """Have so many pictures in a question from now on: the type of a second one begins as that of the first."""
        rows = [0, *[1] * max(1, pictures)] if pictures > self.config.pictures else range(1 + max(1, pictures))
        self.types = nn.Parameter(self.types.data[list(rows)].clone())
        self.config = dataclasses.replace(self.config, pictures=pictures)

    @property
    def layers(self) -> int:
        """Number of blocks, for layer-wise learning rates."""
        return self.config.depth

    def layer_of(self, name: str) -> int:
        """0 for embeddings, positions and types, i + 1 for block i, depth + 1 for the rest."""
        if name.startswith(("vision.", "language.", "types")):
            return 0
        return int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks.") else self.layers + 1

    def no_decay(self, name: str) -> bool:
        """Matrices without weight decay: the table of relative biases (masked.md 5.4)."""
        return name == "bias.table"

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normals of deviation ``init_std``, the patch embedding as torch's convolutions; biases, also relative ones,
        0; norms 1 and 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | QueryKeyValue):
                nn.init.normal_(module.weight, std=self.config.init_std)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith(("_token", "positions", "types")):
                nn.init.normal_(parameter, std=self.config.init_std)
            elif name.endswith(("bias", "bias.table")):
                nn.init.zeros_(parameter)
            elif "gamma" in name:
                nn.init.constant_(parameter, self.config.layer_scale)
            elif name.endswith("logit_scale"):
                nn.init.constant_(parameter, FIRST_LOGIT_SCALE)
        self.vision.embed.reset_parameters()


def reads_text(name: str) -> bool:
    """Whether the text stage trains a parameter (masked.md 5.4)."""
    return name.startswith(READS_TEXT) or ".ffn.experts.text." in name


class MaskedLanguageModeling(Objective):
    """VLMo's stage of texts: hidden words of texts alone; all is frozen that reads none (masked.md 5.4).

    Batches are `MaskedCollate`'s of texts. Term: ``words``, with its accuracy.
    """

    def __init__(self, model: VLMo) -> None:
        super().__init__()
        self.model = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(reads_text(name))

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden words."""
        return {"words": len(batch["text_hidden"])}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Encode the texts with words hidden; predict them."""
        tokens = self.model(batch["plan"], text=batch["text"], draws=batch.get("drop_path"))
        losses, hits = hidden_words(self.model, tokens, batch)
        return StepOutput(losses / max(1.0, counts["words"]), {"words": losses.detach(), "words/accuracy": hits})


def hidden_words(model: VLMo, tokens: Tokens, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums of losses and of hits at the hidden words of the first texts of the plan, which are the batch's."""
    logits = partial(model.text_logits, tokens)
    losses, hits = masked_cross_entropy(logits, batch["text_hidden"], batch["text_target"], model.config.vocab)
    return losses.sum(), hits.sum()


class MaskedContrastMatching(Objective):
    """VLMo's pre-training on pairs: hidden words, contrast apart, and whether picture and text belong together.

    Wrong pairs are hard ones: for every picture another text, for every text another picture, of all pairs of the step,
    drawn the likelier the more the contrast takes them for partners. Batches are `MatchCollate`'s; several
    micro-batches make one, as with `multiway.tasks.retrieval.ImageTextContrast`. ``negatives``: of the contrast.
    Terms: ``words`` (weighted .25), ``contrast`` (the mean of both kinds of vectors), ``match`` (three judgements per
    pair), each with its accuracy. Source: masked.md 5.3.
    """

    splittable: bool = False
    joins: bool = True

    def __init__(self, model: VLMo, negatives: Negatives = "gathered") -> None:
        super().__init__()
        shape = model.config
        if not (shape.masked and shape.match and shape.contrast == "both"):
            raise ConfigError("pre-training needs all heads: set model.masked, model.match and model.contrast=both")
        self.model = model
        self.negatives: Negatives = negatives

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden words, pairs, and pairs that are judged."""
        pairs = len(batch["match_draw"])
        return {"words": len(batch["text_hidden"]), "contrast": pairs, "match": 3 * pairs}

    def forward(
        self, batch: Batch | Sequence[Batch], counts: Mapping[str, float], across: Across = Across()
    ) -> StepOutput:
        """Compare every local pair with all pairs, then read each with its words hidden, whole, and with the others
        drawn; ``batch``: one, or the micro-batches of a step.
        """
        parts = [batch] if isinstance(batch, Mapping) else list(batch)
        compute = _at_once if len(parts) == 1 else _again
        vectors = [torch.cat(own) for own in zip(*(compute(self.embed, part) for part in parts), strict=True)]
        image, text, joint_image, joint_text = vectors
        compare = partial(symmetric_cross_entropy, gather=across.gather, rank=across.rank, negatives=self.negatives)
        losses, hits = compare(image, text, self.model.temperature())
        joint_losses, joint_hits = compare(joint_image, joint_text, self.model.joint_temperature())
        sums = {
            "contrast": (losses + joint_losses).sum() / 2, "contrast/accuracy": hits.sum(),
            "contrast/joint_accuracy": joint_hits.sum(),
        }  # fmt: skip
        others = self.others(parts, image, text, across)
        judged = [compute(self.judge, part, *own) for part, own in zip(parts, others, strict=True)]
        names = ("words", "words/accuracy", "match", "match/accuracy")
        sums |= {name: torch.stack(own).sum() for name, own in zip(names, zip(*judged, strict=True), strict=True)}
        weights = {"words": WORDS_WEIGHT, "contrast": 1.0, "match": 1.0}
        loss = sum(weight * sums[name] / max(1.0, counts[name]) for name, weight in weights.items())
        return StepOutput(loss, {name: value.detach() for name, value in sums.items()})  # type: ignore[arg-type]

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit vectors (B, D) of pictures and of whole texts, and those by the experts of pairs."""
        draws = batch.get("drop_path")
        return self.model.embed_twice(batch["plan"], image=batch["image"], text=whole_text(batch), draws=draws)

    @torch.no_grad()
    def others(
        self, parts: Sequence[Batch], image: Tensor, text: Tensor, across: Across
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of every micro-batch: another text for each picture, padded ids (B, T) and lengths (B,), and another picture
        for each text, uint8 (B, 3, H, W).
        """

        def everyone(own: Tensor) -> Tensor:
            """Of all micro-batches and processes, in the order of one process's single batch."""
            by_part = across.gather(own.detach()).unflatten(0, (across.world, len(parts), -1))
            return by_part.transpose(0, 1).flatten(0, 2)

        size = len(image) // len(parts)
        part, place = (torch.arange(n, device=image.device) for n in (len(parts), size))
        own = (((part * across.world + across.rank) * size)[:, None] + place).flatten()
        draws, scale = torch.cat([part["match_draw"] for part in parts]), self.model.temperature()
        with torch.autocast(image.device.type, enabled=False):  # rounded, they would depend on how a step is split
            texts = draw_others(scale * image @ everyone(text).T, own, draws[:, 0])
            pictures = draw_others(scale * text @ everyone(image).T, own, draws[:, 1])
        longest = parts[0]["match_plan"].groups[0].length - self.model.picture_tokens
        padded = [padded_texts(part["plan"], whole_text(part), longest) for part in parts]
        ids, lengths = (everyone(torch.cat(own)) for own in zip(*padded, strict=True))
        shown = everyone(torch.cat([part["image"] for part in parts]))
        chosen = zip(texts.split(size), pictures.split(size), strict=True)
        return [(ids[text], lengths[text], shown[picture]) for text, picture in chosen]

    def judge(self, batch: Batch, ids: Tensor, lengths: Tensor, pictures: Tensor) -> tuple[Tensor, ...]:
        """Sums of losses and hits of the hidden words of pairs, and of the judgements of the pairs, of texts with other
        ``pictures``, and of pictures with other texts (``ids``, ``lengths``).
        """
        model, image, whole = self.model, batch["image"], whole_text(batch)
        draws = batch.get("drop_path")
        tokens = model(
            with_lengths(batch["match_plan"], lengths, ids.shape[1]),
            image=torch.cat([image, image, pictures, image]),
            text=torch.cat([batch["text"], whole, whole, ids.flatten()]),
            draws=None if draws is None else torch.cat([draws, draws], dim=1),
        )
        odds = model.matches(tokens)[len(image) :]
        right = torch.arange(len(odds), device=odds.device) < len(image)
        losses = F.softplus(torch.where(right, -odds, odds))  # cross-entropy of the two scores
        return *hidden_words(model, tokens, batch), losses.sum(), ((odds > 0) == right).sum()


def _at_once(work: Callable[..., T], *inputs: Any) -> T:
    return work(*inputs)


def _again(work: Callable[..., T], *inputs: Any) -> T:
    """Without keeping activations: they are made again in the backward."""
    return checkpoint(work, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def whole_text(batch: Batch) -> Tensor:
    """The packed texts, int64 (R,), with the hidden words back in place."""
    return batch["text"].index_copy(0, batch["text_hidden"], batch["text_target"])


def padded_texts(plan: Plan, text: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed texts as ids, zero at padding, and lengths: int64 (B, ``longest``) and (B,)."""
    starts = plan.starts["text"] - plan.extent("text")[0]
    lengths = torch.diff(starts, append=starts.new_tensor([len(text)]))
    place = torch.arange(longest, device=text.device)
    index = (starts[:, None] + place).clamp(max=len(text) - 1)
    return text[index] * (place < lengths[:, None]), lengths


def with_lengths(plan: Plan, lengths: Tensor, longest: int) -> Plan:
    """The plan of pairs, whose last texts are ``longest`` tokens, of which nobody sees those behind ``lengths``, int64
    (B,).
    """
    [group] = plan.groups
    every = torch.ones(group.samples, 1, 1, group.length, dtype=torch.bool, device=lengths.device)
    keep = every if group.keep is None else group.keep.clone()
    place = torch.arange(longest, device=lengths.device)
    keep[-len(lengths) :, 0, 0, group.length - longest :] = place < lengths[:, None]
    return dataclasses.replace(plan, groups=(dataclasses.replace(group, keep=keep),))


_BLOCK = (
    *(rule for rule in packed(BEIT_BLOCK) if not rule[0].startswith("ffn.")),
    ("ffn.experts.{expert}.norm.{part}", "norm2_{expert}.{part}"),
    ("ffn.experts.{expert}.{name}.{part}", "mlp_{expert}.{name}.{part}"),
)
_OFFICIAL = WeightMap(
    words={"expert": {"image": "imag", "text": "text", "pair": "vl"}},
    rules=(
        *under("vision.", "transformer.", TIMM_STEM),
        *under("encoder.blocks.{layer}.", "transformer.blocks.{layer}.", _BLOCK),
        ("encoder.norm.experts.shared.{part}", "transformer.norm.{part}"),
        ("bias.table", "relative_position_bias_table"),
        ("language.words.weight", "text_embeddings.word_embeddings.weight"),
        ("language.positions", "text_embeddings.position_embeddings.weight"),
        ("language.types", "text_embeddings.token_type_embeddings.weight"),
        ("language.norm.{part}", "text_embeddings.LayerNorm.{part}"),
        ("types", "token_type_embeddings.weight"),
        ("pooler.dense.{part}", "pooler.dense.{part}"),
        ("mlm_head.dense.{part}", "mlm_score.transform.dense.{part}"),
        ("mlm_head.norm.{part}", "mlm_score.transform.LayerNorm.{part}"),
        ("mlm_head.decoder.weight", "mlm_score.decoder.weight"),
        ("mlm_head.decoder.bias", "mlm_score.bias"),
        ("match_head.{part}", "itm_score.fc.{part}"),
        ("joint_{modality}_projection.{part}", "itc_vl_{modality}_proj.fc.{part}"),
        ("{modality}_projection.{part}", "itc_{modality}_proj.fc.{part}"),
        ("joint_logit_scale", "logit_vl_scale"),
        ("logit_scale", "logit_scale"),
    ),
    squeezed=("logit_scale", "joint_logit_scale"),
    ones={"vision.positions": -1},
    dropped=(
        "text_embeddings.position_ids", "relative_position_index", "text_relative_position_index",
        "text_imag_relative_position_index",
    ),
)  # fmt: skip


def _answering(theirs: str, pictures: int) -> WeightMap:
    """The layout of a file whose head of answers is called so."""
    rules = [(f"answer_head.{name}." + "{part}", f"{theirs}.{i}." + "{part}") for name, i in _HEAD.items()]
    return dataclasses.replace(_OFFICIAL, rules=(*_OFFICIAL.rules, *rules), config={"pictures": pictures})


_HEAD = {"dense": 0, "norm": 1, "out": 3}

LAYOUTS: Mapping[str, WeightMap] = {
    "official": _answering("vqa_classifier", 1),
    "official_nlvr2": _answering("nlvr2_classifier", 2),
}
"""Names in the released files: of pre-training, retrieval and questions, and of two pictures."""
