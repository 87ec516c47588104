"""Plots of a simulation, as PNG files. Only this module imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from memserve.core.errors import ConfigError
from memserve.simulation.report import first_token_times, imbalance
from memserve.simulation.simulation import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_SLICES = 40
"""Number of pieces of equal time that a run is cut into."""


def check_plots(folder: Path) -> None:
    """Create `folder` if needed. Raises ConfigError if plots cannot be drawn into it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plots needs matplotlib: pip install 'memserve[plots]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plots {folder}: {error.strerror}") from error


def draw_plots(outcome: Outcome, folder: Path) -> list[Path]:
    """Write every plot that the outcome has data for into `folder`, and return the paths.

    Raises ConfigError as `check_plots`.
    """
    check_plots(folder)
    plots: dict[str, Callable[[Axes, Outcome], None]] = {
        "hit_ratio": _hit_ratio,
        "imbalance": _imbalance,
    }
    if outcome.config.timed:
        plots |= {"ttft": _ttft, "fetches": _fetches}
    return [_draw(outcome, folder / f"{name}.png", plot) for name, plot in plots.items()]


def _draw(outcome: Outcome, path: Path, plot: Callable[[Axes, Outcome], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_title(f"{outcome.config.policy}, {outcome.config.instances} instances")
    plot(axes, outcome)
    figure.savefig(path, dpi=120)
    return path


def _slices(outcome: Outcome) -> tuple[list[float], list[list[int]]]:
    """The middle of each time slice in minutes, and the numbers of the requests that arrived in it."""
    requests = outcome.trace.requests
    begin_s, width_s = requests[0].arrival_s, (outcome.trace.duration_s or 1.0) / NUM_SLICES
    members: list[list[int]] = [[] for _ in range(NUM_SLICES)]
    for request in requests:
        members[min(int((request.arrival_s - begin_s) / width_s), NUM_SLICES - 1)].append(request.number)
    scale = width_s / outcome.config.speed / 60
    return [(i + 0.5) * scale for i in range(NUM_SLICES)], members


def _hit_ratio(axes: Axes, outcome: Outcome) -> None:
    minutes, members = _slices(outcome)
    ideal = list(outcome.trace.ideal_depths())
    for label, depths in (("ideal", ideal), ("achieved", [job.hit_blocks for job in outcome.jobs])):
        shares = [
            sum(depths[i] for i in numbers)
            / max(sum(len(outcome.trace.requests[i].keys) for i in numbers), 1)
            for numbers in members
        ]
        axes.plot(minutes, shares, label=label)
    axes.set(xlabel="minutes", ylabel="share of blocks found cached", ylim=(0, None))
    axes.legend()


def _imbalance(axes: Axes, outcome: Outcome) -> None:
    minutes, members = _slices(outcome)
    values = []
    for numbers in members:
        work = dict.fromkeys(outcome.prefills, 0)
        for i in numbers:
            work[outcome.jobs[i].prefill] += outcome.jobs[i].work_tokens
        values.append(imbalance(list(work.values())))
    axes.plot(minutes, values)
    axes.set(xlabel="minutes", ylabel="computed tokens: most / mean", ylim=(1, None))


def _ttft(axes: Axes, outcome: Outcome) -> None:
    times = sorted(first_token_times(outcome))
    shares = [(i + 1) / len(times) for i in range(len(times))]
    axes.plot(times, shares)
    axes.set(xlabel="seconds to the first token", ylabel="share of requests", xscale="log", ylim=(0, 1))


def _fetches(axes: Axes, outcome: Outcome) -> None:
    minutes, members = _slices(outcome)
    width = minutes[1] - minutes[0]
    tokens = outcome.trace.block_tokens
    fetched = [sum(outcome.jobs[i].fetched_blocks for i in numbers) * tokens for numbers in members]
    axes.bar(minutes, fetched, width=width)
    axes.set(xlabel="minutes", ylabel="tokens fetched from other instances")
