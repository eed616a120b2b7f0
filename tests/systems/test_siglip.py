"""SigLIP: published sizes, filled texts, first weights."""

from __future__ import annotations

import pytest
import torch

from multiway.data.collate import DualCollate
from multiway.errors import ConfigError
from multiway.systems.siglip import PRESETS, SigLIP
from multiway.tasks.retrieval import ImageTextSigmoid
from tests.contracts.toys import GRID, SIGLIP, WORDS, randomize, sample

PARAMETERS = {  # transformers' SiglipModel of the released configs
    "siglip_base_patch16_224": 203_155_970,
    "siglip_base_patch16_256": 203_202_050,
    "siglip_large_patch16_256": 652_150_786,
    "siglip_so400m_patch14_384": 877_960_498,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = SigLIP(PRESETS[name])
    assert sum(x.numel() for x in model.parameters()) == PARAMETERS[name]


@pytest.fixture
def model() -> SigLIP:
    return randomize(SigLIP(SIGLIP)).eval()  # type: ignore[return-value]


def test_a_text_is_filled_to_one_length_and_its_last_token_is_its_feature(model: SigLIP) -> None:
    ids = torch.tensor([7, 8, 1])
    filled = torch.cat([ids, ids.new_full((SIGLIP.text_tokens - len(ids),), SIGLIP.fill)])
    tokens = model.encode(text=[ids, filled])
    values, pad = tokens.dense("text")
    assert values.shape == (2, SIGLIP.text_tokens, SIGLIP.dim) and not pad.any()
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-6)
    assert torch.equal(model.encoder.language.pool(tokens), values[:, -1])


def test_a_token_sees_those_behind_it(model: SigLIP) -> None:
    first, other = (model.encode(text=[torch.tensor([7, last, 1])]).values[0] for last in (8, 9))
    assert not torch.allclose(first, other, atol=1e-3)


def test_a_batch_is_embedded_as_its_parts_alone(model: SigLIP) -> None:
    pairs = [sample(0, "pair", i) for i in range(5)]
    batch = DualCollate(words=WORDS, grid=GRID, keep=0.5)({"pair": pairs})
    whole = {"image": batch["image"], "text": batch["text"]}
    image, text = model.embed_pairs(batch["plan"], **whole)
    torch.testing.assert_close(image, model.embed(model.encode(image=batch["image"]), "image"), rtol=0, atol=1e-6)
    ids = [torch.from_numpy(WORDS.framed(pair.text, "pair")) for pair in pairs if pair.text is not None]
    torch.testing.assert_close(text, model.embed(model.encode(text=ids), "text"), rtol=0, atol=1e-6)
    some, _ = model.embed_pairs(batch["plan"], **whole, keep=batch["image_keep"])
    assert not torch.allclose(some, image, atol=1e-3)


def test_longer_texts_are_refused(model: SigLIP) -> None:
    with pytest.raises(ConfigError, match="a text has 15 tokens, this model reads at most 14"):
        model.encode(text=[torch.zeros(15, dtype=torch.int64)])


def test_the_loss_at_the_start_is_that_of_expecting_no_pair() -> None:
    model = SigLIP(SIGLIP)
    torch.manual_seed(0)
    model.init_weights()
    count = 8
    batch = DualCollate(words=WORDS, grid=GRID)({"pair": [sample(0, "pair", i) for i in range(count)]})
    objective = ImageTextSigmoid(model)
    image, text = objective.embed(batch)
    scores = 10 * image @ text.T - 10
    want = -torch.nn.functional.logsigmoid((2 * torch.eye(count) - 1) * scores).sum() / count
    torch.testing.assert_close(objective(batch, {"contrast": count}).loss, want)
    assert model.encoder.vision.trunk.positions.detach().std().item() == pytest.approx(SIGLIP.dim**-0.5, rel=0.1)
    assert model.layer_of("encoder.vision.probe") == model.layers + 1 and model.no_decay("encoder.vision.probe")
