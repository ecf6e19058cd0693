"""``docs/benchmarks.md`` and the tables of the README, made from the files in ``benchmarks/results``."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks import figures, growth
from benchmarks.report import environment_to_text
from benchmarks.results import Run, Table
from benchmarks.timing import Quartiles

BEGIN, END = "<!-- begin: python -m benchmarks.report -->", "<!-- end: python -m benchmarks.report -->"
NO_GPU = "No GPU figures yet: `make gpu` and `make bench ARGS='--device cuda'` take them on a machine that has one."

INTRODUCTION = """# Benchmarks

Made by `python -m benchmarks.report` from the files in `benchmarks/results`, raw samples and all; no number is typed by
hand. `make bench` takes the same on your machine.

* Candidates take turns, and every ratio is formed within a round: a machine that slows down for a minute slows all of
  them. Tables give medians.
* What is timed is checked first: operators against float64, steps by the gradients they leave after some steps, against
  gradients balanced in float64. (UPGrad and MGDA compute something else and are there for scale.) *Error* is the
  largest difference found, as a share of the largest entry; the worst of it, on CPUs, are the norms that torch computes
  of long float32 rows.
* *Copy* moves as many bytes as the work must read and write at the least: `(4T + 1) P` numbers ([design](design.md)).
* LibMTL's way is written from what LibMTL does; TorchJD is the package from PyPI, with an aggregator that computes
  DB-MTL from its Jacobian.
"""

STEPS = """A step is forward and backward passes and balancing, without the optimizer. The ways to do the MLP's have
each a process of its own, those of longer steps share one; all processes are replaced now and then. *Exposed balancing*
is what a step takes beyond a loop of T backward passes that drops each gradient in a hook, formed within each round,
with its quartiles: where they reach from below zero to above it, the step is too long for the balancing to show. The
figure's grey parts are that loop's; equal weighting has one backward pass."""

READY = """On a ready `T × P` matrix of gradients. Share is that of copy bandwidth: the time of the copy over the own
time; above 1 where data stays in cache."""

LISTS = """From lists of gradients of real models' shapes, as autograd leaves them, to `.grad`, flattening and writing
back included. `DBMTL` gets them through torch's engine, from backward passes that cost nothing."""

DEPARTURES = """The model is the bytes that must move at copy bandwidth: `4T + 1` vectors of `P` numbers for `balance_`,
`5T + 1` for tight eager, `14T − 1` for LibMTL's expression. Fitted beyond the caches, by least squares of relative
errors. Where times depart from it:

* Small `P`: what Python, the checks of the arguments and the dispatcher take does not depend on size.
* In between the state fits a cache, and everything is faster than memory allows.
* LibMTL's expression allocates its temporaries anew in every call, and large blocks come from the system page by page:
  the kernel zeroes each, which is traffic that the model does not count.
* `balance_` is faster than the copy: it reads three numbers for each that it writes, the copy one, and writing costs
  memory more. It also finds what phase 1 touched last in the cache.
* Few tasks: the `+ 1`, writing the sum, is a larger part, and is no part of the slope along `T`."""


def readme(runs: Sequence[Run]) -> str:
    """What stands between the markers of the README."""
    run = runs[0]
    (table,) = run.of_kind("step")[:1]
    memory = run.of_kind("memory")[0]["megabytes"]
    bars = {bar["name"].split(": ")[-1]: bar for bar in table["bars"]}
    floor, own = table["ratio_to"], table["facts"]["own"]
    bare = memory[floor]["tensors"]
    names = [name for name in table["candidates"] if name in memory and name != table["floor"]]
    rows = []
    for name in sorted(names, key=table.seconds):
        mark = "**" if name == own else ""
        over = "" if name == floor else f"{mark}{memory[name]['tensors'] - bare:.0f} MB{mark}"
        label = {floor: "bare loop", own: "`balancer.backward(losses)`"}.get(name, name)
        cells = (label, milliseconds(table.seconds(name)), times(table.ratio(name, floor)))
        rows.append([*(f"{mark}{cell}{mark}" for cell in cells), over])
    share = next(bar["median"] for name, bar in bars.items() if name.startswith("added to"))
    machine = run.found["machine"]
    parts = [
        f"{machine['threads']} threads of {machine['cpu']}, {run.found['versions']['capability']}, fp32, from "
        f"[`benchmarks/{run.path}`](benchmarks/{run.path}); `make bench` measures yours. Every candidate is checked to "
        "give the same answer before it is timed. All tables, figures and how cost grows: "
        f"[docs/benchmarks.md](docs/benchmarks.md). {NO_GPU if _only_cpus(runs) else ''}",
        f"A training step without the optimizer ({table['title'].removeprefix('step: ')}), against a bare loop of T "
        "backward passes that throws the gradients away:",
        markdown(["", "step", "/ bare loop", "peak memory over it"], rows),
        f"Against a loop that drops each gradient on arrival it adds {share:.2g} of the time that moving `(4T + 1) P` "
        "numbers takes at 0.8 of copy bandwidth. What a bare loop loses is that it holds whole gradients, which malloc "
        "gives back to the system after each pass.",
        "`balance_` on a ready `T × P` gradient matrix, and what others take:",
        _ready(run),
    ]
    return "\n\n".join(part if part.startswith("|") else wrapped(part) for part in parts)


def _ready(run: Run) -> str:
    tables = run.of_kind("balance")
    others = [name for name in tables[0]["candidates"] if name not in (tables[0]["copy"], tables[0]["ratio_to"])]
    others = [name for name in others if name != "dbmtl_fused reference"]
    rows = []
    for table in tables:
        facts, own = table["facts"], table["ratio_to"]
        cells = [f"{facts['T']}, {numbers(facts['P'])}", seconds(table.seconds(own))]
        rows.append([*cells, *(f"{times(table.ratio(name, own))} ×" for name in others if name in table["candidates"])])
    return markdown(["T, P", "`balance_`", *others], rows)


def page(runs: Sequence[Run]) -> str:
    """All of ``docs/benchmarks.md``."""
    parts = [INTRODUCTION.rstrip()]
    for run in runs:
        parts += _run(run)
    if _only_cpus(runs):
        parts += ["## GPU", NO_GPU]
    return "\n\n".join(parts) + "\n"


def _only_cpus(runs: Sequence[Run]) -> bool:
    return all(run.name.startswith("cpu") for run in runs)


def _run(run: Run) -> Iterator[str]:
    device = run.found.get("device", "cpu")
    if device == "cpu":
        device = run.found["machine"]["cpu"]
    yield f"## {device if isinstance(device, str) else device['name']}"
    yield f"`benchmarks/{run.path}`, {run.found['date'][:10]}:\n\n```\n{environment_to_text(run.found)}\n```"
    yield "### Bars"
    yield _bars(run)
    shown = figures.of_run(run)
    sections: list[tuple[str, str, str, Callable[[Run], Iterator[str]], str]] = [
        ("Whole steps", "steps", STEPS, _of_steps, "step"),
        ("Peak memory", "memory", "Of a step, the model's own included.", _of_memory, "memory"),
        ("A ready gradient matrix", "roofline", READY, _of_balance, "balance"),
        ("Real lists of gradients", "", LISTS, _of_lists, "lists"),
        ("How cost grows", "", DEPARTURES, _of_growth, "growth"),
    ]
    for title, figure, text, tables, kind in sections:
        if run.of_kind(kind):
            yield f"### {title}"
            yield text
            if f"{run.name}-{figure}" in shown:
                yield _image(run, figure)
            yield from tables(run)
    if others := run.of_kind(""):
        yield "### Operators"
        if f"{run.name}-roofline" in shown:
            yield _image(run, "roofline")
        for table in others:
            yield f"{table['title']}\n\n{_timings(table)}" if table["candidates"] else f"{table['title']}"
    if run.left_out:
        yield "### Left out"
        yield markdown(["", "why"], [list(item) for item in run.left_out.items()])


def _image(run: Run, name: str) -> str:
    return f"![{name}](figures/{run.name}-{name}.png)"


def _bars(run: Run) -> str:
    rows = []
    for table in run.tables:
        for bar in table["bars"]:
            target = f"{'≥' if bar['relation'] == '>=' else '≤'} {bar['target']:.4g} {bar['unit']}"
            verdict = "reached" if bar["passed"] else "**missed**"
            rows.append([bar["name"], target, f"{bar['median']:.3g}", f"{bar['q1']:.3g} … {bar['q3']:.3g}", verdict])
    return markdown(["bar", "target", "measured", "quartiles", ""], rows)


def _of_steps(run: Run) -> Iterator[str]:
    for table in run.of_kind("step"):
        floor, facts = table["floor"], table["facts"]
        rows = []
        for name in table["candidates"]:
            plain = name in (table["copy"], facts.get("forward"), facts.get("one"))
            added = "" if plain or name == floor else spread(table.quartiles(lambda own, bare: own - bare, name, floor))
            ratio = "" if name == table["copy"] else times(table.ratio(name, table["ratio_to"]))
            rows.append([bold(name, facts["own"]), milliseconds(table.seconds(name)), ratio, added, error(table, name)])
        heads = ["", "step", f"/ {table['ratio_to']}", "exposed balancing", "error"]
        yield "\n\n".join([f"**{table['title'].removeprefix('step: ')}**", markdown(heads, rows), *notes(table)])


def _of_memory(run: Run) -> Iterator[str]:
    for table in run.of_kind("memory"):
        peaks, facts = table["megabytes"], table["facts"]
        measures = list(dict.fromkeys(key for of in peaks.values() for key in of))
        rows = []
        for name, of in peaks.items():
            over = f"{of['tensors'] - peaks[facts['bare']]['tensors']:.1f}"
            cells = [f"{of[measure]:.1f}" if measure in of else "" for measure in measures]
            rows.append([bold(name, facts["own"]), *cells, over])
        heads = ["MB", *measures, f"tensors over {facts['bare']}"]
        yield "\n\n".join([f"**{table['title'].removeprefix('memory: ')}**", markdown(heads, rows), *notes(table)])


def _of_balance(run: Run) -> Iterator[str]:
    for table in run.of_kind("balance"):
        yield "\n\n".join([f"**{table['title']}**", _timings(table)])


def _timings(table: Table) -> str:
    own, copy = table["ratio_to"], table["copy"]
    rows = []
    for name in table["candidates"]:
        cells = [bold(name, own), seconds(table.seconds(name))]
        cells += [times(table.ratio(name, own)) if own in table["candidates"] else ""]
        cells += [f"{table.ratio(copy, name):.2f}" if copy in table["candidates"] else "", error(table, name)]
        rows.append(cells)
    return markdown(["", "time", f"/ {own}", "share of copy", "error"], rows)


def _of_lists(run: Run) -> Iterator[str]:
    tables = run.of_kind("lists")
    names = list(dict.fromkeys(name for table in tables for name in table["candidates"]))
    rows = []
    for table in tables:
        facts = table["facts"]
        cells = [f"{facts['model']}: {facts['gradients']}, {numbers(facts['P'])}"]
        cells += [seconds(table.seconds(name)) if name in table["candidates"] else "–" for name in names]
        errors = {name: error(table, name) for name in names if error(table, name)}
        rows.append([*cells, max(errors.values(), key=float), errors[table["ratio_to"]]])
    yield markdown([f"gradients, P; T = {tables[0]['facts']['T']}", *names, "largest error", "of ours"], rows)
    for table in tables:
        yield from (f"{table['facts']['model']}: {note}" for note in notes(table))


def _of_growth(run: Run) -> Iterator[str]:
    for along, unit in (("P", "a number"), ("T", "a task")):
        if not (tables := run.of_kind("growth", series=along)):
            continue
        yield _image(run, f"growth-{along}")
        rows = []
        for of in growth.of_time(run, along):
            cells = [of.candidate, str(of.points), f"{of.exponent:.2f}", seconds(of.slope), seconds(of.model)]
            rows.append([*cells, f"{of.slope / of.model:.2f}", seconds(of.first)])
        smallest = f"{along} = {numbers(tables[0]['facts'][along])}"
        heads = [f"along {along}", "points", "exponent", f"fitted, {unit}", "model", "fitted / model", f"at {smallest}"]
        if rows:
            yield markdown(heads, rows)
    rows = []
    for along in ("P", "T"):
        if found := growth.of_memory(run, along):
            rows.append([along, f"{found[0]:.4g} bytes", f"{found[1]:.4g} bytes", f"{found[0] / found[1]:.3f}"])
    if rows:
        yield "Memory in tensors over the bare loop; the model is the state, `T P` numbers:"
        yield markdown(["along", "fitted", "model", "fitted / model"], rows)


def notes(table: Table) -> list[str]:
    """What there is to say below a table."""
    return [note for note in table["notes"] if note.startswith(("left out", "TorchJD", "P*4"))]


def wrapped(text: str) -> str:
    """Prose in the line length of the README."""
    return textwrap.fill(text, 130, break_long_words=False, break_on_hyphens=False)


def error(table: Table, name: str) -> str:
    """Of a candidate when it was checked, nothing if it is no way to compute the result."""
    found = table["checks"].get("errors", {}).get(name)
    return "" if found is None else f"{found:.0e}"


def bold(name: str, own: str | None) -> str:
    """``name``, in bold if it is ours."""
    return f"**{name}**" if name == own else name


def seconds(value: float) -> str:
    """With three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def milliseconds(value: float) -> str:
    """Of steps, all in one unit."""
    return f"{1e3 * value:.3g} ms" if abs(value) < 1 else f"{1e3 * value:.0f} ms"


def spread(of: Quartiles) -> str:
    """The median, and the quartiles around it."""
    low, middle, high = (f"{1e3 * value:.3g}" if abs(value) < 1 else f"{1e3 * value:.0f}" for value in of)
    return f"{middle} ms ({low} … {high})"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def numbers(value: float) -> str:
    """How many, such as 11.2 M."""
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)


def between_markers(text: str, content: str) -> str:
    """``text`` with what stands between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected one {BEGIN!r} and one {END!r}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def written(runs: Sequence[Run], readme_now: str) -> Mapping[str, str]:
    """Path in the repository -> what must stand there."""
    return {"docs/benchmarks.md": page(runs), "README.md": between_markers(readme_now, readme(runs))}
