"""What a scene of digits is and what can be said of it: captions, questions and statements, exactly true or false."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (235, 40, 45),
    "orange": (255, 140, 20),
    "yellow": (250, 235, 60),
    "green": (45, 190, 65),
    "cyan": (60, 225, 235),
    "blue": (55, 95, 250),
    "purple": (175, 65, 225),
    "white": (248, 248, 248),
}
CAPTIONS = 4  # different captions of each scene

# The names of rows and columns, for each number of cells a canvas may have.
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "centre", "right")}
_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


@dataclass(frozen=True)
class Object:
    """One digit of a scene: what it is, where it is, and which handwriting drew it.

    `row` and `column` count cells from the top left. `box` is (x0, y0, x1, y1) in pixels, half-open, tight around the
    ink. `sample` is the index in `load_digits`, `variant` its size and slant, `corner` the (x, y) where it starts.
    """

    digit: int
    colour: str
    row: int
    column: int
    box: tuple[int, int, int, int]
    sample: int
    variant: int
    corner: tuple[int, int]

    @property
    def name(self) -> str:
        """The object in words: "a red three"."""
        return article(f"{self.colour} {DIGITS[self.digit]}")


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, its objects in reading order and `CAPTIONS` different captions, each telling all of `describe`.

    `image` is uint8 (3, H, W) with H = W = cells * cell_px.
    """

    index: int
    cells: int
    image: np.ndarray
    objects: tuple[Object, ...]
    captions: tuple[str, ...]


def describe(objects: Sequence[Object]) -> frozenset[tuple[int, str, int, int]]:
    """Return what a full caption says: the set of (digit, colour, row, column)."""
    return frozenset((o.digit, o.colour, o.row, o.column) for o in objects)


def article(words: str) -> str:
    """Return a colour or digit word, and what follows it, with "a" or "an" before."""
    return f"{'an' if words.startswith(('orange', 'eight')) else 'a'} {words}"


def place_name(row: int, column: int, cells: int) -> str:
    """Return a cell's name: "top left", "middle right", "centre"."""
    name = f"{ROWS[cells][row]} {COLUMNS[cells][column]}"
    return "centre" if name == "middle centre" else name


def relation(a: Object, b: Object) -> list[str]:
    """Return how `a` lies to `b` by rows and columns of cells: one or two of above, below, left of, right of."""
    vertical = "above" if a.row < b.row else "below" if a.row > b.row else ""
    horizontal = "left of" if a.column < b.column else "right of" if a.column > b.column else ""
    return [word for word in (vertical, horizontal) if word]


# An object's words and what joins them: each form tells colour, digit and place.
_SHORT = ("{colour} {digit} {place}", ", ")
_NAMED = ("{name} {place}", ", ")
_PLACED = ("{place} {name}", ", ")
_LISTED = ("{name} at the {place}", " and ")
_COLOURED = ("{a_digit} in {colour} at the {place}", " and ")


def write_captions(objects: tuple[Object, ...], cells: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Write different captions, each naming every object with its colour and place; long forms only for few objects."""
    count = len(objects)
    counted = (f"{DIGITS[count]} digit{'s' if count > 1 else ''}: ", *_SHORT)
    forms = [("", *_SHORT), counted]
    forms += [("", *form) for form in ((_LISTED, _PLACED, _COLOURED) if count <= 2 else (_NAMED, _PLACED))]
    relate = cells == 2 and count > 1  # on 2x2 cells relations can tell every place
    found = []
    for form in rng.permutation(len(forms) + 2 * relate)[:CAPTIONS].tolist():
        shuffled = [objects[i] for i in rng.permutation(count)]
        if form < len(forms):
            start, words, joiner = forms[form]
            found.append(start + joiner.join(_words(o, words, cells) for o in shuffled))
        else:
            found.append(_related(shuffled, by_rows=form == len(forms)))
    return tuple(found)


def _words(o: Object, form: str, cells: int) -> str:
    digit, place = DIGITS[o.digit], place_name(o.row, o.column, cells)
    return form.format(colour=o.colour, digit=digit, name=o.name, a_digit=article(digit), place=place)


def _related(objects: list[Object], by_rows: bool) -> str:
    """Relate the objects on 2x2 cells: "a red three left of a blue seven, above a green two on the left".

    Rows (or columns) are described one by one and then related; the order of `objects` decides which is named first.
    """
    rows, columns = ("at the top", "at the bottom"), ("on the left", "on the right")
    lines: dict[int, list[Object]] = {}
    for o in objects:
        lines.setdefault(o.row if by_rows else o.column, []).append(o)
    described = []
    for line in lines.values():
        if len(line) == 2:
            described.append(f"{line[0].name} {relation(line[0], line[1])[0]} {line[1].name}")
        else:
            described.append(f"{line[0].name} {columns[line[0].column] if by_rows else rows[line[0].row]}")
    first = next(iter(lines))
    if len(lines) == 1:
        return f"{described[0]} {(rows if by_rows else columns)[first]}"
    word = (("above", "below") if by_rows else ("left of", "right of"))[first]
    return f"{described[0]}, {word} {described[1]}"


def relations(scene: Scene) -> list[str]:
    """Return every true "a red three above a blue seven", compared by rows and by columns of cells."""
    return [f"{a.name} {word} {b.name}" for a in scene.objects for b in scene.objects for word in relation(a, b)]


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Return questions with their answers in words; every yes/no question stands beside one of the opposite answer."""
    objects, cells = scene.objects, scene.cells
    digits, colours = [o.digit for o in objects], [o.colour for o in objects]
    names = [o.name for o in objects]
    found = [("how many digits are there?", DIGITS[len(objects)])]
    for o in objects:
        place, word = place_name(o.row, o.column, cells), DIGITS[o.digit]
        found.append((f"which digit is at the {place}?", word))
        found.append((f"what colour is the digit at the {place}?", o.colour))
        if digits.count(o.digit) == 1:
            found.append((f"what colour is the {word}?", o.colour))
        if colours.count(o.colour) == 1:
            found.append((f"which digit is {o.colour}?", word))
        if names.count(o.name) == 1:
            found.append((f"where is the {o.colour} {word}?", place))
    rng = np.random.Generator(np.random.Philox(key=[scene.index, 0], counter=[0, 0, 0, 9]))
    other = [c for c in COLOURS if c not in colours]
    asked = [*dict.fromkeys(colours), *rng.permutation(other)[:1].tolist()]
    found += [(f"how many digits are {c}?", DIGITS[colours.count(c)]) for c in asked]
    absent = [name for name in (article(f"{c} {word}") for c in COLOURS for word in DIGITS) if name not in names]
    found.append((f"is there {names[rng.integers(len(names))]}?", "yes"))
    found.append((f"is there {absent[rng.integers(len(absent))]}?", "no"))
    single = [o for o in objects if names.count(o.name) == 1]
    for a in single:
        for b in single:
            pair = f"the {a.colour} {DIGITS[a.digit]} {{}} the {b.colour} {DIGITS[b.digit]}?"
            for word in relation(a, b):
                found.append((f"is {pair.format(word)}", "yes"))
                found.append((f"is {pair.format(_OPPOSITE[word])}", "no"))
    return found


def statement(left: Scene, right: Scene) -> tuple[str, bool]:
    """Return a statement about two pictures and whether it is true: a pure function of the scenes' indices and objects.

    Each form of statement is used only where it can be filled both truly and falsely, and then a coin decides: half of
    the statements of every form are true, so that the text alone does not give the answer.
    """
    rng = np.random.Generator(np.random.Philox(key=[left.index, right.index], counter=[0, 0, 0, 10]))
    fillings = [forms for forms in _statements(left.objects, right.objects) if forms[0] and forms[1]]
    true, false = fillings[rng.integers(len(fillings))]
    truth = bool(rng.integers(2))
    chosen = true if truth else false
    return chosen[rng.integers(len(chosen))], truth


def _statements(left: tuple[Object, ...], right: tuple[Object, ...]) -> Iterator[tuple[list[str], list[str]]]:
    """For each form of statement about two pictures, its true and its false fillings."""
    pictures = {"left": left, "right": right}
    for side, other in (("left", "right"), ("right", "left")):
        here, there = ({o.name for o in pictures[picture]} for picture in (side, other))
        form = f"the {side} picture contains {{}}"
        yield [form.format(n) for n in sorted(here)], [form.format(n) for n in sorted(there - here)]
    more, fewer = ([f"the left picture has {word} digits than the right one"] for word in ("more", "fewer"))
    if len(left) != len(right):
        yield (more, fewer) if len(left) > len(right) else (fewer, more)
    total = len(left) + len(right)
    form = "the two pictures show {} digits in total"
    others = [DIGITS[a + b] for a in range(1, 5) for b in range(1, 5) if a + b != total]  # as often as among true ones
    if total < len(DIGITS):
        yield [form.format(DIGITS[total])], [form.format(word) for word in others]
    for values in (
        [{f"{article(o.colour)} digit" for o in objects} for objects in (left, right)],
        [{article(DIGITS[o.digit]) for o in objects} for objects in (left, right)],
    ):
        both, one = sorted(values[0] & values[1]), sorted(values[0] ^ values[1])
        yield [f"both pictures contain {v}" for v in both], [f"both pictures contain {v}" for v in one]
        yield [f"only one picture contains {v}" for v in one], [f"only one picture contains {v}" for v in both]
    absent = {article(f"{c} {word}") for c in COLOURS for word in DIGITS} - {o.name for o in left + right}
    form = "neither picture contains {}"
    yield [form.format(n) for n in sorted(absent)], sorted({form.format(o.name) for o in left + right})
