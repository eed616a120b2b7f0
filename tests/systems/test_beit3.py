"""BEiT-3 against the paper and the released files: sizes, names, experts, start, and that it learns."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from multiway.errors import ConfigError
from multiway.plan import make_plan
from multiway.systems.beit3 import LAYOUTS, PRESETS, BEiT3, Config, MaskedDataModeling
from multiway.weights.rename import to_theirs
from tests.contracts.toys import DECOUPLED, GRID, IMAGE_PX, MASKED, SHARED, randomize, sample

PATCHES = GRID[0] * GRID[1]


def on_meta(config: Config) -> BEiT3:
    with torch.device("meta"):
        return BEiT3(config)


def parameters(model: BEiT3, part: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


def released(dim: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a released pre-trained file at 224 pixels (masked.md 6.6)."""
    vector, matrix, wide = (dim,), (dim, dim), (4 * dim,)
    layer = {f"self_attn.{name}_proj": (matrix, vector) for name in ("k", "v", "q", "out")}
    layer |= dict.fromkeys(("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"), (vector, vector))
    keys = {
        "beit3.text_embed.weight": (64010, dim),
        "beit3.vision_embed.mask_token": (1, 1, dim),
        "beit3.vision_embed.cls_token": (1, 1, dim),
        "beit3.vision_embed.proj.weight": (dim, 3, 16, 16),
        "beit3.vision_embed.proj.bias": vector,
        "beit3.encoder.embed_positions.A.weight": (199, dim),
        "beit3.encoder.embed_positions.B.weight": (1024, dim),
        "mlm_head.weight": (64010, dim),
        "mlm_head.bias": (64010,),
        "mim_head.weight": (8192, dim),
        "mim_head.bias": (8192,),
    }
    for expert in "AB":
        keys |= {f"beit3.encoder.layer_norm.{expert}.{part}": vector for part in ("weight", "bias")}
        for i in range(depth):
            prefix = f"beit3.encoder.layers.{i}."
            for name, (weight, bias) in layer.items():
                keys |= {f"{prefix}{name}.{expert}.weight": weight, f"{prefix}{name}.{expert}.bias": bias}
            ffn = {"fc1": ((4 * dim, dim), wide), "fc2": ((dim, 4 * dim), vector), "ffn_layernorm": (wide, wide)}
            for name, (weight, bias) in ffn.items():
                keys |= {f"{prefix}ffn.{expert}.{name}.weight": weight, f"{prefix}ffn.{expert}.{name}.bias": bias}
    return keys


@pytest.mark.parametrize(
    ("preset", "dim", "depth", "total"),
    [("beit3_base_patch16_224", 768, 12, 276_510_730), ("beit3_large_patch16_224", 1024, 24, 746_709_514)],
)
def test_base_and_large_have_the_released_keys_shapes_and_totals(preset, dim, depth, total) -> None:
    model = on_meta(PRESETS[preset])
    assert {key: tuple(x.shape) for key, x in to_theirs(model.state_dict(), LAYOUTS["official"]).items()} == released(
        dim, depth
    )
    assert parameters(model) == total


def test_a_fused_projection_holds_query_key_value_of_its_modality() -> None:
    model = randomize(BEiT3(DECOUPLED))
    theirs = to_theirs(model.state_dict(), LAYOUTS["official"])
    for expert, modality in (("A", "image"), ("B", "text")):
        for i, name in enumerate(("q", "k", "v")):
            ours = model.encoder.blocks[1].attention.qkv.experts[modality].linear
            key = f"beit3.encoder.layers.1.self_attn.{name}_proj.{expert}"
            assert torch.equal(theirs[f"{key}.weight"], ours.weight[32 * i : 32 * (i + 1)])
            assert torch.equal(theirs[f"{key}.bias"], ours.bias[32 * i : 32 * (i + 1)])


@pytest.mark.parametrize(("preset", "total"), [("base", 222_458_881), ("large", 675_188_737)])
def test_retrieval_models_have_the_released_totals(preset: str, total: int) -> None:
    config = dataclasses.replace(PRESETS[f"beit3_{preset}_patch16_224"], image_px=384, masked=False, contrast=True)
    model = on_meta(config)
    assert parameters(model) == total
    state = to_theirs(model.state_dict(), LAYOUTS["official"])
    assert {"vision_head.weight", "language_head.weight", "logit_scale"} <= state.keys()
    assert state["beit3.encoder.embed_positions.A.weight"].shape[0] == 579


def test_giant_has_the_papers_components() -> None:
    """Attention 317M, vision and language FFN 692M each, vision-language 52M (table 1)."""
    model = on_meta(PRESETS["beit3_giant_patch14_224"])
    attention = sum(p.numel() for name, p in model.named_parameters() if ".attention." in name and p.ndim == 2)
    assert round(attention / 1e6) == 317
    for expert, millions in (("image", 692), ("text", 692), ("pair", 52)):
        matrices = [p for name, p in model.named_parameters() if f".ffn.experts.{expert}." in name and p.ndim == 2]
        assert round(sum(p.numel() for p in matrices) / 1e6) == millions
    joint = {name.split(".")[2] for name, _ in model.named_parameters() if ".ffn.experts.pair." in name}
    assert joint == {"37", "38", "39"}
    assert parameters(model, ".experts.shared.") == parameters(model, ".attention.") + 2 * 1408


def pictures(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, IMAGE_PX, IMAGE_PX), generator=torch.Generator().manual_seed(n)).byte()


TEXTS = [torch.tensor([0, 7, 9, 2]), torch.tensor([5]), torch.tensor([0, 2])]


@pytest.mark.parametrize("config", [DECOUPLED, SHARED], ids=["decoupled", "shared"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_alone_ignores_the_others_experts(config: Config, modality: str) -> None:
    model = randomize(BEiT3(config))
    inputs = {"image": pictures(3)} if modality == "image" else {"text": TEXTS}
    before = model.encode(**inputs).values
    foreign = ("language.", ".experts.text.") if modality == "image" else ("vision.", ".experts.image.")
    for name, parameter in model.named_parameters():
        if any(part in f".{name}" for part in (f".{foreign[0]}", foreign[1], ".experts.pair.")):
            parameter.data.normal_()
        elif "_head" not in name:
            (gradient,) = torch.autograd.grad(
                model.encode(**inputs).values.square().sum(), parameter, allow_unused=True
            )
            assert gradient is not None or name == "vision.mask_token", name
    assert torch.equal(model.encode(**inputs).values, before)


def test_a_pair_whose_text_is_blocked_gives_the_picture_alone() -> None:
    model = randomize(BEiT3(DECOUPLED))
    image = pictures(3)
    plan = make_plan({"pair": {"image": [PATCHES + 1] * 3, "text": [4, 1, 2]}}, causal_text=True)
    together = model(plan, image=image, text=torch.cat(TEXTS)).dense("image")[0]
    alone = model.encode(image=image).dense("image")[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    fused = model.encode(image=image, text=TEXTS).dense("image")[0]
    assert not torch.allclose(fused, alone, atol=1e-2)


def test_a_text_sees_the_picture_and_its_past_when_causal() -> None:
    model = randomize(BEiT3(DECOUPLED))
    plan = make_plan({"pair": {"image": [PATCHES + 1], "text": [5]}}, causal_text=True)
    ids = torch.tensor([0, 7, 8, 9, 2])
    before = model(plan, image=pictures(1), text=ids).dense("text")[0][0]
    other = ids.clone()
    other[3] = 11
    after = model(plan, image=pictures(1), text=other).dense("text")[0][0]
    assert torch.equal(before[:3], after[:3])
    assert (before[3:] - after[3:]).abs().amax(1).min() > 1e-2
    assert (before - model(plan, image=255 - pictures(1), text=ids).dense("text")[0][0]).abs().amax(1).min() > 1e-2


def test_weights_start_as_beits_times_magnetos_gain() -> None:
    config = Config(dim=64, depth=6, heads=4, hidden=256, patch=8, image_px=32, vocab=100, text_positions=20, codes=50)
    model = BEiT3(dataclasses.replace(config, contrast=True))
    torch.manual_seed(0)
    model.init_weights()
    gain = math.sqrt(math.log(12))
    cut = 0.5396 * config.init_std  # deviation of a normal cut at one deviation
    scaled = 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm." in name or "inner" in name:
            assert (parameter == 1).all(), name
        elif name == "logit_scale":
            assert parameter.item() == pytest.approx(math.log(1 / 0.07))
        else:
            parts = parameter.split(64) if "qkv" in name else [parameter]
            gains = [1, 1, gain] if "qkv" in name else [gain if "blocks" in name else 1]
            for part, factor in zip(parts, gains, strict=True):
                assert part.abs().max() <= config.init_std * factor * 1.0001, name
                assert part.std().item() == pytest.approx(cut * factor, rel=0.25 if part.numel() < 100 else 0.05), name
                scaled += factor != 1
    assert scaled == 6 * 2 * 4  # v, out, fc1, fc2 of both experts


@pytest.mark.parametrize("config", [DECOUPLED, SHARED], ids=["decoupled", "shared"])
def test_it_overfits_eight_pairs(config: Config) -> None:
    config = dataclasses.replace(config, dim=64, hidden=256, depth=2, joint_layers=min(config.joint_layers, 1))
    objective = MaskedDataModeling(BEiT3(config), None)
    torch.manual_seed(0)
    objective.init_weights()
    batch = MASKED({"pair": [sample(0, "pair", i) for i in range(8)]})
    counts = objective.counts(batch)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0)
    losses = []
    for _ in range(120):
        out = objective(batch, counts)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(math.log(config.codes) + math.log(config.vocab), rel=0.1)
    assert losses[-1] < 0.02
    assert all(out.sums[f"{term}/accuracy"] == counts[term] for term in ("pair_image", "pair_text"))


def test_the_loss_is_the_papers() -> None:
    """Mean cross-entropy over the hidden places of each kind, the four means added (masked.md 7.3)."""
    model = randomize(BEiT3(DECOUPLED))
    samples = {kind: [sample(0, kind, i) for i in range(3)] for kind in ("image", "pair", "text")}
    batch = MASKED(samples)
    weights = {"image": 1.0, "pair_image": 0.5, "pair_text": 2.0, "text": 1.0}
    objective = MaskedDataModeling(model, None, {"pair_image": 0.5, "pair_text": 2.0})
    out = objective(batch, objective.counts(batch))
    plan, tokens = batch["plan"], objective.encode(batch)
    first = {"image": 0, "pair": 3, "text": 6}
    losses: dict[str, list[float]] = {term: [] for term in weights}
    hide, text = batch["image_hide"], 0
    for kind in ("image", "pair", "text"):
        for i, record in enumerate(samples[kind]):
            own = tokens.values[plan.sample == first[kind] + i]
            if record.code is not None:
                logits = model.mim_head(own[1 : PATCHES + 1]).log_softmax(-1)
                places = hide[i + (3 if kind == "pair" else 0)].nonzero().flatten()
                losses["image" if kind == "image" else "pair_image"] += [
                    -logits[p, record.code[p]].item() for p in places
                ]
            if record.text is not None:
                n = len(record.text) + 2
                logits = model.mlm_head(own[-n:]).log_softmax(-1)
                ids = np.concatenate([[0], record.text, [2]])
                places = [int(p) - text for p in batch["text_hidden"] if text <= p < text + n]
                losses["text" if kind == "text" else "pair_text"] += [-logits[p, ids[p]].item() for p in places]
                text += n
    for term, own in losses.items():
        assert objective.counts(batch)[term] == len(own)
        assert out.sums[term].item() == pytest.approx(sum(own), rel=1e-5)
    assert out.loss.item() == pytest.approx(sum(weights[term] * np.mean(own) for term, own in losses.items()), rel=1e-5)


def test_codes_come_from_the_tokenizer_when_none_are_stored() -> None:
    batch = MASKED({"image": [sample(0, "image", i) for i in range(2)]})
    stored = batch.pop("image_code")
    with pytest.raises(ConfigError, match="image tokenizer"):
        objective = MaskedDataModeling(BEiT3(DECOUPLED), None)
        objective(batch, objective.counts(batch))

    class Tokenizer:
        codes = DECOUPLED.codes

        def __call__(self, image: Tensor) -> Tensor:
            assert torch.equal(image, batch["image"])
            return stored

    objective = MaskedDataModeling(randomize(BEiT3(DECOUPLED)), Tokenizer())
    loss = objective(batch, objective.counts(batch)).loss
    assert loss == objective({**batch, "image_code": stored}, objective.counts(batch)).loss


def test_retrieval_embeddings_are_unit_vectors_of_the_first_tokens() -> None:
    model = randomize(BEiT3(dataclasses.replace(DECOUPLED, contrast=True)))
    tokens = model.encode(image=pictures(3))
    got = model.embed(tokens, "image")
    want = tokens.dense("image")[0][:, 0] @ model.vision_head.weight.T
    torch.testing.assert_close(got, want / want.norm(dim=1, keepdim=True))
    text = model.embed(model.encode(text=TEXTS), "text")
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    assert model.temperature().item() == pytest.approx(100)
    with pytest.raises(ConfigError, match="retrieval heads"):
        BEiT3(DECOUPLED).embed(tokens, "image")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 5}, "divisible"), ({"image_px": 36}, "divisible"), ({"joint_layers": 1}, "shared")],
)
def test_impossible_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(DECOUPLED, **change)


def test_layers_for_learning_rates() -> None:
    model = on_meta(dataclasses.replace(DECOUPLED, contrast=True))
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {layers[name] for name in layers if name.startswith(("vision.", "language."))} == {0}
    assert all(layer == int(name.split(".")[2]) + 1 for name, layer in layers.items() if ".blocks." in name)
    rest = {name for name, layer in layers.items() if layer == model.config.depth + 1}
    heads = {"mlm_head.weight", "mlm_head.bias", "mim_head.weight", "mim_head.bias", "logit_scale"}
    norms = {f"encoder.norm.experts.{m}.{part}" for m in ("image", "text") for part in ("weight", "bias")}
    assert rest == heads | norms | {"vision_head.weight", "language_head.weight"}


def test_patches_that_are_not_kept_are_not_read() -> None:
    """The rest keep their own positions; what was left out changes nothing, what was kept does."""
    model, side = randomize(BEiT3(DECOUPLED)), DECOUPLED.patch
    image = torch.randint(0, 256, (2, 3, IMAGE_PX, IMAGE_PX), dtype=torch.uint8)
    every = make_plan({"image": {"image": [PATCHES + 1] * 2}})
    some = make_plan({"image": {"image": [3] * 2}})
    keep = torch.tensor([[0, PATCHES - 1], [1, 2]])
    with torch.no_grad():
        rows = model.vision(image, None).view(2, PATCHES + 1, -1)
        kept = model.vision(image, None, keep).view(2, 3, -1)
        whole = model(every, image=image, keep=torch.arange(PATCHES).expand(2, -1)).values
        before = model(some, image=image, keep=keep).values
        torch.testing.assert_close(whole, model(every, image=image).values)
        for i in range(2):
            assert torch.equal(kept[i], rows[i, [0, *(keep[i] + 1).tolist()]])
        image[0, :, :side, side : 2 * side] ^= 255  # patch 1 of the first picture
        assert torch.equal(model(some, image=image, keep=keep).values, before)
        image[0, :, :side, :side] ^= 255  # its patch 0
        assert not torch.equal(model(some, image=image, keep=keep).values[:3], before[:3])


# ------------------------------------------------------------------------------------------------------------- answers


def heads(dim: int, pictures: int, answers: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of what a fine-tuned file has beyond the encoder (masked.md 6.6)."""
    both = dict.fromkeys(("weight", "bias"), (2 * dim,))
    if pictures == 2:
        return {
            **{f"head.norm1.{name}": (4 * dim,) for name in ("weight", "bias")},
            "head.dense1.weight": (2 * dim, 4 * dim), "head.dense1.bias": (2 * dim,),
            **{f"head.norm2.{name}": shape for name, shape in both.items()},
            "head.dense2.weight": (answers, 2 * dim), "head.dense2.bias": (answers,),
        }  # fmt: skip
    return {
        "pooler.norm.weight": (dim,), "pooler.norm.bias": (dim,),
        "pooler.dense.weight": (dim, dim), "pooler.dense.bias": (dim,),
        "head.0.weight": (2 * dim, dim), "head.0.bias": (2 * dim,),
        **{f"head.1.{name}": shape for name, shape in both.items()},
        "head.3.weight": (answers, 2 * dim), "head.3.bias": (answers,),
    }  # fmt: skip


@pytest.mark.parametrize(("pictures", "answers", "layout"), [(1, 3129, "official"), (2, 2, "official_nlvr2")])
def test_fine_tuned_models_have_the_released_keys(pictures: int, answers: int, layout: str) -> None:
    """No masked heads; where a pooler norms what is read, no final norm either."""
    shape = dataclasses.replace(PRESETS["beit3_base_patch16_224"], masked=False, answers=answers, pictures=pictures)
    found = {key: tuple(x.shape) for key, x in to_theirs(on_meta(shape).state_dict(), LAYOUTS[layout]).items()}
    expected = released(768, 12) | heads(768, pictures, answers)
    gone = ("mlm_head.", "mim_head.", *(("beit3.encoder.layer_norm.",) if pictures == 1 else ()))
    assert found == {key: shape for key, shape in expected.items() if not key.startswith(gone)}


def answering(pictures: int) -> BEiT3:
    shape = dataclasses.replace(DECOUPLED, masked=False, answers=3, pictures=pictures)
    return randomize(BEiT3(shape)).eval()


def texts(count: int) -> list[Tensor]:
    return [torch.tensor([0, *range(4 + n, 7 + 2 * n), 2]) for n in range(count)]


def plan_of(pictures: int, ids: list[Tensor]):
    """Every text with each of its pictures."""
    lengths = [len(own) for own in ids for _ in range(max(1, pictures))]
    if not pictures:
        return make_plan({"text": {"text": lengths}})
    return make_plan({"pair": {"image": [PATCHES + 1] * len(lengths), "text": lengths}})


def test_an_answer_to_a_picture_is_read_off_its_class_token() -> None:
    """masked.md 6.3: norm, dense, tanh; then dense, norm, GELU, dense."""
    model, ids = answering(1), texts(3)
    image = pictures(3)
    tokens = model.encode(image=image, text=ids)
    x = tokens.prefix("image")
    x = torch.tanh(model.pooler.dense(model.pooler.norm(x)))
    head = model.answer_head
    expected = head.out(torch.nn.functional.gelu(head.norm(head.dense(x))))
    found = model.answer(plan_of(1, ids), image=image, text=torch.cat(ids))
    torch.testing.assert_close(found, expected)


def test_an_answer_about_two_pictures_reads_both_with_the_text() -> None:
    """masked.md 6.3: class token and <s> of the first, then of the second picture; every pair on its own."""
    model, ids = answering(2), texts(2)
    image = pictures(4)
    found = model.answer(plan_of(2, ids), image=image, text=torch.cat([ids[0], ids[0], ids[1], ids[1]]))
    for i, own in enumerate(ids):
        read = []
        for picture in image[2 * i : 2 * i + 2]:
            tokens = model.encode(image=picture[None], text=[own])
            read += [tokens.prefix("image"), tokens.prefix("text")]
        torch.testing.assert_close(found[i : i + 1], model.answer_head(model.pooler(torch.cat(read, 1))))
    swapped = model.answer(plan_of(2, ids), image=image[[1, 0, 3, 2]], text=torch.cat([ids[0], ids[0], ids[1], ids[1]]))
    assert (swapped - found).abs().max() > 1e-3


def test_an_answer_to_a_text_is_read_off_its_first_token() -> None:
    model, ids = answering(0), texts(3)
    tokens = model.encode(text=ids)
    found = model.answer(plan_of(0, ids), text=torch.cat(ids))
    torch.testing.assert_close(found, model.answer_head(model.pooler(tokens.prefix("text"))))


def test_heads_of_two_pictures_start_at_a_thousandth() -> None:
    torch.manual_seed(0)
    model = BEiT3(dataclasses.replace(DECOUPLED, masked=False, answers=2, pictures=2, dim=64, hidden=64))
    model.init_weights()
    assert model.answer_head.out.weight.abs().max() <= 0.02 * 1e-3
    expected = 0.02 * 1e-3 * 0.54  # cut at one deviation
    assert model.answer_head.dense.weight.detach().std() == pytest.approx(expected, rel=0.05)


def test_who_answers_nothing_says_so() -> None:
    with pytest.raises(ConfigError, match="answers nothing"):
        BEiT3(DECOUPLED).answer(plan_of(0, texts(1)), text=texts(1)[0])
    with pytest.raises(ConfigError, match="0, 1 or 2 pictures"):
        dataclasses.replace(DECOUPLED, answers=2, pictures=3)
