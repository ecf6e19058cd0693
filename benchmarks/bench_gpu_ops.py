"""Every operator of every backend on a GPU, as a share of what copying the same bytes takes, and against torch's own.

``python -m benchmarks.bench_gpu_ops --out FILE.json``. Sizes are those of real encoders and beyond; see
:mod:`benchmarks.graph_timing` for how times are taken. Every candidate is held against a float64 computation before it
is timed; one that differs, or fails, is left out and makes the exit code 1. FILE.json and FILE.txt are written anew
after each table. ``--device cpu --quick`` shows that everything runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import report, shapes
from benchmarks.comparators import COMPILED, FOREACH, LIBMTL, TIGHT, fused
from benchmarks.gpu_info import device_facts, environment, nvidia_smi, sampled
from benchmarks.gpu_problems import BF16_GRADS, BF16_STATE, FP32, LARGE_BYTES, TASKS, columns_of
from benchmarks.gpu_tables import (
    STREAM,
    Run,
    measure_balance,
    measure_begin_step,
    measure_combine,
    measure_ema_update,
    measure_gram,
    measure_grid,
    measure_host,
    measure_lists,
    measure_small,
    median,
)
from benchmarks.report import Section
from benchmarks.timing import Quartiles, per_round
from dbmtl_fused import backends

GRID_TASKS = (3, 1, 8, 64, 11, 2, 5, 16, 32)
GRID_COLUMNS = (10**7, 10**5, 10**8, 10**6, 10**4)
GRID_LARGEST = (10**9, (1, 2, 3))
GRID_BF16 = tuple((T, P) for T in (3, 16) for P in (10**5, 10**7))
"""``balance_`` over sizes, those that tell most first."""


def plan(quick: bool) -> list[tuple[str, Callable[[Run], None]]]:
    """Every table, those that carry bars first, so that a run that is cut off has shown the most."""
    jobs: list[tuple[str, Callable[[Run], None]]] = []

    def add(function: Callable[..., None], *arguments: Any) -> None:
        name = ", ".join([function.__name__.removeprefix("measure_"), *(str(of)[:40] for of in arguments)])
        jobs.append((name, lambda run: function(run, *arguments)))

    if quick:
        few: list[shapes.Shape] = [(64, 3, 7, 7), (64,), (300, 17)]
        for dtypes in (FP32, BF16_GRADS, BF16_STATE):
            add(measure_balance, 3, 5_000, dtypes)
            add(measure_combine, 3, 5_000, dtypes)
            if dtypes != BF16_GRADS:  # gram sees none
                add(measure_gram, 3, 5_000, dtypes)
            add(measure_ema_update, "few", few, dtypes)
        add(measure_grid, 1, 5_000, FP32)
        add(measure_lists, "few", 3, few)
        add(measure_small, 3, 1_000)
        add(measure_begin_step, 3)
        add(measure_host, 3, 1_000, few)
        return jobs

    models = {"ResNet-50": shapes.resnet50(), "ViT-L/16": shapes.vit_large()}
    for P in (6_700_000, 11_200_000, 25_600_000):
        add(measure_balance, 3, P, FP32)
    for T in TASKS:
        add(measure_balance, T, columns_of(T, LARGE_BYTES), FP32)
    add(measure_lists, "ResNet-18", 3, shapes.resnet18()[:-2])
    for model, params in models.items():
        add(measure_ema_update, model, params, FP32)
    for T in TASKS:
        add(measure_combine, T, columns_of(T, LARGE_BYTES // 2), FP32)
        add(measure_combine, T, 11_200_000, FP32)
    add(measure_small, 3, 100_000)
    add(measure_begin_step, 11)
    add(measure_host, 3, 100_000, models["ResNet-50"])
    for T in TASKS:
        add(measure_gram, T, columns_of(T, LARGE_BYTES // 2), FP32)
    for dtypes in (BF16_GRADS, BF16_STATE):
        for T in (3, 11):
            add(measure_balance, T, 11_200_000, dtypes)
            add(measure_balance, T, columns_of(T, LARGE_BYTES), dtypes)
            add(measure_combine, T, columns_of(T, LARGE_BYTES // 2), dtypes)
            if dtypes != BF16_GRADS:
                add(measure_gram, T, columns_of(T, LARGE_BYTES // 2), dtypes)
        for model, params in models.items():
            add(measure_ema_update, model, params, dtypes)
    for P in GRID_COLUMNS:
        for T in GRID_TASKS:
            add(measure_grid, T, P, FP32)
    for dtypes in (BF16_GRADS, BF16_STATE):
        for T, P in GRID_BF16:
            add(measure_grid, T, P, dtypes)
    P, tasks = GRID_LARGEST
    for T in tasks:
        add(measure_grid, T, P, FP32)
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    :returns: 0, or 1 if a candidate was wrong or failed; missed bars are in the report.
    """
    options = _parse(argv)
    device = torch.device(options.device)
    rounds = 3 if options.quick else options.repeats
    run = Run(device, rounds, options.quick, options.compile, time.monotonic() + options.seconds)
    found = environment(device) | {"device": device_facts(device), "nvidia_smi before": nvidia_smi(device)}
    settings = {"rounds": rounds, "quick": options.quick, "compile": options.compile, "device": options.device}
    with sampled(device) as found["nvidia_smi under load"]:
        for name, job in plan(options.quick):
            if time.monotonic() > run.deadline:
                run.left_out.append(name)
                continue
            before = len(run.sections)
            with run.going_on(name):
                job(run)
            for section in run.sections[before:]:
                print(section.to_text(), flush=True)
            _write(options.out, found, settings, run)
            if device.type == "cuda":
                with run.going_on(f"after {name}"):  # a device that has failed raises again
                    gc.collect()
                    torch.cuda.empty_cache()
    found["nvidia_smi after"] = nvidia_smi(device)
    _write(options.out, found, settings, run)
    print(to_text(run))
    return int(bool(run.failures))


def to_text(run: Run) -> str:
    """One line for each table, all bars, and what went wrong."""
    rows = [_line(section) for section in run.sections if section.copy]
    parts = [f"\n{tabulate(rows, headers='keys', floatfmt='.2f')}"] if rows else []
    parts.append(report.bars_to_text(run.sections, run.quick))
    for title, lines in (("FAILED", run.failures), ("left out for want of time", run.left_out)):
        if lines:
            parts.append("\n".join([f"\n{title}:", *(f"  {line}" for line in lines)]))
    return "\n".join(parts)


def _line(section: Section) -> dict[str, Any]:
    """Shares of the copy of each of our backends, and how many times as long the others take as the first."""

    def ratio(first: str, second: str) -> float:
        return Quartiles.of(per_round(lambda a, b: a / b, section.samples, first, second)).median

    line: dict[str, Any] = {"": section.title}
    if section.copy and section.bytes_moved:
        line["copy GB/s"] = section.bytes_moved / median(section.samples[section.copy]) / 1e9
        for name in (*(fused(backend) for backend in backends.BACKENDS), STREAM):
            if name in section.samples:
                line[f"{name.removeprefix('dbmtl_fused ')}: of copy"] = ratio(section.copy, name)
    for name in (LIBMTL, FOREACH, TIGHT, COMPILED):
        if section.ratio_to and name in section.samples:
            line[f"{name} / ours"] = ratio(name, section.ratio_to)
    return line


def _write(path: Path | None, found: Mapping[str, Any], settings: Mapping[str, Any], run: Run) -> None:
    if path is None:
        return
    lists = {"failures": run.failures, "left_out": run.left_out}
    report.write_json(path, found, {**settings, **lists}, run.sections)
    tables = "\n".join(section.to_text() for section in run.sections)
    path.with_suffix(".txt").write_text(f"{tables}\n{to_text(run)}\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu_ops", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: shows that everything runs")
    parser.add_argument("--repeats", type=int, default=20, help="rounds, each with one sample of every candidate")
    parser.add_argument("--compile", action="store_true", help="torch.compile(reference) too, at some sizes")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no table after so many (default: 3600)")
    parser.add_argument("--out", type=Path, help="JSON file to write; the tables go into a .txt beside it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
