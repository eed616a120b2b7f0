"""What `multiway plan` foretells is what happens."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from multiway import cli, config, roofline
from multiway.errors import ConfigError
from multiway.estimate import Layout, estimate, parameters
from multiway.recipes import beit3, flava
from multiway.rehearsal import Operation, Stage, Trace
from multiway.run import Run
from multiway.systems.beit3 import BEiT3
from tests.real_step import items_of, real_step

ROOT = Path(__file__).parents[1]
MIB = 2**20

# Large enough that what libraries keep for themselves (some 30 MB) counts little, small enough for seconds.
WIDE = ["--model.dim=256", "--model.hidden=1024", "--model.depth=4", "--model.vocab=4096"]
MEASURED = {
    "fp32": [*WIDE, "--data.pairs=48", "--optim.matrices=adamw"],
    "bf16, recomputed, averaged": [
        *WIDE,
        "--data.pairs=160",
        "--parallel.precision=bf16",
        "--parallel.recompute=1",
        "--optim.ema=0.9",
    ],  # fmt: skip
}
TOY = ["--model.dim=32", "--model.heads=2", "--model.hidden=48", "--model.image_px=32", "--data.pairs=4"]
TOY += ["--model.depth=3", "--model.vocab=512", "--data.vocab=512"]
TOY += ["--data.images=2", "--data.texts=2", "--model.codes=8", "--parallel.precision=fp32"]


def quick(*settings: str) -> Run:
    """The quick recipe with overrides."""
    return config.override(beit3.quick(), settings)


def toy(run: Run, *settings: str) -> Run:
    """A recipe at toy size with overrides."""
    return config.override(run, [*TOY, *settings])


# ------------------------------------------------------------------------------------------------------------ memory


def foretold_and_measured(run_settings: list[str], devices: int = 1) -> tuple[float, float]:
    """Peak of a step in MiB, rehearsed and real."""
    run = quick(*run_settings)
    stage = Stage(run, beit3.assemble, {}, devices=devices)
    micro, update = stage.micro(items_of(run, devices), run.parallel.recompute), stage.update()
    foretold = Layout(devices, run.parallel.shard, run.parallel.micro).memory(stage, micro, update).total
    # glibc then gives every freed tensor back: peaks, not fragmentation.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT / "src")}
    launch = (
        ["-m"] if devices == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m"]
    )
    command = [sys.executable, *launch, "tests.real_step", "beit3.quick", *run_settings]
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return foretold / MIB, json.loads(done.stdout.splitlines()[-1]) / MIB


peaks = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read where Linux shows them")


@peaks
@pytest.mark.parametrize("settings", MEASURED.values(), ids=MEASURED)
def test_memory_is_within_a_tenth_of_the_measured_peak(settings):
    foretold, measured = foretold_and_measured(settings)
    assert measured > 250
    assert foretold == pytest.approx(measured, rel=0.1)


@peaks
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [["full", "1"], ["full", "2"], ["replicate", "1"]], ids=["sharded", "accumulated", "whole"]
)
def test_memory_of_two_processes_is_within_a_tenth_of_the_measured_peak(settings):
    shard, micros = settings
    common = ["--model.dim=384", "--model.hidden=1536", "--model.depth=6", "--model.vocab=16384", "--data.pairs=32"]
    common += ["--objective.contrast=false", "--model.contrast=false"]  # so that a step can be split
    foretold, measured = foretold_and_measured(
        [*common, "--optim.matrices=adamw", f"--parallel.shard={shard}", f"--parallel.micro={micros}"], devices=2
    )
    assert measured > 350
    assert foretold == pytest.approx(measured, rel=0.1)


def test_peak_counts_what_is_there_at_once():
    events = [(0, 100), (1, 50), (0, -100), (2, 30), (1, -50), (3, 60)]
    trace = Trace(Counter(), events, {2: True, 3: False})
    assert trace.peak() == 150
    assert trace.gradient == 90
    late = Trace(Counter(), [*events, (4, 80)], {2: True, 3: False})
    assert late.peak() == 170  # both gradients and the last
    assert late.peak(blocks=0, others=0) == 150  # gradients lie elsewhere
    assert late.peak(blocks=0.5) == 155


def test_the_largest_micro_batch_fits_and_hardly_more_would():
    run = toy(beit3.small())
    room = 20e6
    report = estimate(run, beit3.assemble, hardware="h100", memory=room)
    for row in report["layouts"]:
        stage = Stage(run, beit3.assemble, {}, gpu=True)
        micro, update = stage.micro(row["largest"], row["recompute"]), stage.update()
        assert 0.9 * room < Layout(1, row["shard"], 1).memory(stage, micro, update).total <= 1.01 * room


def test_nothing_fits_where_the_weights_do_not():
    report = estimate(toy(beit3.small()), beit3.assemble, hardware="h100", memory=1e5)
    assert [row["largest"] for row in report["layouts"]] == [None, None]


def test_sharding_divides_what_is_held_and_accumulation_keeps_gradients_whole():
    run = toy(beit3.small())
    stage = Stage(run, beit3.assemble, {})
    micro, update = stage.micro(items_of(run, 1), 0), stage.update()
    alone = Layout(1, "replicate", 1).memory(stage, micro, update)
    count = sum(p.numel() for p in stage.objective.parameters())
    assert alone.optimizer == pytest.approx(8 * count, rel=0.001)
    assert alone.gathered == 0
    whole, sharded, summed = (
        Layout(4, shard, micros).memory(stage, micro, update)
        for shard, micros in (("replicate", 1), ("full", 1), ("full", 2))
    )
    assert whole.weights == alone.weights
    assert (sharded.weights, sharded.optimizer) == (alone.weights / 4, alone.optimizer / 4)
    assert sharded.total < whole.total
    assert summed.step > sharded.step


def test_recomputing_blocks_takes_less_memory_and_more_work():
    run = quick("--data.pairs=24")
    stage = Stage(run, beit3.assemble, {})
    kept, again = stage.micro(items_of(run, 1), 0), stage.micro(items_of(run, 1), run.model.depth)
    assert again.peak() < 0.8 * kept.peak()
    assert again.flops > 1.2 * kept.flops
    assert stage.micro(items_of(run, 1), 0).events == kept.events  # nothing is left behind


# ------------------------------------------------------------------------------------------------- parameters, FLOPs


def test_parameters_are_told_by_expert():
    with torch.device("meta"):
        base, giant = (parameters(BEiT3(run().model)) for run in (beit3.base, beit3.giant))
    assert base["total"] == 276_510_730  # as released, with both heads
    assert base["image expert"] == base["text expert"] == sum(base[f"{x} expert"] for x in ("image", "text")) / 2
    assert giant["image expert"] / 40 == giant["pair expert"] / 3  # a vision-language expert in the top 3 layers
    assert sum(base.values()) == 2 * base["total"]


def test_flops_are_those_of_the_formula():
    run = toy(beit3.small(), "--objective.views=1", "--data.text_tokens=12", "--data.window=20")
    flops = estimate(run, beit3.assemble, hardware="h100")["flops"]["forward"]
    shape, patches = run.model, 4
    patch = 3 * shape.patch**2

    def tokens(n: int) -> int:
        linear = 2 * n * (4 * shape.dim**2 + 2 * shape.dim * shape.hidden)
        return shape.depth * (linear + 4 * n**2 * shape.dim)

    def words(hidden: int) -> int:
        return 2 * hidden * shape.dim * shape.vocab

    hidden = round(0.4 * patches)
    image = 2 * patches * patch * shape.dim + 2 * hidden * shape.dim * shape.codes
    assert flops["image"] == image + tokens(1 + patches)
    assert flops["text"] == tokens(20) + words(round(0.15 * 18))
    assert flops["pair"] == image + tokens(1 + patches + 12) + words(round(0.5 * 10))


def test_a_step_takes_three_times_the_forward():
    run = quick("--data.pairs=16")
    stage = Stage(run, beit3.assemble, {})
    assert stage.micro(items_of(run, 1), 0).flops / stage.forward_flops(items_of(run, 1)) == pytest.approx(3, rel=0.06)


# -------------------------------------------------------------------------------------------------------------- time


def operation(name: str, kind: str, flops: int = 0, moved: int = 8) -> Operation:
    """One that does nothing."""
    return Operation(name, (), None, kind, flops, moved)


HARDWARE = roofline.Hardware(name="x", matmul={"fp32": 1e9}, bandwidth=1e9, memory=1e9, kernel=1e-6, peak={"fp32": 1e9})


def test_the_longer_of_computing_and_moving_counts():
    assert HARDWARE.seconds(operation("a", "matmul", flops=10**9, moved=10**6)) == 1
    assert HARDWARE.seconds(operation("b", "matmul", flops=10**3, moved=10**8)) == pytest.approx(0.1)
    assert HARDWARE.seconds(operation("c", "other")) == 1e-6
    assert HARDWARE.seconds(operation("d", "attention", flops=10**9)) == pytest.approx(1 / HARDWARE.attention)


def test_the_probe_corrects_what_it_could_not_run_by_what_it_could(monkeypatch):
    monkeypatch.setattr(roofline, "replay", lambda operation, device: 3 * HARDWARE.seconds(operation))
    small, large = operation("a", "matmul", flops=10**6), operation("b", "matmul", flops=10**11)
    other = operation("c", "other", moved=10**9)
    clock = roofline.probe(HARDWARE, Counter({small: 2, large: 1, other: 1}), seconds=1.0)
    assert clock(small) == pytest.approx(3e-3)
    assert clock(large) == pytest.approx(300)  # would take too long: the ratio of the small one
    assert clock(other) == pytest.approx(1)  # nothing like it was run


def test_an_operation_is_run_again_on_tensors_like_its_own():
    run = toy(beit3.small())
    stage = Stage(run, beit3.assemble, {})
    calls = stage.micro(items_of(run, 1), 0).calls
    gelu = next(x for x in calls if x.function == torch.ops.aten.gelu.default)
    made = roofline.rebuilt(gelu, torch.device("cpu"))()
    assert (tuple(made.shape), made.dtype) == (gelu.leaves[0].shape, torch.float32)
    assert torch.equal(made, torch.nn.functional.gelu(torch.full(made.shape, 0.5)))


@pytest.mark.slow
def test_time_is_within_three_tenths_of_a_measured_step():
    """Other work on the machine may fall on one side alone: the calmest of five turns counts."""
    run = quick("--data.pairs=48")
    step = real_step(run)
    step()

    def seconds() -> float:
        took = []
        for _ in range(5):
            begun = time.perf_counter()
            step()
            took.append(time.perf_counter() - begun)
        return statistics.median(took)

    turns = []
    for _ in range(5):
        before = seconds()
        foretold = estimate(run, beit3.assemble)["time"]["step"]
        after = seconds()
        turns.append((abs(before - after) / after, foretold / statistics.mean([before, after])))
    assert 0.7 < min(turns)[1] < 1.3, turns


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_prints_json(capsys):
    command = ["plan", "beit3.small", "--hardware", "h100", "--devices", "2", "--tokens", "6", "--json"]
    cli.main([*command, *TOY, "--parallel.micro", "2"])
    report = json.loads(capsys.readouterr().out)
    assert report["items"] == {
        "step": {"image": 2, "pair": 4, "text": 2}, "micro": {"image": 1, "pair": 1, "text": 1}, "micros": 2,
    }  # fmt: skip
    assert {(row["shard"], row["recompute"]) for row in report["layouts"]} == {
        (shard, depth) for shard in ("replicate", "full") for depth in (0, 3)
    }
    days = report["time"]["steps"] * report["time"]["step"] / 86400
    assert report["time"]["days"] == pytest.approx(days)


def test_the_command_prints_tables(capsys):
    cli.main(["plan", "beit3.small", "--hardware", "a100", "--memory", "0.0001", *TOY])
    text = capsys.readouterr().out
    assert "NVIDIA A100" in text
    assert "does not fit" in text


@pytest.mark.parametrize(
    ("settings", "asked", "said"),
    [
        ([], {"hardware": "h1000"}, r"unknown hardware 'h1000'.*here.*h100"),
        ([], {"hardware": "h100", "devices": 0}, "at least one device, got 0"),
        (["--parallel.micro=2"], {"hardware": "h100"}, "parallel.micro must be 1"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(settings, asked, said):
    with pytest.raises(ConfigError, match=said):
        estimate(quick(*settings), beit3.assemble, **asked)


@pytest.mark.slow
def test_the_largest_recipe_is_planned_without_memory():
    report = estimate(beit3.giant(), beit3.assemble, hardware="h100", devices=64)
    assert report["memory"]["weights"] == pytest.approx(4 * report["parameters"]["total"] / 64, rel=0.01)


# ------------------------------------------------------------------------------------------------- one kind in a step


def test_a_run_whose_steps_take_turns_is_the_mean_of_its_kinds() -> None:
    sizes = ["--model.dim=32", "--model.heads=2", "--model.hidden=48", "--model.depth=1", "--model.text_depth=1"]
    sizes += ["--model.joint_depth=1", "--data.pairs=4", "--data.images=8", "--data.texts=2"]
    run = config.override(flava.quick(), [*sizes, '--objective.shares={"image": 1, "pair": 2, "text": 1}'])
    found = estimate(run, flava.assemble, hardware="a100")
    shares = {"image": 0.25, "pair": 0.5, "text": 0.25}
    names = {"image": "images", "pair": "pairs", "text": "texts"}
    alone = {}
    for kind in names:
        none = [f"--data.{name}=0" for other, name in names.items() if other != kind]
        alone[kind] = estimate(config.override(run, none), flava.assemble, hardware="a100")
    assert found["shares"] == shares and found["items"]["step"] == {"image": 8, "pair": 4, "text": 2}
    for part, name in (("time", "step"), ("time", "device"), ("flops", "step")):
        want = sum(share * alone[kind][part][name] for kind, share in shares.items())
        assert found[part][name] == pytest.approx(want) and found[part][name] < alone["pair"][part][name]
    assert found["time"]["items_per_second"] == pytest.approx(4.5 / found["time"]["step"])
    assert found["memory"] == max((x["memory"] for x in alone.values()), key=lambda memory: memory["total"])
    assert found["flops"]["forward"].keys() == shares.keys() and found["time"]["steps"] == 1000
    together = estimate(config.override(run, ["--objective.shares={}"]), flava.assemble, hardware="a100")
    assert "shares" not in together and together["memory"]["total"] > found["memory"]["total"]


def test_joined_micro_batches_are_rehearsed_together() -> None:
    """Contrast in two micro-batches: the same work again in the backward, activations of one of them at a time."""
    from multiway.recipes import clip

    run = config.override(clip.quick(), ["--data.pairs=32"])
    whole, parts = (
        estimate(config.override(run, [f"--parallel.micro={n}"]), clip.assemble, hardware="a100") for n in (1, 4)
    )
    assert parts["items"]["micro"] == {"pair": 8} and parts["items"]["micros"] == 4
    assert parts["memory"]["step"] < 0.5 * whole["memory"]["step"]
    assert parts["flops"]["forward"]["pair"] == pytest.approx(whole["flops"]["forward"]["pair"], rel=0.02)
    assert parts["time"]["device"] > whole["time"]["device"]
