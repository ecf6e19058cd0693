"""Real lists of gradients, from where autograd would have left them to ``.grad``, beside a copy of as many bytes.

Each table in a fresh process, so that no earlier one decides on which heap its candidates allocate.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from operator import attrgetter

from benchmarks import comparators, list_comparators, shapes
from benchmarks.bandwidth import COPY, Copy, fused_bytes
from benchmarks.bench_ops import BETA, Ready
from benchmarks.list_comparators import KINDS, SHIPPED, TIGHT, Candidate, Lists
from benchmarks.plan import Options, Table, free_bytes, require_memory
from benchmarks.report import Section
from benchmarks.steps import OURS, OWN_RTOL
from benchmarks.timing import Bar, interleave, per_round
from benchmarks.workers import Here, Worker, leaving_no_holes

TASKS = 3
OVER_SHIPPED, OVER_TIGHT = 4.0, 1.5
SMALL = [(100, 90), (100,), (9, 100)]
"""What every candidate has to be right with before float32 norms of long rows are allowed for."""
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

    rounds = min(options.rounds, ROUNDS_LARGE) if P > LARGE else options.rounds
    arguments = _build, params, wanted, options.quick
    with Here(*arguments) if options.quick else Worker(options.threads, *arguments, forked=True) as worker:
        errors = worker.call(attrgetter("errors"))
        takers = {name: functools.partial(worker.call, Ready.sample, name) for name in (COPY, *wanted)}
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
        checks={"rtol": comparators.LARGE_RTOL, "errors": errors},
        notes=[f"left out for want of memory: {', '.join(left_out)}"] if left_out else [],
    )


def _build(params: list[shapes.Shape], wanted: Sequence[str], here: bool) -> Ready:
    with nullcontext() if here else leaving_no_holes():
        _checked(SMALL, wanted, comparators.RTOL)
        candidates, errors = _checked(params, wanted, comparators.LARGE_RTOL)
    return Ready.by_clock({COPY: Copy(fused_bytes(TASKS, shapes.numbers(params))), **candidates}, errors)


def _checked(
    params: Sequence[shapes.Shape], wanted: Sequence[str], rtol: float
) -> tuple[dict[str, Candidate], dict[str, float]]:
    """Candidates that have run once, and their errors.

    :raises AssertionError: If one is above ``rtol``, or of ours above :data:`OWN_RTOL`.
    """
    lists, candidates, errors = Lists(params, TASKS), {}, {}
    for name in wanted:
        candidates[name] = KINDS[name](lists, BETA)
        lists.write([None] * len(params))
        candidates[name]()
        errors[name] = lists.error(BETA)
        allowed = OWN_RTOL if name == OURS else rtol
        if not errors[name] <= allowed:
            raise AssertionError(f"{name} differs from float64 by {errors[name]:.1e}, more than {allowed:.0e}")
    return candidates, errors
