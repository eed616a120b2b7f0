"""Every system at toy size, and batches for it: what the contract tests run over."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import log
from typing import Any

import numpy as np
import torch
from torch import nn

from multiway.data.collate import DualCollate, MaskedCollate, MatchCollate, Sample, Words
from multiway.data.examples import ExampleCollate, Question
from multiway.data.hide import hide_blocks, hide_cells, hide_patches
from multiway.data.pictures import LabelCollate, PictureCollate
from multiway.systems import (
    beit,
    beit2,
    clip,
    feature_distillation,
    flava,
    mae,
    siglip,
    simmim,
    swin,
    swin_v2,
    vit,
    vlmo,
    vq_kd,
)
from multiway.systems.beit3 import BEiT3, Config, MaskedAndContrast, MaskedDataModeling
from multiway.tasks.answering import KEYS, Answering, Loss
from multiway.tasks.image_classification import ImageClassification
from multiway.tasks.retrieval import ImageTextContrast, ImageTextSigmoid
from multiway.types import Batch, Objective

IMAGE_PX, PATCH, GRID, CODES, CLASSES = 32, 8, (4, 4), 19, 7
WORDS = Words(bos=0, eos=2, mask_id=3, first=4, stop=40, longest=14, window=14)
SIZES = {"dim": 32, "depth": 3, "heads": 4, "hidden": 64, "patch": PATCH, "image_px": IMAGE_PX, "codes": CODES}
DECOUPLED = Config(**SIZES, vocab=40, text_positions=16)
SHARED = dataclasses.replace(DECOUPLED, attention="shared", joint_layers=2)
COUNTS = {"image": 3, "pair": 4, "text": 5, "example": 4}


@dataclass(frozen=True)
class Toy:
    """An objective and its batches.

    ``untrained``: parameters it does not train; ``guess``: loss by term of a model that knows nothing; ``drops``:
    whether blocks may be dropped; ``published``: whether files of other programs hold such a model; ``bf16``: whether
    its gradients survive rounding; ``pictures``: of an example.
    """

    name: str
    build: Callable[[], Objective]
    collate: MaskedCollate | DualCollate | PictureCollate | LabelCollate
    kinds: tuple[str, ...]
    untrained: frozenset[str] = frozenset()
    guess: Mapping[str, float] = field(default_factory=dict)
    drops: bool = True
    published: bool = True
    bf16: bool = True
    pictures: int = 0

    def samples(self, seed: int = 0, counts: dict[str, int] | None = None) -> dict[str, list[Sample]]:
        """New samples by kind; ``counts``: how many of each, None = 3 images, 4 pairs, 5 texts."""
        counts = counts or {kind: COUNTS[kind] for kind in self.kinds}
        if "example" in counts:
            return {"example": [question(self.pictures, sample(seed, "pair", i)) for i in range(counts["example"])]}
        return {kind: [sample(seed, kind, i) for i in range(n)] for kind, n in counts.items()}

    def batch(self, seed: int = 0, counts: dict[str, int] | None = None) -> Batch:
        """A batch of new samples."""
        return self.collate(self.samples(seed, counts))


def sample(seed: int, kind: str, record: int) -> Sample:
    """A random record; texts have 0 to 11 words, the first of each batch none and the second eleven."""
    rng = np.random.default_rng([seed, ord(kind[0]), record])
    image = torch.from_numpy(rng.integers(0, 256, (3, IMAGE_PX, IMAGE_PX), dtype=np.uint8))
    lengths = {0: 0, 1: 11}
    text = rng.integers(WORDS.first, WORDS.stop, lengths.get(record, int(rng.integers(1, 9))))
    code = torch.from_numpy(rng.integers(0, CODES, GRID[0] * GRID[1]))
    return Sample(
        image=None if kind == "text" else image,
        text=None if kind == "image" else text,
        code=None if kind == "text" else code,
        label=int(rng.integers(CLASSES)),
        record=record,
        rng=rng,
    )


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded normals in every parameter, large enough that every part matters; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.2 * noise if around_one else 0.15 * noise)
    return model


def unread(model: nn.Module, *heads: str) -> frozenset[str]:
    """Parameters that no text alone reaches."""
    return frozenset(f"model.{n}" for n, _ in model.named_parameters() if n.startswith(heads) or ".experts.image" in n)


MASKED = MaskedCollate(words=WORDS, grid=GRID)
DUAL = DualCollate(words=WORDS, grid=GRID)
CAUSAL = dataclasses.replace(DUAL, causal=True)
BOTH = MaskedCollate(words=WORDS, grid=GRID, contrast=True, joint=0.5)
ALL = ("image", "pair", "text")
CONTRAST = dataclasses.replace(DECOUPLED, masked=False, contrast=True)
MASKED_CONTRAST = dataclasses.replace(DECOUPLED, contrast=True)
MASKED_GUESS = {"image": log(CODES), "pair_image": log(CODES), "text": log(40), "pair_text": log(40)}
TEXTS = {"text_dim": 24, "text_depth": 2, "text_heads": 3, "text_hidden": 48, "text_tokens": 14, "vocab": 40}
TOWER = {"dim": 32, "depth": 3, "heads": 4, "hidden": 64, "patch": PATCH, "image_px": IMAGE_PX}
CLIP_VIT = clip.Config(**TOWER, **TEXTS, out=16)
CLIP_RESNET = clip.Config(dim=8, stages=(1, 2, 1, 1), patch=32, image_px=IMAGE_PX, **TEXTS, out=16)
STARTS_AT_ZERO = frozenset(
    f"model.encoder.vision.stages.{i}.{j}.conv{k}.{part}"
    for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))
    for k, part in itertools.product((1, 2, 3), ("0.weight", "1.weight", "1.bias"))
    if (k, part) not in ((3, "1.weight"), (3, "1.bias"))
)
"""What lies behind the last norms of bottlenecks, whose factors are 0 at first."""
SIGLIP = siglip.Config(**TOWER, text_tokens=14, vocab=40)
VLMO = vlmo.Config(**TOWER, joint_layers=1, text_tokens=14, vocab=40)
FLAVA = flava.Config(**TOWER, text_depth=2, joint_depth=2, vocab=40, text_tokens=14, out=16, codes=CODES)
MASKED_MATCH = MaskedCollate(words=WORDS, grid=GRID, contrast=True, leading=2, match=True)
POOLERS = tuple(f"encoder.{tower}.pooler." for tower in ("vision", "language", "joint"))
"""Of answers, which the published files carry too."""
PAIRED = (
    Toy("masked-decoupled", lambda: MaskedDataModeling(BEiT3(DECOUPLED), None), MASKED, ALL, guess=MASKED_GUESS),
    Toy(
        "masked-shared", lambda: MaskedDataModeling(BEiT3(SHARED), None), MASKED, ALL, guess=MASKED_GUESS,
        published=False,
    ),
    Toy(
        "masked-and-contrast", lambda: MaskedAndContrast(BEiT3(MASKED_CONTRAST), None), BOTH, ALL, guess=MASKED_GUESS
    ),
    # Contrast hides nothing; the released _itc files carry the mask token too.
    Toy(
        "contrast", lambda: ImageTextContrast(BEiT3(CONTRAST)), DUAL, ("pair",), frozenset({"model.vision.mask_token"})
    ),
    Toy("clip", lambda: ImageTextContrast(clip.CLIP(CLIP_VIT)), CAUSAL, ("pair",)),
    Toy(
        "clip-resnet", lambda: ImageTextContrast(clip.CLIP(CLIP_RESNET)), CAUSAL, ("pair",), STARTS_AT_ZERO,
        drops=False, bf16=False,  # its batch norms see four pictures of one cell
    ),
    Toy("siglip", lambda: ImageTextSigmoid(siglip.SigLIP(SIGLIP)), DUAL, ("pair",)),
    Toy(
        "flava", lambda: flava.MaskedContrastiveMatching(flava.FLAVA(FLAVA), None), MASKED_MATCH, ALL,
        unread(flava.FLAVA(FLAVA), *POOLERS), guess=MASKED_GUESS | {"match": log(2)},
    ),
    # Relative positions stand in for those of words, which the released files carry too.
    Toy(
        "vlmo", lambda: vlmo.MaskedContrastMatching(vlmo.VLMo(VLMO)), MatchCollate(words=WORDS, grid=GRID), ("pair",),
        frozenset({"model.language.positions"}), guess={"words": log(40), "match": log(2)},
    ),
    Toy(
        "vlmo-texts", lambda: vlmo.MaskedLanguageModeling(vlmo.VLMo(VLMO)), MASKED, ("text",),
        frozenset(
            f"model.{name}" for name, _ in vlmo.VLMo(VLMO).named_parameters()
            if not vlmo.reads_text(name) or name == "language.positions"
        ),
        guess={"words": log(40)},
    ),
)  # fmt: skip
"""Toys of pictures and texts."""

SHAPE = {"dim": 32, "depth": 3, "heads": 4, "hidden": 64, "patch": PATCH, "image_px": IMAGE_PX}
CLASSIFY = LabelCollate()
CLASS_GUESS = {"label": log(CLASSES)}


def classifier(name: str, build: Callable[[], nn.Module], **more: Any) -> Toy:
    """A toy that is tuned to classes."""
    return Toy(f"{name}-classifier", lambda: ImageClassification(build()), CLASSIFY, ("image",), **more)


def cells(grid: tuple[int, int], cell: int = 2) -> PictureCollate:
    """Batches with square cells of patches hidden."""
    return PictureCollate(hide=partial(hide_cells, grid, cell, 0.6))


def simmim_toy(name: str, config: simmim.Config, cell: int = 2, **more: Any) -> Toy:
    """SimMIM with one of its encoders."""
    build = lambda: simmim.MaskedImageModeling(simmim.SimMIM(config))  # noqa: E731
    return Toy(f"simmim-{name}", build, cells(config.grid, cell), ("image",), **more)


SIMMIM = {
    "vit": simmim.Config(dim=32, depths=(3,), heads=4, patch=8, image_px=IMAGE_PX),
    "swin": simmim.Config(encoder="swin", dim=16, depths=(2, 2), heads=2, patch=4, window=4, image_px=IMAGE_PX),
    "resnet": simmim.Config(encoder="resnet", dim=8, depths=(1, 2, 1), patch=4, image_px=IMAGE_PX),
}
SIMMIM["swin_v2"] = dataclasses.replace(SIMMIM["swin"], encoder="swin_v2", target_window=9)
# Norms behind its branches start at zero, and let no gradient through until they have moved.
BEHIND_ZERO = frozenset(
    f"model.{name}"
    for name, _ in simmim.SimMIM(SIMMIM["swin_v2"]).named_parameters()
    if ".blocks." in name and ".branch." in name
)


def student(config: feature_distillation.Config, teacher: nn.Module) -> Objective:
    """Feature distillation from a random teacher."""
    return feature_distillation.FeatureDistillation(feature_distillation.Student(config), randomize(teacher, seed=1))


def hiding(ratio: float, keep: bool = False) -> PictureCollate:
    """Batches with single patches hidden."""
    return PictureCollate(hide=partial(hide_patches, GRID, ratio), keep=keep)


def blocks() -> PictureCollate:
    """Batches with blocks of patches hidden."""
    return PictureCollate(hide=partial(hide_blocks, GRID, 6, 2))


SWIN = {"dim": 16, "depths": (2, 2), "heads": 2, "patch": 4, "window": 4, "image_px": IMAGE_PX}

PICTURED = (
    classifier("vit", lambda: vit.ViT(vit.Config(**SHAPE, classes=CLASSES)), guess=CLASS_GUESS),
    classifier("vit-mean", lambda: vit.ViT(vit.Config(**SHAPE, classes=CLASSES, pool="mean")), guess=CLASS_GUESS),
    Toy(
        "mae",
        lambda: mae.MaskedAutoencoding(
            mae.MAE(mae.Config(**SHAPE, decoder_dim=16, decoder_depth=2, decoder_heads=2))
        ),
        hiding(0.75, keep=True), ("image",), drops=False,
    ),
    simmim_toy("vit", SIMMIM["vit"]),
    simmim_toy("swin", SIMMIM["swin"]),
    simmim_toy("swin_v2", SIMMIM["swin_v2"], cell=1, untrained=BEHIND_ZERO),
    # Its gradients change by a third when nothing but its weights is rounded to bf16.
    simmim_toy("resnet", SIMMIM["resnet"], drops=False, bf16=False, published=False),
    Toy(
        "feature-distillation",
        lambda: student(
            feature_distillation.Config(dim=32, depths=(3,), heads=4, patch=8, image_px=IMAGE_PX, teacher_dim=24),
            vit.ViT(vit.Config(dim=24, depth=2, heads=2, hidden=48, patch=8, image_px=IMAGE_PX)),
        ),
        PictureCollate(), ("image",),
    ),
    Toy(
        "feature-distillation-swin_v2",
        lambda: student(
            feature_distillation.Config(
                encoder="swin_v2", dim=16, depths=(2, 2), heads=2, patch=4, window=4, image_px=IMAGE_PX, teacher_dim=32
            ),
            simmim.SimMIM(dataclasses.replace(SIMMIM["swin"], depths=(1, 1))),
        ),
        PictureCollate(), ("image",),
    ),
    classifier("swin", lambda: swin.Swin(swin.Config(**SWIN, classes=CLASSES)), guess=CLASS_GUESS),
    classifier(
        "swin_v2", lambda: swin_v2.SwinV2(swin_v2.Config(**SWIN, classes=CLASSES)), guess=CLASS_GUESS,
        untrained=frozenset(
            f"model.{name}"
            for name, _ in swin_v2.SwinV2(swin_v2.Config(**SWIN)).named_parameters()
            if ".blocks." in name and ".branch." in name
        ),
    ),
    Toy(
        "beit", lambda: beit.MaskedImageModeling(beit.BEiT(beit.Config(**SHAPE, bias="shared", codes=CODES)), None),
        blocks(), ("image",), guess={"image": log(CODES)},
    ),
    classifier("beit", lambda: beit.BEiT(beit.Config(**SHAPE, classes=CLASSES)), guess=CLASS_GUESS),
    Toy(
        "beit2", lambda: beit2.PatchAggregation(beit2.BEiT2(beit2.Config(**SHAPE, codes=CODES, early_layer=2)), None),
        blocks(), ("image",),
    ),
    Toy(
        "vq_kd",
        lambda: vq_kd.VectorQuantizedDistillation(
            vq_kd.VQKD(vq_kd.Config(**SHAPE, codes=CODES, code_dim=8, decoder_depth=1, teacher_dim=24)),
            randomize(vit.ViT(vit.Config(dim=24, depth=2, heads=2, hidden=48, patch=8, image_px=IMAGE_PX)), seed=1),
        ),
        PictureCollate(), ("image",), drops=False,
    ),
)  # fmt: skip
"""Toys of pictures alone."""

ANSWERS = 5


def question(pictures: int, sampled: Sample) -> Question:
    """A random record as a question about so many pictures."""
    images = tuple(torch.roll(x, n, 1) for n in range(pictures) if (x := sampled.image) is not None)
    assert sampled.text is not None, "a question has a text"
    return Question(images=images, text=sampled.text, answers=(), record=sampled.record, rng=sampled.rng)


def asking(name: str, build: Callable[[], nn.Module], pictures: int, loss: Loss = "classes", **more: Any) -> Toy:
    """A toy that is tuned to answer questions about so many pictures."""

    def target(asked: Question) -> dict[str, Any]:
        own = np.random.default_rng(asked.record)
        return {KEYS[loss]: own.random(ANSWERS) if loss == "scores" else int(own.integers(ANSWERS))}

    collate = ExampleCollate(
        words=WORDS, grid=GRID if pictures else None, pictures=pictures, causal=name == "clip",
        leading=2 if name == "flava" else 1, targets=target,
    )  # fmt: skip
    task = "vqa" if pictures else "text_classification"
    return Toy(
        f"{name}-answers-{pictures}", lambda: Answering(build(), task, pictures, loss), collate, ("example",),
        pictures=pictures, **more,
    )  # fmt: skip


def beit3_answers(pictures: int) -> nn.Module:
    """A BEiT-3 that reads so many pictures with a text."""
    return BEiT3(dataclasses.replace(DECOUPLED, masked=False, answers=ANSWERS, pictures=pictures))


def flava_answers(pictures: int) -> Toy:
    """FLAVA that reads so many pictures with a text; its joint encoder comes before the others' final norms."""

    def build() -> nn.Module:
        return flava.FLAVA(dataclasses.replace(FLAVA, masked=False, answers=ANSWERS, pictures=pictures))

    others = ("encoder.vision.projection.", "encoder.language.projection.", "logit_")
    if pictures:
        others += ("encoder.vision.trunk.hide_token", "encoder.vision.norm.", "encoder.language.norm.", *POOLERS)
    else:
        others += ("encoder.vision.", "encoder.joint.")
    loss: Loss = "scores" if pictures == 1 else "classes"
    return asking("flava", build, pictures, loss, published=False, untrained=unread(build(), *others))


ASKED = (
    # Of the last block's texts nothing is read but keys and values.
    asking(
        "beit3", lambda: beit3_answers(1), 1, "scores",
        untrained=frozenset(
            f"model.{name}" for name, _ in beit3_answers(1).named_parameters()
            if name == "vision.mask_token"
            or (name.startswith(("encoder.blocks.2.attention.out.", "encoder.blocks.2.ffn.")) and ".text." in name)
        ),
    ),
    # Its head begins so small that rounding does not show.
    asking(
        "beit3", lambda: beit3_answers(2), 2, untrained=frozenset({"model.vision.mask_token"}), bf16=False,
        guess={"answer": log(ANSWERS)},
    ),
    asking("beit3", lambda: beit3_answers(0), 0, untrained=unread(beit3_answers(0), "vision.")),
    *map(flava_answers, (0, 1, 2)),
    asking(
        "clip", lambda: clip.CLIP(dataclasses.replace(CLIP_VIT, answers=ANSWERS)), 0, published=False,
        untrained=unread(clip.CLIP(CLIP_VIT), "encoder.vision.", "encoder.language.projection.", "logit_"),
    ),
    asking(
        "siglip", lambda: siglip.SigLIP(dataclasses.replace(SIGLIP, answers=ANSWERS)), 0, published=False,
        untrained=unread(siglip.SigLIP(SIGLIP), "encoder.vision.", "encoder.language.projection.", "logit_"),
    ),
)  # fmt: skip
"""Toys that answer."""

TOYS = PAIRED + PICTURED + ASKED
