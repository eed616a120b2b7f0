from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from multiway.errors import ConversionError
from multiway.weights.google import to_timm
from multiway.weights.rename import to_ours, to_theirs
from multiway.weights.untrusted import read_published

DIM, HEADS, HIDDEN, PATCH, DEPTH, CLASSES = 24, 3, 40, 4, 12, 7


def timm_state() -> dict[str, Tensor]:
    """A ViT's state dict as timm names it, with its last block first: order must not matter."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, DIM), "pos_embed": (1, 10, DIM), "patch_embed.proj.weight": (DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (DIM,), "norm.weight": (DIM,), "norm.bias": (DIM,), "head.weight": (CLASSES, DIM),
        "head.bias": (CLASSES,),
    }  # fmt: skip
    for i in reversed(range(DEPTH)):
        own = {
            "norm1.weight": (DIM,), "norm1.bias": (DIM,),
            "attn.qkv.weight": (3 * DIM, DIM), "attn.qkv.bias": (3 * DIM,),
            "attn.proj.weight": (DIM, DIM), "attn.proj.bias": (DIM,), "norm2.weight": (DIM,), "norm2.bias": (DIM,),
            "mlp.fc1.weight": (HIDDEN, DIM), "mlp.fc1.bias": (HIDDEN,), "mlp.fc2.weight": (DIM, HIDDEN),
            "mlp.fc2.bias": (DIM,),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def google(state: dict[str, Tensor], prefix: str = "", newer: bool = False, stacked: bool = False) -> dict:
    """What a JAX ViT with these weights is saved as."""
    x = {name: tensor.numpy() for name, tensor in state.items()}
    norm2, attention, ffn = ("_1", "_0", "_0") if newer else ("_2", "_1", "_3")
    arrays = {
        "cls": x["cls_token"],
        ("" if newer else "Transformer/posembed_input/") + "pos_embedding": x["pos_embed"],
        "embedding/kernel": np.einsum("oihw->hwio", x["patch_embed.proj.weight"]),
        "embedding/bias": x["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": x["norm.weight"],
        "Transformer/encoder_norm/bias": x["norm.bias"],
        "head/kernel": x["head.weight"].T,
        "head/bias": x["head.bias"],
    }
    blocks = []
    for i in range(DEPTH):
        own = {name.removeprefix(f"blocks.{i}."): array for name, array in x.items() if name.startswith(f"blocks.{i}.")}
        weight = own["attn.qkv.weight"].reshape(3, HEADS, DIM // HEADS, DIM)  # (qkv, head, width, in)
        bias = own["attn.qkv.bias"].reshape(3, HEADS, DIM // HEADS)
        mha = f"MultiHeadDotProductAttention{attention}"
        block = {
            "LayerNorm_0/scale": own["norm1.weight"], "LayerNorm_0/bias": own["norm1.bias"],
            f"LayerNorm{norm2}/scale": own["norm2.weight"], f"LayerNorm{norm2}/bias": own["norm2.bias"],
            f"{mha}/out/kernel": own["attn.proj.weight"].reshape(DIM, HEADS, DIM // HEADS).transpose(1, 2, 0),
            f"{mha}/out/bias": own["attn.proj.bias"],
        }  # fmt: skip
        for j, name in enumerate(("query", "key", "value")):
            block[f"{mha}/{name}/kernel"] = weight[j].transpose(2, 0, 1)
            block[f"{mha}/{name}/bias"] = bias[j]
        for j in range(2):
            block[f"MlpBlock{ffn}/Dense_{j}/kernel"] = own[f"mlp.fc{j + 1}.weight"].T
            block[f"MlpBlock{ffn}/Dense_{j}/bias"] = own[f"mlp.fc{j + 1}.bias"]
        blocks.append(block)
    if stacked:
        arrays |= {f"Transformer/encoderblock/{name}": np.stack([b[name] for b in blocks]) for name in blocks[0]}
    else:
        arrays |= {f"Transformer/encoderblock_{i}/{name}": b[name] for i, b in enumerate(blocks) for name in b}
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("prefix", "newer", "stacked"),
    [("", False, False), ("opt/target/", False, False), ("params/", True, False), ("", True, True)],
)
def test_every_naming_comes_back_to_the_bit(tmp_path: Path, prefix: str, newer: bool, stacked: bool) -> None:
    want = timm_state()
    np.savez(tmp_path / "vit.npz", **google(want, prefix, newer, stacked))
    got = to_timm(read_published(tmp_path / "vit.npz").state)
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.is_contiguous() and torch.equal(tensor, want[name]), name


def test_what_is_not_known_keeps_its_name() -> None:
    arrays = {name: torch.from_numpy(np.array(array)) for name, array in google(timm_state()).items()}
    del arrays["Transformer/encoderblock_3/MultiHeadDotProductAttention_1/key/kernel"]
    got = to_timm(arrays | {"pre_logits/kernel": torch.ones(DIM, DIM)})
    assert "blocks.3.attn.qkv.weight" not in got
    assert {"pre_logits/kernel", "Transformer/encoderblock_3/MultiHeadDotProductAttention_1/query/kernel"} <= got.keys()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("head/bias", torch.tensor(1.0)),
        ("head/kernel", torch.ones(1, 1, 1)),
        ("Transformer/encoderblock/LayerNorm_0/bias", torch.tensor(1.0)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", torch.ones(3)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", torch.ones(5, 2, 2)),
    ],
)
def test_arrays_of_another_kind_are_refused(name: str, array: torch.Tensor) -> None:
    arrays = {name: torch.from_numpy(np.array(array)) for name, array in google(timm_state()).items()}
    with pytest.raises(ConversionError, match="these arrays are not those of a ViT"):
        to_timm(arrays | {name: array})


def test_it_fits_our_model() -> None:
    from multiway.systems.vit import LAYOUTS, Config, ViT

    config = Config(dim=DIM, depth=DEPTH, heads=HEADS, hidden=HIDDEN, patch=PATCH, image_px=3 * PATCH, classes=CLASSES)
    model, want = ViT(config), timm_state()
    arrays = {name: torch.from_numpy(np.array(array)) for name, array in google(want).items()}
    state = to_ours(to_timm(arrays), LAYOUTS["timm"], model.state_dict())
    model.load_state_dict(state)
    back = to_theirs(model.state_dict(), LAYOUTS["timm"])
    assert all(torch.equal(back[name], want[name]) for name in want)
    with pytest.raises(ConversionError, match=r"1 unexpected: pre_logits/bias \(3\)"):
        to_ours(to_timm(arrays | {"pre_logits/bias": torch.ones(3)}), LAYOUTS["timm"], model.state_dict())
