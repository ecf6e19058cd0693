"""The one-shot operator on a ready gradient matrix, against LibMTL's expression and torch's own operators.

All candidates and a copy of as many bytes in turns. Small sizes are called many times for one sample, with Python's
overhead; their data stays in cache, as it would in a tight loop. Tables of :func:`growth` go through sizes.

What a call that allocates costs on a CPU depends on malloc's heap: with one and the same size 160,000 page faults or
none, by what ran before. So each table has fresh processes. One is under the C library's defaults, as users are; in
another malloc keeps what it once had, and what allocates runs there once more. Tables of :func:`growth` have only the
latter: points of one line must be in one state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import comparators
from benchmarks.bandwidth import COPY, ITEM, LARGEST, Copy, fused_bytes
from benchmarks.comparators import ALLOCATING, COMPILED, LIBMTL, TIGHT, OneShot
from benchmarks.graph_timing import Calls, buffer_sets, graph_timer
from benchmarks.plan import Options, Table, free_bytes, require_memory
from benchmarks.report import Section
from benchmarks.timing import Bar, Sample, Samples, calls_lasting, interleave, per_round, sample
from benchmarks.workers import (
    KEPT_BY_DEFAULT,
    PAUSE,
    ROUNDS_PER_PROCESS,
    SETTLING_CALLS,
    Here,
    Worker,
    can_keep_memory,
    keep_memory,
    leaving_no_holes,
)

SHAPES = ((3, 11_200_000), (11, 2_000_000), (3, 100_000))
QUICK_SHAPES = ((3, 10_000), (2, 1_000))
BETA = 0.9
SAMPLE_SECONDS = 5e-3
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
    kinds = comparators.factories(compiled=options.compiled)
    ours = list(kinds)[-1]
    groups = [_Group(kinds)]
    notes = [] if options.compiled else [f"left out: {COMPILED} (--compile)"]
    again = {comparators.kept(name): kinds[name] for name in ALLOCATING}
    if T * P * ITEM <= KEPT_BY_DEFAULT:
        notes.append(f"malloc keeps blocks of up to {KEPT_BY_DEFAULT >> 20} MB anyway")
    elif _keeps(options):
        groups.append(_Group(again, copied=False, kept=True))
    else:
        why = "--quick runs in one process" if options.quick else "malloc is not glibc's"
        notes += [f"left out: {name} ({why})" for name in again]
    measured = _measure(title, T, P, groups, options.rounds, options)
    bars = [
        Bar(f"{title}: {name} / {ours}", TARGETS[name], True, per_round(_quotient, measured.samples, name, ours))
        for name in judged
    ]
    return measured.section(title, "balance", {"T": T, "P": P}, ours, bars=bars, notes=notes)


def _growth(title: str, series: str, T: int, P: int, options: Options) -> Section:
    torch.cuda.empty_cache()  # what earlier tables left there does not count as free
    factories = comparators.factories(device_type=options.device.type)
    wanted = [LIBMTL, TIGHT, list(factories)[-1]]
    sets = _sets(T, P, options.device)
    while len(wanted) > 1 and _bytes(T, P, len(wanted), sets) > free_bytes(options.device):
        del wanted[0]
    require_memory(_bytes(T, P, len(wanted), sets), options.device)
    kept = _keeps(options)
    group = _Group({name: factories[name] for name in wanted}, kept=kept)
    measured = _measure(title, T, P, [group], min(options.rounds, GROWTH_ROUNDS), options)
    facts: dict[str, object] = {"T": T, "P": P, "series": series}
    if options.device.type == "cpu":
        facts["malloc"] = "kept" if kept else "default"
    return measured.section(title, "growth", facts, wanted[-1])


def _keeps(options: Options) -> bool:
    return options.device.type == "cpu" and not options.quick and can_keep_memory()


def _sets(T: int, P: int, device: torch.device) -> int:
    """Of buffers that take turns: on a GPU so many that none is in its cache."""
    return buffer_sets((2 * T + 1) * P * ITEM, device) if device.type == "cuda" else 1


def _bytes(T: int, P: int, candidates: int, sets: int) -> int:
    """At the most: state and gradients of each; inputs, what they must become in float64, a row or two beside them, or
    later what LibMTL's expression allocates; the copy."""
    return (2 * candidates * T * sets + 4 * T + 8) * P * ITEM + LARGEST


class _Group(NamedTuple):
    """What shares a process.

    :param copied: Whether there is a copy of as many bytes, too.
    :param kept: Whether malloc keeps its memory there.
    """

    kinds: Mapping[str, Callable[[Tensor, Tensor, float], OneShot]]
    copied: bool = True
    kept: bool = False

    def names(self) -> list[str]:
        return [*([COPY] if self.copied else []), *self.kinds]


@dataclass
class Ready:
    """What has been found right, in the process in which it is timed."""

    takers: dict[str, Callable[[], Sample]]
    errors: dict[str, float]
    calls: dict[str, int] = field(default_factory=dict)  # for one sample

    @classmethod
    def by_clock(cls, functions: Mapping[str, Callable[[], object]], errors: dict[str, float]) -> Ready:
        """On a CPU; counts calls, so nothing else may run."""
        calls = {name: calls_lasting(function, SAMPLE_SECONDS) for name, function in functions.items()}
        takers = {name: functools.partial(sample, function, calls[name]) for name, function in functions.items()}
        return cls({**takers}, errors, calls)

    def sample(self, name: str) -> Sample:
        """One of one candidate."""
        return self.takers[name]()


def _build(T: int, P: int, group: _Group, device: torch.device, here: bool) -> Ready:
    with nullcontext() if here else leaving_no_holes():
        built, errors = _checked(T, P, group, device)
    sets = range(_sets(T, P, device))
    functions: dict[str, Calls] = {**built}
    if group.copied:
        functions = {COPY: [Copy(fused_bytes(T, P), device) for _ in sets], **built}
    if group.kept:
        keep_memory()  # not before: it would keep what the checks took, too, and in pieces
        for functions_of in functions.values():
            for _ in range(SETTLING_CALLS):
                functions_of[0]()
    if device.type == "cuda":
        return Ready({name: graph_timer(of, device) for name, of in functions.items()}, errors)
    return Ready.by_clock({name: function for name, (function,) in functions.items()}, errors)


def _checked(T: int, P: int, group: _Group, device: torch.device) -> tuple[dict[str, list[OneShot]], dict[str, float]]:
    comparators.check_small(group.kinds, T, BETA, device)
    ema, grads = comparators.inputs(T, P, device=device)
    sets = range(_sets(T, P, device))
    built = {name: [build(ema, grads, BETA) for _ in sets] for name, build in group.kinds.items()}
    expected = comparators.exact(ema, grads, BETA)
    del ema, grads
    errors = {name: comparators.check(name, of[0], expected, comparators.rtol(name)) for name, of in built.items()}
    return built, errors


class _Measured(NamedTuple):
    """What a table is made of."""

    samples: Samples
    errors: dict[str, float]
    calls: dict[str, int]

    def section(
        self,
        title: str,
        kind: str,
        facts: Mapping[str, Any],
        ours: str,
        bars: Sequence[Bar] = (),
        notes: Sequence[str] = (),
    ) -> Section:
        counts = ", ".join(f"{name} {calls}" for name, calls in self.calls.items())
        return Section(
            title,
            self.samples,
            bars,
            kind=kind,
            facts=facts,
            bytes_moved=fused_bytes(facts["T"], facts["P"]),
            copy=COPY,
            ratio_to=ours,
            checks={"rtol": max(comparators.rtol(name) for name in self.errors), "errors": self.errors},
            notes=[*([f"calls per sample: {counts}"] if counts else []), *notes],
        )


def _measure(title: str, T: int, P: int, groups: Sequence[_Group], rounds: int, options: Options) -> _Measured:
    """Each group in a process that is replaced now and then; on a GPU, and in a quick run, in this one."""
    here = options.quick or options.device.type == "cuda"
    measured = _Measured({}, {}, {})
    rounds_of_one = rounds if here else ROUNDS_PER_PROCESS
    for start in range(0, rounds, rounds_of_one):
        part = _in_processes(title, T, P, groups, min(rounds_of_one, rounds - start), options, here)
        for name, taken in part.samples.items():
            measured.samples.setdefault(name, []).extend(taken)
        measured.errors.update(part.errors)
        measured.calls.update(part.calls)
    return measured


def _in_processes(
    title: str, T: int, P: int, groups: Sequence[_Group], rounds: int, options: Options, here: bool
) -> _Measured:
    """``rounds`` of all groups by turns, each group in one process."""
    measured = _Measured({}, {}, {})
    takers: dict[str, Callable[[], Sample]] = {}
    with ExitStack() as stack:
        for group in groups:
            arguments = (_build, T, P, group, options.device, here)
            worker = Here(*arguments) if here else Worker(options.threads, *arguments, forked=True)
            stack.enter_context(worker)
            # Waits until all is built: nothing else may run while calls are counted.
            errors, calls = worker.call(attrgetter("errors", "calls"))
            measured.errors.update(errors)
            measured.calls.update(calls)
            takers |= {name: functools.partial(worker.call, Ready.sample, name) for name in group.names()}
        pause = PAUSE if len(groups) > 1 else 0.0
        measured.samples.update(interleave(takers, rounds, warmup=2, title=title, pause=pause))
    return measured


def _quotient(first: float, second: float) -> float:
    return first / second
