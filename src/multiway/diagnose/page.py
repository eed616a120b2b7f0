"""The folder of a diagnosis: plots as PNG, figures as JSON, and one page with everything inside, for light and dark."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from multiway import report
from multiway.engine.log import CONSOLE
from multiway.errors import ConfigError, WriteError
from multiway.weights.io import write

WIDTH = 9.4
"""Inches of a plot that is as wide as the page, at 100 of the page's pixels."""
DPI = 160

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

FIGURES, PAGE = "figures.json", "report.html"


@dataclass(frozen=True)
class Ink:
    """Colours of a plot: words, lines, paper; of up to six ``series`` without order; ``ramp``: a colour map of sizes,
    from what is close to the paper to what is far from it.
    """

    text: str
    soft: str
    line: str
    paper: str
    series: tuple[str, ...]
    ramp: str

    def ordered(self, count: int) -> list[Any]:
        """So many colours of the ramp, all of them legible."""
        import matplotlib

        places = [0.35 + 0.6 * i / max(1, count - 1) for i in range(count)]
        return [matplotlib.colormaps[self.ramp](place) for place in places]


LIGHT = Ink("#1a1d21", "#5d6672", "#e2e5e9", "#ffffff",
            ("#2a62d6", "#d2601a", "#0e8f8a", "#7a4fc4", "#b83a86", "#6f7a87"), "viridis_r")  # fmt: skip
DARK = Ink("#e7e9ec", "#9aa4b0", "#333941", "#14171a",
           ("#7aa5ff", "#f59a5b", "#4fcdc4", "#b08cf5", "#ee8cc6", "#98a3b0"), "viridis")  # fmt: skip

Draw = Callable[[Any, Ink], None]
"""Draws on an empty `matplotlib.figure.Figure`."""

STYLE = """
.plot { margin: 1.4rem 0 .6rem; overflow-x: auto; }
.plot img { min-width: 36rem; border-radius: 0; }
.plot figcaption { font-size: .875rem; max-width: 44rem; }
.grid { font-size: .875rem; margin: 1rem 0; }
.grid th, .grid td { padding: .32rem .9rem .32rem 0; text-align: right; white-space: nowrap; }
.grid th { font-weight: 500; white-space: normal; vertical-align: bottom; }
.grid th:first-child, .grid td:first-child { text-align: left; white-space: normal; }
.grid tbody td { border-top: 1px solid var(--line); }
.grid .good { color: var(--right); font-weight: 600; }
.grid .bad { color: var(--wrong); font-weight: 600; }
.tile small { overflow-wrap: anywhere; }
.tile b small { display: inline; font-size: 1rem; font-weight: 400; letter-spacing: 0; }
"""


class Report:
    """One diagnosis being written to the folder ``out``.

    Raises ConfigError where matplotlib is not installed, before anything is computed; its methods WriteError when the
    disk refuses.
    """

    def __init__(self, out: Path) -> None:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise ConfigError('plots need matplotlib, which is not installed: pip install "multiway[plot]"') from error
        self.out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"{out}: cannot make the folder: {error.strerror}") from error

    def plot(self, name: str, draw: Draw, height: float, words: str, caption: str = "") -> str:
        """Draw ``name.png``, and the same for the page in both of its colours.

        ``height``: in inches, of WIDTH; ``words``: what a reader who does not see it is told; ``caption``: HTML.
        """
        self._file(f"{name}.png", _drawn(draw, height, LIGHT, "png"))
        light, dark = (_source("svg+xml", _drawn(draw, height, ink, "svg")) for ink in (LIGHT, DARK))
        wide = f'width="{100 * WIDTH:.0f}" height="{100 * height:.0f}"'
        told = f"<figcaption>{caption}</figcaption>" if caption else ""
        return (
            f'<figure class="plot"><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
            f'<img src="{light}" alt="{escape(words)}" {wide}></picture>{told}</figure>'
        )

    def finish(self, title: str, lead: str, sections: Sequence[str], figures: Mapping[str, Any], summary: str) -> Path:
        """Write figures and page, tell the ``summary``, and return the page's path; ``lead``, ``sections``: HTML."""
        self._file(FIGURES, (json.dumps(plain(figures), indent=2, allow_nan=False) + "\n").encode())
        head = f'<header><h1>{escape(title)}</h1><p class="lead">{lead}</p></header>'
        page = Template((Path(report.__file__).parent / "page.html").read_text(encoding="utf-8"))
        text = page.substitute(title=escape(title), body="\n".join([head, *sections]))
        self._file(PAGE, text.replace("</style>", f"{STYLE}</style>", 1).encode())
        CONSOLE.print(summary)
        return self.out / PAGE

    def _file(self, name: str, content: bytes) -> None:
        try:
            write(self.out / name, lambda path: path.write_bytes(content))
        except OSError as error:
            raise WriteError(f"{self.out / name}: cannot write: {error.strerror}") from error


def _drawn(draw: Draw, height: float, ink: Ink, form: str) -> bytes:
    """A drawing as a file: the same bytes for the same figures."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titlecolor": ink.text,
        "text.color": ink.text, "axes.labelcolor": ink.soft, "xtick.color": ink.soft, "ytick.color": ink.soft,
        "axes.edgecolor": ink.line, "axes.facecolor": ink.paper, "figure.facecolor": ink.paper, "grid.color": ink.line,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.labelcolor": ink.soft, "legend.fontsize": 9, "lines.linewidth": 1.8,
        "svg.hashsalt": "multiway",
    }  # fmt: skip
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = Figure((WIDTH, height), layout="constrained")
        draw(figure, ink)
        figure.savefig(buffer, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()


def _source(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# --------------------------------------------------------------------------------------------------------------- parts


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page; ``parts``: HTML."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def paragraph(html: str) -> str:
    """A paragraph of HTML."""
    return f"<p>{html}</p>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML, perhaps from `marked`."""
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="grid"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def marked(text: str, how: str) -> str:
    """A cell's text as ``good`` or ``bad``."""
    return f'<span class="{how}">{text}</span>'


def tiles(*found: tuple[str, str, str]) -> str:
    """The most telling figures: title, figure (HTML), and a remark each."""
    parts = (f'<div class="tile"><small>{a}</small><b>{b}</b><span>{c}</span></div>' for a, b, c in found)
    return f'<div class="tiles">{"".join(parts)}</div>'


def facts(named: Mapping[str, object]) -> str:
    """What would be needed to do it again."""
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in named.items())
    return section("facts", "How it was measured", f'<dl class="facts">{terms}</dl>')


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits; below a thousandth and from a million on with a power of ten."""
    if not math.isfinite(value):
        return "–"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    if -3 <= int(power) < 6:
        return f"{value:,.{max(0, digits - 1 - int(power))}f}"
    return f"{mantissa}·10{str(int(power)).translate(SUPERSCRIPT)}"


def logarithmic(axis: Any, told: Callable[[float], str] = "{:g}".format) -> None:
    """Make an axis logarithmic, with at least three labels where its range allows it; ``told``: a value as text."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = sorted(axis.get_view_interval())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        values = [step * 10.0**power for power in powers for step in steps]
        shown = [value for value in values if low <= value <= high]
        if len(shown) >= 3:
            break
    axis.set_ticks(shown, [told(value) for value in shown])
    axis.set_ticks([], minor=True)


def from_zero(axes: Any) -> None:
    """Begin the vertical axis at 0, with a little room above what is drawn."""
    axes.set_ylim(0, 1.06 * axes.dataLim.y1)


def plain(value: Any) -> Any:
    """Figures as JSON has them: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
