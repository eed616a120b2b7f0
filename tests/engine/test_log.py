"""Lines that survive kills, progress, event files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from multiway.engine import log
from multiway.engine.log import Lines, Meter, TensorBoard
from multiway.errors import WriteError


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_are_appended_as_json_proper(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "rows.jsonl")
    lines.write([{"step": 1, "loss": 0.5}])
    lines.write([{"step": 2, "loss": float("nan"), "norm": float("inf"), "key": "a\u2028b"}, {"step": 3}])
    lines.sync()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = [json.loads(line, parse_constant=refuse) for line in lines.path.read_text().split("\n")[:-1]]
    assert found == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "norm": None, "key": "a\u2028b"},
        {"step": 3},
    ]


def test_cutting_keeps_whole_lines_up_to_a_step(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "rows.jsonl")
    lines.cut(3)  # none yet
    assert not lines.path.exists()
    lines.write({"step": step} for step in (1, 2, 2, 3, 4))
    with lines.path.open("a") as file:
        file.write('[1]\n{"other": 1}\nnot json\n{"step": 2}')  # the last is without its end: cut short by a kill
    lines.cut(3)
    assert steps(lines.path) == [1, 2, 2, 3]
    lines.cut(2)
    lines.write([{"step": 3}])
    assert steps(lines.path) == [1, 2, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    lines.cut(0)
    assert lines.path.read_text() == ""


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("")
    with pytest.raises(WriteError, match="folder/rows.jsonl: cannot write: Not a directory") as caught:
        Lines(tmp_path / "folder" / "rows.jsonl").write([{"step": 1}])
    assert caught.value.exit_code == 73


def test_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    meter = Meter(50, 10, shown=True)
    for done in range(11, 51):
        now += 0.5
        meter.step(done, 1.25, 6)
    meter.close()
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "step 31/50  loss 1.250  2.0 steps/s  12 samples/s  10 s left"
    assert told[-1].startswith("step 50/50") and len(told) == 2


def test_only_the_first_process_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(1, 0, shown=False)
    meter.step(1, 1.0, 1)
    meter.close()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    meter = Meter(4, 1, shown=True)
    assert meter.bar is not None
    meter.step(3, 2.5, 1)
    task = meter.bar.tasks[0]
    assert (task.completed, task.total) == (3, 4) and task.fields["note"].startswith("loss 2.500")
    meter.close()


def test_event_files_hold_the_numbers_of_a_row(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, 0)
    for step in (1, 2):
        board.write({"step": step, "loss": 1 / step, "applied": True, "name": "x"})
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["scalars"] == ["loss", "applied"]
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


def test_without_tensorboard_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    board = TensorBoard(tmp_path / "events", 0)
    board.write({"step": 1, "loss": 1.0})
    board.close()
    assert not (tmp_path / "events").exists()
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # installed, but broken
    board = TensorBoard(tmp_path / "events", 0)
    board.write({"step": 1, "loss": 1.0})
    assert not (tmp_path / "events").exists()
    silent = TensorBoard(None, 0)
    silent.write({"step": 1})
    silent.close()
