"""Figures of the documentation. What each shows is computed first, from the committed files, and its hash stands in the
image: a test can tell whether the image shows what the files say, though no two versions of matplotlib draw alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Run

Data = dict[str, Any]
OWN, OTHER = "#c2410c", "#94a3b8"
PHASES = {"forward": "#cbd5e1", "backwards": "#94a3b8", "exposed balancing": OWN}
LINES = ("#64748b", "#0f766e", "#7c3aed", "#2563eb", "#a16207")
DATA_KEY = "Data"


def of_run(run: Run) -> dict[str, Data]:
    """File name -> what the figure shows, for all that the run has the tables of."""
    found = {}
    if any(table["floor"] for table in run.tables):
        found["steps"] = steps(run)
    if any(table["megabytes"] for table in run.of_kind("memory")):
        found["memory"] = memory(run)
    if any(table["bytes_moved"] and table["copy"] and not table["floor"] for table in run.tables):
        found["roofline"] = roofline(run)
    for along in ("P", "T"):
        if run.of_kind("growth", series=along):
            found[f"growth-{along}"] = growth(run, along)
    return {f"{run.name}-{name}": data for name, data in found.items()}


def steps(run: Run) -> Data:
    """Milliseconds of each way to do the step: forward, backwards, and what balancing adds to both.

    The backwards are the floor's, which drops gradients in a hook; what is faster than it by chance adds nothing.
    """
    problems = {}
    for table in run.of_kind("step"):
        floor, forward = table["floor"], table["facts"].get("forward")
        first = table.seconds(forward) if forward in table["candidates"] else 0.0
        bars: dict[str, dict[str, float]] = {}
        for name in table["candidates"]:
            if name in (table["copy"], forward):
                continue
            if name == table["facts"].get("one"):
                parts = (first, table.seconds(name) - first, 0.0)
            else:
                added = table.median(lambda own, bare: own - bare, name, floor)
                parts = (first, table.seconds(floor) - first, added)
            bars[name] = {phase: round(1e3 * max(0.0, part), 3) for phase, part in zip(PHASES, parts, strict=True)}
        problems[table["title"].removeprefix("step: ")] = {"own": table["facts"].get("own"), "bars": bars}
    return {"problems": problems}


def memory(run: Run) -> Data:
    """Megabytes in tensors at the peak."""
    problems = {}
    for table in run.of_kind("memory"):
        peaks = {name: round(of["tensors"], 1) for name, of in table["megabytes"].items()}
        problems[table["title"].removeprefix("memory: ")] = {"own": table["facts"].get("own"), "bars": peaks}
    return {"problems": problems}


def roofline(run: Run) -> Data:
    """Share of copy bandwidth: the time of copying the least that must be moved, over that of doing the work."""
    problems = {}
    for table in run.tables:
        if table["kind"] in ("balance", "lists", "") and table["bytes_moved"] and table["copy"]:
            names = [name for name in table["candidates"] if name != table["copy"]]
            shares = {name: round(table.ratio(table["copy"], name), 3) for name in names}
            problems[table["title"]] = {"own": table["ratio_to"], "bars": shares}
    return {"problems": problems}


def growth(run: Run, along: str) -> Data:
    """Seconds along ``"P"`` or ``"T"``."""
    tables = run.of_kind("growth", series=along)
    lines: dict[str, list[list[float]]] = {}
    for table in tables:
        for name in table["candidates"]:
            point = [table["facts"][along], float(f"{table.seconds(name):.4g}")]
            lines.setdefault(name, []).append(point)
    fixed = "T" if along == "P" else "P"
    own, copy = tables[0]["ratio_to"], tables[0]["copy"]
    return {
        "along": along,
        "fixed": f"{fixed} = {tables[0]['facts'][fixed]:,}",
        "own": own,
        "copy": copy,
        "lines": lines,
    }


def hash_of(data: Data) -> str:
    """Of what a figure shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw(data: Mapping[str, Data], folder: Path) -> list[Path]:
    """Write each figure whose image does not show its data yet; one that is to look different is deleted first.

    :returns: Those written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130}
    written = []
    for name, shown in data.items():
        path = folder / f"{name}.png"
        if shown_in(path) == hash_of(shown):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with pyplot.rc_context(style):
            figure = _drawer(name)(shown)
            figure.savefig(path, metadata={DATA_KEY: hash_of(shown), "Software": None}, bbox_inches="tight")
            pyplot.close(figure)
        written.append(path)
    return written


def shown_in(path: Path) -> str | None:
    """The hash of the data that an image was drawn from, None if there is no image."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(DATA_KEY)


def _drawer(name: str) -> Callable[[Data], Any]:
    kind = name.split("-")[1]
    return {"steps": _draw_steps, "memory": _draw_memory, "roofline": _draw_roofline, "growth": _draw_growth}[kind]


def _draw_steps(data: Data) -> Any:
    from matplotlib import pyplot

    def bars(axes: Any, place: int, parts: Mapping[str, float], own: bool) -> None:
        start = 0.0
        for phase, part in parts.items():
            axes.barh(place, part, left=start, color=PHASES[phase], height=0.72)
            start += part
        axes.text(start, place, f" {_number(start)}", va="center", fontsize=8)

    figure, _ = _panels(data, bars, "milliseconds a step")
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in PHASES.values()]
    figure.legend(patches, PHASES, frameon=False, loc="outside upper right", ncols=len(PHASES), fontsize=8)
    return figure


def _draw_memory(data: Data) -> Any:
    return _panels(data, _bar, "MB in tensors at the peak")[0]


def _draw_roofline(data: Data) -> Any:
    figure, every = _panels(data, _bar, "share of copy bandwidth")
    for axes in every:
        axes.axvline(1.0, color="#334155", linewidth=0.8, linestyle=":")
    return figure


def _bar(axes: Any, place: int, value: float, own: bool) -> None:
    axes.barh(place, value, color=OWN if own else OTHER, height=0.72)
    axes.text(value, place, f" {_number(value)}", va="center", fontsize=8)


def _panels(data: Data, bar: Callable[..., None], unit: str) -> tuple[Any, Sequence[Any]]:
    """Horizontal bars, a panel for each problem below the other."""
    from matplotlib import pyplot

    problems = data["problems"]
    heights = [len(problem["bars"]) + 1.6 for problem in problems.values()]
    figure, grid = pyplot.subplots(
        len(problems), figsize=(7.2, 0.23 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    every = [row[0] for row in grid]
    for axes, (title, problem) in zip(every, problems.items(), strict=True):
        for place, (name, value) in enumerate(problem["bars"].items()):
            bar(axes, place, value, name == problem["own"])
        axes.set_yticks(range(len(problem["bars"])), list(problem["bars"]))
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() == problem["own"] else "normal")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(title, loc="left", fontsize=9)
    every[-1].set_xlabel(unit)
    return figure, every


def _draw_growth(data: Data) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    colors = iter(LINES)
    for name, points in data["lines"].items():
        own, copy = name == data["own"], name == data["copy"]
        look: dict[str, Any] = {"color": OWN, "linewidth": 2.0} if own else {"color": next(colors), "linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), marker="" if copy else "o", markersize=4, label=name, **look)
        axes.lines[-1].set_linestyle(":" if copy else "-")
    axes.set(xscale="log", yscale="log", xlabel=f"{data['along']} ({data['fixed']})", ylabel="seconds a call")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _number(value: float) -> str:
    """With three digits, and no exponent where there are more."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
