"""VLMo's recipes: the three stages hand their weights on, two steps each; vision is the BEiT's; published figures."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from multiway import config, evaluation, pretrained
from multiway.data import prepare
from multiway.engine.train import train
from multiway.errors import ConfigError
from multiway.nn.multiway import Multiway
from multiway.recipes import questions, recipe, vlmo
from multiway.systems import beit
from multiway.systems.vlmo import LAYOUTS, VLMo, reads_text
from tests.contracts.toys import SHAPE, VLMO, randomize


def two_steps(name: str, out: Path, *options: str) -> list[dict[str, Any]]:
    """Train two steps of a quick recipe and return the lines of the metrics."""
    run, _ = recipe(f"vlmo.{name}")
    kind = "images" if run.data.images else "pairs" if run.data.pairs else "texts"
    given = ["--schedule.steps=2", "--schedule.warmup=1", "--parallel.threads=1", f"--data.{kind}=8", *options]
    train(config.override(run, given), partial(vlmo.build, out=out), out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state(out: Path) -> dict[str, torch.Tensor]:
    return pretrained.load(out).model.state_dict()


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fiftieth of the embedded scenes."""
    monkeypatch.setattr(prepare, "SCENES", 400)
    monkeypatch.setattr(evaluation, "HELD_OUT", 40)


def test_every_stage_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    vision, text, pairs, tuned = (tmp_path / name for name in ("vision", "text", "pairs", "tuned"))
    two_steps("quick_vision", vision, "--objective.views=0", "--model.codes=8")
    [first, second] = two_steps("quick_text", text, f"--objective.vision={vision}")
    assert {"words", "words/accuracy"} <= first.keys() and second["applied"]
    seen, read = state(vision), state(text)
    assert torch.equal(read["vision.embed.weight"], seen["encoder.embed.weight"])
    name = "encoder.blocks.3.attention.{}linear.weight"
    assert torch.equal(read[name.format("qkv.experts.shared.")], seen[name.format("qkv.")])
    assert torch.equal(read["bias.table"][:49, 4:8], seen["encoder.bias.table"][:49])  # of all layers, those of patches
    assert read["bias.table"][52:].any()  # words look at each other after two steps

    [first, _] = two_steps("quick", pairs, f"--init={text}/final", "--optim.lr=0", "--optim.weight_decay=0")
    assert {"words", "contrast", "match"} <= first.keys()
    fused = state(pairs)
    assert all(torch.equal(fused[name], x) for name, x in read.items())
    heads = {name.partition(".")[0] for name in fused.keys() - read.keys()}
    assert heads == {
        "match_head", "image_projection", "text_projection", "logit_scale", "joint_image_projection",
        "joint_text_projection", "joint_logit_scale",
    }  # fmt: skip
    [figures] = [json.loads(line) for line in (pairs / "eval.jsonl").read_text().splitlines()]
    assert figures["retrieval"]["candidates"] == 40 and figures["zero_shot"]["classes"] == 10

    two_steps("quick_retrieval", tuned, f"--init={pairs}/final", "--optim.lr=0", "--optim.weight_decay=0")
    kept = state(tuned)
    assert all(torch.equal(fused[name], x) for name, x in kept.items()) and "mlm_head.dense.weight" not in kept


def test_micro_batches_make_the_same_steps(tmp_path: Path) -> None:
    plain = ("--optim.matrices=adamw", "--model.drop_path=0.2")
    one = two_steps("quick", tmp_path / "one", *plain)
    four = two_steps("quick", tmp_path / "four", *plain, "--parallel.micro=4")
    for term in ("loss", "words", "contrast", "match"):
        assert [line[term] for line in four] == pytest.approx([line[term] for line in one], rel=1e-4), term


@pytest.mark.parametrize("bias", ["layer", "shared"])
def test_pictures_are_read_as_the_beit_read_them(bias: Any) -> None:
    source = randomize(beit.BEiT(beit.Config(**SHAPE, bias=bias, classes=0 if bias == "shared" else 5)))
    model: VLMo = randomize(VLMo(VLMO), seed=1)  # type: ignore[assignment]
    given = vlmo.vision_of(source, model)
    model.load_state_dict({**model.state_dict(), **given})
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        want = source.encode(image=image).values  # type: ignore[operator]
        model.types.zero_()  # the one thing that is added to them
        model.encoder.norm = Multiway(torch.nn.Identity, ["shared"])  # a BEiT for tuning has none of every token
        torch.testing.assert_close(model.encode(image=image).values, want, rtol=0, atol=1e-5)
    assert not model.bias.table[52:].any()  # type: ignore[union-attr]


def test_a_model_of_pairs_becomes_one_of_questions_about_two_larger_pictures(tmp_path: Path) -> None:
    before: VLMo = randomize(VLMo(VLMO))  # type: ignore[assignment]
    pretrained.save_pretrained(before, tmp_path / "vlmo")
    shape = dataclasses.replace(
        VLMO, image_px=48, text_tokens=9, pictures=2, answers=3, masked=False, match=False, contrast="none"
    )
    model = VLMo(shape)
    model.init_weights()
    head = model.answer_head.out.weight.clone()  # type: ignore[union-attr]
    questions.start_from(model, str(tmp_path / "vlmo"))
    assert torch.equal(model.types, before.types[[0, 1, 1]])
    assert torch.equal(model.language.positions, before.language.positions[:9])
    assert torch.equal(model.answer_head.out.weight, head)  # type: ignore[union-attr]
    before.set_image_size(48)
    assert torch.equal(model.bias.table, before.bias.table)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [{"depth": 4}, {"depth": 2}, {"dim": 64}, {"hidden": 32}, {"layer_scale": 0.0}])
def test_a_beit_of_another_shape_is_refused(change: dict[str, Any]) -> None:
    source = beit.BEiT(beit.Config(**{**SHAPE, **change}))
    with pytest.raises(ConfigError, match="another shape"):
        vlmo.vision_of(source, VLMo(VLMO))


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    for options, said in (
        (["--init=a", "--objective.vision=b"], "leave objective.vision empty"),
        (["--data.pairs=1"], "has no other"),
        (["--model.match=False"], "needs all heads"),
    ):
        with pytest.raises(ConfigError, match=said):
            vlmo.build(config.override(vlmo.quick(), options), tmp_path)
    with pytest.raises(ConfigError, match="vision is a BEiT"):
        vlmo.vision_of(VLMo(VLMO), VLMo(VLMO))


@pytest.mark.parametrize(
    ("size", "lr", "tuned"), [("base", 2e-4, 3e-5), ("base_plus", 1e-4, 3e-5), ("large", 5e-5, 2e-5)]
)
def test_published_figures(size: str, lr: float, tuned: float) -> None:
    """masked.md 5.4."""
    stages = [recipe(f"vlmo.{name}")[0] for name in (f"{size}_text", size)]
    for run in stages:
        assert run.schedule == dataclasses.replace(
            run.schedule, steps=200_000, warmup=2500, final_lr=0.0, shape="linear"
        )
        assert (run.optim.betas, run.optim.eps, run.optim.weight_decay) == ((0.9, 0.98), 1e-8, 0.01)
        assert run.model.drop_path == 0.1 and run.objective.ratio == 0.15 and run.objective.whole_words
    text, pairs = stages
    assert (text.data.texts, text.data.window, text.model.text_tokens, text.optim.lr) == (1024, 196, 196, 2e-4)
    assert (pairs.data.pairs, pairs.data.text_tokens, pairs.model.image_px, pairs.optim.lr) == (1024, 40, 224, lr)
    assert pairs.objective.augment and pairs.data.pair_scale == 0.5
    for name, steps in (("retrieval", 3000), ("flickr", 1500)):
        run, _ = recipe(f"vlmo.{size}_{name}")
        assert (run.data.pairs, run.model.image_px, run.optim.lr) == (3072, 384, tuned)
        assert (run.schedule.steps, run.schedule.warmup) == (steps, steps // 10)
        assert run.model.contrast == "alone" and not run.model.masked


def test_the_stage_of_texts_is_as_published() -> None:
    """masked.md 5.4: what is not frozen, by the original's names."""
    layout = LAYOUTS["official"]
    trained = ("text_embeddings", "token_type_embeddings", "mlp_text", "norm2_text", "mlm_score")
    trained += ("relative_position_bias_table", "transformer.norm")
    for name in VLMo(VLMO).state_dict():
        [theirs] = layout.names(name)
        assert reads_text(name) == any(part in theirs for part in trained), theirs
