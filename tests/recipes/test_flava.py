"""FLAVA's recipes: a few steps of tiny models, what they start from, image tokenizers, and the published figures."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from multiway import config, evaluation, pretrained
from multiway.backbones.dvae import DiscreteVAE
from multiway.data import prepare
from multiway.engine.train import train
from multiway.errors import ConfigError, ConversionError
from multiway.recipes import beit, flava, recipe
from multiway.recipes.flava import language_of, vision_of
from multiway.systems.beit import BEiT
from multiway.systems.beit import Config as BEiTConfig
from multiway.systems.flava import FLAVA, PRESETS
from multiway.systems.mae import MAE
from multiway.systems.mae import Config as MAEConfig
from multiway.systems.vit import Config as ViTConfig
from multiway.systems.vit import ViT
from tests.backbones.test_dvae import published
from tests.contracts.toys import randomize

TINY = ["--model.dim=32", "--model.depth=2", "--model.heads=2", "--model.hidden=64", "--model.text_depth=2"]
TINY += ["--model.joint_depth=1", "--model.codes=16", "--data.images=8", "--data.texts=8", "--data.pairs=8"]
TINY += ["--parallel.threads=1", "--schedule.warmup=1"]
SHAPE = {"dim": 32, "depth": 2, "heads": 2, "hidden": 64, "patch": 16, "image_px": 64}


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fiftieth of the embedded scenes."""
    monkeypatch.setattr(prepare, "SCENES", 400)
    monkeypatch.setattr(evaluation, "HELD_OUT", 40)


def steps(out: Path, *options: str, name: str = "quick", count: int = 4) -> list[dict[str, Any]]:
    """Train a few steps of a tiny run and return the lines of the metrics."""
    run = config.override(getattr(flava, name)(), [*TINY, f"--schedule.steps={count}", *options])
    train(run, partial(flava.build, out=out), out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_quick_takes_turns_evaluates_and_is_tuned_to_answers(tmp_path: Path) -> None:
    lines = steps(tmp_path / "quick", '--objective.shares={"image":1,"pair":1,"text":1}', count=9)
    terms = [{name for name in line if f"{name}/accuracy" in line} for line in lines]
    assert {frozenset(own) for own in terms} == {
        frozenset({"image"}), frozenset({"text"}), frozenset({"pair_image", "pair_text", "contrast", "match"})
    }  # fmt: skip
    assert all(np.isfinite(line["loss"]) for line in lines)
    [figures] = [json.loads(line) for line in (tmp_path / "quick" / "eval.jsonl").read_text().splitlines()]
    assert figures["retrieval"]["candidates"] == 40 and figures["zero_shot"]["classes"] == 10
    final = tmp_path / "quick" / "final"
    found = pretrained.load(final)
    assert isinstance(found.model, FLAVA) and found.tokenizer is not None
    assert found.encode_text("a red three").shape == (1, 128)

    run, module = recipe("flava.quick_vqa")
    sizes = [option for option in TINY if not option.startswith(("--data", "--model.codes"))]
    run = config.override(run, [*sizes, f"--init={final}", "--schedule.steps=2", "--data.examples=8"])
    train(run, partial(module.build, out=tmp_path / "vqa"), tmp_path / "vqa")
    tuned = pretrained.load(tmp_path / "vqa" / "final").model
    assert tuned.config.answers > 1 and not tuned.config.masked


def test_all_kinds_together_in_micro_batches(tmp_path: Path) -> None:
    given = ("--objective.shares={}", "--optim.matrices=adamw", "--objective.weights.match=2")
    one, two = (steps(tmp_path / n, *given, f"--parallel.micro={n}", count=2) for n in ("1", "2"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert {"image", "text", "pair_image", "pair_text", "contrast", "match"} <= one[0].keys()


def test_folders_of_pictures_with_captions(tmp_path: Path) -> None:
    rng, root = np.random.default_rng(0), tmp_path / "data"
    root.mkdir()
    rows = []
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(root / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "captions": [" ".join(rng.permutation(["red", "dog", "near"]))]}))
    (root / "table.jsonl").write_text("\n".join(rows) + "\n")
    given = ("--model.image_px=32", "--data.vocab=64", "--objective.views=2")
    lines = steps(tmp_path / "out", f"--data.root={root}", *given, name="tiny", count=2)
    assert len(lines) == 2
    with pytest.raises(ConfigError, match=r"takes \d+ (texts|pictures with captions)"):
        (root / "table.jsonl").unlink()
        steps(tmp_path / "other", f"--data.root={root}", name="tiny")


# --- what a run starts from


def small(**changes: Any) -> FLAVA:
    shape = dataclasses.replace(PRESETS["flava_tiny_patch16_64"], **SHAPE, text_depth=2, joint_depth=1, **changes)
    return randomize(FLAVA(shape), seed=1).eval()  # type: ignore[return-value]


SOURCES = {
    "vit": lambda: ViT(ViTConfig(**SHAPE, classes=7)),
    "vit of other pictures": lambda: ViT(ViTConfig(**{**SHAPE, "image_px": 96})),
    "mae": lambda: MAE(MAEConfig(**SHAPE, decoder_dim=16, decoder_depth=1, decoder_heads=2)),
    "beit": lambda: BEiT(BEiTConfig(**SHAPE, bias="none", positions="learned", layer_scale=0.0, codes=512)),
    "flava": small,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_encoder_of_pictures_starts_as_another_models(source: Any) -> None:
    other, model = randomize(source()).eval(), small()
    other.set_image_size(64)
    given = vision_of(other, model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict({**before, **given})
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if isinstance(other, FLAVA):
        want = other.encode(image=image).values
        assert torch.equal(given["heads.image.decoder.weight"], other.state_dict()["heads.image.decoder.weight"])
    else:
        want = other.norm(other.encoder(image)).flatten(0, 1)
    torch.testing.assert_close(model.encode(image=image).values, want, rtol=0, atol=1e-3)  # epsilons of norms differ
    changed = {name for name, x in model.state_dict().items() if not torch.equal(before[name], x)}
    assert changed and all(name.startswith(("encoder.vision.", "heads.image.")) for name in changed)


def test_models_that_do_not_fit_are_refused() -> None:
    model = small()
    for other, said in (
        (BEiT(BEiTConfig(**SHAPE, codes=512)), "gamma_1"),
        (BEiT(BEiTConfig(**SHAPE, bias="shared", layer_scale=0.0, codes=512)), "bias.table"),
        (ViT(ViTConfig(**{**SHAPE, "depth": 3})), r"has also encoder.vision.trunk.blocks.2"),
        (ViT(ViTConfig(**{**SHAPE, "hidden": 32})), r"lacks encoder.vision.trunk.blocks.0.ffn.fc1.weight"),
    ):
        with pytest.raises(ConfigError, match=said):
            vision_of(other, model)
    with pytest.raises(ConfigError, match="flava.base_text left, found a ViT"):
        language_of(ViT(ViTConfig(**SHAPE)), model)


def test_a_run_starts_from_folders_of_both(tmp_path: Path) -> None:
    steps(tmp_path / "text", "--data.images=0", "--data.pairs=0", count=1)
    words = tmp_path / "text" / "final"
    vision = randomize(ViT(ViTConfig(**SHAPE)))
    pretrained.save_pretrained(vision, tmp_path / "vit")
    options = [*TINY, f"--objective.vision={tmp_path / 'vit'}", f"--objective.language={words}"]
    run = config.override(flava.quick(), options)
    model = flava.build(run, tmp_path / "out").objective.model
    own, text = model.state_dict(), pretrained.load(words).model.state_dict()
    assert torch.equal(own["encoder.vision.trunk.positions"], vision.state_dict()["encoder.positions"])
    for name in text:
        if name.startswith(("encoder.language.", "heads.text.")):
            assert torch.equal(own[name], text[name]), name
    with pytest.raises(ConfigError, match="--init names all weights"):
        flava.build(dataclasses.replace(run, init=str(words)), tmp_path / "out")


# --- image tokenizers


@pytest.mark.parametrize("hub", [True, False], ids=["folder of the hub", "file"])
def test_visual_tokens_are_dalles_where_a_file_holds_its_encoder(hub: bool, tmp_path: Path) -> None:
    encoder = randomize(DiscreteVAE(16, codes=16, dim=8))
    state = published(encoder, hub)  # type: ignore[arg-type]
    (tmp_path / "dvae").mkdir()
    path = tmp_path / "dvae" / "model.safetensors"
    save_file({name: x.contiguous() for name, x in state.items()}, path)
    if hub:
        (tmp_path / "dvae" / "config.json").write_text('{"model_type": "flava_image_codebook"}')
        path = path.parent
    run = config.override(flava.quick(), [*TINY, f"--objective.tokenizer={path}", "--objective.views=0"])
    job = flava.build(run, tmp_path / "out")
    step = next(step for step in range(99) if "pair" in job.batches.places(step))
    batch = job.batches.batch(step)[0]
    objective: Any = job.objective
    assert "image_code" not in batch
    codes: Tensor = objective.codes(batch)
    assert torch.equal(codes[8:], encoder(batch["image"][8:])) and len(codes[8:].unique()) > 1
    assert all("tokenizer" not in name for name in objective.state_dict())
    assert beit.build(  # other recipes name it alike
        config.override(beit.quick(), ["--model.codes=16", f"--objective.tokenizer={path}", "--objective.views=0"]),
        tmp_path / "beit",
    ).objective.tokenizer.codes == 16  # fmt: skip
    with pytest.raises(ConversionError, match="not those of DALL-E's encoder"):
        flava.build(config.override(run, ["--model.codes=32"]), tmp_path / "out")


# --- as published


def test_published_figures() -> None:
    """masked.md 9.3, 9.4."""
    run = flava.base()
    assert run.schedule.steps * run.objective.shares["pair"] == pytest.approx(150_000, abs=1)
    assert run.objective.shares == {"image": 0.15, "pair": 0.7, "text": 0.15} and run.objective.mismatch == 0.1
    assert (run.data.images, run.data.pairs, run.data.texts) == (8192, 8192, 8192)
    assert (run.data.text_tokens, run.data.window, run.data.pair_scale, run.data.image_scale) == (77, 512, 0.9, 0.9)
    assert (run.optim.lr, run.optim.betas, run.optim.weight_decay) == (1e-3, (0.9, 0.999), 0.1)
    assert (run.schedule.warmup, run.schedule.shape) == (10_000, "cosine")
    collate: Any = flava.assemble(dataclasses.replace(run, model=PRESETS["flava_tiny_patch16_64"]), words())[1]
    assert collate.hide_patches(np.random.default_rng(0)).sum() == round(75 / 196 * 16)
    assert collate.whole_words == {"pair"} and (collate.text_ratio, collate.pair_ratio) == (0.15, 0.15)

    text = flava.base_text()
    assert (text.data.texts, text.data.window, text.schedule.steps) == (2048, 512, 125_000)
    assert (text.optim.lr, text.optim.betas, text.optim.eps, text.optim.weight_decay) == (5e-4, (0.9, 0.98), 1e-6, 0.01)
    assert (text.schedule.shape, text.schedule.final_lr) == ("linear", 0.0)

    for name, px, lr, count in (("vqa", 480, 1e-4, 44_000), ("entailment", 224, 1e-5, 24_000)):
        run = getattr(flava, f"base_{name}")()
        assert (run.model.image_px, run.optim.lr, run.schedule.steps) == (px, lr, count)
        assert (run.data.examples, run.optim.weight_decay, run.schedule.warmup) == (256, 0.01, 2000)


def words() -> Any:
    from tests.contracts.toys import WORDS

    return dataclasses.replace(WORDS, begins=np.ones(40, dtype=bool))
