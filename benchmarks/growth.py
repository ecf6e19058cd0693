"""How time and memory grow: slopes fitted to what was measured, beside what the count of bytes predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.bandwidth import ITEM
from benchmarks.comparators import LIBMTL, TIGHT
from benchmarks.results import Run, Table

BEYOND_CACHES = 2e8
"""Bytes moved from which on a point counts as limited by memory."""


class Line(NamedTuple):
    """``y = intercept + slope x``."""

    intercept: float
    slope: float


class Growth(NamedTuple):
    """Of one candidate, along ``P`` or ``T``."""

    candidate: str
    points: int
    exponent: float  # of a power law
    slope: float  # seconds for each number, or task, more
    model: float  # the same by the count of bytes at copy bandwidth
    first: float  # seconds of the smallest point of all


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Least squares of relative errors: large points must not drown small ones."""
    weights = [1 / y**2 for y in ys]
    total = sum(weights)
    x_mean = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    y_mean = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, x in zip(weights, xs, strict=True))
    slope = sum(w * (x - x_mean) * (y - y_mean) for w, x, y in zip(weights, xs, ys, strict=True)) / spread
    return Line(y_mean - slope * x_mean, slope)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """``b`` of ``y = a x**b``: a line in logarithms."""
    logs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    means = [sum(values) / len(values) for values in logs]
    spread = sum((x - means[0]) ** 2 for x in logs[0])
    return sum((x - means[0]) * (y - means[1]) for x, y in zip(*logs, strict=True)) / spread


def vectors(candidate: str, T: int) -> int:
    """Of ``P`` numbers, that a candidate reads and writes."""
    return {LIBMTL: 14 * T - 1, TIGHT: 5 * T + 1}.get(candidate, 4 * T + 1)


def of_time(run: Run, along: str) -> list[Growth]:
    """Every candidate's growth along ``"P"`` or ``"T"``, unless it has fewer than two points beyond the caches."""
    tables = run.of_kind("growth", series=along)
    found = []
    for name in dict.fromkeys(name for table in tables for name in table["candidates"]):
        having = [table for table in tables if name in table["candidates"]]
        large = [table for table in having if table["bytes_moved"] >= BEYOND_CACHES]
        if len(large) < 2:
            continue
        xs, ys = [float(table["facts"][along]) for table in large], [table.seconds(name) for table in large]
        modelled = [_model(name, table) for table in large]
        found.append(
            Growth(
                *(name, len(large), exponent(xs, ys), fit(xs, ys).slope, fit(xs, modelled).slope),
                having[0].seconds(name),
            )
        )
    return found


def _model(name: str, table: Table) -> float:
    """Seconds by the count of bytes, at what copying took in the same table."""
    copy = table.seconds(table["copy"]) / table["bytes_moved"]
    return copy * vectors(name, table["facts"]["T"]) * table["facts"]["P"] * ITEM


def of_memory(run: Run, along: str) -> tuple[float, float] | None:
    """Bytes over the bare loop that one more number, or task, takes, and by the model ``T P`` numbers of float32."""
    tables = run.of_kind("memory growth", series=along)
    if len(tables) < 2:
        return None
    xs, ys, modelled = [], [], []
    for table in tables:
        peaks, facts = table["megabytes"], table["facts"]
        xs.append(float(facts[along]))
        ys.append((peaks[facts["own"]]["tensors"] - peaks[facts["bare"]]["tensors"]) * 1e6)
        modelled.append(float(facts["T"] * facts["P"] * ITEM))
    return fit(xs, ys).slope, fit(xs, modelled).slope
