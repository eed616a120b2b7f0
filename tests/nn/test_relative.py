"""One learned number per head and offset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multiway.nn.position import resize_bias_table
from multiway.nn.relative import JointBias, RelativeBias
from multiway.plan import Plan, make_plan


def numbered(window: tuple[int, int], prefix: int, heads: int = 2) -> RelativeBias:
    """The table holds its own row numbers, for the second head negative."""
    module = RelativeBias(window, heads, prefix)
    with torch.no_grad():
        rows = torch.arange(float(len(module.table)))
        module.table.copy_(torch.stack([rows, -rows], dim=1))
    return module


@pytest.mark.parametrize(
    ("window", "prefix", "rows", "places"),
    [  # vision.md, appendix C
        ((7, 7), 0, 169, {(0, 0): 84, (0, 1): 83, (1, 0): 85, (0, 7): 71, (7, 0): 97, (0, 48): 0, (48, 0): 168}),
        (
            (14, 14), 1, 732,
            {(0, 0): 731, (0, 5): 729, (5, 0): 730, (1, 1): 364, (1, 2): 363, (1, 196): 0, (196, 1): 728},
        ),
    ],
)  # fmt: skip
def test_every_pair_reads_the_row_of_its_offset(window, prefix: int, rows: int, places: dict) -> None:
    module = numbered(window, prefix)
    bias = module()
    tokens = window[0] * window[1] + prefix
    assert module.table.shape == (rows, 2) and bias.shape == (2, tokens, tokens)
    for (query, key), row in places.items():
        assert bias[:, query, key].tolist() == [row, -row]


def test_a_row_gets_the_gradients_of_all_its_pairs() -> None:
    module = RelativeBias((2, 3), 2, 1)
    upstream = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(0))
    (module() * upstream).sum().backward()
    rows = numbered((2, 3), 1)()[0].long()
    want = torch.zeros(18, 2).index_add(0, rows.flatten(), upstream.flatten(1).T)
    torch.testing.assert_close(module.table.grad, want)


@pytest.mark.parametrize("method", ["geometric", "bicubic"])
def test_another_window_is_served_after_one_call(method) -> None:
    module = numbered((4, 4), 1)
    before: Tensor = module.table.detach().clone()
    module()
    module.resize((6, 3), method)
    assert module().shape == (2, 19, 19) and module.table.requires_grad
    assert torch.equal(module.table, resize_bias_table(before, (4, 4), (6, 3), 3, method))
    assert module()[0, 0, 0] == before[-1, 0]
    table = module.table
    module.resize((6, 3), method)
    assert module.table is table


def test_what_inference_looked_up_serves_training() -> None:
    module = RelativeBias((2, 2), 1)
    with torch.inference_mode():
        module()
    module().sum().backward()
    assert module.table.grad.sum() == 16


# --- pictures and texts -----------------------------------------------------------------------------------------------


def joint(window: tuple[int, int] = (14, 14), longest: int = 196) -> JointBias:
    """As `numbered`, of three layers of two heads: row r holds r + column / 100."""
    module = JointBias(window, 3, 2, longest)
    with torch.no_grad():
        module.table.copy_(torch.arange(float(len(module.table)))[:, None] + torch.arange(6) / 100)
    return module


def plan_of(pictures: int = 197) -> Plan:
    return make_plan(
        {
            "image": {"image": [pictures] * 2},
            "pair": {"image": [pictures] * 2, "text": [5, 9]},
            "text": {"text": [196, 3]},
        }
    )


TEXT_ROWS = {  # masked.md 5.1: (query, key) of words -> row behind the picture's 732 and the two between both
    (0, 0): 1125, (0, 1): 1123, (0, 195): 1123, (1, 0): 1124, (195, 0): 1124, (1, 1): 928, (7, 7): 928, (1, 2): 929,
    (2, 1): 927, (1, 195): 1122, (195, 1): 734,
}  # fmt: skip
IMAGE_ROWS = {(0, 0): 731, (0, 5): 729, (5, 0): 730, (1, 1): 364, (1, 2): 363, (1, 196): 0, (196, 1): 728}


def test_one_table_serves_pictures_texts_and_both() -> None:
    module = joint()
    assert module.table.shape == (1126, 6)
    biases = module(plan_of())
    assert len(biases) == 3
    assert {kind: tuple(x.shape) for kind, x in biases[0].items()} == {
        "image": (2, 197, 197),
        "pair": (2, 206, 206),
        "text": (2, 196, 196),
    }
    for (query, key), row in IMAGE_ROWS.items():
        assert biases[0]["image"][0, query, key] == biases[0]["pair"][0, query, key] == row
    for (query, key), row in TEXT_ROWS.items():
        assert biases[0]["text"][0, query, key] == row
        if max(query, key) < 9:
            assert biases[0]["pair"][0, 197 + query, 197 + key] == row
    assert (biases[0]["pair"][0, 197:, :197] == 732).all()  # a word looks at a picture
    assert (biases[0]["pair"][0, :197, 197:] == 733).all()
    for layer, own in enumerate(biases):  # heads of a layer lie side by side
        assert own["image"][:, 0, 0].tolist() == pytest.approx([731 + layer * 0.02, 731.01 + layer * 0.02], rel=1e-6)


def test_rows_of_the_joint_table_get_the_gradients_of_all_their_pairs() -> None:
    module, plan = joint((2, 3), 10), make_plan({"pair": {"image": [7, 7], "text": [4, 2]}})
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(2, 11, 11, generator=generator) for _ in range(3)]
    sum((own["pair"] * up).sum() for own, up in zip(module(plan), upstream)).backward()
    rows = module(plan)[0]["pair"][0].detach().long()
    want = torch.cat([torch.zeros(40, 2).index_add(0, rows.flatten(), up.flatten(1).T) for up in upstream], dim=1)
    torch.testing.assert_close(module.table.grad, want)


def test_the_joint_table_keeps_all_but_patches_when_resized() -> None:
    module = joint((14, 14))
    before = module.table.detach().clone()
    module(plan_of())
    module.resize((24, 24))
    assert module.table.shape == (2606, 6)
    assert torch.equal(module.table, resize_bias_table(before, (14, 14), (24, 24), 397))
    assert torch.equal(module.table[-397:], before[-397:])
    assert module(plan_of(577))[0]["pair"][0, 577:, :577].unique() == 732
    table = module.table
    module.resize((24, 24))
    assert module.table is table
