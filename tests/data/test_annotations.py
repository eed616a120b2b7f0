"""Examples of tasks are read as official files and users' tables say, and nothing bad among them is trained on."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multiway.data.annotations import ANSWERS, FIRST, FLICKR, KEYS, SECOND, TASKS, discover
from multiway.data.image import decode
from multiway.data.index import Index, build, check, describe, overlap
from multiway.data.prepare import open_corpus
from multiway.data.records import Example, Fault
from multiway.errors import ConfigError, DataError, MissingInputError
from multiway.run import Data
from tests.data.raw import png, write

SHARED = Path(__file__).parents[2] / "../shared/data"
QUIET = {"progress": False, "vocab": 128}
V2 = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"


def jsonl(*rows: object) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def tsv(*rows: str) -> str:
    """Lines in which ``|`` is a tab."""
    return "\n".join(rows).replace("|", "\t") + "\n"


def read(root: Path, task: str, split: str | None = None) -> list[tuple[str, list[str], tuple, tuple]]:
    """Key, pictures, texts and answers of everything that is found, which must be good."""
    items = [item for source in discover(root, task, split) for item in source]
    assert all(isinstance(item, Example) for item in items), items
    return [(x.where.key, [s.file for s in x.images], x.texts, x.answers) for x in items]


def faults(root: Path, task: str, split: str | None = None) -> list[tuple[str, str]]:
    """Key and reason of every fault of a whole pass; the counts add up."""
    report = check(root, task=task, split=split, progress=False)
    assert report.seen == sum(report.indexed.values()) + report.quarantined
    return [(fault.where.key, fault.reason) for fault in report.faults]


# ---------------------------------------------------------------------------------------------------------------- VQA


def question(number: int, image: int, text: str = "what is it ?") -> dict:
    return {"question_id": number, "image_id": image, "question": text}


def annotation(number: int, image: int, *answers: str) -> dict:
    people = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)]
    own = {"question_id": number, "image_id": image, "answers": people, "multiple_choice_answer": answers[0]}
    return own | {"answer_type": "other", "question_type": "what is"}


def vqa(split: str, questions: list, annotations: list | None = None) -> dict[str, str]:
    """The official files of a split."""
    files = {V2[0].format(split): json.dumps({"questions": questions, "info": {"version": "2.0"}})}
    return files if annotations is None else files | {V2[1].format(split): json.dumps({"annotations": annotations})}


def test_vqa_v2_as_published(tmp_path):
    ten = ["cat"] * 6 + ["Cat.", "a cat", "dog", "kitten"]
    files = vqa("train2014", [question(9000, 9), question(9001, 9, "where ?")],
                [annotation(9001, 9, "here", "there"), annotation(9000, 9, *ten)])  # fmt: skip
    files |= vqa("val2014", [question(42, 4)], [annotation(42, 4, "yes")])
    files |= vqa("test2015", [question(7, 1)]) | vqa("test-dev2015", [question(8, 1)])
    root = write(tmp_path / "vqa", files | {"train2014/COCO_train2014_000000000009.jpg": png(0)})
    for folder in ("val2014", "test2015"):
        (root / folder).mkdir()
    picture = "train2014/COCO_train2014_000000000009.jpg"
    assert read(root, "vqa", "train") == [
        ("9000", [picture], ("what is it ?",), tuple(ten)),
        ("9001", [picture], ("where ?",), ("here", "there")),
    ]
    assert read(root, "vqa", "train2014") == read(root, "vqa", "train")
    assert [row[0] for row in read(root, "vqa", "val")] == [row[0] for row in read(root, "vqa", "dev")] == ["42"]
    assert read(root, "vqa", "test") == [("7", ["test2015/COCO_test2015_000000000001.jpg"], ("what is it ?",), ())]
    assert read(root, "vqa", "test-dev2015")[0][:2] == ("8", ["test2015/COCO_test2015_000000000001.jpg"])
    assert read(root / V2[0].format("train2014"), "vqa") == read(root, "vqa", "train")
    with pytest.raises(ConfigError, match="has the splits test, test-dev, train, val: choose one"):
        discover(root, "vqa")
    assert faults(root, "vqa", "val2014") == [("42", "missing")]


def test_vqa_lists_what_does_not_fit_together(tmp_path):
    questions = [question(1, 9), question(1, 9), question(2, 9), question(3, 9), {"question_id": "x", "image_id": 9}]
    questions += [question(4, 9), {"question_id": 5, "image_id": 9}, {"question_id": True, "image_id": 9}]
    annotations = [annotation(1, 9, "a"), annotation(3, 8, "a"), annotation(4, 9, "a"), annotation(4, 9, "b")]
    annotations += [annotation(5, 9, "a"), annotation(6, 9, "a"), annotation(1, 9, "a") | {"question_id": [1]}]
    root = write(tmp_path, vqa("train2014", questions, annotations) | {"COCO_train2014_000000000009.jpg": png()})
    assert faults(root, "vqa", "train") == [
        ("4", "duplicate"), ("1", "duplicate"), ("2", "unlabelled"), ("3", "schema"), ("x", "type"),
        ("5", "type"), ("True", "type"), ("6", "schema"), ("[1]", "schema"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="9 of 11 records"):
        build(root, tmp_path / "out", task="vqa", split="train", **QUIET)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:-3], "json"),
        (lambda text: text.replace('"image_id": 9', '"image_id": 9, "image_id": 8', 1), "duplicate_field"),
        (lambda text: text.replace('"question_id": 1', '"question_id": NaN', 1), "not_finite"),
        (lambda text: "[1, 2]", "type"),
        (lambda text: json.dumps({"annotations": ["a"], "questions": ["a"]}), "schema"),
        (lambda text: "{}", "schema"),
        (lambda text: "[" * 100_000, "json"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_vqa_files_that_are_damaged_are_faults_themselves(tmp_path, damage, reason, which):
    root = write(tmp_path, vqa("val2014", [question(1, 9)], [annotation(1, 9, "a")]) | {"val2014/x": b""})
    path = root / V2[which].format("val2014")
    path.write_text(damage(path.read_text()))
    assert faults(root, "vqa") == [(V2[0].format("val2014"), reason)]


def test_a_vqa_file_may_not_be_larger_than_the_limit(tmp_path, monkeypatch):
    root = write(tmp_path, vqa("val2014", [question(1, 9)]))
    monkeypatch.setattr("multiway.data.annotations.MAX_JSON", 20)
    assert faults(root, "vqa") == [(V2[0].format("val2014"), "bytes")]


# -------------------------------------------------------------------------------------------------------------- NLVR


def test_nlvr2_as_published(tmp_path):
    train = {"identifier": "train-10171-0-1", "sentence": "two dogs", "label": "True", "directory": "32"}
    root = write(tmp_path, {
        "data/train.json": jsonl(train | {"left_url": "http://a"}, train | {"identifier": "train-10171-0-0"}),
        "data/dev.json": jsonl({"identifier": "dev-850-2-0", "sentence": "no dog", "label": "False", "validation": {}}),
        "data/test1.json": jsonl({"identifier": "test1-0-1-0", "sentence": "a dog", "label": "False"}),
        "images/train/32/train-10171-0-img0.png": png(0), "images/train/32/train-10171-0-img1.png": png(1),
        "test1/x": b"", "dev/dev-850-2-img0.png": png(2), "dev/dev-850-2-img1.png": png(3),
    })  # fmt: skip
    pictures = [f"images/train/32/train-10171-0-img{i}.png" for i in range(2)]
    assert read(root, "nlvr2", "train") == [
        ("train-10171-0-1", pictures, ("two dogs",), ("True",)),
        ("train-10171-0-0", pictures, ("two dogs",), ("True",)),
    ]
    pictures = [f"dev/dev-850-2-img{i}.png" for i in range(2)]
    assert read(root, "nlvr2", "val") == [("dev-850-2-0", pictures, ("no dog",), ("False",))]
    assert read(root, "nlvr2", "test") == read(root, "nlvr2", "test1")
    assert read(root, "nlvr2", "test1")[0][1] == ["test1/test1-0-1-img0.png", "test1/test1-0-1-img1.png"]
    assert faults(root, "nlvr2", "train") == faults(root, "nlvr2", "dev") == []


def test_nlvr_as_published_and_with_lists_of_pictures(tmp_path):
    row = {"identifier": "1304-0", "sentence": "a box", "label": "true", "directory": "17", "evals": {"r0": "true"}}
    names = [f"dev-1304-0-{k}.png" for k in range(6)]
    official = {f"dev/images/17/{name}": png(k) for k, name in enumerate(names)}
    root = write(tmp_path / "a", official | {"dev/dev.json": jsonl(row)})
    expected = [(name, [f"images/17/{name}"], ("a box",), ("True",)) for name in names]
    assert read(root, "nlvr2", "dev") == read(root, "nlvr2") == read(root / "dev/dev.json", "nlvr2") == expected
    assert faults(root, "nlvr2", "dev") == []
    ours = {"identifier": "1304-0", "sentence": "a box", "label": "false", "images": [f"dev/{name}" for name in names]}
    root = write(tmp_path / "b", {"dev.jsonl": jsonl(ours)} | {f"dev/{name}": png(k) for k, name in enumerate(names)})
    assert read(root, "nlvr2", "val") == [(name, [f"dev/{name}"], ("a box",), ("False",)) for name in names]


def test_truth_has_two_names_however_it_is_written(tmp_path):
    labels = [True, "FALSE", "true", "False", 1, "yes", "", None]
    rows = [{"id": str(i), "image": "a.png", "sentence": "x", "label": label} for i, label in enumerate(labels)]
    root = write(tmp_path, {"set.jsonl": jsonl(*rows), "a.png": png()})
    items = list(discover(root, "nlvr2")[0])
    assert [x.answers[0] for x in items if isinstance(x, Example)] == ["True", "False", "True", "False"]
    found = [(x.where.key, x.reason) for x in items if isinstance(x, Fault)]
    assert found == [("4", "label"), ("5", "label"), ("6", "label"), ("7", "unlabelled")]


@pytest.mark.parametrize("identifier", ["train-1-2", "../../1-2-3-4", "1304", "x"])
def test_an_official_name_must_have_its_form(tmp_path, identifier):
    root = write(tmp_path, {"train.json": jsonl({"identifier": identifier, "sentence": "x", "label": "True"})})
    assert faults(root, "nlvr2") == [(identifier, "key")]


# -------------------------------------------------------------------------------------------------------- entailment


def test_snli_ve_as_published(tmp_path):
    def row(pair: str, label: str, **more: str) -> dict:
        own = {"sentence1": "what the picture shows", "sentence2": f"hypothesis {pair}", "gold_label": label}
        return own | {"pairID": pair, "captionID": "1.jpg#0", "annotator_labels": [label]} | more

    rows = [row("1.jpg#0r1n", "neutral", Flickr30K_ID="1"), row("2.jpg#0r1e", "entailment", Flikr30kID="2.jpg")]
    rows += [row("1.jpg#0r1c", "-", Flickr30K_ID="1"), row("9.jpg#0r1c", "contradiction", Flickr30K_ID="9")]
    files = {"snli_ve_dev.jsonl": jsonl(*rows), "snli_ve_train.jsonl": jsonl(rows[0])}
    root = write(tmp_path, files | {f"flickr30k_images/{i}.jpg": png(i) for i in (1, 2)})
    [source] = discover(root, "entailment", "dev")
    good = [x for x in source if isinstance(x, Example)]
    assert [(x.where.key, x.images[0].file, x.texts, x.answers) for x in good[:2]] == [
        ("1.jpg#0r1n", "flickr30k_images/1.jpg", ("hypothesis 1.jpg#0r1n",), ("neutral",)),
        ("2.jpg#0r1e", "flickr30k_images/2.jpg", ("hypothesis 2.jpg#0r1e",), ("entailment",)),
    ]
    assert faults(root, "entailment", "dev") == [("1.jpg#0r1c", "no_gold"), ("9.jpg#0r1c", "missing")]


def test_what_people_did_not_agree_on_is_listed_and_not_bad(tmp_path):
    rows = [{"image": "a.png", "hypothesis": f"h {i}", "gold_label": "-" if i % 2 else "neutral"} for i in range(6)]
    root = write(tmp_path / "raw", {"train.jsonl": jsonl(*rows), "a.png": png()})
    made = build(root, tmp_path / "out", task="entailment", max_bad_fraction=0.0, **QUIET)
    assert made.manifest["report"]["reasons"] == {"no_gold": 3} and made.labels == ("neutral",)
    keys = [json.loads(line)["key"] for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert keys == ["train.jsonl:2", "train.jsonl:4", "train.jsonl:6"]


# ------------------------------------------------------------------------------------------------ text classification

MNLI = "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
GLUE = {
    "CoLA": ("gj04|1||It is \"fine.", "gj04|0|*|Fine it."),
    "SST-2": ("sentence|label", "a fine film|1", "dull|0"),
    "MRPC": ("Quality|#1 ID|#2 ID|#1 String|#2 String", "1|702|703|He said \"no.|No, he said.", "0|1|2|a|b"),
    "QQP": ("id|qid1|qid2|question1|question2|is_duplicate", "7|1|2|why ?|how ?|0"),
    "STS-B": ("index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
              "0|main|f|2012|1|none|none|a plane|an airplane|5.000"),
    "MNLI": (f"{MNLI}|sentence1|sentence2|label1|gold_label",
             "0|31193|31193n|gov|( a )|( b )|(A)|(B)|a|b|neutral|neutral"),
    "QNLI": ("index|question|sentence|label", "0|When ?|In May.|entailment"),
    "RTE": ("index|sentence1|sentence2|label", "0|No weapons.|Weapons.|not_entailment"),
    "WNLI": ("index|sentence1|sentence2|label", "0|He hit it.|It hit.|1"),
}  # fmt: skip
EXPECTED = {
    "CoLA": [("train.tsv:1", ('It is "fine.',), "1"), ("train.tsv:2", ("Fine it.",), "0")],
    "SST-2": [("train.tsv:2", ("a fine film",), "1"), ("train.tsv:3", ("dull",), "0")],
    "MRPC": [("train.tsv:2", ('He said "no.', "No, he said."), "1"), ("train.tsv:3", ("a", "b"), "0")],
    "QQP": [("7", ("why ?", "how ?"), "0")],
    "STS-B": [("0", ("a plane", "an airplane"), "5.000")],
    "MNLI": [("0", ("a", "b"), "neutral")],
    "QNLI": [("0", ("When ?", "In May."), "entailment")],
    "RTE": [("0", ("No weapons.", "Weapons."), "not_entailment")],
    "WNLI": [("0", ("He hit it.", "It hit."), "1")],
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_as_published(tmp_path, name):
    root = write(tmp_path, {"train.tsv": "\ufeff" + tsv(*GLUE[name]), "readme.txt": "not a table"})
    assert read(root, "text_classification", "train") == [(k, [], texts, (a,)) for k, texts, a in EXPECTED[name]]
    assert faults(root, "text_classification") == []


@pytest.mark.parametrize(
    ("header", "texts"),
    [("index|sentence", 1), ("index|#1 ID|#2 ID|#1 String|#2 String", 2), ("id|question1|question2", 2),
     (f"{MNLI}|sentence1|sentence2", 2), ("index|question|sentence", 2)],
)  # fmt: skip
def test_glue_test_files_have_no_answers(tmp_path, header, texts):
    width = header.count("|")
    rows = ["|".join([str(i), *[f"cell {c}" for c in range(width)]]) for i in range(3)]
    root = write(tmp_path, {"test_matched.tsv": tsv(header, *rows)})
    found = read(root, "text_classification", "test")
    assert [(key, len(own), answers) for key, _, own, answers in found] == [(str(i), texts, ()) for i in range(3)]


def test_splits_of_glue(tmp_path):
    one = tsv("sentence|label", "a|1")
    names = ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv", "test_matched.tsv")
    root = write(tmp_path / "mnli", dict.fromkeys(names, one))
    for split, files in [("dev", names[1:3]), ("val", names[1:3]), ("dev_mismatched", names[2:3]), ("test", names[3:])]:
        assert tuple(s.files[0] for s in discover(root, "text_classification", split)) == files
    with pytest.raises(MissingInputError, match=r"no split 'blind' of text_classification, only dev, test, train"):
        discover(root, "text_classification", "blind")
    paraphrases = tsv(*GLUE["MRPC"])
    root = write(tmp_path / "mrpc", {"msr_paraphrase_train.txt": "\ufeff" + paraphrases, "msr_paraphrase_test.txt": ""})
    assert [row[2:] for row in read(root, "text_classification", "train")] == [
        (texts, (answer,)) for _, texts, answer in EXPECTED["MRPC"]
    ]
    write(root, {"train.tsv": paraphrases})
    assert [s.files for s in discover(root, "text_classification", "train")] == [("train.tsv",)]
    root = write(tmp_path / "cola", {"in_domain_train.tsv": tsv(*GLUE["CoLA"]), "in_domain_dev.tsv": one})
    assert len(read(root, "text_classification", "train")) == 2


def test_a_table_without_a_header_that_says_what_it_holds_is_refused(tmp_path):
    for rows in (("review|sentiment", "fine|1"), ("fine|good",), ("a|1|b",), ()):
        root = write(tmp_path, {"set.tsv": tsv(*rows)})
        with pytest.raises(DataError, match=r"set.tsv: the first line must name the columns"):
            check(root, task="text_classification", progress=False)


def test_bad_rows_of_sentences_are_listed(tmp_path):
    rows = ["sentence1|sentence2|score", "a|b|1.5", "a||2", "a|b", "a|b|", "a|b|nan", "a|b|much", "a|b|-3", "|\x07|1"]
    root = write(tmp_path, {"set.tsv": tsv(*rows).encode() + b"a\t\xff\t1\n"})
    assert faults(root, "text_classification") == [
        ("set.tsv:3", "counts"), ("set.tsv:4", "fields"), ("set.tsv:5", "unlabelled"), ("set.tsv:6", "label"),
        ("set.tsv:7", "label"), ("set.tsv:9", "counts"), ("set.tsv:10", "utf8"),
    ]  # fmt: skip
    root = write(tmp_path, {"set.tsv": tsv("text|text2|label", "a|b|1", "a|\x07|1")})
    assert faults(root, "text_classification") == [("set.tsv:3", "empty_text")]  # never one text for another


# ------------------------------------------------------------------------------------------------------ users' tables


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("vqa", {"id": "q", "image": "a.png", "question": "?", "answers": ["a", "b"]}, ("q", 1, ("?",), ("a", "b"))),
        ("vqa", {"id": 3, "images": ["a.png"], "text": "?", "answer": 2}, ("3", 1, ("?",), ("2",))),
        ("nlvr2", {"image": "a.png", "image2": "b.png", "sentence": "s", "label": False}, ("", 2, ("s",), ("False",))),
        ("nlvr2", {"images": ["a.png", "b.png"], "text": "s"}, ("", 2, ("s",), ())),
        ("nlvr2", {"identifier": "x y", "image": "a.png", "text": "s"}, ("x y", 1, ("s",), ())),
        ("entailment", {"image": "a.png", "hypothesis": "h", "label": "no-match"}, ("", 1, ("h",), ("no-match",))),
        ("text_classification", {"premise": "p", "hypothesis": "h", "label": 0}, ("", 0, ("p", "h"), ("0",))),
        ("text_classification", {"text2": "h", "text": "p", "score": 1.25}, ("", 0, ("p", "h"), ("1.25",))),
        ("text_classification", {"sentence": "p", "image": "none.png"}, ("", 0, ("p",), ())),
    ],
)
def test_users_fields(tmp_path, task, row, expected):
    root = write(tmp_path, {"set.jsonl": jsonl(row), "a.png": png(0), "b.png": png(1)})
    [(key, images, texts, answers)] = read(root, task)
    assert (key, len(images), texts, answers) == (expected[0] or "set.jsonl:1", *expected[1:])
    assert faults(root, task) == []


def test_users_csv_and_tsv(tmp_path):
    files = {"set.csv": 'id,image,question,answer\n1,pictures/a.png,"how, ""exactly""?",so\n2,pictures/a.png,why?,\n'}
    root = write(tmp_path / "csv", files | {"pictures/a.png": png()})
    [source] = discover(root / "set.csv", "vqa")
    first, second = source
    assert (first.texts, first.answers, first.images[0].file) == (('how, "exactly"?',), ("so",), "pictures/a.png")
    assert isinstance(second, Fault) and (second.where.key, second.reason) == ("2", "unlabelled")
    root = write(tmp_path / "tsv", {"train.tsv": tsv("image|hypothesis|label", 'a.png|a "b|x'), "a.png": png()})
    assert read(root, "entailment") == [("train.tsv:2", ["a.png"], ('a "b',), ("x",))]


GOOD = {"image": "a.png", "text": "x", "label": "y"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "json"),
        ("[]", "type"),
        ('{"image": "a.png", "image": "b.png", "text": "x", "label": "y"}', "duplicate_field"),
        (GOOD | {"image": "../a.png"}, "path"),
        (GOOD | {"image": "/etc/passwd"}, "path"),
        (GOOD | {"image": "link/a.png"}, "path"),
        (GOOD | {"image": "\ud800.png"}, "path"),
        (GOOD | {"image": "none.png"}, "missing"),
        (GOOD | {"image": "broken.png"}, "unreadable"),
        (GOOD | {"image": ""}, "path"),
        (GOOD | {"image": 1}, "type"),
        (GOOD | {"images": "a.png"}, "type"),
        (GOOD | {"image2": "a.png"}, "schema"),
        (GOOD | {"text2": "more"}, "schema"),
        (GOOD | {"text": None}, "schema"),
        (GOOD | {"text": ["x"]}, "type"),
        (GOOD | {"text": " \u200b"}, "empty_text"),
        (GOOD | {"answer": "y"}, "schema"),
        (GOOD | {"label": {"a": 1}}, "type"),
        (GOOD | {"label": True}, "type"),
        (GOOD | {"label": "\udfff"}, "utf8"),
        ({"image": "a.png", "text": "x", "answers": ["y", "z"]}, "label"),
        ({"image": "a.png", "text": "x", "answers": []}, "unlabelled"),
        (GOOD | {"id": "a\tb"}, "key"),
        (GOOD | {"id": "\ud800"}, "key"),
        (GOOD | {"id": "x" * 501}, "key"),
        (GOOD | {"id": ["x"]}, "type"),
        (GOOD | {"id": "first"}, "duplicate"),
    ],
)
def test_bad_rows_of_users_are_listed(tmp_path, row, reason):
    outside = write(tmp_path / "outside", {"a.png": png()})
    rows = jsonl(GOOD | {"id": "first"}, row, GOOD | {"id": "last"})
    root = write(tmp_path / "raw", {"set.jsonl": rows, "a.png": png(), "broken.png": b"no picture"})
    (root / "link").symlink_to(outside)
    report = check(root, task="entailment", progress=False)
    [fault] = report.faults
    assert (fault.where.file, fault.where.line, fault.reason) == ("set.jsonl", 2, reason), fault
    assert report.seen == 3 and sum(report.indexed.values()) == 2
    fault.row()  # any fault can be written down
    json.dumps(fault.row()).encode("ascii")


FIELDS = [*KEYS, *FIRST, *SECOND, *ANSWERS, *FLICKR, "image", "image2", "images", "directory", "image_id"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["a.png", "1-2", "-"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    rows=st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6), max_size=4),
    task=st.sampled_from([*TASKS]),
)
def test_whatever_stands_in_a_row_is_an_example_or_a_fault(tmp_path_factory, rows, task):
    root = write(tmp_path_factory.mktemp("any"), {"set.jsonl": jsonl(*rows), "a.png": png()})
    report = check(root, task=task, progress=False)
    assert report.seen == sum(report.indexed.values()) + report.quarantined >= len(rows)
    for fault in report.faults:
        json.dumps(fault.row()).encode("ascii")
    questions = write(tmp_path_factory.mktemp("vqa"), vqa("val2014", rows, rows))
    report = check(questions, task="vqa", progress=False)
    assert report.seen == sum(report.indexed.values()) + report.quarantined


def test_a_table_that_is_a_link_is_not_followed(tmp_path):
    outside = write(tmp_path / "outside", {"set.jsonl": jsonl(GOOD)})
    root = write(tmp_path / "raw", {"a.png": png()})
    (root / "set.jsonl").symlink_to(outside / "set.jsonl")
    assert faults(root, "entailment") == [("set.jsonl", "not_a_file")]


def test_a_wrong_task_or_place_is_told(tmp_path):
    with pytest.raises(ConfigError, match="task 'vqa2': expected one of vqa, nlvr2"):
        discover(tmp_path, "vqa2")
    with pytest.raises(MissingInputError, match="no file of vqa"):
        discover(tmp_path, "vqa")
    with pytest.raises(MissingInputError, match="no such file"):
        discover(tmp_path / "none", "vqa")


# ------------------------------------------------------------------------------------------------------- in the index


@pytest.fixture
def statements(tmp_path) -> Path:
    """Four statements about pairs of pictures, of which there are three."""
    rows = [{"id": f"s{i}", "images": [f"{a}.png", f"{b}.png"], "sentence": f"statement  {i}", "label": i % 2 == 0}
            for i, (a, b) in enumerate([(0, 1), (1, 2), (0, 1), (2, 2)])]  # fmt: skip
    return write(tmp_path / "raw", {"train.jsonl": jsonl(*rows)} | {f"{i}.png": png(i) for i in range(3)})


def test_examples_come_back_from_the_index(statements, tmp_path):
    made = build(statements, tmp_path / "out", task="nlvr2", **QUIET)
    [source] = made.sources
    assert (made.task, made.labels, source.kind, len(source)) == ("nlvr2", ("False", "True"), "example", 4)
    assert (source.blocks, source.labels, source.name) == (None, made.labels, "train")
    assert [source.key(i) for i in range(4)] == ["s0", "s1", "s2", "s3"]
    assert [source.answers(i) for i in range(4)] == [(1,), (0,), (1,), (0,)]
    assert [source.pictures(i) for i in range(4)] == [2] * 4
    assert source.strings(2) == ("statement 2",)
    for i in range(4):
        [ids] = source.texts(i)
        assert ids.dtype == np.int32 and ids.tolist() == made.tokenizer.ids(source.strings(i)[0]).tolist()
    for i, pair in enumerate([(0, 1), (1, 2), (0, 1), (2, 2)]):
        assert all(torch.equal(x, decode(png(k)).image) for x, k in zip(source.images(i), pair, strict=True))
    assert source.image_hashes(0) == source.image_hashes(2) and source.image_hash(1) == source.image_hashes(0)[1]
    again = pickle.loads(pickle.dumps(source))
    assert again.strings(3) == source.strings(3) and torch.equal(again.images(1)[1], source.images(1)[1])
    assert Index.open(tmp_path / "out").hash == made.hash
    [row] = describe(made)
    assert (row["kind"], row["records"], row["pixels"], row["texts"]) == ("example", 4, "20 x 12", 4)


def test_a_picture_is_decoded_once_however_many_ask_about_it(statements, tmp_path, monkeypatch):
    from multiway.data import scan

    opened = []
    real = scan.open_picture
    monkeypatch.setattr(scan, "_known", {})
    monkeypatch.setattr(scan, "open_picture", lambda data, limits: opened.append(data) or real(data, limits))
    build(statements, tmp_path / "out", task="nlvr2", **QUIET)
    assert sorted(opened) == sorted(png(i) for i in range(3))
    monkeypatch.setattr(scan, "KNOWN", 1)
    scan._known.clear()
    opened.clear()
    build(statements, tmp_path / "out", task="nlvr2", **QUIET)
    assert len(opened) == 6 and len(scan._known) == 1  # (0 1) (1 2) (0 1) (2 2) with one at hand: 0 1 2 0 1 2


def test_workers_and_time_change_nothing(statements, tmp_path):
    alone = build(statements, tmp_path / "a", task="nlvr2", **QUIET)
    helped = build(statements, tmp_path / "b", task="nlvr2", workers=2, **QUIET)
    assert alone.hash == helped.hash


def test_all_answers_of_a_question_are_kept_as_they_were_written(tmp_path):
    people = ["Two", "2", "two", "2", "two "]
    rows = [{"id": i, "image": "a.png", "question": f"how many {i} ?", "answers": people[i:]} for i in range(3)]
    root = write(tmp_path / "raw", {"set.jsonl": jsonl(*rows), "a.png": png()})
    made = build(root, tmp_path / "out", task="vqa", **QUIET)
    [source] = made.sources
    assert [[made.labels[n] for n in source.answers(i)] for i in range(3)] == [people, people[1:], people[2:]]
    assert source.label(0) is None


def test_texts_alone_and_without_answers(tmp_path):
    rows = [{"text": f"first {i}", "text2": f"second {i}"} for i in range(3)]
    root = write(tmp_path / "raw", {"test.jsonl": jsonl(*rows)})
    made = build(root, tmp_path / "out", task="text_classification", **QUIET)
    [source] = made.sources
    assert made.labels == () and len(source) == 3
    assert (source.pictures(1), source.images(1), source.answers(1), source.label(1)) == (0, [], (), None)
    assert source.strings(1) == ("first 1", "second 1") and len(source.texts(1)) == 2
    assert describe(made)[0]["texts"] == 6 and overlap(made, made) == []
    assert pickle.loads(pickle.dumps(source)).strings(2) == ("first 2", "second 2")


def test_one_picture_in_two_splits_is_found(statements, tmp_path):
    rows = [{"id": "t", "images": ["other.png", "2.png"], "sentence": "x", "label": True}]
    other = write(tmp_path / "test", {"test.jsonl": jsonl(*rows), "other.png": png(7), "2.png": png(2)})
    train = build(statements, tmp_path / "a", task="nlvr2", **QUIET)
    assert overlap(train, build(other, tmp_path / "b", task="nlvr2", **QUIET)) == [("s1", "t")]


def test_examples_are_no_data_for_pre_training(statements, tmp_path):
    build(statements, tmp_path / "out", task="nlvr2", **QUIET)
    with pytest.raises(ConfigError, match=r"index of examples \(nlvr2\)"):
        open_corpus(Data(root=str(tmp_path / "out")), tmp_path)


# ---------------------------------------------------------------------------------------------------------- real data


def unpack(folder: Path, archive: Path, pictures: int = 0) -> Path:
    """Tables of an archive, and the first pictures of each folder."""
    if not archive.is_file():
        pytest.skip(f"{archive.name} is not here")
    taken: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            place = str(Path(member.name).parent)
            if member.isfile() and member.name.endswith((".jsonl", ".tsv", ".json")):
                write(folder, {member.name: tar.extractfile(member).read()})
            elif member.name.endswith(".png") and taken.setdefault(place, 0) < pictures:
                taken[place] += 1
                write(folder, {member.name: tar.extractfile(member).read()})
    return folder


def test_real_nlvr(tmp_path):
    root = unpack(tmp_path, SHARED / "nlvr1/nlvr1.tar.xz", pictures=12) / "nlvr1"
    examples = {split: read(root, "nlvr2", split) for split in ("train", "val")}
    assert (len(examples["train"]), len(examples["val"])) == (6 * 1000, 6 * 989)
    assert sum(row[3] == ("True",) for row in examples["val"]) / len(examples["val"]) == pytest.approx(0.553, abs=5e-4)
    assert examples["val"][0][0] == "dev-1572-0-0.png"
    made = build(root, tmp_path / "out", task="nlvr2", split="dev", missing="skip", max_bad_fraction=0.0, **QUIET)
    [source] = made.sources
    assert len(source) == 12 and made.manifest["report"]["reasons"] == {"missing": 5934 - 12}
    assert all(source.images(i)[0].shape == (3, 100, 400) for i in range(12))


def test_real_sentences(tmp_path):
    root = unpack(tmp_path, SHARED / "text-small/text-small.tar.xz") / "text-small"
    for name, counts in {"sst2": (6920, 872), "cola": (8551, 527)}.items():
        assert tuple(len(read(root / name, "text_classification", s)) for s in ("train", "val")) == counts
    made = build(root / "cola", tmp_path / "out", task="text_classification", split="dev", vocab=512, progress=False)
    assert made.labels == ("0", "1") and made.sources[0].strings(0) == (
        "The sailors rode the breeze clear of the rocks.",
    )
