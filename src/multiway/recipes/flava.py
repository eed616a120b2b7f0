"""Recipes of FLAVA: pre-training of texts (``_text``), then of pictures, texts and pairs; questions (``_vqa``,
``_entailment``, ``_text_classification``).

``multiway train flava.NAME --data.root DIR --out RUN`` trains one. As published, the encoder of pictures begins as a
DINO's or a BEiT's (``--objective.vision``: any ViT, MAE or BEiT with positions for its patches, such as ``beit.base
--model.bias none --model.positions learned --model.layer_scale 0``), that of texts as what ``base_text`` left
(``--objective.language``), and visual tokens are DALL-E's (``--objective.tokenizer facebook/flava-image-codebook``);
without them they begin at random, and tokens are mean patches. Figures are the paper's (masked.md 9.3, 9.4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multiway import pretrained
from multiway.backbones.vit import whole_patches
from multiway.data.collate import MaskedCollate, Samples, Words
from multiway.engine.log import CONSOLE
from multiway.engine.train import Job
from multiway.errors import ConfigError
from multiway.recipes import pairs, pictures, questions
from multiway.recipes.questions import Answer
from multiway.run import Checkpoint, Data, Optim, Parallel, Run, Schedule
from multiway.systems.flava import FLAVA, PRESETS, MaskedContrastiveMatching
from multiway.types import Batch, Objective

PAIR_STEPS = 150_000
"""Of the joint stage: so often its pairs are drawn."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """FLAVA's five losses. Ratios: share of patches, of words of texts, and of words of pairs that are hidden, the last
    as whole words or piece by piece (``whole_words``); ``mismatch``: share of the pairs that get another's text;
    ``shares``: of the steps, each of which holds one kind of samples, {} = every step holds all; ``weights``: of the
    losses ``image text pair_image pair_text contrast match``, 1 where not named; ``tokenizer``: as of
    `multiway.recipes.pictures.Codes`; ``views``: views of each picture whose codes are stored before training, 0 =
    codes are computed while training; ``vision``, ``language``: folders of models that the encoders of pictures and of
    texts start from, None = random."""

    image_ratio: float = 75 / 196
    text_ratio: float = 0.15
    pair_ratio: float = 0.15
    whole_words: bool = True
    mismatch: float = 0.1
    shares: dict[str, float] = field(default_factory=lambda: {"image": 0.15, "pair": 0.7, "text": 0.15})
    weights: dict[str, float] = field(default_factory=dict)
    tokenizer: str | None = None
    views: int = 0
    vision: str | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.mismatch < 1:
            raise ConfigError(
                f"objective.mismatch is a share of the pairs, at least 0 and below 1, got {self.mismatch}"
            )


# --------------------------------------------------------------------------------------------- runs on two CPU cores


def quick() -> Run:
    """All five losses on the embedded scenes: two CPU cores, minutes.

    Command: ``multiway train flava.quick --out runs/flava``, or with ``--data.root DIR``, any folder of pictures with
    captions. Sizes and rates are ours. Result at the commit that added this recipe, one thread of a busy machine, 26
    minutes: recall@1 among 1,000 scenes by other writers 66.9 % (picture to text) and 66.7 % (text to picture), chance
    0.1 %; their digit by name, never trained on, 83.7 %, chance 10 %.
    """
    return Run(
        recipe="flava.quick",
        model=PRESETS["flava_tiny_patch16_64"],
        objective=Pretrain(views=1),
        data=Data(
            images=96, texts=96, pairs=96, vocab=512, text_tokens=64, window=64,
            image_scale=1.0, pair_scale=1.0, flip=False, jitter=0.0,
        ),
        optim=Optim(lr=2e-3, matrices="muon"),
        schedule=Schedule(steps=1000, warmup=100, final_lr=2e-5),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=250),
    )  # fmt: skip


def tiny() -> Run:
    """All five losses on a folder of your pictures with captions: two CPU cores, hours.

    Command: ``multiway train flava.tiny --data.root DIR --out runs/flava_tiny``. Sizes and rates are ours. Not yet run
    by us.
    """
    return dataclasses.replace(
        quick(),
        recipe="flava.tiny",
        model=dataclasses.replace(
            PRESETS["flava_tiny_patch16_64"], dim=192, depth=5, heads=3, hidden=768, image_px=96, text_depth=4,
            vocab=4096, codes=1024,
        ),
        objective=Pretrain(views=4),
        data=Data(
            images=128, texts=128, pairs=128, vocab=4096, text_tokens=40, window=40, image_scale=0.4, pair_scale=0.4,
            flip=False, jitter=0.2,
        ),
        schedule=Schedule(steps=3000, warmup=200, final_lr=2e-5),
    )  # fmt: skip


def quick_vqa() -> Run:
    """Questions about pictures, answered by a quick model: two CPU cores, minutes.

    Command: ``multiway train flava.quick_vqa --init runs/flava/final --out runs/vqa``, or with ``--data.root DIR``, see
    docs/questions.md. Not yet run by us.
    """
    return questions.quick("flava.quick_vqa", _asked(quick()).model, "vqa")


def quick_entailment() -> Run:
    """Whether a picture entails a text, contradicts it, or neither: two CPU cores, minutes.

    Command: ``multiway train flava.quick_entailment --init runs/flava/final --out runs/entailment``, or with
    ``--data.root DIR``. Not yet run by us.
    """
    return questions.quick("flava.quick_entailment", _asked(quick()).model, "entailment")


def quick_nlvr2() -> Run:
    """Whether a statement is true of two pictures, or of one: two CPU cores, minutes.

    Command: ``multiway train flava.quick_nlvr2 --init runs/flava/final --out runs/nlvr2``, or with ``--data.root DIR``.
    Not yet run by us.
    """
    return questions.quick("flava.quick_nlvr2", _asked(quick(), pictures=2).model, "nlvr2")


def quick_text_classification() -> Run:
    """Classes of texts or of pairs of texts, by the encoder of texts of a quick model: two CPU cores, minutes.

    Command: ``multiway train flava.quick_text_classification --init runs/flava/final --out runs/text``, or with
    ``--data.root DIR``. Not yet run by us.
    """
    name = "flava.quick_text_classification"
    return questions.quick(name, _asked(quick(), pictures=0).model, "text_classification")


def _asked(run: Run, **changes: Any) -> Run:
    """A run whose model carries nothing but what reads."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, masked=False, **changes))


# ------------------------------------------------------------------------------------------------------ as published


def base_text() -> Run:
    """The stage of texts: hidden words alone, with RoBERTa's figures: GPUs.

    Command: ``torchrun ... -m multiway train flava.base_text --data.root DIR --data.tokenizer vocab.txt --out
    runs/flava_text``. Not yet run by us. Source: masked.md 9.3; the warm-up is RoBERTa's share of its steps. The
    encoders of pictures and pairs stay as they begin.
    """
    return Run(
        recipe="flava.base_text",
        model=PRESETS["flava_base_patch16_224"],
        objective=Pretrain(shares={}),
        data=Data(texts=2048, vocab=30522, text_tokens=77, window=512, workers=8),
        optim=Optim(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, clip=0.0),
        schedule=Schedule(steps=125_000, warmup=6_000, final_lr=0.0, shape="linear"),
    )


def base() -> Run:
    """The joint stage, until pairs were drawn 150,000 times: 64 or more GPUs.

    Command: ``torchrun ... -m multiway train flava.base --data.root DIR --objective.vision runs/dino/final
    --objective.language runs/flava_text/final --objective.tokenizer facebook/flava-image-codebook --out runs/flava``.
    Not yet run by us. Source: masked.md 9.3; precision is bf16 where the paper has fp16.
    """
    objective = Pretrain()
    return Run(
        recipe="flava.base",
        model=PRESETS["flava_base_patch16_224"],
        objective=objective,
        data=Data(
            images=8192, texts=8192, pairs=8192, vocab=30522, text_tokens=77, window=512, image_scale=0.9,
            pair_scale=0.9, flip=False, jitter=0.0, workers=8,
        ),
        optim=Optim(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, clip=0.0),
        schedule=Schedule(steps=round(PAIR_STEPS / objective.shares["pair"]), warmup=10_000, final_lr=0.0),
    )  # fmt: skip


def _tuned(name: str, task: Any, px: int, lr: float, steps: int, **changes: Any) -> Run:
    """Tuning of the joint encoder as published: batch 256, 2,000 steps of warm-up."""
    run = questions.tuned(
        _asked(base()), f"flava.{name}", Answer(task=task, **changes), px=px, batch=256, questions=256, epochs=steps,
        warmup=2000, drop_path=0.0, lr=lr, weight_decay=0.01,
    )  # fmt: skip
    return dataclasses.replace(run, schedule=dataclasses.replace(run.schedule, final_lr=0.0))


def base_vqa() -> Run:
    """Visual question answering, tuned on VQAv2 as published: 480 px, 44,000 steps: GPUs.

    Command: ``multiway train flava.base_vqa --data.root DIR --init DIR/final --out runs/flava_vqa``. Not yet run by us.
    """
    return _tuned("base_vqa", "vqa", 480, 1e-4, 44_000)


def base_entailment() -> Run:
    """Visual entailment, tuned on SNLI-VE as published: 224 px, 24,000 steps: GPUs.

    Command: ``multiway train flava.base_entailment --data.root DIR --init DIR/final --out runs/flava_ve``. Not yet run
    by us.
    """
    return _tuned("base_entailment", "entailment", 224, 1e-5, 24_000)


def base_text_classification() -> Run:
    """Classes of texts, tuned with the released figures for QNLI: one GPU.

    Command: ``multiway train flava.base_text_classification --data.root DIR --objective.data_set qnli --init DIR/final
    --out runs/flava_qnli``. Not yet run by us. Source: masked.md 9.4.
    """
    run = _asked(base(), pictures=0)
    return dataclasses.replace(
        run,
        recipe="flava.base_text_classification",
        objective=Answer(task="text_classification"),
        data=Data(examples=32, vocab=run.model.vocab, text_tokens=512, workers=8),
        optim=Optim(lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, clip=0.0),
        schedule=Schedule(steps=33_112, warmup=1_986, final_lr=0.0, shape="linear"),
    )


# --------------------------------------------------------------------------------------------------- from run to job


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches; its tokenizer comes with `build`."""
    if isinstance(run.objective, Answer):
        return questions.assemble(run, FLAVA(questions.with_answers(run)), words)
    model, settings = FLAVA(run.model), run.objective
    collate = MaskedCollate(
        words=words, grid=whole_patches(run.model.image_px, run.model.patch), image_ratio=settings.image_ratio,
        text_ratio=settings.text_ratio, pair_ratio=settings.pair_ratio, branches=pictures.branches(model),
        contrast=True, match=True, leading=model.leading,
        whole_words=frozenset({"pair"} if settings.whole_words and run.data.pairs else ()),
    )  # fmt: skip
    return MaskedContrastiveMatching(model, pictures.no_tokenizer(run), settings.weights), collate


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs; the encoders of pictures and texts start from other models where they are named."""
    if isinstance(run.objective, Answer):
        return questions.build(run, out, assemble)
    settings: Pretrain = run.objective
    if run.init and (settings.vision or settings.language):
        raise ConfigError("--init names all weights: leave objective.vision and objective.language empty")
    if settings.language and not run.data.tokenizer:
        tokenizer = str(Path(settings.language) / pretrained.TOKENIZER)
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=tokenizer))
    job = pairs.build(run, out, assemble, pictures.tokenizer_of)
    model: Any = job.objective.model
    for folder, part_of in ((settings.vision, vision_of), (settings.language, language_of)):
        if folder:
            given = part_of(pretrained.load(folder).model, model)
            model.load_state_dict({**model.state_dict(), **given})
            CONSOLE.print(f"{len(given)} weights from {folder}")
    return job


OWN = ("encoder.vision.projection.", "encoder.vision.pooler.", "encoder.language.projection.", "heads.")
"""What other models need not have; everything else of an encoder must be there."""


def vision_of(source: Any, model: FLAVA) -> dict[str, Tensor]:
    """What another model gives the encoder of pictures, named as there: a FLAVA, or a ViT with positions for patches.

    Keys without a bias get one of zeros. Raises ConfigError for what does not fit.
    """
    if source.config.image_px != model.config.image_px:
        source.set_image_size(model.config.image_px)
    given = dict(source.state_dict())
    if isinstance(source, FLAVA):
        return _fitting(given, model, ("encoder.vision.", "heads.image."))
    for name in [name for name in given if name.endswith(".q_bias")]:
        q, v = given.pop(name), given.pop(name.replace(".q_bias", ".v_bias"))
        given[name.replace(".q_bias", ".bias")] = torch.cat([q, torch.zeros_like(q), v])
    renamed = {}
    for name, tensor in given.items():
        part, _, rest = name.partition(".")
        if part in ("norm", "fc_norm"):
            renamed[f"encoder.vision.norm.{rest}"] = tensor
        elif part == "encoder":
            renamed[f"encoder.vision.trunk.{rest}"] = tensor
    return _fitting(renamed, model, ("encoder.vision.",))


def language_of(source: Any, model: FLAVA) -> dict[str, Tensor]:
    """What a FLAVA gives the encoder of texts; raises ConfigError for another model, and for what does not fit."""
    if not isinstance(source, FLAVA):
        raise ConfigError(f"objective.language takes what flava.base_text left, found a {type(source).__name__}")
    return _fitting(source.state_dict(), model, ("encoder.language.", "heads.text."))


def _fitting(given: Mapping[str, Tensor], model: FLAVA, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """What of the given weights belongs to parts of the model."""
    own = {name: x for name, x in model.state_dict().items() if name.startswith(parts)}
    found = {name: given[name] for name, x in own.items() if name in given and given[name].shape == x.shape}
    lacking = [name for name in own if name not in found and not name.startswith((*OWN, "encoder.vision.trunk.hide_"))]
    foreign = [name for name in given if name.startswith(parts) and name not in own]
    if lacking or foreign:
        raise ConfigError(
            f"the model does not fit {parts[0]}*: it lacks {', '.join(lacking[:5]) or 'nothing'} and has also "
            f"{', '.join(foreign[:5]) or 'nothing'}; expected the shape of model.*, learned positions, no relative "
            "biases and no factors on branches"
        )
    return found
