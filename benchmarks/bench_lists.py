"""Real lists of gradients, from where autograd would have left them to ``.grad``, beside a copy of as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from benchmarks import list_comparators, shapes
from benchmarks.bandwidth import Copy, fused_bytes
from benchmarks.bench_ops import BETA, COPY, SAMPLE_SECONDS
from benchmarks.list_comparators import KINDS, OURS, SHIPPED, TIGHT, Lists
from benchmarks.plan import Options, Table, free_bytes, require_memory
from benchmarks.report import Section
from benchmarks.timing import Bar, calls_lasting, interleave, per_round, sample

TASKS = 3
OVER_SHIPPED, OVER_TIGHT = 4.0, 1.5
OWN_RTOL, RTOL = 1e-5, 1e-2
"""Errors allowed before anything is timed; the latter for torch's own float32 norms, whose error grows with ``P``."""
LARGE, ROUNDS_LARGE = 50_000_000, 5
QUICK = {"two layers": [(20, 10), (20,), (5, 20), (5,)]}


def tables(options: Options) -> Iterator[Table]:
    """One for each model."""
    encoders = QUICK if options.quick else {name: shapes_of() for name, shapes_of in shapes.ENCODERS.items()}
    for name, params in encoders.items():
        P = shapes.numbers(params)
        title = f"lists: {name}, {len(params)} gradients, T={TASKS}, P={P / 1e6:.4g}M"
        yield Table(title, functools.partial(_model, title, name, params, options))


def _model(title: str, model: str, params: list[shapes.Shape], options: Options) -> Section:
    P = shapes.numbers(params)
    moved = fused_bytes(TASKS, P)
    wanted = list(KINDS)
    while len(wanted) > 1 and list_comparators.bytes_of(wanted, TASKS, P) > free_bytes(options.device):
        del wanted[0]
    require_memory(list_comparators.bytes_of(wanted, TASKS, P), options.device)

    lists, candidates, errors = Lists(params, TASKS), {}, {}
    for name in wanted:
        candidates[name] = KINDS[name](lists, BETA)
        lists.write([None] * len(params))
        candidates[name]()
        errors[name] = lists.error(BETA)
        allowed = OWN_RTOL if name == OURS else RTOL
        if not errors[name] <= allowed:
            raise AssertionError(f"{name} differs from float64 by {errors[name]:.1e}, more than {allowed:.0e}")

    functions: dict[str, Callable[[], object]] = {COPY: Copy(moved), **candidates}
    takers = {
        name: functools.partial(sample, function, calls_lasting(function, SAMPLE_SECONDS))
        for name, function in functions.items()
    }
    rounds = min(options.rounds, ROUNDS_LARGE) if P > LARGE else options.rounds
    samples = interleave(takers, rounds, warmup=1, title=title)
    bars = [
        Bar(f"{title}: {name} / {OURS}", target, True, per_round(lambda other, own: other / own, samples, name, OURS))
        for name, target in ((SHIPPED, OVER_SHIPPED), (TIGHT, OVER_TIGHT))
        if name in samples and not P > LARGE
    ]
    left_out = [name for name in KINDS if name not in wanted]
    return Section(
        title,
        samples,
        bars,
        kind="lists",
        facts={"model": model, "T": TASKS, "P": P, "gradients": len(params)},
        bytes_moved=moved,
        copy=COPY,
        ratio_to=OURS,
        checks={"rtol": RTOL, "errors": errors},
        notes=[f"left out for want of memory: {', '.join(left_out)}"] if left_out else [],
    )
