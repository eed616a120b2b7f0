"""Checkpoints between different numbers of processes: 2 -> 1 -> 2 with FSDP2, and faults on one rank of two.

Run as a script, this file is one rank: ``python test_checkpoint_distributed.py SCENARIO FOLDER RANK PORT``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from multiway.engine import checkpoint
from multiway.engine.checkpoint import newest, save
from multiway.errors import CheckpointError, ConfigError, WriteError


class Odd(nn.Module):
    """Sizes that two ranks cannot share evenly: 5 rows, 3 rows, 1 row, and a scalar buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 1)
        self.table = nn.Parameter(torch.randn(3, 2, 2))
        self.register_buffer("scale", torch.tensor(2.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).sum() * self.scale + self.table.square().sum()


Sharding = Callable[[nn.Module], None]


def build(seed: int, shard: Sharding) -> tuple[Odd, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Odd()
    shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The live tensors; the optimiser's by parameter name, its step counters included."""
    optim = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return {"model": dict(model.state_dict()), "optim": optim}


def poison(tensors: dict[str, dict[str, Tensor]]) -> None:
    with torch.no_grad():
        for tensor in (x for group in tensors.values() for x in group.values()):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(float("nan"))


def whole(tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every tensor with all its rows, under GROUP/NAME."""
    return {
        f"{group}/{name}": (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
        for group, named in tensors.items()
        for name, x in named.items()
    }


def fill(found: checkpoint.Checkpoint, shard: Sharding) -> dict[str, dict[str, Tensor]]:
    """Live tensors of another model and optimiser, filled from a checkpoint alone."""
    model, optimizer = build(1, shard)
    advance(model, optimizer, 1)
    tensors = groups(model, optimizer)
    poison(tensors)
    for group, into in tensors.items():
        found.load(group, into)
    return tensors


# --- one rank of two --------------------------------------------------------------------------------------------------


def full(module: nn.Module) -> None:
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))


def hybrid(module: nn.Module) -> None:
    fully_shard(module, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def fails(kind: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def train_and_save(folder: Path, rank: int) -> dict[str, Any]:
    model, optimizer = build(0, full)
    advance(model, optimizer, 3)
    tensors = groups(model, optimizer)
    save(folder, 3, tensors, {"done": 3})
    before = whole(tensors)
    if rank == 0:
        save_file(before, folder / "before.safetensors")
    return {"rows": {name: len(x.to_local()) for name, x in tensors["model"].items() if isinstance(x, DTensor)}}


def load_and_break(folder: Path, rank: int) -> dict[str, Any]:
    """Everything two ranks do after the one-process run saved step 4."""
    told: dict[str, Any] = {}
    notes: list[str] = []

    def find() -> checkpoint.Checkpoint:
        found = newest(folder, note=notes.append)
        assert found is not None
        return found

    expected = load_file(folder / "before.safetensors")

    def equal(tensors: dict[str, dict[str, Tensor]]) -> bool:
        present = whole(tensors)
        return present.keys() == expected.keys() and all(torch.equal(present[k], expected[k]) for k in expected)

    # 1 -> 2, sharded and replicated, and from each to the other
    tensors = fill(find(), full)
    told["one_to_full"] = equal(tensors), find().state
    save(folder, 5, tensors, {})
    tensors = fill(find(), hybrid)
    told["full_to_hybrid"] = equal(tensors)
    told["hybrid_files"] = sorted(path.name for path in save(folder, 6, tensors, {}).iterdir())
    tensors = fill(find(), full)
    told["hybrid_to_full"] = equal(tensors)

    # a placement that cannot be stored
    columns = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (2,)), [Shard(1)])
    told["columns"] = fails(ConfigError, lambda: save(folder, 7, {"model": {"columns": columns}}, {}))

    # the disk of one rank refuses: both are told, nothing is left
    original = checkpoint._write

    def refuse(path: Path, chunks: Any) -> dict[str, Any]:
        if rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, chunks)

    checkpoint._write = refuse
    told["refused"] = fails(WriteError, lambda: save(folder, 7, tensors, {}))
    checkpoint._write = original
    dist.barrier()
    told["after_refusal"] = sorted(path.name for path in folder.iterdir())

    # a file damaged: both fall back to the same step, one reports
    save(folder, 7, tensors, {}, keep=3)
    if rank == 0:
        for step, name in [(7, "model-00001-of-00002.safetensors"), (6, "state.json")]:
            file = folder / f"step-{step:09d}" / name
            file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    dist.barrier()
    notes.clear()
    found = find()
    told["fallback"] = found.step
    told["notes"] = list(notes)
    told["fallback_equal"] = equal(fill(found, full))

    # none whole: both refuse to go on
    dist.barrier()
    if rank == 0:
        (folder / "step-000000005" / "optim-00001-of-00002.safetensors").unlink()
    dist.barrier()
    told["none"] = fails(CheckpointError, find)

    # one rank is killed inside a save: the other gets an error, not a hang
    save(folder, 8, tensors, {})
    checkpoint._at = lambda at: os.kill(os.getpid(), signal.SIGKILL) if (at, rank) == ("written", 1) else None
    if rank == 1:
        (folder / "rank-1.json").write_text(json.dumps(told))
    told["survivor"] = fails(RuntimeError, lambda: save(folder, 9, tensors, {}))
    return told


def main(scenario: str, folder: Path, rank: int, port: str) -> None:
    store = dist.TCPStore("127.0.0.1", int(port), 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    told = {"train_and_save": train_and_save, "load_and_break": load_and_break}[scenario](folder, rank)
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    if scenario == "train_and_save":
        dist.destroy_process_group()
    os._exit(0)  # a group whose other rank was killed cannot be left in order


# --- the tests --------------------------------------------------------------------------------------------------------


def launch(scenario: str, folder: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """Two ranks in one process group of their own, which is killed with everything in it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, scenario, str(folder)]
    first = subprocess.Popen([*command, "0", port], env=environment, process_group=0)
    ranks = [first, subprocess.Popen([*command, "1", port], env=environment, process_group=first.pid)]
    try:
        codes = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return codes, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_one_two_processes_and_faults_between_them(tmp_path: Path) -> None:
    """One test, because starting the ranks is what takes the time."""
    codes, two = launch("train_and_save", tmp_path)
    assert codes == [0, 0]
    expected = load_file(tmp_path / "before.safetensors")

    # Each rank wrote its own rows, the second none of a single one.
    rows = [rank["rows"] for rank in two]
    assert rows[0] == {"first.weight": 3, "first.bias": 3, "second.weight": 1, "second.bias": 1, "table": 2}
    assert rows[1] == {"first.weight": 2, "first.bias": 2, "second.weight": 0, "second.bias": 0, "table": 1}
    found = newest(tmp_path, note=lambda _: None)
    assert found is not None
    files = [f"{group}-{rank:05d}-of-00002.safetensors" for group in ("model", "optim") for rank in (0, 1)]
    assert sorted(path.name for path in found.path.iterdir()) == ["MANIFEST.json", *files, "state.json"]

    # One process reads them, to the bit.
    tensors = fill(found, lambda _: None)
    one = whole(tensors)
    assert one.keys() == expected.keys()
    assert all(torch.equal(one[name], expected[name]) for name in expected)
    assert expected["optim/first.weight.step"] == 3 and expected["model/scale"] == 2.5
    assert expected["optim/first.weight.exp_avg"].abs().sum() > 0
    save(tmp_path, 4, tensors, {"done": 4})

    # Two read what one wrote, however they are sharded; one replica writes.
    codes, two = launch("load_and_break", tmp_path)
    for rank in two:
        assert rank["one_to_full"] == [True, {"done": 4}]
        assert rank["full_to_hybrid"] is True and rank["hybrid_to_full"] is True
        assert "only Shard(0) and Replicate()" in rank["columns"]
    files = ["MANIFEST.json", "model-00000-of-00002.safetensors", "optim-00000-of-00002.safetensors", "state.json"]
    assert two[0]["hybrid_files"] == files

    # The disk of one rank refuses: an error on both, and nothing is left.
    for rank in two:
        for told in ("cannot save step 7", "No space left on device", "model-00001-of-00002.safetensors"):
            assert told in rank["refused"]
        left = [name for name in rank["after_refusal"] if "step" in name]
        assert left == ["step-000000005", "step-000000006"]

    # Damage: both fall back to the same step, the first reports; with none whole neither starts afresh.
    assert two[0]["fallback"] == two[1]["fallback"] == 5
    assert two[0]["fallback_equal"] and two[1]["fallback_equal"]
    rejected = [note for note in two[0]["notes"] if "rejected" in note]
    for note, what in zip(
        rejected, ["7 rejected: model-00001-of-00002.safetensors", "6 rejected: state.json"], strict=True
    ):
        assert note.startswith(f"checkpoint step-00000000{what}, expected SHA-256")
        assert note.endswith("; using step-000000005")
    assert not two[1]["notes"]
    for rank in two:
        assert "step-000000005 rejected: optim-00001-of-00002.safetensors, expected" in rank["none"]
        assert "bad-step-000000007 rejected before" in rank["none"]

    # A rank killed inside a save: the other gets an error, the checkpoint before is the newest.
    assert codes == [0, -signal.SIGKILL] and two[0]["survivor"]
    found = newest(tmp_path, note=lambda _: None)
    assert found is not None and found.step == 8


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
