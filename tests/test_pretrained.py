"""Models by name and as folders: identity after save and load, refusals, and vectors that do not depend on batching."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import multiway
from multiway.errors import CheckpointError, ConfigError, MissingInputError, RecordError, WriteError
from multiway.pretrained import Pretrained, create_model, encode, list_models, load, save_pretrained
from multiway.weights import io
from tests.tiny import CAPTIONS, pictures, pretrained, write_pictures

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made() -> Pretrained:
    return pretrained()


@pytest.fixture
def folder(made, tmp_path) -> Path:
    made.save_pretrained(tmp_path / "model", card={"figures": {"retrieval": {"r1": 0.125}}, "tags": ["retrieval"]})
    return tmp_path / "model"


def edit(path: Path, **changes: object) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


# ---------------------------------------------------------------------------------------------------------- the package


def test_importing_is_lazy_and_names_resolve():
    code = "import multiway, sys; assert 'torch' not in sys.modules; multiway.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert multiway.load is load
    assert set(multiway.__all__) <= set(dir(multiway))
    with pytest.raises(AttributeError, match="list_models"):
        multiway.lode  # noqa: B018


def test_the_version_is_the_project_s():
    assert multiway.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


# ---------------------------------------------------------------------------------------------------------------- names


def test_models_are_listed_and_made():
    names = list_models("beit3*")
    assert "beit3_base_patch16_224" in names
    assert names == sorted(names)
    assert list_models("*_64") == ["beit3_tiny_patch16_64"]
    assert list_models("nothing*") == []
    with torch.device("meta"):
        model = create_model("beit3_base_patch16_224", contrast=True)
    assert model.config.dim == 768
    assert model.config.contrast


def test_a_made_model_is_initialised_from_the_global_generator():
    one, two, other = (pretrained(seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["vision.positions"], other["vision.positions"])


def test_the_nearest_name_is_offered():
    with pytest.raises(ConfigError, match="did you mean 'beit3_base_patch16_224'"):
        create_model("beit3_base_patch16")
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        create_model("beit3_tiny_patch16_64", dept=2)
    with pytest.raises(ConfigError, match="int"):
        create_model("beit3_tiny_patch16_64", depth=2.5)


# -------------------------------------------------------------------------------------------------------- save and load


def test_save_then_load_is_the_identity(made, folder):
    again = load(folder)
    assert again.preprocessor == made.preprocessor
    assert again.fingerprint == made.fingerprint
    assert again.name == str(folder)
    assert not again.model.training
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    images, texts = pictures(5), CAPTIONS[:7]
    assert torch.equal(made.encode_image(images), again.encode_image(images))
    assert torch.equal(made.encode_text(texts), again.encode_text(texts))
    assert all(parameter.requires_grad for parameter in again.model.parameters())


def test_the_folder_is_what_the_hub_expects(made, folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    ]
    values = json.loads((folder / "config.json").read_text())
    assert (values["system"], values["format"], values["dim"]) == ("beit3", 1, 32)
    header, body = (folder / "README.md").read_text().split("---\n")[1:]
    assert yaml.safe_load(header) == {
        "license": "other",
        "library_name": "multiway",
        "tags": ["multiway", "beit3", "retrieval"],
    }
    assert "| retrieval r1 | 0.125 |" in body
    seen = json.loads((folder / "preprocessor_config.json").read_text())
    assert (seen["image_px"], seen["mean"], seen["text_tokens"]) == (32, [0.5] * 3, 16)
    assert (seen["bos"], seen["eos"], seen["hide"]) == (0, 2, made.tokenizer.vocab - 1)


def test_large_weights_are_split_and_read_back(made, folder, monkeypatch):
    monkeypatch.setattr(io, "SHARD_BYTES", 60_000)
    made.save_pretrained(folder)
    parts = sorted(p.name for p in folder.glob("model*.safetensors"))
    assert len(parts) > 3
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in made.model.state_dict().values())
    assert load(folder).fingerprint == made.fingerprint

    (folder / parts[1]).unlink()
    with pytest.raises(MissingInputError, match=parts[1]):
        load(folder)
    edit(folder / "model.safetensors.index.json", weight_map={"vision.positions": "../model.safetensors"})
    with pytest.raises(CheckpointError, match="names files other than"):
        load(folder)

    monkeypatch.undo()
    made.save_pretrained(folder)
    assert [p.name for p in folder.glob("model*")] == ["model.safetensors"]
    assert load(folder).fingerprint == made.fingerprint


def test_other_weights_can_be_saved_and_other_files_stay(made, folder):
    (folder / "model-notes.txt").write_text("mine")
    averaged = {name: tensor * 0.5 for name, tensor in made.model.state_dict().items()}
    save_pretrained(made.model, folder, tokenizer=made.tokenizer, weights=averaged)
    again = load(folder)
    assert torch.equal(again.model.vision.positions, made.model.vision.positions * 0.5)
    assert again.fingerprint != made.fingerprint
    assert (folder / "model-notes.txt").exists()


def test_a_model_that_is_not_what_its_config_says_is_not_saved(tmp_path):
    model = pretrained().model
    del model.vision_head
    with pytest.raises(ConfigError, match="vision_head.weight"):
        save_pretrained(model, tmp_path / "model")
    with pytest.raises(ConfigError, match="licence, expected only title"):
        save_pretrained(pretrained().model, tmp_path / "model", card={"licence": "mit"})
    assert not (tmp_path / "model").exists()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot write"):
        save_pretrained(pretrained().model, tmp_path / "file")


def test_create_model_takes_weights_that_fit(made, folder):
    shape = {key: value for key, value in json.loads((folder / "config.json").read_text()).items()}
    del shape["system"], shape["format"]
    model = create_model("beit3_base_patch16_224", pretrained=folder, **shape)
    assert torch.equal(model.vision.positions, made.model.vision.positions)
    with pytest.raises(CheckpointError, match="2 unexpected: "):
        create_model("beit3_base_patch16_224", pretrained=folder, **{**shape, "vision_only": False} | {"contrast": False}) \
            if "vision_only" in shape else create_model(
                "beit3_base_patch16_224", pretrained=folder, **{**shape, "contrast": False})
