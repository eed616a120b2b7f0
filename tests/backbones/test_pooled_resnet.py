"""CLIP's residual network against one written from its description, on OpenAI's names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.backbones.pooled_resnet import PooledResNet
from multiway.errors import ConfigError
from multiway.systems.clip import CLIP, LAYOUTS, Config
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import randomize

STAGES, WIDTH, PX = (2, 1, 1, 1), 8, 64
CONFIG = Config(
    dim=WIDTH, stages=STAGES, patch=32, image_px=PX, out=12, text_dim=8, text_depth=1, text_heads=1, text_hidden=8,
    vocab=9,
)  # fmt: skip


def reference(image: Tensor, p: dict[str, Tensor], training: bool) -> Tensor:
    """Features (B, E) of pictures by masked.md 8.1; ``p``: parameters and buffers, named as OpenAI's files."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = p[f"{name}.running_mean"].clone(), p[f"{name}.running_var"].clone()
        return F.batch_norm(x, mean, var, p[f"{name}.weight"], p[f"{name}.bias"], training)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = p[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2)

    x = image
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = F.relu(norm(conv(x, f"visual.conv{i}", stride), f"visual.bn{i}"))
    x = F.avg_pool2d(x, 2)
    for stage, depth in enumerate(STAGES, start=1):
        for j in range(depth):
            name, stride = f"visual.layer{stage}.{j}", 2 if stage > 1 and j == 0 else 1
            y = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
            y = F.relu(norm(conv(y, f"{name}.conv2"), f"{name}.bn2"))
            y = norm(conv(F.avg_pool2d(y, stride), f"{name}.conv3"), f"{name}.bn3")
            if f"{name}.downsample.0.weight" in p:
                x = norm(conv(F.avg_pool2d(x, stride), f"{name}.downsample.0"), f"{name}.downsample.1")
            x = F.relu(x + y)
    tokens = x.flatten(2).permute(2, 0, 1)  # (H W, B, C)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + p["visual.attnpool.positional_embedding"][:, None]
    q, k, v, c = (f"visual.attnpool.{name}_proj" for name in "qkvc")
    mixed, _ = F.multi_head_attention_forward(
        tokens[:1], tokens, tokens, tokens.shape[2], 32 * WIDTH // 64, None,
        torch.cat([p[f"{name}.bias"] for name in (q, k, v)]), None, None, False, 0.0, p[f"{c}.weight"], p[f"{c}.bias"],
        use_separate_proj_weight=True, q_proj_weight=p[f"{q}.weight"], k_proj_weight=p[f"{k}.weight"],
        v_proj_weight=p[f"{v}.weight"],
    )  # fmt: skip
    return mixed[0]


@pytest.fixture
def model() -> CLIP:
    made = CLIP(CONFIG)
    randomize(made)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return made


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_features_and_gradients_equal_the_reference(model: CLIP, training: bool) -> None:
    model.double()  # batch norms over few numbers magnify rounding
    theirs = {name: x.clone() for name, x in to_theirs(model.state_dict(), LAYOUTS["openai"]).items()}
    for name, x in theirs.items():
        x.requires_grad_(x.is_floating_point() and "running" not in name)
    image = torch.randn(4, 3, PX, PX, generator=torch.Generator().manual_seed(2)).double()
    want = reference(image, theirs, training)
    tower = model.encoder.vision.train(training)
    got = tower.pool(tower(image))
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    given = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in theirs.items()}
    expected = to_ours(given, LAYOUTS["openai"], model.state_dict())
    for name, parameter in tower.named_parameters(prefix="encoder.vision"):
        assert parameter.grad is not None and expected[name].norm() > 0, name
        assert (parameter.grad - expected[name]).norm() <= 1e-8 * parameter.grad.norm(), name


def test_blocks_are_all_bottlenecks_in_order(model: CLIP) -> None:
    tower = model.encoder.vision
    assert len(tower.blocks) == sum(STAGES)
    assert [model.layer_of(f"encoder.vision.stages.{i}.{j}.conv1.0.weight") for i, j in ((0, 0), (0, 1), (3, 0))] == [
        1, 2, 5,
    ]  # fmt: skip
    assert model.layer_of("encoder.vision.stem.0.0.weight") == 0
    assert model.layer_of("encoder.vision.attention.out.bias") == model.layers + 1 == 6


def test_other_sizes_interpolate_the_positions_of_the_attention(model: CLIP) -> None:
    before = model.encoder.vision.positions.detach().clone()
    model.set_image_size((96, 64))
    assert torch.equal(model.encoder.vision.positions[0], before[0])
    assert model.encode(image=torch.zeros(2, 3, 96, 64)).dense("image")[0].shape == (2, 6, 32 * WIDTH)
    with pytest.raises(ConfigError, match="call set_image_size"):
        model.encode(image=torch.zeros(2, 3, 64, 64))


def test_patches_cannot_be_left_out(model: CLIP) -> None:
    with pytest.raises(ConfigError, match="reads whole pictures"):
        model.encoder.vision(torch.zeros(2, 3, PX, PX), torch.zeros(2, 1, dtype=torch.int64))


def test_the_first_step_of_training_adds_nothing_in_any_bottleneck() -> None:
    tower = PooledResNet(PX, WIDTH, STAGES, 12)
    tower.init_weights()
    assert all(not block.conv3[1].weight.any() for block in tower.blocks)
    wide = tower.width
    assert tower.attention.qkv.weight.detach().std() == pytest.approx(wide**-0.5, rel=0.05)
    assert tower.positions.detach().std() == pytest.approx(wide**-0.5, rel=0.2)
