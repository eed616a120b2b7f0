"""The benchmarks run, count what they say they count, and measure every figure the table asks for."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.house.source import ROOT

FOLDER = ROOT / "benchmarks"
PEERS = {"torchscale": {1, 2, 3, 4, 5, 6, 8}, "transformers": {10}}
"""Peers and the rows that need them."""


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name, as it sees its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def check(*rows: int) -> dict[str, list]:
    """Lines of the table by verdict, measured at toy size."""
    command = [sys.executable, str(FOLDER / "table.py"), "--check", "--repeats", "1", "--threads", "1", "--rows"]
    done = subprocess.run([*command, *map(str, rows)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["table"]


@pytest.mark.parity
@pytest.mark.skipif(not importlib.util.find_spec("torchscale"), reason="torchscale is not installed")
def test_outputs_agree_and_the_table_has_its_figures():
    table = check(1, 5)
    assert [line["row"] for line in table] == [1, 1, 5, 5, 5, 5]
    assert all(0 < line["low"] <= line["median"] <= line["high"] for line in table)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.timeout(1200)
def test_every_row_is_measured():
    absent = [rows for name, rows in PEERS.items() if not importlib.util.find_spec(name)]
    rows = sorted(set(range(1, 12)).difference(*absent))
    table = check(*rows)
    assert {line["row"] for line in table} == set(rows)
    assert not [line for line in table if line["verdict"] == "not measured"]


@pytest.mark.parity
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_vision_systems_and_their_peers_do_the_same_step(script):
    """Every row, its model cut to a few blocks; `check_equal` ends the run where they differ."""
    vision = script("vision")
    for row in vision.ROWS.values():
        sides = vision.both(row, Namespace(quick=True, batch=1, device="cpu", compile=False))
        assert vision.check_equal(sides).keys() == vision.TOLERANCE.keys()
        sides["ours"].step("bf16", "cpu")
        assert sides["ours"].first.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_vision_reports_time_and_memory():
    command = [sys.executable, str(FOLDER / "vision.py"), "--quick", "--repeats", "1", "--threads", "1"]
    done = subprocess.run([*command, "--rows", "vit_small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert set(figures) == {f"vit_small {dtype} {what}" for dtype in ("fp32", "bf16") for what in ("time", "memory")}
    assert all(figure["low"] > 0 for figure in figures.values())


def test_every_goal_names_a_script(script):
    table = script("table")
    assert {goal.row for goal in table.GOALS} == set(range(1, 13))
    assert {goal.call for goal in table.GOALS} == set(table.CALLS)
    assert all((FOLDER / call.file).is_file() for call in table.CALLS.values())


@pytest.mark.parametrize(
    ("floor", "goal", "median", "expected"),
    [
        (1.25, 1.42, 1.42, "goal"),
        (1.25, 1.42, 1.41, "floor"),
        (1.25, 1.42, 1.24, "below"),
        (0.75, 0.55, 0.55, "goal"),
        (0.75, 0.55, 0.60, "floor"),
        (0.75, 0.55, 0.76, "below"),
    ],
)
def test_less_is_better_where_the_goal_is_smaller(script, floor, goal, median, expected):
    assert script("table").Goal(1, "", "", "", floor, goal).verdict(median) == expected


def test_a_gpu_is_asked_for_its_rows(script):
    table = script("table")
    rows = {
        mode: {goal.row for goals in table.wanted(mode, []).values() for goal in goals} for mode in ("full", "cuda")
    }
    assert rows == {"full": set(range(1, 12)), "cuda": {1, 2, 3, 4, 5, 6, 12}}
    assert all(table.CALLS[name].cuda for name in table.wanted("cuda", []))
    assert set(table.wanted("quick", [9])) == {"loader"}


def test_a_figure_is_of_quotients_round_by_round(script):
    timing = script("timing")
    assert timing.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": 3}


def test_useful_flops_are_those_of_the_products(script, monkeypatch):
    """What torch counts in a forward without padding; the backward doubles all but the first map's input."""
    reference, matmul = script("reference"), script("matmul")
    shape = reference.comparable("tiny", 64)
    model = reference.BEiT3(shape)
    work = reference.draw("pair", shape, 3, "cpu")
    run = reference.our_pass(model, work)
    monkeypatch.setattr("multiway.nn.linear.mkl_is_slow", lambda: False)  # torch counts its own products only
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    embedding = 2 * 3 * 16**2 * shape.dim * 3 * 16
    assert matmul.useful_flops(shape, [17 + 64] * 3, 3) == 3 * counter.get_total_flops() - embedding


def test_the_image_tokenizer_has_the_size_of_the_published_one(script):
    with torch.device("meta"):
        encoder = script("pretrain").DiscreteEncoder()
        assert encoder(torch.empty(2, 3, 112, 112)).shape == (2, 14 * 14)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 53_786_240


def test_lengths_are_what_the_settings_say(script):
    reference = script("reference")
    generator = torch.Generator().manual_seed(0)
    captions = reference.draw_lengths("caption", 1000, generator)
    assert captions.min() >= 9 and captions.max() <= 20 and 14 <= captions.double().mean() <= 15
    uniform = reference.draw_lengths("uniform", 121, generator)
    assert sorted(uniform.tolist()) == list(range(8, 129))
    assert reference.draw_lengths("full", 2, generator).tolist() == [64, 64]
