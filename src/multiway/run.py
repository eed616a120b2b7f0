"""What a run is: plain frozen dataclasses, written by recipes, overridden on the command line, stored with the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a step is made of.

    ``root``: a folder of your data, or an index made by ``multiway data index``; None = the embedded scenes.
    ``split``: which split of the root; None = ``train`` where it has several. ``more``: further roots, each mixed in
    with its weight (relative to 1 for ``root``) in every kind it has. ``images``, ``texts``, ``pairs``: items of
    each kind in one optimiser step over all processes, 0 = none; where there are no pictures or texts alone, those
    of pairs are used; ``examples``: the same, of tasks whose records have answers. ``image_scale``, ``pair_scale``:
    smallest share of a picture's area that a crop keeps (largest: all). ``flip``: mirror half of the pictures.
    ``jitter``: strength of brightness, contrast and saturation changes. ``interpolation``: of crops while training.
    ``text_tokens``: longest text of a pair, with its two specials; ``window``: the same of texts alone. ``vocab``: size
    of the tokenizer trained on your texts when ``tokenizer`` names no file. ``workers``: loader processes, 0 = inline.
    ``decoder``: of plain JPEGs; simplejpeg (extra ``fast``) is the faster one. ``max_bad``: share of records that may
    be bad before the run stops (exit 65).
    """

    root: str | None = None
    split: str | None = None
    more: dict[str, float] = field(default_factory=dict)
    images: int = 0
    texts: int = 0
    pairs: int = 0
    examples: int = 0
    image_scale: float = 0.2
    pair_scale: float = 0.5
    flip: bool = True
    jitter: float = 0.4
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    text_tokens: int = 64
    window: int = 512
    tokenizer: str | None = None
    vocab: int = 64000
    workers: int = 0
    decoder: Literal["pillow", "simplejpeg"] = "pillow"
    max_bad: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW; ``matrices``: what updates the matrices of blocks, at the same rate. ``layer_decay``: factor on the rate
    per layer from the top; ``head``: factor on that of a head of answers; ``clip``: greatest gradient norm, 0 = none;
    ``ema``: decay of the averaged weights, 0 = none kept."""

    lr: float = 1e-3
    matrices: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    head: float = 1.0
    clip: float = 3.0
    ema: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up over ``warmup`` steps from ``first_lr``, then to ``final_lr`` at ``steps``.

    ``shape``: ``cosine``: half a cosine after the warm-up; ``late cosine``: half a cosine of the whole run, on which
    the warm-up ends with a small jump; ``step``: the peak until seven eighths of the run, then a tenth of it. These
    two are SimMIM's (vision.md 2.2, 7.3). ``linear``: a straight line after the warm-up (VLMo, masked.md 5.4).
    """

    steps: int = 1_000_000
    warmup: int = 10_000
    first_lr: float = 0.0
    final_lr: float = 1e-5
    shape: Literal["cosine", "late cosine", "step", "linear"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a step is computed; nothing here changes what is computed.

    ``micro``: micro-batches per process and step. ``shard``: parameters split over all processes (FSDP2) or whole on
    each. ``precision``: of the matrix products. ``recompute``: how many blocks are computed again in the backward
    pass instead of storing their activations. ``compile``: torch.compile each block. ``threads``: CPU threads per
    process, None = torch's choice.
    """

    micro: int = 1
    shard: Literal["full", "replicate"] = "full"
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: int = 0
    compile: bool = False
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """``every`` so many steps a checkpoint is written; the newest ``keep`` stay."""

    every: int = 1000
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class Log:
    """``evaluate``: evaluate every so many steps, 0 = at the end only; ``tensorboard``: also write event files, where
    tensorboard is installed."""

    evaluate: int = 0
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. ``recipe``: the name it came from; ``model`` and ``objective``: the system's own dataclasses;
    ``init``: folder of weights to start from, None = random; ``image_codes``: see the recipe."""

    recipe: str
    model: Any
    objective: Any
    data: Data = Data()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    init: str | None = None
    seed: int = 0
