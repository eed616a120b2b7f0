"""What every BEiT-3 must keep: packing changes nothing, nothing leaks, no order matters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.plan import Tokens, make_plan
from multiway.systems.beit3 import BEiT3
from tests.contracts.plain import encode_plainly
from tests.contracts.toys import DECOUPLED, GRID, IMAGE_PX, SHARED, randomize

PATCHES = GRID[0] * GRID[1]
ABSENT = [("image",), ("pair",), ("text",), ("image", "text"), ("image", "pair"), ("pair", "text")]
LENGTHS = {"pair": [9, 1, 4], "text": [1, 12, 6, 12]}


@dataclasses.dataclass
class Sample:
    """One sample as the plain twin reads it."""

    kind: str
    image: Tensor | None
    ids: Tensor | None
    hide: Tensor | None


def draw(kinds: tuple[str, ...], seed: int = 0) -> list[Sample]:
    """Samples of the kinds asked for, in plan order, texts ragged with lengths down to 1."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for kind in kinds:
        for length in LENGTHS.get(kind, [0, 0]):
            image = torch.randint(0, 256, (3, IMAGE_PX, IMAGE_PX), generator=generator, dtype=torch.uint8)
            hide = torch.rand(PATCHES, generator=generator) < 0.4
            ids = torch.randint(4, 40, (length,), generator=generator)
            pictured = kind != "text"
            samples.append(
                Sample(kind, image if pictured else None, ids if length else None, hide if pictured else None)
            )
    return samples


def run(model: BEiT3, samples: list[Sample], causal: bool = False, draws: Tensor | None = None) -> Tokens:
    """One packed pass over all samples."""
    lengths: dict[str, dict[str, list[int]]] = {}
    for s in samples:
        own = lengths.setdefault(s.kind, {})
        if s.image is not None:
            own.setdefault("image", []).append(PATCHES + 1)
        if s.ids is not None:
            own.setdefault("text", []).append(len(s.ids))
    images = [s.image for s in samples if s.image is not None]
    plan = make_plan(lengths, causal_text=causal)
    return model(
        plan,
        image=torch.stack(images) if images else None,
        text=torch.cat([s.ids for s in samples if s.ids is not None]) if "text" in plan.starts else None,
        hide=torch.stack([s.hide for s in samples if s.hide is not None]) if images else None,
        draws=draws,
    )


def encode(model: BEiT3, samples: list[Sample], causal: bool = False, draws: Tensor | None = None) -> list[Tensor]:
    """Every sample's final tokens (N, D) from one packed pass over all of them."""
    tokens = run(model, samples, causal, draws)
    return [tokens.values[tokens.plan.sample == i] for i in range(tokens.plan.samples)]


@pytest.fixture(params=[DECOUPLED, SHARED], ids=["decoupled", "shared"])
def model(request: pytest.FixtureRequest) -> BEiT3:
    return randomize(BEiT3(request.param))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kinds", [("image", "pair", "text"), *ABSENT], ids="+".join)
def test_one_packed_pass_equals_one_plain_pass_per_sample(model: BEiT3, kinds: tuple[str, ...], causal: bool) -> None:
    samples = draw(kinds)
    got = encode(model, samples, causal)
    want = [encode_plainly(model, s.kind, s.image, s.ids, s.hide, causal) for s in samples]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(w.shape, generator=generator) for w in want]
    parameters = list(model.parameters())
    gradients = [
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights)), parameters, allow_unused=True)
        for out in (got, want)
    ]
    for (name, _), g, w in zip(model.named_parameters(), *gradients):
        assert (g is None) == (w is None or not w.any()), name
        if g is not None and w is not None:
            assert (g - w).norm() <= 1e-5 * w.norm(), name


def test_a_samples_tokens_do_not_depend_on_its_batch(model: BEiT3) -> None:
    samples = draw(("image", "pair", "text"))
    together = encode(model, samples)
    for chosen in ([0], [3], [5, 6], [1, 4, 8], [2, 3, 5, 7]):
        alone = encode(model, [samples[i] for i in chosen])
        for i, tokens in zip(chosen, alone, strict=True):
            torch.testing.assert_close(tokens, together[i], rtol=0, atol=1e-5)


def test_pixels_of_hidden_patches_do_not_leak(model: BEiT3) -> None:
    samples = draw(("image", "pair", "text"))
    before = encode(model, samples)
    generator = torch.Generator().manual_seed(2)
    for s in samples:
        if s.image is not None and s.hide is not None:
            noise = torch.randint(0, 256, s.image.shape, generator=generator, dtype=torch.uint8)
            s.image = torch.where(
                F.interpolate(s.hide.view(1, 1, *GRID).float(), scale_factor=8)[0] > 0, noise, s.image
            )
    after = encode(model, samples)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    visible = samples[0]
    visible.image = 255 - visible.image
    assert not torch.allclose(encode(model, samples)[0], before[0], atol=1e-2)


def test_the_order_of_modalities_in_a_pair_does_not_matter(model: BEiT3) -> None:
    samples = draw(("pair",))
    orders = []
    for names in (("image", "text"), ("text", "image")):
        sizes = {"image": [PATCHES + 1] * 3, "text": LENGTHS["pair"]}
        plan = make_plan({"pair": {name: sizes[name] for name in names}})
        tokens = model(plan, image=torch.stack([s.image for s in samples]), text=torch.cat([s.ids for s in samples]))
        orders.append((tokens.dense("image")[0], tokens.dense("text")[0]))
    for first, second in zip(*orders):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_every_draw_drops_one_branch_of_one_sample(model: BEiT3) -> None:
    for block in model.encoder.blocks:
        block.drop_rate = 0.5
    samples = draw(("image", "pair", "text"))
    keep = torch.full((2 * model.config.depth, len(samples)), 0.7)
    before = encode(model, samples, draws=keep)
    seen = []
    for branch in range(len(keep)):
        for chosen in (0, 3, 8):
            draws = keep.clone()
            draws[branch, chosen] = 0.3
            after = encode(model, samples, draws=draws)
            changed = [i for i in range(len(samples)) if not torch.allclose(before[i], after[i], atol=1e-3)]
            assert changed == [chosen]
        seen.append(after[8])
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(seen) for b in seen[:i])


def test_views_show_each_samples_own_tokens(model: BEiT3) -> None:
    samples = draw(("image", "pair", "text"))
    tokens = run(model, samples)
    plain = [encode_plainly(model, s.kind, s.image, s.ids, s.hide) for s in samples]
    own = {
        "image": [x[: PATCHES + 1] for x, s in zip(plain, samples) if s.image is not None],
        "text": [x[-len(s.ids) :] for x, s in zip(plain, samples) if s.ids is not None],
    }
    for modality, sequences in own.items():
        torch.testing.assert_close(tokens.prefix(modality), torch.stack([x[0] for x in sequences]), rtol=0, atol=1e-5)
        values, pad = tokens.dense(modality)
        assert (~pad).sum(1).tolist() == [len(x) for x in sequences]
        assert not values[pad].any()
        torch.testing.assert_close(values[~pad], torch.cat(sequences), rtol=0, atol=1e-5)
        start, _ = tokens.plan.extent(modality)
        row = start + len(sequences[0])
        torch.testing.assert_close(tokens.rows(torch.tensor([row, start])), tokens.prefix(modality)[[1, 0]])


@pytest.mark.parametrize("image_px", [96, (64, 96)], ids=str)
def test_other_image_sizes_interpolate_the_positions(model: BEiT3, image_px: int | tuple[int, int]) -> None:
    height, width = (image_px, image_px) if isinstance(image_px, int) else image_px
    grid = height // 8, width // 8
    old = model.vision.positions.detach().clone()
    model.set_image_size(image_px)
    want = F.interpolate(old[3:].T.reshape(1, 32, 4, 4), size=grid, mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.vision.positions[3:], want[0].flatten(1).T, rtol=0, atol=0)
    assert torch.equal(model.vision.positions[:3], old[:3])
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = [torch.tensor([0, 7, 2]), torch.tensor([5])]
    tokens = model.encode(image=image, text=ids)
    patches = grid[0] * grid[1]
    assert tokens.dense("image")[0].shape == (2, patches + 1, 32)
    for i in range(2):
        want = encode_plainly(model, "pair", image[i], ids[i])
        got = tokens.values[tokens.plan.sample == i]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_same_image_size_changes_nothing(model: BEiT3) -> None:
    before = model.vision.positions.detach().clone()
    model.set_image_size(IMAGE_PX)
    assert torch.equal(model.vision.positions, before)
