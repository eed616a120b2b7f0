"""Where the time goes: every instant counted once, nothing changed by looking."""

from __future__ import annotations

import dataclasses
import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from multiway.engine.timeline import SHARES, STEP, Operator, Summary, cause, summarise
from multiway.engine.train import train
from multiway.errors import Preempted, WriteError
from multiway.report.profile import write as page
from multiway.run import Checkpoint, Log, Run
from tests.engine.ranks import outcome
from tests.engine.tiny import PLAIN, Twist, build, left, tiny

# --- time lines made by hand ------------------------------------------------------------------------------------------


def event(name: str, begin: float, end: float, *, kind: str = "cpu_op", thread: int = 1, id: int = 0) -> dict[str, Any]:
    times = {"ts": begin, "dur": end - begin}
    return {"ph": "X", "cat": kind, "name": name, "tid": thread, "args": {"External id": id}, **times}


def step(number: int, begin: float, end: float) -> dict[str, Any]:
    return event(f"{STEP}{number}", begin, end, kind="user_annotation")


def shares_of(events: list[dict[str, Any]], *numbers: int) -> tuple[dict[str, float], Summary]:
    """Shares above zero, and the whole summary."""
    found = summarise({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}, numbers)
    assert list(found.shares) == list(SHARES)
    assert sum(found.shares.values()) == pytest.approx(1)
    for one in found.steps:
        assert sum(one["shares"].values()) == pytest.approx(1)
    return {name: share for name, share in found.shares.items() if share > 1e-9}, found


def test_an_instant_of_a_cpu_belongs_to_the_innermost_operator():
    events = [
        step(7, 0, 100),
        event("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 10, kind="user_annotation"),
        event("aten::copy_", 2, 8),  # of the loading
        event("aten::linear", 10, 40),
        event("aten::addmm", 12, 38),
        event("aten::copy_", 12, 14),
        event("aten::scaled_dot_product_attention", 40, 60),
        event("aten::mul", 45, 50),  # of the attention
        event("Optimizer.step#Muon.step", 70, 90, kind="user_annotation"),
        event("aten::baddbmm", 72, 80),
        event("aten::gelu", 90, 95),
        event("gloo:all_reduce", 88, 100, thread=2),  # hidden until 95
        event("aten::mm", 0, 100, thread=3),  # not ours
        event("aten::mm", 100, 130),  # after the step
        step(8, 130, 230),
        event("aten::mm", 130, 230),
    ]
    shares, found = shares_of(events, 7, 8)
    of_all = {
        "gemm": 128, "attention": 20, "elementwise": 5, "optimiser": 20, "copies": 2, "collectives": 5, "data": 10,
        "host": 10, "between": 30,
    }  # fmt: skip
    assert shares == pytest.approx({name: x / 230 for name, x in of_all.items()})
    assert found.seconds == pytest.approx(230e-6) and found.device == "cpu"
    assert [(one["step"], one["seconds"]) for one in found.steps] == [
        (7, pytest.approx(1e-4)),
        (8, pytest.approx(1e-4)),
    ]
    rows = {(row.name, row.share): (round(1e6 * row.seconds), row.calls) for row in found.operators}
    assert rows["aten::mm", "gemm"] == (100, 1)
    assert rows["aten::addmm", "gemm"] == (24, 1) and rows["aten::linear", "gemm"] == (4, 1)
    assert rows["aten::copy_", "copies"] == (2, 1)
    assert rows["aten::baddbmm", "optimiser"] == (8, 1)
    assert rows["aten::mul", "attention"] == (5, 1)
    assert not [name for name, _ in rows if name.startswith(STEP)]


def test_an_instant_of_a_gpu_belongs_to_its_kernel_and_an_idle_one_to_what_is_waited_for():
    kernel = partial(event, kind="kernel", thread=7)
    events = [
        step(1, 0, 100),
        event("enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", 0, 20, kind="user_annotation"),
        event("aten::addmm", 20, 22, id=1),
        event("aten::bmm", 22, 24, id=2),
        event("Optimizer.step#AdamW.step", 24, 30, kind="user_annotation"),
        event("aten::_foreach_add_", 25, 28, id=3),
        event("gloo:all_reduce", 60, 75, thread=2),
        kernel("nvjet_tst_128x64", 10, 40, id=1),  # 10-20: the batch is waited for, but the device works
        kernel("sm90_xmma_gemm", 40, 50, id=2),
        kernel("multi_tensor_apply_kernel", 50, 55, id=3),
        kernel("ncclDevKernel_AllGather", 45, 70, thread=8, id=4),  # shown from 55 on
        kernel("triton_poi_fused_gelu", 80, 85, id=99),
        event("Memcpy HtoD (Pinned -> Device)", 85, 90, kind="gpu_memcpy", thread=7, id=98),
    ]
    shares, found = shares_of(events, 1)
    expected = {"gemm": 30, "attention": 10, "elementwise": 5, "optimiser": 5, "copies": 5, "collectives": 20}
    expected |= {"data": 10, "host": 15}
    assert shares == pytest.approx({name: x / 100 for name, x in expected.items()})
    rows = {row.name: (row.share, round(1e6 * row.seconds)) for row in found.operators}
    assert rows["aten::addmm"] == ("gemm", 30) and rows["aten::bmm"] == ("attention", 10)
    assert rows["triton_poi_fused_gelu"] == ("elementwise", 5)
    assert found.device == "cuda"


@pytest.mark.parametrize(
    ("share", "names"),
    {
        "gemm": "aten::mm aten::addmm aten::_addmm_activation aten::linear aten::convolution_backward aten::_scaled_mm "
        "aten::_grouped_mm mkldnn::_linear_pointwise aten::matmul aten::mkldnn_linear aten::mkldnn_convolution",
        "attention": "aten::bmm aten::baddbmm aten::_softmax aten::_softmax_backward_data "
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward aten::_flash_attention_forward",
        "elementwise": "aten::add_ aten::gelu_backward aten::native_layer_norm aten::_log_softmax aten::masked_fill_ "
        "aten::sum",
        "optimiser": "Optimizer.step#AdamW.step aten::_fused_adamw_ aten::_foreach_norm",
        "copies": "aten::copy_ aten::_to_copy aten::cat aten::index_select aten::index_copy_ aten::clone aten::zero_ "
        "aten::contiguous aten::embedding_dense_backward aten::zeros_like aten::new_zeros",
        "collectives": "c10d::allreduce_ FSDP::all_gather fsdp::all_gather_copy_in record_param_comms",
        "host": "aten::view aten::as_strided aten::empty_like aten::t aten::detach aten::_local_scalar_dense "
        "PadBackward autograd::engine::evaluate_function torch::autograd::AccumulateGrad",
    }.items(),
)  # fmt: skip
def test_operators_by_name(share, names):
    assert {name: cause(name) for name in names.split()} == dict.fromkeys(names.split(), share)


# --- real runs --------------------------------------------------------------------------------------------------------


def profiled(run: Run, out: Path, twist: Twist = PLAIN) -> dict[str, Any]:
    """Train under the profiler; the summary."""
    train(run, partial(build, out=out, twist=twist), out, profile=page)
    return json.loads((out / "profile" / "summary.json").read_text())


def traced(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_profiled_run_is_the_same_run_and_every_instant_is_counted(tmp_path, capsys):
    run = tiny(10, checkpoint=Checkpoint(every=5))  # among the recorded steps a save and an evaluation
    train(run, partial(build, out=tmp_path / "plain"), tmp_path / "plain")
    found = profiled(run, tmp_path / "run")
    assert left(tmp_path / "run") == left(tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()

    assert list(found["shares"]) == list(SHARES)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-9)
    assert min(found["shares"].values()) >= 0
    for share in ("gemm", "attention", "elementwise", "optimiser", "copies", "data", "host", "between"):
        assert found["shares"][share] > 0, share
    assert found["shares"]["collectives"] == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in found["steps"]] == [4, 5, 6, 7, 8]
    for one in found["steps"]:  # the recorded range encloses what the loop itself measures
        assert one["seconds"] >= rows[one["step"] - 1]["seconds"] - 1e-4
    assert sum(one["seconds"] for one in found["steps"]) < found["seconds"]
    assert len(found["operators"]) == 20
    assert sum(row["seconds"] for row in found["operators"]) <= found["seconds"]

    files = {path.name for path in (tmp_path / "run" / "profile").iterdir()}
    assert files == {"step-8.trace.json.gz", "summary.json", "summary.html"}
    names = {one.get("name") for one in traced(tmp_path / "run" / "profile" / "step-8.trace.json.gz")}
    assert {"aten::mm", "Optimizer.step#AdamW.step", *(f"{STEP}{n}" for n in range(3, 9))} <= names
    told = capsys.readouterr().err
    assert "profile of steps 4 to 8" in told and f"gemm {100 * found['shares']['gemm']:.1f} %" in told


@pytest.mark.parametrize(("steps", "counted"), [(1, [1]), (5, [1, 2, 3, 4, 5]), (7, [3, 4, 5, 6, 7])])
def test_where_fewer_steps_are_left_fewer_pass_or_count(steps, counted, tmp_path):
    found = profiled(tiny(steps, log=Log()), tmp_path)
    assert [one["step"] for one in found["steps"]] == counted


def test_a_resumed_run_is_profiled_after_its_own_warm_up_and_stays_exact(tmp_path):
    run = tiny(16, checkpoint=Checkpoint(every=1000), log=Log())
    train(run, partial(build, out=tmp_path / "plain"), tmp_path / "plain")
    out = tmp_path / "run"
    with pytest.raises(Preempted):
        profiled(run, out, Twist(at={6: "term"}))
    first = json.loads((out / "profile" / "summary.json").read_text())
    assert [one["step"] for one in first["steps"]] == [4, 5, 6]  # what there was
    found = profiled(run, out)
    assert [one["step"] for one in found["steps"]] == [10, 11, 12, 13, 14]
    assert left(out) == left(tmp_path / "plain")
    assert {path.name for path in (out / "profile").glob("*.gz")} == {"step-6.trace.json.gz", "step-14.trace.json.gz"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_loader_shows_as_waiting_for_data(workers, tmp_path):
    run = tiny(6, log=Log())
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, workers=workers))
    found = profiled(run, tmp_path, Twist(slow=0.02))
    assert found["shares"]["data"] > 0.5
    assert found["operators"][0]["share"] == "data"


def test_every_process_writes_its_trace_and_the_first_the_summary(tmp_path):
    out = tmp_path / "run"
    assert outcome(2, tiny(4, log=Log()), out, log=tmp_path / "log", profile=page) == [0, 0], (
        tmp_path / "log"
    ).read_text()
    files = {path.name for path in (out / "profile").iterdir()}
    assert files == {*(f"step-4-rank-{rank}.trace.json.gz" for rank in (0, 1)), "summary.json", "summary.html"}
    found = json.loads((out / "profile" / "summary.json").read_text())
    assert found["facts"]["processes"] == 2
    assert found["shares"]["collectives"] > 0
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-9)
    for rank in (0, 1):
        assert any(
            one.get("name") == f"{STEP}4" for one in traced(out / "profile" / f"step-4-rank-{rank}.trace.json.gz")
        )


def test_a_finished_run_has_nothing_to_profile(tmp_path, capsys):
    run = tiny(2, log=Log())
    train(run, partial(build, out=tmp_path), tmp_path)
    train(run, partial(build, out=tmp_path), tmp_path, profile=page)
    assert "nothing to profile: all 2 steps are done" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "profile").write_text("")
    with pytest.raises(WriteError, match="step-1.trace.json.gz: cannot write: .* or train without --profile"):
        train(tiny(1, log=Log()), partial(build, out=tmp_path), tmp_path, profile=page)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_tells_all_and_needs_no_network(tmp_path):
    shares = dict.fromkeys(SHARES, 0.0) | {"gemm": 0.5, "host": 0.375, "data": 0.125}
    facts = {"recipe": "a<x>", "items": 64, "device": "CPU", "processes": 1, "threads": 2, "workers": 0, "torch": "2"}
    facts |= {"precision": "bf16", "compile": True, "recompute": 0, "micro": 1, "before": None, "trace": "step-2.gz"}
    steps = [{"step": n, "seconds": 0.25, "shares": shares} for n in (1, 2)]
    page(tmp_path, Summary(steps, 0.5, shares, [Operator("aten::mm<T>", "gemm", 0.2, 6)], "cpu", facts))
    text = (tmp_path / "summary.html").read_text(encoding="utf-8")
    figures = ["50.0\u202f%", "37.5\u202f%", "12.5\u202f%", "250.0\u202fms", "256", "1.60×"]
    for told in (*figures, "a&lt;x&gt;", "aten::mm&lt;T&gt;"):
        assert told in text, told
    assert "a<x>" not in text and "aten::mm<T>" not in text and "$" not in text
    assert "No time at all: attention, " in text
    assert "src=" not in text and "@import" not in text and "<script" not in text
