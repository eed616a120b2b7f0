"""Zero-shot classification and re-ranked retrieval as people call them: folders, files of names, two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from multiway import evaluation
from multiway.cli import main
from multiway.errors import ConfigError, DataError
from multiway.evaluation import evaluate_model
from multiway.systems import clip
from multiway.systems.beit3 import BEiT3
from multiway.tasks.zero_shot import classifier
from tests.tiny import COLOURS, pictures, pretrained


@pytest.fixture
def model(tmp_path: Path) -> str:
    pretrained().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Fifteen pictures in folders c0, c1, c2."""
    for i, picture in enumerate(pictures(15)):
        (tmp_path / "classes" / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "classes" / f"c{i % 3}" / f"{i:02d}.png")
    return tmp_path / "classes"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twelve pictures with two captions each."""
    (tmp_path / "pairs").mkdir()
    rows = []
    for i, picture in enumerate(pictures(12)):
        picture.save(tmp_path / "pairs" / f"{i}.png")
        captions = [
            f"a {COLOURS[i % 5]} {COLOURS[i // 5]} square",
            f"{COLOURS[i // 5]} above a {COLOURS[i % 5]} circle",
        ]
        rows.append(json.dumps({"image": f"{i}.png", "captions": captions}))
    (tmp_path / "pairs" / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "pairs"


# ----------------------------------------------------------------------------------------------------------- zero-shot


def test_zero_shot_takes_names_and_prompts_from_files(model: str, classes: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"c0": "red", "c1": "green", "c2": "blue"}))
    (tmp_path / "prompts.txt").write_text("a {} square\na {} circle\n")
    command = f"evaluate {model} --task zero_shot --data {classes} --classes {tmp_path / 'names.json'} --prompt {{}}"
    main([*command.split(), "--prompts", str(tmp_path / "prompts.txt")])
    found = json.loads(capsys.readouterr().out)
    made, prompts = pretrained(), ["{}", "a {} square", "a {} circle"]
    assert list(found["prompts"]) == prompts and found["classes"] == 3
    images, truth = sorted(classes.rglob("*.png")), torch.arange(3).repeat_interleave(5)
    for name, own in {"accuracy": prompts, **{prompt: [prompt] for prompt in prompts}}.items():
        texts = [[prompt.replace("{}", colour) for prompt in own] for colour in COLOURS[:3]]
        best = (made.encode_image(images) @ classifier(made.encode_text, texts).T).argmax(1)
        got = found["accuracy"] if name == "accuracy" else found["prompts"][name]
        assert got == pytest.approx(float((best == truth).float().mean()))


def test_pictures_are_seen_as_the_model_wants_them(pairs: Path, tmp_path: Path) -> None:
    """The centre is taken once."""
    made = pretrained(share=0.5)
    with evaluation.indexed(made, str(pairs), None) as index:
        got = evaluation.vectors(made, [(source, i) for source in index.sources for i in range(len(source))])
    assert torch.allclose(got, made.encode_image([pairs / f"{i}.png" for i in range(12)]), atol=1e-5)


def test_classify_names_pictures(model: str, classes: Path, capsys) -> None:
    image = classes / "c0" / "00.png"
    main(["classify", model, str(image), "--classes", "red, green ,blue", "--prompts", "symbols", "-k", "2"])
    printed = capsys.readouterr().out
    names, found = evaluation.classify(pretrained(), [image], ["red", "green", "blue"], ["a {}"])
    assert names == ["red", "green", "blue"] and found.shape == (1, 3) and float(found.sum()) == pytest.approx(1)
    assert sum(name in printed for name in names) == 2 and printed.count("%") == 2


def test_classify_reads_a_models_own_classes(classes: Path) -> None:
    made = pretrained(classes=4)
    names, found = evaluation.classify(made, [classes / "c0" / "00.png"])
    assert names == ["0", "1", "2", "3"] and torch.equal(found, made.classify(classes / "c0" / "00.png"))
    with pytest.raises(ConfigError, match="say which classes there are"):
        evaluation.classify(pretrained(), [classes / "c0" / "00.png"])


@pytest.mark.parametrize(
    ("task", "options", "error"),
    [
        ("zero_shot", {"prompts": ["a {}"]}, "belong to zero_shot, of pictures that --data names"),
        ("retrieval", {"classes": "names.txt", "data": "."}, "belong to zero_shot"),
        ("captioning", {"rerank": "model"}, "the task is captioning"),
    ],
)
def test_settings_of_other_tasks_are_refused(model: str, task: str, options: dict, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        evaluate_model(model, task, **options)


# ---------------------------------------------------------------------------------------------------------- re-ranking


def cosine(self, plan, *, image, text):
    """What the dual encoder says of every pair, from the batch of pairs."""
    ids = text.split([int(n) for n in torch.diff(torch.cat([plan.starts["text"], torch.tensor([plan.rows])]))])
    pictures, texts = self.embed(self.encode(image=image), "image"), self.embed(self.encode(text=ids), "text")
    return (pictures * texts).sum(1)


def judging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BEiT3, "match", cosine, raising=False)
    monkeypatch.setattr(BEiT3, "match_head", None, raising=False)


def test_a_judge_that_says_the_same_changes_nothing(model: str, pairs: Path, monkeypatch, capsys) -> None:
    judging(monkeypatch)
    monkeypatch.setattr(evaluation, "BATCH", 7)
    for top in ("5", "100"):
        main(["evaluate", model, "--task", "retrieval", "--data", str(pairs), "--rerank", "--top", top])
        found = json.loads(capsys.readouterr().out)
        for way in ("image_to_text", "text_to_image"):
            assert found["reranked"][way] == pytest.approx(found[way])
            assert 0 < found[way]["r5"] < 1
    assert found["reranked"]["pairs"] == 12 * 24


def test_another_model_judges_with_its_own_pictures_and_words(model: str, pairs: Path, tmp_path: Path, monkeypatch):
    other = pretrained(seed=1, image_px=48)
    other.save_pretrained(tmp_path / "other")
    judging(monkeypatch)
    found = evaluate_model(model, "retrieval", str(pairs), rerank=str(tmp_path / "other"), top=100)
    alone = evaluate_model(str(tmp_path / "other"), "retrieval", str(pairs))
    for way in ("image_to_text", "text_to_image"):
        assert found["reranked"][way] == pytest.approx(alone[way])
    assert found["image_to_text"] == evaluate_model(model, "retrieval", str(pairs))["image_to_text"]


def test_scenes_are_re_ranked_too(model: str, monkeypatch) -> None:
    judging(monkeypatch)
    monkeypatch.setattr(evaluation, "HELD_OUT", 20)
    found = evaluate_model(model, "retrieval", rerank=model, top=3)
    assert found["reranked"]["top"] == 3 and found["reranked"]["pairs"] <= 120


def test_models_that_cannot_judge_are_refused_before_anything_is_embedded(model: str, pairs: Path, tmp_path: Path):
    shape = clip.PRESETS["clip_vit_tiny_patch8_64"]
    apart = clip.CLIP(shape)
    apart.init_weights()
    evaluation.pretrained.save_pretrained(apart, tmp_path / "clip")
    with pytest.raises(ConfigError, match="re-ranking needs a model that encodes image with text; CLIP"):
        evaluate_model(model, "retrieval", str(pairs), rerank=str(tmp_path / "clip"))
    with pytest.raises(ConfigError, match="such as a VLMo or FLAVA has; this BEiT3"):
        evaluate_model(model, "retrieval", str(pairs), rerank=model)


def test_what_is_bad_stays_listed(tmp_path: Path) -> None:
    """The file that the error names is there, though the index was made aside."""
    pretrained().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.jsonl").write_text('{"image": "none.png", "text": "a red square"}\n')
    with pytest.raises(DataError, match="All are listed in") as error:
        evaluation.evaluate_model(str(tmp_path / "model"), "retrieval", str(tmp_path / "data"))
    listed = Path(str(error.value).partition("All are listed in ")[2].partition(":")[0])
    assert "none.png" in (listed / "quarantine.jsonl").read_text()
    shutil.rmtree(listed.parent)
