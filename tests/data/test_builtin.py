from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")
from sklearn.datasets import load_digits

from multiway.data import builtin
from multiway.data.builtin import COLOURS, DIGITS, Scene
from multiway.errors import ConfigError, DataError

HARD = {"cells": 3, "digits": (1, 5)}
COLOUR, DIGIT = "|".join(COLOURS), "|".join(DIGITS)
ITEM = rf"(?:an? )?(?:(?:{COLOUR}) (?:{DIGIT})|(?:{DIGIT}) in (?:{COLOUR}))"
RELATION = r"above|below|left of|right of"
SIDES = {
    "at the top": ("row", 0),
    "at the bottom": ("row", 1),
    "on the left": ("column", 0),
    "on the right": ("column", 1),
}
PLACES = {
    2: ["top left", "top right", "bottom left", "bottom right"],
    3: [
        "top left", "top centre", "top right",
        "middle left", "centre", "middle right",
        "bottom left", "bottom centre", "bottom right",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def train():
    return builtin.scenes("train", 1500)


@pytest.fixture(scope="module")
def hard():
    return builtin.scenes("eval", 300, **HARD)


def same(a: Scene, b: Scene) -> bool:
    return np.array_equal(a.image, b.image) and a.objects == b.objects and a.captions == b.captions


# Reading what the generator wrote, by other means than it uses


def item(text: str) -> tuple[int, str]:
    return DIGITS.index(re.search(DIGIT, text)[0]), re.search(COLOUR, text)[0]


def holds(a: tuple[int, int], word: str, b: tuple[int, int]) -> bool:
    """Whether a cell (row, column) lies so to another."""
    return {"above": a[0] < b[0], "below": a[0] > b[0], "left of": a[1] < b[1], "right of": a[1] > b[1]}[word]


def read_places(caption: str, cells: int) -> set | None:
    """The description in a caption that gives every digit a cell's name, or None if it does not."""
    found = set()
    for part in re.split(", | and ", re.sub(r"^\w+ digits?: ", "", caption)):
        match = re.fullmatch(rf"({ITEM}) (?:at the )?([a-z ]+)", part) or re.fullmatch(rf"([a-z ]+?) ({ITEM})", part)
        if not match:
            return None
        thing, place = sorted(match.groups(), key=lambda text: text in PLACES[cells])
        if place not in PLACES[cells]:
            return None
        found.add((*item(thing), *divmod(PLACES[cells].index(place), cells)))
    return found


def read_relations(caption: str) -> list[set]:
    """All the 2x2 scenes of the digits named that make a caption of relations true, taken literally."""
    things, constraints, clauses = [], [], []
    for part in caption.split(", "):
        form = rf"(?:({RELATION}) )?({ITEM})(?: ({RELATION}) ({ITEM}))?(?: ({'|'.join(SIDES)}))?"
        outer, first, inner, second, side = re.fullmatch(form, part).groups()
        clause = list(range(len(things), len(things) + (2 if second else 1)))
        things += [item(text) for text in (first, second) if text]
        if inner:
            constraints.append((clause[0], inner, clause[1]))
        if outer:
            constraints += [(a, outer, b) for a in clauses[0][0] for b in clause]
        clauses.append((clause, side))
    found = []
    for cells in itertools.permutations(itertools.product(range(2), range(2)), len(things)):
        true = all(holds(cells[a], word, cells[b]) for a, word, b in constraints)
        for clause, side in clauses:
            axis, line = SIDES.get(side, ("row", None))
            true &= line is None or all(cells[i][axis == "column"] == line for i in clause)
        if true:
            found.append({(*thing, *cell) for thing, cell in zip(things, cells)})
    return found


def read(caption: str, cells: int) -> set:
    found = read_places(caption, cells)
    if found is None:
        possible = {frozenset(description) for description in read_relations(caption)}
        assert len(possible) == 1, f"{caption!r} may mean {possible}"
        found = set(possible.pop())
    return found


# Scenes


def test_scene_is_a_function_of_its_arguments():
    first = builtin.scene("eval", 7, seed=3, cells=3, cell_px=24, digits=(2, 5))
    for cache in (builtin._digits, builtin._samples, builtin._glyphs, builtin._textures):
        cache.cache_clear()
    assert same(first, builtin.scene("eval", 7, seed=3, cells=3, cell_px=24, digits=(2, 5)))
    others = [builtin.scene("eval", 7, seed=4, cells=3, cell_px=24, digits=(2, 5))]
    others += [builtin.scene("eval", 8, seed=3, cells=3, cell_px=24, digits=(2, 5))]
    others += [builtin.scene("train", 7, seed=3, cells=3, cell_px=24, digits=(2, 5))]
    assert not any(np.array_equal(first.image, other.image) or first.objects == other.objects for other in others)


def test_scenes_equal_scene_by_scene(train, hard):
    assert train.images.shape == (1500, 3, 64, 64) and train.images.dtype == np.uint8
    assert train.images.flags.c_contiguous and hard.images.shape[1:] == (3, 96, 96)
    assert all(same(train[i], builtin.scene("train", i)) for i in range(0, 1500, 97))
    assert all(same(hard[i], builtin.scene("eval", i, **HARD)) for i in range(0, 300, 53))
    late = builtin.scenes("train", 3, start=1490)
    assert late.indices == [1490, 1491, 1492] and all(same(late[i], train[1490 + i]) for i in range(3))


def test_train_and_evaluation_share_no_writer(train, hard):
    labels = load_digits().target
    trained = {o.sample for objects in train.objects for o in objects}
    evaluated = {o.sample for i in range(3) for s in builtin.scenes("eval", 500, seed=i).objects for o in s}
    evaluated |= {o.sample for objects in hard.objects for o in objects}
    assert max(trained) < 898 and min(evaluated) >= 915
    assert len(trained) > 850 and len(evaluated) > 830  # nearly all of each half is used
    assert all(o.digit == labels[o.sample] for objects in train.objects + hard.objects for o in objects)


def test_counts_digits_colours_and_cells_are_balanced(train):
    counts = Counter(len(objects) for objects in train.objects)
    assert set(counts) == {1, 2, 3, 4} and all(abs(n / 1500 - 1 / 4) < 0.05 for n in counts.values())
    objects = [o for found in train.objects for o in found]
    for values, kinds in (
        ([o.digit for o in objects], 10),
        ([o.colour for o in objects], 8),
        ([(o.row, o.column) for o in objects], 4),
    ):
        shares = [n / len(objects) for n in Counter(values).values()]
        assert len(shares) == kinds and all(abs(share - 1 / kinds) < 0.02 for share in shares)


@pytest.mark.parametrize("name", ["train", "hard"])
def test_boxes_and_ink_agree_with_the_pixels(name, request):
    found = request.getfixturevalue(name)
    palette, names = np.array(list(COLOURS.values())), list(COLOURS)
    for i in range(200):
        scene = found[i]
        ink = builtin.ink(scene)
        assert not (ink.sum(0) > 1).any()
        for o, own in zip(scene.objects, ink):
            rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
            assert o.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert o.column * 32 <= o.box[0] and o.box[2] <= o.column * 32 + 32
            assert o.row * 32 <= o.box[1] and o.box[3] <= o.row * 32 + 32
            colour = np.median(scene.image[:, own], axis=1)
            assert names[np.linalg.norm(palette - colour, axis=1).argmin()] == o.colour
            cell = (slice(o.row * 32, o.row * 32 + 32), slice(o.column * 32, o.column * 32 + 32))
            canvas = scene.image[:, *cell][:, ~own[cell]]
            # Ink stands out from what is around it, thin edges included, by the brightest channel.
            assert scene.image[:, own].max(0).min() > np.median(canvas.max(0)) + 30
        cells = scene.image.reshape(3, found.cells, 32, found.cells, 32).max((0, 2, 4))
        used = {(o.row, o.column) for o in scene.objects}
        assert all(((row, column) in used) == (cells[row, column] > 125) for row, column in np.ndindex(cells.shape))


def test_handwriting_is_upright_and_recognisable(train):
    images = load_digits().images
    for i in range(100):
        for o, own in zip(train.objects[i], builtin.ink(train[i])):
            (x, y), side = o.corner, min(64 - max(o.corner), 32)
            drawn = Image.fromarray(own[y : y + side, x : x + side].astype(np.float32))
            shown = np.pad(images[o.sample], 1)
            likeness = [
                np.corrcoef(np.asarray(drawn.resize((10, 10), box=(0, 0, s, s))).ravel(), shown.ravel())[0, 1]
                for s in range(20, side + 1)
            ]
            assert max(likeness) > 0.75, (o, likeness)


# Words


@pytest.mark.parametrize("name", ["train", "hard"])
def test_every_caption_tells_the_whole_scene_and_nothing_else(name, request):
    found = request.getfixturevalue(name)
    for i in range(300):
        scene = found[i]
        assert len(set(scene.captions)) == 4
        for caption in scene.captions:
            assert read(caption, found.cells) == builtin.describe(scene.objects), caption
            if found.cells == 2:
                assert len(caption.split()) <= 20
            assert not re.search(r"\ba (orange|eight)\b|\ban (?!orange|eight)", caption)


def test_captions_use_relations_in_both_directions(train):
    words = Counter(word for captions in train.captions for c in captions for word in re.findall(RELATION, c))
    assert set(words) == {"above", "below", "left of", "right of"} and min(words.values()) > 200


def test_retrieval_scenes_are_told_apart_by_their_captions():
    found = builtin.retrieval_scenes(1000)
    assert len({builtin.describe(objects) for objects in found.objects}) == 1000
    assert len({captions[0] for captions in found.captions}) == 1000
    assert len({caption for captions in found.captions for caption in captions}) == 4000
    assert all(o.sample >= 915 for objects in found.objects for o in objects)
    assert same(found[-1], builtin.scene("eval", found.indices[-1]))
    assert min(Counter(len(objects) for objects in found.objects).values()) > 150
    other = builtin.retrieval_scenes(50, seed=1)
    assert not any(same(a, b) for a, b in zip(other, builtin.retrieval_scenes(50)))
    with pytest.raises(ConfigError, match="different scenes"):
        builtin.retrieval_scenes(400, digits=(1, 1))  # 10 digits x 8 colours x 4 cells = 320


def test_one_digit_scenes_and_prompts():
    found, digits = builtin.one_digit_scenes(300)
    assert digits.dtype == np.int64 and min(Counter(digits.tolist()).values()) > 10
    prompts = builtin.digit_prompts()
    assert [len(set(p)) for p in prompts] == [32] * 10
    for objects, digit in zip(found.objects, digits):
        (o,) = objects
        right = [p for ps in prompts for p in ps if read(p, 2) == builtin.describe(objects)]
        assert o.digit == digit and len(right) == 1 and right[0] in prompts[digit]


def test_relations_are_exactly_the_true_ones(train):
    for i in range(100):
        objects = train.objects[i]
        expected = [
            f"{a.name} {word} {b.name}"
            for a, b in itertools.permutations(objects, 2)
            for word in ("above", "below", "left of", "right of")
            if holds((a.row, a.column), word, (b.row, b.column))
        ]
        assert sorted(builtin.relations(train[i])) == sorted(expected)


def answers(question: str, scene: Scene) -> set[str]:
    """Every right answer to a question."""
    objects = scene.objects
    words = question.rstrip("?").split()
    picked = [o for o in objects if DIGITS[o.digit] in words or o.colour in words]
    if question.startswith("how many"):
        return {DIGITS[len(picked) if words[-1] in COLOURS else len(objects)]}
    if question.startswith("is there"):
        return {"yes" if any(item(question) == (o.digit, o.colour) for o in objects) else "no"}
    if match := re.fullmatch(rf"is the ([a-z ]+) ({RELATION}) the ([a-z ]+)\?", question):
        first, second = ([o for o in objects if item(match[i]) == (o.digit, o.colour)] for i in (1, 3))
        return {"yes" if holds((a.row, a.column), match[2], (b.row, b.column)) else "no" for a in first for b in second}
    places = PLACES[scene.cells]
    if question.startswith("where is"):
        return {places[o.row * scene.cells + o.column] for o in objects if item(question) == (o.digit, o.colour)}
    if match := re.search(r"at the ([a-z ]+)\?", question):
        picked = [o for o in objects if places[o.row * scene.cells + o.column] == match[1]]
    return {o.colour if question.startswith("what colour") else DIGITS[o.digit] for o in picked}


@pytest.mark.parametrize("name", ["train", "hard"])
def test_questions_have_one_answer_and_it_is_given(name, request):
    found = request.getfixturevalue(name)
    given = Counter()
    for i in range(300):
        asked = builtin.questions(found[i])
        assert asked == builtin.questions(found[i]) and len(set(asked)) == len({q for q, _ in asked})
        for question, answer in asked:
            assert answers(question, found[i]) == {answer}, question
            given[answer] += 1
    assert given["yes"] == given["no"] > 300
    assert all(given[word] for word in (*DIGITS, *COLOURS, *PLACES[found.cells]))


def truth(text: str, left: Scene, right: Scene) -> bool:
    """Whether a statement holds."""
    if "digits than" in text:
        return (len(left.objects) > len(right.objects)) == ("more" in text) and len(left.objects) != len(right.objects)
    if match := re.fullmatch(rf"the two pictures show ({DIGIT}) digits in total", text):
        return DIGITS.index(match[1]) == len(left.objects) + len(right.objects)
    who, what = re.fullmatch(r"(the left|the right|both|only one|neither) pictures? contains? an? (.*)", text).groups()
    shown = [
        any(
            f"{o.colour} {DIGITS[o.digit]}" == what or what in (f"{o.colour} digit", DIGITS[o.digit]) for o in s.objects
        )
        for s in (left, right)
    ]
    total = sum(shown)
    return {
        "the left": shown[0],
        "the right": shown[1],
        "both": total == 2,
        "only one": total == 1,
        "neither": not total,
    }[who]


@pytest.mark.parametrize("name", ["train", "hard"])
def test_statements_are_right_and_their_form_does_not_tell(name, request):
    found = request.getfixturevalue(name)
    forms: dict[str, list[bool]] = {}
    for i in range(3000):
        left, right = found[i % len(found)], found[(7 * i + 1 + i // len(found)) % len(found)]
        text, stated = builtin.statement(left, right)
        assert truth(text, left, right) == stated, text
        form = re.sub(rf"\b(an?|{COLOUR}|{DIGIT}|more|fewer)\b", "_", text)
        forms.setdefault(form, []).append(stated)
    assert len(forms) == 9
    assert all(len(stated) > 50 and abs(np.mean(stated) - 0.5) < 0.15 for stated in forms.values()), forms.keys()
    assert builtin.statement(found[0], found[1]) == builtin.statement(found[0], found[1])


# Files and errors


def test_export_writes_what_scene_makes(tmp_path):
    lines = builtin.export(tmp_path / "new", "eval", 5, seed=2).read_text().splitlines()
    assert len(lines) == 5 and len(list((tmp_path / "new").glob("*.png"))) == 5
    for index, record in enumerate(map(json.loads, lines)):
        scene = builtin.scene("eval", index, seed=2)
        image = np.asarray(Image.open(tmp_path / "new" / record["image"]))
        assert np.array_equal(image.transpose(2, 0, 1), scene.image)
        assert tuple(record["captions"]) == scene.captions
        assert record["objects"] == json.loads(json.dumps([dataclasses.asdict(o) for o in scene.objects]))
    with pytest.raises(DataError, match="not empty"):
        builtin.export(tmp_path / "new", "eval", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "val"}, "expected one of train, eval"),
        ({"seed": -1}, "seed is -1"),
        ({"cells": 4}, "expected 2 or 3"),
        ({"cell_px": 8}, "16 or more"),
        ({"digits": (0, 2)}, r"\(0, 2\)"),
        ({"digits": (1, 5)}, "most <= 4"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        builtin.scenes(**{"split": "train", "count": 1, **change})


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    builtin._digits.cache_clear()
    with pytest.raises(ConfigError, match=r"multiway\[quickstart\]"):
        builtin._digits()
