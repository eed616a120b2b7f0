"""Labelled examples of tasks: the official files of their data sets, and a user's own tables.

A user's table is ``*.jsonl``, ``*.csv`` or ``*.tsv`` as in `multiway.data.sources`, with some of these fields:

==================================================  ===================================================================
field, or one of its other names                    meaning
==================================================  ===================================================================
``id``: ``identifier question_id index pairID``     name of the example, which predictions are given under; absent =
                                                    FILE:LINE
``image``, ``image2``; or ``images``, a list        pictures, relative to the table's folder
``text``: ``question premise sentence1 question1``  what is asked, said or read; what only the second field gives is the
``text2``: ``sentence hypothesis sentence2 ...``    only text
``label``: ``answer answers gold_label score ...``  the answer, text or a number; of VQA also a list of what several
                                                    people answered; absent = not known
==================================================  ===================================================================

===========================  ========  =====  ========================================================================
task                         pictures  texts  official files
===========================  ========  =====  ========================================================================
``vqa``                      1         1      VQAv2: ``v2_OpenEnded_mscoco_SPLIT_questions.json``, its
                                              ``v2_mscoco_SPLIT_annotations.json`` and ``SPLIT/COCO_SPLIT_ID.jpg``
``nlvr2``                    1 or 2    1      NLVR2 and NLVR: ``train.json``, ``dev.json`` ... and their pictures as
                                              they were published. Labels become ``True`` and ``False``. Of more than
                                              two pictures each is an example of its own, named as its file is
``entailment``               1         1      SNLI-VE: ``snli_ve_SPLIT.jsonl`` and ``flickr30k_images/ID.jpg``
``text_classification``      0         1, 2   GLUE: the ``*.tsv`` of its folders, MRPC's ``msr_paraphrase_SPLIT.txt``;
                                              without a header ``sentence label``, or CoLA's four columns
===========================  ========  =====  ========================================================================

All examples of a table have as many pictures and texts as its first one. Where some have an answer, one without is a
bad record; SNLI's ``-``, no agreement, is listed and does not count as bad. Official files lie in the folder itself, or
in ``annotations``, ``questions``, ``data``, ``vqa`` or ``nlvr2/data`` in it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from multiway.data.records import NO_GOLD, Example, Fault, Span, Where, encodable, inside, parse_json, read_bytes
from multiway.data.sources import SPLITS, RawSource, Row, jsonl_rows, lines, table_rows
from multiway.errors import ConfigError, MissingInputError, RecordError

MAX_JSON = 2**30
"""Largest questions or annotations file of VQA, in bytes; official ones have a few 100 MB."""


class Counts(NamedTuple):
    """How many pictures and texts an example of a task may have."""

    pictures: tuple[int, ...]
    texts: tuple[int, ...]


TASKS = {
    "vqa": Counts((1,), (1,)),
    "nlvr2": Counts((1, 2), (1,)),
    "entailment": Counts((1,), (1,)),
    "text_classification": Counts((0,), (1, 2)),
}

KEYS = ("id", "identifier", "question_id", "index", "pairID")
FIRST = ("text", "premise", "sentence1", "question1", "#1 String", "question")
SECOND = ("sentence", "text2", "hypothesis", "sentence2", "question2", "#2 String")
ANSWERS = ("label", "answer", "answers", "gold_label", "Quality", "is_duplicate", "score")
FLICKR = ("Flickr30K_ID", "Flikr30kID")

FOLDERS = ("", "annotations", "questions", "data", "vqa", "nlvr2/data")
FORMATS = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv"}
SUFFIXES = (*FORMATS, ".json", ".txt")
VALIDATION = ("val", "dev", "valid", "validation")
QUESTIONS = re.compile(r"(v2_)?OpenEnded_mscoco_([a-z]+(?:-dev)?\d{4})_questions")
PARAPHRASES = re.compile(r"msr_paraphrase_(train|test)")
PAIR = re.compile(r"([a-z]+\d?)-\d+-\d+-\d+")
PERMUTED = re.compile(r"\d+-\d+")
PERMUTATIONS = 6
MAX_KEY = 500
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Annotations(RawSource):
    """Examples of one task, of one table; of VQA of questions and, where answers are known, annotations."""

    task: str = ""

    def __iter__(self) -> Iterator[Example | Fault]:
        labelled = len(self.files) > 1 or any(isinstance(x, Example) and x.answers for x in self._read())
        counts, seen = None, {}
        for item in self._read():
            if isinstance(item, Example):
                counts = counts or Counts((len(item.images),), (len(item.texts),))
                item = _checked(item, counts, labelled, seen)
            yield item

    def _read(self) -> Iterator[Example | Fault]:
        """Examples as they stand there; a file that cannot be read to its end is a fault itself."""
        try:
            yield from _read_vqa(self) if self.format == "vqa" else _read_table(self, self.files[0])
        except RecordError as error:
            yield Fault.of(error, Where(self.name, self.files[0], self.files[0]), "read")


def _checked(example: Example, counts: Counts, labelled: bool, seen: dict[str, Where]) -> Example | Fault:
    """The example, or what is wrong with it among the others; ``seen``: names of those before it."""
    where, found = example.where, Counts((len(example.images),), (len(example.texts),))
    first = seen.setdefault(where.key, where)
    if first is not where:
        line = "" if first.line is None else f" in line {first.line}"
        return Fault(where, "validate", "duplicate", f"{where.key!r} is also the name of an example{line}")
    if found != counts:
        message = f"{found.pictures[0]} pictures and {found.texts[0]} texts, expected {counts.pictures[0]} and "
        return Fault(where, "validate", "counts", f"{message}{counts.texts[0]} as those of the first example")
    if labelled and not example.answers:
        return Fault(where, "validate", "unlabelled", "no answer, where other examples have one")
    return example


# ---------------------------------------------------------------------------------------------------------- discovery


def discover(root: Path | str, task: str, split: str | None = None) -> list[Annotations]:
    """The sources of a task that a file or folder holds, by the rules of this module.

    ``split``: ``train``, ``val``, ``test`` or an official name (``train2014``, ``dev_matched``, ``test1``); ``val`` and
    ``dev`` also name each other. None = all files, when there are not several splits.

    Raises ConfigError for another task or when a split must be chosen, MissingInputError without such files or split.
    """
    root = Path(root)
    if task not in TASKS:
        raise ConfigError(f"task {task!r}: expected one of {', '.join(TASKS)}")
    if not root.exists():
        raise MissingInputError(f"{root}: no such file or folder")
    root = root.resolve()
    if root.is_file():
        return [_source(root.parent, root.name, task)]
    found = {file: _splits(file) for file in _files(root, task)}
    folders = [name for name in SPLITS if (root / name).is_dir()]
    present = sorted({names[-1] for names in found.values() if names}) or folders
    if split is None:
        if len(present) > 1:
            raise ConfigError(f"{root} has the splits {', '.join(present)}: choose one")
        chosen, below = list(found), folders
    else:
        wanted = [split, *(VALIDATION if split in VALIDATION else ())]
        chosen = next((hits for w in wanted if (hits := [f for f, names in found.items() if w in names])), [])
        below = [name for name in wanted if name in folders]
    if not chosen and below:
        return discover(root / below[0], task)
    if not chosen:
        which = f"split {split!r} of {task}, only {', '.join(present) or 'none'}" if split else f"file of {task}"
        raise MissingInputError(f"{root} has no {which}: see the formats in multiway.data.annotations")
    return [_source(root, file, task) for file in chosen]


def _files(root: Path, task: str) -> list[str]:
    """Files of a task below a folder, official ones wherever they may lie."""
    official, own, paraphrases = [], [], []
    for folder in FOLDERS:
        paths = sorted(path for suffix in SUFFIXES for path in (root / folder).glob(f"[!.]*{suffix}") if path.is_file())
        for path in paths:
            file = path.relative_to(root).as_posix()
            if path.suffix in FORMATS:
                own.append(file)
            elif task == "vqa" and QUESTIONS.fullmatch(path.stem):
                official.append(file)
            elif task == "nlvr2" and path.suffix == ".json" and _splits(file):
                own.append(file)
            elif task == "text_classification" and PARAPHRASES.fullmatch(path.stem):
                paraphrases.append(file)
    return official or own or paraphrases


def _splits(file: str) -> list[str]:
    """What a file's split may be called, most exact name first; [] when it is named after none."""
    stem = PurePosixPath(file).stem
    if official := QUESTIONS.fullmatch(stem):
        return [official[2], official[2].rstrip("0123456789")]
    for part in re.split(r"[-_.]", stem):
        if (name := part.rstrip("0123456789")) in SPLITS:
            return list(dict.fromkeys([stem, part, name]))
    return []


def _source(root: Path, file: str, task: str) -> Annotations:
    """The source of a file; of questions with their annotations, if there are any."""
    stem, suffix = PurePosixPath(file).stem, PurePosixPath(file).suffix.lower()
    official = QUESTIONS.fullmatch(stem) if task == "vqa" and suffix == ".json" else None
    if official is None:
        return Annotations(stem, FORMATS.get(suffix, "tsv" if suffix == ".txt" else "jsonl"), root, (file,), task)
    name = f"{official[1] or ''}mscoco_{official[2]}_annotations.json"
    folders = dict.fromkeys([f"{PurePosixPath(file).parent}/", *(f"{folder}/" for folder in FOLDERS)])
    beside = (PurePosixPath(folder.lstrip("/"), name).as_posix() for folder in folders)
    answers = next((path for path in beside if (root / path).is_file()), None)
    return Annotations(official[2], "vqa", root, (file, answers) if answers else (file,), task)


def _folder(root: Path, *names: str) -> PurePosixPath:
    """The first of some folders below a root that is there, else the root itself."""
    return PurePosixPath(next((name for name in names if (root / name).is_dir()), ""))


# ------------------------------------------------------------------------------------------------------------- tables


def _read_table(source: Annotations, file: str) -> Iterator[Example | Fault]:
    rows: Iterator[Row | Fault]
    if source.format == "jsonl":
        rows = jsonl_rows(source, file)
    else:
        rows = table_rows(source, file, (*FIRST, *SECOND), _unnamed_columns(source, file))
    for row in rows:
        if isinstance(row, Fault):
            yield row
            continue
        try:
            yield from _examples(source, *row)
        except RecordError as error:
            yield Fault.of(error, row[0]._replace(key=_key(row[1], row[0].key)), "parse")


def _unnamed_columns(source: Annotations, file: str) -> tuple[str, ...]:
    """Columns of a table of sentences whose first line is one of them already, else ()."""
    first = next(lines(source.root / file), None)
    if source.task != "text_classification" or source.format != "tsv" or first is None or first.data is None:
        return ()
    cells = first.data.rstrip(b"\r\n").split(b"\t")
    if len(cells) == 2 and cells[1].isdigit():
        return "sentence", "label"
    return ("source", "label", "mark", "sentence") if len(cells) == 4 and cells[1].isdigit() else ()


def _examples(source: Annotations, where: Where, fields: dict[str, Any]) -> Iterator[Example]:
    """The examples a row is: mostly one. Raises RecordError: ``type``, ``schema``, ``key``, ``label``, ``path``."""
    given = {name: value for name, value in fields.items() if value is not None}
    name = next((name for name in KEYS if name in given), None)
    if name and not isinstance(given[name], (str, int)):
        raise RecordError(f"field {name}: expected text or a number, found {type(given[name]).__name__}", reason="type")
    key = _key(given, "") or where.key
    if len(key) > MAX_KEY or CONTROL.search(key) or not encodable(key):
        raise RecordError(f"name {key[:40]!r}: expected one short line, as lists of predictions have", reason="key")
    texts = [_text(given, name) for name in (*FIRST, *SECOND) if name in given]
    images = _images(source, where, given)
    if source.task == "entailment" and any(name in given for name in FLICKR):
        texts = [_text(given, "sentence2")]  # the first sentence is what the picture shows
    elif source.task == "nlvr2" and not images and "identifier" in given:
        images = _official_pictures(source, where, key, str(given.get("directory", "")))
    counts = TASKS[source.task]
    apart = source.task == "nlvr2" and len(images) > 2
    if len(texts) not in counts.texts or (not apart and len(images) not in counts.pictures):
        expected = f"{' or '.join(map(str, counts.pictures))} pictures and {' or '.join(map(str, counts.texts))} texts"
        found = f"{len(images)} and {len(texts)} in the fields {', '.join(given)}"
        raise RecordError(f"expected {expected} ({source.task}), found {found}", reason="schema")
    spans = tuple(Span(inside(source.root, name)) for name in images)
    answers = _answers(source.task, given)
    for shown in [(span,) for span in spans] if apart else [spans]:
        own = where._replace(key=PurePosixPath(shown[0].file).name if apart else key)
        yield Example(own, source.root, shown, tuple(texts), answers)


def _key(given: dict[str, Any], default: str) -> str:
    """Name of an example."""
    return str(next((given[name] for name in KEYS if given.get(name) is not None), default))


def _text(given: dict[str, Any], name: str) -> str:
    if not isinstance(given.get(name), str):
        raise RecordError(f"field {name}: expected text, found {type(given.get(name)).__name__}", reason="type")
    return given[name]


def _images(source: Annotations, where: Where, given: dict[str, Any]) -> list[str]:
    """Paths of the pictures, below the root."""
    if source.task == "entailment" and (name := next((n for n in FLICKR if n in given), None)):
        folder = _folder(source.root, "flickr30k_images", "flickr30k-images", "images")
        return [f"{folder / _text(given, name).removesuffix('.jpg')}.jpg"]
    if TASKS[source.task].pictures == (0,):
        return []
    several = given.get("images", [])
    if not isinstance(several, list):
        raise RecordError(f"field images: expected a list, found {type(several).__name__}", reason="type")
    numbered = {f"images[{i}]": name for i, name in enumerate(several)}
    found = {name: given[name] for name in ("image", "image2") if name in given} | numbered
    table = PurePosixPath(where.file).parent
    return [(table / _text(found, name)).as_posix() for name in found]


def _official_pictures(source: Annotations, where: Where, key: str, directory: str) -> list[str]:
    """Paths of the pictures of NLVR2, a pair by its name, or of NLVR, the permutations of one. Source: their READMEs,
    and nlvr2's folders as its pictures are packed.
    """
    if pair := PAIR.fullmatch(key):
        folder = _folder(source.root, f"images/{pair[1]}", pair[1], "images")
        shown = key.rpartition("-")[0]
        inner = directory if pair[1] == "train" else ""
        return [(folder / inner / f"{shown}-img{i}.png").as_posix() for i in range(2)]
    if PERMUTED.fullmatch(key):
        split = PurePosixPath(where.file).stem
        folder = _folder(source.root, f"{split}/images", "images")
        return [(folder / directory / f"{split}-{key}-{k}.png").as_posix() for k in range(PERMUTATIONS)]
    raise RecordError(f"identifier {key!r}: expected SPLIT-SET-PAIR-SENTENCE or NUMBER-POSITION", reason="key")


def _answers(task: str, given: dict[str, Any]) -> tuple[str, ...]:
    """What people answered, () when it is not known."""
    found = [name for name in ANSWERS if name in given]
    if len(found) > 1:
        raise RecordError(f"the fields {', '.join(found)} all are answers, expected one of them", reason="schema")
    if not found:
        return ()
    name, value = found[0], given[found[0]]
    values = value if name == "answers" and isinstance(value, list) else [value]
    if len(values) > 1 and task != "vqa":
        raise RecordError(f"{len(values)} answers, expected one ({task})", reason="label")
    return tuple(_answer(task, name, value) for value in values)


def _answer(task: str, name: str, value: Any) -> str:
    """One answer as text."""
    truth = task == "nlvr2"
    if not isinstance(value, (str, int, float)) or (isinstance(value, bool) and not truth):
        found = type(value).__name__
        raise RecordError(f"field {name}: expected text or a number, found {found}", reason="type")
    text = str(value).lower().capitalize() if truth else str(value)
    if name == "gold_label" and text == "-":
        raise RecordError("gold_label is -: those who were asked did not agree", reason=NO_GOLD)
    if truth and text not in ("True", "False"):
        raise RecordError(f"label {text[:40]!r}: expected True or False", reason="label")
    if name == "score" and not NUMBER.fullmatch(text):
        raise RecordError(f"score {text[:40]!r}: expected a number", reason="label")
    if not encodable(text):
        raise RecordError(f"field {name}: not UTF-8: {text[:40]!r}", reason="utf8")
    return text


# ---------------------------------------------------------------------------------------------------------------- VQA


def _read_vqa(source: Annotations) -> Iterator[Example | Fault]:
    """Questions in their order, with the answers to each."""
    file, *annotations = source.files
    answered: dict[str, dict[str, Any]] = {}
    for name in annotations:
        for where, fields in _entries(source, name, "annotations"):
            if answered.setdefault(where.key, fields) is not fields:
                yield Fault(where, "validate", "duplicate", "another annotation of the same question")
    for where, fields in _entries(source, file, "questions"):
        known = answered.pop(where.key, {})
        try:
            yield _question(source, where, fields, known)
        except RecordError as error:
            yield Fault.of(error, where, "parse")
    for key in answered:
        where = Where(source.name, source.files[-1], key)
        yield Fault(where, "validate", "schema", f"annotation of question {key}, which is not in {file}")


def _entries(source: Annotations, file: str, name: str) -> Iterator[tuple[Where, dict[str, Any]]]:
    """Objects of the list ``name`` in a JSON file. Raises RecordError as `read_bytes` and `parse_json`."""
    entries = parse_json(read_bytes(source.root / file, most=MAX_JSON).data, _shrink).get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RecordError(f"{file}: expected a list of objects under {name!r}", reason="schema")
    for number, fields in enumerate(entries):
        yield Where(source.name, file, str(fields.get("question_id", f"{file}:{number}"))), fields


def _shrink(fields: dict[str, Any]) -> Any:
    """Of one person's answer the answer alone: there are millions of them."""
    answer = fields.get("answer")
    return sys.intern(answer) if isinstance(answer, str) and "answer_id" in fields else fields


def _question(source: Annotations, where: Where, fields: dict[str, Any], known: dict[str, Any]) -> Example:
    """A question with its picture and the answers to it."""
    for name in ("question_id", "image_id"):
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RecordError(f"field {name}: expected a number, found {value!r:.40}", reason="type")
    if known and known.get("image_id") != fields["image_id"]:
        message = f"question about picture {fields['image_id']}, its annotation is about {known.get('image_id')!r:.40}"
        raise RecordError(message, reason="schema")
    split = _splits(source.files[0])[0].replace("-dev", "")  # test-dev asks about pictures of test
    folder = _folder(source.root, split, f"images/{split}", "images")
    picture = inside(source.root, (folder / f"COCO_{split}_{fields['image_id']:012d}.jpg").as_posix())
    answers = known.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise RecordError("field answers: expected a list of objects with answer and answer_id", reason="type")
    texts = (_text(fields, "question"),)
    return Example(where, source.root, (Span(picture),), texts, tuple(_answer("vqa", "answers", x) for x in answers))
