"""The style of all plots of a report, and their conversion to inline SVG. Knows no figure."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

try:
    import matplotlib
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'memserve[plots]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
FAINT = "#d9dee4"
# Okabe and Ito's palette, which colour-blind readers tell apart, but for its yellow, which is too light.
SPARE = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#6A4C93", "#7F7F7F", "#4B4B4B")
MARKERS = "osD^vPX<>"
SETTINGS: Any = {
    # Text stays text; Verdana has DejaVu's widths, by which matplotlib lays out.
    "svg.fonttype": "none",
    "svg.hashsalt": "memserve",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ecf0",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Look:
    colour: str
    marker: str
    width: float = 1.6


KNOWN = {
    "colocated": Look("#9A9A9A", "o"),
    "colocated-cache": Look("#4B4B4B", "s"),
    "pd-basic": Look("#E69F00", "D"),
    "pd-caching-1": Look("#56B4E9", "^"),
    "pd-caching-2": Look("#0072B2", "v"),
    "pd-caching-3": Look("#009E73", "o", 2.6),
    "stock-pd": Look("#D55E00", "s"),
    "stock-pd-decode-cache": Look("#CC79A7", "P"),
    "stock-pd-hicache": Look("#6A4C93", "X"),
}


def look_of(name: str, others: Sequence[str] = ()) -> Look:
    """A system's own; of a name that is not known, by its place among `others`."""
    if name in KNOWN:
        return KNOWN[name]
    place = list(others).index(name) if name in others else 0
    return Look(SPARE[place % len(SPARE)], MARKERS[place % len(MARKERS)])


@contextmanager
def styled() -> Iterator[None]:
    with matplotlib.rc_context(SETTINGS):
        yield


def legend_above(figure: Figure, axes: Axes) -> None:
    """One for the whole figure, over the panels and outside of the data."""
    columns = int(figure.get_figwidth() // 1.9)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=min(columns, len(labels)), handlelength=1.8
    )


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """An <svg> element for the middle of a page: no declarations, no links, ids that begin with `name`."""
    file = io.StringIO()
    with styled():
        # Once here, and not for each of the drawings that savefig makes.
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'#([^"\)]+)["\)]', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    size = re.match(r'<svg[^>]*?width="([\d.]+)pt"', svg)
    width = f"{float(size[1]) * 4 / 3:.0f}px" if size else "100%"
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[\d.]+pt"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[\d.]+pt"', r"\1", svg)
    return svg.replace(
        "<svg", f'<svg role="img" aria-label="{label}" style="width:100%;max-width:{width}"', 1
    )
