from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from multiway.nn import attention as fast
from multiway.nn.attention import Attention, HeadProducts, Pad, SelfAttention, Unpad, attend, attend_by_gemm, visible
from multiway.plan import Group, make_plan


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """Query by query, sums of exponentials over the keys it sees."""
    keep = torch.ones(q.shape[0], 1, q.shape[2], q.shape[2], dtype=torch.bool) if keep is None else keep
    keep = keep.expand(*q.shape[:3], q.shape[2])
    out = torch.zeros_like(v)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = keep[b, h, n].nonzero().flatten()
        weight = torch.exp(k[b, h, seen] @ q[b, h, n] / math.sqrt(q.shape[3]))
        out[b, h, n] = weight @ v[b, h, seen] / weight.sum()
    return out


KEEPS = {
    "all": None,
    "padded": (torch.arange(7) < torch.tensor([7, 1, 4])[:, None])[:, None, None, :],
    "causal": torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7),
}


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("implementation", [attend, attend_by_gemm])
def test_attention_weighs_the_visible_keys(implementation, keep: Tensor | None) -> None:
    q, k, v = (drawn(3, 2, 7, 5, seed=i) for i in range(3))
    torch.testing.assert_close(implementation(q, k, v, keep), by_hand(q, k, v, keep), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_both_implementations_have_the_same_gradients(keep: Tensor | None) -> None:
    results = []
    for implementation in (attend, attend_by_gemm):
        inputs = [drawn(3, 2, 7, 5, seed=i).requires_grad_() for i in range(3)]
        results.append(torch.autograd.grad((implementation(*inputs, keep) * drawn(3, 2, 7, 5, seed=9)).sum(), inputs))
    for a, b in zip(*results):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_bf16_attention_is_as_near_as_bf16_can_be(keep: Tensor | None) -> None:
    """Inputs rounded to 8 bits are exact here, so what is left is the rounding of probabilities and output."""
    q, k, v = (drawn(3, 2, 7, 5, seed=i, dtype=torch.bfloat16) for i in range(3))
    got = attend(q, k, v, keep)
    assert got.dtype == torch.bfloat16
    want = by_hand(q.double(), k.double(), v.double(), keep)
    assert (got.double() - want).abs().max() < 0.02 * want.abs().max()


def test_keys_out_of_sight_have_no_influence() -> None:
    q, k, v = (drawn(3, 2, 7, 5, seed=i) for i in range(3))
    keep = KEEPS["padded"]
    hidden = ~keep[:, 0, 0]
    for implementation in (attend, attend_by_gemm):
        before = implementation(q, k, v, keep)
        k2, v2 = k.clone(), v.clone()
        k2.transpose(1, 2)[hidden] = 1e4
        v2.transpose(1, 2)[hidden] = -1e4
        assert torch.equal(implementation(q, k2, v2, keep), before)


def test_unpad_is_the_gradient_of_its_gather() -> None:
    inverse = torch.tensor([4, 0, 2])
    x = drawn(6, 3, dtype=torch.float64).requires_grad_()
    assert torch.equal(Unpad.apply(x, inverse), x[inverse])
    assert torch.autograd.gradcheck(lambda x: Unpad.apply(x, inverse), [x])


def test_pad_ignores_the_gradient_at_padding() -> None:
    group = make_plan({"text": {"text": [3, 1]}}).groups[0]
    x = drawn(4, 2).requires_grad_()
    padded = Pad.apply(x, group.index, group.inverse)
    assert torch.equal(padded.view(2, 3, 2)[1, 0], x[3])
    upstream = drawn(6, 2, seed=1)
    (got,) = torch.autograd.grad((padded * upstream).sum(), x)
    assert torch.equal(got, upstream[[0, 1, 2, 3]])


class Plain(nn.Module):
    """A linear map that takes and ignores a plan."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, dtype=torch.float64)

    def forward(self, x: Tensor, plan: object) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_equals_attention_of_each_sample(causal: bool) -> None:
    kinds = {"image": {"image": [4, 4]}, "pair": {"image": [4, 2], "text": [1, 5]}, "text": {"text": [3, 1, 2]}}
    plan = make_plan(kinds, causal_text=causal)
    torch.manual_seed(0)
    attention = Attention(Plain(6, 18), Plain(6, 6), heads=2)
    x = drawn(plan.rows, 6, dtype=torch.float64).requires_grad_()
    upstream = drawn(plan.rows, 6, seed=1, dtype=torch.float64)
    got = attention(x, plan)
    gradient = torch.autograd.grad((got * upstream).sum(), [x, *attention.parameters()])
    want = torch.zeros_like(got)
    images = {2: 4, 3: 2}  # pictures of the pairs; the others are all picture or all text
    for sample in range(plan.samples):
        rows = (plan.sample == sample).nonzero().flatten()
        n = len(rows)
        q, k, v = attention.qkv(x[rows], plan).view(1, n, 3, 2, 3).permute(2, 0, 3, 1, 4)
        keep = torch.ones(1, 1, n, n, dtype=torch.bool)
        if causal and sample >= 2:
            keep = keep.tril()
            keep[..., : images.get(sample, 0)] = True
        mixed = by_hand(q, k, v, keep).transpose(1, 2).reshape(n, 6)
        want = want.index_put((rows,), attention.out(mixed, plan))
    torch.testing.assert_close(got, want)
    for g, w in zip(gradient, torch.autograd.grad((want * upstream).sum(), [x, *attention.parameters()])):
        torch.testing.assert_close(g, w)


# --- products of heads ------------------------------------------------------------------------------------------------


GROUPS = {
    "ragged": make_plan({"pair": {"image": [4, 4, 4], "text": [1, 5, 2]}}).groups[0],
    "not ragged": make_plan({"pair": {"image": [4, 4], "text": [3, 3]}}).groups[0],
    "dense": make_plan({"image": {"image": [5, 5]}}).groups[0],
    "causal": make_plan({"pair": {"image": [2, 2], "text": [4, 1]}}, causal_text=True).groups[0],
    "of one token": make_plan({"text": {"text": [1]}}).groups[0],
    "long": make_plan({"pair": {"image": [197, 197], "text": [1, 64]}}).groups[0],
}


def plain(qkv: Tensor, group: Group, heads: int, bias: Tensor | None) -> Tensor:
    """The plain twin of `HeadProducts`."""
    padded = qkv if group.index is None else Pad.apply(qkv, group.index, group.inverse)
    q, k, v = padded.view(group.samples, group.length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = attend_by_gemm(q, k, v, bias).transpose(1, 2).flatten(2).flatten(0, 1)
    return mixed if group.inverse is None else Unpad.apply(mixed, group.inverse)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("onednn", [False, True], ids=["at once", "by oneDNN"])
def test_products_of_heads_are_their_plain_twin(group: Group, biased: bool, onednn: bool, monkeypatch) -> None:
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(fast, "heads_by_onednn", lambda x, length: onednn)
    qkv = drawn(group.rows, 3 * 2 * 5).requires_grad_()
    given = [qkv, *([drawn(2, group.length, group.length, seed=7).requires_grad_()] if biased else [])]
    upstream, results = drawn(group.rows, 2 * 5, seed=1), []
    for implementation in (HeadProducts.apply, plain):
        out = implementation(qkv, group, 2, visible(given[1] if biased else None, group.keep))
        results.append((out, *torch.autograd.grad((out * upstream).sum(), given)))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6 * max(1.0, float(other.detach().abs().max())))


def test_products_of_heads_in_bf16_are_their_plain_twin_to_the_bit() -> None:
    """1 / sqrt(C) is a power of two here, so that scaling rounds nothing."""
    group = GROUPS["ragged"]
    qkv = drawn(group.rows, 3 * 2 * 16, dtype=torch.bfloat16).requires_grad_()
    upstream = drawn(group.rows, 2 * 16, seed=1, dtype=torch.bfloat16)
    results = []
    for implementation in (HeadProducts.apply, plain):
        out = implementation(qkv, group, 2, group.keep)
        results.append((out, *torch.autograd.grad(out, qkv, upstream)))
    assert all(torch.equal(own, other) for own, other in zip(*results, strict=True))


def test_products_of_heads_are_taken_where_they_pay(monkeypatch) -> None:
    x, bias = torch.empty(0), torch.zeros(1)
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: True)
    assert fast.products_pay(x, fast.ONEDNN_LENGTH, None) and not fast.products_pay(x, fast.ONEDNN_LENGTH - 1, None)
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: False)
    assert not fast.products_pay(x, fast.ONEDNN_LENGTH, None)
    assert fast.products_pay(x, 8, bias) and not fast.products_pay(x, 8, bias.bool())
    assert fast.products_pay(x.bfloat16(), 8, None) and not fast.products_pay(x.bfloat16(), fast.CPU_GEMM_LENGTH, None)
    assert not fast.products_pay(x.bfloat16().to("meta"), 8, None)


# --- biases -----------------------------------------------------------------------------------------------------------


def biased_by_hand(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Definition, in float64."""
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias.double()
    weight = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weight @ v.double()


BIASES = {
    "float, of all samples": 3 * drawn(2, 7, 7, seed=7),
    "float, of each sample": 3 * drawn(3, 2, 7, 7, seed=8),
    "bool": torch.ones(7, 7, dtype=torch.bool).tril(),
    "bool, of each sample": drawn(3, 1, 7, 7, seed=9) > torch.linspace(-9, 0.5, 7),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("implementation", [attend, attend_by_gemm])
def test_a_bias_is_added_to_the_scores(implementation, bias: Tensor) -> None:
    """True = may attend; float = added. Gradients of everything, the bias included."""
    inputs = [drawn(3, 2, 7, 5, seed=i).requires_grad_() for i in range(3)]
    inputs += [bias.clone().requires_grad_()] if bias.is_floating_point() else []
    want = biased_by_hand(*inputs[:3], inputs[3] if len(inputs) > 3 else bias)
    got = implementation(*inputs[:3], inputs[3] if len(inputs) > 3 else bias)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    upstream = drawn(3, 2, 7, 5, seed=9)
    for own, other in zip(
        torch.autograd.grad((got * upstream).sum(), inputs), torch.autograd.grad((want * upstream).sum(), inputs)
    ):
        assert own.shape == other.shape and (own - other).norm() <= 1e-5 * other.norm()


def test_a_bias_in_fp32_serves_queries_in_bf16() -> None:
    q, k, v = (drawn(3, 2, 7, 5, seed=i, dtype=torch.bfloat16) for i in range(3))
    bias = BIASES["float, of all samples"]
    got = attend(q, k, v, bias)
    assert got.dtype == torch.bfloat16
    want = biased_by_hand(q, k, v, bias)
    assert (got.double() - want).abs().max() < 0.02 * want.abs().max()


class Given(nn.Module):
    """A bias that is what it is."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self) -> Tensor:
        return self.values


def self_attention(bias: Tensor | None = None) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(nn.Linear(6, 18), nn.Linear(6, 6), 2, None if bias is None else Given(bias))


@pytest.mark.parametrize("given", [None, *BIASES.values()], ids=["none", *BIASES])
@pytest.mark.parametrize("own", [None, drawn(2, 7, 7, seed=4)], ids=["none of its own", "its own"])
def test_self_attention_is_attention_between_its_two_maps(own: Tensor | None, given: Tensor | None) -> None:
    attention, x = self_attention(own), drawn(3, 7, 6)
    q, k, v = attention.qkv(x).view(3, 7, 3, 2, 3).permute(2, 0, 3, 1, 4)
    total = torch.zeros(7, 7) if own is None else own
    if given is not None:
        total = total.masked_fill(~given, -math.inf) if given.dtype == torch.bool else total + given
    mixed = biased_by_hand(q, k, v, total).float()
    want = attention.out(mixed.transpose(1, 2).reshape(3, 7, 6))
    torch.testing.assert_close(attention(x, given), want, rtol=0, atol=1e-6)
    maps = attention.maps(x, given)
    assert maps.shape == (3, 2, 7, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 7))
    torch.testing.assert_close(maps @ v, mixed, rtol=0, atol=1e-6)


def test_a_layers_own_bias_is_learned() -> None:
    attention = self_attention(drawn(2, 7, 7, seed=4))
    (attention(drawn(3, 7, 6)) * drawn(3, 7, 6, seed=1)).sum().backward()
    assert attention.bias.values.grad.abs().min() > 0
