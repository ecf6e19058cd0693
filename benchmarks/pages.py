"""``docs/benchmarks.md`` and the tables of the README, made from the files in ``benchmarks/results``."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import counters, figures, growth
from benchmarks.comparators import COMPILED, FOREACH, LIBMTL, TIGHT, fused, kept
from benchmarks.report import environment_to_text
from benchmarks.results import Run, Study, Table, paired
from benchmarks.timing import Quartiles

BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
MAKER = "python -m benchmarks.report"
NO_GPU = "No GPU figures yet: `make gpu` and `make bench ARGS='--device cuda'` take them on a machine that has one."
MISSING = "–"

INTRODUCTION = """# Benchmarks

Made by `python -m benchmarks.report` from the files in `benchmarks/results`, raw samples and all; no number is typed by
hand. `make bench` takes the same on your machine.

* Candidates take turns, and every ratio and difference is formed within a round: a machine that slows down for a minute
  slows all of them. Tables give medians, so a ratio need not be the quotient of the times beside it.
* What is timed is checked first: operators against float64, steps by the gradients they leave after some steps, against
  gradients balanced in float64. (UPGrad and MGDA compute something else and are there for scale.) *Error* is the
  largest difference found, as a share of the largest entry; the worst of it, on CPUs, are the norms that torch computes
  of long float32 rows.
* *Copy* moves as many bytes as the work must read and write at the least: `(4T + 1) P` numbers ([design](design.md)).
* The models are the project's own definitions with the parameter shapes of torchvision's, so that nothing heavy needs
  installing; tests compare the shapes."""

GLOSSARY = """## Names

* **DBMTL**: `DBMTL.backward(losses)`. **dbmtl_fused cpu** and its like: `balance_` with that backend. **dbmtl_fused
  reference** is the backend in pure torch, **torch.compile(reference)** the same, compiled.
* **forward alone**: no backward pass. **equal weighting**: one backward pass, of the sum of the losses.
* **drop in a hook**: T backward passes; a hook on each shared parameter drops its gradient on arrival. Nothing is
  stored: the floor.
* **drop after backward**: T backward passes, `p.grad = None` after each, the loop anyone would write. In the README:
  the bare loop.
* **LibMTL's expression**: `ema = g + beta * (ema - g)`, the norm of each row, a Python sum of weight times row; all
  allocated anew in each call.
* **LibMTL's way**: a whole step, written from what LibMTL does. Each gradient is copied into a new vector in host
  memory, that into a row of a new matrix; then the expression; the result is cloned into every `.grad`. **LibMTL's way,
  kept on the device**: without the way through host memory. **LibMTL as it ships**: its way from ready lists of
  gradients.
* **tight eager**: the least traffic torch's own operators allow: `lerp_`, `vector_norm`, `mv` into a ready output.
* **torch ops, flatten**: `cat` of each task's gradients into memory that is kept, then the operators of tight eager.
* **torch ops, foreach**, **torch._foreach**: `torch._foreach_*` on lists of gradients, or of a matrix's rows; nothing
  is flattened.
* **torch ops in hooks**: the hook that drops a gradient first takes it into the EMA with `lerp_`, while it is in the
  cache; nothing is flattened.
* **TorchJD, one by one**, **TorchJD, vmap**: the package from PyPI, with an aggregator that computes DB-MTL from its
  Jacobian, whose rows come one after the other, or all at once by vmap. **TorchJD UPGrad**, **TorchJD MGDA**: one by
  one, with aggregators of its own.
* **…, memory kept**: what stands before the comma, in a process whose malloc keeps what is freed. By default glibc
  gives large blocks back to the system, and what allocates on each call pays on each call for new pages, which the
  kernel zeroes."""

STEPS = """A step is forward and backward passes and balancing, without the optimizer. The ways to do the MLP's have
each a process of its own, those of longer steps share one; all processes are replaced now and then. *Beyond the floor*
is what a step takes more than 'drop in a hook', formed within each round, with its quartiles: balancing, storing
gradients, and whatever else a way does, such as further passes through the graph. Where the quartiles reach from below
zero to above it, the step is too long for it to show. In the figure bars end at each candidate's median; coloured is
what is beyond the floor's."""

MEMORY = """Of a step, the model's own included. *Tensors*, which the figure shows, is torch's record of what its
allocator handed out; *resident* is the kernel's, and sees everything."""

READY = """On a ready `T × P` matrix of gradients. *Share of copy* is the time of the copy over the own time. It can
exceed 1: `balance_` reads `3T` vectors of `P` numbers and writes `T + 1`, the copy writes as many as it reads, and a
write costs more than a read where what is overwritten is read first. *Page faults* are a call's: pages that came new
from the system."""

LISTS = """From lists of gradients of real models' shapes, as autograd leaves them, to `.grad`, flattening and writing
back included. `DBMTL` gets them through torch's engine, from backward passes that cost nothing."""

GROWTH = """*Model* is the time that the bytes a candidate must move take at the bandwidth of the copy beside it:
`4T + 1` vectors of `P` numbers for `balance_`, `5T + 1` for tight eager, `14T − 1` for LibMTL's expression. Tables give
slopes, the time that one more number of `P`, or one more task, costs: *fitted* to what was measured, by least squares
of relative errors, and the model's. *Exponent* is the `b` of `time = a xᵇ` through the same points, `x` being `P` or
`T`: 1 where twice the size takes twice the time. Points that move less than {beyond:.0f} MB, which caches may hold, are
left out of all three. Where times depart from the model:

* Small `P`: what Python, the checks of the arguments and the dispatcher take does not depend on size, and is most of
  the time.
* In between caches hold what is used, or part of it, and everything may be faster than memory allows.
* LibMTL's expression allocates its temporaries anew in every call. {pages}
* `balance_` moves as many bytes as the copy in another mix: it reads `3T` vectors and writes `T + 1`, the copy writes
  as many as it reads, and a write costs more than a read where what is overwritten is read first.
* Few tasks: the `+ 1`, writing the sum, is a larger part, and is no part of the slope along `T`."""

GROWTH_OF_MEMORY = """Beyond the state, what is in flight counts: a bucket, or a layer's gradient if that is larger. It
does not depend on `T`, but grows with the layers, so that the slope along `P` is a little above the model's. With one
task the bare loop's graph is freed as its only backward pass goes, with more it is kept: the first point along `T` lies
higher than the others, and the slope a little below the model's."""

PAGES_KEPT = "Here what is freed is kept, so that they cost no new\n  pages."
PAGES_NEW = """Large blocks come
  from the system page by page: the kernel zeroes each, which is traffic that the model does not count."""

OPERATORS = """Copies are `cudaMemcpyAsync` and a kernel that only copies; shares are of the faster. *Stream kernels*
read and write what the operator must and compute next to nothing; *tight eager* is the operator in torch's own. The
figure shows float32, for three tasks or a model's parameters."""

GRID = """Shares of copy bandwidth, and how many times as long others take; few rounds each."""

COUNTERS = """What one launch of each operator moved from and to DRAM, as Nsight Compute counts it, beside the byte
model, in which each byte comes from memory and goes there: T = {T}, P = {P}, float32. What moved less found the rest in
the caches."""

ALT_TEXTS = {
    "steps": "How long a training step takes with each way to balance, and how much of it is beyond the floor",
    "memory": "Megabytes in tensors at the peak of a step with each way to balance",
    "roofline": "Share of copy bandwidth that each candidate reaches on ready gradients",
    "lists": "Share of copy bandwidth that each candidate reaches from lists of gradients to .grad",
    "growth-P": "Seconds a call of each candidate as the number of parameters grows",
    "growth-T": "Seconds a call of each candidate as the number of tasks grows",
    "training": "Training loss on QM9 over the steps, by method",
}


def readme(runs: Sequence[Run]) -> str:
    """What stands between the markers of the README."""
    run = runs[0]
    took = minutes(run)
    parts = [
        f"{run.hardware}, {run.found['versions']['capability']}, fp32, from "
        f"[`benchmarks/{run.path}`](benchmarks/{run.path}); `make bench` measures yours"
        f"{f', which took {took} there' if took else ''}. Whatever computes DB-MTL is checked to give the same answer "
        "before it is timed. Figures are medians, and ratios are formed within each round, so they need not equal the "
        "quotient of the times shown. All tables, figures, what the names mean and how cost grows: "
        f"[docs/benchmarks.md](docs/benchmarks.md). {NO_GPU if _only_cpus(runs) else ''}",
        *_readme_step(run),
        *_readme_ready(run),
    ]
    for of in runs:
        if of.on_gpu:
            parts += _readme_gpu(of)
    return "\n\n".join(part if part.startswith("|") else wrapped(part) for part in parts)


def _readme_step(run: Run) -> Iterator[str]:
    table, memory = run.of_kind("step")[0], run.of_kind("memory")[0]["megabytes"]
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
    yield (
        f"A training step without the optimizer ({table['title'].removeprefix('step: ')}), against a bare loop of T "
        "backward passes that throws the gradients away:"
    )
    yield markdown(["", "step", "/ bare loop", "peak memory over it"], rows)
    yield (
        f"Against a loop that drops each gradient on arrival it adds {share:.2g} of the time that moving `(4T + 1) P` "
        "numbers takes at 0.8 of copy bandwidth. What a bare loop loses is that it holds whole gradients, which malloc "
        "gives back to the system after each pass."
    )


def _readme_ready(run: Run) -> Iterator[str]:
    tables = run.of_kind("balance")
    own, copy = tables[0]["ratio_to"], tables[0]["copy"]
    names = list(dict.fromkeys(name for table in tables for name in table["candidates"]))
    others = [name for name in paired(names) if name not in (own, copy, fused("reference"))]
    rows = []
    for table in tables:
        cells = [f"{table['facts']['T']}, {numbers(table['facts']['P'])}", seconds(table.seconds(own))]
        rows.append([*cells, *(ratio(table, name, own, " ×") for name in others)])
    again = {kept(name) for name in names}
    heads = [kept("…") if name in again else name for name in others]
    yield "`balance_` on a ready `T × P` gradient matrix, and what others take:"
    yield markdown(["T, P", "`balance_`", *heads], rows)
    if kept(LIBMTL) in others:
        most = max(tables, key=lambda table: table.page_faults(LIBMTL))
        yield (
            "What allocates on each call has two columns: by default glibc gives large blocks back to the system, and "
            f"at P = {numbers(most['facts']['P'])} a call of LibMTL's expression gets {most.page_faults(LIBMTL):,.0f} "
            "new pages, which the kernel zeroes; the second is from a process whose malloc keeps what is freed."
        )


def _readme_gpu(run: Run) -> Iterator[str]:
    yield f"On {run.hardware}, from [`benchmarks/{run.path}`](benchmarks/{run.path})."
    if tables := run.operators():
        yield "Share of copy bandwidth, and how many times as long others take:"
        yield _in_rows(tables, (LIBMTL, TIGHT, COMPILED))
    if steps := run.of_kind("step"):
        own, bare = steps[0]["facts"]["own"], steps[0]["ratio_to"]
        balanced = dict.fromkeys(name for table in steps for name in table["checks"]["errors"] if name != own)
        rows = [
            [
                table["title"].removeprefix("step: "),
                milliseconds(table.seconds(own)),
                *(ratio(table, name, bare) for name in (own, *balanced)),
            ]
            for table in steps
        ]
        yield "Training steps, over a bare loop of T backward passes:"
        yield markdown(["", "`balancer.backward(losses)`", "/ bare loop", *balanced], rows)


def _in_rows(tables: Sequence[Table], others: Sequence[str]) -> str:
    """A row for each table: our backends' shares of copy bandwidth, and times of ``others`` over ours."""
    names = dict.fromkeys(name for table in tables for name in table["candidates"])
    ours = [name for name in names if name.startswith(fused("")) and name != fused("reference")]
    others = [name for name in others if name in names]
    rows = [
        [
            table["title"].removeprefix("grid: "),
            *(share_of_copy(table, name) for name in ours),
            *(ratio(table, name, table["ratio_to"], " ×") for name in others),
        ]
        for table in tables
    ]
    return markdown(["", *ours, *others], rows)


def page(runs: Sequence[Run]) -> str:
    """All of ``docs/benchmarks.md``."""
    newest = max(runs, key=lambda run: str(run.found["date"]))
    parts = [INTRODUCTION, GLOSSARY]
    for run in runs:
        parts += _run(run, newest)
    if _only_cpus(runs):
        parts += ["## GPU", NO_GPU]
    return "\n\n".join(parts) + "\n"


def _only_cpus(runs: Sequence[Run]) -> bool:
    return not any(run.on_gpu for run in runs)


def _run(run: Run, newest: Run) -> Iterator[str]:
    yield f"## {run.hardware}"
    took = f", {minutes(run)}" if minutes(run) else ""
    yield f"`benchmarks/{run.path}`, {run.found['date'][:10]}{took}:"
    yield f"```\n{environment_to_text(run.found)}\n```"
    if run.found["commit"] != newest.found["commit"]:
        yield "An older run; tables that came later are not in it."
    if any(table["bars"] for table in run.tables):
        yield "### Bars"
        yield _bars(run)
    shown = figures.of_run(run)
    sections: list[tuple[str, str, str, Callable[[Run], Iterator[str]], str]] = [
        ("Whole steps", "steps", STEPS, _of_steps, "step"),
        ("Peak memory", "memory", MEMORY, _of_memory, "memory"),
        ("A ready gradient matrix", "roofline", READY, _of_balance, "balance"),
        ("Real lists of gradients", "lists", LISTS, _of_lists, "lists"),
        ("How cost grows", "", _growth_text(run), _of_growth, "growth"),
        ("Operators", "roofline", OPERATORS, _of_operators, ""),
        ("From few columns to many, from one task to 64", "", GRID, _of_grid, "grid"),
    ]
    for title, figure, text, tables, kind in sections:
        if run.of_kind(kind):
            yield f"### {title}"
            yield text
            if f"{run.name}-{figure}" in shown:
                yield _image(run, figure)
            yield from tables(run)
    if run.stages:
        yield from _of_stages(run)
    if run.left_out:
        yield "### Left out"
        yield markdown(["", "why"], [list(item) for item in run.left_out.items()])


def _image(run: Run, name: str) -> str:
    return f"![{ALT_TEXTS[name]}: {run.hardware}](figures/{run.name}-{name}.png)"


def _bars(run: Run) -> str:
    rows = []
    for table in run.tables:
        for bar in table["bars"]:
            target = f"{'≥' if bar['relation'] == '>=' else '≤'} {bar['target']:.4g} {bar['unit']}"
            spread = f"{bar['q1']:.3g} … {bar['q3']:.3g}"
            rows.append([bar["name"], target, f"{bar['median']:.3g}", spread, verdict(bar)])
    return markdown(["bar", "target", "measured", "quartiles", ""], rows)


def verdict(bar: Mapping[str, Any]) -> str:
    """Whether a bar was reached, and whether another run may say otherwise."""
    word = "reached" if bar["passed"] else "**missed**"
    return f"{word}, within noise" if bar["q1"] < bar["target"] < bar["q3"] else word


def _of_steps(run: Run) -> Iterator[str]:
    for table in run.of_kind("step"):
        floor, facts = table["floor"], table["facts"]
        rows = []
        for name in table["candidates"]:
            plain = name in (table["copy"], facts.get("forward"), facts.get("one"))
            added = "" if plain or name == floor else spread(table.quartiles(lambda own, bare: own - bare, name, floor))
            over = "" if name == table["copy"] else times(table.ratio(name, table["ratio_to"]))
            rows.append([bold(name, facts["own"]), milliseconds(table.seconds(name)), over, added, error(table, name)])
        heads = ["", "step", f"/ {table['ratio_to']}", "beyond the floor", "error"]
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
        yield _timings(table, page_faults=True)


def _of_lists(run: Run) -> Iterator[str]:
    for table in run.of_kind("lists"):
        yield _timings(table, page_faults=True)


def _of_operators(run: Run) -> Iterator[str]:
    for table in run.of_kind(""):
        yield _timings(table, page_faults=False)


def _of_grid(run: Run) -> Iterator[str]:
    yield _in_rows(run.of_kind("grid"), (LIBMTL, TIGHT, FOREACH))


def _timings(table: Table, *, page_faults: bool) -> str:
    own = table["ratio_to"]
    columns: dict[str, Callable[[str], str]] = {
        "": lambda name: bold(name, own),
        "time": lambda name: seconds(table.seconds(name)),
    }
    if own:
        columns[f"/ {own}"] = lambda name: ratio(table, name, own)
    if table["copy"]:
        columns["share of copy"] = lambda name: share_of_copy(table, name)
    if page_faults:
        columns["page faults"] = lambda name: f"{table.page_faults(name):,.0f}"
    columns["error"] = lambda name: error(table, name)
    rows = [[cell(name) for cell in columns.values()] for name in paired(table["candidates"])]
    title = table["title"].removeprefix("lists: ")
    return "\n\n".join([f"**{title}**", markdown(list(columns), rows), *notes(table)])


def _growth_text(run: Run) -> str:
    keeps = run.on_gpu or any(table["facts"].get("malloc") == "kept" for table in run.of_kind("growth"))
    return GROWTH.format(beyond=growth.BEYOND_CACHES / 1e6, pages=PAGES_KEPT if keeps else PAGES_NEW)


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
        if along == "P" and TIGHT in tables[0]["candidates"]:
            over = times(tables[0].ratio(tables[0]["ratio_to"], TIGHT))
            yield f"At {smallest} `balance_` takes {over} times as long as tight eager."
    rows = []
    for along in ("P", "T"):
        if found := growth.of_memory(run, along):
            rows.append([along, f"{found[0]:.4g} bytes", f"{found[1]:.4g} bytes", f"{found[0] / found[1]:.3f}"])
    if rows:
        yield "Memory in tensors over the bare loop, slopes likewise; the model is the state, `T P` numbers:"
        yield markdown(["along", "fitted", "model", "fitted / model"], rows)
        yield GROWTH_OF_MEMORY


def _of_stages(run: Run) -> Iterator[str]:
    """What ``make gpu`` found besides times."""
    counted = run.stages.get("counters", {}).get("data") or {}
    if launches := counted.get("launches"):
        yield "### Memory traffic"
        yield COUNTERS.format(T=counted["T"], P=numbers(counted["P"]))
        heads = ["MB", "read", "least", "written", "least", "moved / least", "L2 hits", "time"]
        yield markdown(heads, [_launch(row) for row in launches])
    if trained := run.stages.get("train", {}).get("text"):
        yield "### Training"
        yield trained.strip()  # a table in Markdown, of as many methods as there was time for
        if f"{run.name}-training" in figures.of_run(run):
            yield _image(run, "training")
    yield "### Stages of `make gpu`"
    yield markdown(["stage", "", ""], [_stage(name, of) for name, of in run.stages.items()])


def _launch(row: Mapping[str, Any]) -> list[str]:
    """A kernel of ours beside its model; of others, and where the GPU does not count, cells stay empty."""
    found = row["metrics"]
    read, written, time = (found.get(name) for name in (counters.READ, counters.WRITTEN, counters.SECONDS))
    least_read, least_written = row.get("model_read"), row.get("model_written")
    moved, least = total(read, written), total(least_read, least_written)
    hits = found.get(counters.HIT_RATE)
    return [
        f"{row['backend']} {row['operator'] or row['kernel']}",
        *(megabytes(value) for value in (read, least_read, written, least_written)),
        times(moved / least) if moved is not None and least else "",
        "" if hits is None else f"{hits:.0f} %",
        "" if time is None else seconds(time),
    ]


def _stage(name: str, stage: Mapping[str, Any]) -> list[str]:
    counts = (stage["data"] or {}).get("counts", {})
    said = [*(f"{count} {outcome}" for outcome, count in counts.items()), *filter(None, [stage["reason"]])]
    return [name, stage["status"], "; ".join(said)]


def notes(table: Table) -> list[str]:
    """What there is to say below a table."""
    return [note for note in table["notes"] if note.startswith(("left out", "TorchJD", "P*4"))]


def wrapped(text: str) -> str:
    """Prose in the line length of the README."""
    return textwrap.fill(text, 130, break_long_words=False, break_on_hyphens=False)


def minutes(run: Run) -> str:
    """How long a run took, nothing if it does not say."""
    took = run.found.get("settings", {}).get("seconds")
    return f"{took / 60:.0f} minutes" if took else ""


def ratio(table: Table, name: str, other: str | None, unit: str = "") -> str:
    """How many times as long as ``other`` a candidate takes, if both were measured."""
    both = name in table["candidates"] and other in table["candidates"]
    return f"{times(table.ratio(name, str(other)))}{unit}" if both else MISSING


def share_of_copy(table: Table, name: str) -> str:
    """The time of the copy over that of a candidate, if both were measured."""
    both = name in table["candidates"] and table["copy"] in table["candidates"]
    return f"{table.ratio(table['copy'], name):.2f}" if both else MISSING


def total(first: float | None, second: float | None) -> float | None:
    """The sum, if both are known."""
    return None if first is None or second is None else first + second


def megabytes(value: float | None) -> str:
    """Of bytes, if they are known."""
    return "" if value is None else f"{value / 1e6:.1f}"


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


def between_markers(text: str, content: str, name: str = MAKER) -> str:
    """``text`` with what stands between the markers of ``name`` replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one {begin!r} and one {end!r}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def results_page(text: str, studies: Sequence[Study]) -> str:
    """``docs/results.md``: ``text`` with what each study found between its markers."""
    for study in studies:
        text = between_markers(text, study.text.strip(), f"studies/{study.name}")
    return text


def written(root: Path, runs: Sequence[Run], studies: Sequence[Study]) -> Mapping[str, str]:
    """Path in the repository at ``root`` -> what must stand there."""
    return {
        "docs/benchmarks.md": page(runs),
        "docs/results.md": results_page((root / "docs" / "results.md").read_text(), studies),
        "README.md": between_markers((root / "README.md").read_text(), readme(runs)),
    }
