"""Feature distillation against its paper: what the teacher is asked, what it is not part of, names, start."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.errors import ConfigError
from multiway.systems.beit3 import BEiT3
from multiway.systems.feature_distillation import LAYOUTS, PRESETS, Config, FeatureDistillation, Student
from multiway.systems.simmim import Config as ResNetConfig
from multiway.systems.simmim import SimMIM
from multiway.systems.vit import Config as TeacherConfig
from multiway.systems.vit import ViT
from multiway.types import Batch
from multiway.weights.rename import to_theirs
from tests.contracts.toys import DECOUPLED, randomize

VIT = Config(dim=32, depths=(3,), heads=4, patch=8, image_px=32, teacher_dim=24)
TEACHER = TeacherConfig(dim=24, depth=2, heads=2, hidden=48, patch=8, image_px=32, drop_path=0.5)


def batch(count: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)}


def distilling(teacher: nn.Module | None = None, config: Config = VIT) -> FeatureDistillation:
    built = FeatureDistillation(Student(config), randomize(teacher or ViT(TEACHER), seed=1))
    randomize(built)
    return built


def loss_of(built: FeatureDistillation, given: Batch) -> Tensor:
    return built(given, built.counts(given)).loss


def test_the_loss_is_the_mean_over_everything() -> None:
    built, given = distilling(), batch()
    teacher = built.teacher.encode(image=given["image"]).dense("image")[0]
    mean, variance = teacher.mean(-1, keepdim=True), teacher.var(-1, unbiased=False, keepdim=True)
    target = ((teacher - mean) / (variance + 1e-5).sqrt()).detach()
    tokens = built.model.encode(image=given["image"]).dense("image")[0]
    error = (tokens @ built.model.projection.weight.T + built.model.projection.bias - target).abs()
    assert error.shape == (4, 17, 24) and error.max() > 2 > error.min()
    want = torch.where(error < 2, error.square() / 4, error - 1).mean()
    torch.testing.assert_close(loss_of(built, given), want, rtol=1e-5, atol=0)


def test_targets_are_whitened() -> None:
    targets = distilling().targets(batch()["image"])
    assert targets.shape == (4, 17, 24) and not targets.requires_grad
    torch.testing.assert_close(targets.mean(-1), torch.zeros(4, 17), rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.var(-1, unbiased=False), torch.ones(4, 17), rtol=0, atol=1e-3)


def test_the_teacher_is_no_part_of_what_is_trained() -> None:
    teacher = ViT(TEACHER)
    built = distilling(teacher)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    names = {name.split(".")[0] for name, _ in built.named_parameters()}
    assert names == {"model"} and all(name.startswith("model.") for name in built.state_dict())
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
    for seed in range(3):
        loss_of(built, batch(seed=seed)).backward()
        optimizer.step()
    assert before and all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_only_the_student_drops_paths() -> None:
    config = dataclasses.replace(VIT, drop_path=0.5)
    teacher = ViT(TEACHER)
    built, given = distilling(teacher, config), batch()
    seen: list[Tensor | None] = []
    teacher.encoder.register_forward_hook(lambda *called: seen.append(called[2]["draws"]), with_kwargs=True)
    given["drop_path"] = torch.full((6, 4), 0.4)  # dropped where the rate is higher
    loss = loss_of(built, given)
    assert seen == [None]
    assert loss.item() != loss_of(built, {"image": given["image"]}).item()


def test_the_teacher_stays_in_evaluation_mode() -> None:
    """A ResNet's batch norms would look at the whole batch, and move."""
    teacher = SimMIM(ResNetConfig(encoder="resnet", dim=8, depths=(1, 1), patch=4, image_px=32))
    built = distilling(
        teacher, dataclasses.replace(VIT, encoder="swin", depths=(1, 1), patch=4, window=4, teacher_dim=64)
    )
    built.train()
    assert built.model.training and not any(module.training for module in teacher.modules())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    whole = built.targets(batch()["image"])
    torch.testing.assert_close(whole[:1], built.targets(batch()["image"][:1]), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_moves_with_the_objective() -> None:
    teacher = ViT(TEACHER)
    distilling(teacher).to("meta")
    assert all(p.is_meta for p in teacher.parameters())


def test_a_beit3_teaches_too() -> None:
    built = distilling(BEiT3(DECOUPLED), dataclasses.replace(VIT, teacher_dim=DECOUPLED.dim))
    assert loss_of(built, batch()).isfinite()
    assert built.targets(batch()["image"]).shape == (4, 17, 32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"patch": 4}, r"17 tokens of 24 numbers.*student 65 of 24"),
        ({"teacher_dim": 32}, r"17 of 32.*model.teacher_dim=24"),
        ({"encoder": "swin", "depths": (1, 1), "patch": 4, "window": 4}, "student 16 of 24.*class token"),
        ({"teacher_dim": 0}, "no projection"),
    ],
)
def test_a_student_that_does_not_fit_its_teacher_is_told_how(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        loss_of(distilling(config=dataclasses.replace(VIT, **change)), batch())


def test_parts_of_a_batch_add_up() -> None:
    built, given = distilling(), batch(5)
    total = built.counts(given)
    parts = [built({"image": part}, total).loss for part in given["image"].split([1, 4])]
    torch.testing.assert_close(sum(parts), loss_of(built, given), rtol=1e-6, atol=0)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = to_theirs(Student(config).state_dict(), LAYOUTS["official"])
    return {name: tuple(value.shape) for name, value in state.items()}


def test_a_vit_has_the_official_names() -> None:
    theirs = shapes(PRESETS["fd_clip_vit_large_patch14_224"])
    assert theirs["encoder.rel_pos_bias.relative_position_bias_table"] == (31**2 + 3, 16)
    assert theirs["decoder.0.weight"] == (1024, 1024, 1) and theirs["encoder.norm.weight"] == (1024,)
    assert theirs["encoder.blocks.23.attn.q_bias"] == (1024,) and "encoder.mask_token" not in theirs
    assert len(theirs) == 24 * 15 + 3 + 1 + 2 + 2  # blocks; class token and patches; bias; norm; projection
    drops = LAYOUTS["official"].drops
    assert drops("feature_model.visual.proj") and drops("encoder.rel_pos_bias.relative_position_index")
    assert not drops("encoder.norm.weight")


def test_a_swin_v2_has_the_official_names() -> None:
    theirs = shapes(PRESETS["fd_esvit_swinv2_base_window14_224"])
    assert theirs["encoder.layers.2.blocks.17.attn.rpe_mlp.0.weight"] == (512, 2)
    assert theirs["encoder.layers.2.downsample.norm.bias"] == (1024,)
    assert theirs["decoder.0.weight"] == (1024, 1024, 1)


def test_students_start_as_published() -> None:
    torch.manual_seed(0)
    for config, gate in (
        (VIT, None),
        (dataclasses.replace(VIT, encoder="swin_v2", depths=(2, 2), patch=4, window=4), 1e-5),
    ):
        model = Student(config)
        model.init_weights()
        for layer, block in enumerate(model.encoder.blocks, start=1):
            named = dict(block.named_parameters())
            [out] = [p for name, p in named.items() if name.endswith(".out.weight")]
            full = 0.02 if gate else 0.5396 * 0.02
            assert out.std().item() == pytest.approx(full / math.sqrt(2 * layer), rel=0.1)
            if gate is None:
                assert (named["gamma_1"] == 0.1).all()
            else:
                assert (named["attention.norm.weight"] == gate).all() and not named["ffn.norm.bias"].any()


def test_it_learns_the_teachers_tokens() -> None:
    built = FeatureDistillation(Student(VIT), randomize(ViT(TEACHER), seed=1))
    torch.manual_seed(0)
    built.init_weights()
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(150):
        loss = loss_of(built, batch(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses[::15]
    found = F.cosine_similarity(built.model.predict(batch(2)["image"]), built.targets(batch(2)["image"]), dim=-1)
    assert found.mean() > 0.8
