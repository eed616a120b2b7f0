"""Recipes of VLMo: its three stages, and retrieval (``_retrieval``, ``_flickr``).

``multiway train vlmo.NAME --data.root DIR --out RUN`` trains one. Vision comes from a BEiT, trained here or converted,
whose folder the stage of texts (``_text``) takes as ``--objective.vision``. The stage of pairs (``base``, ``large``,
``base_plus``) takes what that left as ``--init``, and retrieval what pairs left. Figures are those of the released code
(masked.md 5.4). A batch larger than the memory is trained with ``--parallel.micro N`` at equal maths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multiway import pretrained
from multiway.backbones.vit import whole_patches
from multiway.data.collate import MaskedCollate, MatchCollate, Samples, Words
from multiway.engine.log import CONSOLE
from multiway.engine.train import Job
from multiway.errors import ConfigError
from multiway.objectives.contrastive import Negatives
from multiway.recipes import beit, pairs, pictures, questions
from multiway.recipes.pairs import Contrast
from multiway.recipes.pictures import Codes
from multiway.recipes.questions import Answer
from multiway.run import Checkpoint, Data, Optim, Parallel, Run, Schedule
from multiway.systems.beit import BEiT
from multiway.systems.vlmo import PRESETS, Config, MaskedContrastMatching, MaskedLanguageModeling, VLMo
from multiway.tasks.retrieval import ImageTextContrast
from multiway.types import Batch, Objective
from multiway.weights.rename import WeightMap


@dataclass(frozen=True, kw_only=True)
class HiddenWords:
    """The stage of texts. ``ratio``: share of the words that are hidden; ``whole_words``: whole ones, else piece by
    piece; ``vision``: folder of a BEiT that all starts from that pictures go through, "" = none."""

    ratio: float = 0.15
    whole_words: bool = True
    vision: str = ""


@dataclass(frozen=True, kw_only=True)
class Joint(HiddenWords):
    """The stage of pairs: hidden words, contrast, matching. ``negatives``: of the contrast, see
    `multiway.objectives.contrastive.Negatives`; ``augment``: whether pictures are changed by RandAugment, too."""

    negatives: Negatives = "gathered"
    augment: bool = False


# ------------------------------------------------------------------------------------------------ on two CPU cores


def quick() -> Run:
    """Hidden words, contrast and matching on the embedded scenes, from scratch or from ``quick_text``: two CPU cores,
    minutes.

    Command: ``multiway train vlmo.quick --out runs/vlmo``, or with ``--data.root DIR``, any folder of pictures with
    captions. Sizes and rates are ours. Result at commit f0ee113, one thread of a busy machine, half an hour: recall@1
    among 1,000 scenes by other writers 58.0 % (picture to text) and 53.7 % (text to picture), chance 0.1 %; their digit
    by name, never trained on, 73.7 %, chance 10 %; hidden words 66 % right, matching 76 %, of which always "no" is 67.
    """
    return Run(
        recipe="vlmo.quick",
        model=PRESETS["vlmo_tiny_patch16_64"],
        objective=Joint(),
        data=Data(pairs=64, vocab=512, text_tokens=32, window=32, pair_scale=1.0, flip=False, jitter=0.0),
        optim=Optim(lr=2e-3, matrices="muon"),
        schedule=Schedule(steps=800, warmup=100, final_lr=2e-5),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=200),
    )


def quick_vision() -> Run:
    """The stage of pictures for ``quick_text``: a BEiT of its shape on embedded scenes: two CPU cores, minutes.

    Command: ``multiway train vlmo.quick_vision --out runs/vlmo_vision``. Sizes and rates are ours. Not yet run by us.
    """
    run, shape = beit.quick(), PRESETS["vlmo_tiny_patch16_64"]
    names = ("dim", "depth", "heads", "hidden", "patch", "image_px", "layer_scale")
    model = dataclasses.replace(run.model, **{name: getattr(shape, name) for name in names})
    return dataclasses.replace(run, recipe="vlmo.quick_vision", model=model)


def quick_text() -> Run:
    """The stage of texts for ``quick``, all frozen that reads none: two CPU cores, minutes.

    Command: ``multiway train vlmo.quick_text --objective.vision runs/vlmo_vision/final --out runs/vlmo_text``. Sizes
    and rates are ours. Not yet run by us.
    """
    run = quick()
    return dataclasses.replace(
        run, recipe="vlmo.quick_text", objective=HiddenWords(),
        model=dataclasses.replace(run.model, match=False, contrast="none"),
        data=dataclasses.replace(run.data, pairs=0, texts=256),
        schedule=Schedule(steps=400, warmup=40, final_lr=2e-5),
    )  # fmt: skip


def quick_retrieval() -> Run:
    """Retrieval on embedded scenes or your pairs by a quick model: two CPU cores, minutes.

    Command: ``multiway train vlmo.quick_retrieval --init runs/vlmo/final --out runs/vlmo_retrieval``. Not yet run by
    us.
    """
    run = quick()
    return dataclasses.replace(
        run, recipe="vlmo.quick_retrieval", objective=Contrast(), model=_compares(run.model),
        data=dataclasses.replace(run.data, pairs=128), schedule=Schedule(steps=400, warmup=40, final_lr=2e-5),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- as published


def _stage(name: str, model: Config, objective: HiddenWords, data: Data, lr: float) -> Run:
    """A stage of the published training: 200,000 steps of 1,024, on the rate a straight line to 0."""
    return Run(
        recipe=f"vlmo.{name}",
        model=model,
        objective=objective,
        data=dataclasses.replace(data, vocab=model.vocab, jitter=0.0, workers=8),
        optim=Optim(lr=lr, eps=1e-8, weight_decay=0.01, clip=0.0),
        schedule=Schedule(steps=200_000, warmup=2500, final_lr=0.0, shape="linear"),
        parallel=Parallel(micro=2),
    )


def _text(size: str) -> Run:
    """The stage of texts: windows of 196 tokens, whole words hidden."""
    preset = PRESETS[f"vlmo_{size}_patch16_224"]
    model = dataclasses.replace(preset, text_tokens=196, match=False, contrast="none")
    return _stage(f"{size}_text", model, HiddenWords(), Data(texts=1024, window=196, text_tokens=40), 2e-4)


def _pairs(size: str, lr: float) -> Run:
    """The stage of pairs: 224 px, texts of 40 tokens."""
    objective = Joint(negatives="detached", augment=True)
    data = Data(pairs=1024, pair_scale=0.5, text_tokens=40, window=40)
    return _stage(size, PRESETS[f"vlmo_{size}_patch16_224"], objective, data, lr)


def base_text() -> Run:
    """The stage of texts at the released base size, from a BEiT-B/16: 8 or more GPUs.

    Command: ``torchrun --nproc-per-node 8 -m multiway train vlmo.base_text --data.root DIR --data.tokenizer vocab.txt
    --objective.vision BEIT --out runs/vlmo_text``. Not yet run by us.
    """
    return _text("base")


def base() -> Run:
    """The stage of pairs at the released base size: 64 GPUs.

    Command: ``torchrun ... -m multiway train vlmo.base --data.root DIR --init runs/vlmo_text/final --out runs/vlmo``.
    Not yet run by us.
    """
    return _pairs("base", 2e-4)


def base_plus_text() -> Run:
    """The stage of texts at the released base-plus size, whose vision is a BEiT of its own: GPUs.

    Command: ``torchrun ... -m multiway train vlmo.base_plus_text``, the rest as base_text. Not yet run by us.
    """
    return _text("base_plus")


def base_plus() -> Run:
    """The stage of pairs at the released base-plus size: GPUs.

    Command: ``torchrun ... -m multiway train vlmo.base_plus``, the rest as base. Not yet run by us.
    """
    return _pairs("base_plus", 1e-4)


def large_text() -> Run:
    """The stage of texts at the released large size, from a BEiT-L/16: GPUs.

    Command: ``torchrun ... -m multiway train vlmo.large_text``, the rest as base_text. Not yet run by us.
    """
    return _text("large")


def large() -> Run:
    """The stage of pairs at the released large size: 128 GPUs.

    Command: ``torchrun ... -m multiway train vlmo.large``, the rest as base. Not yet run by us.
    """
    run = _pairs("large", 5e-5)
    return dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, recompute=24))


def _compares(model: Config) -> Config:
    """A model with the vectors of retrieval alone."""
    return dataclasses.replace(model, masked=False, match=False, contrast="alone")


def _retrieval(size: str, name: str, lr: float, steps: int, drop_path: float) -> Run:
    """Fine-tuning for retrieval as released: 384 px, 3,072 pairs a step, a tenth of the steps to warm up."""
    run = _pairs(size, lr)
    model = dataclasses.replace(_compares(run.model), image_px=384, drop_path=drop_path)
    return dataclasses.replace(
        run, recipe=f"vlmo.{size}_{name}", model=model, objective=Contrast(negatives="detached", augment=True),
        data=dataclasses.replace(run.data, pairs=3072),
        schedule=dataclasses.replace(run.schedule, steps=steps, warmup=steps // 10),
        parallel=Parallel(micro=4),
    )  # fmt: skip


def base_retrieval() -> Run:
    """Retrieval on COCO by a base model: GPUs.

    Command: ``multiway train vlmo.base_retrieval --data.root DIR --init runs/vlmo/final --out runs/vlmo_coco``. Not yet
    run by us.
    """
    return _retrieval("base", "retrieval", 3e-5, 3000, 0.2)


def base_plus_retrieval() -> Run:
    """Retrieval on COCO by a base-plus model: GPUs.

    Command: ``multiway train vlmo.base_plus_retrieval``, the rest as base_retrieval. Not yet run by us.
    """
    return _retrieval("base_plus", "retrieval", 3e-5, 3000, 0.2)


def large_retrieval() -> Run:
    """Retrieval on COCO by a large model: GPUs.

    Command: ``multiway train vlmo.large_retrieval``, the rest as base_retrieval. Not yet run by us.
    """
    return _retrieval("large", "retrieval", 2e-5, 3000, 0.2)


def base_flickr() -> Run:
    """Retrieval on Flickr30k by a base model that was tuned on COCO: GPUs. Stochastic depth was .15 to .2.

    Command: ``multiway train vlmo.base_flickr --data.root DIR --init runs/vlmo_coco/final --out runs/vlmo_flickr``. Not
    yet run by us.
    """
    return _retrieval("base", "flickr", 3e-5, 1500, 0.15)


def base_plus_flickr() -> Run:
    """Retrieval on Flickr30k by a base-plus model: GPUs.

    Command: ``multiway train vlmo.base_plus_flickr --init runs/vlmo/final``, the rest as base_flickr. Not yet run by
    us.
    """
    return _retrieval("base_plus", "flickr", 3e-5, 1500, 0.15)


def large_flickr() -> Run:
    """Retrieval on Flickr30k by a large model that was tuned on COCO: GPUs.

    Command: ``multiway train vlmo.large_flickr``, the rest as base_flickr. Not yet run by us.
    """
    return _retrieval("large", "flickr", 2e-5, 1500, 0.15)


# ------------------------------------------------------------------------------------------------------- questions


def _asked(run: Run, **changes: Any) -> Run:
    """A run whose model carries nothing but what reads."""
    model = dataclasses.replace(run.model, masked=False, contrast="none", match=False, **changes)
    return dataclasses.replace(run, model=model)


def quick_vqa() -> Run:
    """Questions about pictures, answered by a quick model: two CPU cores, minutes.

    Command: ``multiway train vlmo.quick_vqa --init runs/vlmo/final --out runs/vlmo_vqa``, or with ``--data.root DIR``,
    see docs/questions.md. Not yet run by us.
    """
    return questions.quick("vlmo.quick_vqa", _asked(quick()).model, "vqa")


def quick_nlvr2() -> Run:
    """Whether a statement is true of two pictures, or of one: two CPU cores, minutes.

    Command: ``multiway train vlmo.quick_nlvr2 --init runs/vlmo/final --out runs/vlmo_nlvr2``, the rest as quick_vqa.
    Not yet run by us.
    """
    return questions.quick("vlmo.quick_nlvr2", _asked(quick(), pictures=2).model, "nlvr2")


def quick_entailment() -> Run:
    """Whether a picture entails a text, contradicts it, or neither: two CPU cores, minutes.

    Command: ``multiway train vlmo.quick_entailment --init runs/vlmo/final --out runs/vlmo_entailment``, the rest as
    quick_vqa. Not yet run by us.
    """
    return questions.quick("vlmo.quick_entailment", _asked(quick()).model, "entailment")


def quick_text_classification() -> Run:
    """Classes of texts or of pairs of texts: two CPU cores, minutes.

    Command: ``multiway train vlmo.quick_text_classification --init runs/vlmo/final --out runs/vlmo_classes``, the rest
    as quick_vqa. Not yet run by us.
    """
    model = _asked(quick(), pictures=0).model
    return questions.quick("vlmo.quick_text_classification", model, "text_classification")


def _tuned(run: Run, answer: Answer, px: int, count: int, lr: float, drop_path: float, **model: Any) -> Run:
    """Tuning as released (masked.md 5.4): batches of 128, ten epochs, one of warm-up, the head at 20 times the rate.

    The head's rate at NLVR2 is an assumption: the source names it for VQA.
    """
    tuned = questions.tuned(
        _asked(run, **model), f"{run.recipe}_{answer.task}", answer, px=px, batch=128, questions=count, epochs=10,
        warmup=1, drop_path=drop_path, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, head=20.0,
    )  # fmt: skip
    return dataclasses.replace(tuned, schedule=dataclasses.replace(tuned.schedule, final_lr=0.0, shape="linear"))


def _vqa(run: Run, lr: float) -> Run:
    return _tuned(run, Answer(task="vqa", augment=True), 480, questions.VQA, lr, 0.15)


def _nlvr2(run: Run, lr: float, drop_path: float) -> Run:
    return _tuned(run, Answer(task="nlvr2", augment=True), 384, questions.NLVR2, lr, drop_path, pictures=2)


def base_vqa() -> Run:
    """Visual question answering by a base model, tuned on VQAv2 as released: GPUs.

    Command: ``multiway train vlmo.base_vqa --data.root DIR --init runs/vlmo/final --out runs/vlmo_vqa``. Not yet run by
    us.
    """
    return _vqa(base(), 3e-5)


def base_plus_vqa() -> Run:
    """Visual question answering by a base-plus model: GPUs.

    Command: ``multiway train vlmo.base_plus_vqa``, the rest as base_vqa. Not yet run by us.
    """
    return _vqa(base_plus(), 3e-5)


def large_vqa() -> Run:
    """Visual question answering by a large model: GPUs.

    Command: ``multiway train vlmo.large_vqa``, the rest as base_vqa. Not yet run by us.
    """
    return _vqa(large(), 1.5e-5)


def base_nlvr2() -> Run:
    """Statements about two pictures, judged by a base model, tuned on NLVR2 as released: GPUs.

    Command: ``multiway train vlmo.base_nlvr2``, the rest as base_vqa. Not yet run by us.
    """
    return _nlvr2(base(), 5e-5, 0.1)


def base_plus_nlvr2() -> Run:
    """Statements about two pictures, judged by a base-plus model: GPUs.

    Command: ``multiway train vlmo.base_plus_nlvr2``, the rest as base_vqa. Not yet run by us.
    """
    return _nlvr2(base_plus(), 3e-5, 0.2)


def large_nlvr2() -> Run:
    """Statements about two pictures, judged by a large model: GPUs.

    Command: ``multiway train vlmo.large_nlvr2``, the rest as base_vqa. Not yet run by us.
    """
    return _nlvr2(large(), 3e-5, 0.15)


# ------------------------------------------------------------------------------------------------- from run to job


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    if isinstance(run.objective, Codes):
        return beit.assemble(run, words)
    if isinstance(run.objective, Answer):
        return questions.assemble(run, VLMo(questions.with_answers(run)), words)
    model, settings = VLMo(run.model), run.objective
    if isinstance(settings, Contrast):
        return ImageTextContrast(model, settings.negatives), pairs.collate(run, words, model)
    grid = whole_patches(run.model.image_px, run.model.patch)
    drops: dict[str, Any] = {"words": words, "grid": grid, "branches": pictures.branches(model)}
    if isinstance(settings, Joint):
        collate = MatchCollate(**drops, ratio=settings.ratio, whole_words=settings.whole_words)
        return MaskedContrastMatching(model, settings.negatives), collate
    whole = frozenset({"text"} if settings.whole_words else ())
    return MaskedLanguageModeling(model), MaskedCollate(**drops, text_ratio=settings.ratio, whole_words=whole)


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    if isinstance(run.objective, Codes):
        return beit.build(run, out)
    if isinstance(run.objective, Answer):
        return questions.build(run, out, assemble)
    folder = getattr(run.objective, "vision", "")
    if run.init and folder:
        raise ConfigError("--init names all weights: leave objective.vision empty")
    if run.data.pairs == 1:
        raise ConfigError("one pair has no other to be compared with: set data.pairs to 2 or more")
    job = pairs.build(run, out, assemble)
    if folder:
        model: Any = job.objective.model
        given = vision_of(pretrained.load(folder).model, model)
        model.load_state_dict({**model.state_dict(), **given})
        CONSOLE.print(f"{len(given)} weights from {folder}")
    return job


_ATTENTION, _FFN = "encoder.blocks.{layer}.attention.{part}.", "encoder.blocks.{layer}.ffn."
_BEIT = WeightMap(
    rules=(
        ("vision.{name*}", "encoder.{name*}"),
        ("encoder.blocks.{layer}.gamma_{which}", "encoder.blocks.{layer}.gamma_{which}"),
        (_ATTENTION + "experts.shared.{name*}", _ATTENTION + "{name*}"),
        (_FFN + "experts.image.{name*}", _FFN + "{name*}"),
        ("encoder.norm.experts.shared.{part}", "norm.{part}"),
        ("bias.table", "bias"),
    )
)
"""Where BEiT has what VLMo starts from (masked.md 5.6); ``bias``: its biases, those of all layers side by side."""


def vision_of(source: Any, model: VLMo) -> dict[str, Tensor]:
    """What a BEiT gives a VLMo, under its names: all that pictures go through, resized to its pictures.

    Biases of texts and between both begin at zero; the final norm stays where the BEiT has none of every token. Raises
    ConfigError for another kind of model, and when something is missing there or has another shape.
    """
    if not isinstance(source, BEiT):
        raise ConfigError(f"objective.vision holds a {type(source).__name__}: VLMo's vision is a BEiT")
    source.set_image_size(model.config.image_px)
    own, beit = model.state_dict(), dict(source.state_dict())
    tables = [name for name in beit if name.endswith("bias.table")]  # of every layer, in order, or the one of all
    if tables and model.bias is not None:
        rows = torch.cat([beit[name] for name in tables] * (model.layers if len(tables) == 1 else 1), dim=1)
        beit = {name: tensor for name, tensor in beit.items() if name not in tables}
        beit["bias"] = F.pad(rows, (0, 0, 0, len(own["bias.table"]) - len(rows)))
    names = {key: found[0] for key in own if (found := _BEIT.names(key))}
    given = {key: beit[name] for key, name in names.items() if name in beit}
    wrong = [key for key in names if key not in given and not key.startswith("encoder.norm.")]
    wrong += [key for key, tensor in given.items() if tensor.shape != own[key].shape]
    wrong += [name for name in beit if name.startswith("encoder.blocks.") and name not in names.values()]
    if wrong:
        raise ConfigError(f"this BEiT has another shape than this run's model: {', '.join(wrong[:5])}; set model.*")
    return given
