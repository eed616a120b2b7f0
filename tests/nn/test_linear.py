"""The fast linear map is the plain one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from multiway.nn import linear as fast
from multiway.nn.linear import Linear, OneDNNLinear, QueryKeyValue, lean, linear

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
@pytest.mark.parametrize("trained", ["weight", "bias", "x"])
def test_only_gradients_that_are_needed_are_computed(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: True)
    given = {"x": torch.randn(4, 3), "weight": torch.randn(5, 3), "bias": torch.randn(5)}
    given[trained].requires_grad_()
    found = OneDNNLinear.apply(*given.values())
    gradients = found.grad_fn.apply(torch.ones(4, 5))  # those of our backward, before autograd drops any
    assert [gradient is not None for gradient in gradients] == [name == trained for name in given]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 37, fast.MANY_ROWS])
def test_bf16_is_the_plain_one(rows: int, biased: bool) -> None:
    if not fast.bf16_is_native():
        pytest.skip("oneDNN has no bf16 products for this processor")
    x, module = torch.randn(rows, 64, requires_grad=True), Linear(64, 96, bias=biased)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = module(x), torch.nn.functional.linear(x, module.weight, module.bias)
    assert found.dtype == plain.dtype == torch.bfloat16 and "OneDNN" in found.grad_fn.name()
    torch.testing.assert_close(found, plain, rtol=0, atol=2**-8 * float(plain.detach().abs().max()))
    given = (x, *module.parameters())
    for own, other in zip(gradients(found, *given), gradients(plain, *given), strict=True):
        assert own.dtype == other.dtype == torch.float32
        torch.testing.assert_close(own, other, rtol=0, atol=2**-7 * float(other.abs().max()))


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed as a convolution, in order; there are two threads."""
    done: list[str] = []
    for owner, name in ((torch, "mkldnn_convolution"), (torch.ops.aten, "convolution_backward")):
        known = getattr(owner, name)
        watched = lambda *given, known=known, name=name: done.append(name) or known(*given)  # noqa: E731
        monkeypatch.setattr(owner, name, watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return done


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [fast.MANY_ROWS - 1, fast.MANY_ROWS])
@pytest.mark.parametrize("biased", [True, False])
def test_many_rows_are_convolved(rows: int, biased: bool, dtype: torch.dtype, convolved: list[str]) -> None:
    if dtype == torch.bfloat16 and not fast.bf16_is_native():
        pytest.skip("oneDNN has no bf16 products for this processor")
    x, weight, grad = (torch.randn(*shape).to(dtype) for shape in ((1, rows, 100), (70, 100), (1, rows, 70)))
    bias = torch.randn(70).to(dtype) if biased else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    near = {"rtol": 2**-8, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    many = rows >= fast.MANY_ROWS

    found = fast.onednn_linear(x, weight, bias)
    assert found.dtype == dtype and found.is_contiguous() and convolved == ["mkldnn_convolution"] * many
    torch.testing.assert_close(found.double(), exact, **near)
    back = fast.onednn_linear_back(grad, weight)
    assert back.dtype == dtype and back.is_contiguous() and convolved[1:] == ["convolution_backward"] * many
    torch.testing.assert_close(back.double(), grad.double() @ weight.double(), **near)

    torch.testing.assert_close(fast.onednn_linear(x, weight.t().contiguous().t(), bias).double(), exact, **near)
    columns = x.mT.contiguous().mT
    torch.testing.assert_close(fast.onednn_linear(columns, weight, bias).double(), exact, **near)
    assert len(convolved) == 2 * many  # what is transposed is not


def test_one_thread_convolves_nothing(convolved: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not fast.convolves(torch.zeros(fast.MANY_ROWS, 8), torch.zeros(6, 8))


@needs_onednn
def test_it_is_taken_on_cpu_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []
    monkeypatch.setattr(fast, "product", lambda x, w, b: taken.append(x.dtype) or torch.nn.functional.linear(x, w, b))
    x, module = torch.randn(4, 8), Linear(8, 6)

    def takes(dtype: torch.dtype) -> bool:
        taken.clear()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            assert module(x).dtype == dtype
        return taken == [dtype]

    for slow in (True, False):
        monkeypatch.setattr(fast, "mkl_is_slow", lambda slow=slow: slow)
        monkeypatch.setattr(fast, "bf16_is_native", lambda slow=slow: slow)
        assert takes(torch.float32) == takes(torch.bfloat16) == slow
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: True)
    taken.clear()
    linear(x.double(), module.weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.double(), module.weight.double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match="dtype"):
        module(x.bfloat16())  # nothing but autocast casts
    assert module.to("meta")(x.to("meta")).shape == (4, 6)
    assert taken == []


@needs_onednn
def test_nothing_has_gradients_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may hide no patch at all; oneDNN has no product of no rows."""
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: True)
    module = Linear(8, 6)
    module(torch.zeros(0, 8)).sum().backward()
    assert module.weight.grad is not None and not module.weight.grad.any()


# --- lean -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of these tests are wide and many enough."""
    monkeypatch.setattr(fast, "lean_pays", lambda x, to: True)


def modules(normed: bool = True) -> tuple[torch.nn.Module, Linear]:
    torch.manual_seed(0)
    norm, to = torch.nn.LayerNorm(24), Linear(24, 10)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm if normed else torch.nn.Identity(), to


def plain(x: Tensor, norm: torch.nn.Module, to: Linear) -> Tensor:
    return to(norm(torch.nn.functional.gelu(x)))


KINDS = pytest.mark.parametrize("normed", [True, False], ids=["norm of GELU", "GELU"])


@KINDS
@pytest.mark.parametrize("rows", [(1,), (33,), (2, 5)])
@pytest.mark.parametrize("frozen", ["", "norm", "to", "x"])
def test_lean_is_its_plain_twin(narrow: None, normed: bool, rows: tuple[int, ...], frozen: str) -> None:
    norm, to = modules(normed)
    norm.requires_grad_(frozen != "norm")
    to.requires_grad_(frozen != "to")
    x = torch.randn(*rows, 24, requires_grad=frozen != "x")
    given = [y for y in (x, *norm.parameters(), *to.parameters()) if y.requires_grad]
    own, other = (run(x, norm, to) for run in (lean, plain))
    assert torch.equal(own, other)
    for one, two in zip(gradients(own, *given), gradients(other, *given), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_is_its_plain_twin_under_autocast(narrow: None, normed: bool, dtype: torch.dtype) -> None:
    """Of fp32 rows and of bf16 rows (a linear map's result)."""
    norm, to = modules(normed)
    x = torch.randn(33, 24).to(dtype).requires_grad_()
    given = (x, *norm.parameters(), *to.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        own, other = (run(x, norm, to) for run in (lean, plain))
    assert own.dtype == torch.bfloat16 and torch.equal(own, other)
    for one, two in zip(gradients(own, *given), gradients(other, *given), strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0.02 * float(two.abs().max()))


def test_lean_without_a_bias_is_the_plain_one(narrow: None) -> None:
    norm, _ = modules()
    x, bare = torch.randn(5, 24), Linear(24, 10, bias=False)
    found = lean(x, norm, bare)
    assert torch.equal(found, plain(x, norm, bare)) and "Lean" not in found.grad_fn.name()


def test_lean_does_not_bypass_what_is_put_on_a_module(narrow: None) -> None:
    """Hooks and subclasses (adapters) are called as they would be without it."""
    norm, to = modules()
    x = torch.randn(5, 24)
    expected = plain(x, norm, to)
    handle = to.register_forward_hook(lambda module, given, found: found + 1)
    torch.testing.assert_close(lean(x, norm, to), expected + 1)
    handle.remove()

    class Adapter(Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 2

    adapter = Adapter(24, 10)
    adapter.load_state_dict(to.state_dict())
    torch.testing.assert_close(lean(x, norm, adapter), expected + 2)


@pytest.mark.parametrize("normed", [True, False])
def test_lean_keeps_its_input_alone(narrow: None, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows only x survives the forward; the plain twin keeps what GELU and norm made of it as well."""
    norm, to = modules(normed)
    x = torch.randn(1000, 24, requires_grad=True)

    def kept(run: Callable[..., Tensor]) -> int:
        sizes: dict[int, int] = {}
        note = lambda y: sizes.update({y.untyped_storage().data_ptr(): y.numel()}) or y  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
            run(x, norm, to)
        return sum(size for size in sizes.values() if size >= x.numel())

    assert kept(lean) == x.numel()
    assert kept(plain) == (3 if normed else 2) * x.numel()
    monkeypatch.setattr(fast, "lean_pays", lambda x, to: False)
    assert kept(lean) == kept(plain)
    with torch.no_grad():
        assert lean(x, norm, to).grad_fn is None


def test_lean_pays_for_rows_that_are_wide_and_many() -> None:
    wide = fast.LEAN_WIDTH
    assert fast.lean_pays(torch.empty(4, 5, wide), Linear(wide, 10))
    assert not fast.lean_pays(torch.empty(19, wide), Linear(wide, 10))  # less than the weight and what belongs to it
    assert fast.lean_pays(torch.empty(40, wide).bfloat16(), Linear(wide, 10))
    assert not fast.lean_pays(torch.empty(39, wide).bfloat16(), Linear(wide, 10))
    assert not fast.lean_pays(torch.empty(20, wide - 1), Linear(wide - 1, 10))


# --- keys without a bias ----------------------------------------------------------------------------------------------


def query_key_value(dim: int = 8) -> QueryKeyValue:
    torch.manual_seed(0)
    module = QueryKeyValue(dim)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_keys_have_no_bias() -> None:
    module, x = query_key_value(), torch.randn(2, 5, 8)
    q, k, v = module(x).chunk(3, dim=-1)
    for found, weight, bias in zip((q, k, v), module.weight.chunk(3), (module.q_bias, 0, module.v_bias)):
        torch.testing.assert_close(found, x @ weight.T + bias)
    assert {name for name, _ in module.named_parameters()} == {"weight", "q_bias", "v_bias"}
