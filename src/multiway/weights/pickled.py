"""What a pickle describes, without doing what it asks: nothing is imported, nothing is called.

A pickle is a program for a small machine with a stack. This machine knows the few instructions that `torch.save`
and `torch.jit.save` write. It builds plain dicts, lists, tuples, texts and numbers, and for a tensor notes where its
bytes lie. Settings beside the weights (`INERT`) become a name and nothing else; a module of TorchScript, where one is
expected, a dict of its attributes. Any other name ends the reading: it could be code.

No child process guards this: each instruction costs a bounded amount of time and memory, for at most MAX_BYTES of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pickletools import genops
from typing import Any, NamedTuple

import torch

from multiway.errors import ConversionError

MAX_BYTES = 8 * 2**20
"""Longest pickle; one of 50,000 tensors is shorter."""
MAX_DIMENSIONS = 16
KEY_LIMIT = 2**31
"""Numbers that are keys are smaller: larger ones can be chosen so that a dict takes hours."""

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
TENSORS = frozenset(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"))
PARAMETER, DICT = "torch._utils._rebuild_parameter", "collections.OrderedDict"

INERT = frozenset((
    "argparse.Namespace", "yacs.config.CfgNode", "collections.Counter", "pathlib.PosixPath", "torch.device",
    "torch.Size", "__builtin__.set", "builtins.set", "_codecs.encode", "numpy.dtype", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
))  # fmt: skip
"""Settings and figures that official files carry beside their weights: kept as a name, never made."""

SCRIPT = frozenset(
    f"torch.jit._pickle.{name}"
    for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
)
"""What `torch.jit.save` calls its lists and typed values: inert, too."""
MODULE = re.compile(r"__torch__(\.\w+)+", re.ASCII)
"""Names of TorchScript's modules, whose code lies elsewhere in the archive and is never read."""
MAX_ATTRIBUTES, MAX_NESTED, MAX_NAME = 100_000, 64, 500
"""More attributes of modules than any model has, and longer names: a pickle can name one module many times, or inside
itself.
"""
ATTRIBUTE = re.compile(r"\w+", re.ASCII)

VALUES = frozenset((
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
))  # fmt: skip
FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Storage(NamedTuple):
    """A run of numbers of one kind in record ``data/KEY``."""

    key: str
    dtype: torch.dtype
    size: int


class Stored(NamedTuple):
    """A tensor as described: numbers of a storage from ``offset`` on, at these strides."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert(NamedTuple):
    """Something that is neither plain data nor a tensor, and was not made."""

    name: str


class Module:
    """A module of TorchScript: its attributes by name."""

    def __init__(self) -> None:
        self.attributes: dict[Any, Any] = {}


class _Name(NamedTuple):
    """A function or class that the pickle names."""

    name: str


class _Mark:
    """Where a group of items begins on the stack."""


def describe(data: bytes, where: str, *, script: bool = False) -> tuple[Any, Counter[str]]:
    """What a pickle holds, tensors as `Stored`; and how many `Inert` things of each name.

    ``where``: named in errors; ``script``: True = of TorchScript, its modules as `Module`. Raises ConversionError:
    "contains code" for a name outside the few that are known, an instruction that `torch.save` does not write, or a
    damaged or too long pickle.
    """
    if len(data) > MAX_BYTES:
        raise ConversionError(
            f"{where} has {len(data)} bytes, expected at most {MAX_BYTES}: no model has so many names"
        )
    machine = _Machine(where, script)
    end = 0
    try:
        for op, value, place in genops(data):
            end = (place or 0) + 1
            machine.step(op.name, value)
        [result] = machine.stack
    except (ValueError, TypeError, IndexError, KeyError, StopIteration) as error:
        raise ConversionError(f"{where} is damaged before byte {end}: {type(error).__name__}: {error}"[:500]) from error
    if end != len(data):
        raise ConversionError(f"{where} goes on behind its end at byte {end}: it was tampered with")
    return result, machine.inert


def flattened(module: Module, where: str) -> tuple[dict[str, Any], Counter[str]]:
    """The tensors of a module and of those in it, by dotted names; and how often it has other attributes of each name.

    Raises ConversionError when there are more than MAX_ATTRIBUTES, nested deeper than MAX_NESTED, or named otherwise.
    """
    found: dict[str, Any] = {}
    other: Counter[str] = Counter()
    left, seen = [("", 0, module)], 0
    while left:
        prefix, depth, own = left.pop()
        seen += 1 + len(own.attributes)
        if seen > MAX_ATTRIBUTES or depth > MAX_NESTED:
            raise ConversionError(
                f"{where}: its modules have more than {MAX_ATTRIBUTES} attributes, or are nested deeper than "
                f"{MAX_NESTED}: no model is so"
            )
        for name, value in own.attributes.items():
            if not isinstance(name, str) or not ATTRIBUTE.fullmatch(name) or len(prefix) + len(name) > MAX_NAME:
                raise ConversionError(f"{where}: a module has the attribute {name!a:.200}, which is no name of one")
            if isinstance(value, Module):
                left.append((f"{prefix}{name}.", depth + 1, value))
            elif isinstance(value, Stored):
                found[f"{prefix}{name}"] = value
            else:
                other[f"{name} ({value.name if isinstance(value, Inert) else type(value).__name__})"] += 1
    return found, other


class _Machine:
    """The stack, what was put aside, a method per kind of instruction; damage shows as a ValueError and the like."""

    def __init__(self, where: str, script: bool) -> None:
        self.where = where
        self.script = script
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.inert: Counter[str] = Counter()

    def step(self, op: str, value: Any) -> None:
        """Carry out one instruction."""
        stack = self.stack
        if op in VALUES:
            stack.append(value)
        elif op in FRESH:
            stack.append(FRESH[op]())
        elif op in SHORT_TUPLES:
            self.last(SHORT_TUPLES[op])
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[value])
        elif op in ("PROTO", "FRAME", "STOP"):
            pass
        elif op in ("GLOBAL", "INST"):
            self.named(".".join(value.split(" ", 1)))
        elif method := getattr(self, f"_{op.lower()}", None):
            method()
        else:
            raise ConversionError(f"{self.where} has the instruction {op}, which torch.save does not write: refused")

    def last(self, count: int) -> None:
        """Join the last items to a tuple."""
        if count > len(self.stack):
            raise ValueError("too few items")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def group(self) -> list[Any]:
        """Take the items since the last mark."""
        place = next(i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _Mark)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def named(self, name: str) -> None:
        """Push a name that is known to be harmless."""
        scripted = self.script and (name in SCRIPT or MODULE.fullmatch(name))
        if not scripted and name not in INERT | TENSORS | DTYPES.keys() | {PARAMETER, DICT}:
            shown = name if name.isprintable() else ascii(name)
            raise ConversionError(
                f"{self.where} contains code: {shown[:200]}; only tensors and plain values are read, nothing was run"
            )
        self.stack.append(_Name(name))

    def _mark(self) -> None:
        self.stack.append(_Mark)

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        self.named(f"{module}.{name}")

    def _tuple(self) -> None:
        self.stack.append(tuple(self.group()))

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.group())

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _fill(self.stack[-1], [key, value])

    def _setitems(self) -> None:
        items = self.group()
        _fill(self.stack[-1], items)

    def _build(self) -> None:
        given, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Module):
            if made.attributes or not isinstance(given, dict):
                raise ValueError("attributes of a module that are not told once, by their names")
            made.attributes = given
        elif not isinstance(made, dict | Inert):  # of these they are left, such as a state dict's versions
            raise ValueError("attributes of something that has none")

    def _newobj(self) -> None:
        _, made = self.stack.pop(), self.stack.pop()
        if isinstance(made, _Name) and MODULE.fullmatch(made.name):
            self.stack.append(Module())
        else:
            self._make_inert(made)

    def _reduce(self) -> None:
        given, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Name) or not isinstance(given, tuple):
            raise ValueError("a call of something that is no function")
        if made.name in TENSORS:
            self.stack.append(_tensor(*given))
        elif made.name == PARAMETER and isinstance(given[0], Stored):
            self.stack.append(given[0])
        elif made.name == DICT and not given:
            self.stack.append({})
        else:
            self._make_inert(made)

    def _binpersid(self) -> None:
        kind, of, key, _, size = self.stack.pop()
        if kind != "storage" or not isinstance(of, _Name) or not isinstance(key, str) or type(size) is not int:
            raise ValueError("a reference to something that is no storage")
        self.stack.append(Storage(key, DTYPES[of.name], size))

    def _extend(self, items: list[Any]) -> None:
        held = self.stack[-1]
        if isinstance(held, list):
            held.extend(items)
        elif not isinstance(held, Inert):
            raise ValueError("items of something that is no list")

    def _make_inert(self, made: Any) -> None:
        if not isinstance(made, _Name) or made.name not in INERT | SCRIPT:
            raise ValueError("a call of something that is not to be called")
        self.inert[made.name] += 1
        self.stack.append(Inert(made.name))


def _fill(held: Any, items: list[Any]) -> None:
    """Put keys and values, in turn, into a dict; into something inert they are not put."""
    if isinstance(held, Inert):
        return
    if not isinstance(held, dict):
        raise ValueError("items of something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < KEY_LIMIT):
            raise ValueError(f"a key that is neither text nor a small number: {type(key).__name__}")
        if key in held:
            raise ValueError(f"the key {key!a:.200} twice")
        held[key] = value


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = None, hooks: Any = None, flags: Any = None
) -> Stored:
    tuples = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= MAX_DIMENSIONS
    if not tuples or not isinstance(storage, Storage) or flags:
        raise ValueError("a tensor that is not strided numbers of a storage")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor whose place is not told by whole numbers")
    return Stored(storage, offset, shape, stride)
