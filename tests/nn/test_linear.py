"""The fast linear map is the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multiway.nn import linear as fast
from multiway.nn.linear import Linear, OneDNNLinear, linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def gradients(found: Tensor, *of: Tensor | None) -> list[Tensor]:
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad(found, [x for x in of if x is not None], pull))


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 5, 7), (37, 64, 96), (256, 129, 33), (2, 3, 17, 24, 40)])
@pytest.mark.parametrize("biased", [True, False])
def test_output_and_gradients_are_those_of_the_plain_one(shape: tuple[int, ...], biased: bool) -> None:
    *rows, inner, outer = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, inner, generator=generator, requires_grad=True)
    weight = torch.randn(outer, inner, generator=generator, requires_grad=True)
    bias = torch.randn(outer, generator=generator, requires_grad=True) if biased else None
    found = OneDNNLinear.apply(x, weight, bias)
    plain = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    pairs = zip(gradients(found, x, weight, bias), gradients(plain, x, weight, bias), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@needs_onednn
def test_only_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(fast, "product", lambda *given: made.append(1) or torch.nn.functional.linear(*given))
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    OneDNNLinear.apply(x, weight, None).sum().backward()
    assert len(made) == 2 and x.grad is None and weight.grad is not None


@needs_onednn
def test_it_is_taken_in_fp32_on_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []
    monkeypatch.setattr(fast, "product", lambda x, w, b: taken.append(x.dtype) or torch.nn.functional.linear(x, w, b))
    x, module = torch.randn(4, 8), Linear(8, 6)
    for slow, expected in ((True, 1), (False, 0)):
        monkeypatch.setattr(fast, "mkl_is_slow", lambda slow=slow: slow)
        taken.clear()
        module(x)
        assert len(taken) == expected
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: True)
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    linear(x.double(), module.weight.double())
    assert module.to("meta")(x.to("meta")).shape == (4, 6)
    assert taken == []
