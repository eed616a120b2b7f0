"""BEiT-3: image as a foreign language (Wang et al., 2022, arXiv 2208.10442).

One Multiway Transformer reads pictures, texts and pairs; it is pre-trained by masked data modelling alone: hide patches
and words, predict the visual tokens of the patches and the ids of the words. Pre-training was never released; this is
reconstructed from the paper, the released fine-tuning code and the authors' answers (docs/beit3.md lists what is known
and what had to be chosen).

Two architectures carry the name, both are here. *Decoupled* (the released base and large): every projection, norm
and FFN exists per modality, only the softmax runs over both. *Shared* (the paper's giant): one self-attention for
all, an FFN expert per modality, and in the top 3 layers a vision-language expert for the tokens of pairs.

Where we differ: weights are initialised as in BEiT, then scaled by Magneto's gain sqrt(ln 2L) (the paper rescales by
1/sqrt(2l) and has no sub-LayerNorm gain; the released wrapper erases it); the contrastive temperature is clamped at
100.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.backbones.multiway import MultiwayTransformer
from multiway.errors import ConfigError
from multiway.nn.attention import Attention, Cache
from multiway.nn.block import Block
from multiway.nn.ffn import FeedForward, NormLinear
from multiway.nn.head import AnswerHead, Pooler
from multiway.nn.linear import Linear
from multiway.nn.multiway import Multiway
from multiway.nn.patch import PatchEmbed
from multiway.nn.pixels import HALF, Colour, normalise
from multiway.nn.position import resize_positions
from multiway.nn.quantize import ImageTokenizer
from multiway.objectives.contrastive import symmetric_cross_entropy
from multiway.objectives.masked import masked_cross_entropy
from multiway.plan import Plan, Tokens, make_plan, plan_of
from multiway.types import Across, Batch, Objective, StepOutput
from multiway.weights.rename import WeightMap

UNUSED_POSITIONS = 2
"""Rows 0 and 1 of both position tables are never read: fairseq counts positions from 2, and the released files keep
it.
"""

NORM_EPS = 1e-5
MAX_LOGIT_SCALE = math.log(100)
CLASSIFIER_SCALE = 1e-3
"""Of a classifier's first weights (masked.md 6.3)."""
MODALITIES = ("image", "text")
TERMS = ("image", "pair_image", "pair_text", "text")
"""The four masked losses: pictures alone, pictures and texts of pairs, texts alone."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a BEiT-3 and which heads it carries.

    ``hidden``: width inside the FFNs; ``text_positions``: rows of the text position table (longest text + 2);
    ``attention``: per modality (``decoupled``) or for all (``shared``); ``joint_layers``: how many top layers have a
    vision-language expert (shared only); ``masked``: carry the masked heads; ``codes``: visual vocabulary of the one of
    pictures, 0 = that of words alone; ``contrast``: carry the retrieval heads; ``classes``: of a classifier of
    pictures, which has a norm of its own instead of the final one, 0 = none; ``answers``: of a head that answers texts
    with so many ``pictures`` each (0, 1 or 2), 0 = none; ``mean``, ``std``: of the pixels; ``share``: of the shorter
    side that evaluation looks at, None = the whole picture. ``init_std``: deviation of the initial weights, cut at one
    deviation; .02 as BEiT, more for narrow models, whose signals it keeps from vanishing.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_px: int = 224
    vocab: int = 64010
    text_positions: int = 1024
    attention: Literal["decoupled", "shared"] = "decoupled"
    joint_layers: int = 0
    drop_path: float = 0.1
    codes: int = 8192
    masked: bool = True
    contrast: bool = False
    classes: int = 0
    answers: int = 0
    pictures: int = 1
    mean: Colour = HALF
    std: Colour = HALF
    share: float | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.image_px % self.patch:
            raise ConfigError(
                f"BEiT-3 needs dim divisible by heads and image_px by patch, got dim {self.dim}, heads {self.heads}, "
                f"image_px {self.image_px}, patch {self.patch}"
            )
        if self.joint_layers and self.attention == "decoupled":
            raise ConfigError("joint_layers (vision-language experts) belong to attention='shared' (the paper's giant)")
        if self.pictures not in (0, 1, 2):
            raise ConfigError(f"BEiT-3 answers texts with 0, 1 or 2 pictures each, got pictures {self.pictures}")

    @property
    def own_norm(self) -> bool:
        """Whether what is read off the tokens is normed there, instead of by a final norm (masked.md 6.3, 6.6)."""
        return self.classes > 0 or (self.answers > 0 and self.pictures < 2)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_px // self.patch, self.image_px // self.patch


# base, large: released (specs 6.1: 276,510,730 and 746,709,514 parameters with both heads); giant: the paper's table.
# tiny and small are ours, for CPU and one GPU.
PRESETS: Mapping[str, Config] = {
    "beit3_tiny_patch16_64": Config(
        dim=128, depth=3, heads=4, hidden=256, image_px=64, vocab=512, text_positions=66, codes=512,
        drop_path=0.0, contrast=True, init_std=0.12,
    ),
    "beit3_small_patch16_224": Config(dim=384, depth=12, heads=6, hidden=1536),
    "beit3_base_patch16_224": Config(),
    "beit3_large_patch16_224": Config(dim=1024, depth=24, heads=16, hidden=4096),
    "beit3_giant_patch14_224": Config(
        dim=1408, depth=40, heads=16, hidden=6144, patch=14, attention="shared", joint_layers=3
    ),
}  # fmt: skip


def build_encoder(config: Config) -> MultiwayTransformer:
    """Assemble the backbone: ``decoupled`` gives every part one copy per modality, ``shared`` only the FFNs."""
    dim, hidden = config.dim, config.hidden
    shared = config.attention == "shared"
    own = ["shared"] if shared else list(MODALITIES)

    def norm(width: int = dim) -> nn.Module:
        return nn.LayerNorm(width, eps=NORM_EPS)

    def project(out: int) -> Multiway:
        return Multiway(lambda: NormLinear(norm(), Linear(dim, out)), own)

    def ffn(experts: Sequence[str]) -> Multiway:
        return Multiway(lambda: FeedForward(norm(), Linear(dim, hidden), norm(hidden), Linear(hidden, dim)), experts)

    blocks = []
    for layer in range(config.depth):
        joint = ["pair"] if layer >= config.depth - config.joint_layers else []
        rate = config.drop_path * layer / max(1, config.depth - 1)
        blocks.append(Block(Attention(project(3 * dim), project(dim), config.heads), ffn([*MODALITIES, *joint]), rate))
    return MultiwayTransformer(blocks, Multiway(nn.Identity, ["shared"]) if config.own_norm else Multiway(norm, own))


class Vision(nn.Module):
    """Pictures to rows: patches, hidden ones replaced by a learned token, a class token in front, positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.grid = config.grid
        self.mean, self.std = config.mean, config.std
        self.proj = PatchEmbed(config.patch, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        rows = UNUSED_POSITIONS + 1 + config.grid[0] * config.grid[1]
        self.positions = nn.Parameter(torch.zeros(rows, config.dim))

    def forward(self, image: Tensor, hide: Tensor | None, keep: Tensor | None = None) -> Tensor:
        """image: uint8 or normalised (B, 3, H, W); hide: bool (B, P), True = hidden, or None; keep: int64 (B, K), the
        patches that go on, or None = all P -> (B * (K + 1), D).
        """
        expected = self.grid[0] * self.proj.kernel_size[0], self.grid[1] * self.proj.kernel_size[1]
        if image.shape[2:] != expected:
            raise ConfigError(f"pictures of {tuple(image.shape[2:])} pixels, expected {expected}: call set_image_size")
        x = self.proj(normalise(image, self.mean, self.std).to(self.proj.weight.dtype))  # (B, P, D)
        if hide is not None:
            x = torch.where(hide[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        x = x + self.positions[UNUSED_POSITIONS:]
        if keep is not None:
            x = x.take_along_dim(F.pad(keep + 1, (1, 0))[..., None], dim=1)  # the class token is kept, too
        return x.flatten(0, 1)


class Language(nn.Module):
    """Token ids to rows: a table of words and one of positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Parameter(torch.zeros(config.text_positions, config.dim))

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        """ids, position: int64 (R,) -> (R, D)."""
        return self.words(ids) + F.embedding(position + UNUSED_POSITIONS, self.positions)


class BEiT3(nn.Module):
    """The model: embeddings, Multiway encoder, and the heads its config asks for."""

    accepts: ClassVar[frozenset[frozenset[str]]] = frozenset(
        {frozenset({"image"}), frozenset({"text"}), frozenset({"image", "text"})}
    )
    causal: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision = Vision(config)
        self.language = Language(config)
        self.encoder = build_encoder(config)
        if config.masked:
            self.mlm_head = Linear(config.dim, config.vocab)
            if config.codes:
                self.mim_head = Linear(config.dim, config.codes)
        if config.contrast:
            self.vision_head = Linear(config.dim, config.dim, bias=False)
            self.language_head = Linear(config.dim, config.dim, bias=False)
            self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        if config.classes:
            self.fc_norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
            self.head = Linear(config.dim, config.classes)
        if config.answers:
            read = config.dim * 2 * config.pictures if config.pictures == 2 else config.dim
            norm = nn.LayerNorm(read, eps=NORM_EPS)
            self.pooler = norm if config.pictures == 2 else Pooler(config.dim, norm)
            self.answer_head = AnswerHead(read, 2 * config.dim, config.answers, NORM_EPS)

    def forward(
        self,
        plan: Plan,
        *,
        image: Tensor | None = None,
        text: Tensor | None = None,
        hide: Tensor | None = None,
        keep: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Tokens:
        """All kinds of samples in one pass.

        image: uint8 (B, 3, H, W), those of pairs last; text: int64 (R,), packed, those of pairs first; hide: bool
        (B, P), True = hidden patch; keep: int64 (B, K), the patches that are read at all, None = every patch; draws:
        (2 L, S) for stochastic depth, None = nothing dropped.
        """
        rows = {}
        if image is not None:
            rows["image"] = self.vision(image, hide, keep)
        if text is not None:
            start, stop = plan.extent("text")
            rows["text"] = self.language(text, plan.position[start:stop])
        return self.encoder(torch.cat([rows[name] for name in plan.modalities]), plan, draws)

    def encode(
        self, *, image: Tensor | None = None, text: Sequence[Tensor] | None = None, draws: Tensor | None = None
    ) -> Tokens:
        """Final tokens of pictures uint8 (B, 3, H, W), of texts (int64 ids with ``<s>`` and ``</s>``), or of pairs.

        draws: (2 L, S) for stochastic depth, None = nothing dropped.
        """
        count, longest = None if image is None else len(image), self.config.text_positions - UNUSED_POSITIONS
        plan = plan_of(count, self.vision.grid[0] * self.vision.grid[1] + 1, text, longest)
        packed = None if text is None else torch.cat(list(text))
        return self(plan.to(self.vision.cls_token.device), image=image, text=packed, draws=draws)

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised float32; floats are taken as normalised."""
        return normalise(image, self.config.mean, self.config.std)

    def patches(self, tokens: Tokens) -> Tensor:
        """The patches of pictures that were encoded alone, without the class token: (B, P, D)."""
        return tokens.dense("image")[0][:, 1:]

    def pool(self, tokens: Tokens) -> Tensor:
        """One vector per picture, (B, D), that a classifier reads: the normed mean of the patches, or the class token
        of a model without classifier.
        """
        return self.fc_norm(tokens.mean("image", skip=1)) if self.config.classes else tokens.prefix("image")

    def classify(self, image: Tensor, draws: Tensor | None = None) -> Tensor:
        """Scores of all classes: (B, classes), from the vision half alone."""
        if not self.config.classes:
            raise ConfigError("this BEiT-3 has no classifier: tune it with a classification recipe")
        return self.head(self.pool(self.encode(image=image, draws=draws)))

    def answer(self, plan: Plan, *, text: Tensor, image: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """Scores of all answers to B texts: (B, answers).

        plan: a text with one picture, ``pictures`` times for each of the B, or without one; the rest as `forward`. Read
        are the class token of the picture, of two pictures also ``<s>`` beside each, or ``<s>`` alone (masked.md 6.3;
        texts without pictures are ours).
        """
        config = self.config
        if not config.answers:
            raise ConfigError("this BEiT-3 answers nothing: tune it with a recipe such as _vqa or _nlvr2 first")
        tokens = self(plan, image=image, text=text, draws=draws)
        if config.pictures == 2:
            read = torch.cat([tokens.prefix("image"), tokens.prefix("text")], dim=1).view(-1, 4 * config.dim)
        else:
            read = tokens.prefix("image" if config.pictures else "text")
        return self.answer_head(self.pooler(read))

    def embed(self, tokens: Tokens, modality: Literal["image", "text"]) -> Tensor:
        """Unit vectors (B, D) of pictures or texts that were encoded alone; cosine is similarity."""
        if not self.config.contrast:
            raise ConfigError("this BEiT-3 has no retrieval heads: tune it with an _itc or _retrieval recipe first")
        head = self.vision_head if modality == "image" else self.language_head
        return F.normalize(head(tokens.prefix(modality)).float(), dim=-1)

    def embed_pairs(
        self, plan: Plan, *, image: Tensor, text: Tensor, keep: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) of pictures and of their texts, which the plan has apart; the rest as `forward`."""
        tokens = self(plan, image=image, text=text, keep=keep, draws=draws)
        return self.embed(tokens, "image"), self.embed(tokens, "text")

    def image_logits(self, tokens: Tokens, hidden: Tensor) -> Tensor:
        """Scores of all visual tokens at hidden patches: flat indices int64 (M,) into (B, P) -> (M, codes)."""
        first, patches = tokens.plan.extent("image")[0], self.vision.grid[0] * self.vision.grid[1]
        return self.mim_head(tokens.rows(first + hidden + hidden // patches + 1))  # after each picture's class token

    def text_logits(self, tokens: Tokens, hidden: Tensor) -> Tensor:
        """Scores of all words at hidden places: indices int64 (K,) into the packed text -> (K, vocab)."""
        return self.mlm_head(tokens.rows(hidden + tokens.plan.extent("text")[0]))

    def begin(self, image: Tensor, places: int) -> Cache:
        """Read pictures uint8 (B, 3, H, W), of which `advance` writes texts: ``places`` words in all beams at most."""
        if not self.config.masked:
            raise ConfigError("this BEiT-3 has no head of words: tune it with a _captioning recipe first")
        x = self.vision(image, None)
        length = len(x) // len(image)
        cache = Cache(length + places)
        self.encoder.extend(x, make_plan({"pair": {"image": [length] * len(image)}}).to(x.device), cache)
        cache.filled = length
        return cache

    def advance(self, cache: Cache, words: Tensor, parents: Tensor | None, mask_id: int) -> Tensor:
        """Scores of the next word of K beams for every picture of the cache: (B, K, vocab).

        ``words``: int64 (B, K), the last word of each, ``<s>`` at first; ``parents``: int64 (B, K), the beam that each
        continues, None = itself. Read are the words and a ``<mask>`` behind each, which no later token sees.
        """
        count, beams = words.shape
        start = self.vision.grid[0] * self.vision.grid[1] + 1
        if parents is not None:
            cache.reorder(start, parents)
        row = torch.arange(2 * beams, device=words.device)[:, None]  # all words, then all masks
        column = torch.arange(cache.filled + 2 * beams, device=words.device) - start
        position = (cache.filled - start + row[:, 0]) // beams
        own = (column % beams == row % beams) & (column // beams <= position[:, None])
        ids = torch.cat([words, torch.full_like(words, mask_id)], dim=1)
        x = self.language(ids.flatten(), position.repeat(count))
        plan = make_plan({"pair": {"text": [2 * beams] * count}}).to(words.device)
        x = self.encoder.extend(x, plan, cache, (column < 0) | own)
        cache.filled += beams
        return self.mlm_head(x.view(count, 2, beams, -1)[:, 1])

    def temperature(self) -> Tensor:
        """Factor on cosines, learned, at most 100: (1,)."""
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def set_image_size(self, image_px: int | tuple[int, int]) -> None:
        """Read pictures of another size (pixels, or rows and columns) from now on: positions are interpolated."""
        height, width = (image_px, image_px) if isinstance(image_px, int) else image_px
        if height % self.config.patch or width % self.config.patch:
            raise ConfigError(f"pictures of {height}x{width} pixels are not whole patches of {self.config.patch}")
        grid = height // self.config.patch, width // self.config.patch
        table = resize_positions(self.vision.positions.data, self.vision.grid, grid, extra=UNUSED_POSITIONS + 1)
        self.vision.positions = nn.Parameter(table)
        self.vision.grid = grid
        if grid[0] == grid[1]:
            self.config = dataclasses.replace(self.config, image_px=grid[0] * self.config.patch)

    @property
    def layers(self) -> int:
        """Number of blocks, for layer-wise learning rates."""
        return self.config.depth

    def layer_of(self, name: str) -> int:
        """0 for embeddings and positions, i + 1 for block i, depth + 1 for final norm and heads (masked.md 1.6)."""
        if name.startswith(("vision.", "language.")):
            return 0
        return int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks.") else self.layers + 1

    def no_decay(self, name: str) -> bool:
        """Matrices without weight decay: position tables, class and mask token (choice 25)."""
        return name.endswith(("positions", "cls_token", "mask_token"))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal cut at one deviation, biases 0, norms 1 and 0, then Magneto's gain (choice 5)."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | PatchEmbed):
                nn.init.trunc_normal_(module.weight, std=std, a=-std, b=std)
                if not isinstance(module, nn.Embedding) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for table in (self.vision.positions, self.language.positions, self.vision.cls_token, self.vision.mask_token):
            nn.init.trunc_normal_(table, std=std, a=-std, b=std)
        gain = math.sqrt(math.log(2 * self.config.depth))
        for name, weight in self.encoder.named_parameters():
            if name.endswith(("fc1.weight", "fc2.weight")) or (".out." in name and name.endswith("linear.weight")):
                weight.mul_(gain)
            elif ".qkv." in name and name.endswith("linear.weight"):
                weight[2 * self.config.dim :].mul_(gain)  # the values alone
        if self.config.contrast:
            nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        if self.config.classes:
            self.head.weight.mul_(CLASSIFIER_SCALE)
        if self.config.answers and self.config.pictures == 2:
            self.answer_head.dense.weight.mul_(CLASSIFIER_SCALE)
            self.answer_head.out.weight.mul_(CLASSIFIER_SCALE)


class MaskedDataModeling(Objective):
    """BEiT-3's pre-training: predict hidden patches' visual tokens and hidden words, alone and in pairs.

    ``tokenizer``: image -> codes, asked when the batch carries none; ``weights``: of the four losses (choice 7: all 1).
    Terms: ``image``, ``pair_image``, ``pair_text``, ``text``; each has its accuracy. Source: masked.md 7.3.
    """

    def __init__(
        self, model: BEiT3, tokenizer: ImageTokenizer | None, weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.weights = {**dict.fromkeys((*TERMS, "contrast"), 1.0), **(weights or {})}

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden patches of pictures alone and of pairs, hidden words of pairs and of texts alone."""
        counts: dict[str, int] = dict.fromkeys(TERMS, 0)
        patches, words = self.borders(batch)
        if "image_hidden" in batch:
            counts["image"] = int((batch["image_hidden"] < patches).sum())
            counts["pair_image"] = len(batch["image_hidden"]) - counts["image"]
        if "text_hidden" in batch:
            counts["pair_text"] = int((batch["text_hidden"] < words).sum())
            counts["text"] = len(batch["text_hidden"]) - counts["pair_text"]
        return counts

    def borders(self, batch: Batch) -> tuple[int, int]:
        """Number of patches of image-only samples, and of words of pairs: where the terms part in the flat indices."""
        plan = batch["plan"]
        pictures = sum(s.samples for s in plan.segments if (s.modality, s.kind) == ("image", "image"))
        return plan.part("image", "image") - pictures, plan.part("text", "pair")

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """One pass over all three kinds of samples; logits at hidden places only."""
        return self.predict(self.encode(batch), batch, counts)

    def encode(self, batch: Batch) -> Tokens:
        """The model's tokens for everything in a batch."""
        return self.model(
            batch["plan"],
            image=batch.get("image"),
            text=batch.get("text"),
            hide=batch.get("image_hide"),
            draws=batch.get("drop_path"),
        )

    def predict(self, tokens: Tokens, batch: Batch, counts: Mapping[str, float]) -> StepOutput:
        """The four masked losses."""
        patches, words = self.borders(batch)
        sums: dict[str, Tensor] = {}
        loss = tokens.values.new_zeros((), dtype=torch.float32)

        # Image: the visual token of every hidden patch.
        if "image_hidden" in batch:
            hidden, codes = batch["image_hidden"], self.codes(batch)
            logits = partial(self.model.image_logits, tokens)
            result = masked_cross_entropy(logits, hidden, codes.flatten()[hidden], self.model.config.codes)
            loss = loss + self.add(sums, ("image", "pair_image"), hidden < patches, result, counts)

        # Text: the id of every hidden word.
        if "text_hidden" in batch:
            hidden = batch["text_hidden"]
            logits = partial(self.model.text_logits, tokens)
            result = masked_cross_entropy(logits, hidden, batch["text_target"], self.model.config.vocab)
            loss = loss + self.add(sums, ("pair_text", "text"), hidden < words, result, counts)
        return StepOutput(loss, sums)

    def codes(self, batch: Batch) -> Tensor:
        """Visual tokens of every patch, int64 (B, P): the stored ones, else the tokenizer's."""
        if "image_code" in batch:
            return batch["image_code"]
        if self.tokenizer is None:
            raise ConfigError("masked data modelling needs an image tokenizer, or codes stored with the data")
        return self.tokenizer(batch["image"])

    def add(
        self,
        sums: dict[str, Tensor],
        terms: tuple[str, str],
        first: Tensor,
        result: tuple[Tensor, Tensor],
        counts: Mapping[str, float],
    ) -> Tensor:
        """Split predictions between two terms (``first``: True = of the first), note their sums, return their loss."""
        losses, hits = result
        total = losses.new_zeros(())
        for term, own in zip(terms, (first, ~first), strict=True):
            part = (losses * own).sum()
            total = total + self.weights[term] * part / max(1.0, counts[term])
            sums[term] = part.detach()
            sums[f"{term}/accuracy"] = (hits * own).sum()
        return total


_OURS, _THEIRS = "encoder.blocks.{layer}.", "beit3.encoder.layers.{layer}."

_OFFICIAL = WeightMap(
    words={"expert": {"image": "A", "text": "B"}},
    squeezed=("logit_scale",),
    rules=(
        ("vision.proj.{part}", "beit3.vision_embed.proj.{part}"),
        ("vision.{token}_token", "beit3.vision_embed.{token}_token"),
        ("vision.positions", "beit3.encoder.embed_positions.A.weight"),
        ("language.words.weight", "beit3.text_embed.weight"),
        ("language.positions", "beit3.encoder.embed_positions.B.weight"),
        (_OURS + "attention.qkv.experts.{expert}.norm.{part}", _THEIRS + "self_attn_layer_norm.{expert}.{part}"),
        (
            _OURS + "attention.qkv.experts.{expert}.linear.{part}",
            *(_THEIRS + f"self_attn.{name}_proj." + "{expert}.{part}" for name in "qkv"),
        ),
        (_OURS + "attention.out.experts.{expert}.norm.{part}", _THEIRS + "self_attn.inner_attn_ln.{expert}.{part}"),
        (_OURS + "attention.out.experts.{expert}.linear.{part}", _THEIRS + "self_attn.out_proj.{expert}.{part}"),
        (_OURS + "ffn.experts.{expert}.norm.{part}", _THEIRS + "final_layer_norm.{expert}.{part}"),
        (_OURS + "ffn.experts.{expert}.inner.{part}", _THEIRS + "ffn.{expert}.ffn_layernorm.{part}"),
        (_OURS + "ffn.experts.{expert}.{name}.{part}", _THEIRS + "ffn.{expert}.{name}.{part}"),
        ("encoder.norm.experts.{expert}.{part}", "beit3.encoder.layer_norm.{expert}.{part}"),
        *((name, name) for name in ("{head}_head.{part}", "logit_scale", "fc_norm.{part}", "head.{part}")),
    ),
)
_VQA = (
    ("pooler.{name}.{part}", "pooler.{name}.{part}"),
    ("answer_head.dense.{part}", "head.0.{part}"),
    ("answer_head.norm.{part}", "head.1.{part}"),
    ("answer_head.out.{part}", "head.3.{part}"),
)
_NLVR2 = (
    ("pooler.{part}", "head.norm1.{part}"),
    ("answer_head.dense.{part}", "head.dense1.{part}"),
    ("answer_head.norm.{part}", "head.norm2.{part}"),
    ("answer_head.out.{part}", "head.dense2.{part}"),
)

LAYOUTS: Mapping[str, WeightMap] = {
    "official": dataclasses.replace(_OFFICIAL, rules=(*_OFFICIAL.rules, *_VQA)),
    "official_nlvr2": dataclasses.replace(_OFFICIAL, rules=(*_OFFICIAL.rules, *_NLVR2), config={"pictures": 2}),
}
"""Names in the released files, which are torchscale's behind "beit3."; the shared variant was never released. Heads of
two pictures have other names than those of one.
"""


class MaskedAndContrast(MaskedDataModeling):
    """Masked data modelling, and in the same pass the contrast of pictures and texts encoded alone, nothing hidden.

    Not the paper's objective (which tunes with contrast afterwards): it reaches a model that retrieves *and* fills in
    within one short run. Batches come from a collate with ``contrast``; further term: ``contrast``.
    """

    splittable: bool = False

    def counts(self, batch: Batch) -> dict[str, int]:
        """The masked terms', and the number of pairs contrasted."""
        return {**super().counts(batch), "contrast": len(batch["image_match"])}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """The four masked losses, and every local pair against all pairs of all ranks."""
        tokens = self.encode(batch)
        masked = self.predict(tokens, batch, counts)
        image = self.model.embed(tokens, "image").index_select(0, batch["image_match"])
        text = self.model.embed(tokens, "text").index_select(0, batch["text_match"])
        losses, hits = symmetric_cross_entropy(image, text, self.model.temperature(), across.gather, across.rank)
        loss = masked.loss + self.weights["contrast"] * losses.sum() / counts["contrast"]
        return StepOutput(loss, {**masked.sums, "contrast": losses.sum().detach(), "contrast/accuracy": hits.sum()})
