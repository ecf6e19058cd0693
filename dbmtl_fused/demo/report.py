"""A study in words and numbers: table, conclusion, how it was measured; and all of it in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from textwrap import fill

from tabulate import tabulate

from dbmtl_fused.demo.study import SINGLE_TASK, Result, Study
from dbmtl_fused.demo.training import BFLOAT16_EMA, EQUAL_WEIGHTING, METHODS

DB_MTL = METHODS["db-mtl"].name
TEXT_WIDTH = 110


def text(study: Study, *, tasks_in_rows: bool = False) -> str:
    """The whole report in Markdown that also reads well in a terminal."""
    remarks = [fill(f"- {note}", TEXT_WIDTH, subsequent_indent="  ") for note in notes(study)]
    parts = [table(study, tasks_in_rows=tasks_in_rows), fill(conclusion(study), TEXT_WIDTH), "\n".join(remarks)]
    if {DB_MTL, BFLOAT16_EMA.name} <= study.results.keys() and len(study.results[DB_MTL]) > 1:
        parts.insert(1, state_dtype_table(study))
    return "\n\n".join(parts)


def save(study: Study, folder: Path, *, tasks_in_rows: bool = False) -> None:
    """Write ``results.md`` and ``results.json`` into ``folder`` and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    table_path, numbers_path = folder / "results.md", folder / "results.json"
    table_path.write_text(text(study, tasks_in_rows=tasks_in_rows) + "\n", encoding="utf-8")
    numbers_path.write_text(json.dumps(study.to_json(), indent=1), encoding="utf-8")
    print(f"Table:  {table_path}\nNumbers: {numbers_path}")


def table(study: Study, *, tasks_in_rows: bool = False) -> str:
    """Markdown table of all methods: test metrics, Delta_p, seconds an epoch, balancing's share of a step if timed.

    Over several seeds: mean ± standard deviation.

    :param tasks_in_rows: One column for each method instead of one row; for many tasks.
    """
    arrows = {True: "↑", False: "↓"}
    columns = [["method", *study.results]]
    for task in study.tasks:
        metric = task.metric
        head = f"{task.name}: {metric.name} [{metric.unit}] {arrows[metric.higher_is_better]}"
        scores = [[result.scores[task.name] for result in runs] for runs in study.results.values()]
        columns.append([head, *(_spread(values, ".3g") for values in scores)])
    improvements = [
        "0 (baseline)" if name == SINGLE_TASK else _spread([result.delta_p for result in runs], "+.2f")
        for name, runs in study.results.items()
    ]
    columns.append(["Δp [%] ↑", *improvements])
    columns.append(
        ["s/epoch", *(f"{median(r.seconds_per_epoch for r in runs):.3g}" for runs in study.results.values())]
    )
    if study.timing_rounds:
        columns.append(["balancing's share of a step", *map(_share, study.results.values())])
    rows = columns if tasks_in_rows else [list(row) for row in zip(*columns, strict=True)]
    return tabulate(rows[1:], headers=rows[0], tablefmt="github", disable_numparse=True)


def state_dtype_table(study: Study) -> str:
    """Markdown table of the last models' test losses with the EMA in float32 and in bfloat16."""
    rows = []
    for name in (task.name for task in study.tasks):
        full, half = ([run.losses[name] for run in study.results[method]] for method in (DB_MTL, BFLOAT16_EMA.name))
        low, high = min(full), max(full)
        of_mean = "yes" if low <= fmean(half) <= high else "no"
        of_seeds = f"{sum(low <= loss <= high for loss in half)} of {len(half)}"
        rows.append(
            [name, _spread(full, ".5g"), f"{low:.5g} to {high:.5g}", _spread(half, ".5g"), of_mean, of_seeds],
        )
    heads = ["test loss ↓", "float32 EMA", "its range", "bfloat16 EMA", "mean within the range", "seeds within it"]
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)


def _spread(values: Sequence[float], spec: str) -> str:
    mean = f"{fmean(values):{spec}}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.2g}"


def _share(runs: Sequence[Result]) -> str:
    shares = [result.step_times.share for result in runs if result.step_times]
    return f"{100 * median(shares):.1f} %" if shares else "–"


def notes(study: Study) -> list[str]:
    """How the numbers were measured, a paragraph each."""
    T = len(study.tasks)
    paragraphs = [
        f"{SINGLE_TASK}: single-task learning, one model for each task; its s/epoch is that of all {T} together. All "
        "methods start from the same initial values, see the same batches in the same order and are trained by Adam, "
        "its learning rate falling to 0.",
        "Δp: relative improvement over STL in percent, mean over tasks of (-1)^s (M - STL) / STL with s = 0 where "
        "larger is better and 1 where smaller is (paper, Eq. 3-4). Positive is better than training alone.",
        "s/epoch: training steps only, without evaluation and recording. EW and log only are plain sums, one backward "
        f"a step; the others need {T}, with or without this package.",
    ]
    timed = {name: runs[0].step_times for name, runs in study.results.items() if runs[0].step_times}
    if timed:
        name, times = list(timed.items())[-1]
        paragraphs.append(
            "balancing's share of a step: (step - floor) / step. The floor is the same loop with balancing left out: "
            f"forward, {T} backwards over the same losses, their shared gradients dropped in a hook, and the same "
            f"optimizer step. Medians of {study.timing_rounds} steps of each kind, taken in turns. {name}: step "
            f"{1e3 * times.step:.2f} ms, floor {1e3 * times.floor:.2f} ms."
        )
    paragraphs.append(f"Backend {study.backend!r}; {study.machine}.")
    return paragraphs


def conclusion(study: Study) -> str:
    """What the numbers say about DB-MTL, whatever they say."""
    means = {
        name: fmean(result.delta_p for result in runs)
        for name, runs in study.results.items()
        if name not in (SINGLE_TASK, BFLOAT16_EMA.name)  # the latter is DB-MTL itself
    }
    best, *others = sorted(means, key=lambda name: means[name], reverse=True)
    if DB_MTL not in means or not others:
        return f"Best Δp: {best}, {means[best]:+.2f} %."
    rival = others[0] if best == DB_MTL else best
    gap = means[DB_MTL] - means[rival]
    if best == DB_MTL:
        verdict = f"DB-MTL has the best Δp, {means[best]:+.2f} %: {gap:.2f} points more than {rival}."
    else:
        verdict = f"DB-MTL does not win here: Δp is {means[DB_MTL]:+.2f} %, {-gap:.2f} points less than {rival}."
    if EQUAL_WEIGHTING.name in means and rival != EQUAL_WEIGHTING.name:
        verdict += f" Against {EQUAL_WEIGHTING.name}: {means[DB_MTL] - means[EQUAL_WEIGHTING.name]:+.2f} points."
    pairs = list(zip(study.results[DB_MTL], study.results[rival], strict=True))
    if len(pairs) == 1:
        return f"{verdict} That is one seed, which settles little: see --seeds."
    ahead = sum(ours.delta_p > theirs.delta_p for ours, theirs in pairs)
    return f"{verdict} DB-MTL is ahead of {rival} in {ahead} of {len(pairs)} seeds."
