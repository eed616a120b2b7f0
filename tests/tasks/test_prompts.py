"""Templates and names of classes, built in and from files."""

from __future__ import annotations

import json

import pytest

from multiway.errors import ConfigError, MissingInputError
from multiway.tasks.prompts import SETS, class_names, filled, templates


@pytest.mark.parametrize("name", SETS)
def test_built_in_sets_have_a_place_for_the_name(name):
    found = templates(name)
    assert len(found) == len(set(found)) >= 5 and all(template.count("{}") == 1 for template in found)


def test_a_file_has_one_template_a_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeffa {}\n\n  the {} of {}  \r\n", encoding="utf-8")
    assert templates(path) == ("a {}", "the {} of {}")
    assert filled(["cat", "sea"], templates(path)) == [["a cat", "the cat of cat"], ["a sea", "the sea of sea"]]


@pytest.mark.parametrize(
    ("content", "error"), [(b"a {}\na dog\n", "'a dog' has no {}"), (b"\n", "no prompt"), (b"\xff{}", "not UTF-8")]
)
def test_a_file_that_would_not_do_is_named(tmp_path, content, error):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=error) as found:
        templates(path)
    assert str(path) in str(found.value)


def test_a_set_that_is_not_there_is_missing():
    with pytest.raises(MissingInputError, match="did you mean 'symbols'"):
        templates("symbol")


def test_names_come_from_folders_lines_or_json(tmp_path):
    labels = ["n01", "tabby_cat"]
    assert class_names(labels) == ["n01", "tabby cat"]
    lines, table = tmp_path / "names.txt", tmp_path / "names.json"
    lines.write_text("tench, a fish\nTabby\n", encoding="utf-8")
    table.write_text(json.dumps({"tabby_cat": "Tabby", "n01": "tench"}), encoding="utf-8")
    assert class_names(labels, lines) == ["tench, a fish", "Tabby"]
    assert class_names(labels, table) == ["tench", "Tabby"]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("names.txt", "one\n", "1 names for 2 classes"),
        ("names.json", '{"a": "x"}', "missing b, not labels of the data none"),
        ("names.json", '{"a": "x", "b": "y", "c": "z"}', "missing none, not labels of the data c"),
        ("names.json", '{"a": "x", "b": 3}', "'b' is 3, expected words"),
        ("names.json", '["a", "b"]', "names.json"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, name, content, error):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=error):
        class_names(["a", "b"], path)
    with pytest.raises(MissingInputError):
        class_names(["a", "b"], tmp_path / f"no-{name}")
