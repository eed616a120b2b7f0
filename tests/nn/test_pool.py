"""Attention of one query against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multiway.nn.pool import AttentionPool
from tests.contracts.toys import randomize


@pytest.mark.parametrize("queries", [1, 3])
def test_it_is_multi_head_attention_of_the_query(queries: int) -> None:
    pool = randomize(AttentionPool(12, 3, 12))
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    for name, part in (("in_proj_", pool.qkv), ("out_proj.", pool.out)):
        for kind in ("weight", "bias"):
            theirs.get_parameter(name + kind).data.copy_(getattr(part, kind))
    generator = torch.Generator().manual_seed(1)
    query, tokens = torch.randn(queries, 12, generator=generator), torch.randn(3, 5, 12, generator=generator)
    want = theirs(query.expand(3, -1)[:, None], tokens, tokens, need_weights=False)[0][:, 0]
    torch.testing.assert_close(pool(query, tokens), want)
