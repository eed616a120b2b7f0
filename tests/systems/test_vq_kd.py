"""VQ-KD against the paper and the released code: sizes, names, codes, losses, and a codebook that stays in use."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.data.image import View
from multiway.data.views import store_views
from multiway.errors import ConfigError, NumericsError
from multiway.nn import quantize
from multiway.nn.patch import patchify
from multiway.plan import Tokens, dense_tokens
from multiway.systems import vit
from multiway.systems.vq_kd import LAYOUTS, PRESETS, VQKD, Config, VectorQuantizedDistillation
from multiway.types import Batch
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import randomize

SHAPE = {"dim": 32, "depth": 3, "heads": 4, "hidden": 64, "patch": 8, "image_px": 32}
SMALL = Config(**SHAPE, codes=19, code_dim=8, decoder_depth=2, teacher_dim=24)


def initialised(config: Config = SMALL) -> VQKD:
    torch.manual_seed(0)
    model = VQKD(config)
    model.init_weights()
    return model


def pictures(count: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, height // 4, width // 4), generator=generator).float()
    return F.interpolate(coarse, size=(height, width), mode="bilinear").round().byte()


class Pixels(nn.Module):
    """A teacher whose features are the patches."""

    def __init__(self, patch: int = 8) -> None:
        super().__init__()
        self.patch = patch

    def encode(self, *, image: Tensor) -> Tokens:
        return dense_tokens(patchify(image.float() / 127.5 - 1, self.patch)[..., :24])

    def patches(self, tokens: Tokens) -> Tensor:
        return tokens.dense("image")[0]


@pytest.mark.parametrize(
    ("name", "total"),
    [("3x768x12_clip", 108_829_216), ("1x768x12_clip", 94_655_008), ("1x768x12_dino", 94_851_872)],
)
def test_presets_have_the_published_numbers_of_parameters(name: str, total: int) -> None:
    with torch.device("meta"):
        model = VQKD(PRESETS[f"vqkd_encoder_base_decoder_{name}"])

    def count(*parts: nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    assert count(model) == total
    assert count(model.encoder, model.norm) == 85_789_440
    assert count(model.decoder, model.decoder_norm) == (21_440_256 if name.startswith("3") else 7_266_048)


def test_official_files_are_read_whole() -> None:
    """masked.md 4.5."""
    with torch.device("meta"):
        model = VQKD(PRESETS["vqkd_encoder_base_decoder_1x768x12_clip"])
    theirs = to_theirs(model.state_dict(), LAYOUTS["official"])
    shapes = {
        "encoder.pos_embed": (1, 197, 768),
        "decoder.patch_embed.proj.weight": (768, 32, 1, 1),
        "decoder.pos_embed": (1, 197, 768),
        "decoder.blocks.0.attn.q_bias": (768,),
        "encoder.blocks.11.attn.qkv.weight": (2304, 768),
        "decoder.fc_norm.weight": (768,),
        "quantize.cluster_size": (8192,),
        "quantize.embedding.weight": (8192, 32),
        "quantize.embedding.initted": (1,),
        "encode_task_layer.0.weight": (768, 768),
        "encode_task_layer.2.weight": (32, 768),
        "decode_task_layer.2.weight": (512, 768),
    }
    assert {name: tuple(theirs[name].shape) for name in shapes} == shapes
    more = (
        "quantize.embedding.cluster_size",
        "quantize.embedding.embed_avg",
        "teacher_model.proj",
        "loss.a",
        "scaling_b",
    )
    given = {**theirs, **{name: torch.empty(1, device="meta") for name in more}}
    assert to_ours(given, LAYOUTS["official"], model.state_dict()).keys() == model.state_dict().keys()


def plain(state: dict[str, Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and features as decoded, from weights under official names alone (masked.md 4.2)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def run(x: Tensor, side: str, patch: int) -> Tensor:
        x = F.conv2d(x, state[f"{side}.patch_embed.proj.weight"], state[f"{side}.patch_embed.proj.bias"], stride=patch)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([state[f"{side}.cls_token"].expand(len(x), -1, -1), x], dim=1) + state[f"{side}.pos_embed"]
        layer = 0
        while (block := f"{side}.blocks.{layer}") + ".norm1.weight" in state:
            q_bias, v_bias = state[f"{block}.attn.q_bias"], state[f"{block}.attn.v_bias"]
            bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
            qkv = norm(x, f"{block}.norm1") @ state[f"{block}.attn.qkv.weight"].T + bias
            q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
            mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
            x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
            layer += 1
        return norm(x, f"{side}.fc_norm")[:, 1:]

    def task(x: Tensor, name: str) -> Tensor:
        return linear(linear(x, f"{name}.0").tanh(), f"{name}.2")

    z = task(run(image / 127.5 - 1, "encoder", 8), "encode_task_layer")
    z = z / z.norm(dim=-1, keepdim=True)
    codes = (z[:, :, None] - state["quantize.embedding.weight"]).square().sum(-1).argmin(-1)
    drawn = state["quantize.embedding.weight"][codes].transpose(1, 2).unflatten(2, (4, 4))
    return codes, task(run(drawn, "decoder", 1), "decode_task_layer")


def test_codes_and_decoded_features_are_those_of_the_released_code() -> None:
    model = randomize(VQKD(SMALL))
    model.codebook.weight.copy_(F.normalize(torch.randn(19, 8, generator=torch.Generator().manual_seed(1)), dim=-1))
    image = pictures()
    codes, features = plain(to_theirs(model.state_dict(), LAYOUTS["official"]), image)
    assert model.codes == 19 and len(codes.unique()) > 4
    assert torch.equal(model(image), codes) and not model(image).requires_grad
    torch.testing.assert_close(model.decode(F.embedding(codes, model.codebook.weight)), features, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.features(image).dtype == model.decode(model.features(image)).dtype == torch.float32


def test_bytes_and_pixels_from_minus_one_to_one_have_the_same_codes() -> None:
    model, image = initialised(), pictures()
    assert torch.equal(model(image.float() / 127.5 - 1), model(image))
    dark = image // 255  # bytes of 0 and 1 are bytes, whatever the largest
    assert torch.equal(model(dark), model(dark.float() / 127.5 - 1))


def test_the_loss_is_the_cosine_distance_to_the_teacher_and_the_commitment() -> None:
    objective, image = VectorQuantizedDistillation(initialised(), Pixels(), commitment=0.5), pictures()
    counts = objective.counts({"image": image})
    assert counts == {"teacher": 4 * 16}
    out = objective({"image": image}, counts)
    model = objective.model
    z = model.features(image)
    w = model.codebook.weight[model(image)]
    found, target = model.decode(w), Pixels().patches(Pixels().encode(image=image))
    apart = 1 - (F.normalize(found, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()
    commitment = F.mse_loss(z, w)
    assert out.loss.item() == pytest.approx((apart + 0.5 * commitment).item(), rel=1e-5)
    assert out.sums["teacher"].item() / 64 == pytest.approx(apart.item(), rel=1e-5)
    assert out.sums["teacher/commitment"].item() / 64 == pytest.approx(commitment.item(), rel=1e-5)


def test_gradients_pass_the_codebook_as_if_it_were_not_there() -> None:
    objective, image = VectorQuantizedDistillation(initialised(), Pixels(), commitment=0.0), pictures()
    model = objective.model
    objective({"image": image}, {"teacher": 64}).loss.backward()
    w = model.codebook.weight[model(image)].requires_grad_()
    target = Pixels().patches(Pixels().encode(image=image))
    (at_codes,) = torch.autograd.grad((1 - F.cosine_similarity(model.decode(w), target, dim=-1)).mean(), w)
    (want,) = torch.autograd.grad(model.features(image), model.encoder.cls_token, at_codes)
    torch.testing.assert_close(model.encoder.cls_token.grad, want)
    assert want.any()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64)])
def test_a_teacher_with_another_grid_is_resized_bilinearly(height: int, width: int) -> None:
    model = initialised()
    model.set_image_size((height, width))
    objective, image = VectorQuantizedDistillation(model, Pixels(patch=4)), pictures(2, height, width)
    fine = patchify(image.float() / 127.5 - 1, 4)[..., :24].transpose(1, 2).unflatten(2, (height // 4, width // 4))
    want = F.interpolate(fine, size=(height // 8, width // 8), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(objective.targets(image), want)
    objective({"image": image}, objective.counts({"image": image})).loss.backward()


def test_a_teacher_of_another_width_is_refused() -> None:
    objective = VectorQuantizedDistillation(initialised(dataclasses.replace(SMALL, teacher_dim=16)), Pixels())
    with pytest.raises(
        ConfigError, match="16 patches of 24 numbers.*expected a grid and 16: set model.teacher_dim to 24"
    ):
        objective.targets(pictures())


def test_any_of_our_encoders_teaches_and_is_no_part_of_the_objective() -> None:
    teacher = randomize(vit.ViT(vit.Config(**SHAPE)))
    want = teacher.patches(teacher.encode(image=pictures()))
    objective = VectorQuantizedDistillation(initialised(dataclasses.replace(SMALL, teacher_dim=32)), teacher)
    torch.testing.assert_close(objective.targets(pictures()), want)
    names = {name for name, _ in objective.named_parameters()} | set(objective.state_dict())
    assert not [name for name in names if "teacher" in name]
    assert not objective.targets(pictures()).requires_grad


def train(objective: VectorQuantizedDistillation, steps: int, lr: float = 3e-3) -> list[dict[str, float]]:
    """A few steps on fresh pictures; the means of every term."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=lr, betas=(0.9, 0.99))
    rows = []
    for step in range(steps):
        given: Batch = {"image": pictures(16, seed=step)}
        counts = objective.counts(given)
        out = objective(given, counts)
        out.loss.backward()
        optimizer.step()
        objective.after_step(step)
        optimizer.zero_grad()
        rows.append({name: value.item() / counts["teacher"] for name, value in out.sums.items()})
    return rows


def test_it_learns_and_keeps_its_codes_in_use(monkeypatch) -> None:
    monkeypatch.setattr(quantize, "WINDOW", 10)
    objective = VectorQuantizedDistillation(initialised(), Pixels())
    rows = train(objective, 80)
    assert (rows[0]["teacher/usage"], rows[0]["teacher/perplexity"]) == (0, 1)
    assert rows[0]["teacher"] > 0.9
    last = {name: float(np.mean([row[name] for row in rows[-10:]])) for name in rows[0]}
    assert last["teacher"] < 0.5
    assert last["teacher/usage"] > 0.9 and last["teacher/perplexity"] > 6
    used = len(objective.model(pictures(64, seed=99)).unique())
    assert used > 9


def test_evaluation_moves_no_code_and_notes_nothing() -> None:
    objective = VectorQuantizedDistillation(initialised(), Pixels())
    train(objective, 2)
    before = {name: x.clone() for name, x in objective.state_dict().items()}
    objective.eval()
    given = {"image": pictures()}
    objective(given, objective.counts(given))
    assert objective.update.seen == 0
    assert all(torch.equal(x, before[name]) for name, x in objective.state_dict().items())


def test_a_checkpoint_holds_all_that_the_codebook_follows(monkeypatch) -> None:
    monkeypatch.setattr(quantize, "WINDOW", 4)
    whole = VectorQuantizedDistillation(initialised(), Pixels())
    train(whole, 3)
    resumed = VectorQuantizedDistillation(VQKD(SMALL), Pixels())
    resumed.load_state_dict({name: x.clone() for name, x in whole.state_dict().items()})
    for objective in (whole, resumed):
        given = {"image": pictures(16, seed=50)}
        objective(given, objective.counts(given))
        objective.after_step(3)
    for name, x in whole.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name


def test_features_that_are_all_alike_end_the_run(monkeypatch) -> None:
    monkeypatch.setattr(quantize, "WINDOW", 2)
    objective = VectorQuantizedDistillation(initialised(dataclasses.replace(SMALL, codes=64)), Pixels())
    monkeypatch.setattr(objective.model, "down", Same())
    with pytest.raises(NumericsError, match="the codebook collapsed.*less than 5% of its 64 codes"):
        train(objective, 12)


class Same(nn.Module):
    """Whatever comes in, the same comes out."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :8] * 0 + 1


def test_first_weights_are_normal_and_rescaled_by_depth() -> None:
    model = initialised(dataclasses.replace(SMALL, dim=128, hidden=256))
    for part in (model.encoder, model.decoder):
        for layer, block in enumerate(part.blocks, 1):
            assert block.attention.out.weight.std().item() * math.sqrt(2 * layer) == pytest.approx(0.02, rel=0.03)
            assert block.ffn.fc1.weight.abs().max() > 0.06 and not block.attention.qkv.linear.bias.any()
        assert part.positions.std().item() == pytest.approx(0.02, rel=0.06)
        assert part.embed.bias.any() and (block.ffn.norm.weight == 1).all()
    assert model.down[2].weight.std().item() == pytest.approx(0.02, rel=0.06) and not model.up[0].bias.any()
    assert torch.allclose(model.codebook.weight.norm(dim=-1), torch.ones(19))


def test_stored_views_take_it_as_their_tokenizer(tmp_path) -> None:
    model, images = initialised(), pictures(3, 40, 48)
    views = store_views(
        tmp_path / "views", lambda i: images[i], 3, model, View(px=32, scale=(0.5, 1.0)), views=2, seed=0
    )
    assert views.code.shape == (3, 2, 16)
    seen, code = views.draw(images[1], 1, 32, np.random.default_rng(0))
    assert torch.equal(model(seen[None])[0], code)


def test_other_image_sizes_resize_both_sides() -> None:
    model = initialised()
    model.set_image_size((32, 64))
    assert model(pictures(2, 32, 64)).shape == (2, 32) and model.config.image_px == (32, 64)
    assert model.decode(model.features(pictures(2, 32, 64))).shape == (2, 32, 24)
