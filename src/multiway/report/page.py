"""The report as one HTML page: styles, pictures and curves are inside it, so it can be moved, sent and read offline."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from multiway.report.chart import curve, smooth
from multiway.report.examples import Examples, Word, without_digits
from multiway.run import Run
from multiway.weights.io import write as write_file

SCALE = 4
"""Pictures are enlarged this many times."""

QUALITY = 88
FILLED, WORDED, SEARCHED, FOUND = 6, 6, 6, 5
"""Examples of each kind: the first of the held-out set."""

TOP = 5
"""Results shown for a query."""

TERMS = {
    "loss": "All terms together",
    "image": "Patches of pictures alone",
    "text": "Words of captions alone",
    "contrast": "Contrast of pairs",
    "pair_image": "Patches of pairs",
    "pair_text": "Words of pairs",
}


def write(
    path: Path,
    *,
    result: Mapping[str, Any],
    examples: Examples,
    rows: Sequence[Mapping[str, Any]],
    run: Run,
    commands: Sequence[tuple[str, str]],
) -> None:
    """Write the page.

    ``result``: content of ``result.json``; ``rows``: those of ``metrics.jsonl``; ``commands``: what to try next, each
    with its purpose. Raises OSError when the disk refuses.
    """
    sections = (
        heading(result),
        pictures(examples, run.model.codes),
        words(examples),
        search(examples),
        recall(result, examples),
        digits(examples, result),
        curves(rows, run),
        facts(result, run),
        further(commands),
    )
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    text = page.substitute(title="multiway quickstart: BEiT-3 on real handwriting", body="\n".join(sections))
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------ sections


def heading(result: Mapping[str, Any]) -> str:
    """What was trained, and its figures beside chance."""
    found, named, masked = result["retrieval"], result["zero_shot"], result["masked"]
    count = found["candidates"]
    tiles = (
        tile("A caption finds its picture", found["text_to_image"]["r1"], 1 / count, f"first of {count:,}"),
        tile("A picture finds its caption", found["image_to_text"]["r1"], 1 / count, f"first of {count:,}"),
        tile("A digit is named, zero-shot", named["accuracy"], named["chance"], "one of ten"),
        tile(
            "A hidden word is filled in", masked["text_token_accuracy"], masked["text_token_trivial"],
            "half of the words are hidden", beside="always the commonest word",
        ),
    )  # fmt: skip
    return f"""<header>
<h1>What a small BEiT-3 learned in {duration(result["seconds"])}</h1>
<p class="lead">{result["parameters"]:,} parameters, {result["steps"]:,} steps on generated scenes of real handwriting,
from random weights. All figures and examples below are from {count:,} held-out scenes, whose digits were written by
people the model never saw. Examples are the first of that set, not the best.</p>
<div class="tiles">{"".join(tiles)}</div>
</header>"""


def tile(title: str, value: float, chance: float, note: str, *, beside: str = "chance") -> str:
    """One figure."""
    text = f"<small>{title}</small><b>{percent(value)}</b>{bar(value, chance)}"
    return f'<div class="tile">{text}<span>{beside} {percent(chance)} · {note}</span></div>'


def pictures(examples: Examples, codes: int) -> str:
    """Hidden cells filled in."""
    shown, cells = examples.pictures, examples.scenes.cells
    heads = (
        "the scene", "what the model sees", "filled in from the picture alone", "filled in with the caption",
        "what the right tokens look like", "",
    )  # fmt: skip
    parts = [f'<div class="head">{head}</div>' for head in heads]
    for i in range(min(FILLED, len(examples.captions))):
        row, column = shown.box[i]
        place = f"--row:{row};--column:{column};--cells:{cells}"
        caption = examples.captions[i]
        parts.append(picture(shown.original[i], caption))
        parts.append(picture(covered(shown.original[i], shown.hide[i]), "the scene with one cell hidden"))
        for images, how in (
            (shown.alone, "without the caption"),
            (shown.told, "with the caption"),
            (shown.best, "with the right tokens"),
        ):
            image = picture(images[i], f"the cell filled in {how}")
            parts.append(f'<span class="cell" style="{place}">{image}</span>')
        parts.append(f'<div class="told">{escape(caption)}</div>')
    return f"""<section id="pictures">
<h2>Hidden patches, filled in</h2>
<p>A quarter of each scene is hidden. The model names a visual token for every hidden patch, and the codebook draws it;
what is visible stays as it is. Without the caption nothing says which digit was there; with it, text and picture have
to be read together. {codes:,} tokens cannot draw every patch well: the last column is the best there could be.</p>
<div class="filled">{"".join(parts)}</div>
<p class="soft below">Over all held-out scenes the exact token of a hidden patch with handwriting is named in
{percent(shown.right)} of cases from the picture alone, in {percent(shown.right_told)} with the caption.</p>
</section>"""


def words(examples: Examples) -> str:
    """Hidden words filled in."""
    shown = examples.words
    parts = []
    for i, line in enumerate(shown.words[:WORDED]):
        rows = (
            ("the caption", [shown_word(word, word.text, "hidden") for word in line]),
            ("text alone", [shown_word(word, word.alone) for word in line]),
            ("with the picture", [shown_word(word, word.told) for word in line]),
        )
        terms = "".join(f"<dt>{name}</dt><dd>{' '.join(filled)}</dd>" for name, filled in rows)
        parts.append(f'<div class="words">{picture(examples.scenes.images[i], "the scene")}<dl>{terms}</dl></div>')
    of = {
        name: f"{percent(alone)} alone, {percent(told)} with the picture" for name, (alone, told) in shown.right.items()
    }
    return f"""<section id="words">
<h2>Hidden words, filled in</h2>
<p>The outlined words, every colour and every digit, are hidden. From the text alone they can only be guessed; with the
picture they can be read. Wrong words are struck out.</p>
{"".join(parts)}
<p class="soft below">Right over all held-out captions: colours, {of["colours"]}; digits, {of["digits"]}.</p>
</section>"""


def shown_word(word: Word, filled: str, style: str = "") -> str:
    """A word of a caption; a hidden one as what was put in its place."""
    if word.hidden:
        style = style or ("right" if filled == word.text else "wrong")
        return f'<span class="{style}">{escape(filled) or "?"}</span>{word.tail}'
    return escape(word.text) + word.tail


def search(examples: Examples) -> str:
    """Queries with their nearest results."""
    scores = examples.text @ examples.image.T
    by_text, by_image = ranked(scores), ranked(scores.T)
    count = len(scores)
    queries = []
    for i in range(min(SEARCHED, count)):
        best, place = by_text[i][:TOP].tolist(), int(np.flatnonzero(by_text[i] == i)[0]) + 1
        hits = [result_picture(examples, j, n + 1, own=i == j) for n, j in enumerate(best)]
        if place > TOP:
            hits.append(result_picture(examples, i, place, own=True))
        queries.append(
            f'<div class="query"><p>“{escape(examples.captions[i])}”</p><div class="hits">{"".join(hits)}</div></div>'
        )
    answers = []
    for i in range(SEARCHED, min(SEARCHED + FOUND, count)):
        best, place = by_image[i][:TOP].tolist(), int(np.flatnonzero(by_image[i] == i)[0]) + 1
        lines = [result_caption(examples, j, n + 1, own=i == j) for n, j in enumerate(best)]
        if place > TOP:
            lines.append(result_caption(examples, i, place, own=True))
        image = picture(examples.scenes.images[i], "the query")
        answers.append(f'<div class="found">{image}<ol>{"".join(lines)}</ol></div>')
    return f"""<section id="search">
<h2>Search</h2>
<p>Pictures and captions are turned into vectors, each alone; the nearest among {count:,} are the results. The right one
is marked, and added with its place where it is not among the first {TOP}.</p>
<h3>Words find pictures</h3>
{"".join(queries)}
<h3>Pictures find captions</h3>
{"".join(answers)}
</section>"""


def result_picture(examples: Examples, scene: int, place: int, *, own: bool) -> str:
    """A picture found, with its place."""
    note = f"{place:,} ✓" if own else f"{place:,}"
    image = picture(examples.scenes.images[scene], examples.captions[scene])
    return f"<figure{' class=own' if own else ''}>{image}<figcaption>{note}</figcaption></figure>"


def result_caption(examples: Examples, scene: int, place: int, *, own: bool) -> str:
    """A caption found, with its place."""
    note = " ✓" if own else ""
    return f'<li value="{place}"{" class=own" if own else ""}>{escape(examples.captions[scene])}{note}</li>'


def recall(result: Mapping[str, Any], examples: Examples) -> str:
    """Retrieval figures beside chance."""
    found = result["retrieval"]
    count, blind = found["candidates"], without_digits(examples.scenes)
    lines = []
    for name, title in (("text_to_image", "caption → picture"), ("image_to_text", "picture → caption")):
        cells = []
        for k in (1, 5, 10):
            value, chance = found[name][f"r{k}"], found["chance"][name][f"r{k}"]
            cells.append(f"<td><b>{percent(value)}</b>{bar(value, chance)}<small>chance {percent(chance)}</small></td>")
        lines.append(f"<tr><td>{title}</td>{''.join(cells)}</tr>")
    heads = "".join(f"<th>among the first {k}</th>" if k > 1 else "<th>in first place</th>" for k in (1, 5, 10))
    return f"""<section id="retrieval">
<h2>Retrieval</h2>
<p>The share of queries whose own partner is found (recall at 1, 5 and 10), among {count:,} scenes of which no two have
the same digits and colours in the same places. The tick is chance.</p>
<table class="recall"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>
<p class="soft below">Colours and places alone, no digit being read, would suffice for {percent(blind)} in first place;
beyond that, and for what follows, handwriting must be read.</p>
</section>"""


def digits(examples: Examples, result: Mapping[str, Any]) -> str:
    """The confusion table of zero-shot naming."""
    table, named = examples.confusion, result["zero_shot"]
    lines = []
    for digit, row in enumerate(table):
        shares = row / max(1, row.sum())
        cells = [
            f'<td style="--share:{share:.2f}" class="{"strong" if share > 0.5 else "" if n else "none"}">{n}</td>'
            for n, share in zip(row, shares, strict=True)
        ]
        lines.append(f"<tr><th>{digit}</th>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{digit}</th>" for digit in range(len(table)))
    return f"""<section id="digits">
<h2>Naming digits, zero-shot</h2>
<p>Scenes of one digit, named after the nearest of ten descriptions (“a red three at the top left”, in every colour and
place). The model was never trained to classify. {percent(named["accuracy"])} are right; chance is
{percent(named["chance"])}.</p>
<div class="scroll"><table class="confusion">
<thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>
<p class="soft below">Rows: the digit written. Columns: the digit named.</p>
</section>"""


def curves(rows: Sequence[Mapping[str, Any]], run: Run) -> str:
    """Every loss over the steps."""
    levels = {"contrast": run.data.pairs, "text": run.model.vocab, "pair_text": run.model.vocab}
    levels |= {"image": run.model.codes, "pair_image": run.model.codes}
    parts = []
    for term, title in TERMS.items():
        if not rows or term not in rows[0]:
            continue
        values = [float(row[term]) for row in rows]
        level = math.log(levels[term]) if term in levels else None
        line = curve([row["step"] for row in rows], values, level)
        last = smooth(values)[-1]
        parts.append(f"<figure><figcaption><span>{title}</span><b>{last:.2f}</b></figcaption>{line}</figure>")
    return f"""<section id="curves">
<h2>Training</h2>
<p>Losses over the steps in nats, raw and smoothed. Dashed: what guessing all alternatives equally costs. The scales
differ, and need not start at zero.</p>
<div class="curves">{"".join(parts)}</div>
</section>"""


def facts(result: Mapping[str, Any], run: Run) -> str:
    """What would be needed to do it again."""
    data, model, optim = run.data, run.model, run.optim
    shape = (
        f"{model.depth} {model.attention} layers, width {model.dim}, {model.heads} heads, patches of {model.patch} px"
    )
    step = f"{data.images} pictures, {data.texts} captions and {data.pairs} pairs"
    speed = f"{result['steps_per_second']:.1f} steps/s, {result['samples_per_second']:,.0f} samples/s"
    masked, threads = result["masked"], result["threads"]
    token = f"{percent(masked['image_code_accuracy'])} (always the commonest: {percent(masked['image_code_trivial'])})"
    listed = {
        "Recipe": run.recipe,
        "Model": f"{result['parameters']:,} parameters: {shape}",
        "A step": step,
        "Optimiser": f"AdamW, rate {optim.lr:g} to {run.schedule.final_lr:g}, warm-up {run.schedule.warmup} steps",
        "Visual tokens right": f"{token}, where there is handwriting; {percent(run.objective.image_ratio)} hidden",
        "Training": f"{result['steps']:,} steps in {result['seconds']:,.1f} s: {speed}",
        "Machine": f"{result['machine']}; ran on {result['device']}, {threads} CPU thread{'s' * (threads > 1)}",
        "Software": f"torch {result['torch']}, Python {result['python']}",
        "Seed": result["seed"],
        "Commit": (result["commit"] or "not a git checkout") + ", with changes" * bool(result["source_changed"]),
    }
    terms = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in listed.items())
    return f'<section id="run"><h2>This run</h2><dl class="facts">{terms}</dl></section>'


def further(commands: Sequence[tuple[str, str]]) -> str:
    """What to try next."""
    parts = [f"<p class=why>{escape(why)}</p><pre>{escape(command)}</pre>" for why, command in commands]
    return f'<section id="next"><h2>What to try next</h2>{"".join(parts)}</section>'


# --------------------------------------------------------------------------------------------------------------- parts


def ranked(scores: np.ndarray) -> np.ndarray:
    """Candidates of every query, nearest first: (Q, C) -> int64 (Q, C)."""
    return np.argsort(-scores, axis=1, kind="stable")


def covered(image: np.ndarray, hide: np.ndarray) -> np.ndarray:
    """A picture uint8 (3, H, W) with stripes over its hidden patches, bool (P,)."""
    side = math.isqrt(len(hide))
    size = image.shape[-1] // side
    over = hide.reshape(side, side).repeat(size, 0).repeat(size, 1)
    y, x = np.indices(over.shape)
    return np.where(over, 118 + 16 * ((x + y) // 4 % 2), image).astype(np.uint8)


def picture(image: np.ndarray, words: str) -> str:
    """An ``img`` with the picture inside it, uint8 (3, H, W), enlarged."""
    small = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    large = small.resize((small.width * SCALE, small.height * SCALE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{large.width}" height="{large.height}"'
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(words)}" {size}>'


def bar(value: float, chance: float) -> str:
    """A share as a bar, with a tick at chance."""
    return f'<div class="bar"><i style="width:{100 * value:.1f}%"></i><u style="left:{100 * chance:.1f}%"></u></div>'


def percent(share: float) -> str:
    """A share in [0, 1] with one decimal."""
    return f"{100 * share:.1f}\u202f%"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
