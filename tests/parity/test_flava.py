"""FLAVA against transformers: tokens of all three encoders, with padding, all losses, files both ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multiway.plan import make_plan
from multiway.systems.flava import FLAVA, LAYOUTS, Config, MaskedContrastiveMatching
from multiway.types import Batch
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import randomize
from tests.parity.originals import saved, saved_gradients

pytestmark = pytest.mark.parity
CONFIG = Config(
    dim=48, depth=3, heads=4, hidden=96, patch=8, image_px=32, text_depth=2, joint_depth=2, vocab=40, text_tokens=16,
    out=48, codes=19,
)  # fmt: skip
LAYOUT = LAYOUTS["transformers"]
LENGTHS = [5, 12, 3, 9]
IGNORED = -100
MASK = 39


def original(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    c = CONFIG
    shape = {"hidden_size": c.dim, "num_attention_heads": c.heads, "intermediate_size": c.hidden}
    image = {**shape, "num_hidden_layers": c.depth, "image_size": c.image_px, "patch_size": c.patch}
    text = {**shape, "num_hidden_layers": c.text_depth, "vocab_size": c.vocab, "max_position_embeddings": c.text_tokens}
    settings = transformers.FlavaConfig(
        image_config={**image, "vocab_size": c.codes, "mask_token": True},
        text_config=text,
        multimodal_config={**shape, "num_hidden_layers": c.joint_depth},
        projection_dim=c.out,
        init_codebook=False,
        **({"hidden_size": c.dim} if name == "FlavaForPreTraining" else {}),
    )
    return randomize(getattr(transformers, name)(settings)).eval()


def filled(theirs: nn.Module, config: Config, folder: Path) -> FLAVA:
    """A model of ours with an original's weights, which come back as they were, but for what is there twice."""
    state = saved(theirs, folder)
    if not config.masked:
        state = {LAYOUT.prefix + name: tensor for name, tensor in state.items()}
    ours = FLAVA(config)
    ours.load_state_dict(to_ours(state, LAYOUT, ours.state_dict()))
    back = to_theirs(ours.state_dict(), LAYOUT)
    assert back.keys() == {name for name in state if not LAYOUT.drops(name)}
    assert all(torch.equal(back[name], state[name]) for name in back)
    return ours.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, texts padded with zeros, and which of their tokens are real."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(len(LENGTHS), 3, 32, 32, generator=generator)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    text = torch.randint(1, MASK, real.shape, generator=generator) * real
    return image, text, real


def test_tokens_of_all_encoders_and_files_equal_transformers(tmp_path: Path) -> None:
    theirs = original("FlavaModel")
    ours = filled(theirs, dataclasses.replace(CONFIG, masked=False), tmp_path / "weights")
    image, text, real = inputs()
    want = theirs(pixel_values=image, input_ids=text, attention_mask=real.long())
    assert want.multimodal_embeddings.std() > 0.3
    texts = [row[:length] for row, length in zip(text, LENGTHS)]
    got = ours.encode(image=image, text=texts)
    assert [group.length for group in got.plan.groups] == [18 + 12]
    joint = torch.cat([got.dense("image")[0], got.dense("text")[0]], dim=1)
    seen = torch.cat([torch.ones(4, 18, dtype=torch.bool), real], dim=1)
    torch.testing.assert_close(joint[seen], want.multimodal_embeddings[seen], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode(image=image).values, want.image_embeddings.flatten(0, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode(text=texts).values, want.text_embeddings[real], rtol=0, atol=1e-5)


MATCHES = {"all match": [1, 1, 1, 1], "two do not": [1, 0, 0, 1]}


@pytest.mark.parametrize("match", MATCHES.values(), ids=MATCHES)
def test_losses_and_gradients_of_pairs_equal_transformers(match: list[int], tmp_path: Path) -> None:
    theirs = original("FlavaForPreTraining")
    ours = filled(theirs, CONFIG, tmp_path / "weights")
    image, text, real = inputs()
    generator = torch.Generator().manual_seed(2)
    hide = torch.rand(4, 16, generator=generator) < 0.4
    codes = torch.randint(0, CONFIG.codes, (4, 16), generator=generator)
    hidden = (torch.rand(text.shape, generator=generator) < 0.3) & real
    shown = torch.where(hidden, MASK, text)
    labels = torch.where(hidden, text, IGNORED)
    want = theirs(
        pixel_values=image, input_ids=text, input_ids_masked=shown, attention_mask=real.long(), bool_masked_pos=hide,
        mlm_labels=labels.clone(), mim_labels=codes.clone(), itm_labels=torch.tensor(match), return_loss=True,
    )  # fmt: skip

    matches = torch.tensor(match).bool()
    batch: Batch = {
        "plan": make_plan(
            {"image": {"image": [17] * 4}, "pair": {"image": [18] * 4, "text": LENGTHS}, "text": {"text": LENGTHS}}
        ),
        "image": torch.cat([image, image]),
        "image_hide": torch.cat([torch.zeros_like(hide), hide]),
        "image_hidden": (64 + (hide & matches[:, None]).flatten().nonzero()[:, 0]),
        "image_code": torch.cat([torch.zeros_like(codes), codes]),
        "text": torch.cat([shown[real], text[real]]),
        "text_hidden": (hidden & matches[:, None])[real].nonzero()[:, 0],
        "text_target": text[hidden & matches[:, None]],
        "image_match": torch.arange(4),
        "text_match": torch.arange(4, 8),
        "match": matches,
    }
    losses = compare(ours, batch, want, {
        "pair_image": "mmm_image", "pair_text": "mmm_text", "contrast": "global_contrastive", "match": "itm"
    })  # fmt: skip
    assert len(losses) == 4
    check(ours, theirs, want, tmp_path)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_losses_and_gradients_of_one_modality_equal_transformers(modality: str, tmp_path: Path) -> None:
    theirs = original("FlavaForPreTraining")
    ours = filled(theirs, CONFIG, tmp_path / "weights")
    image, text, real = inputs()
    generator = torch.Generator().manual_seed(3)
    none = torch.zeros(0, dtype=torch.int64)
    batch: Batch = {"image_match": none, "text_match": none, "match": none.bool()}
    if modality == "image":
        hide = torch.rand(4, 16, generator=generator) < 0.4
        codes = torch.randint(0, CONFIG.codes, (4, 16), generator=generator)
        want = theirs(pixel_values=image, bool_masked_pos=hide, mim_labels=codes.clone(), return_loss=True)
        batch |= {
            "plan": make_plan({"image": {"image": [17] * 4}}), "image": image, "image_hide": hide, "image_code": codes,
            "image_hidden": hide.flatten().nonzero()[:, 0],
        }  # fmt: skip
    else:
        hidden = (torch.rand(text.shape, generator=generator) < 0.3) & real
        shown = torch.where(hidden, MASK, text)
        want = theirs(
            input_ids=text, input_ids_masked=shown, attention_mask=real.long(),
            mlm_labels=torch.where(hidden, text, IGNORED), return_loss=True,
        )  # fmt: skip
        batch |= {
            "plan": make_plan({"text": {"text": LENGTHS}}), "text": shown[real],
            "text_hidden": hidden[real].nonzero()[:, 0], "text_target": text[hidden],
        }  # fmt: skip
    compare(ours, batch, want, {modality: "mim" if modality == "image" else "mlm"})
    check(ours, theirs, want, tmp_path)


def compare(ours: FLAVA, batch: Batch, want: Any, names: dict[str, str]) -> list[float]:
    """Every loss is the original's; gradients of ours are made."""
    objective = MaskedContrastiveMatching(ours, None)
    counts = objective.counts(batch)
    output = objective(batch, counts)
    losses = []
    for term, name in names.items():
        loss = output.sums[term] / counts[term]
        torch.testing.assert_close(loss, getattr(want.loss_info, name).detach(), rtol=1e-5, atol=1e-5)
        losses.append(loss.item())
    assert {name.split("/")[0] for name in output.sums} == set(names)
    torch.testing.assert_close(output.loss, want.loss, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    return losses


def check(ours: FLAVA, theirs: nn.Module, want: Any, folder: Path) -> None:
    """Every parameter has the original's gradient; those that take no part there take none here."""
    want.loss.backward()
    names = {name for name, p in ours.named_parameters() if p.grad is not None}
    gradients = to_ours(saved_gradients(theirs, folder / "gradients"), LAYOUT, ours.state_dict())
    assert {name for name, gradient in gradients.items() if gradient.any()} == names
    for name, parameter in ours.named_parameters():
        if name in names:
            error = (parameter.grad - gradients[name]).norm()
            assert error <= 1e-5 * gradients[name].norm(), name
