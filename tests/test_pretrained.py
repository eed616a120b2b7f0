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
from safetensors import SafetensorError

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
    assert list_models("beit3*_64") == ["beit3_tiny_patch16_64"]
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


def test_a_wrapped_model_is_saved_as_what_it_is_and_a_foreign_one_is_not(made, tmp_path):
    model = pretrained().model
    model.__class__ = type("FSDPBEiT3", (type(model),), {"__module__": "elsewhere"})
    save_pretrained(model, tmp_path / "model", tokenizer=made.tokenizer, preprocessor={"text_tokens": 16})
    assert load(tmp_path / "model").fingerprint == made.fingerprint
    with pytest.raises(ConfigError, match="Linear is no model of multiway.systems, which has .*beit3"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path / "other")


def test_a_full_disk_is_said_so(made, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(WriteError, match="No space left"):
        made.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_run_s_folder_stands_for_its_final_model(made, tmp_path):
    made.save_pretrained(tmp_path / "run" / "final")
    assert load(tmp_path / "run").fingerprint == made.fingerprint


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
    shape = json.loads((folder / "config.json").read_text())
    del shape["system"], shape["format"]
    model = create_model("beit3_base_patch16_224", pretrained=folder, **shape)
    assert torch.equal(model.vision.positions, made.model.vision.positions)
    with pytest.raises(CheckpointError, match="3 unexpected: language_head.weight"):
        create_model("beit3_base_patch16_224", pretrained=folder, **{**shape, "contrast": False})
    with pytest.raises(CheckpointError, match=r"language.positions \(34, 32\) instead of \(35, 32\)"):
        create_model("beit3_base_patch16_224", pretrained=folder, **{**shape, "text_positions": 35})


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"depht": 2}, "unknown setting 'depht'; did you mean 'depth'"),
        ("config.json", {"depth": "two"}, "depth"),
        ("config.json", {"depth": {"class_path": "os.system", "init_args": {"command": "true"}}}, "depth"),
        ("config.json", {"system": "os"}, "system 'os' in format 1, expected one of "),
        ("config.json", {"system": ...}, "system None"),
        ("config.json", {"format": 2}, "later version"),
        ("config.json", {"heads": 5}, "dim divisible by heads"),
        ("preprocessor_config.json", {"mean": [0.4, 0.4, 0.4]}, "preprocessor says {'mean'"),
        ("preprocessor_config.json", {"image_px": 64}, "preprocessor says {'image_px': 64}"),
        ("preprocessor_config.json", {"hide": 3}, "preprocessor says {'hide': 3}"),
        ("preprocessor_config.json", {"text_tokens": 33}, "expected 2 to 32"),
        ("preprocessor_config.json", {"interpolation": "nearest"}, "interpolation"),
        ("preprocessor_config.json", {"auto_map": "x--y.Z"}, "unknown setting 'auto_map'"),
    ],
)
def test_settings_are_a_closed_schema(folder, file, changes, message):
    edit(folder / file, **changes)
    with pytest.raises(ConfigError) as error:
        load(folder)
    assert message in str(error.value)
    assert file in str(error.value)


def test_weights_of_another_shape_are_named(folder):
    edit(folder / "config.json", depth=3, contrast=False)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert "missing: encoder.blocks.2." in str(error.value)
    assert "3 unexpected: language_head.weight (32, 32)" in str(error.value)


@pytest.mark.parametrize("cut", [0, 5, 100, 50_000])
def test_truncated_weights_are_named(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_missing_files_are_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(MissingInputError, match=file):
        load(folder)


def test_what_is_no_json_is_named(folder):
    for text in ("{", "[]", '{"depth": NaN}', '{"dim": 1, "dim": 2}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="config.json"):
            load(folder)


def test_neither_folder_nor_hub():
    with pytest.raises(MissingInputError, match="not a hub id"):
        load("./no/such/folder")
    with pytest.raises(MissingInputError, match="the hub does not give it either"):  # tests are offline
        load("nobody/nothing")


def test_a_hub_model_is_loaded_from_its_snapshot(made, folder, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load("somebody/beit3-tiny").fingerprint == made.fingerprint
    [(name, patterns)] = asked
    assert name == "somebody/beit3-tiny"
    assert "model*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in patterns)


# -------------------------------------------------------------------------------------------------------------- vectors


def test_vectors_have_length_one_and_do_not_depend_on_the_batch(made):
    images, texts = pictures(7), [*CAPTIONS[:9], "red", ""]
    for vectors in (encode(made, image=images), encode(made, text=texts)):
        assert vectors.dtype == torch.float32
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-6)
        assert len(torch.unique(vectors, dim=0)) == len(vectors)
    assert torch.allclose(encode(made, image=images, batch=2), encode(made, image=images), atol=1e-6)
    one_by_one = torch.cat([encode(made, text=text) for text in texts])
    assert torch.allclose(encode(made, text=texts, batch=4), one_by_one, atol=1e-6)


def test_a_picture_is_the_same_in_every_form(made, tmp_path):
    [path] = write_pictures(tmp_path, 1)
    opened = Image.open(path)
    tensor = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
    expected = made.encode_image(path)
    assert expected.shape == (1, 32)
    for form in (str(path), path.read_bytes(), opened, tensor, tensor[None], [path], (p for p in [path])):
        assert torch.equal(made.encode_image(form), expected)
    (tmp_path / "link.png").symlink_to(path)
    assert torch.equal(made.encode_image(tmp_path / "link.png"), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_pillow_pictures_follow_the_rules_of_files(made, mode):
    [picture] = pictures(1)
    picture = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
    assert made.encode_image(picture).shape == (1, 32)


def test_transparency_and_orientation_of_pillow_pictures(made):
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert torch.equal(made.picture(clear), torch.full((3, 32, 32), 255, dtype=torch.uint8))
    [picture] = pictures(1)
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    turned.getexif()[0x0112] = 3  # "show me upside down"
    assert torch.equal(made.picture(turned), made.picture(picture))


def test_cut_texts_and_whole_ones(made):
    long = " ".join(CAPTIONS[:5])
    assert torch.equal(made.encode_text(long), made.encode_text(long + " and more"))


def test_a_bare_model_encodes_pictures_but_no_text(made):
    images = pictures(2)
    assert torch.equal(encode(made.model, image=images), made.encode_image(images))
    with pytest.raises(ConfigError, match="tokenizer"):
        encode(made.model, text="red")


def test_bf16_is_near(made, folder):
    half = load(folder, precision="bf16")
    assert half.fingerprint == made.fingerprint
    for one, other in (
        (made.encode_text(CAPTIONS), half.encode_text(CAPTIONS)),
        (made.encode_image(pictures(4)), half.encode_image(pictures(4))),
    ):
        assert not torch.equal(one, other)
        assert (one * other).sum(1).min() > 0.999


def test_vectors_can_be_trained_on(made):
    probe = torch.nn.Linear(32, 2)
    probe(made.encode_image(pictures(2))).sum().backward()
    assert probe.weight.grad is not None


@pytest.mark.parametrize(
    "wrong", [{}, {"image": [], "text": []}, {"image": []}, {"text": []}, {"image": torch.zeros(3, 8, 8)}]
)
def test_what_cannot_be_encoded_is_refused(made, wrong):
    with pytest.raises(ConfigError):
        encode(made, **wrong)


def test_bad_pictures_are_named(made, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(RecordError, match=r"bad\.png: not a picture") as error:
        made.encode_image([pictures(1)[0], tmp_path / "bad.png"])
    assert error.value.reason == "unreadable"
    with pytest.raises(MissingInputError, match=r"none\.png"):
        made.encode_image(tmp_path / "none.png")


def test_without_retrieval_heads_there_are_no_vectors():
    with pytest.raises(ConfigError, match="_itc"):
        pretrained(contrast=False).encode_text("red")
