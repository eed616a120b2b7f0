"""Published files of every layout become models, with a receipt; everything else is refused by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multiway import cli
from multiway.convert import LICENSES, convert
from multiway.errors import CheckpointError, ConfigError, ConversionError, MissingInputError, WriteError
from multiway.models import all_systems, blank, model_class, presets
from multiway.pretrained import create_model, load
from multiway.published import matches
from multiway.weights.rename import to_theirs
from multiway.weights.untrusted import Published
from tests.contracts.toys import randomize
from tests.weights import hostile

SMALL = [name for name in presets() if "_micro_" in name or name == "beit3_tiny_patch16_64"]
VIT, SWIN2 = "vit_micro_patch4_32", "swinv2_micro_patch2_window4_32"


def made(name: str, **changes: Any) -> nn.Module:
    """A model with weights that all differ."""
    system, shape = presets()[name]
    model = model_class(system)(dataclasses.replace(shape, **changes))
    model.init_weights()
    return randomize(model)


def theirs(model: nn.Module, name: str, layout: str) -> dict[str, Tensor]:
    return to_theirs(model.state_dict(), presets()[name][0].LAYOUTS[layout])


def published(path: Path, model: nn.Module, name: str = VIT, layout: str = "timm", **more: Tensor) -> Path:
    torch.save({"model": {**theirs(model, name, layout), **more}, "epoch": 3}, path)
    return path


def pairs() -> list[tuple[str, str]]:
    """Every small model in every layout that has it."""
    found = []
    for name in SMALL:
        system, shape = presets()[name]
        for layout, weights in system.LAYOUTS.items():
            if all(weights.names(key) for key in blank(system, shape).state_dict()):
                found.append((name, layout))
    return found


def same(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("name", "layout"), pairs())
def test_every_layout_becomes_the_model_it_was(name: str, layout: str, tmp_path: Path) -> None:
    shape, settings = presets()[name][1], presets()[name][0].LAYOUTS[layout].config
    model = made(name, **settings)
    path = published(tmp_path / "weights.pth", model, name, layout)
    receipt = convert(path, tmp_path / "out", name=name, layout=layout, reference="none")
    same(load(tmp_path / "out").model, model)
    assert load(tmp_path / "out").model.config == model.config
    assert (receipt.model, receipt.layout, receipt.beside) == (name, layout, {"epoch": "int"})
    assert receipt.config == {key: value for key, value in settings.items() if getattr(shape, key) != value}
    assert receipt.renamed.keys() == model.state_dict().keys()
    assert {own for names in receipt.renamed.values() for own in names} == theirs(model, name, layout).keys()
    assert receipt.license == LICENSES.get(f"{receipt.system}/{layout}", LICENSES.get(receipt.system, "other"))


def test_licenses_belong_to_systems_and_layouts() -> None:
    for place in LICENSES:
        system, _, layout = place.partition("/")
        assert not layout or layout in all_systems()[system].LAYOUTS, place


def test_the_receipt_says_what_was_read(tmp_path: Path) -> None:
    model = made(VIT, classes=3)
    path = published(tmp_path / "weights.pth", model)
    receipt = convert(path, tmp_path / "out", reference="none")
    kept = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert kept == json.loads(json.dumps(dataclasses.asdict(receipt)))
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]
    assert kept["files"] == [{"name": "weights.pth", "bytes": path.stat().st_size, "sha256": digest}]
    assert (kept["format"], kept["wrapper"], kept["layout"], kept["system"]) == ("torch", "model", "timm", "vit")
    assert kept["license"] == "apache-2.0" and "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert kept["missing"] == kept["unexpected"] == [] and kept["config"] == {"classes": 3}
    assert digest in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "layout", "changes"),
    [
        (VIT, "timm", {"classes": 5}),
        (VIT, "timm", {"image_px": 48, "classes": 7}),
        (VIT, "transformers", {"image_px": 16, "classes": 7}),
        ("beit_micro_patch4_32", "official", {"image_px": 48, "classes": 5}),
        ("beit_micro_patch4_32_pt", "transformers", {"image_px": 20, "codes": 40}),
        ("beit3_tiny_patch16_64", "official", {"masked": False}),
        ("beit3_tiny_patch16_64", "official", {"contrast": False, "image_px": 96}),
        ("beit3_tiny_patch16_64", "official", {"contrast": False, "masked": False, "classes": 10}),
        ("beit3_tiny_patch16_64", "official", {"contrast": False, "codes": 0}),
        ("beit3_tiny_patch16_64", "official", {"contrast": False, "masked": False, "answers": 9, "image_px": 96}),
        (
            "beit3_tiny_patch16_64",
            "official_nlvr2",
            {"contrast": False, "masked": False, "answers": 2, "pictures": 2},
        ),
        ("beit3_tiny_patch16_64", "official", {"vocab": 300, "text_positions": 40}),
        ("vlmo_tiny_patch16_64", "official", {"contrast": "alone", "masked": False, "match": False, "image_px": 96}),
        ("vlmo_tiny_patch16_64", "official", {"contrast": "none", "masked": False, "match": False, "answers": 9}),
        (
            "vlmo_tiny_patch16_64",
            "official_nlvr2",
            {"contrast": "none", "masked": False, "match": False, "answers": 2, "pictures": 2},
        ),
        ("simmim_vit_micro_patch4_32", "official", {"image_px": 64}),
        ("fd_vit_micro_patch4_32", "official", {"teacher_dim": 24}),
        ("swin_micro_patch2_window4_32", "timm", {"classes": 9}),
        (SWIN2, "official", {"classes": 9}),
    ],
)
def test_heads_and_sizes_are_told_by_shapes(name: str, layout: str, changes: dict, tmp_path: Path) -> None:
    model = made(name, **changes)
    path = published(tmp_path / "weights.pth", model, name, layout)
    receipt = convert(path, tmp_path / "out", reference="none")
    assert (receipt.model, receipt.config) == (name, changes)
    same(load(tmp_path / "out").model, model)


D, BEIT3 = 128, "beit3_tiny_patch16_64"
FINAL = {f"beit3.encoder.layer_norm.{expert}.{part}": (D,) for expert in "AB" for part in ("weight", "bias")}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"classes": 9}, {**norm("fc_norm", D), **linear("head", 9, D)}),
        (
            {"answers": 2, "pictures": 2},
            {
                **FINAL, **norm("head.norm1", 4 * D), **linear("head.dense1", 2 * D, 4 * D),
                **norm("head.norm2", 2 * D), **linear("head.dense2", 2, 2 * D),
            },
        ),
        (
            {"answers": 9},
            {
                **norm("pooler.norm", D), **linear("pooler.dense", D, D), **linear("head.0", 2 * D, D),
                **norm("head.1", 2 * D), **linear("head.3", 9, 2 * D),
            },
        ),
        ({"masked": True, "codes": 0}, {**FINAL, **linear("mlm_head", 512, D)}),
        (
            {"contrast": True},
            {**FINAL, "vision_head.weight": (D, D), "language_head.weight": (D, D), "logit_scale": ()},
        ),
        ({"masked": True}, {**FINAL, **linear("mlm_head", 512, D), **linear("mim_head", 512, D)}),
    ],
    ids=["imagenet", "nlvr2", "vqa", "captioning", "retrieval", "pre-training"],
)  # fmt: skip
def test_every_published_kind_of_beit3_is_told_by_its_heads(changes: dict, heads: dict, tmp_path: Path) -> None:
    """Their names and shapes are those of masked.md 6.6."""
    settings = {"masked": False, "contrast": False, **changes}
    model = made(BEIT3, **settings)
    state = theirs(model, BEIT3, "official_nlvr2" if changes.get("pictures") else "official")
    found = {key: tuple(value.shape) for key, value in state.items()}
    assert {key: shape for key, shape in found.items() if not key.startswith("beit3.") or key in FINAL} == heads
    torch.save({"model": state}, tmp_path / "beit3.pth")
    receipt = convert(tmp_path / "beit3.pth", tmp_path / "out", reference="none")
    shape = presets()[BEIT3][1]
    assert receipt.model == BEIT3
    assert receipt.config == {key: value for key, value in settings.items() if getattr(shape, key) != value}
    same(load(tmp_path / "out").model, model)


def coordinates(window: int, trained: int) -> Tensor:
    """Swin V2's buffer of distances."""
    line = torch.arange(1.0 - window, window) / (trained - 1) * 8
    line = line.sign() * (line.abs() + 1).log2() / 3
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)[None]


@pytest.mark.parametrize(
    ("buffers", "name", "config"),
    [
        ({}, None, {}),
        ({0: (8, 8), 3: (8, 8)}, "swinv2_base_window8_256", {}),
        ({0: (16, 16), 3: (8, 8)}, "swinv2_base_window16_256", {}),
        ({0: (16, 12), 1: (16, 12), 2: (16, 12), 3: (8, 6)}, "swinv2_base_window12to16_192to256", {}),
        ({0: (24, 12), 1: (24, 12), 2: (24, 12), 3: (12, 6)}, "swinv2_base_window12to24_192to384", {"image_px": 384}),
        ({0: (12, 12), 3: (6, 6)}, "swinv2_base_window12_192", {"image_px": 192}),
    ],
)
def test_the_windows_of_swin_are_told_by_its_buffers(buffers: dict, name: str | None, config: dict) -> None:
    """Weights of different windows have equal names and shapes; with the wrong one the function is another."""
    system, shape = presets()["swinv2_base_window8_256"]
    state = to_theirs(blank(system, shape).state_dict(), system.LAYOUTS["official"])
    for stage, (window, trained) in buffers.items():
        key, tokens = f"layers.{stage}.blocks.1.", window**2
        state[f"{key}attn.relative_position_index"] = torch.empty(tokens, tokens, dtype=torch.int64, device="meta")
        state[f"{key}attn.relative_coords_table"] = coordinates(window, trained)
        if stage == 0:
            number = (config.get("image_px", 256) // 4 // window) ** 2
            state[f"{key}attn_mask"] = torch.empty(number, tokens, tokens, device="meta")
    found = matches(Published(state, "torch", ()), None, "official", {})
    best = [match.name for match in found if not match.faults and match.changed == found[0].changed]
    assert best == [name] if name else len(best) > 3
    assert not name or found[0].config == presets()[name][1]


def test_two_models_that_explain_everything_are_not_guessed_between(tmp_path: Path) -> None:
    model = made("mae_vit_micro_patch4_32_encoder")
    path = published(tmp_path / "weights.pth", model, "mae_vit_micro_patch4_32_encoder", "official")
    with pytest.raises(ConversionError, match=rf"mae_vit_micro_patch4_32_encoder, {VIT} all explain it"):
        convert(path, tmp_path / "out")
    assert convert(path, tmp_path / "out", name=VIT, reference="none").system == "vit"


def test_positions_that_were_learned_are_not_taken_for_sines(tmp_path: Path) -> None:
    path = published(tmp_path / "weights.pth", made(VIT))
    assert convert(path, tmp_path / "out", reference="none").model == VIT
    with pytest.raises(ConversionError, match=r"of another kind:\n  pos_embed \(1, 65, 192\), learned ones"):
        convert(path, tmp_path / "out", name="mae_vit_micro_patch4_32_encoder")


def test_everything_unexplained_is_listed(tmp_path: Path) -> None:
    state = theirs(made(VIT, classes=3), VIT, "timm")
    for i in range(30):
        state[f"surprise.{i}.weight"] = torch.ones(2, i + 1)
    del state["blocks.3.attn.qkv.bias"]
    state["blocks.5.mlp.fc1.bias"] = torch.ones(5)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ConversionError) as error:
        convert(tmp_path / "w.safetensors", tmp_path / "out", name=VIT)
    message = str(error.value)
    assert f"nearest is {VIT} in layout timm, where 32 keys do not fit" in message
    assert "missing:\n  blocks.3.attn.qkv.bias (576)" in message
    assert "of another shape:\n  blocks.5.mlp.fc1.bias (5) instead of (768)" in message
    assert all(f"surprise.{i}.weight (2, {i + 1})" in message for i in range(30))
    assert not (tmp_path / "out").exists()


def test_what_a_layout_drops_is_told(tmp_path: Path) -> None:
    name = "beit_micro_patch4_32"
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(65, 65, dtype=torch.int64) for i in range(6)}
    path = published(tmp_path / "w.pth", made(name), name, "official", **index)
    receipt = convert(path, tmp_path / "out", reference="none")
    assert receipt.dropped.keys() == index.keys() and set(receipt.dropped.values()) == {
        "the layout drops it: made anew, or of training alone"
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_become_float32_and_it_is_told(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: value.to(dtype) for key, value in theirs(made(VIT), VIT, "timm").items()}
    torch.save(state, tmp_path / "w.pth")
    receipt = convert(tmp_path / "w.pth", tmp_path / "out", reference="none")
    assert receipt.dtypes == {f"{dtype} -> torch.float32": len(state)}
    got = theirs(load(tmp_path / "out").model, VIT, "timm")
    assert all(torch.equal(got[key], value.float()) for key, value in state.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_what_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    state = {key: x.double() for key, x in theirs(made(VIT), VIT, "timm").items()}
    state["blocks.2.norm1.bias"][7] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConversionError, match="1 weights are not finite, encoder.blocks.2.attention.qkv.norm.bias"):
        convert(tmp_path / "w.pth", tmp_path / "out")


@pytest.mark.parametrize("image_px", [48, (32, 64)])
def test_pictures_of_another_size_are_asked_for(image_px: int | tuple[int, int], tmp_path: Path) -> None:
    model: Any = made(VIT, classes=3)
    path = published(tmp_path / "w.pth", model)
    receipt = convert(path, tmp_path / "out", image_px=image_px, reference="none")
    rows, columns = (image_px, image_px) if isinstance(image_px, int) else image_px
    assert receipt.resized == {"encoder.positions": [[65, 192], [1 + rows // 4 * (columns // 4), 192]]}
    model.set_image_size(image_px)
    found = load(tmp_path / "out")
    same(found.model, model)
    assert found.classify(torch.zeros(1, 3, rows, columns, dtype=torch.uint8)).shape == (1, 3)


def test_a_file_of_google_is_read(tmp_path: Path) -> None:
    from tests.weights.test_google import google

    state = theirs(made(VIT, dim=24, heads=3, hidden=40, depth=12, image_px=12, classes=7), VIT, "timm")
    np.savez(tmp_path / "vit.npz", **google(state))
    with pytest.raises(ConversionError, match="no model explains it"):
        convert(tmp_path / "vit.npz", tmp_path / "out")
    model = create_model(
        VIT, tmp_path / "vit.npz", dim=24, heads=3, hidden=40, depth=12, image_px=12, classes=7
    )  # fmt: skip
    got = theirs(model, VIT, "timm")
    assert all(torch.equal(got[key], state[key]) for key in state)
    found = matches(Published(state, "npz", ()), VIT, "google", {})
    assert found[0].layout == "google"


def test_create_model_takes_published_files(tmp_path: Path) -> None:
    model = made(VIT, classes=3)
    path = published(tmp_path / "w.pth", model)
    same(create_model(VIT, path, classes=3), model)
    with pytest.raises(ConversionError, match=r"1 of another shape|2 of another shape: head.weight \(3, 192\)"):
        create_model(VIT, path, classes=4)
    with pytest.raises(ConversionError, match="of another shape"):
        create_model("vit_tiny_patch16_224", path)
    with pytest.raises(ConversionError, match="do not fit the model"):
        create_model("beit_micro_patch4_32", path)
    (tmp_path / "hub").mkdir()
    save_file(theirs(model, VIT, "transformers"), tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    same(create_model(VIT, tmp_path / "hub", classes=3), model)
    convert(path, tmp_path / "out", reference="none")
    same(create_model(VIT, tmp_path / "out", classes=3), model)


def test_code_is_refused_at_every_entrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, content, why in hostile.code("touch canary"):
        (tmp_path / "model.pth").write_bytes(content)
        with pytest.raises(ConversionError, match=why):
            convert(tmp_path / "model.pth", tmp_path / "out")
        with pytest.raises(ConversionError, match=why):
            create_model(VIT, tmp_path / "model.pth")
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / "pytorch_model.bin").write_bytes(content)
        with pytest.raises((ConversionError, MissingInputError, CheckpointError)):
            create_model(VIT, tmp_path / "folder")
        with pytest.raises(ConversionError, match=why):
            convert(tmp_path / "folder", tmp_path / "out")
        assert not (tmp_path / "canary").exists(), kind


def folder(path: Path, model: nn.Module, name: str, layout: str, config: object, pixels: object = None) -> Path:
    """A hub folder with configs."""
    path.mkdir()
    save_file(theirs(model, name, layout), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    if pixels is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(pixels))
    return path


def test_configs_beside_the_weights_tell_what_weights_do_not(tmp_path: Path) -> None:
    """Windows of Swin V2 without its buffers, colours, the size of pictures; and which of two models it is."""
    config = {"window_size": 2, "image_size": 64, "pretrained_window_sizes": [4, 4, 2]}
    pixels = {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 1]}
    path = folder(tmp_path / "swin", made(SWIN2), SWIN2, "transformers", config, pixels)
    receipt = convert(path, tmp_path / "out", reference="none")
    assert receipt.config == {
        "window": 2, "image_px": 64, "pretrained_window": (4, 4, 2), "mean": (0.5, 0.25, 0.5), "std": (0.5, 0.5, 1.0)
    }  # fmt: skip
    path = folder(tmp_path / "none", made(SWIN2), SWIN2, "transformers", {"pretrained_window_sizes": [0, 0, 0]})
    assert convert(path, tmp_path / "out", reference="none").config == {}
    name = "mae_vit_micro_patch4_32_encoder"
    config = {"architecture": VIT, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.5}}
    path = folder(tmp_path / "timm", made(name), name, "official", config)
    receipt = convert(path, tmp_path / "out", reference="none")
    assert receipt.model == VIT and receipt.config == {"mean": (0.1, 0.2, 0.3), "share": 0.5}


@pytest.mark.parametrize(
    "config",
    [{"image_size": "big"}, {"image_size": [1, 2, 3]}, {"window_size": [7]}, {"pretrained_cfg": {"mean": [1, 2]}}],
)
def test_configs_that_make_no_sense_are_refused(config: dict, tmp_path: Path) -> None:
    path = folder(tmp_path / "hub", made(VIT), VIT, "timm", config)
    with pytest.raises(ConversionError, match="hub: the configs beside the weights are not such"):
        convert(path, tmp_path / "out")


def test_of_a_hub_model_only_what_is_needed_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in one form: safetensors, and only where there are none the older files."""
    model, asked = made(VIT), []
    (tmp_path / "snapshot").mkdir()

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if "pytorch_model*.bin" in allow_patterns:
            torch.save(theirs(model, VIT, "timm"), tmp_path / "snapshot" / "pytorch_model.bin")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    receipt = convert("somebody/vit", tmp_path / "out", name=VIT, reference="none")
    assert [file["name"] for file in receipt.files] == ["pytorch_model.bin"] and receipt.source == "somebody/vit"
    assert [[pattern for pattern in own if "model*" in pattern] for own in asked] == [
        ["open_clip_model*.safetensors"], ["model*.safetensors"], ["open_clip_pytorch_model*.bin"],
        ["pytorch_model*.bin"],
    ]  # fmt: skip
    assert all({"open_clip_config.json", "config.json", "tokenizer.json", "merges.txt"} <= set(own) for own in asked)
    same(load(tmp_path / "out").model, model)


def test_wrong_names_are_told(tmp_path: Path) -> None:
    path = published(tmp_path / "w.pth", made(VIT))
    with pytest.raises(ConfigError, match=f"unknown model 'vit_micro_patch4'; did you mean '{VIT}'"):
        convert(path, tmp_path / "out", name="vit_micro_patch4")
    with pytest.raises(ConfigError, match=f"no {VIT} is known in layout keras"):
        convert(path, tmp_path / "out", name=VIT, layout="keras")
    with pytest.raises(MissingInputError, match="nowhere.pth"):
        convert(tmp_path / "nowhere.pth", tmp_path / "out")
    with pytest.raises(MissingInputError, match="no folder with open_clip_model.safetensors, .* or pytorch_model.bin"):
        (tmp_path / "empty").mkdir()
        convert(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(WriteError, match="taken"):
        convert(path, tmp_path / "taken", reference="none")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published(tmp_path / "w.pth", made(VIT))
    cli.main(["convert", str(path), "--out", str(tmp_path / "out"), "--image-px", "16"])
    said = capsys.readouterr().out
    assert VIT in said and "sha256" in said and "1 names" in said
    assert load(tmp_path / "out").model.config.image_px == 16
    (tmp_path / "w.pth").write_bytes(hostile.saved(hostile.state(w=hostile.call("os.system", hostile.text("true")))))
    with pytest.raises(SystemExit) as error:
        cli.main(["convert", str(path), "--out", str(tmp_path / "out")])
    assert error.value.code == 65
    assert "contains code: os.system" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- references


def hub(folder: Path, kind: str) -> Any:
    """A folder as transformers writes it, with random weights."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=4, layer_norm_eps=1e-6, num_labels=5)
    randomize(getattr(transformers, kind)(config)).save_pretrained(folder)
    pixels = {"image_mean": [0.5, 0.4, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return transformers


@pytest.mark.parity
def test_a_folder_of_transformers_is_compared_with_it(tmp_path: Path) -> None:
    """And weights in another order do not pass: query, key and value exchanged have the same names and shapes."""
    transformers = hub(tmp_path / "hub", "ViTForImageClassification")
    receipt = convert(tmp_path / "hub", tmp_path / "out")
    assert receipt.layout == "transformers" and receipt.reference == f"transformers {transformers.__version__}"
    assert receipt.difference is not None and receipt.difference < 1e-4 < 0.1 < (receipt.largest or 0)
    assert receipt.config == {"classes": 5, "mean": (0.5, 0.4, 0.5)}
    model = load(tmp_path / "out")
    linear = model.model.encoder.blocks[2].attention.qkv.linear.weight  # type: ignore[union-attr, index]
    with torch.no_grad():
        linear.copy_(linear.unflatten(0, (3, -1))[[1, 2, 0]].flatten(0, 1))
    model.save_pretrained(tmp_path / "out")
    asked = [sys.executable, "-m", "multiway.reference", "transformers", tmp_path / "hub", tmp_path / "out", VIT]
    said = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    assert said["difference"] > 1e-2


@pytest.mark.parity
def test_a_bare_encoder_of_transformers_has_no_prefix(tmp_path: Path) -> None:
    hub(tmp_path / "hub", "ViTModel")
    receipt = convert(tmp_path / "hub", tmp_path / "out", reference="none")
    assert set(receipt.dropped) == {"vit.pooler.dense.weight", "vit.pooler.dense.bias"}
    assert receipt.config == {"mean": (0.5, 0.4, 0.5)}
    (tmp_path / "hub" / "config.json").write_text("[" * 10**5)
    with pytest.raises(ConversionError, match="config.json"):
        convert(tmp_path / "hub", tmp_path / "out")


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_file_of_timm_is_compared_with_it(tmp_path: Path) -> None:
    stubs = Path(__file__).parent / "parity" / "stubs"
    path = published(tmp_path / "w.pth", made("vit_tiny_patch16_224"))
    command = [sys.executable, "-m", "multiway", "convert", str(path), "--out", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(stubs), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["reference"].startswith("timm 1.") and receipt["model"] == "vit_tiny_patch16_224"
    assert receipt["difference"] < 1e-4 < 0.1 < receipt["largest"]


def test_a_program_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    for name in ("timm", "transformers"):
        (tmp_path / "broken" / f"{name}.py").write_text("raise ImportError('absent')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    path = published(tmp_path / "w.pth", made(VIT))
    receipt = convert(path, tmp_path / "out")
    assert receipt.reference == "timm is not installed: absent" and receipt.difference is None


@pytest.mark.parity
def test_an_mae_of_the_hub_is_compared_with_every_patch_read(tmp_path: Path) -> None:
    """As files on the hub name it; transformers draws what it hides, here it may hide nothing."""
    transformers = pytest.importorskip("transformers")
    name = "mae_vit_micro_patch4_32"
    model = made(name)
    model.init_weights()
    shape = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    config = transformers.ViTMAEConfig(
        **shape, image_size=32, patch_size=4, layer_norm_eps=1e-6, decoder_hidden_size=96, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3, decoder_intermediate_size=384, architectures=["ViTMAEForPreTraining"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "hub")
    save_file(theirs(model, name, "transformers"), tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    receipt = convert(tmp_path / "hub", tmp_path / "out", name=name)
    assert receipt.reference.startswith("transformers")
    assert receipt.difference is not None and receipt.difference < 1e-4
    assert receipt.largest is not None and receipt.largest > 0.5
