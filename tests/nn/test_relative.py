"""One learned number per head and offset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multiway.nn.position import resize_bias_table
from multiway.nn.relative import RelativeBias


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
