"""Folders and TorchScript files of CLIP and SigLIP: what configs and tokenizers beside the weights decide."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multiway import reference
from multiway.convert import convert
from multiway.data.bpe import clip_bpe
from multiway.data.text import TextTokenizer
from multiway.errors import ConfigError, ConversionError, DataError
from multiway.pretrained import load
from multiway.systems import beit3, clip, siglip
from multiway.weights.rename import to_theirs
from tests.contracts.toys import randomize
from tests.data.test_sentencepiece import written

MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
VOCAB = 512 + len(MERGES) + 2
TINY = clip.Config(
    out=20, dim=48, depth=3, heads=4, hidden=96, patch=8, image_px=32, text_dim=32, text_depth=2, text_heads=2,
    text_hidden=128, text_tokens=12, vocab=VOCAB,
)  # fmt: skip
RESNET = dataclasses.replace(TINY, dim=8, depth=12, heads=12, hidden=3072, stages=(2, 1, 1, 1), patch=32, image_px=64)


def made(shape: clip.Config = TINY) -> clip.CLIP:
    """A model with weights that all differ."""
    model = clip.CLIP(shape)
    model.init_weights()
    return randomize(model)


def same(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def open_clip_config(shape: clip.Config, **model: Any) -> dict[str, Any]:
    """What open_clip writes beside its weights."""
    vision: dict[str, Any] = {"image_size": shape.image_px, "width": shape.dim}
    if shape.stages:
        vision |= {"layers": list(shape.stages), "patch_size": None}
    else:
        vision |= {"layers": shape.depth, "head_width": shape.dim // shape.heads, "patch_size": shape.patch}
        vision["mlp_ratio"] = shape.hidden / shape.dim
    text = {"context_length": shape.text_tokens, "vocab_size": shape.vocab, "width": shape.text_dim}
    text |= {"heads": shape.text_heads, "layers": shape.text_depth}
    return {
        "model_cfg": {"embed_dim": shape.out, "vision_cfg": vision, "text_cfg": text, **model},
        "preprocess_cfg": {"mean": list(shape.mean), "std": list(shape.std)},
    }


def transformers_config(shape: clip.Config) -> dict[str, Any]:
    """What transformers writes beside its weights."""
    vision = {"image_size": shape.image_px, "patch_size": shape.patch, "hidden_act": shape.activation}
    text = {"max_position_embeddings": shape.text_tokens, "vocab_size": shape.vocab, "hidden_act": shape.activation}
    for part, prefix in ((vision, ""), (text, "text_")):
        part["hidden_size"], part["num_hidden_layers"] = (
            getattr(shape, f"{prefix}dim"),
            getattr(shape, f"{prefix}depth"),
        )
        part["num_attention_heads"] = getattr(shape, f"{prefix}heads")
        part["intermediate_size"] = getattr(shape, f"{prefix}hidden")
    text["eos_token_id"] = shape.vocab - 1
    parts = {"vision_config": vision, "text_config": text, "projection_dim": shape.out}
    return {"architectures": ["CLIPModel"], "model_type": "clip", **parts}


def folder(path: Path, model: nn.Module, layout: str, files: Mapping[str, Any]) -> Path:
    """A hub folder with weights in a layout, and ``files``: JSON or text."""
    path.mkdir()
    system = clip if isinstance(model, clip.CLIP) else siglip
    name = "open_clip_model.safetensors" if layout == "open_clip" else "model.safetensors"
    save_file(to_theirs(model.state_dict(), system.LAYOUTS[layout]), path / name, metadata={"format": "pt"})
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("shape", [TINY, RESNET], ids=["vit", "resnet"])
def test_open_clip_says_what_its_weights_are(shape: clip.Config, quick: bool, tmp_path: Path) -> None:
    """Activation, colours, and every size, also heads, of which shapes tell nothing."""
    shape = dataclasses.replace(shape, activation="quick_gelu" if quick else "gelu", mean=(0.5, 0.4, 0.5))
    model = made(shape)
    said = open_clip_config(shape, **({"quick_gelu": True} if quick else {}))
    path = folder(tmp_path / "hub", model, "open_clip", {"open_clip_config.json": said})
    receipt = convert(path, tmp_path / "out", reference="none")
    found = load(tmp_path / "out").model
    assert found.config == shape
    same(found, model)
    assert receipt.layout == ("openai" if quick else "open_clip")
    assert receipt.told["activation"] == f"open_clip_config.json: model_cfg.quick_gelu: {shape.activation}"


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_says_what_its_weights_are(activation: Any, tmp_path: Path) -> None:
    shape = dataclasses.replace(TINY, activation=activation, std=(0.5, 0.4, 0.5))
    model = made(shape)
    files = {
        "config.json": transformers_config(shape),
        "preprocessor_config.json": {"image_mean": TINY.mean, "image_std": shape.std},
    }
    receipt = convert(folder(tmp_path / "hub", model, "transformers", files), tmp_path / "out", reference="none")
    assert load(tmp_path / "out").model.config == shape and receipt.layout == "transformers"
    same(load(tmp_path / "out").model, model)


def test_what_transformers_leaves_out_is_what_it_takes_then(tmp_path: Path) -> None:
    said = transformers_config(TINY)
    for part in ("vision_config", "text_config"):
        del said[part]["hidden_act"]
    path = folder(tmp_path / "hub", made(), "transformers", {"config.json": said})
    convert(path, tmp_path / "out", reference="none")
    assert load(tmp_path / "out").model.config.activation == "quick_gelu"


def broken(change: str) -> tuple[dict[str, Any], str]:
    """Files beside weights of `TINY` in transformers' layout of which one is wrong, and what is said of it."""
    config, clips = transformers_config(TINY), open_clip_config(TINY, quick_gelu=True)
    files: dict[str, Any] = {"config.json": config, "open_clip_config.json": clips}
    if change == "towers":
        config["text_config"]["hidden_act"] = "gelu"
        return files, r"config.json: vision_config.hidden_act says quick_gelu, but config.json: text_config.hidden_act"
    if change == "programs":
        clips["model_cfg"]["quick_gelu"] = False
        return (
            files,
            r"text_config.hidden_act says quick_gelu, but open_clip_config.json: model_cfg.quick_gelu says gelu",
        )
    if change == "colours":
        files["preprocessor_config.json"] = {"image_mean": [0.5, 0.5, 0.5]}
        return (
            files,
            r"preprocessor_config.json: image_mean says \(0.5, 0.5, 0.5\), but open_clip_config.json: preprocess",
        )
    if change == "size":
        config["vision_config"]["image_size"] = clips["model_cfg"]["vision_cfg"]["image_size"] = 64
        return files, r"vision_cfg.image_size says 64, the weights are of image_px 32"
    if change == "number":
        clips["model_cfg"]["vision_cfg"]["width"] = "wide"
        return {"open_clip_config.json": clips}, "the configs beside the weights are not such"
    config["vision_config"]["hidden_act"] = config["text_config"]["hidden_act"] = "relu"
    return {"config.json": config}, "the configs beside the weights are not such"


@pytest.mark.parametrize("change", ["towers", "programs", "colours", "size", "number", "activation"])
def test_configs_that_contradict_are_refused_by_file_and_key(change: str, tmp_path: Path) -> None:
    files, why = broken(change)
    path = folder(tmp_path / "hub", made(), "transformers", files)
    with pytest.raises(ConversionError, match=why):
        convert(path, tmp_path / "out", reference="none")
    assert not (tmp_path / "out").exists()


def test_a_layout_that_means_something_else_than_the_config_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "hub", made(), "open_clip", {"open_clip_config.json": open_clip_config(TINY)})
    with pytest.raises(
        ConversionError, match="model_cfg.quick_gelu says gelu, the weights are of activation quick_gelu"
    ):
        convert(path, tmp_path / "out", layout="openai", reference="none")


def test_an_activation_that_a_system_has_not_is_refused(tmp_path: Path) -> None:
    """SigLIP's is tanh's GELU always."""
    model = randomize(siglip.SigLIP(siglip.PRESETS["siglip_tiny_patch8_64"]))
    said = {"model_type": "siglip", "vision_config": {"image_size": 66}, "text_config": {}}
    path = folder(tmp_path / "hub", model, "transformers", {"config.json": said})
    receipt = convert(path, tmp_path / "out", reference="none")  # 66 pixels are 8 whole patches of 8
    assert receipt.model == "siglip_tiny_patch8_64" and receipt.config == {}
    said["vision_config"], said["text_config"] = {"hidden_act": "gelu"}, {"hidden_act": "gelu"}
    (path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ConversionError, match="hidden_act says gelu, the weights are of activation gelu_tanh"):
        convert(path, tmp_path / "out", reference="none")


# ----------------------------------------------------------------------------------------------------------- tokenizers


def merges() -> str:
    return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES)]) + "\n"


def vocab() -> dict[str, int]:
    return clip_bpe(MERGES).get_vocab()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": clip_bpe(MERGES).to_str()},
        {"merges.txt": merges()},
        {"merges.txt": merges(), "vocab.json": vocab()},
    ],
    ids=["json", "merges", "both"],
)
def test_a_tokenizer_in_the_folder_comes_along(files: dict[str, Any], tmp_path: Path) -> None:
    """And a converted CLIP reads texts at once."""
    path = folder(tmp_path / "hub", made(), "transformers", {"config.json": transformers_config(TINY), **files})
    receipt = convert(path, tmp_path / "out", reference="none")
    assert receipt.tokenizer["name"] == next(iter(files)) and len(receipt.tokenizer["sha256"]) == 64
    model = load(tmp_path / "out")
    assert model.tokenizer is not None
    assert model.tokenizer.ids("A cat").tolist() == [vocab()["a</w>"], vocab()["cat</w>"]]
    vectors = model.encode_text(["a cat", "a dog"])
    assert vectors.shape == (2, 20) and torch.allclose(vectors.norm(dim=-1), torch.ones(2))


def test_tokenizers_that_do_not_fit_are_told(tmp_path: Path) -> None:
    other = {**vocab(), "cat</w>": vocab()["dog</w>"], "dog</w>": vocab()["cat</w>"]}
    files = {"config.json": transformers_config(TINY), "merges.txt": merges(), "vocab.json": other}
    path = folder(tmp_path / "hub", made(), "transformers", files)
    with pytest.raises(ConversionError, match="vocab.json: 'cat</w>' has id 515, merges.txt makes it 513; 2 pieces"):
        convert(path, tmp_path / "out", reference="none")
    (path / "vocab.json").unlink()
    (path / "merges.txt").write_text(merges() + "t h\n")
    receipt = convert(path, tmp_path / "out", reference="none")
    assert "merges.txt was not taken: the tokenizer has 519 ids" in receipt.tokenizer["missing"]
    with pytest.raises(ConfigError, match="the tokenizer has 519 ids, more than the 518 rows"):
        convert(path, tmp_path / "out", tokenizer=path / "merges.txt", reference="none")
    (path / "merges.txt").write_text("no merges")
    assert "was not taken" in convert(path, tmp_path / "out", reference="none").tokenizer["missing"]
    with pytest.raises(DataError, match="merges.txt"):
        convert(path, tmp_path / "out", tokenizer=path / "merges.txt", reference="none")
    (path / "merges.txt").unlink()
    assert "--tokenizer" in convert(path, tmp_path / "out", reference="none").tokenizer["missing"]
    (tmp_path / "merges.txt").write_text(merges())
    assert convert(path, tmp_path / "out", tokenizer=tmp_path / "merges.txt", reference="none").tokenizer["bytes"] > 20
    assert load(tmp_path / "out").encode_text("cat").shape == (1, 20)


def test_beit3_takes_its_published_tokenizer(tmp_path: Path) -> None:
    model = beit3.BEiT3(beit3.PRESETS["beit3_tiny_patch16_64"])
    model.init_weights()
    torch.save({"model": to_theirs(model.state_dict(), beit3.LAYOUTS["official"])}, tmp_path / "beit3.pth")
    path = written(tmp_path / "beit3.spm")
    receipt = convert(tmp_path / "beit3.pth", tmp_path / "out", tokenizer=path, reference="none")
    assert receipt.tokenizer["name"] == "beit3.spm"
    found = load(tmp_path / "out")
    assert found.tokenizer is not None and found.tokenizer.hash == TextTokenizer.load(path).hash
    assert found.preprocessor.hide == found.tokenizer.vocab - 1
    assert found.encode_text("a cat").shape == (1, 128)


# ---------------------------------------------------------------------------------------------------------- TorchScript


class Part(nn.Module):
    """A module that only holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def script(state: Mapping[str, Tensor], path: Path, **sizes: int) -> Path:
    """A TorchScript file of OpenAI's: matrices in half precision, and three sizes beside the weights."""
    root = Part()
    for name, value in {**state, **{name: torch.tensor(size) for name, size in sizes.items()}}.items():
        *above, last = name.split(".")
        module = root
        for part in above:
            if part not in module._modules:
                module.add_module(part, Part())
            module = module._modules[part]  # type: ignore[assignment]
        value = value.half() if value.ndim > 1 else value
        module.register_buffer(last, value) if name in sizes else module.register_parameter(
            last, nn.Parameter(value, requires_grad=False)
        )
    torch.jit.script(root.eval()).save(path)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_torch_script_becomes_its_model(tmp_path: Path) -> None:
    name, sizes = "clip_vit_tiny_patch8_64", {"input_resolution": 64, "context_length": 64, "vocab_size": 512}
    model = made(dataclasses.replace(clip.PRESETS[name], activation="quick_gelu"))
    theirs = to_theirs(model.state_dict(), clip.LAYOUTS["openai"])
    receipt = convert(script(theirs, tmp_path / "model.pt", **sizes), tmp_path / "out", reference="none")
    assert (receipt.model, receipt.layout, receipt.format) == (name, "openai", "torchscript")
    assert receipt.config == {"activation": "quick_gelu"} and receipt.license == "mit"
    assert receipt.dropped.keys() == sizes.keys()
    assert receipt.dtypes == {"torch.float16 -> torch.float32": sum(value.ndim > 1 for value in theirs.values())}
    got = to_theirs(load(tmp_path / "out").model.state_dict(), clip.LAYOUTS["openai"])
    assert all(torch.equal(got[key], (v.half().float() if v.ndim > 1 else v)) for key, v in theirs.items())


# ----------------------------------------------------------------------------------------------------------- references


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
@pytest.mark.parametrize("shape", [TINY, dataclasses.replace(RESNET, activation="gelu")], ids=["vit", "resnet"])
def test_a_folder_of_open_clip_is_compared_with_it(
    shape: clip.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "parity" / "stubs"))
    quick = shape.activation == "quick_gelu"
    said = open_clip_config(shape, quick_gelu=quick)
    path = folder(tmp_path / "hub", made(shape), "open_clip", {"open_clip_config.json": said})
    receipt = convert(path, tmp_path / "out")
    assert receipt.reference.startswith("open_clip 3."), receipt.reference
    assert receipt.outputs.keys() == {"image", "text", "logits"}
    for difference, largest in receipt.outputs.values():
        assert difference < 1e-4 < 0.1 < largest
    assert receipt.difference == max(own[0] for own in receipt.outputs.values())


@pytest.mark.parity
def test_clip_of_the_hub_is_compared_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a wrong activation shows."""
    pytest.importorskip("transformers")
    path = folder(tmp_path / "hub", made(), "transformers", {"config.json": transformers_config(TINY)})
    receipt = convert(path, tmp_path / "out")
    assert receipt.reference.startswith("transformers")
    for difference, largest in receipt.outputs.values():
        assert difference < 1e-4 < 0.1 < largest
    (tmp_path / "out" / "config.json").write_text(
        (tmp_path / "out" / "config.json").read_text().replace('"quick_gelu"', '"gelu"')
    )
    reference.main("transformers", str(path), str(tmp_path / "out"), "any")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["outputs"]["image"][0] > 1e-3 and said["outputs"]["text"][0] > 1e-3


@pytest.mark.parity
def test_siglip_of_the_hub_is_compared_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = siglip.PRESETS["siglip_tiny_patch8_64"]
    model = randomize(siglip.SigLIP(shape))
    size = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**size, "vocab_size": 512, "max_position_embeddings": 32, "projection_size": 128}
    settings = transformers.SiglipConfig(text_config=text, vision_config={**size, "image_size": 64, "patch_size": 8})
    settings.architectures = ["SiglipModel"]
    path = folder(tmp_path / "hub", model, "transformers", {"config.json": settings.to_json_string(use_diff=False)})
    receipt = convert(path, tmp_path / "out")
    assert receipt.model == "siglip_tiny_patch8_64" and receipt.reference.startswith("transformers")
    for difference, largest in receipt.outputs.values():
        assert difference < 1e-3 < 0.1 < largest


@pytest.mark.parity
def test_flava_of_the_hub_is_compared_with_transformers(tmp_path: Path) -> None:
    """Both vectors, and what the joint encoder makes of pictures and texts of different lengths."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    settings = transformers.FlavaConfig(
        image_config={**size, "num_hidden_layers": 3, "image_size": 64, "patch_size": 16, "vocab_size": 512},
        text_config={**size, "num_hidden_layers": 3, "vocab_size": 512, "max_position_embeddings": 64},
        multimodal_config={**size, "num_hidden_layers": 2}, hidden_size=128, projection_dim=128,
    )  # fmt: skip
    model = randomize(transformers.FlavaModel(settings))
    model.save_pretrained(tmp_path / "hub")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s"]
    (tmp_path / "hub" / "vocab.txt").write_text("\n".join(vocab) + "\n")
    receipt = convert(tmp_path / "hub", tmp_path / "out")
    assert receipt.model == "flava_tiny_patch16_64" and receipt.license == "bsd-3-clause"
    assert receipt.tokenizer["name"] == "vocab.txt"
    assert receipt.reference.startswith("transformers"), receipt.reference
    assert receipt.outputs.keys() == {"image", "text", "logits", "joint"}
    for difference, largest in receipt.outputs.values():
        assert difference < 1e-3 < 0.1 < largest
    words = load(tmp_path / "out").tokenizer
    assert words is not None and words.ids("cats").tolist() == [5, 6]
