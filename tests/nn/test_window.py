"""Windows against loops over pairs of places, and Swin V2's scores against its formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.nn.linear import Linear, QueryKeyValue
from multiway.nn.relative import RelativeBias
from multiway.nn.window import (
    ContinuousBias,
    CosineScores,
    Join,
    Split,
    WindowAttention,
    log_offsets,
    make_layout,
)
from tests.contracts.toys import randomize

CPU = torch.device("cpu")
CASES = [((8, 12), 4, 0), ((8, 12), 4, 2), ((7, 9), 4, 2), ((7, 5), 3, 1), ((6, 6), 6, 0), ((5, 6), 2, 1)]


def rolled(x: Tensor, window: int, shift: int) -> Tensor:
    """The plain twin of one layout: roll, cut, put windows first: (B, rows, columns, ...) -> (B, W, N, ...)."""
    x = x.roll((-shift, -shift), (1, 2)).unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(dim: int, heads: int, window: int, cosine: bool) -> WindowAttention:
    if cosine:
        bias: nn.Module = ContinuousBias(window, heads, window)
        own = WindowAttention(nn.Identity(), QueryKeyValue(dim), Linear(dim, dim), bias, CosineScores(heads))
    else:
        bias = RelativeBias((window, window), heads)
        own = WindowAttention(nn.LayerNorm(dim), Linear(dim, 3 * dim), Linear(dim, dim), bias)
    return randomize(own)  # type: ignore[return-value]


def visible(size: tuple[int, int], window: int, shift: int) -> Tensor:
    """Pair by pair, by definition: in one window after the roll, and as far apart there as before; bool (P, P)."""
    whole = [-(-n // window) * window for n in size]
    places = [(r, c) for r in range(whole[0]) for c in range(whole[1])]
    after = [tuple((x - shift) % n for x, n in zip(place, whole)) for place in places]
    seen = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, (a, ra) in enumerate(zip(places, after)):
        for j, (b, rb) in enumerate(zip(places, after)):
            together = all(x // window == y // window for x, y in zip(ra, rb))
            adjacent = all(x - y == u - v for x, y, u, v in zip(a, b, ra, rb))
            seen[i, j] = together and adjacent
    return seen


def attend_everywhere(own: WindowAttention, x: Tensor, window: int, shift: int) -> Tensor:
    """Full attention over the padded map, each pair's bias looked up by its offset, invisible pairs at -inf."""
    size = x.shape[1:3]
    bottom, right = (-n % window for n in size)
    x = F.pad(own.norm(x), (0, 0, 0, right, 0, bottom))
    whole = x.shape[1:3]
    q, k, v = own.qkv(x).flatten(1, 2).chunk(3, -1)
    table = own.bias()  # (H, N, N)
    heads = len(table)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, P, C)
    if own.cosine is None:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        scores = scores * own.cosine.logit_scale.exp()  # type: ignore[operator]
    rows, columns = torch.meshgrid(*[torch.arange(n) for n in whole], indexing="ij")
    inside = ((rows - shift) % whole[0] % window * window + (columns - shift) % whole[1] % window).flatten()
    bias = table[:, inside[:, None], inside]
    bias = bias.masked_fill(~visible((size[0], size[1]), window, shift), -math.inf)
    mixed = (scores + bias).softmax(-1) @ v
    mixed = mixed.transpose(1, 2).flatten(2).unflatten(1, whole)
    return own.out(mixed)[:, : size[0], : size[1]]


@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_one_gather_equals_roll_and_cut_and_join_undoes_it(size, window, shift) -> None:
    heads, dim = 3, 12
    layout = make_layout(size, window, shift, heads, CPU)
    assert all(whole % window == 0 and 0 <= whole - own < window for whole, own in zip(layout.size, size))
    places = math.prod(layout.size)
    qkv = draw(2, places, 3 * dim).requires_grad_()
    parts = Split.apply(qkv, layout.split, layout.unsplit, window**2)
    want = rolled(qkv.unflatten(1, layout.size), window, shift)  # (B, W, N, 3 D)
    want = want.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # (3, B, W H, N, C)
    assert torch.equal(torch.stack(parts), want)
    back = [Join.apply(part.flatten(1, 2), layout.join, layout.unjoin, heads) for part in parts]
    assert torch.equal(torch.cat(back, -1), qkv)
    weight = draw(*want.shape, seed=1)
    (got,) = torch.autograd.grad((torch.stack(parts) * weight).sum(), qkv, retain_graph=True)
    (plain,) = torch.autograd.grad((want * weight).sum(), qkv)
    assert torch.equal(got, plain)
    one = draw(2, places, dim, seed=2)
    (through,) = torch.autograd.grad((back[1] * one).sum(), qkv)
    assert torch.equal(through, F.pad(one, (dim, dim)))


@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_windows_equal_full_attention_among_what_is_visible(size, window, shift, cosine) -> None:
    heads, dim = 2, 8
    own = build(dim, heads, window, cosine)
    x = draw(2, *size, dim).requires_grad_()
    got = own(x, make_layout(size, window, shift, heads, CPU))
    want = attend_everywhere(own, x, window, shift)
    assert got.shape == x.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    weight = draw(*x.shape, seed=1)
    wanted = [x, *own.parameters()]
    for name, g, w in zip(
        ["x", *dict(own.named_parameters())],
        torch.autograd.grad((got * weight).sum(), wanted),
        torch.autograd.grad((want * weight).sum(), wanted),
    ):
        assert (g - w).norm() <= 1e-5 * w.norm() + 1e-7, name


@pytest.mark.parametrize("shift", [0, 2])
def test_maps_are_what_the_attention_uses(shift: int) -> None:
    own = build(8, 2, 4, cosine=False)
    x = draw(3, 8, 8, 8)
    layout = make_layout((8, 8), 4, shift, 2, CPU)
    maps = own.maps(x, layout)
    assert maps.shape == (3, 4, 2, 16, 16)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, 2, 16))
    if shift:
        assert (maps.amin((0, 2)) < 1e-20).any() and maps[:, 0].min() > 0
    values = rolled(own.qkv(own.norm(x))[..., 16:], 4, shift).unflatten(-1, (2, 4)).transpose(2, 3)
    mixed = Join.apply((maps @ values).flatten(1, 3), layout.join, layout.unjoin, 2)
    torch.testing.assert_close(own.out(mixed).unflatten(1, (8, 8)), own(x, layout), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
def test_it_trains_after_inference_mode(cosine: bool) -> None:
    own = build(8, 2, 4, cosine)
    with torch.inference_mode():
        layout = make_layout((8, 8), 4, 2, 2, CPU)
        if cosine:
            own.bias()
    own(draw(1, 8, 8, 8), layout).sum().backward()
    assert own.out.weight.grad.isfinite().all()  # type: ignore[union-attr]


def test_scores_are_cosines_times_a_scale_of_at_most_100() -> None:
    scores = CosineScores(3)
    assert torch.allclose(scores.logit_scale.exp(), torch.tensor(10.0))
    with torch.no_grad():
        scores.logit_scale.copy_(torch.tensor([0.0, 7.0, -3.0])[:, None, None])  # exp(7) = 1097
    q, k = draw(2, 4 * 3, 5, 8), draw(2, 4 * 3, 5, 8, seed=1)
    longer, unit = scores(q, k)
    got = longer @ unit.transpose(-1, -2) / math.sqrt(8)  # as attend scales it
    want = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
    scale = torch.tensor([1.0, 100.0, math.exp(-3)]).repeat(4)[:, None, None]
    torch.testing.assert_close(got, want * scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(q * 1e-3, k * 1e3)[0], longer, rtol=1e-4, atol=1e-4)
    zero = scores(torch.zeros_like(q), k)[0]
    assert not zero.any()


def test_scores_of_half_precision_are_computed_in_full() -> None:
    scores = CosineScores(1)
    q = draw(1, 1, 4, 8).bfloat16()
    longer, _ = scores(q, q)
    assert longer.dtype == torch.bfloat16
    assert torch.equal(longer, scores(q.float(), q.float())[0].bfloat16())


def test_log_offsets_are_those_of_the_paper() -> None:
    half = [0, 0.366512, 0.572069, 0.715614, 0.826016, 0.915745, 0.991335, 1.056642]
    own = log_offsets(8, 8).view(15, 15, 2)
    torch.testing.assert_close(own[7:, 0, 0], torch.tensor(half), rtol=0, atol=1e-6)
    torch.testing.assert_close(own[0, 7:, 1], torch.tensor(half), rtol=0, atol=1e-6)
    torch.testing.assert_close(own[:8, 3, 0].flip(0), -torch.tensor(half), rtol=0, atol=1e-6)
    wider = log_offsets(16, 8).view(31, 31, 2)
    torch.testing.assert_close(wider[[22, 30], 0, 0], torch.tensor([1.056642, 1.393777]), rtol=0, atol=1e-6)


def test_biases_of_shared_offsets_survive_a_larger_window() -> None:
    bias = randomize(ContinuousBias(8, 3, 8))
    before = bias()
    assert before.shape == (3, 64, 64)
    assert before.min() > 0 and before.max() < 16
    bias.resize(16)  # type: ignore[operator]
    after = bias().view(3, 16, 16, 16, 16)
    shared = after[:, 4:12, 4:12, 4:12, 4:12].reshape(3, 64, 64)
    torch.testing.assert_close(shared, before, rtol=0, atol=1e-5)
    assert after.min() > 0 and after.max() < 16
    assert not torch.allclose(ContinuousBias(16, 3, 16)(), ContinuousBias(16, 3, 8)())


def test_a_bias_depends_on_the_offset_alone() -> None:
    bias = randomize(ContinuousBias(4, 2, 4))().view(2, 4, 4, 4, 4)
    assert torch.equal(bias[:, 1:, 1:, 1:, 1:], bias[:, :-1, :-1, :-1, :-1])
    assert not torch.allclose(bias, bias.permute(0, 3, 4, 1, 2)), "down is not up"
    assert not torch.allclose(bias, bias.permute(0, 2, 1, 4, 3)), "down is not right"


def test_a_window_of_one_place_has_a_bias() -> None:
    bias = ContinuousBias(1, 2, 1)
    assert bias().shape == (2, 1, 1) and bias().isfinite().all()
    assert not log_offsets(1, 1).any()
