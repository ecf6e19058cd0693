"""Whole training steps: what DB-MTL adds to the backward passes it needs anyway.

Every way to do the step, and the copy beside it, has a process of its own; they take turns. Two floors: gradients
dropped on arrival (what the balancer adds to the mere backward passes), and gradients dropped after each backward (the
loop anyone would write, which pays malloc for whole gradients that the balancer never holds).

How much a loop pays malloc depends on the layout of its heap, which differs from process to process and wanders over
the steps: page faults of one and the same loop range from none to 26,000 a step. So a sample is the mean of several
steps in a row, and every few rounds all processes are replaced by new ones.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks import steps
from benchmarks.bandwidth import Copy, fused_bytes
from benchmarks.models import Size
from benchmarks.report import Section
from benchmarks.timing import Bar, Samples, calls_lasting, interleave, per_round, sample
from benchmarks.workers import PAUSE, Worker

SIZE, QUICK_SIZE = Size(), Size(depth=2, width=64, batch=8)
COPY = "copy of as many bytes"
HOOK, AFTER, OURS = "drop in a hook", "drop after backward", "DBMTL"
COPY_SHARE = 0.8
"""The bar on added time is what moving the bytes would take at this share of copy bandwidth."""

ROUNDS_PER_PROCESS = 5
SAMPLE_SECONDS = 0.2


def run(*, rounds: int, quick: bool, threads: int) -> list[Section]:
    """One section."""
    size = QUICK_SIZE if quick else SIZE
    errors = steps.check(size)
    moved = fused_bytes(size.tasks, size.P)
    title = f"step: {size}"
    starts = range(0, rounds, ROUNDS_PER_PROCESS)
    samples: Samples = {}
    for generation, start in enumerate(starts):
        part = _run_processes(
            size,
            min(ROUNDS_PER_PROCESS, rounds - start),
            title=f"{title}, processes {generation + 1} of {len(starts)}",
            threads=threads,
            quick=quick,
        )
        samples = {name: samples.get(name, []) + taken for name, taken in part.items()}

    bars = [
        Bar(
            f"{title}: added to {HOOK!r} / ((4T+1)P*4 bytes at {COPY_SHARE} of copy bandwidth)",
            1.0,
            False,
            per_round(lambda own, floor, copy: (own - floor) / (copy / COPY_SHARE), samples, OURS, HOOK, COPY),
        ),
        Bar(
            f"{title}: whole step / loop with {AFTER!r}",
            1.0,
            False,
            per_round(lambda own, floor: own / floor, samples, OURS, AFTER),
        ),
    ]
    return [
        Section(
            title,
            samples,
            bars,
            bytes_moved=moved,
            copy=COPY,
            ratio_to=AFTER,
            floor=HOOK,
            checks={"rtol": steps.RTOL, "errors": errors},
        )
    ]


def _run_processes(size: Size, rounds: int, *, title: str, threads: int, quick: bool) -> Samples:
    """Samples of all subjects, each in one new process."""
    subjects: dict[str, tuple[Callable[..., object], object]] = {COPY: (Copy, fused_bytes(size.tasks, size.P))}
    subjects |= {name: (kind, size) for name, kind in {**steps.FLOORS, **steps.BALANCED}.items()}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(threads, *subject, forked=quick)) for name, subject in subjects.items()
        }
        for worker in workers.values():
            worker.wait()
        seconds = 0.0 if quick else SAMPLE_SECONDS
        turns = {}
        for name, worker in workers.items():
            time.sleep(PAUSE)
            turns[name] = functools.partial(worker.call, sample, worker.call(calls_lasting, seconds))
        return interleave(turns, rounds, warmup=1, title=title, pause=PAUSE)
