"""Interleaved timing: candidates take turns (A, B, C, A, B, C, ...), and every figure is a ratio within one round.

On a shared machine speed drifts by tens of percent within a minute. Candidates of one round meet the same conditions,
so a ratio is formed within each round, and the median over rounds is reported with its quartiles.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm


class Quartiles(NamedTuple):
    """Lower quartile, median, upper quartile."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """The quartiles of at least one value, linearly interpolated."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


class Sample(NamedTuple):
    """One measurement of one candidate."""

    seconds: float  # per call
    page_faults: float = 0.0  # minor ones, per call: pages that came fresh from the system


Samples = dict[str, list[Sample]]


def interleave(
    candidates: Mapping[str, Callable[[], Sample]], rounds: int, *, warmup: int, title: str, pause: float = 0.0
) -> Samples:
    """``rounds`` samples of each candidate, taken in turns after ``warmup`` rounds that are thrown away.

    :param pause: Seconds between two turns. Where candidates are processes: an OpenMP thread goes on spinning for
        milliseconds after its work is done, and would take a core from the next.
    """
    samples: Samples = {name: [] for name in candidates}
    for index in tqdm(range(-warmup, rounds), desc=title, unit="round", leave=False, disable=None):
        for name, take in candidates.items():
            time.sleep(pause)
            sample = take()
            if index >= 0:
                samples[name].append(sample)
    return samples


def per_round(formula: Callable[..., float], samples: Samples, *names: str) -> list[float]:
    """``formula(seconds of names[0], seconds of names[1], ...)`` of every round."""
    rounds = zip(*(samples[name] for name in names), strict=True)
    return [formula(*(sample.seconds for sample in turn)) for turn in rounds]


def sample(function: Callable[[], object], calls: int = 1, finish: Callable[[], object] = lambda: None) -> Sample:
    """The mean of ``calls`` calls in a row, Python's overhead and ``finish()``, which waits for a device, included."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    started = time.perf_counter()
    for _ in range(calls):
        function()
    finish()
    seconds = time.perf_counter() - started
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Sample(seconds / calls, faults / calls)


def calls_lasting(function: Callable[[], object], seconds: float, finish: Callable[[], object] = lambda: None) -> int:
    """How many calls in a row last about ``seconds``; at least 1."""
    # The fastest of a few: one call that was interrupted must not make samples too short.
    fastest = math.inf
    for _ in range(5):
        fastest = min(fastest, sample(function, finish=finish).seconds)
        if fastest > seconds:
            break
    return max(1, round(seconds / fastest))


@dataclass(frozen=True)
class Bar:
    """A figure that must be reached: the median of ``values`` at least, or at most, ``target``."""

    name: str
    target: float
    at_least: bool
    values: Sequence[float]
    unit: str = "x"

    @property
    def measured(self) -> Quartiles:
        return Quartiles.of(self.values)

    @property
    def passed(self) -> bool:
        return self.measured.median >= self.target if self.at_least else self.measured.median <= self.target

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "relation": ">=" if self.at_least else "<=",
            "target": self.target,
            **self.measured._asdict(),
            "passed": self.passed,
            "values": list(self.values),
        }
