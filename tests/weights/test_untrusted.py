from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from multiway.errors import ConversionError, MissingInputError
from multiway.weights.archive import Archive
from multiway.weights.untrusted import read_published
from tests.weights import hostile

COMMAND = "touch canary"
CODE = {kind: (content, why) for kind, content, why in hostile.code(COMMAND)}
BOMBS = {kind: (make, why) for kind, make, why in hostile.bombs()}
BROKEN = {kind: (content, why) for kind, content, why in hostile.broken()}


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal to the bit, NaN included."""
    got, want = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (got, want))
    return torch.equal(got, want)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    whole = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    return {
        **{f"kind.{dtype}": torch.randn(3, 2, generator=generator).to(dtype) for dtype in kinds},
        **{f"kind.{dtype}": torch.randint(0, 100, (5,), generator=generator).to(dtype) for dtype in whole},
        "truth": torch.tensor([True, False, True]),
        "number": torch.tensor(2.5),
        "nothing": torch.zeros(0, 4),
        "not_finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "whole": base,
        "turned": base.T,
        "columns": base[1:, ::3],
        "row": base[2],
        "flipped": base.flip(0),
        "parameter": torch.nn.Parameter(torch.randn(2, generator=generator)),
        "frozen": torch.nn.Parameter(torch.randn(2, generator=generator), requires_grad=False),
        "last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrapper", ["", "model", "module", "state_dict"])
def test_what_torch_saves_is_read_to_the_bit(tmp_path: Path, wrapper: str, protocol: int) -> None:
    want = tensors()
    path = tmp_path / "weights.pth"
    torch.save({wrapper: want} if wrapper else want, path, pickle_protocol=protocol)
    found = read_published(path)
    assert (found.format, found.wrapper, found.files, found.beside) == ("torch", wrapper, (path,), {})
    assert list(found.state) == list(want)
    for name, tensor in found.state.items():
        assert tensor.dtype == want[name].dtype and tensor.shape == want[name].shape and same(tensor, want[name]), name
        assert not tensor.requires_grad


def test_what_shares_memory_is_read_once(tmp_path: Path) -> None:
    base = torch.randn(1000, 100)
    torch.save({"a": base, "tied": base, "part": base[:5]}, tmp_path / "w.pth")
    state = read_published(tmp_path / "w.pth").state
    assert state["a"] is state["tied"]
    assert state["a"].data_ptr() == state["part"].data_ptr()


class Settings(dict):
    """What a training script may put beside its weights."""


Settings.__module__, Settings.__qualname__ = "yacs.config", "CfgNode"


def test_a_snapshot_of_a_training_run_gives_its_weights_alone(tmp_path: Path, monkeypatch) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    settings = Settings(lr=1e-3, parts=Settings(a=[1, 2]))
    fake = type(sys)("yacs.config")
    fake.CfgNode = Settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs.config", fake)
    monkeypatch.setitem(sys.modules, "yacs", type(sys)("yacs"))
    snapshot = {
        "model": OrderedDict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "args": argparse.Namespace(lr=1e-3, root=Path("data")),
        "config": settings,
        "max_accuracy": np.float64(83.5),
        "lr_scheduler": {"milestones": Counter([3]), "sizes": {1, 2}},
        "rng": torch.get_rng_state(),
        "device": torch.device("cpu"),
        "shape": torch.Size([1, 2]),
    }
    torch.save(snapshot, tmp_path / "checkpoint.pth")
    found = read_published(tmp_path / "checkpoint.pth")
    assert found.wrapper == "model" and set(found.state) == {"weight", "bias"}
    assert same(found.state["weight"], model.weight)
    assert found.beside["optimizer"] == "dict of 2" and found.beside["epoch"] == "int"
    assert found.beside["args"] == "argparse.Namespace" and found.beside["config"] == "yacs.config.CfgNode"
    assert found.beside["rng"] == "a tensor"
    assert found.beside["yacs.config.CfgNode"] == "2 times, not made"


class Part(torch.nn.Module):
    """A norm and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


class Whole(torch.nn.Module):
    """Parts, a parameter that is used twice, buffers, settings, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.Sequential(Part(), torch.nn.ReLU(), Part())
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.register_buffer("vocab_size", torch.tensor(49408))
        self.width, self.name, self.sizes, self.unused = 4, "whole", [1, 2], None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x) * self.scale + torch.arange(4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["script", "trace"])
def test_what_torch_script_saves_is_read_to_the_bit(way: str, tmp_path: Path) -> None:
    model = Whole().eval()
    made = torch.jit.script(model) if way == "script" else torch.jit.trace(model, torch.ones(2, 4))
    made.half().save(tmp_path / "model.pt")
    want = torch.jit.load(tmp_path / "model.pt").state_dict()
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        assert any(info.compress_type for info in file.infolist()), "longer code is compressed"
    found = read_published(tmp_path / "model.pt")
    assert (found.format, found.wrapper) == ("torchscript", "")
    assert found.state.keys() == want.keys() and found.state["scale"].dtype == torch.float16
    for name, tensor in found.state.items():
        assert tensor.dtype == want[name].dtype and tensor.shape == want[name].shape and same(tensor, want[name]), name
    assert found.beside["training (bool)"] == f"an attribute, {sum(1 for _ in model.modules())} times"
    assert found.beside["code and constants"].endswith("records, not read")


@pytest.mark.parametrize("way", ["stored", "compressed"])
def test_the_code_of_torch_script_is_not_read(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, own = tmp_path / "model.pt", [], Archive.read
    code, constants = b"import os; os.system('touch canary')", b"cos\nsystem\n"
    stored = {"x/code/__torch__.py": code, "x/constants.pkl": constants}
    made = hostile.scripted(hostile.module(w=hostile.tensor()), **stored)
    path.write_bytes(made if way == "stored" else hostile.deflated_code(code * 100))

    def noted(archive: Archive, name: str) -> bytearray:
        read.append(name)
        return own(archive, name)

    monkeypatch.setattr(Archive, "read", noted)
    assert read_published(path).state["w"].tolist() == [1, 2]
    assert read == ["x/data.pkl", "x/data/0"]


def test_what_parallel_training_puts_before_names_is_taken_off(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "module.b.c": torch.ones(1)}, tmp_path / "w.pth")
    assert list(read_published(tmp_path / "w.pth").state) == ["a", "b.c"]


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.eye(3).to_sparse(), "contains code: torch._utils._rebuild_sparse_tensor"),
        (torch.ones(2, dtype=torch.complex64), "contains code: torch.ComplexFloatStorage"),
        (torch.ones(2, device="meta"), "contains code: torch._utils._rebuild_meta_tensor"),
        (torch.ones(1).expand(4), "not within its storage of 1"),
        (torch.nn.Linear(1, 1), "contains code: torch.nn.modules.linear.Linear"),
    ],
)  # fmt: skip
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, tensor: object, why: str) -> None:
    torch.save({"a": torch.ones(2), "weight": tensor}, tmp_path / "w.pth")
    with pytest.raises(ConversionError, match=why):
        read_published(tmp_path / "w.pth")


def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=r"data.pkl contains code: torch.nn.modules.linear.Linear") as error:
        read_published(tmp_path / "model.pth")
    assert error.value.exit_code == 65


def test_arrays_are_read_to_the_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    want = {
        "plain": rng.normal(size=(3, 4)).astype("f4"),
        "half": rng.normal(size=5).astype("f2"),
        "columns/first": np.asfortranarray(rng.normal(size=(3, 4))),
        "number": np.array(3),
        "truth": np.array([True, False]),
        "nothing": np.zeros((0, 3), "f4"),
    }
    np.savez(tmp_path / "w.npz", **want)
    found = read_published(tmp_path / "w.npz")
    assert found.format == "npz" and list(found.state) == list(want)
    for name, tensor in found.state.items():
        assert tensor.is_contiguous() and np.array_equal(tensor.numpy(), want[name]), name
        assert tensor.numpy().dtype == want[name].dtype
    np.savez_compressed(tmp_path / "w.npz", **want)
    with pytest.raises(ConversionError, match="plain.npy is compressed"):
        read_published(tmp_path / "w.npz")


def test_a_folder_in_parts_is_read_whole(tmp_path: Path) -> None:
    want = {name: torch.randn(3) for name in "abc"}
    with pytest.raises(MissingInputError, match=r"no folder with .*model.safetensors, .* or pytorch_model.bin"):
        read_published(tmp_path)
    for suffix, save in ((".bin", torch.save), (".safetensors", save_file)):
        stem = "pytorch_model" if suffix == ".bin" else "model"
        places = {name: f"{stem}-0000{i // 2 + 1}-of-00002{suffix}" for i, name in enumerate(want)}
        for part in set(places.values()):
            save({name: want[name] for name in want if places[name] == part}, tmp_path / part)
        index = tmp_path / f"{stem}{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        found = read_published(tmp_path)
        assert len(found.files) == 2 and found.state.keys() == want.keys()
        assert all(same(found.state[name], want[name]) for name in want)
    save_file({"a": want["a"], "c": want["c"]}, tmp_path / places["c"])
    with pytest.raises(ConversionError, match="a is in another part, too"):
        read_published(tmp_path)
    (tmp_path / places["c"]).unlink()
    with pytest.raises(MissingInputError, match=places["c"]):
        read_published(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"weight_map": {"a": "../secret.safetensors"}}', "names '../secret.safetensors', which is no file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no file beside it"),
        ('{"weight_map": {"a": ".."}}', "no file beside it"),
        ('{"weight_map": {"a": 3}}', "is no index of weights"),
        ("[]", "is no index of weights"),
        ("[" * 10**5, "is no index of weights"),
    ],
)
def test_an_index_names_files_beside_it_alone(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConversionError, match=why):
        read_published(tmp_path)


# ------------------------------------------------------------------------------------------------------------- hostile


def refused(path: Path, content: bytes, why: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=why) as error:
        read_published(path)
    message = str(error.value)
    assert str(path) in message and message.isprintable() and len(message) < 2000


def test_there_are_enough_of_them() -> None:
    assert len(CODE) >= 40 and len(BROKEN) >= 40


@pytest.mark.parametrize("kind", CODE)
def test_code_is_refused_and_never_run(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, why = CODE[kind]
    refused(tmp_path / "model.pth", content, why)
    (tmp_path / "link.safetensors").symlink_to("model.pth")
    with pytest.raises(ConversionError, match=why):
        read_published(tmp_path / "link.safetensors")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["posix.system", "stack_global"])
def test_the_canary_would_be_there(kind: str, tmp_path: Path) -> None:
    """These files are live: loaded as pickles they do what they say."""
    (tmp_path / "model.pth").write_bytes(CODE[kind][0])
    load = "import torch; torch.load('model.pth', weights_only=False)"
    subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, timeout=120)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_told(kind: str, tmp_path: Path) -> None:
    refused(tmp_path / "model.pth", *BROKEN[kind])


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused(kind: str, tmp_path: Path) -> None:
    make, why = BOMBS[kind]
    refused(tmp_path / "model.pth", make(), why)


MEASURE = """
import resource, sys
from pathlib import Path
from multiway.errors import ConversionError
from multiway.weights.untrusted import read_published
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_published(path)
    except ConversionError:
        continue
    raise SystemExit(f"{path} was read")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    for kind, (make, _) in BOMBS.items():
        (tmp_path / kind).write_bytes(make())
    result = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True)
    assert not result.returncode, result.stderr
    assert int(result.stdout) < 512, "MiB"


def written(path: Path) -> Path:
    torch.save({"model": {"a": torch.arange(300.0), "b": torch.arange(7)}, "epoch": 1}, path)
    return path


def test_a_changed_byte_is_found_in_every_record(tmp_path: Path) -> None:
    path = written(tmp_path / "w.pth")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        found = {info.filename: info.header_offset for info in file.infolist()}
    assert len(found) > 5
    for name, header in found.items():
        changed = bytearray(content)
        changed[header + 30 + sum(struct.unpack_from("<2H", content, header + 26))] ^= 1
        refused(path, bytes(changed), f"{name} does not have the checksum")


def test_a_file_cut_short_anywhere_is_told(tmp_path: Path) -> None:
    content = written(tmp_path / "w.pth").read_bytes()
    save_file({"a": torch.arange(300.0)}, tmp_path / "w.safetensors")
    other = (tmp_path / "w.safetensors").read_bytes()
    for whole in (content, other):
        for length in [*range(0, len(whole) - 1, 37), len(whole) - 1]:
            refused(tmp_path / "cut", whole[:length], "cut short|no file of weights|is damaged|its parts make")


def test_any_changed_byte_of_headers_and_pickle_is_told_or_harmless(tmp_path: Path) -> None:
    """The times in a zip's headers are not looked at, and so may change; nothing else."""
    path = written(tmp_path / "w.pth")
    content, want = path.read_bytes(), read_published(path).state
    kept = 0
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        try:
            got = read_published(path).state
        except ConversionError as error:
            assert str(error).isprintable()
            continue
        kept += 1
        assert all(same(got[name], want[name]) for name in want)
    assert kept < len(content) // 6


def test_what_is_no_file_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nowhere"):
        with pytest.raises(MissingInputError, match=name):
            read_published(tmp_path / name)


def test_a_safetensors_file_may_begin_with_the_first_byte_of_a_pickle(tmp_path: Path) -> None:
    for length in range(40):
        save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors", metadata={"about": "x" * length})
        if (tmp_path / "w.safetensors").read_bytes()[:1] == b"\x80":
            break
    else:
        raise AssertionError("no such file was made")
    assert list(read_published(tmp_path / "w.safetensors").state) == ["w"]
