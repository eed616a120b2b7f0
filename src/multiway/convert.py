"""Published weights turned into a model folder of ours, with a receipt of everything that was done to them.

What a file is (`multiway.published`) follows from its names and shapes; every name must be explained. Numbers are never
changed, except that floats become float32 and that positions are resized where another size of pictures is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from multiway import __version__
from multiway.data.text import TextTokenizer
from multiway.errors import ConfigError, ConversionError, DataError, WriteError
from multiway.models import blank, presets
from multiway.nn.pixels import Size
from multiway.preprocessor import Preprocessor
from multiway.pretrained import save_pretrained
from multiway.published import Match, adopt, aligned, located_weights, matches, read
from multiway.told import CONFIG, named, read_told, tokenizer_in
from multiway.weights.io import write, write_weights
from multiway.weights.rename import to_theirs
from multiway.weights.untrusted import Published

RECEIPT = "receipt.json"
CHUNK = 2**20
REFERENCE_SECONDS = 600

LICENSES: Mapping[str, str] = {
    "vit": "apache-2.0",
    "mae": "cc-by-nc-4.0",
    "vit/mae": "cc-by-nc-4.0",
    "simmim": "mit",
    "simmim/torchvision": "bsd-3-clause",
    "swin": "mit",
    "swin_v2": "mit",
    "feature_distillation": "mit",
    "beit": "mit",
    "beit2": "mit",
    "beit3": "mit",
    "vq_kd": "mit",
    "clip": "mit",
    "siglip": "apache-2.0",
    "flava": "bsd-3-clause",
    "vlmo": "mit",
}
"""What the repositories that published the weights allow, by system, or by system/layout where that differs; of others
the card says "other".
"""

Program = Literal["auto", "timm", "transformers", "open_clip", "none"]
"""The original to compare with; "auto": the one whose layout the weights are in, else another that is installed."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What was read, what it was taken for, and what was done to it: the content of ``receipt.json``.

    ``files``: name, bytes and SHA-256 of each; ``tokenizer``: the same of the one that came along, or ``missing``, why
    none did, empty for models without texts; ``wrapper``, ``beside``: what was around the weights and what else their
    files hold; ``config``: settings that differ from the model's of that name; ``told``: those that configs beside the
    weights say, and where; ``license``: of who published them; ``renamed``: our name -> theirs, several where one was
    fused of them; ``resized``: our name -> shapes before and after; ``dropped``: their name -> why; ``dtypes``: changes
    and how many weights had them; ``reference``: the program that was given the same weights, or why none was;
    ``difference``: the largest of its outputs to ours, and ``largest``: the largest output itself, None without one;
    ``outputs``: the same two of each kind of output.
    """

    converter: str
    source: str
    files: list[dict[str, Any]]
    format: str
    wrapper: str
    beside: dict[str, str]
    model: str
    system: str
    layout: str
    config: dict[str, Any]
    license: str
    renamed: dict[str, list[str]]
    resized: dict[str, list[list[int]]]
    dropped: dict[str, str]
    dtypes: dict[str, int]
    tokenizer: dict[str, Any] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    reference: str = "not asked for"
    difference: float | None = None
    largest: float | None = None
    outputs: dict[str, list[float]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def show(self) -> None:
        """Print it, long lists by their number, without what is empty."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table("", "", show_header=False, title=f"{self.model} from {self.source}")
        table.columns[1].overflow = "fold"
        for name, value in dataclasses.asdict(self).items():
            if name == "files":
                value = [f"{f['name']} {f['bytes']:,} bytes sha256 {f['sha256']}" for f in value]
            if name in ("renamed", "dropped", "resized", "missing", "unexpected"):
                value = f"{len(value)} names"
            if isinstance(value, dict):
                value = [f"{key}: {own}" for key, own in value.items()]
            if value is None or value == []:
                continue
            table.add_row(name, escape("\n".join(map(str, value)) if isinstance(value, list) else str(value)))
        Console().print(table)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    layout: str | None = None,
    image_px: Size | None = None,
    tokenizer: str | Path | None = None,
    reference: Program = "auto",
) -> Receipt:
    """Turn published weights into a model folder, and write and return the receipt.

    ``source``: a file (safetensors, ``.npz``, ``.pth``, a TorchScript ``.pt``), a folder with one, or a hub id;
    ``name``: of `list_models`, None = the one that fits; ``layout``: one of the system's, None = the one that fits;
    ``image_px``: read pictures of this size from now on, None = of the published one; ``tokenizer``: a file with the
    model's (`TextTokenizer.load`), None = the one beside the weights; ``reference``: the program to compare outputs
    with.

    Raises MissingInputError when the source is not there, ConversionError when it is unsafe or damaged, when no model
    explains it (with every key that does not fit) or several do, or a config beside it says otherwise, ConfigError for
    unknown names and a tokenizer that does not fit, DataError for a damaged one, WriteError when the disk refuses.
    """
    path, out = located_weights(source), Path(out)
    published, told = read(path), read_told(path)
    timm = named(path)
    name = name or (timm if timm in presets() else None)
    match = _best(matches(published, name, layout, told.values), source)
    told.check(match.config, match.weights.config, getattr(match.system, "ACTIVATION", "gelu"))
    words, taken = _words(match.config, path, tokenizer)
    model: Any = blank(match.system, match.config)
    model.load_state_dict(adopt(published, match), assign=True)
    before = {key: list(value.shape) for key, value in model.state_dict().items()}
    if image_px is not None:
        model.set_image_size(image_px)
    after = {key: list(value.shape) for key, value in model.state_dict().items()}
    receipt = _receipt(source, published, match)
    resized = {key: [before[key], after[key]] for key in after if before[key] != after[key]}
    names = ", ".join(f"`{file['name']}` (SHA-256 {file['sha256']})" for file in receipt.files)
    text = f"Converted from {names}, which names its weights as {receipt.layout} does."
    card = {"title": match.name, "text": text, "license": receipt.license}
    save_pretrained(model, out, tokenizer=words, card=card)
    seen = _compared(out, path, published, match, reference) if not resized else {"reference": "resized: not compared"}
    said = {key: f"{told.places[key]}: {value}" for key, value in told.values.items() if hasattr(match.config, key)}
    receipt = dataclasses.replace(receipt, resized=resized, tokenizer=taken, told=said, **seen)
    try:
        content = json.dumps(dataclasses.asdict(receipt), indent=2) + "\n"
        write(out / RECEIPT, lambda temporary: temporary.write_text(content, encoding="utf-8"))
    except OSError as error:
        raise WriteError(f"cannot write the receipt to {out}: {error}") from error
    return receipt


def _best(found: list[Match], source: str | Path) -> Match:
    """The one model that a file is."""
    best = found[0]
    if best.faults:
        table = "\n".join(f"{kind}:\n" + "\n".join(f"  {key}" for key in keys) for kind, keys in best.wrong.items())
        raise ConversionError(
            f"{source}: no model explains it; the nearest is {best.name} in layout {best.layout}, where {best.faults} "
            f"keys do not fit. If it is one of the models, name it\n{table}"
        )
    equal = {(type(m.config), m.config): m for m in reversed(found) if not m.faults and m.changed == best.changed}
    if len(equal) > 1:
        names = ", ".join(sorted(m.name for m in equal.values()))
        raise ConversionError(f"{source}: {names} all explain it, and differ in more than names: say which it is")
    return best


def _words(config: Any, folder: Path, given: str | Path | None) -> tuple[TextTokenizer | None, dict[str, Any]]:
    """The tokenizer that comes along, and what the receipt says of it."""
    if not hasattr(config, "vocab"):
        if given is not None:
            raise ConfigError(f"{given}: this model reads no texts, it takes no tokenizer")
        return None, {}
    path = tokenizer_in(folder) if given is None else Path(given)
    if path is None:
        return None, {"missing": "none is beside the weights; texts need one: --tokenizer FILE"}
    try:
        words = TextTokenizer.load(path)
        Preprocessor.of(config, words)
    except (ConfigError, DataError) as error:
        if given is not None:
            raise
        return None, {"missing": f"{path.name} was not taken: {error}"}
    return words, _file(path)


def _receipt(source: str | Path, published: Published, match: Match) -> Receipt:
    preset = match.system.PRESETS[match.name]
    fields = [f.name for f in dataclasses.fields(preset)]
    theirs = aligned(published.state, match.weights)
    names = {key: match.weights.names(key) for key in blank(match.system, match.config).state_dict()}
    used = {name for own in names.values() for name in own}
    changes = Counter(str(theirs[name].dtype) for name in used if theirs[name].is_floating_point())
    system = match.system.__name__.rpartition(".")[2]
    return Receipt(
        converter=f"multiway {__version__}",
        source=str(source),
        files=[_file(path) for path in published.files],
        format=published.format,
        wrapper=published.wrapper,
        beside=dict(published.beside),
        model=match.name,
        system=system,
        layout=match.layout,
        config={k: getattr(match.config, k) for k in fields if getattr(match.config, k) != getattr(preset, k)},
        license=LICENSES.get(f"{system}/{match.layout}", LICENSES.get(system, "other")),
        renamed=names,
        resized={},
        dropped={name: "the layout drops it: made anew, or of training alone" for name in theirs if name not in used},
        dtypes={f"{old} -> torch.float32": n for old, n in changes.items() if old != "torch.float32"},
    )


def _file(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


# ----------------------------------------------------------------------------------------------------------- reference


def _compared(out: Path, path: Path, published: Published, match: Match, wanted: Program) -> dict[str, Any]:
    """What a process of its own says that has the original program, the same weights and our folder."""
    layouts = match.system.LAYOUTS
    config = path / CONFIG
    programs = [name for name in ("transformers", "timm", "open_clip") if name in layouts and wanted in ("auto", name)]
    if match.layout != "transformers" or not config.is_file():  # it cannot be made without its own config
        programs = [name for name in programs if name != "transformers"]
    said: dict[str, Any] = {"reference": "not asked for" if wanted == "none" else "no program is known for this layout"}
    for program in programs:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            state = to_theirs(adopt(published, match), layouts[program])
            if layouts[program].rules == match.weights.rules:  # nothing of ours in between
                state = {
                    name: value for name, value in aligned(published.state, match.weights).items() if name in state
                }
            write_weights(folder, state)
            if program == "transformers":
                (folder / config.name).write_bytes(config.read_bytes())
            said = _asked(program, folder, out, match.name)
        if "difference" in said:
            break
    return said


def _asked(program: str, folder: Path, out: Path, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "multiway.reference", program, str(folder), str(out), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REFERENCE_SECONDS)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"reference": f"{program} took more than {REFERENCE_SECONDS} s"}
    except (ValueError, IndexError):
        return {"reference": f"{program} failed: {done.stderr.strip().splitlines()[-1:]}"}
