"""VLMo: published sizes and names, experts, what it answers, its objectives over micro-batches, the stage of texts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.data.collate import MaskedCollate, MatchCollate
from multiway.engine.optim import build_optimizers
from multiway.errors import ConfigError
from multiway.nn import block
from multiway.nn.position import resize_bias_table
from multiway.plan import Plan, make_plan
from multiway.rehearsal import Recorder
from multiway.run import Optim
from multiway.systems.vlmo import (
    LAYOUTS,
    PRESETS,
    Config,
    MaskedContrastMatching,
    MaskedLanguageModeling,
    VLMo,
    padded_texts,
    reads_text,
    whole_text,
)
from multiway.tasks import retrieval
from multiway.types import Across, Batch
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import DUAL, GRID, VLMO, WORDS, randomize, sample

PATCHES = GRID[0] * GRID[1]
COLLATE = MatchCollate(words=WORDS, grid=GRID)
TUNED: dict[str, Any] = {"masked": False, "match": False, "contrast": "none"}


def on_meta(config: Config) -> VLMo:
    with torch.device("meta"):
        return VLMo(config)


def parameters(config: Config) -> int:
    return sum(p.numel() for p in on_meta(config).parameters())


def pictures(count: int, px: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, px, px), generator=torch.Generator().manual_seed(count)).byte()


TEXTS = [torch.tensor([0, 7, 9, 2]), torch.tensor([5]), torch.tensor([0, 2])]


@pytest.fixture
def model() -> VLMo:
    return randomize(VLMo(VLMO)).eval()  # type: ignore[return-value]


# --- published sizes and names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "total"),
    [  # masked.md 5.1
        ("base", {}, 202_445_470),
        ("base_plus", {}, 184_980_734),
        ("large", {}, 599_127_102),
        ("base", {"image_px": 480, "answers": 3129, **TUNED}, 182_410_905),
        ("base", {"image_px": 384, "answers": 2, "pictures": 2, **TUNED}, 178_601_954),
        ("base", {"image_px": 384, **TUNED, "contrast": "alone"}, 177_413_857),
    ],
    ids=["base", "base_plus", "large", "vqa", "nlvr2", "retrieval"],
)
def test_published_models_have_their_number_of_parameters(name: str, changes: dict[str, Any], total: int) -> None:
    assert parameters(dataclasses.replace(PRESETS[f"vlmo_{name}_patch16_224"], **changes)) == total


OFFICIAL = {  # masked.md 5.5
    "relative_position_bias_table": (1126, 144), "logit_scale": (), "logit_vl_scale": (),
    "transformer.cls_token": (1, 1, 768), "transformer.patch_embed.proj.weight": (768, 3, 16, 16),
    "transformer.blocks.0.gamma_1": (768,), "transformer.blocks.0.norm1.weight": (768,),
    "transformer.blocks.0.attn.q_bias": (768,), "transformer.blocks.0.attn.v_bias": (768,),
    "transformer.blocks.0.attn.qkv.weight": (2304, 768), "transformer.blocks.0.attn.proj.bias": (768,),
    "transformer.blocks.9.norm2_text.weight": (768,), "transformer.blocks.9.mlp_imag.fc1.weight": (3072, 768),
    "transformer.blocks.10.norm2_vl.bias": (768,), "transformer.blocks.11.mlp_vl.fc2.weight": (768, 3072),
    "transformer.norm.weight": (768,), "text_embeddings.word_embeddings.weight": (30522, 768),
    "text_embeddings.position_embeddings.weight": (40, 768), "text_embeddings.token_type_embeddings.weight": (2, 768),
    "text_embeddings.LayerNorm.weight": (768,), "token_type_embeddings.weight": (2, 768),
    "pooler.dense.weight": (768, 768), "mlm_score.bias": (30522,), "mlm_score.transform.dense.weight": (768, 768),
    "mlm_score.transform.LayerNorm.bias": (768,), "mlm_score.decoder.weight": (30522, 768),
    "itm_score.fc.weight": (2, 768), "itm_score.fc.bias": (2,), "itc_text_proj.fc.weight": (768, 768),
    "itc_image_proj.fc.weight": (768, 768), "itc_vl_text_proj.fc.weight": (768, 768),
    "itc_vl_image_proj.fc.weight": (768, 768),
}  # fmt: skip


def test_official_names_and_shapes() -> None:
    theirs = to_theirs(on_meta(PRESETS["vlmo_base_patch16_224"]).state_dict(), LAYOUTS["official"])
    assert {name: tuple(theirs[name].shape) for name in OFFICIAL} == OFFICIAL
    assert not [name for name in theirs if ".9.mlp_vl" in name or "pos_embed" in name]
    plus = to_theirs(on_meta(PRESETS["vlmo_base_plus_patch16_224"]).state_dict(), LAYOUTS["official"])
    assert plus["transformer.pos_embed"].shape == (1, 197, 544)
    assert not [name for name in plus if "gamma" in name or "bias_table" in name]
    assert "transformer.blocks.21.mlp_vl.fc1.weight" in plus and "transformer.blocks.20.mlp_vl.fc1.weight" not in plus


def test_heads_of_answers_are_called_by_their_task(model: VLMo) -> None:
    for pictures_, layout, want in (
        (1, "official", {"vqa_classifier.0.weight": (64, 32), "vqa_classifier.3.weight": (7, 64)}),
        (2, "official_nlvr2", {"nlvr2_classifier.0.weight": (64, 64), "token_type_embeddings.weight": (3, 32)}),
    ):
        config = dataclasses.replace(VLMO, answers=7, pictures=pictures_, **TUNED)
        theirs = to_theirs(VLMo(config).state_dict(), LAYOUTS[layout])
        assert {name: tuple(theirs[name].shape) for name in want} == want
        assert LAYOUTS[layout].config == {"pictures": pictures_}


def test_buffers_of_older_files_are_dropped(model: VLMo) -> None:
    layout = LAYOUTS["official"]
    theirs = to_theirs(model.state_dict(), layout)
    buffers = ("text_embeddings.position_ids", "relative_position_index", "text_relative_position_index")
    more = {name: torch.zeros(1) for name in (*buffers, "text_imag_relative_position_index")}
    back = to_ours({**theirs, **more}, layout, model.state_dict())
    assert all(torch.equal(back[name], x) for name, x in model.state_dict().items())


# --- experts and biases -----------------------------------------------------------------------------------------------


def changed_by(model: VLMo, inputs: dict[str, Any], part: str) -> bool:
    """Whether the tokens depend on the parameters whose names hold a part."""
    before = model.encode(**inputs).values
    state = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    after = model.encode(**inputs).values
    model.load_state_dict(state)
    return not torch.equal(before, after)


def test_experts_read_what_is_theirs(model: VLMo) -> None:
    image, text = {"image": pictures(3)}, {"text": TEXTS}
    low, last = "blocks.0.ffn.experts.", "blocks.2.ffn.experts."
    with torch.no_grad():
        for part, reads in {
            low + "image": (True, False, True), low + "text": (False, True, True), last + "image": (True, False, False),
            last + "text": (False, True, False), last + "pair": (False, False, True),
        }.items():  # fmt: skip
            found = (changed_by(model, inputs, part) for inputs in (image, text, {**image, **text}))
            assert tuple(found) == reads, part
    assert not any("blocks.1.ffn.experts.pair" in name for name, _ in model.named_parameters())


def test_a_samples_tokens_do_not_depend_on_its_batch(model: VLMo) -> None:
    image = pictures(3)
    plan = make_plan(
        {
            "image": {"image": [PATCHES + 1] * 3},
            "pair": {"image": [PATCHES + 1] * 3, "text": [4, 1, 2]},
            "text": {"text": [4, 1, 2]},
        }
    )
    with torch.no_grad():
        every = model(plan, image=torch.cat([image, image]), text=torch.cat([*TEXTS, *TEXTS]))
        got = [every.values[plan.sample == i] for i in range(9)]
        for i, text in enumerate(TEXTS):
            alone = [model.encode(image=image[i : i + 1]), model.encode(image=image[i : i + 1], text=[text])]
            alone.append(model.encode(text=[text]))
            for kind, tokens in enumerate(alone):
                torch.testing.assert_close(got[3 * kind + i], tokens.values, rtol=0, atol=1e-5)


def test_other_sizes_of_pictures_and_of_texts(model: VLMo) -> None:
    assert model.bias is not None
    table, places = model.bias.table.detach().clone(), model.language.positions.detach().clone()
    model.adapt(dataclasses.replace(VLMO, image_px=48, text_tokens=20, pictures=2))
    assert torch.equal(model.bias.table, resize_bias_table(table, (4, 4), (6, 6), 397))
    assert torch.equal(model.language.positions, F.pad(places, (0, 0, 0, 6)))
    assert model.config == dataclasses.replace(VLMO, image_px=48, text_tokens=20, pictures=2)
    assert torch.equal(model.types[2], model.types[1]) and len(model.types) == 3
    assert model.encode(image=pictures(2, 48), text=[torch.arange(4, 24), TEXTS[0]]).values.shape == (2 * 37 + 24, 32)
    model.set_pictures(0)
    model.set_text_tokens(5)
    assert len(model.types) == 2 and len(model.language.positions) == 5
    with pytest.raises(ConfigError, match="at most 5"):
        model.encode(text=[torch.arange(6)])
    learned = VLMo(dataclasses.replace(VLMO, positions="learned"))
    learned.set_image_size(48)
    assert learned.vision.positions is not None and len(learned.vision.positions) == 37
    with pytest.raises(ConfigError, match="it cannot read 15"):
        learned.set_text_tokens(15)


# --- what it answers --------------------------------------------------------------------------------------------------


def apart() -> Batch:
    return DUAL({"pair": [sample(0, "pair", i) for i in range(5)]})


def test_vectors_are_those_of_pictures_and_texts_alone(model: VLMo) -> None:
    batch = apart()
    with torch.no_grad():
        image, text = model.embed_pairs(batch["plan"], image=batch["image"], text=batch["text"])
        twice = model.embed_twice(batch["plan"], image=batch["image"], text=batch["text"])
        torch.testing.assert_close(image, model.embed(model.encode(image=batch["image"]), "image"), rtol=0, atol=1e-6)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(5))
    assert torch.equal(twice[0], image) and torch.equal(twice[1], text)
    assert not torch.allclose(twice[2], image, atol=0.1) and not torch.allclose(twice[3], text, atol=0.1)
    with pytest.raises(ConfigError, match="reads every patch"):
        model.embed_pairs(batch["plan"], image=batch["image"], text=batch["text"], keep=torch.zeros(5, 2))
    with pytest.raises(ConfigError, match="compares nothing"):
        VLMo(dataclasses.replace(VLMO, contrast="none")).embed(model.encode(text=TEXTS), "text")


def test_dropped_branches_are_those_of_the_draws_whichever_experts_read(
    model: VLMo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in model.encoder.blocks:
        layer.drop_rate = 0.5
    batch, draws = apart(), torch.rand(2 * VLMO.depth, 10, generator=torch.Generator().manual_seed(0))
    inputs = {"image": batch["image"], "text": batch["text"], "draws": draws}
    with torch.no_grad():
        skipping = model.embed_twice(batch["plan"], **inputs)
        monkeypatch.setattr(block, "skips", lambda device: False)
        computing = model.embed_twice(batch["plan"], **inputs)
        without = model.embed_twice(batch["plan"], **{**inputs, "draws": None})
    for some, every, plain in zip(skipping, computing, without, strict=True):
        torch.testing.assert_close(some, every, rtol=0, atol=1e-5)
        assert not torch.allclose(some, plain, atol=1e-2)


def test_a_pair_is_judged_by_its_pooled_first_word(model: VLMo) -> None:
    with torch.no_grad():
        odds = retrieval.match(model, pictures(3), TEXTS)
        scores = model.match_head(model.pooler(model.encode(image=pictures(3), text=TEXTS).prefix("text")))
    torch.testing.assert_close(odds.sigmoid(), scores.softmax(1)[:, 1])
    with pytest.raises(ConfigError, match="judges no pairs"):
        retrieval.match(VLMo(dataclasses.replace(VLMO, match=False)), pictures(3), TEXTS)


def plan_of(pictured: int) -> Plan:
    if not pictured:
        return make_plan({"text": {"text": [4, 1, 2]}})
    texts = [n for n in (4, 1, 2) for _ in range(pictured)]
    return make_plan({"pair": {"image": [PATCHES + 1] * len(texts), "text": texts}})


@pytest.mark.parametrize("pictured", [0, 1, 2])
def test_questions_with_so_many_pictures_are_answered(pictured: int) -> None:
    model = randomize(VLMo(dataclasses.replace(VLMO, answers=7, pictures=pictured, **TUNED)))
    text = torch.cat([ids for ids in TEXTS for _ in range(max(1, pictured))])
    image = pictures(3 * pictured) if pictured else None
    with torch.no_grad():
        got = model.answer(plan_of(pictured), image=image, text=text)
        assert got.shape == (3, 7)
        if image is not None:
            other = image.clone()
            other[pictured : 2 * pictured] ^= 255  # those of the second question
            again = model.answer(plan_of(pictured), image=other, text=text)
            assert [torch.equal(a, b) for a, b in zip(got, again)] == [True, False, True]
        if pictured == 2:  # which is the left one matters
            swapped = image.unflatten(0, (3, 2)).flip(1).flatten(0, 1)  # type: ignore[union-attr]
            assert not torch.allclose(model.answer(plan_of(2), image=swapped, text=text), got, atol=1e-2)
    with pytest.raises(ConfigError, match="answers nothing"):
        VLMo(VLMO).answer(plan_of(0), text=torch.cat(TEXTS))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 5}, "VLMo needs dim divisible by heads"),
        ({"joint_layers": 4}, "1 to 3 joint_layers"),
        ({"joint_layers": 0}, "1 to 3 joint_layers"),
        ({"text_tokens": 197}, "reach 196 tokens"),
        ({"pictures": 3}, "0, 1 or 2 pictures"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(VLMO, **changes)


def test_layers_and_decay() -> None:
    model = VLMo(VLMO)
    layers = {
        "vision.embed.weight": 0, "vision.cls_token": 0, "language.words.weight": 0, "types": 0,
        "encoder.blocks.0.gamma_1": 1, "encoder.blocks.2.ffn.experts.pair.fc1.weight": 3, "bias.table": 4,
        "encoder.norm.experts.shared.weight": 4, "match_head.weight": 4, "logit_scale": 4,
    }  # fmt: skip
    names = dict(model.named_parameters())
    assert {name: model.layer_of(name) for name in layers} == layers and layers.keys() <= names.keys()
    assert {name for name, x in names.items() if x.ndim > 1 and model.no_decay(name)} == {"bias.table"}


def test_first_weights() -> None:
    model = VLMo(dataclasses.replace(VLMO, dim=128, hidden=512))
    torch.manual_seed(0)
    model.init_weights()
    for name, x in model.named_parameters():
        if name.startswith("vision.embed."):
            continue  # as torch's convolutions
        if name.endswith(("bias", "bias.table")):
            assert not x.any(), name
        elif "gamma" in name:
            assert (x == 0.1).all()
        elif "norm." in name:
            assert (x == 1).all(), name
        elif name.endswith("logit_scale"):
            assert x.item() == pytest.approx(math.log(1 / 0.07))
        else:
            assert x.std().item() == pytest.approx(0.02, rel=0.25), name


# --- pre-training -----------------------------------------------------------------------------------------------------


def objective(drop_path: float = 0.3) -> MaskedContrastMatching:
    model = VLMo(dataclasses.replace(VLMO, drop_path=drop_path))
    return MaskedContrastMatching(randomize(model))  # type: ignore[arg-type]


def batches(count: int, parts: int) -> list[Batch]:
    collate = dataclasses.replace(COLLATE, branches=2 * VLMO.depth)
    samples = [sample(0, "pair", i) for i in range(count)]
    size = count // parts
    return [collate({"pair": samples[i * size : (i + 1) * size]}) for i in range(parts)]


def step(trained: MaskedContrastMatching, given: list[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss and terms, and gradients, of a step; one micro-batch is given as it is."""
    each = [trained.counts(batch) for batch in given]
    counts = {name: sum(own[name] for own in each) for name in each[0]}
    trained.zero_grad(set_to_none=True)
    out = trained(given[0] if len(given) == 1 else given, counts)
    out.loss.backward()
    gradients = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    return {"loss": out.loss.item(), **{name: x.item() for name, x in out.sums.items()}}, gradients


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_loss_and_gradients_of_the_whole(parts: int) -> None:
    trained = objective()
    terms, want = step(trained, batches(8, 1))
    again, got = step(trained, batches(8, parts))
    assert again == pytest.approx(terms, rel=1e-5)
    assert got.keys() == want.keys() and len(want) > 90
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-8, name


def test_micro_batches_hold_less() -> None:
    trained = objective(0.0)
    most = []
    for parts in (1, 8):
        with Recorder() as recorder:
            step(trained, batches(32, parts))
        most.append(recorder.trace().peak())
    assert most[1] < 0.4 * most[0]


def test_the_loss_weighs_its_terms() -> None:
    trained, [batch] = objective(0.0), batches(6, 1)
    counts = trained.counts(batch)
    assert counts["match"] == 3 * counts["contrast"] == 18 and counts["words"] == len(batch["text_hidden"])
    out = trained(batch, counts)
    means = {name: out.sums[name].item() / counts[name] for name in counts}
    assert out.loss.item() == pytest.approx(0.25 * means["words"] + means["contrast"] + means["match"], rel=1e-6)


def test_wrong_pairs_are_other_records_and_follow_the_draws() -> None:
    trained, [batch] = objective(0.0), batches(6, 1)
    image, text, *_ = trained.embed(batch)
    others = trained.others([batch], image, text, Across())
    [(ids, lengths, shown)] = others
    own = padded_texts(batch["plan"], whole_text(batch), VLMO.text_tokens)
    for i in range(6):
        assert not torch.equal(ids[i], own[0][i])
        assert not torch.equal(shown[i], batch["image"][i])
        assert any(torch.equal(ids[i], x) and lengths[i] == n for x, n in zip(*own))
        assert any(torch.equal(shown[i], x) for x in batch["image"])
    other = {**batch, "match_draw": 1 - batch["match_draw"]}
    [(again, _, _)] = trained.others([other], image, text, Across())
    assert not torch.equal(again, ids)


def test_hidden_words_are_hidden_from_the_pass_that_predicts_them_alone() -> None:
    """Other words under the mask change contrast and judgement, not the tokens that predict."""
    [batch] = batches(6, 1)
    text = whole_text(batch)
    assert torch.equal(text[batch["text_hidden"]], batch["text_target"])
    assert (text != batch["text"]).sum() > 3 and not torch.equal(batch["text"], text)
    ids, lengths = padded_texts(batch["plan"], text, VLMO.text_tokens)
    assert torch.equal(ids[torch.arange(VLMO.text_tokens) < lengths[:, None]], text)
    assert lengths.tolist() == [len(WORDS.framed(sample(0, "pair", i).text, "pair")) for i in range(6)]  # type: ignore[arg-type]


def test_pre_training_asks_for_all_heads() -> None:
    for change in ({"masked": False}, {"match": False}, {"contrast": "alone"}):
        with pytest.raises(ConfigError, match="needs all heads"):
            MaskedContrastMatching(VLMo(dataclasses.replace(VLMO, **change)))


def test_it_overfits_eight_pairs() -> None:
    config = dataclasses.replace(VLMO, depth=2, layer_scale=0.0, init_std=0.1)
    trained = MaskedContrastMatching(VLMo(config))
    torch.manual_seed(0)
    trained.init_weights()
    batch = COLLATE({"pair": [sample(0, "pair", i) for i in range(8)]})
    counts = trained.counts(batch)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0)
    for _ in range(60):
        out = trained(batch, counts)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    means = {name: out.sums[name].item() / counts[name.split("/")[0]] for name in out.sums}
    assert means["words"] < 0.2 and means["contrast"] < 0.1
    assert means["match"] < 0.55  # 0.637 is that of the share of pairs, and the wrong ones get harder


# --- the stage of texts -----------------------------------------------------------------------------------------------


def test_the_stage_of_texts_trains_what_reads_texts_alone() -> None:
    config = dataclasses.replace(VLMO, match=False, contrast="none")
    trained = MaskedLanguageModeling(VLMo(config))
    torch.manual_seed(0)
    trained.init_weights()
    model: VLMo = trained.model
    before = {name: x.clone() for name, x in model.named_parameters()}
    optimizers = build_optimizers(trained, Optim(lr=1e-2, weight_decay=0.5, matrices="muon"))
    collate = MaskedCollate(words=WORDS, grid=GRID)
    for seed in range(2):
        batch = collate({"text": [sample(seed, "text", i) for i in range(6)]})
        trained(batch, trained.counts(batch)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        trained.zero_grad(set_to_none=True)
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if reads_text(name)} - {"language.positions"}
    named = ("language.words.weight", "types", "mlm_head.decoder.weight", "bias.table")
    assert {*named, "encoder.norm.experts.shared.weight", "encoder.blocks.2.ffn.experts.text.norm.weight"} <= moved
    assert not [name for name in moved if ".attention." in name or "image" in name or "vision" in name]
    assert model.bias is not None
    assert torch.equal(model.bias.table[:52], before["bias.table"][:52])  # what pictures look up: they were not there
