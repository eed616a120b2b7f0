"""FLAVA: published sizes and names, what is predicted of whom, micro-batches as one, answers, and where layers lie."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.data.collate import Sample
from multiway.errors import ConfigError, ConversionError
from multiway.plan import make_plan
from multiway.systems.flava import FLAVA, LAYOUTS, MAX_LOGIT_SCALE, PRESETS, TERMS, MaskedContrastiveMatching
from multiway.tasks.retrieval import ImageTextContrast, match
from multiway.types import Batch
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import CODES, DUAL, MASKED_MATCH, randomize, sample
from tests.contracts.toys import FLAVA as SMALL

PATCHES = 16


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_published_model_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        model = FLAVA(PRESETS["flava_base_patch16_224"])
    vision, language, joint = model.encoder.vision, model.encoder.language, model.encoder.joint
    assert size(vision) - size(vision.projection) == 86_390_016
    assert size(language) - size(language.projection) == 109_483_776
    assert size(joint) - size(joint.from_image, joint.from_text) == 43_120_128
    assert size(model.encoder) == 241_356_288
    assert size(model) - size(model.encoder) == 62_502_775
    names = to_theirs(model.state_dict(), LAYOUTS["torchmultimodal"])
    shapes = {
        "model.image_encoder.embeddings.position_embeddings": (1, 197, 768),
        "model.image_encoder.embeddings.patch_embeddings.projection.weight": (768, 3, 16, 16),
        "model.text_encoder.embeddings.word_embeddings.weight": (30522, 768),
        "model.text_encoder.embeddings.layer_norm.weight": (768,),
        "model.text_encoder.encoder.layer.11.feedforward.model.2.weight": (768, 3072),
        "model.mm_encoder.encoder.layer.5.attention.output.bias": (768,),
        "model.mm_encoder.cls_token": (1, 1, 768),
        "model.image_to_mm_projection.weight": (768, 768),
        "loss.contrastive_loss.logit_scale": (),
        "loss.mmm_loss.mlm.cls.decoder.weight": (30522, 768),
        "loss.mim_loss.cls.layer_norm.bias": (768,),
        "loss.itm_loss.cls.seq_relationship.weight": (2, 768),
    }
    assert {name: tuple(names[name].shape) for name in shapes} == shapes


DOUBLE = {
    "transformers": (
        ("mim_head.bias", "mmm_text_head.bias", "image_codebook.blocks.input.weight"),
        "flava.text_model.embeddings.position_ids",
    ),
    "torchmultimodal": (
        ("loss.mim_loss.cls.bias", "loss.mmm_loss.mlm.cls.bias", "image_codebook.encoder.blocks.input.w"),
        "model.text_encoder.embeddings.position_ids",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codebooks_and_what_files_hold_twice_are_left_out(layout: str) -> None:
    model = randomize(FLAVA(SMALL))
    theirs = to_theirs(model.state_dict(), LAYOUTS[layout])
    names, positions = DOUBLE[layout]
    more = {name: torch.zeros(3) for name in (*names, positions)}
    back = to_ours({**theirs, **more}, LAYOUTS[layout], model.state_dict())
    assert all(torch.equal(back[name], x) for name, x in model.state_dict().items())
    with pytest.raises(ConversionError, match="itm_surprise"):
        to_ours({**theirs, "itm_surprise.bias": torch.zeros(2)}, LAYOUTS[layout], model.state_dict())


# --- pre-training


@pytest.fixture
def objective() -> MaskedContrastiveMatching:
    made = MaskedContrastiveMatching(FLAVA(SMALL), None)
    randomize(made)
    with torch.no_grad():
        made.model.logit_scale.fill_(1.0)
    return made


def samples(wrong: tuple[int, ...] = (), **counts: int) -> dict[str, list[Sample]]:
    """New samples by kind; pairs number ``wrong`` do not match."""
    made = {kind: [sample(0, kind, i) for i in range(count)] for kind, count in counts.items()}
    for i in wrong:
        made["pair"][i] = dataclasses.replace(made["pair"][i], match=False)
    return made


def outcome(objective: MaskedContrastiveMatching, batch: Batch) -> tuple[dict[str, int], Any]:
    counts = objective.counts(batch)
    return counts, objective(batch, counts)


def test_kinds_together_have_the_losses_they_have_alone(objective: MaskedContrastiveMatching) -> None:
    numbers = {"image": 3, "pair": 4, "text": 5}
    counts, out = outcome(objective, MASKED_MATCH(samples(**numbers)))
    assert set(counts) == set(TERMS) and all(counts.values())
    total: dict[str, int] = dict.fromkeys(TERMS, 0)
    expected: dict[str, Tensor] = {}
    for kind, number in numbers.items():
        own, alone = outcome(objective, MASKED_MATCH(samples(**{kind: number})))
        total = {term: total[term] + own[term] for term in TERMS}
        assert expected.keys().isdisjoint(alone.sums)
        expected |= alone.sums
    assert total == counts and out.sums.keys() == expected.keys()
    for name, value in out.sums.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    weighted = sum(out.sums[term] / counts[term] for term in TERMS)
    torch.testing.assert_close(out.loss, weighted)


def test_weights_are_those_of_the_losses() -> None:
    model = randomize(FLAVA(SMALL))
    batch = MASKED_MATCH(samples(image=2, pair=3, text=2))
    weights = {term: 0.5 + i for i, term in enumerate(TERMS)}
    counts, out = outcome(MaskedContrastiveMatching(model, None, weights), batch)  # type: ignore[arg-type]
    torch.testing.assert_close(out.loss, sum(weights[term] * out.sums[term] / counts[term] for term in TERMS))
    with pytest.raises(ConfigError, match=r"losses are image text pair_image .* got weights of \['mim'\]"):
        MaskedContrastiveMatching(model, None, {"mim": 1.0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model.masked"):
        MaskedContrastiveMatching(FLAVA(dataclasses.replace(SMALL, masked=False)), None)


def test_contrast_compares_what_is_encoded_apart_with_nothing_hidden(objective: MaskedContrastiveMatching) -> None:
    drawn, model = samples(pair=4), objective.model
    counts, out = outcome(objective, MASKED_MATCH(drawn))
    image = torch.stack([s.image for s in drawn["pair"] if s.image is not None])
    text = [torch.from_numpy(MASKED_MATCH.words.framed(s.text, "pair")) for s in drawn["pair"] if s.text is not None]
    a, b = model.embed(model.encode(image=image), "image"), model.embed(model.encode(text=text), "text")
    scores = model.temperature() * a @ b.T
    want = (F.cross_entropy(scores, torch.arange(4)) + F.cross_entropy(scores.T, torch.arange(4))) / 2
    torch.testing.assert_close(out.sums["contrast"] / counts["contrast"], want.detach())
    both = ImageTextContrast(model).embed(DUAL(drawn))
    torch.testing.assert_close(both, (a, b))


def test_of_pairs_that_do_not_match_nothing_is_predicted(objective: MaskedContrastiveMatching) -> None:
    whole, some = MASKED_MATCH(samples(pair=4)), MASKED_MATCH(samples((1, 3), pair=4))
    assert torch.equal(whole["text"], some["text"]) and torch.equal(whole["image_hide"], some["image_hide"])
    assert some["match"].tolist() == [True, False, True, False]
    before, after = objective.counts(whole), objective.counts(some)
    assert after["match"] == 4 and after["contrast"] == 2
    assert after["pair_image"] == before["pair_image"] // 2  # every picture hides equally many
    assert set(some["image_hidden"].tolist()) < set(whole["image_hidden"].tolist())
    hidden = (some["image_hidden"] // PATCHES).unique()
    assert hidden.tolist() == [4 + 0, 4 + 2]  # behind four copies apart

    # Their rows of the contrast go, their columns stay.
    out = objective(some, after)
    model, seen = objective.model, objective.model(some["plan"], image=some["image"], text=some["text"])
    a, b = model.vectors(seen, some["image_match"], some["text_match"])
    scores = model.temperature() * a @ b.T
    own = torch.arange(4)
    rows = (F.cross_entropy(scores, own, reduction="none") + F.cross_entropy(scores.T, own, reduction="none")) / 2
    torch.testing.assert_close(out.sums["contrast"], rows[[0, 2]].sum().detach())


def test_a_step_of_wrong_pairs_alone_has_one_loss(objective: MaskedContrastiveMatching) -> None:
    counts, out = outcome(objective, MASKED_MATCH(samples((0, 1), pair=2)))
    assert counts == {**dict.fromkeys(TERMS, 0), "match": 2}
    torch.testing.assert_close(out.loss, out.sums["match"] / 2)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_micro_batches_together_are_one_batch(objective: MaskedContrastiveMatching) -> None:
    drawn = samples((2,), image=3, pair=6, text=3)
    counts, whole = outcome(objective, MASKED_MATCH(drawn))
    whole.loss.backward()
    want = {name: p.grad for name, p in objective.named_parameters()}
    objective.zero_grad(set_to_none=True)
    drawn = samples((2,), image=3, pair=6, text=3)  # generators begin anew
    parts = [MASKED_MATCH({kind: own[i::3] for kind, own in drawn.items()}) for i in range(3)]
    assert {term: sum(objective.counts(part)[term] for part in parts) for term in TERMS} == counts
    out = objective(parts, counts)
    out.loss.backward()
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-5, atol=1e-5)
    for name, value in whole.sums.items():
        torch.testing.assert_close(out.sums[name], value, rtol=1e-5, atol=1e-5)
    for name, p in objective.named_parameters():
        assert (p.grad is None) == (want[name] is None), name
        assert p.grad is None or (p.grad - want[name]).norm() <= 1e-5 * want[name].norm() + 1e-8, name


def test_the_tokenizer_is_asked_about_pictures_with_hidden_patches() -> None:
    asked = []

    def tokenizer(image: Tensor) -> Tensor:
        asked.append(image)
        return image.flatten(1)[:, :PATCHES].long() % CODES

    batch = MASKED_MATCH(samples(image=2, pair=3))
    del batch["image_code"]
    objective = MaskedContrastiveMatching(randomize(FLAVA(SMALL)), tokenizer)  # type: ignore[arg-type]
    codes = objective.codes(batch)
    assert len(asked) == 1 and torch.equal(asked[0], batch["image"][[0, 1, 5, 6, 7]])
    assert codes.shape == (8, PATCHES) and not codes[2:5].any()
    assert torch.equal(codes[[0, 1, 5, 6, 7]], tokenizer(batch["image"][[0, 1, 5, 6, 7]]))
    with pytest.raises(ConfigError, match="needs an image tokenizer"):
        MaskedContrastiveMatching(FLAVA(SMALL), None).codes(batch)


def test_the_temperature_stays_between_1_and_100(objective: MaskedContrastiveMatching) -> None:
    for value, kept in ((7.0, MAX_LOGIT_SCALE), (-1.0, 0.0), (3.0, 3.0)):
        nn.init.constant_(objective.model.logit_scale, value)
        objective.after_step(1)
        assert objective.model.logit_scale.item() == pytest.approx(kept)
    assert torch.tensor(MAX_LOGIT_SCALE).exp().item() == pytest.approx(100)


# --- the model


@pytest.fixture
def model() -> FLAVA:
    return randomize(FLAVA(SMALL)).eval()  # type: ignore[return-value]


def records(lengths: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (len(lengths), 3, 32, 32), generator=generator, dtype=torch.uint8)
    return image, [torch.randint(4, 40, (n,), generator=generator) for n in lengths]


def test_a_pair_does_not_depend_on_its_batch(model: FLAVA) -> None:
    image, text = records((9, 2, 14))
    together = model.encode(image=image, text=text)
    for i in range(3):
        alone = model.encode(image=image[i : i + 1], text=text[i : i + 1])
        assert alone.values.shape == (PATCHES + 2 + len(text[i]), SMALL.dim)
        torch.testing.assert_close(together.values[together.plan.sample == i], alone.values, rtol=0, atol=1e-5)


def test_the_class_token_of_a_pair_sees_both(model: FLAVA) -> None:
    image, text = records((9, 4))
    before = model.encode(image=image, text=text).prefix("image")
    for other in (
        model.encode(image=255 - image, text=text),
        model.encode(image=image, text=[text[0].flip(0), text[1]]),
    ):
        assert not torch.allclose(other.prefix("image")[0], before[0], atol=1e-2)


def test_a_judge_says_how_likely_a_pair_is(model: FLAVA) -> None:
    image, text = records((9, 4, 6))
    odds = match(model, image, text)
    scores = model.matches(model.encode(image=image, text=text))
    torch.testing.assert_close(odds.sigmoid(), scores.softmax(1)[:, 1].detach())
    with pytest.raises(ConfigError, match="judges no pairs"):
        match(FLAVA(dataclasses.replace(SMALL, masked=False)), image, text)


def asked(pictures: int) -> tuple[FLAVA, dict[str, Any]]:
    """A FLAVA that answers, and three questions."""
    model = randomize(FLAVA(dataclasses.replace(SMALL, masked=False, answers=5, pictures=pictures))).eval()
    image, text = records((9, 4, 6))
    if pictures == 0:
        return model, {"plan": make_plan({"text": {"text": [9, 4, 6]}}), "text": torch.cat(text)}  # type: ignore[return-value]
    lengths = [n for n in (9, 4, 6) for _ in range(pictures)]
    plan = make_plan({"pair": {"image": [PATCHES + 2] * len(lengths), "text": lengths}})
    shown = image.repeat_interleave(pictures, 0)
    shown[1::2] = 255 - shown[1::2]
    return model, {"plan": plan, "image": shown, "text": torch.cat([x for x in text for _ in range(pictures)])}  # type: ignore[return-value]


def test_answers_read_the_pooled_text_the_pair_or_both_pairs() -> None:
    model, questions = asked(0)
    pooled = model.encoder.language.pooler(model.encode(text=records((9, 4, 6))[1]).prefix("text"))
    torch.testing.assert_close(model.answer(**questions), model.answer_head(pooled))
    for pictures in (1, 2):
        model, questions = asked(pictures)
        texts = [x for x in records((9, 4, 6))[1] for _ in range(pictures)]
        pairs = model.encode(image=questions["image"], text=texts).prefix("image")
        want = model.answer_head(pairs.view(3, -1))
        torch.testing.assert_close(model.answer(**questions), want)
        assert want.shape == (3, 5) and model.answer_head.dense.out_features == 2 * SMALL.dim  # type: ignore[union-attr]


def test_what_cannot_be_answered_is_refused(model: FLAVA) -> None:
    with pytest.raises(ConfigError, match="answers nothing"):
        model.answer(**asked(1)[1])
    with pytest.raises(ConfigError, match="0, 1 or 2 pictures each, got pictures 3"):
        dataclasses.replace(SMALL, answers=2, pictures=3)
    with pytest.raises(ConfigError, match="a text has 15 tokens, this model reads at most 14"):
        model.encode(text=[torch.zeros(15, dtype=torch.int64)])
    with pytest.raises(ConfigError, match="16 patches|pictures of"):
        model.encode(image=torch.zeros(1, 3, 40, 40, dtype=torch.uint8))


def test_other_image_sizes_interpolate_the_positions(model: FLAVA) -> None:
    positions = model.encoder.vision.trunk.positions
    assert positions is not None
    old = positions.detach().clone()
    model.set_image_size((48, 32))
    table = old[1:].T.reshape(1, SMALL.dim, 4, 4)
    want = F.interpolate(table, size=(6, 4), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(model.encoder.vision.trunk.positions, torch.cat([old[:1], want]), rtol=0, atol=0)
    image = torch.zeros(2, 3, 48, 32, dtype=torch.uint8)
    assert model.patches(model.encode(image=image)).shape == (2, 24, SMALL.dim)
    assert model.encode(image=image, text=records((3, 4))[1]).plan.rows == 2 * 26 + 7


def test_layers_are_counted_from_the_top_of_the_joint_encoder(model: FLAVA) -> None:
    names = [name for name, _ in model.named_parameters()]
    assert model.layers == 5 and {model.layer_of(name) for name in names} == set(range(7))
    expected = {
        "encoder.vision.trunk.embed.weight": 0, "encoder.language.words.words.weight": 0,
        "encoder.vision.trunk.blocks.0.ffn.fc1.weight": 1, "encoder.vision.trunk.blocks.2.ffn.fc1.weight": 3,
        "encoder.language.blocks.0.ffn.experts.shared.fc1.weight": 2,
        "encoder.language.blocks.1.ffn.experts.shared.fc1.weight": 3,
        "encoder.joint.blocks.0.ffn.experts.shared.fc1.weight": 4,
        "encoder.joint.blocks.1.ffn.experts.shared.fc1.weight": 5,
        "encoder.joint.from_image.weight": 6, "encoder.vision.norm.weight": 6, "heads.pair_text.dense.weight": 6,
    }  # fmt: skip
    assert {name: model.layer_of(name) for name in expected} == expected
    lone = {name for name in names if model.no_decay(name)}
    assert lone == {f"encoder.{x}" for x in ("vision.trunk.cls_token", "vision.trunk.hide_token", "joint.cls_token")}
