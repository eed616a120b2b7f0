"""One optimiser step of a run, rehearsed on tensors without content: every operation it makes, every byte it holds.

What is rehearsed is what trains: the real objective, collate, recomputation and optimisers, on torch's fake tensors,
with samples made up from the run's settings. So nothing here knows a layer, and it needs neither data nor memory.
"""

from __future__ import annotations

import itertools
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from multiway.data.collate import Sample, Samples, Words
from multiway.data.examples import Question
from multiway.engine.optim import Average, build_optimizers, keep_gradients, total_norm, update
from multiway.engine.parallel import keeps_gradients, recompute
from multiway.nn import attention, block, linear
from multiway.nn.pixels import sides
from multiway.run import Run
from multiway.types import Across, Batch, Objective, move

FREE = ("_unsafe_view", "_reshape_alias", "detach", "empty", "empty_like", "empty_strided", "new_empty")
"""Operations that read and write nothing, besides views."""

GATHERS = ("embedding", "index_select", "index", "gather")
"""Operations that read as much of their first tensor as they write."""


class Like(NamedTuple):
    """What a tensor looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of its elements, those that a stride of 0 repeats counted once."""
        return self.dtype.itemsize * math.prod(n for n, step in zip(self.shape, self.stride, strict=True) if step)


@dataclass(frozen=True)
class Operation:
    """A call of the tensor library: ``leaves`` and ``spec`` are its arguments, flattened, tensors as `Like`.

    ``kind``: ``matmul``, ``attention`` or ``other``; ``flops``: of its matrix products, 2 per multiply and add;
    ``moved``: bytes read and written.
    """

    function: Any
    leaves: tuple[Any, ...]
    spec: Any = field(compare=False)
    kind: str = field(compare=False)
    flops: int = field(compare=False)
    moved: int = field(compare=False)

    @property
    def precision(self) -> str:
        """``bf16`` or ``fp32``, after its first tensor."""
        half = next((x.dtype for x in self.leaves if isinstance(x, Like)), None) in (torch.bfloat16, torch.float16)
        return "bf16" if half else "fp32"


@dataclass(frozen=True)
class Trace:
    """What was done and held: ``calls``, how often which operation; ``events``, (number of a tensor's storage, bytes
    made > 0 or freed < 0) in order; ``gradients``, number of each storage that holds a gradient at the end -> whether
    it is a block's.
    """

    calls: Counter[Operation]
    events: list[tuple[int, int]]
    gradients: Mapping[int, bool] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Of all its operations."""
        return sum(operation.flops * times for operation, times in self.calls.items())

    @property
    def gradient(self) -> int:
        """Bytes of all gradients."""
        return sum(change for number, change in self.events if number in self.gradients and change > 0)

    def peak(self, *, blocks: float = 1.0, others: float = 1.0) -> float:
        """Most bytes that were there at once, of what was made.

        ``blocks``, ``others``: share of the gradients of blocks, and of the others, that stays once they are made;
        the rest is there for that moment only (it is added to other gradients, or sent to other processes).
        """
        now = most = 0.0
        for number, change in self.events:
            most = max(most, now + change)
            stays = 1.0 if number not in self.gradients else blocks if self.gradients[number] else others
            now += stays * change
        return most


def make_samples(run: Run, items: Mapping[str, int], tokens: Mapping[str, int]) -> dict[str, list[Any]]:
    """Made-up records by kind: pictures are stand-ins of one pixel, texts have ``tokens`` tokens on average, from half
    to one and a half times as many; of kinds not in ``tokens`` they are as long as the run allows.
    """
    longest = {"image": 2, "pair": run.data.text_tokens, "text": run.data.window, "example": run.data.text_tokens}
    patches = math.prod(side // run.model.patch for side in sides(run.model.image_px))
    stored = getattr(run.objective, "views", 0) > 0
    made = {}
    for kind, count in items.items():
        mean = tokens.get(kind)
        lengths = np.linspace(mean / 2, 1.5 * mean, count) if mean else np.full(count, longest[kind])
        words = lengths.round().clip(2, longest[kind]).astype(int) - 2
        if kind == "example":
            images = (torch.zeros(3, 1, 1, dtype=torch.uint8),) * getattr(run.model, "pictures", 0)
            made[kind] = [
                Question(
                    images=images, text=np.full(n, 3), answers=(), record=i, rng=np.random.default_rng(i)
                )
                for i, n in enumerate(words)
            ]  # fmt: skip
            continue
        made[kind] = [
            Sample(
                image=None if kind == "text" else torch.zeros(3, 1, 1, dtype=torch.uint8),
                text=None if kind == "image" else np.full(n, 3),
                code=torch.zeros(patches, dtype=torch.int64) if stored and kind != "text" else None,
                label=0,
                rng=np.random.default_rng(i),
            )
            for i, n in enumerate(words)
        ]
    return made


Assemble = Callable[[Run, Words], tuple[Objective, Callable[[Samples], Batch]]]
"""A recipe module's ``assemble``."""


def made_up_words(run: Run) -> Words:
    """A vocabulary of as many words as the model reads."""
    return Words(
        bos=0,
        eos=1,
        mask_id=2,
        first=3,
        stop=getattr(run.model, "vocab", 3),
        longest=run.data.text_tokens,
        window=run.data.window,
        begins=np.ones(getattr(run.model, "vocab", 3), dtype=bool),
    )


class Stage:
    """A run's objective and optimisers, made of fake tensors, to rehearse on.

    ``assemble``: the recipe's; ``tokens``: as in `make_samples`; ``devices``: of how many processes this is one;
    ``gpu``: as a GPU would run it, imitated where torch has no CUDA. ``joined``: micro-batches that the objective takes
    at once, which are rehearsed together.
    """

    def __init__(
        self,
        run: Run,
        assemble: Assemble,
        tokens: Mapping[str, int],
        *,
        devices: int = 1,
        gpu: bool = False,
    ) -> None:
        self.run, self.tokens = run, tokens
        self.across = Across(gather=lambda x: torch.cat([x] * devices), world=devices)
        self.imitated = gpu and not torch.cuda.is_available()
        self.device = torch.device("cuda" if gpu and not self.imitated else "cpu")
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake, self.device:
            self.objective, self.collate = assemble(run, made_up_words(run))
            self.optimizers = build_optimizers(self.objective, run.optim, run.parallel.precision)
            self.average = Average(self.objective, run.optim.ema)
        if devices == 1 and keeps_gradients(torch.device("cuda" if gpu else "cpu"), run.parallel):
            keep_gradients(self.objective)
        self.objective.train()
        self.joined = run.parallel.micro if self.objective.joins and not self.objective.splittable else 1
        self.blocks: Any = self.objective.model.encoder.blocks

    def micro(self, items: Mapping[str, int], recomputed: int) -> Trace:
        """Forward and backward of so many samples by kind, in each of those ``joined``, the first blocks
        ``recomputed``; gradients stay.
        """
        self.objective.zero_grad(set_to_none=True)
        batch, counts = self.batch(items)
        parts = [batch, *(self.batch(items)[0] for _ in range(self.joined - 1))]
        for again in self.blocks[:recomputed]:
            recompute(again)
        with self.recording() as recorder:
            for x in itertools.chain.from_iterable(part.values() for part in parts):
                if isinstance(x, Tensor):
                    recorder.number(x)
            self.forward(parts if self.joined > 1 else batch, counts).backward()
        for again in self.blocks[:recomputed]:
            del again.forward
        in_blocks = {p for own in self.blocks for p in own.parameters()}
        made = [(p.grad, p in in_blocks) for p in self.objective.parameters()]
        return recorder.trace({recorder.number(grad): inside for grad, inside in made if grad is not None})

    def forward_flops(self, items: Mapping[str, int]) -> int:
        """FLOPs of the objective's forward over so many samples by kind."""
        batch, counts = self.batch(items)
        with self.recording() as recorder, torch.no_grad():
            self.forward(batch, counts)
        return recorder.trace().flops

    def update(self) -> Trace:
        """What follows the last `micro`: clipping, the optimisers, the average."""
        made = {p: p.grad for p in self.objective.parameters()}
        with self.fake:
            update(self.optimizers, 0.0, norm=0.0, clip=0.0)  # the first makes the state, which is there throughout
        for p, grad in made.items():
            p.grad = grad
        with self.recording() as recorder:
            total_norm(self.objective)
            update(self.optimizers, 0.0, norm=2.0, clip=1.0)
            self.average.update(self.objective)
        return recorder.trace()

    def held(self) -> dict[str, int]:
        """Bytes that are there throughout, once `update` was rehearsed."""
        state = [x for o in self.optimizers for own in o.state.values() for x in own.values()]
        return {
            "weights": size([*self.objective.parameters(), *self.objective.buffers()]),
            "optimizer": size(state),
            "average": size(self.average.tensors.values()),
        }

    def batch(self, items: Mapping[str, int]) -> tuple[Batch, dict[str, int]]:
        """A batch of so many samples by kind, its pictures fake, and its counts."""
        batch = self.collate(make_samples(self.run, items, self.tokens))
        counts = self.objective.counts(batch)
        with self.fake:
            if "image" in batch:
                batch["image"] = torch.empty(len(batch["image"]), 3, *sides(self.run.model.image_px), dtype=torch.uint8)
            return move(batch, self.device), counts

    def forward(self, batch: Batch | list[Batch], counts: Mapping[str, float]) -> Tensor:
        """The loss, in the run's precision."""
        half = self.run.parallel.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return self.objective(batch, counts, self.across).loss

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Within, everything is fake and recorded."""
        with self.fake, nothing_asked(), as_on_gpu() if self.imitated else nullcontext(), Recorder() as recorder:
            yield recorder


@contextmanager
def nothing_asked() -> Iterator[None]:
    """Within, nothing is asked of fake tensors that they cannot do: tell what was drawn, be packed by oneDNN."""
    skips, rows = block.skips, linear.MANY_ROWS
    block.skips, linear.MANY_ROWS = lambda device: False, sys.maxsize
    try:
        yield
    finally:
        block.skips, linear.MANY_ROWS = skips, rows


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within, CPU tensors are treated as CUDA treats its own: attention is one operation, norms are fp32."""
    attend, layer_norm, native = attention.attend, F.layer_norm, torch.native_layer_norm
    onednn, pay = linear.by_onednn, attention.products_pay

    def norm(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *arguments, **named)

    def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        added = None if bias is None else attention.as_mask(bias, q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added)

    def native_norm(x: Tensor, *arguments: Any) -> Any:
        return native(x.float() if torch.is_autocast_enabled("cpu") else x, *arguments)

    attention.attend, F.layer_norm, torch.native_layer_norm = fused, norm, native_norm
    linear.by_onednn, attention.products_pay = lambda *_: False, lambda *_: False
    try:
        yield
    finally:
        attention.attend, F.layer_norm, torch.native_layer_norm = attend, layer_norm, native
        linear.by_onednn, attention.products_pay = onednn, pay


class Recorder(TorchDispatchMode):
    """Counts every operation, and writes down when the storage of every tensor comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Operation] = Counter()
        self.events: list[tuple[int, int]] = []
        self.storages = WeakIdKeyDictionary()
        self.numbers = itertools.count()
        self.described: dict[Any, Operation | None] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and write it down."""
        kwargs = kwargs or {}
        if function.is_view or function.namespace in ("prim", "profiler"):
            return function(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for x in leaves:
            if isinstance(x, Tensor):  # what was there before is no event
                self.storages.setdefault(x.untyped_storage(), next(self.numbers))
        result = function(*args, **kwargs)
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        for x in outputs:
            self.number(x)
        key = function, tuple(_like(x) for x in leaves)
        if key not in self.described:
            flops = _flops(function, args, kwargs, result)
            self.described[key] = _describe(*key, spec, [_like(x) for x in outputs], flops)
        operation = self.described[key]
        if operation is not None:
            self.calls[operation] += 1
        return result

    def number(self, x: Tensor) -> int:
        """The number of a tensor's storage; a new one is an event, and so will be its end."""
        storage = x.untyped_storage()
        if storage not in self.storages:
            number, made = next(self.numbers), storage.nbytes()
            self.storages[storage] = number
            self.events.append((number, made))
            weakref.finalize(storage, self.events.append, (number, -made))
        return self.storages[storage]

    def trace(self, gradients: Mapping[int, bool] | None = None) -> Trace:
        """What was recorded so far; ``gradients``: see `Trace`."""
        return Trace(self.calls, list(self.events), gradients or {})


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def _like(x: Any) -> Any:
    return Like(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """FLOPs of an operation that is a matrix product or attention, else 0."""
    name = function.overloadpacket.__name__
    shapes = [x.shape for x in args if isinstance(x, Tensor)]
    if "scaled_dot_product" in name:
        backward = name.endswith("backward")
        return (
            flop_counter.sdpa_backward_flop_count(*shapes[:4])
            if backward
            else flop_counter.sdpa_flop_count(*shapes[:3])
        )
    if name == "_linear_pointwise":
        return 2 * math.prod(shapes[0]) * shapes[1][0]
    count: Any = flop_counter.flop_registry.get(function.overloadpacket)
    return count(*args, **kwargs, out_val=result) if count else 0


def _describe(function: Any, leaves: tuple[Any, ...], spec: Any, outputs: list[Like], flops: int) -> Operation | None:
    """An operation and its cost; None when it has none."""
    name = function.overloadpacket.__name__
    if name in FREE:
        return None
    made = sum(x.bytes for x in outputs)
    moved = made + (made if name in GATHERS else sum(x.bytes for x in leaves if isinstance(x, Like)))
    kind = "attention" if "scaled_dot_product" in name else "matmul" if flops else "other"
    return Operation(function, leaves, spec, kind, flops, moved)
