"""The page of a profile: where the time of a step goes, what each share means, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from multiway.engine.timeline import Operator, Summary
from multiway.report.page import percent
from multiway.weights.io import write as write_file

LABELLED = 0.07
"""Least share that has room for words in the bar."""


@dataclass(frozen=True)
class Cause:
    """A share in words: ``colour`` on paper, ``dark`` on a dark page."""

    title: str
    colour: str
    dark: str
    meaning: str
    remedy: str


CAUSES = {
    "gemm": Cause(
        "Matrix products", "#2a62d6", "#6c9bff",
        "Linear layers and convolutions, forward and backward: the work that the model is.",
        "The share to want. Cheaper or less arithmetic shortens it: <code>--parallel.precision bf16</code> where the "
        "device computes in it, fewer recomputed blocks (<code>--parallel.recompute</code>), a smaller model.",
    ),
    "attention": Cause(
        "Attention", "#7a4fc4", "#b08cf5",
        "Fused attention, and the batched products and softmax that stand for it. It grows with the square of the "
        "longest sample of each kind.",
        "Shorter samples: <code>--data.text_tokens</code>, <code>--data.window</code>, a smaller "
        "<code>--model.image_px</code>. In bf16 GPUs use their fastest kernels.",
    ),
    "elementwise": Cause(
        "Elementwise", "#0e8f8a", "#4fcdc4",
        "Activations, residuals, norms, masks, sums, losses: they wait for memory, not for arithmetic.",
        "<code>--parallel.compile true</code> fuses them into few passes over memory; bf16 halves the bytes.",
    ),
    "copies": Cause(
        "Copies", "#c98a0b", "#eab54a",
        "Casts between precisions, gathers between packed rows and padded attention, concatenation, zeros, transfers "
        "to the device.",
        "The table below names them. Casts go with one precision throughout, gathers with samples of equal length, "
        "part of both with <code>--parallel.compile true</code>.",
    ),
    "optimiser": Cause(
        "Optimiser", "#3f8f3a", "#86cf80",
        "Clipping, the update of the weights (Muon’s products included), their running average: a price per step, "
        "whatever its number of samples.",
        "More samples per step (<code>--data.pairs</code> and its like). Several processes share AdamW’s part under "
        "<code>--parallel.shard full</code>; Muon computes in <code>--parallel.precision</code>.",
    ),
    "collectives": Cause(
        "Exchange", "#b83a86", "#ee8cc6",
        "Gathering weights, summing gradients and counts, and standing still until the slowest process is there; only "
        "what is not hidden behind computation.",
        "<code>--parallel.shard replicate</code> if the model fits on each device, more samples per process. If one "
        "process is late, compare the traces of all.",
    ),
    "data": Cause(
        "Waiting for data", "#d24a2c", "#ff8f73",
        "The step is ready, the batch is not: reading, decoding and cropping are slower than training.",
        "More <code>--data.workers</code> (with 0 all loading is waiting); smaller pictures on disk; stored views "
        "(<code>--objective.views</code>).",
    ),
    "host": Cause(
        "Host", "#6f7a87", "#98a3b0",
        "The rest of the step: Python, dispatch of operators, views, allocation. On a GPU: the time in which it stands "
        "idle for them.",
        "More samples per micro-batch, so that each operator does more: fewer <code>--parallel.micro</code>, or a "
        "larger step. <code>--parallel.compile true</code> replaces many operators by few.",
    ),
    "between": Cause(
        "Between steps", "#b4bcc6", "#566170",
        "Rows of metrics, progress, checkpoints and evaluations that fell among these steps.",
        "Larger <code>--checkpoint.every</code> and <code>--log.evaluate</code>.",
    ),
}  # fmt: skip
"""In the order of the bar."""

STYLE = """
.stack { display: flex; height: 3.6rem; margin: 2rem 0 .9rem; border-radius: 10px; overflow: hidden; gap: 2px; }
.stack i, .swatch, .cells i, .operators .bar i { background: var(--cause); }
.stack i { padding: .6rem .6rem 0; min-width: 2px; overflow: hidden; white-space: nowrap; }
.stack i { color: #fff; font-style: normal; }
.stack i.tight { padding: 0; }
.stack b, .stack small { display: block; overflow: hidden; text-overflow: ellipsis; line-height: 1.25; }
.stack small { font-size: .75rem; }
.swatch { display: inline-block; width: .7rem; height: .7rem; margin-right: .45rem; border-radius: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: 0; padding: 0; list-style: none; }
.legend { font-size: .875rem; }
.legend b { margin-left: .35rem; font-weight: 600; }
.steps { display: grid; grid-template-columns: auto 1fr auto; gap: .45rem .9rem; align-items: center; }
.steps { font-size: .875rem; color: var(--soft); }
.cells { display: flex; gap: 1px; height: 1.05rem; border-radius: 4px; overflow: hidden; }
.cause { display: grid; grid-template-columns: 11rem 1fr; gap: .4rem 1.6rem; }
.cause { padding: 1.1rem 0; border-top: 1px solid var(--line); }
.cause h3 { margin: 0; }
.cause b { display: block; font-size: 1.7rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.4; }
.cause small { display: block; color: var(--soft); }
.cause p { margin: 0 0 .35rem; }
.cause p + p { color: var(--soft); }
.cause code { white-space: nowrap; }
.operators { width: 100%; font-size: .875rem; }
.operators th { padding: .2rem .9rem .5rem 0; text-align: left; font-weight: 500; white-space: nowrap; }
.operators td { padding: .36rem .9rem .36rem 0; border-top: 1px solid var(--line); }
.operators .number { text-align: right; white-space: nowrap; }
.operators code { overflow-wrap: anywhere; }
.operators .extra { width: 16%; }
.stack, .legend, .steps, .cause { font-variant-numeric: tabular-nums; }
@media (max-width: 44rem) {
  .cause { grid-template-columns: 1fr; }
  .operators .extra, .stack b, .stack small { display: none; }
}
"""


def write(folder: Path, found: Summary) -> None:
    """Write ``summary.html``: one page that needs no network. Raises OSError when the disk refuses."""
    sections = (heading(found), each_step(found), causes(found), operators(found), facts(found), traces(found))
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    title = f"Where the time goes: {escape(found.facts['recipe'])}"
    text = page.substitute(title=title, body="\n".join(sections)).replace("</style>", f"{STYLE}{colours()}</style>", 1)
    write_file(folder / "summary.html", lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------ sections


def heading(found: Summary) -> str:
    """Step time, the greatest shares, and the bar of all."""
    facts, shares = found.facts, found.shares
    step, count = mean_step(found), len(found.steps)
    first, last = found.steps[0]["step"], found.steps[-1]["step"]
    worst = max((name for name in shares if name != "gemm"), key=shares.__getitem__)
    before = f"{time(facts['before'])} the step before, not recorded" if facts["before"] else "while recorded"
    idle = shares["data"] + shares["host"] + shares["collectives"] + shares["between"]
    tiles = (
        tile("A step takes", time(step), before),
        tile("Samples a second", f"{facts['items'] / step:,.0f}", f"{facts['items']:,} in every step"),
        tile("In matrix products", percent(shares["gemm"]), "of wall time; the share to want"),
        tile("Not computing", percent(idle), "data, exchange, host, between steps"),
    )
    of = f"steps {first} to {last}" if count > 1 else f"step {last}"
    return f"""<header>
<h1>Where the time goes</h1>
<p class="lead">{escape(facts["recipe"])}, {of}, on {escape(device(found))}. Beside matrix products the
largest share is <b>{CAUSES[worst].title.lower()}</b>, {percent(shares[worst])}: without it steps would be
{gain(shares[worst])} times as fast.</p>
<div class="tiles">{"".join(tiles)}</div>
{stack(shares)}
{legend(shares)}
</header>"""


def tile(title: str, value: str, note: str) -> str:
    """One figure."""
    return f'<div class="tile"><small>{title}</small><b>{value}</b><span>{note}</span></div>'


def stack(shares: dict[str, float]) -> str:
    """All shares as one bar."""
    parts = []
    for name, cause in CAUSES.items():
        if shares[name] > 0:
            words = f"<b>{percent(shares[name])}</b><small>{cause.title}</small>" if shares[name] >= LABELLED else ""
            style = name if words else f"{name} tight"
            flex = f"flex:{shares[name]:.5f} 1 0"
            parts.append(f'<i class="{style}" style="{flex}" title="{label(name, shares)}">{words}</i>')
    described = "; ".join(label(name, shares) for name in CAUSES if shares[name] > 0)
    return f'<div class="stack" role="img" aria-label="{described}">{"".join(parts)}</div>'


def legend(shares: dict[str, float]) -> str:
    """Colours with titles and shares."""
    parts = [
        f"<li>{swatch(name)}{cause.title}<b>{percent(shares[name])}</b></li>"
        for name, cause in CAUSES.items()
        if shares[name] > 0
    ]
    return f'<ul class="legend">{"".join(parts)}</ul>'


def each_step(found: Summary) -> str:
    """A bar for every step, as long as it took."""
    longest = max(step["seconds"] for step in found.steps)
    rows = []
    for step in found.steps:
        parts = [
            f'<i class="{name}" style="flex:{step["shares"][name]:.5f}" title="{label(name, step["shares"])}"></i>'
            for name in CAUSES
            if step["shares"].get(name, 0) > 0
        ]
        width = 100 * step["seconds"] / longest
        rows.append(
            f"<span>step {step['step']}</span>"
            f'<div class="cells" style="width:{width:.1f}%">{"".join(parts)}</div><span>{time(step["seconds"])}</span>'
        )
    return f"""<section id="steps">
<h2>Step by step</h2>
<p>Equal steps are a good sign. One that is longer than the others shows in its colours what it waited for.</p>
<div class="steps">{"".join(rows)}</div>
</section>"""


def causes(found: Summary) -> str:
    """Every share in words, the greatest first; those without time in one line."""
    shares, step = found.shares, found.seconds / len(found.steps)
    parts = []
    for name in sorted((name for name in CAUSES if shares[name] > 0), key=shares.__getitem__, reverse=True):
        cause = CAUSES[name]
        faster = "" if name == "gemm" else f"<small>{gain(shares[name])}× as fast without</small>"
        parts.append(
            f'<div class="cause"><div><h3>{swatch(name)}{cause.title}</h3><b>{percent(shares[name])}</b>'
            f"<small>{time(shares[name] * step)} a step</small>{faster}</div>"
            f"<div><p>{cause.meaning}</p><p>{cause.remedy}</p></div></div>"
        )
    none = ", ".join(CAUSES[name].title.lower() for name in CAUSES if shares[name] <= 0)
    none = f'<p class="soft below">No time at all: {none}.</p>' if none else ""
    return f"""<section id="shares">
<h2>What each share is, and what to do about it</h2>
<p>Every instant of the recorded steps is counted once{rule(found)}. “As fast without” is the most that could be gained:
steps in which the share has vanished.</p>
{"".join(parts)}{none}
</section>"""


def rule(found: Summary) -> str:
    """How instants are counted."""
    if found.device == "cuda":
        return (
            ", for the kernel that the GPU ran, where several did for computation before copies and exchange; and "
            "where the GPU stood idle, for what it waited for"
        )
    return ", for the innermost operator that ran, or for what was waited for where none did"


def operators(found: Summary) -> str:
    """The table of operators."""
    seconds, count = found.seconds, len(found.steps)
    longest = max((row.seconds for row in found.operators), default=1.0)
    rows = "".join(operator(row, seconds, count, longest) for row in found.operators)
    what = "the time of its kernels" if found.device == "cuda" else "without what it called"
    return f"""<section id="operators">
<h2>Operators</h2>
<p>The {len(found.operators)} that took longest, by self time: {what}. Causes are told by name: batched products
(<code>bmm</code>, <code>baddbmm</code>) and <code>softmax</code> count as attention, which some devices compute so.</p>
<div class="scroll"><table class="operators"><thead><tr><th>operator</th><th>counts as</th>
<th class="number">a step</th><th class="number">share</th><th class="extra"></th><th class="number">calls</th></tr>
</thead>
<tbody>{rows}</tbody></table></div>
</section>"""


def operator(row: Operator, seconds: float, steps: int, longest: float) -> str:
    """One row of it; calls are those of a step."""
    return (
        f'<tr class="{row.share}"><td><code>{escape(row.name)}</code></td>'
        f"<td>{swatch(row.share)}{CAUSES[row.share].title.lower()}</td>"
        f'<td class="number">{time(row.seconds / steps)}</td><td class="number">{percent(row.seconds / seconds)}</td>'
        f'<td class="extra"><div class="bar"><i style="width:{100 * row.seconds / longest:.1f}%"></i></div></td>'
        f'<td class="number">{row.calls / steps:,.0f}</td></tr>'
    )


def facts(found: Summary) -> str:
    """What ran."""
    told = found.facts
    listed = {
        "Recipe": told["recipe"],
        "Device": device(found),
        "Precision": told["precision"] + (", compiled" if told["compile"] else ""),
        "Processes": f"{told['processes']}; this page is of the first",
        "Micro-batches": f"{told['micro']} a step; {told['recompute']} blocks computed again in the backward pass",
        "Loader workers": told["workers"],
        "Software": f"torch {told['torch']}",
    }
    terms = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in listed.items())
    return f'<section id="run"><h2>This run</h2><dl class="facts">{terms}</dl></section>'


def traces(found: Summary) -> str:
    """Where to look further."""
    return f"""<section id="trace">
<h2>The trace</h2>
<p>Every operator at its place in time, on every thread, is in <code>{escape(found.facts["trace"])}</code> beside this
page: drop it on <a href="https://ui.perfetto.dev">ui.perfetto.dev</a>. The step that warmed the recorder up is in it.
Recording costs a few microseconds per operator, which small models feel: trust the shares, and take step times from
<code>metrics.jsonl</code>. The figures of this page are in <code>summary.json</code>, for programs.</p>
</section>"""


# --------------------------------------------------------------------------------------------------------------- parts


def colours() -> str:
    """A class per cause that sets its colour."""
    light = "".join(f".{name}{{--cause:{cause.colour}}}" for name, cause in CAUSES.items())
    dark = "".join(f".{name}{{--cause:{cause.dark}}}" for name, cause in CAUSES.items())
    ink = ".stack i{color:#14171a}"
    return f"{light}\n@media (prefers-color-scheme: dark){{{dark}{ink}}}\n"


def swatch(name: str) -> str:
    """A square in a cause's colour."""
    return f'<span class="swatch {name}"></span>'


def label(name: str, shares: dict[str, float]) -> str:
    """A cause and its share in words."""
    return f"{CAUSES[name].title} {percent(shares[name])}"


def gain(share: float) -> str:
    """How many times as fast steps are without a share."""
    return f"{1 / (1 - min(share, 0.999)):.2f}"


def mean_step(found: Summary) -> float:
    """Seconds of a step, in the mean."""
    return sum(step["seconds"] for step in found.steps) / len(found.steps)


def time(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds >= 1:
        return f"{seconds:.2f}\u202fs"
    return f"{1000 * seconds:.1f}\u202fms" if seconds >= 0.001 else f"{1e6 * seconds:.0f}\u202fµs"


def device(found: Summary) -> str:
    """The device, with its threads where they matter."""
    told = found.facts
    threads = f", {told['threads']} thread{'s' * (told['threads'] > 1)}" if found.device == "cpu" else ""
    return told["device"] + threads
