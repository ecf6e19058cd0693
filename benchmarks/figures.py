"""Figures of the documentation. What each shows is computed first, from the committed files, and its hash stands in the
image: a test can tell whether the image shows what the files say, though no two versions of matplotlib draw alike.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Run, Study, Table, paired

Data = dict[str, Any]
OWN, OTHER = "#c2410c", "#94a3b8"
FORWARD, BEYOND = "forward", "beyond the floor"
UNBALANCED, UP_TO = "loops that balance nothing", "up to the floor"
PHASES = {FORWARD: "#cbd5e1", UNBALANCED: "#475569", UP_TO: OTHER, BEYOND: OWN}
LINES = ("#64748b", "#0f766e", "#7c3aed", "#2563eb", "#a16207")
DATA_KEY = "Data"
OWN_METHOD = "DB-MTL"


def of_run(run: Run) -> dict[str, Data]:
    """File name -> what the figure shows, for all that the run has the tables of."""
    found = {}
    if run.of_kind("step"):
        found["steps"] = steps(run)
    if run.of_kind("memory"):
        found["memory"] = memory(run)
    for name, tables in {
        "roofline": [*run.of_kind("balance"), *run.operators()],
        "lists": run.of_kind("lists"),
    }.items():
        if tables:
            found[name] = roofline(tables)
    for along in ("P", "T"):
        if run.of_kind("growth", series=along):
            found[f"growth-{along}"] = growth(run, along)
    trained = run.stages.get("train", {}).get("data") or {}
    if "curves" in trained:
        found["training"] = training(trained)
    return {f"{run.name}-{name}": {"hardware": run.hardware, **data} for name, data in found.items()}


def of_all(runs: Sequence[Run], studies: Sequence[Study]) -> dict[str, Data]:
    """The same of all runs, and of the studies that have curves."""
    found = {name: data for run in runs for name, data in of_run(run).items()}
    for study in studies:
        if "curves" in study.content:
            found[f"{study.name}-training"] = {"hardware": study.content["machine"], **training(study.content)}
    return found


def steps(run: Run) -> Data:
    """Milliseconds of each way to do the step. All bars end at the candidate's own median, as in the tables.

    Loops that balance nothing have a colour of their own. Of all others, what is longer than the floor, the one that
    drops gradients in a hook, stands out.
    """
    problems = {}
    for table in run.of_kind("step"):
        facts, floor = table["facts"], table.seconds(table["floor"])
        forward = table.seconds(facts["forward"]) if facts.get("forward") in table["candidates"] else 0.0
        unbalanced = (facts.get("one"), table["floor"], table["ratio_to"])
        bars: dict[str, dict[str, float]] = {}
        for name in table["candidates"]:
            if name in (table["copy"], facts.get("forward")):
                continue
            total = table.seconds(name)
            ends = {FORWARD: forward, UNBALANCED: total}
            if name not in unbalanced:
                ends = {FORWARD: forward, UP_TO: min(floor, total), BEYOND: total}
            bars[name] = _lengths(ends)
        problems[table["title"].removeprefix("step: ")] = {"own": facts.get("own"), "bars": bars}
    return {"problems": problems}


def _lengths(ends: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds between ends in seconds, of the parts that have a length."""
    pairs = zip(ends, itertools.pairwise([0.0, *ends.values()]), strict=True)
    lengths = {name: round(1e3 * (end - start), 3) for name, (start, end) in pairs}
    return {name: length for name, length in lengths.items() if length > 0}


def memory(run: Run) -> Data:
    """Megabytes in tensors at the peak."""
    problems = {}
    for table in run.of_kind("memory"):
        peaks = {name: round(of["tensors"], 1) for name, of in table["megabytes"].items()}
        problems[table["title"].removeprefix("memory: ")] = {"own": table["facts"].get("own"), "bars": peaks}
    return {"problems": problems}


def roofline(tables: Sequence[Table]) -> Data:
    """Share of copy bandwidth: the time of copying the least that must be moved, over that of doing the work."""
    problems = {}
    for table in tables:
        names = [name for name in paired(table["candidates"]) if name != table["copy"]]
        shares = {name: round(table.ratio(table["copy"], name), 3) for name in names}
        problems[table["title"].removeprefix("lists: ")] = {"own": table["ratio_to"], "bars": shares}
    return {"problems": problems}


def growth(run: Run, along: str) -> Data:
    """Seconds along ``"P"`` or ``"T"``: lower quartile, median, upper quartile."""
    tables = run.of_kind("growth", series=along)
    lines: dict[str, list[list[float]]] = {}
    for table in tables:
        for name in table["candidates"]:
            spread = table.quartiles(lambda own: own, name)
            lines.setdefault(name, []).append([table["facts"][along], *(float(f"{value:.4g}") for value in spread)])
    fixed = "T" if along == "P" else "P"
    return {
        "along": along,
        "fixed": f"{fixed} = {tables[0]['facts'][fixed]:,}",
        "own": tables[0]["ratio_to"],
        "copy": tables[0]["copy"],
        "lines": lines,
    }


def training(content: Mapping[str, Any]) -> Data:
    """Training losses as ``examples/qm9.py`` leaves them, of each method: at every point their geometric mean."""
    lines = {}
    for name, curves in content["curves"].items():
        points = zip(*curves.values(), strict=True)
        lines[name] = [float(f"{statistics.geometric_mean(losses):.4g}") for losses in points]
    return {"steps_per_point": content["steps_per_point"], "own": OWN_METHOD, "lines": lines}


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
    kinds = {"steps": _draw_steps, "memory": _draw_memory, "roofline": _draw_roofline, "lists": _draw_roofline}
    return {**kinds, "growth": _draw_growth, "training": _draw_training}[name.split("-")[1]]


def _draw_steps(data: Data) -> Any:
    from matplotlib import pyplot

    def bars(axes: Any, place: int, parts: Mapping[str, float], own: bool) -> None:
        start = 0.0
        for phase, part in parts.items():
            axes.barh(place, part, left=start, color=PHASES[phase], height=0.72)
            start += part
        _label(axes, place, start)

    figure, _ = _panels(data, bars, "A training step", "milliseconds")
    drawn = {phase for problem in data["problems"].values() for parts in problem["bars"].values() for phase in parts}
    patches = {phase: pyplot.Rectangle((0, 0), 1, 1, color=color) for phase, color in PHASES.items() if phase in drawn}
    figure.legend(patches.values(), patches, frameon=False, loc="outside lower center", ncols=len(patches), fontsize=8)
    return figure


def _draw_memory(data: Data) -> Any:
    return _panels(data, _bar, "Peak memory of a step", "MB in tensors, by the allocator's record")[0]


def _draw_roofline(data: Data) -> Any:
    figure, every = _panels(data, _bar, "Beside a copy of as many bytes", "share of copy bandwidth", same_range=True)
    for axes in every:
        line = axes.axvline(1.0, color="#334155", linewidth=0.8, linestyle=":")
    figure.legend([line], ["as fast as the copy"], frameon=False, loc="outside lower center", fontsize=8)
    return figure


def _bar(axes: Any, place: int, value: float, own: bool) -> None:
    axes.barh(place, value, color=OWN if own else OTHER, height=0.72)
    _label(axes, place, value)


def _label(axes: Any, place: int, value: float) -> None:
    """Beside a bar, on white: no line goes through it."""
    look = {"va": "center", "fontsize": 8, "zorder": 3, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.8}}
    axes.annotate(_number(value), (value, place), xytext=(3, 0), textcoords="offset points", **look)


def _panels(
    data: Data, bar: Callable[..., None], title: str, unit: str, *, same_range: bool = False
) -> tuple[Any, Sequence[Any]]:
    """Horizontal bars, a panel for each problem below the other."""
    from matplotlib import pyplot

    problems = data["problems"]
    heights = [len(problem["bars"]) + 1.6 for problem in problems.values()]
    size: dict[str, Any] = {
        "figsize": (7.2, 0.23 * sum(heights) + 0.6),
        "height_ratios": heights,
        "layout": "constrained",
    }
    figure, grid = pyplot.subplots(len(problems), squeeze=False, sharex=same_range, **size)
    every = [row[0] for row in grid]
    for axes, (name, problem) in zip(every, problems.items(), strict=True):
        for place, (candidate, value) in enumerate(problem["bars"].items()):
            bar(axes, place, value, candidate == problem["own"])
        axes.set_yticks(range(len(problem["bars"])), list(problem["bars"]))
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() == problem["own"] else "normal")
        axes.set_ylim(len(problem["bars"]) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_xlabel(unit, fontsize=8)
        if same_range:
            axes.label_outer()
    figure.suptitle(_title(data, title), fontsize=9)
    return figure, every


def _title(data: Data, title: str) -> str:
    return f"{title}: {data['hardware']}"


def _draw_growth(data: Data) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    colors = iter(LINES)
    for name, points in data["lines"].items():
        own, copy = name == data["own"], name == data["copy"]
        look: dict[str, Any] = {"color": OWN, "linewidth": 2.0} if own else {"color": next(colors), "linewidth": 1.2}
        along, q1, median, q3 = zip(*points, strict=True)
        axes.plot(along, median, ":" if copy else "-", marker="" if copy else "o", markersize=4, label=name, **look)
        axes.fill_between(along, q1, q3, color=look["color"], alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=f"{data['along']} ({data['fixed']})", ylabel="seconds a call")
    if data["along"] == "T":
        measured = sorted({point[0] for points in data["lines"].values() for point in points})
        axes.set_xticks(measured, [str(T) for T in measured])
        axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)
    axes.set_title(_title(data, "balance_, medians and quartiles"), fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_training(data: Data) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    colors = iter(LINES)
    for name, losses in data["lines"].items():
        own, twin = name == data["own"], name.startswith(f"{data['own']} ")
        look: dict[str, Any] = {"color": OWN, "linewidth": 2.5} if own else {"color": next(colors), "linewidth": 1.2}
        steps = [data["steps_per_point"] * (index + 1) for index in range(len(losses))]
        # What is to do the same as ours lies on top of it: it would hide it, were it not broken.
        axes.plot(steps, losses, "--" if twin else "-", label=name, zorder=3 if twin else 2, **look)
    axes.set(yscale="log", xlabel="step", ylabel="training loss, geometric mean over tasks")
    axes.grid(alpha=0.25)
    axes.set_title(_title(data, f"QM9, means of {data['steps_per_point']} steps"), fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _number(value: float) -> str:
    """With three digits, and no exponent where there are more."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
