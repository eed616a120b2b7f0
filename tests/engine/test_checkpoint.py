"""Checkpoints: exact, whole or not there, found again after any crash, damage named, one process."""

from __future__ import annotations

import builtins
import contextlib
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from multiway.engine import checkpoint
from multiway.engine.checkpoint import newest, save
from multiway.errors import CheckpointError, ConfigError, WriteError

POINTS = ["made", "written", "manifest", "renamed", "purged"]


def content(step: int) -> dict[str, dict[str, Tensor]]:
    """Three groups that differ in every tensor from those of any other step."""
    g = torch.Generator().manual_seed(step)
    return {
        "model": {
            "weight": torch.randn(5, 3, generator=g),
            "half": torch.randn(7, generator=g).bfloat16(),
            "double": torch.randn(1, 2, 2, generator=g).double(),
            "strided": torch.randn(9, generator=g)[::2],
            "scalar": torch.randn((), generator=g),
            "flags": torch.rand(9, generator=g) > 0.5,
            "empty": torch.zeros(0, 4),
            "hollow": torch.zeros(3, 0),
            "count": torch.tensor(step, dtype=torch.int64),
        },
        "ema": {"weight": torch.randn(5, 3, generator=g)},
        "optim": {
            "weight.exp_avg": torch.randn(5, 3, generator=g).t(),
            "bytes": torch.randint(0, 255, (11,), generator=g),
        },
    }


def like(groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Destinations full of something else."""
    return {group: {name: torch.full_like(x, 1) for name, x in tensors.items()} for group, tensors in groups.items()}


def store(folder: Path, step: int, **options) -> Path:
    return save(folder, step, content(step), {"step": step, "nested": {"a": [1, 2.5, None]}}, **options)


def fail(message: str) -> None:
    raise AssertionError(message)


def check(found: checkpoint.Checkpoint | None, step: int) -> None:
    """The checkpoint is that of ``step``, to the bit."""
    assert found is not None
    assert (found.step, found.state) == (step, {"step": step, "nested": {"a": [1, 2.5, None]}})
    groups = content(step)
    into = like(groups)
    for group, tensors in into.items():
        found.load(group, tensors)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, groups[group][name]), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process needs no fsync to be survived, and a shared disk takes long over thousands of them."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_comes_back_to_the_bit(tmp_path: Path) -> None:
    assert store(tmp_path / "deep" / "checkpoints", 12) == tmp_path / "deep" / "checkpoints" / "step-000000012"
    check(newest(tmp_path / "deep" / "checkpoints", note=fail), 12)


def test_values_that_compare_badly_keep_their_bits(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]).view(torch.int32).view(torch.float32)
    save(tmp_path, 1, {"model": {"odd": odd}}, {})
    into = torch.zeros(4)
    newest(tmp_path, note=fail).load("model", {"odd": into})
    assert torch.equal(into.view(torch.int32), odd.view(torch.int32))


def test_parameters_and_strided_destinations(tmp_path: Path) -> None:
    save(tmp_path, 1, {"ema": {"weight": torch.nn.Parameter(content(1)["ema"]["weight"])}}, {})
    parameter = torch.nn.Parameter(torch.zeros(5, 3))
    newest(tmp_path, note=fail).load("ema", {"weight": parameter})
    assert parameter.requires_grad and parameter.grad_fn is None
    assert torch.equal(parameter, content(1)["ema"]["weight"])
    strided = torch.zeros(3, 5).t()
    newest(tmp_path, note=fail).load("ema", {"weight": strided})
    assert torch.equal(strided, content(1)["ema"]["weight"])


def test_files_are_plain_safetensors_and_json_with_the_usual_mode(tmp_path: Path) -> None:
    path = store(tmp_path, 3)
    assert names(path) == [
        "MANIFEST.json",
        "ema-00000-of-00001.safetensors",
        "model-00000-of-00001.safetensors",
        "optim-00000-of-00001.safetensors",
        "state.json",
    ]
    by_others = load_file(path / "model-00000-of-00001.safetensors")
    expected = {name: x for name, x in content(3)["model"].items() if name != "empty"}
    assert by_others.keys() == expected.keys()
    assert all(torch.equal(by_others[name], x) and by_others[name].dtype == x.dtype for name, x in expected.items())
    raw = (path / "model-00000-of-00001.safetensors").read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:length]).items():
        assert (length + entry["data_offsets"][0]) % expected[name].element_size() == 0, f"{name} is not aligned"
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~umask}
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    assert manifest["groups"]["model"]["half"] == {
        "dtype": "BF16",
        "shape": [7],
        "rows": [["model-00000-of-00001.safetensors", 0, 7]],
    }
    assert manifest["files"].keys() == {*names(path)} - {"MANIFEST.json"}


def test_a_large_group_is_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 40)
    path = store(tmp_path, 3)
    parts = [name for name in names(path) if name.startswith("model")]
    assert "model-00000-of-00001.safetensors" in parts and "model-00000-of-00001.1.safetensors" in parts
    check(newest(tmp_path, note=fail), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 5)}, r"model tensor 'weight': expected .*\[3, 5\].*found .*\[5, 3\]"),
        ({"weight": torch.zeros(15)}, r"'weight': expected .*\[15\].*found .*\[5, 3\]"),
        ({"weight": torch.zeros(5, 3).half()}, "'weight': expected .*F16.*found .*F32"),
        ({"scalar": torch.zeros(1)}, r"'scalar': expected .*\[1\].*found .*\[\]"),
        ({"new": torch.zeros(1)}, r"1 are absent \['new'\], 0 are unknown"),
        ({"weight": None}, r"0 are absent \[\], 1 are unknown \['weight'\]"),
    ],
)
def test_load_is_strict_and_fills_nothing_on_refusal(tmp_path: Path, change: dict, message: str) -> None:
    store(tmp_path, 1)
    into = {name: x for name, x in {**like(content(1))["model"], **change}.items() if x is not None}
    before = {name: x.clone() for name, x in into.items()}
    with pytest.raises(CheckpointError, match=message):
        newest(tmp_path, note=fail).load("model", into)
    assert all(torch.equal(into[name], before[name]) for name in into)


def test_unknown_group_is_named(tmp_path: Path) -> None:
    store(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"group 'teacher', found only \['model', 'ema', 'optim'\]"):
        newest(tmp_path, note=fail).load("teacher", {})


# --- which one is found, which stay -----------------------------------------------------------------------------------


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent", note=fail) is None
    assert newest(tmp_path, note=fail) is None


def test_newest_goes_by_name_never_by_time(tmp_path: Path) -> None:
    for step in (3, 20, 100):
        os.utime(store(tmp_path, step, keep=9), (1e9 - step, 1e9 - step))
    check(newest(tmp_path, note=fail), 100)


def test_decoys_are_noted_and_left_alone(tmp_path: Path) -> None:
    path = store(tmp_path, 5)
    decoys = [
        "step-5",
        "step-000000009x",
        "xstep-000000009",
        "step-00000009",
        "STEP-000000009",
        "step-٠٠٠٠٠٠٠٠٩",
        "notes",
    ]
    for decoy in [*decoys, ".tmp-step-000000009"]:
        shutil.copytree(path, tmp_path / decoy)
    (tmp_path / "step-000000010").symlink_to(path)
    (tmp_path / "latest").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-000000011").write_text("a file")
    notes: list[str] = []
    check(newest(tmp_path, note=notes.append), 5)
    every = [*decoys, ".tmp-step-000000009", "step-000000010", "latest", "step-000000011"]
    assert sorted(notes) == sorted(f"{tmp_path / name} ignored: not the directory of a checkpoint" for name in every)
    store(tmp_path, 6)
    assert names(tmp_path) == sorted({*every, "step-000000005", "step-000000006"} - {".tmp-step-000000009"})


def test_purge_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for step in range(1, 6):
        store(tmp_path, step)
    assert names(tmp_path) == ["step-000000004", "step-000000005"]
    (tmp_path / "step-000000004" / "state.json").unlink()  # not whole: it does not count, and it is not ours to delete
    store(tmp_path, 6)
    store(tmp_path, 7)
    assert names(tmp_path) == ["step-000000004", "step-000000006", "step-000000007"]
    store(tmp_path, 8, keep=1)
    assert names(tmp_path) == ["step-000000004", "step-000000008"]
    store(tmp_path, 2, keep=1)  # later steps are not older, whatever the clock says
    assert names(tmp_path) == ["step-000000002", "step-000000004", "step-000000008"]


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep = 0"):
        store(tmp_path, 1, keep=0)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "tensor", "state", "message"),
    [
        (ConfigError, torch.zeros(1, dtype=torch.complex64), {}, "complex64 cannot be stored"),
        (TypeError, torch.zeros(1), {"a": {1}}, "set is not JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, error: type[Exception], tensor: Tensor, state: dict, message: str
) -> None:
    with pytest.raises(error, match=message):
        save(tmp_path, 1, {"a-b": {"x": tensor}}, state)
    assert names(tmp_path) == []
    save(tmp_path, 1, {"a-b": {"x": torch.ones(2)}}, {})  # the same name is not the reason
    newest(tmp_path, note=fail).load("a-b", {"x": torch.zeros(2)})


def test_same_step_again_replaces(tmp_path: Path) -> None:
    path = save(tmp_path, 4, content(1), {"old": True})
    (path / "stray").write_text("never mixed with the new one")
    store(tmp_path, 4)
    assert names(tmp_path) == ["step-000000004"] and not (path / "stray").exists()
    check(newest(tmp_path, note=fail), 4)


# --- damage -----------------------------------------------------------------------------------------------------------

Damage = tuple[str, Callable[[Path], object]]


def damages(file: Path, older: Path, seed: int) -> Iterator[Damage]:
    """Every single fault of the matrix for one file."""
    raw, draw = file.read_bytes(), random.Random(seed)
    for length in sorted({0, len(raw) - 1, *draw.sample(range(len(raw)), 16)}):
        yield f"truncate {length}", lambda path, length=length: os.truncate(path, length)
    for _ in range(192):
        place, bit = draw.randrange(len(raw)), draw.randrange(8)
        flipped = bytearray(raw)
        flipped[place] ^= 1 << bit
        yield f"flip {place}.{bit}", lambda path, flipped=bytes(flipped): path.write_bytes(flipped)
    yield "append", lambda path: path.write_bytes(raw + b"\n")
    yield "delete", lambda path: path.unlink()
    yield "directory", lambda path: (path.unlink(), path.mkdir())
    yield "link", lambda path: (path.rename(path.with_name("moved")), path.symlink_to("moved"))
    yield "swap with older", lambda path: path.write_bytes((older / path.name).read_bytes())


def test_every_damage_of_every_file_is_named_and_the_one_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 40)
    older, path, bad = store(tmp_path, 1), store(tmp_path, 2), tmp_path / "bad-step-000000002"
    opened = []
    monkeypatch.setattr(checkpoint, "safe_open", lambda *a, **k: opened.append(a))  # no tensor before the verdict
    count = 0
    for seed, name in enumerate(names(path)):
        raw = (path / name).read_bytes()
        for damage, inflict in damages(path / name, older, seed):
            inflict(path / name)
            notes: list[str] = []
            found = newest(tmp_path, note=notes.append)
            assert found is not None and found.step == 1, (name, damage)
            assert len(notes) == 1, (name, damage)
            begin, end = f"checkpoint {path.name} rejected: {name}, expected ", f"; using {older.name}"
            assert notes[0].startswith(begin) and ", found" in notes[0] and notes[0].endswith(end), notes
            assert not path.exists()
            (bad / name).rmdir() if (bad / name).is_dir() else (bad / name).unlink(missing_ok=True)
            (bad / name).write_bytes(raw)
            bad.rename(path)
            count += 1
    assert newest(tmp_path, note=fail).step == 2
    assert count >= 1500 and not opened


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, so be somebody else for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that an unprivileged user owns and reaches."""
    with tempfile.TemporaryDirectory() as name:
        with contextlib.suppress(PermissionError):
            os.chown(name, 65534, 65534)
        yield Path(name)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "model-00000-of-00001.safetensors", "."])
def test_unreadable_file_is_named(open_folder: Path, name: str) -> None:
    with unprivileged():
        store(open_folder, 1)
        path = store(open_folder, 2)
        (path / name).chmod(0)
        notes: list[str] = []
        assert newest(open_folder, note=notes.append).step == 1
        (open_folder / f"bad-{path.name}" / name).chmod(0o700)
    file = name if name != "." else "MANIFEST.json"
    assert notes == [
        f"checkpoint {path.name} rejected: {file}, expected a readable file, found: Permission denied; "
        "using step-000000001"
    ]


def test_a_rejected_one_that_cannot_be_renamed_stays_and_is_told(open_folder: Path) -> None:
    with unprivileged():
        store(open_folder, 1)
        (store(open_folder, 2) / "state.json").write_text("{}")
        open_folder.chmod(0o500)
        notes: list[str] = []
        assert newest(open_folder, note=notes.append).step == 1
        open_folder.chmod(0o700)
    assert len(notes) == 2 and "step-000000002 stays: " in notes[1]


def test_several_rejected_and_names_taken(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        store(tmp_path, step, keep=3)
    for step in (2, 3):
        (tmp_path / f"step-{step:09d}" / "state.json").write_text("[")
    (tmp_path / "bad-step-000000003").mkdir()
    notes: list[str] = []
    check(newest(tmp_path, note=notes.append), 1)
    assert [note.split(" rejected")[0] for note in notes] == ["checkpoint step-000000003", "checkpoint step-000000002"]
    assert all(note.endswith("; using step-000000001") for note in notes)
    assert names(tmp_path) == ["bad-step-000000002", "bad-step-000000003", "bad-step-000000003-1", "step-000000001"]
    check(newest(tmp_path, note=fail), 1)


def test_never_a_fresh_start_when_none_is_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        (store(tmp_path, step) / "state.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            newest(tmp_path, note=fail)
        assert caught.value.exit_code == 74
        for step in (1, 2):
            assert f"step-{step:09d} rejected: state.json, expected" in str(caught.value)
    for step in (1, 2):
        (tmp_path / f"step-{step:09d}").rename(tmp_path / f"bad-step-{step:09d}")
    with pytest.raises(CheckpointError, match="bad-step-000000001 rejected before; bad-step-000000002 rejected before"):
        newest(tmp_path, note=fail)


def test_checkpoint_under_another_step_or_version_is_refused(tmp_path: Path) -> None:
    store(tmp_path, 1)
    store(tmp_path, 2).rename(tmp_path / "step-000000007")
    notes: list[str] = []
    assert newest(tmp_path, note=notes.append).step == 1
    assert "MANIFEST.json, expected version and step (1, 'step-000000007'), found (1, 'step-000000002')" in notes[0]
    path = store(tmp_path, 3)
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    del manifest["sha256"]
    (path / "MANIFEST.json").write_bytes(checkpoint._seal({**manifest, "version": 2}))
    assert newest(tmp_path, note=notes.append).step == 1
    assert "expected version and step (1, 'step-000000003'), found (2, 'step-000000003')" in notes[-1]


def test_rows_that_no_file_holds_are_missed(tmp_path: Path) -> None:
    path = store(tmp_path, 1)
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    del manifest["sha256"]
    manifest["groups"]["ema"]["weight"]["rows"][0][2] = 4
    (path / "MANIFEST.json").write_bytes(checkpoint._seal(manifest))
    with pytest.raises(CheckpointError, match="step-000000001: ema tensor 'weight': expected all rows, found gaps"):
        newest(tmp_path, note=fail).load("ema", like(content(1))["ema"])


def test_damage_after_verification_is_an_error_too(tmp_path: Path) -> None:
    path = store(tmp_path, 1)
    found = newest(tmp_path, note=fail)
    (path / "ema-00000-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="group 'ema' cannot be read: .*ema-00000-of-00001.safetensors"):
        found.load("ema", like(content(1))["ema"])


# --- crashes ----------------------------------------------------------------------------------------------------------


def die_in_save(folder: Path, step: int, point: str, **options) -> None:
    """Save in a child that is killed at the point."""
    child = os.fork()
    if child == 0:
        checkpoint._at = lambda at: os.kill(os.getpid(), signal.SIGKILL) if at == point else None
        store(folder, step, **options)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_newest_whole_one_is_found(tmp_path: Path, point: str, keep: int) -> None:
    die_in_save(tmp_path, 1, point)
    first = newest(tmp_path, note=lambda _: None)
    assert (first is None) == (POINTS.index(point) < POINTS.index("renamed"))
    store(tmp_path, 2, keep=keep)
    die_in_save(tmp_path, 3, point, keep=keep)
    check(newest(tmp_path, note=lambda _: None), 3 if POINTS.index(point) >= POINTS.index("renamed") else 2)
    store(tmp_path, 4, keep=keep)
    check(newest(tmp_path, note=fail), 4)  # no leftover to note
    assert len(names(tmp_path)) == keep


@pytest.mark.parametrize("point", [*POINTS, "aside"])
def test_killed_while_replacing_the_only_one(tmp_path: Path, point: str) -> None:
    store(tmp_path, 5, keep=1)
    die_in_save(tmp_path, 5, point, keep=1)
    check(newest(tmp_path, note=lambda _: None), 5)
    store(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step-000000006"]


def test_killed_at_random_instants(tmp_path: Path) -> None:
    """A child saves step after step and is killed: what is found is the step it reported last, or the next one."""
    draw, done = random.Random(0), 0
    for _ in range(10):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            for step in itertools.count(done + 1):
                store(tmp_path, step)
                os.write(write, step.to_bytes(4, "big"))
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            reported = pipe.read(4)
            time.sleep(draw.random() * 0.05)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            last = int.from_bytes((reported + pipe.read())[-4:], "big")
        found = newest(tmp_path, note=lambda _: None)
        assert found is not None and found.step in (last, last + 1)
        check(found, found.step)
        done = found.step


def test_refused_while_replacing_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that went aside outlives the refusal, and another one at the very next save."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store(tmp_path, 5, keep=1)
    for point in ("aside", "made"):
        monkeypatch.setattr(checkpoint, "_at", lambda at, point=point: refuse() if at == point else None)
        with pytest.raises(WriteError, match="Input/output error"):
            store(tmp_path, 5, keep=1)
    check(newest(tmp_path, note=fail), 5)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux for the path of a descriptor")
def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename = os.rename
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
    )
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append("rename"), rename(old, new)))
    path = store(tmp_path, 1)
    before = done[: done.index("rename")]
    assert sorted(before) == sorted([*names(path), ".tmp-step-000000001"])
    assert before[-2:] == ["MANIFEST.json", ".tmp-step-000000001"]
    assert done[done.index("rename") :] == ["rename", tmp_path.name]


# --- disks that refuse ------------------------------------------------------------------------------------------------


class Refusing:
    """Makes the k-th call that changes the disk fail; ``calls`` counts them."""

    def __init__(self, patch: pytest.MonkeyPatch, refuse: int, code: int) -> None:
        self.calls, self.refuse, self.error = 0, refuse, OSError(code, os.strerror(code))
        patch.setattr(checkpoint, "open", self.open, raising=False)
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, call: Callable) -> Callable:
        def inner(*args, **kwargs):
            self.calls += 1
            if self.calls == self.refuse:
                raise self.error
            return call(*args, **kwargs)

        return inner

    @contextlib.contextmanager
    def open(self, path: Path, mode: str) -> Iterator:
        if "x" in mode:
            self.counted(lambda: None)()
        with builtins.open(path, mode) as file:
            write, flush = self.counted(file.write), self.counted(file.flush)
            yield SimpleNamespace(write=write, flush=flush, fileno=file.fileno) if "x" in mode else file


CODES = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES]


@pytest.mark.parametrize(
    "codes",
    [CODES, *(pytest.param([code], marks=pytest.mark.slow) for code in CODES)],
    ids=lambda c: "-".join(map(str, c)),
)
def test_refusal_of_any_write_leaves_the_earlier_checkpoints(tmp_path: Path, codes: list[int]) -> None:
    refused = 0
    for k in range(1, 200):
        folder, code = tmp_path / str(k), codes[k % len(codes)]
        for step in (1, 2):
            store(folder, step)
        with pytest.MonkeyPatch.context() as patch:
            disk = Refusing(patch, k, code)
            try:
                store(folder, 3)
            except WriteError as error:
                refused += 1
                assert error.exit_code == 73
                for told in (str(folder), "cannot save step 3", os.strerror(code), "bytes are needed", "are free"):
                    assert told in str(error)
        if disk.calls < k:
            break
        assert ".tmp-step-000000003" not in names(folder)
        found = newest(folder, note=lambda _: None)
        assert found is not None and found.step in (2, 3)
        check(found, found.step)
        store(folder, 4)
        assert len(names(folder)) == 2
        check(newest(folder, note=fail), 4)
        shutil.rmtree(folder)
    # Every call had its turn: the last k was never reached, and the first is the mkdir of a folder that is there.
    assert 25 < k < 199 and refused == k - 2


def test_a_disk_too_small_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    monkeypatch.setattr(checkpoint, "_at", lambda point: pytest.fail(f"got to {point}"))
    size = sum(x.nbytes for tensors in content(2).values() for x in tensors.values())
    with pytest.raises(
        WriteError, match=rf"{tmp_path}: cannot save step 2: .*No space left.*{size} bytes.*100 are free"
    ):
        store(tmp_path, 2)
    assert names(tmp_path) == ["step-000000001"]
    check(newest(tmp_path, note=fail), 1)


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    store(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(WriteError, match="File too large"):
            save(tmp_path, 2, {"model": {"weight": torch.zeros(1000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-000000001"]
    check(newest(tmp_path, note=fail), 1)


def test_a_folder_that_refuses(open_folder: Path) -> None:
    with unprivileged():
        store(open_folder, 1)
        open_folder.chmod(0o500)
        with pytest.raises(WriteError, match="Permission denied.*bytes are needed"):
            store(open_folder, 2)
        check(newest(open_folder, note=fail), 1)
        open_folder.chmod(0o700)
