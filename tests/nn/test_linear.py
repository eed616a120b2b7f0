"""The fast linear map is the plain one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from multiway.nn import linear as fast
from multiway.nn.linear import Linear, OneDNNLinear, lean, linear

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


# --- lean -------------------------------------------------------------------------------------------------------------


def modules(seed: int = 0) -> tuple[torch.nn.Module, Linear]:
    torch.manual_seed(seed)
    norm, to = torch.nn.LayerNorm(24), Linear(24, 10)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return torch.nn.Sequential(torch.nn.GELU(), norm), to


@pytest.mark.parametrize("rows", [(1,), (33,), (2, 5)])
@pytest.mark.parametrize("frozen", ["", "before", "to", "x"])
def test_lean_is_its_plain_twin(rows: tuple[int, ...], frozen: str) -> None:
    before, to = modules()
    before.requires_grad_(frozen != "before")
    to.requires_grad_(frozen != "to")
    x = torch.randn(*rows, 24, requires_grad=frozen != "x")
    given = [y for y in (x, *before.parameters(), *to.parameters()) if y.requires_grad]
    found, plain = lean(before, before.parameters(), to, x), to(before(x))
    assert torch.equal(found, plain)
    for own, other in zip(gradients(found, *given), gradients(plain, *given), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_lean_is_its_plain_twin_under_autocast() -> None:
    before, to = modules()
    x = torch.randn(33, 24, requires_grad=True)
    given = (x, *before.parameters(), *to.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = lean(before, before.parameters(), to, x), to(before(x))
    assert found.dtype == torch.bfloat16 and torch.equal(found, plain)
    for own, other in zip(gradients(found, *given), gradients(plain, *given), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, other, rtol=0, atol=0.02 * float(other.abs().max()))


def test_lean_keeps_its_input_alone() -> None:
    """Of the rows only x survives the forward; the plain twin keeps what GELU and norm made of it as well."""
    before, to = modules()
    x = torch.randn(1000, 24, requires_grad=True)

    def kept(run: Callable[[], Tensor]) -> int:
        sizes: dict[int, int] = {}
        note = lambda y: sizes.update({y.untyped_storage().data_ptr(): y.numel()}) or y  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
            run()
        return sum(size for size in sizes.values() if size >= x.numel())

    assert kept(lambda: lean(before, before.parameters(), to, x)) == x.numel()
    assert kept(lambda: to(before(x))) == 3 * x.numel()
    with torch.no_grad():
        assert lean(before, before.parameters(), to, x).grad_fn is None
