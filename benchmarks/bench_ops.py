"""The one-shot operator on a ready gradient matrix, against LibMTL's expression and torch's own operators.

One process, all candidates and a copy of as many bytes in turns. Small sizes are called many times for one sample, with
Python's overhead; their data stays in cache, as it would in a tight loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from benchmarks import comparators
from benchmarks.bandwidth import Copy, fused_bytes
from benchmarks.comparators import LIBMTL, TIGHT, fused
from benchmarks.report import Section
from benchmarks.timing import Bar, calls_lasting, interleave, per_round, sample
from dbmtl_fused import backends

SHAPES = ((3, 11_200_000), (11, 2_000_000), (3, 100_000))
QUICK_SHAPES = ((3, 10_000), (2, 1_000))
BETA = 0.9
SAMPLE_SECONDS = 5e-3
COPY = "copy of as many bytes"
LIBMTL_TARGET, TIGHT_TARGET = 10.0, 1.5


def run(*, rounds: int, quick: bool, compiled: bool) -> list[Section]:
    """One section for each shape."""
    shapes = QUICK_SHAPES if quick else SHAPES
    return [_run_shape(*shape, rounds, against_libmtl=shape is shapes[0], compiled=compiled) for shape in shapes]


def _run_shape(T: int, P: int, rounds: int, *, against_libmtl: bool, compiled: bool) -> Section:
    ema, grads = comparators.inputs(T, P)
    built = {name: build(ema, grads, BETA) for name, build in comparators.factories(compiled=compiled).items()}
    expected = comparators.exact(ema, grads, BETA)
    errors = {name: comparators.check(name, candidate, expected) for name, candidate in built.items()}
    del ema, grads, expected

    moved = fused_bytes(T, P)
    functions: dict[str, Callable[[], object]] = {COPY: Copy(moved), **built}
    calls = {name: calls_lasting(function, SAMPLE_SECONDS) for name, function in functions.items()}
    candidates = {name: functools.partial(sample, function, calls[name]) for name, function in functions.items()}
    title = f"balance_ fp32, T={T}, P={P / 1e6:.3g}M"
    samples = interleave(candidates, rounds, warmup=2, title=title)

    ours = fused(backends.resolve("auto", built[TIGHT].ema.device))
    bars = [
        Bar(f"{title}: {name} / {ours}", target, True, per_round(lambda other, own: other / own, samples, name, ours))
        for name, target in ((LIBMTL, LIBMTL_TARGET), (TIGHT, TIGHT_TARGET))
        if name == TIGHT or against_libmtl
    ]
    return Section(
        title,
        samples,
        bars,
        bytes_moved=moved,
        copy=COPY,
        ratio_to=ours,
        checks={"rtol": comparators.RTOL, "errors": errors},
        notes=[f"calls per sample: {', '.join(f'{name} {number}' for name, number in calls.items())}"],
    )
