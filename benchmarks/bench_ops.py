"""The one-shot operator on a ready gradient matrix, against LibMTL's expression and torch's own operators.

One process, all candidates and a copy of as many bytes in turns. Small sizes are called many times for one sample, with
Python's overhead; their data stays in cache, as it would in a tight loop. Tables of :func:`growth` go through sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import comparators
from benchmarks.bandwidth import ITEM, Copy, fused_bytes
from benchmarks.comparators import COMPILED, LIBMTL, TIGHT, OneShot
from benchmarks.graph_timing import graph_timer
from benchmarks.plan import Options, Table, free_bytes, require_memory
from benchmarks.report import Section
from benchmarks.timing import Bar, Sample, Samples, calls_lasting, interleave, per_round, sample

SHAPES = ((3, 11_200_000), (11, 2_000_000), (3, 100_000))
QUICK_SHAPES = ((3, 10_000), (2, 1_000))
BETA = 0.9
SAMPLE_SECONDS = 5e-3
COPY = "copy of as many bytes"
TORCH_RTOL = 1e-2
"""Largest error allowed to torch's own operators, whose float32 norms on CPUs get worse as ``P`` grows."""
TARGETS = {LIBMTL: 10.0, TIGHT: 1.5}

SERIES_T, SERIES_P = 3, 4_000_000
"""Where ``P`` grows, and where ``T`` does; a row of the latter is several times the caches next to the cores."""
GROWING_P = (*(factor * 10**power for power in range(4, 9) for factor in (1, 3)), 10**9)
GROWING_T = (1, 2, 4, 8, 16, 32, 64)
GROWTH_ROUNDS = 5


def tables(options: Options) -> Iterator[Table]:
    """One for each shape."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    for T, P in shapes:
        title = f"balance_ fp32, T={T}, P={P / 1e6:.3g}M"
        names = [LIBMTL, TIGHT] if shapes[0][0] * shapes[0][1] == T * P else [TIGHT]
        yield Table(title, functools.partial(_shape, title, T, P, names, options))


def growth(options: Options) -> Iterator[Table]:
    """One for each size, with ``P`` growing, then ``T``."""
    points = [("P", SERIES_T, P) for P in GROWING_P] + [("T", T, SERIES_P) for T in GROWING_T]
    if options.quick:
        points = [("P", 2, 1_000), ("P", 2, 10_000), ("T", 1, 1_000), ("T", 2, 1_000)]
    for series, T, P in points:
        title = f"growing {series}: balance_ fp32, T={T}, P={P / 1e6:.4g}M"
        yield Table(title, functools.partial(_growth, title, series, T, P, options))


def _shape(title: str, T: int, P: int, judged: list[str], options: Options) -> Section:
    built = _Built(T, P, comparators.factories(compiled=options.compiled), options.device)
    samples = built.samples(title, options.rounds)
    bars = [
        Bar(f"{title}: {name} / {built.ours}", TARGETS[name], True, per_round(_quotient, samples, name, built.ours))
        for name in judged
    ]
    notes = built.notes + ([] if options.compiled else [f"left out: {COMPILED} (--compile)"])
    return built.section(title, samples, kind="balance", bars=bars, notes=notes)


def _growth(title: str, series: str, T: int, P: int, options: Options) -> Section:
    factories = comparators.factories(device_type=options.device.type)
    wanted = [LIBMTL, TIGHT, list(factories)[-1]]
    while len(wanted) > 1 and _bytes(T, P, len(wanted)) > free_bytes(options.device):
        del wanted[0]
    require_memory(_bytes(T, P, len(wanted)), options.device)
    built = _Built(T, P, {name: factories[name] for name in wanted}, options.device)
    samples = built.samples(title, min(options.rounds, GROWTH_ROUNDS))
    return built.section(title, samples, kind="growth", facts={"series": series}, notes=built.notes)


def _bytes(T: int, P: int, candidates: int) -> int:
    """At the peak: state and gradients of each; inputs, what they must become in float64, a row or two beside them."""
    return (2 * candidates * T + 4 * T + 8) * P * ITEM


class _Built:
    """Candidates that have run once and been found right, beside a copy of as many bytes."""

    def __init__(
        self, T: int, P: int, kinds: Mapping[str, Callable[[Tensor, Tensor, float], OneShot]], device: torch.device
    ) -> None:
        ema, grads = comparators.inputs(T, P, device=device)
        built = {name: build(ema, grads, BETA) for name, build in kinds.items()}
        expected = comparators.exact(ema, grads, BETA)
        self.rtol = {name: comparators.RTOL if "dbmtl_fused" in name else TORCH_RTOL for name in built}
        self.errors = {name: comparators.check(name, of, expected, self.rtol[name]) for name, of in built.items()}
        del ema, grads, expected
        self.facts, self.moved, self.ours = {"T": T, "P": P}, fused_bytes(T, P), list(built)[-1]
        self.takers: dict[str, Callable[[], Sample]] = {}
        self.notes: list[str] = []
        functions: dict[str, Callable[[], object]] = {COPY: Copy(self.moved, device), **built}
        for name, function in functions.items():
            if device.type == "cuda":
                self.takers[name] = graph_timer([function], device)
                continue
            calls = calls_lasting(function, SAMPLE_SECONDS)
            self.takers[name] = functools.partial(sample, function, calls)
            self.notes.append(f"{name} {calls}")
        if self.notes:
            self.notes = [f"calls per sample: {', '.join(self.notes)}"]

    def samples(self, title: str, rounds: int) -> Samples:
        return interleave(self.takers, rounds, warmup=2, title=title)

    def section(
        self, title: str, samples: Samples, *, facts: Mapping[str, Any] | None = None, **others: Any
    ) -> Section:
        return Section(
            title,
            samples,
            others.pop("bars", []),
            facts={**self.facts, **(facts or {})},
            bytes_moved=self.moved,
            copy=COPY,
            ratio_to=self.ours,
            checks={"rtol": max(self.rtol.values()), "errors": self.errors},
            **others,
        )


def _quotient(first: float, second: float) -> float:
    return first / second
