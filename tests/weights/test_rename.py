from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multiway.errors import ConversionError
from multiway.weights.rename import WeightMap, to_ours, to_theirs

RULES = WeightMap(
    words={"expert": {"image": "A", "text": "B"}},
    rules=(
        ("layer.{i}.kv.{expert}.{part}", "h{i}.k.{expert}_{part}", "h{i}.v.{expert}_{part}"),
        ("layer.{i}.{name}.weight", "h{i}.{name}.w"),
        ("scale", "s"),
    ),
)


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.0.kv.image.weight": torch.randn(6, 2, generator=generator),
        "layer.0.kv.text.bias": torch.randn(6, generator=generator).bfloat16(),
        "layer.11.out.weight": torch.randn(2, 2, generator=generator),
        "scale": torch.tensor(0.5),
    }


def test_names_words_and_slices() -> None:
    ours = state()
    theirs = to_theirs(ours, RULES)
    assert set(theirs) == {"h0.k.A_weight", "h0.v.A_weight", "h0.k.B_bias", "h0.v.B_bias", "h11.out.w", "s"}
    assert torch.equal(theirs["h0.v.A_weight"], ours["layer.0.kv.image.weight"][3:])
    assert theirs["h0.k.B_bias"].dtype == torch.bfloat16
    storages = [x.untyped_storage().data_ptr() for x in theirs.values()]
    assert len(set(storages)) == len(storages), "slices share memory, which safetensors refuses to save"


def test_both_ways_is_the_identity() -> None:
    ours = state()
    back = to_ours(dict(reversed(to_theirs(ours, RULES).items())), RULES, ours)
    assert list(back) == list(ours)
    assert all(torch.equal(back[key], ours[key]) and back[key].dtype == ours[key].dtype for key in ours)


def test_shapes_alone_suffice_on_our_side() -> None:
    like = {key: value.to("meta") for key, value in state().items()}
    back = to_ours(to_theirs(state(), RULES), RULES, like)
    assert all(torch.equal(back[key], value) for key, value in state().items())


@pytest.mark.parametrize("key", ["other", "layer.0.kv.audio.weight", "layer.0.a.b.weight", "layer.0.out.weight2"])
def test_our_key_without_a_rule_is_refused(key: str) -> None:
    with pytest.raises(ConversionError, match=rf"{key} \(4, 2\): no rule"):
        to_theirs({**state(), key: torch.zeros(4, 2)}, RULES)


def test_a_tensor_that_cannot_be_sliced_evenly_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"layer.0.kv.text.bias \(5\)"):
        to_theirs({"layer.0.kv.text.bias": torch.zeros(5)}, RULES)


WITH_ONES = WeightMap(
    rules=(("layer.{i}.qkv.bias", "h{i}.q", "h{i}.v"), ("out.{part}", "out.{part}"), ("positions", "pos")),
    ones={"layer.{i}.qkv.bias": 1, "out.weight": 2, "positions": -1},
    dropped=("h{i}.index", "teacher.{rest*}"),
)


def test_dimensions_of_size_one_come_and_go() -> None:
    ours = {
        "layer.3.qkv.bias": torch.arange(4.0),
        "out.weight": torch.arange(6.0).view(2, 3),
        "out.bias": torch.zeros(2),
        "positions": torch.ones(5, 3),
    }
    theirs = to_theirs(ours, WITH_ONES)
    assert {key: tuple(x.shape) for key, x in theirs.items()} == {
        "h3.q": (2, 1), "h3.v": (2, 1), "out.weight": (2, 3, 1, 1), "out.bias": (2,), "pos": (1, 5, 3)
    }  # fmt: skip
    back = to_ours(theirs, WITH_ONES, ours)
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    with pytest.raises(ConversionError, match=r"1 of another shape: pos \(5, 3\) instead of \(1, 5, 3\)"):
        to_ours({**theirs, "pos": torch.ones(5, 3)}, WITH_ONES, ours)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("h3.index", True),
        ("h3.4.index", False),
        ("teacher.a.b.weight", True),
        ("teacher", False),
        ("a.h3.index", False),
    ],
)
def test_what_carries_nothing_is_named_and_nothing_else_is_let_through(key: str, known: bool) -> None:
    ours = {"out.bias": torch.zeros(2)}
    assert WITH_ONES.drops(key) == known
    theirs = {"out.bias": torch.zeros(2), key: torch.zeros(1)}
    if known:
        assert list(to_ours(theirs, WITH_ONES, ours)) == ["out.bias"]
    else:
        with pytest.raises(ConversionError, match=f"1 unexpected: {key}"):
            to_ours(theirs, WITH_ONES, ours)


def test_every_fault_of_a_foreign_file_is_named_with_its_shape() -> None:
    theirs = to_theirs(state(), RULES)
    del theirs["h0.v.A_weight"]
    theirs["h11.out.w"] = torch.zeros(2, 3)
    theirs["head.weight"] = torch.zeros(7)
    with pytest.raises(ConversionError) as error:
        to_ours(theirs, RULES, state())
    message = str(error.value)
    assert "1 missing: h0.v.A_weight (3, 2)" in message
    assert "1 unexpected: head.weight (7)" in message
    assert "1 of another shape: h11.out.w (2, 3) instead of (2, 2)" in message


def test_long_lists_are_cut() -> None:
    many = {f"layer.{i}.out.weight": torch.zeros(1) for i in range(30)}
    with pytest.raises(ConversionError, match=r"30 missing: .* and 20 more"):
        to_ours({}, RULES, many)


def test_lone_vectors_lose_their_dimensions_and_matrices_are_transposed() -> None:
    rules = WeightMap(
        rules=(("token", "t"), ("scale", "s"), ("head.{part}", "h.{part}")),
        squeezed=("token", "scale"),
        transposed=("head.weight",),
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"token": (1, 1, 4), "scale": (1,), "head.weight": (2, 4), "head.bias": (2,)}
    ours = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    theirs = to_theirs(ours, rules)
    assert {key: tuple(x.shape) for key, x in theirs.items()} == {
        "t": (4,), "s": (), "h.weight": (4, 2), "h.bias": (2,),
    }  # fmt: skip
    assert torch.equal(theirs["h.weight"], ours["head.weight"].T) and theirs["h.weight"].is_contiguous()
    back = to_ours(theirs, rules, ours)
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    with pytest.raises(ConversionError, match=r"h.weight \(2, 4\) instead of \(4, 2\)"):
        to_ours({**theirs, "h.weight": ours["head.weight"]}, rules, ours)
