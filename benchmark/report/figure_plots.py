"""Plots of single figures: a line where names differ by a number, bars where they stand side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter

from report.evidence import Figure
from report.measures import number
from report.style import inline_svg, look_of, styled

# A number of its own: not that of p99 or eq2.
NUMBERED = re.compile(r"^(|\D*[^a-zA-Z\d])(\d+(?:\.\d+)?)([KMG]?)(.*)$")
FACTORS = {"": 1.0, "K": 1024.0, "M": 1024.0**2, "G": 1024.0**3}
CROWD = 4
MOST_LINES = 8
MOST_BARS = 14


class Point(NamedTuple):
    """Where a figure stands on a line: the line's name, with `*` for the number, and the number."""

    line: str
    x: float


def point_of(name: str) -> Point | None:
    """By the last part between slashes that has a number; None if no part has one."""
    parts = name.split("/")
    for place in reversed(range(len(parts))):
        if found := NUMBERED.match(parts[place]):
            before, digits, factor, after = found.groups()
            pattern = f"{before}*{after}"
            return Point(
                "/".join([*parts[:place], pattern, *parts[place + 1 :]]), float(digits) * FACTORS[factor]
            )
    return None


def lines_of(figures: Iterable[Figure]) -> dict[str, list[tuple[float, Figure]]]:
    """Figures by the line they are on; lines have at least three points, in order, of one unit."""
    lines: dict[str, dict[float, Figure]] = {}
    for figure in figures:
        if figure.value is not None and (point := point_of(figure.short)):
            lines.setdefault(f"{point.line}|{figure.unit}", {})[point.x] = figure
    return {
        line.rpartition("|")[0]: sorted(points.items(), key=lambda one: one[0])
        for line, points in lines.items()
        if len(points) > 2
    }


def figure_plots(part: str, figures: Sequence[Figure]) -> list[str]:
    """SVG of all that can be drawn of a part; tables have the rest."""
    lines = lines_of(figures)
    drawn = {figure.name for points in lines.values() for _, figure in points}
    panels = [*_line_panels(lines), *_bar_panels([one for one in figures if one.name not in drawn])]
    return [_row(part, nth, panels[nth : nth + 2]) for nth in range(0, len(panels), 2)]


class Panel(NamedTuple):
    title: str
    unit: str
    lines: dict[str, list[tuple[float, Figure]]]
    """Empty: bars."""
    bars: list[Figure]


def _line_panels(lines: dict[str, list[tuple[float, Figure]]]) -> list[Panel]:
    """Lines that begin alike, over the same kind of number, in one unit, share a panel.

    Where that would be a crowd, only those that end alike do.
    """
    kinds: dict[tuple[object, ...], list[str]] = {}
    for line, points in lines.items():
        parts = line.split("/")
        place = next(place for place, part in enumerate(parts) if "*" in part)
        kinds.setdefault((parts[0], place, parts[place], points[0][1].unit), []).append(line)
    groups: list[list[str]] = []
    for kind in kinds.values():
        ends: dict[str, list[str]] = {}
        for line in kind:
            ends.setdefault(line.rpartition("/")[2] if len(kind) > CROWD else "", []).append(line)
        groups += [
            names[n : n + MOST_LINES] for names in ends.values() for n in range(0, len(names), MOST_LINES)
        ]
    found = []
    for names in groups:
        title, short = _shared(names)
        unit = lines[names[0]][0][1].unit
        found.append(Panel(title, unit, {short[name]: lines[name] for name in names}, []))
    return found


def _bar_panels(figures: Iterable[Figure]) -> list[Panel]:
    """By what names begin with and unit; those that are alone in that, with each other."""
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        if figure.value is not None and "/" in figure.short:
            groups.setdefault((figure.short.split("/")[0], figure.unit), []).append(figure)
    alone = [some[0] for some in groups.values() if len(some) == 1]
    kept = {head_unit: some for head_unit, some in groups.items() if len(some) > 1}
    for figure in alone:
        kept.setdefault((figure.part, figure.unit), []).append(figure)
    return [
        Panel(head, unit, {}, some[n : n + MOST_BARS])
        for (head, unit), some in kept.items()
        if len(some) > 1
        for n in range(0, len(some), MOST_BARS)
    ]


def _shared(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What all names have in common, and what is each one's own."""
    split = [name.split("/") for name in names]
    if len(names) == 1 or len({len(parts) for parts in split}) > 1:
        return (names[0] if len(names) == 1 else split[0][0]), {name: name for name in names}
    same = [len(set(column)) == 1 for column in zip(*split, strict=True)]
    title = "/".join(part if alike else "…" for part, alike in zip(split[0], same, strict=True))
    own = {
        name: "/".join(part for part, alike in zip(parts, same, strict=True) if not alike)
        for name, parts in zip(names, split, strict=True)
    }
    return title, own


def _row(part: str, nth: int, panels: Sequence[Panel]) -> str:
    tallest = max(max(len(panel.bars) * 0.28 + 1.0, 2.9) for panel in panels)
    with styled():
        canvas = Canvas(figsize=(12.4, tallest), layout="constrained")
        grid = canvas.subplots(1, 2, squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=False):
            if panel.lines:
                _draw_lines(axes, panel)
            else:
                _draw_bars(axes, panel)
        for axes in grid[len(panels) :]:
            axes.remove()
        label = "; ".join(panel.title for panel in panels).replace('"', "")
        return inline_svg(canvas, f"figures-{part}-{nth}", f"{part}: {label}")


def _draw_lines(axes: Axes, panel: Panel) -> None:
    for name, points in panel.lines.items():
        look = look_of(name, list(panel.lines))
        values = [float(figure.value or 0) for _, figure in points]
        axes.plot(
            [x for x, _ in points], values, color=look.colour, marker=look.marker, markersize=4.5, label=name
        )
    numbers = sorted({x for points in panel.lines.values() for x, _ in points})
    if numbers[0] > 0 and numbers[-1] >= 10 * numbers[0]:
        axes.set_xscale("log")
    axes.set_xticks(
        numbers[:: 1 + len(numbers) // 8], [f"{x:,.6g}" for x in numbers[:: 1 + len(numbers) // 8]]
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    values = [float(f.value or 0) for points in panel.lines.values() for _, f in points]
    if min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, *values))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set(title=panel.title, ylabel=panel.unit)
    if len(panel.lines) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5)


def _draw_bars(axes: Axes, panel: Panel) -> None:
    figures = panel.bars[::-1]
    names = [figure.short.removeprefix(f"{panel.title}/") for figure in figures]
    values = [float(figure.value or 0) for figure in figures]
    axes.barh(names, values, color="#0072B2", height=0.62)
    for place, figure in enumerate(figures):
        if figure.baseline is not None:
            axes.plot([figure.baseline] * 2, [place - 0.4, place + 0.4], color="#D55E00", linewidth=2)
        axes.annotate(
            number(values[place]),
            (values[place], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            clip_on=False,
        )
    axes.set(title=f"{panel.title}, {panel.unit}")
    if min(values) > 0 and max(values) > 100 * min(values):
        axes.set_xscale("log")
    axes.grid(False, axis="y")
    if any(figure.baseline is not None for figure in figures):
        axes.set_xlabel("mark: the baseline")
