"""CLIP: published sizes, packed texts against padded ones, the two ways to embed, the temperature, first weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.data.bpe import clip_bpe
from multiway.data.collate import DualCollate
from multiway.data.text import TextTokenizer
from multiway.errors import ConfigError, ConversionError
from multiway.plan import make_plan
from multiway.preprocessor import Preprocessor
from multiway.pretrained import Pretrained, load
from multiway.systems.clip import CLIP, LAYOUTS, PRESETS, Config
from multiway.tasks.needs import check
from multiway.tasks.retrieval import ImageTextContrast
from multiway.weights.rename import to_theirs
from tests.contracts.toys import CLIP_VIT, GRID, WORDS, randomize, sample
from tests.tiny import pictures

PARAMETERS = {
    "clip_vit_base_patch32_224": 151_277_313,
    "clip_vit_base_patch16_224": 149_620_737,
    "clip_vit_large_patch14_224": 427_616_513,
    "clip_vit_large_patch14_336": 427_944_193,
    "clip_resnet50_224": 102_007_137,
    "clip_resnet101_224": 119_688_033,
    "clip_resnet50x4_288": 178_300_601,
    "clip_resnet50x16_384": 290_979_217,
    "clip_resnet50x64_448": 623_258_305,
}
LARGER = {"huge": 986.11, "giant": 1366.68, "gigantic": 2539.57}  # millions


def blank(name: str) -> CLIP:
    with torch.device("meta"):
        return CLIP(PRESETS[name])


@pytest.mark.parametrize("name", PARAMETERS)
def test_openais_nine_have_their_number_of_parameters(name: str) -> None:
    model = blank(name)
    assert sum(x.numel() for x in model.parameters()) == PARAMETERS[name]
    assert model.config.activation == "quick_gelu"
    names = to_theirs(model.state_dict(), LAYOUTS["openai"])
    assert {"visual.attnpool.c_proj.weight", "visual.proj"} & names.keys()
    assert names["logit_scale"].shape == ()


@pytest.mark.parametrize("size", LARGER)
def test_open_clips_larger_ones_have_their_number_of_parameters(size: str) -> None:
    model = blank(f"clip_vit_{size}_patch14_224_laion")
    assert sum(x.numel() for x in model.parameters()) / 1e6 == pytest.approx(LARGER[size], abs=0.005)
    assert model.config.activation == "gelu"


def test_official_names_and_shapes() -> None:
    theirs = to_theirs(blank("clip_vit_base_patch32_224").state_dict(), LAYOUTS["openai"])
    assert len(theirs) == 302
    shapes = {
        "positional_embedding": (77, 512), "text_projection": (512, 512), "token_embedding.weight": (49408, 512),
        "visual.class_embedding": (768,), "visual.positional_embedding": (50, 768), "visual.proj": (768, 512),
        "visual.conv1.weight": (768, 3, 32, 32), "visual.transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
        "transformer.resblocks.11.mlp.c_fc.bias": (2048,),
    }  # fmt: skip
    assert {name: tuple(theirs[name].shape) for name in shapes} == shapes
    with pytest.raises(ConversionError, match="no rule"):
        to_theirs(blank("clip_resnet50_224").state_dict(), LAYOUTS["transformers"])


@pytest.fixture
def model() -> CLIP:
    return randomize(CLIP(CLIP_VIT)).eval()  # type: ignore[return-value]


def texts(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 40, (n,), generator=generator) for n in lengths]


def padded_twin(model: CLIP, ids: list[Tensor]) -> Tensor:
    """Text vectors as the original makes them: all padded to one length, causal, padding not masked."""
    p = dict(model.encoder.language.named_parameters())
    x = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    ends = torch.tensor([len(own) - 1 for own in ids])
    x = p["words.weight"][x] + p["positions"][: x.shape[1]]
    count, length, dim = x.shape
    later = torch.full((length, length), float("-inf")).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (dim,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    for layer in range(CLIP_VIT.text_depth):
        own, one = f"blocks.{layer}.", "experts.shared."
        qkv, out, ffn = (f"{own}{part}.{one}" for part in ("attention.qkv", "attention.out", "ffn"))
        h = norm(x, f"{qkv}norm") @ p[f"{qkv}linear.weight"].T + p[f"{qkv}linear.bias"]
        q, k, v = h.view(count, length, 3, CLIP_VIT.text_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + later).softmax(-1)
        h = (scores @ v).transpose(1, 2).reshape(x.shape)
        x = x + h @ p[f"{out}weight"].T + p[f"{out}bias"]
        h = norm(x, f"{ffn}norm") @ p[f"{ffn}fc1.weight"].T + p[f"{ffn}fc1.bias"]
        x = x + (h * torch.sigmoid(1.702 * h)) @ p[f"{ffn}fc2.weight"].T + p[f"{ffn}fc2.bias"]
    ended = norm(x, "norm.experts.shared")[torch.arange(count), ends]
    return F.normalize(ended @ p["projection.weight"].T, dim=1)


@pytest.mark.parametrize("lengths", [[5, 1, 14, 3], [4, 4], [1]], ids=str)
def test_packed_texts_equal_padded_ones(model: CLIP, lengths: list[int]) -> None:
    ids = texts(lengths)
    got, want = model.embed(model.encode(text=ids), "text"), padded_twin(model, ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(4))
    parameters = list(model.encoder.language.parameters())
    gradients = [torch.autograd.grad((x * weight).sum(), parameters) for x in (got, want)]
    for g, w in zip(*gradients, strict=True):
        assert (g - w).norm() <= 1e-5 * w.norm() + 1e-7


def test_a_token_sees_nothing_behind_it(model: CLIP) -> None:
    (ids,) = texts([9])
    whole = model.encode(text=[ids]).values
    other = ids.clone()
    other[5:] = 7
    changed = model.encode(text=[other]).values
    torch.testing.assert_close(whole[:5], changed[:5], rtol=0, atol=1e-6)
    assert not torch.allclose(whole[5], changed[5], atol=1e-3)


def test_a_batch_is_embedded_as_its_parts_alone(model: CLIP) -> None:
    pairs = [sample(0, "pair", i) for i in range(5)]
    batch = DualCollate(words=WORDS, grid=GRID, causal=True)({"pair": pairs})
    image, text = model.embed_pairs(batch["plan"], image=batch["image"], text=batch["text"])
    alone = model.embed(model.encode(image=batch["image"]), "image")
    torch.testing.assert_close(image, alone, rtol=0, atol=1e-6)
    ids = [torch.from_numpy(WORDS.framed(pair.text, "pair")) for pair in pairs if pair.text is not None]
    torch.testing.assert_close(text, model.embed(model.encode(text=ids), "text"), rtol=0, atol=1e-6)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(5))


def test_patches_that_are_not_read_do_not_matter(model: CLIP) -> None:
    pairs = [sample(0, "pair", i) for i in range(3)]
    batch = DualCollate(words=WORDS, grid=GRID, causal=True, keep=0.5)({"pair": pairs})
    given = {"text": batch["text"], "keep": batch["image_keep"]}
    image, _ = model.embed_pairs(batch["plan"], image=batch["image"], **given)
    left_out = torch.ones(3, 16).scatter(1, batch["image_keep"], 0.0).view(3, 1, 4, 4)
    noise = F.interpolate(left_out, scale_factor=8).bool().expand(-1, 3, -1, -1)
    other = torch.where(noise, 255 - batch["image"], batch["image"])
    assert torch.equal(image, model.embed_pairs(batch["plan"], image=other, **given)[0])
    assert not torch.allclose(image, model.embed_pairs(batch["plan"], image=batch["image"], text=batch["text"])[0])


def test_what_it_cannot_read_is_refused(model: CLIP) -> None:
    with pytest.raises(ConfigError, match="a text has 15 tokens, this model reads at most 14"):
        model.encode(text=texts([15]))
    with pytest.raises(ConfigError, match="pictures alone or texts alone"):
        model.encode(image=torch.zeros(1, 3, 32, 32), text=texts([3]))
    with pytest.raises(ConfigError, match="causal_text=True"):
        model.encoder.language(torch.arange(8), make_plan({"text": {"text": [5, 3]}}))
    with pytest.raises(ConfigError, match="image with text is missing"):
        check(model, frozenset({frozenset({"image", "text"})}), "nlvr2")


def test_blocks_are_those_of_both_towers_and_count_from_the_top(model: CLIP) -> None:
    assert len(model.encoder.blocks) == CLIP_VIT.depth + CLIP_VIT.text_depth
    assert model.layers == 3
    layers = {
        "encoder.vision.trunk.embed.weight": 0, "encoder.vision.first_norm.weight": 0, "encoder.language.positions": 0,
        "encoder.vision.trunk.blocks.0.ffn.fc1.weight": 1, "encoder.vision.trunk.blocks.2.ffn.fc1.weight": 3,
        "encoder.language.blocks.0.ffn.experts.shared.fc1.weight": 2, "encoder.language.projection.weight": 4,
        "encoder.vision.norm.bias": 4, "logit_scale": 4,
    }  # fmt: skip
    names = dict(model.named_parameters())
    assert {name: model.layer_of(name) for name in layers} == layers and layers.keys() <= names.keys()
    assert {name for name, x in names.items() if x.ndim > 1 and model.no_decay(name)} == {
        "encoder.vision.trunk.cls_token"
    }


def test_the_temperature_stays_within_1_and_100(model: CLIP) -> None:
    objective = ImageTextContrast(model)
    for scale, factor in ((6.0, 100.0), (-1.0, 1.0), (2.0, math.exp(2))):
        torch.nn.init.constant_(model.logit_scale, scale)
        objective.after_step(0)
        assert model.temperature().item() == pytest.approx(factor)


def test_first_weights_have_the_deviations_of_the_original() -> None:
    width, depth = 256, 3
    model = CLIP(dataclasses.replace(CLIP_VIT, text_dim=width, text_depth=depth, text_heads=4, text_hidden=4 * width))
    torch.manual_seed(0)
    model.init_weights()
    language, narrow = model.encoder.language, (2 * depth) ** -0.5 * width**-0.5
    block = language.blocks[1]
    attention, ffn = block.attention, block.ffn.experts["shared"]
    for weight, std in (
        (language.words.weight, 0.02),
        (language.positions, 0.01),
        (attention.qkv.experts["shared"].linear.weight, width**-0.5),
        (attention.out.experts["shared"].weight, narrow),
        (ffn.fc1.weight, (2 * width) ** -0.5),
        (ffn.fc2.weight, narrow),
        (language.projection.weight, width**-0.5),
        (model.encoder.vision.trunk.positions, CLIP_VIT.dim**-0.5),
        (model.encoder.vision.projection.weight, CLIP_VIT.dim**-0.5),
    ):
        assert weight.detach().std().item() == pytest.approx(std, rel=0.1)
    assert model.temperature().item() == pytest.approx(1 / 0.07)
    assert not attention.qkv.experts["shared"].linear.bias.any()


def test_other_sizes_interpolate_the_positions(model: CLIP) -> None:
    before = model.encoder.vision.trunk.positions.detach().clone()
    model.set_image_size(48)
    assert torch.equal(model.encoder.vision.trunk.positions[0], before[0])
    assert model.embed(model.encode(image=torch.zeros(2, 3, 48, 48)), "image").shape == (2, CLIP_VIT.out)
    assert model.config.image_px == 48


def test_a_folder_brings_its_tokenizer_and_the_length_of_texts(model: CLIP, tmp_path: Path) -> None:
    words = TextTokenizer(clip_bpe([("r", "e"), ("re", "d</w>")]))
    config = dataclasses.replace(CLIP_VIT, vocab=words.vocab)
    ready = Pretrained(randomize(CLIP(config)).eval(), words, Preprocessor.of(config, words))
    assert (ready.preprocessor.text_tokens, ready.preprocessor.share) == (14, 1.0)
    assert (ready.preprocessor.bos, ready.preprocessor.eos, ready.preprocessor.hide) == (514, 515, None)
    ready.save_pretrained(tmp_path / "clip")
    again = load(tmp_path / "clip")
    captions = ["a red square", "Red" * 30, ""]
    assert torch.equal(again.encode_text(captions), ready.encode_text(captions))
    assert torch.equal(again.encode_image(pictures(2)), ready.encode_image(pictures(2)))
    assert again.fingerprint == ready.fingerprint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_heads": 5}, "text_dim 24 is not divisible by text_heads 5"),
        ({"heads": 5}, "CLIP needs dim divisible by heads"),
        ({"stages": (1, 1, 1, 1)}, "a ResNet has 4 stages, patch 32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Config(**{**vars(CLIP_VIT), **changes})
