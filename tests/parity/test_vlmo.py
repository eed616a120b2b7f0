"""VLMo against the specification in plain torch: tokens, vectors, losses, gradients, answers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from multiway.plan import make_plan
from multiway.systems.vlmo import LAYOUTS, Config, MaskedContrastMatching, VLMo
from multiway.types import Batch
from multiway.weights.rename import to_theirs
from tests.contracts.toys import randomize
from tests.parity.originals import check_gradients
from tests.parity.vlmo_reference import Reference, losses

VOCAB, LENGTHS = 61, [7, 1, 12, 4]
RELATIVE = Config(
    dim=32, depth=4, heads=4, hidden=64, patch=8, image_px=32, joint_layers=2, vocab=VOCAB, text_tokens=12
)
LEARNED = dataclasses.replace(RELATIVE, positions="learned", layer_scale=0.0)
CONFIGS = pytest.mark.parametrize("config", [RELATIVE, LEARNED], ids=["relative", "learned"])


def both(config: Config, layout: str = "official") -> tuple[VLMo, Reference]:
    """A random model of ours, and the reference with its weights, which gather gradients of their own."""
    model: VLMo = randomize(VLMo(config))  # type: ignore[assignment]
    theirs = to_theirs(model.state_dict(), LAYOUTS[layout])
    state = {name: tensor.clone().requires_grad_() for name, tensor in theirs.items()}
    side = model.vision.grid[0]
    return model, Reference(state, config.depth, config.heads, config.depth - config.joint_layers, side, config.patch)


def drawn(count: int = len(LENGTHS), px: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, and padded texts with their padding; what stands at padding does not matter."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, px, px, generator=generator)
    ids = torch.randint(1, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return pixels, ids, torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]


def close(got: Tensor, want: Tensor) -> None:
    assert want.std() > 0.05, "a constant would compare nothing"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@CONFIGS
def test_tokens_of_pairs_texts_and_pictures(config: Config) -> None:
    model, reference = both(config)
    pixels, ids, pad = drawn()
    texts = [own[~empty] for own, empty in zip(ids, pad)]
    with torch.no_grad():
        tokens = model.encode(image=pixels, text=texts)
        want = reference.both(pixels, ids, pad)
        close(tokens.dense("text")[0][~pad], want[:, : ids.shape[1]][~pad])
        close(tokens.dense("image")[0], want[:, ids.shape[1] :])
        image, text = reference.alone(pixels, ids, pad)
        close(model.encode(text=texts).values, text[0][~pad])
        close(model.encode(image=pixels).dense("image")[0], image[0])


@CONFIGS
def test_a_table_for_other_pictures(config: Config) -> None:
    model, _ = both(config)
    model.set_image_size(48)
    state = {name: x.clone() for name, x in to_theirs(model.state_dict(), LAYOUTS["official"]).items()}
    reference = Reference(state, config.depth, config.heads, 2, 6, config.patch)
    pixels, ids, pad = drawn(px=48)
    with torch.no_grad():
        tokens = model.encode(image=pixels, text=[own[~empty] for own, empty in zip(ids, pad)])
        close(tokens.dense("image")[0], reference.both(pixels, ids, pad)[:, ids.shape[1] :])


def batch_of(pixels: Tensor, ids: Tensor, shown: Tensor, pad: Tensor, draws: Tensor) -> Batch:
    lengths = (~pad).sum(1).tolist()
    plan = make_plan({"image": {"image": [17] * len(pixels)}, "text": {"text": lengths}})
    hidden = (shown != ids)[~pad].nonzero()[:, 0]
    together = make_plan({"pair": {"image": [17] * 16, "text": lengths * 3 + [12] * 4}})
    return {
        "plan": plan,
        "match_plan": together,
        "match_draw": draws,
        "image": pixels,
        "text": shown[~pad],
        "text_hidden": hidden,
        "text_target": ids[~pad][hidden],
    }


@CONFIGS
def test_vectors_losses_and_gradients(config: Config) -> None:
    model, reference = both(config)
    pixels, ids, pad = drawn()
    generator = torch.Generator().manual_seed(2)
    shown = torch.where((torch.rand(ids.shape, generator=generator) < 0.3) & ~pad, 0, ids)
    draws = torch.tensor([[0.05, 0.95], [0.95, 0.05], [0.5, 0.05], [0.3, 0.9]])  # texts and pictures of other places
    batch = batch_of(pixels, ids, shown, pad, draws)
    objective = MaskedContrastMatching(model)
    image, text = reference.alone(pixels, ids, pad)
    for got, want in zip(objective.embed(batch), (image[1], text[1], image[2], text[2]), strict=True):
        close(got, want)
    counts = objective.counts(batch)
    out = objective(batch, counts)
    want = losses(reference, pixels, ids, shown, pad, draws)
    for term, value in want.items():
        assert out.sums[term].item() / counts[term] == pytest.approx(value.item(), rel=1e-5), term
    total = 0.25 * want["words"] + want["contrast"] + want["match"]
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-5)
    out.loss.backward()
    total.backward()
    names = {"text_embeddings.position_embeddings.weight"} if config.positions == "relative" else set()
    without = {name for name, x in reference.state.items() if x.grad is None}
    assert without == names
    if names:
        assert model.language.positions.grad is None
        model.language.positions.grad = torch.ones(12, 32)
        reference.state[names.pop()].grad = torch.ones(12, 32)
    check_gradients(model, {name: x.grad for name, x in reference.state.items()}, LAYOUTS["official"])  # type: ignore[misc]


def test_answers_about_one_picture_and_about_two() -> None:
    pixels, ids, pad = drawn(8)
    lengths = (~pad).sum(1)
    for pictures, layout, name in ((1, "official", "vqa_classifier"), (2, "official_nlvr2", "nlvr2_classifier")):
        config = dataclasses.replace(RELATIVE, answers=5, pictures=pictures, masked=False, match=False, contrast="none")
        model, reference = both(config, layout)
        repeated = lengths.repeat_interleave(pictures).tolist()
        count = 4 * pictures
        plan = make_plan({"pair": {"image": [17] * count, "text": repeated}})
        text = torch.cat([own[~empty] for own, empty in zip(ids, pad) for _ in range(pictures)])
        with torch.no_grad():
            shown = [reference.both(pixels[i:count:pictures], ids, pad, kind=1 + i) for i in range(pictures)]
            pooled = torch.cat([reference.pooled(x) for x in shown], dim=1)
            close(model.answer(plan, image=pixels[:count], text=text), reference.answers(pooled, name))
