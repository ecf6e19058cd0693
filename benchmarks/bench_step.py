"""Whole training steps: what DB-MTL adds to the backward passes it needs anyway.

The ways to do the step, and the copy beside them, take turns. Two floors: gradients dropped on arrival (what the
balancer adds to the mere backward passes), and gradients dropped after each backward (the loop anyone would write,
which pays malloc for whole gradients that the balancer never holds).

How much a loop pays malloc depends on the layout of its heap, which differs from process to process and wanders over
the steps: page faults of one and the same loop range from none to 26,000 a step. So a sample is the mean of several
steps in a row, short steps have each a process of its own, and every few rounds all processes are replaced by new ones.
In long steps page faults are little, but one and the same loop differs by 10 % from process to process, which is more
than balancing adds: they share one, which is replaced likewise.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import qm9_folder, steps, torchjd_steps
from benchmarks.bandwidth import COPY, ITEM, LARGEST, Copy, fused_bytes
from benchmarks.graph_timing import synchronize
from benchmarks.models import Problem, Size
from benchmarks.molecule_model import GEOMETRY, TARGETS, Molecules
from benchmarks.plan import LeftOut, Options, Table, free_bytes, require_memory
from benchmarks.report import Section
from benchmarks.steps import AFTER, FORWARD, IN_HOOK, ONE_BACKWARD, OURS
from benchmarks.timing import Bar, Sample, Samples, calls_lasting, interleave, per_round, sample
from benchmarks.vision_models import Vision
from benchmarks.workers import PAUSE, ROUNDS_PER_PROCESS, Here, Worker

SIZE, QUICK_SIZE = Size(), Size(depth=2, width=64, batch=8)
COPY_SHARE = {"cpu": 0.8, "cuda": 0.9}
"""The bar on added time is what moving the bytes would take at this share of copy bandwidth,"""
LAUNCHES = {"cpu": 0.0, "cuda": 10e-6}
"""and these seconds for each task."""

SAMPLE_SECONDS = 0.2
GREEDIEST = ("LibMTL", "TorchJD")
"""How the names begin of those that hold several matrices at once: where memory is short, they give way in turn."""


class Case(NamedTuple):
    """A problem to measure.

    :param checked: A small one with the same parameters, on which all candidates must agree first.
    :param rounds: At most.
    :param together: Whether all ways to do the step share a process.
    :param gpu_only: Why it is left out on a CPU, or nothing.
    """

    problem: Problem
    checked: Problem
    rounds: int
    together: bool = True
    gpu_only: str = ""


def cases(options: Options) -> Iterator[Case]:
    """The MLP first: the bars are about it."""
    data = options.data or qm9_folder.folder()
    if options.quick:
        yield Case(QUICK_SIZE, QUICK_SIZE, options.rounds, together=False)
        molecules = Molecules(data, 2, width=8, rounds=1)
        yield Case(molecules, molecules, options.rounds)
        return
    yield Case(SIZE, SIZE, options.rounds, together=False)
    gpu = options.device.type == "cuda"
    large = "on a CPU a step takes tens of seconds, and balancing less of it than two steps differ by"
    domains = Vision("office", 3, 2, 64, 64)
    # What balancing adds to a long step on a CPU is less than two steps differ by: that takes many rounds to show. On a
    # GPU time is short, and steps differ less.
    rounds = ROUNDS_PER_PROCESS if gpu else options.rounds
    yield Case(Vision("office", 3, 64 if gpu else 4), domains, rounds)
    few = ROUNDS_PER_PROCESS  # beside three domains four say little that is new
    yield Case(Vision("office", 4, 64 if gpu else 4), domains._replace(tasks=4), few)
    yield Case(Molecules(data, 128 if gpu else 32), Molecules(data, 4), rounds)
    yield Case(Vision("scene", 3, 8, 288, 384), Vision("scene", 3, 2, 64, 64), rounds, gpu_only=large)
    vit = Vision("vit", 5, 16)
    yield Case(vit, vit._replace(batch=1), rounds, gpu_only=large)


def tables(options: Options) -> Iterator[Table]:
    """One for each case."""
    for case in cases(options):
        yield Table(f"step: {case.problem}", functools.partial(_case, case, options))


def _case(case: Case, options: Options) -> Section:
    problem, device = case.problem, options.device
    if case.gpu_only and device.type == "cpu":
        raise LeftOut(case.gpu_only)
    if isinstance(problem, Molecules):
        require_qm9(problem.data)
    refused: dict[str, str] = {}
    errors = steps.check(case.checked, device=device, refused=refused)
    if device.type == "cuda":  # what the check took is for the processes that are timed
        gc.collect()
        torch.cuda.empty_cache()
    subjects = steps.without(refused, steps.subjects(device))
    too_large = _too_large(subjects, problem, device)
    subjects = steps.without(dict.fromkeys(too_large, ""), subjects)
    require_memory(_bytes(subjects, problem), device)
    moved = fused_bytes(problem.tasks, problem.P)
    title = f"step: {problem}"
    samples: Samples = {}
    starts = range(0, min(case.rounds, options.rounds), ROUNDS_PER_PROCESS)
    for generation, start in enumerate(starts):
        rounds = min(ROUNDS_PER_PROCESS, case.rounds - start, options.rounds - start)
        of_all = f"{title}, processes {generation + 1} of {len(starts)}"
        part = _run_processes(problem, subjects, rounds, case.together, title=of_all, options=options)
        samples = {name: samples.get(name, []) + taken for name, taken in part.items()}

    notes = [f"left out, as it failed: {name} ({why})" for name, why in refused.items()]
    notes += [f"left out for want of memory: {name}" for name in too_large]
    if isinstance(problem, Vision) and problem.kind == "office" and torchjd_steps.WHY_NOT is None:
        notes.append(
            "TorchJD differentiates all features for each row of the Jacobian, so that every task's graph is gone "
            "through for every task, mostly with zeros."
        )
    return Section(
        title,
        samples,
        list(_bars(title, samples, problem, device.type)) if isinstance(problem, Size) else [],
        kind="step",
        facts={"T": problem.tasks, "P": problem.P, "forward": FORWARD, "own": OURS, "one": ONE_BACKWARD},
        bytes_moved=moved,
        copy=COPY,
        ratio_to=AFTER,
        floor=IN_HOOK,
        checks={"rtol": steps.RTOL, "errors": errors},
        notes=[*notes, *([torchjd_steps.WHY_NOT] if torchjd_steps.WHY_NOT else [])],
    )


def _bars(title: str, samples: Samples, problem: Problem, device: str) -> Iterator[Bar]:
    """Only where what is added is more than two steps differ by."""
    share, launches = COPY_SHARE[device], LAUNCHES[device] * problem.tasks

    def added(own: float, floor: float, copy: float) -> float:
        return (own - floor) / (copy / share + launches)

    name = f"{title}: added to {IN_HOOK!r} / ((4T+1)P*4 bytes at {share} of copy bandwidth"
    name += " and 10 µs a task)" if launches else ")"
    yield Bar(name, 1.0, False, per_round(added, samples, OURS, IN_HOOK, COPY))
    if device == "cpu":
        ratios = per_round(lambda own, floor: own / floor, samples, OURS, AFTER)
        yield Bar(f"{title}: whole step / loop with {AFTER!r}", 1.0, False, ratios)


def _too_large(kinds: Iterable[str], problem: Problem, device: torch.device) -> list[str]:
    """Those of ``kinds`` that give way for the others to fit."""
    left, found = list(kinds), []
    for start in GREEDIEST:
        if _bytes(left, problem) > free_bytes(device):
            found += [name for name in left if name.startswith(start)]
            left = [name for name in left if name not in found]
    return found


def _bytes(kinds: Iterable[str], problem: Problem) -> float:
    """Of all ``kinds`` in one process: each keeps its model, gradients and state, and the greediest step needs its
    matrices besides. What activations take is left to :data:`benchmarks.plan.MEMORY_SHARE`."""
    T, kinds = problem.tasks, list(kinds)
    balanced = [name for name in kinds if name not in (*steps.PARTS, *steps.FLOORS, *steps.OTHERS)]
    passing = max(4 if name.startswith("LibMTL") else 2 if name.startswith("TorchJD") else 1 for name in kinds)
    copied = min(LARGEST, fused_bytes(T, problem.P))
    return (2 * len(kinds) + T * (len(balanced) + passing)) * problem.P * ITEM + copied


def require_qm9(data: Path) -> None:
    """Raise :class:`LeftOut` if the files are not there."""
    if not (data / GEOMETRY).exists() or not (data / TARGETS).exists():
        raise LeftOut(f"needs QM9: {GEOMETRY} and {TARGETS} in a folder named by --data")


def _run_processes(
    problem: Problem,
    kinds: dict[str, Callable[..., steps.Step]],
    rounds: int,
    together: bool,
    *,
    title: str,
    options: Options,
) -> Samples:
    """Samples of all subjects, in new processes: one for all of them, or one for each."""
    device = str(options.device)
    subjects: Subjects = {COPY: (Copy, fused_bytes(problem.tasks, problem.P), device)}
    subjects |= {name: (kind, problem, device) for name, kind in kinds.items()}
    groups = [subjects] if together else [{name: subject} for name, subject in subjects.items()]
    with ExitStack() as stack:
        workers: dict[str, Here | Worker] = {}
        for group in groups:
            worker = _worker(options, group)
            stack.enter_context(worker)
            workers |= dict.fromkeys(group, worker)
        for worker in workers.values():
            worker.wait()
        seconds, pause = (0.0, 0.0) if options.quick else (SAMPLE_SECONDS, PAUSE)
        turns = {}
        for name, worker in workers.items():
            time.sleep(pause)
            calls = worker.call(_calls_lasting, name, seconds, device)
            turns[name] = functools.partial(worker.call, _sample, name, calls, device)
        return interleave(turns, rounds, warmup=1, title=title, pause=pause)


Subjects = dict[str, tuple[Any, ...]]
"""By name: what builds each, and its arguments."""

Built = dict[str, Callable[[], object]]


def _worker(options: Options, subjects: Subjects) -> Here | Worker:
    return Here(_build, subjects) if options.quick else Worker(options.threads, _build, subjects)


def _build(subjects: Subjects) -> Built:
    return {name: build(*arguments) for name, (build, *arguments) in subjects.items()}


def _calls_lasting(subjects: Built, name: str, seconds: float, device: str) -> int:
    return calls_lasting(subjects[name], seconds, functools.partial(synchronize, torch.device(device)))


def _sample(subjects: Built, name: str, calls: int, device: str) -> Sample:
    return sample(subjects[name], calls, functools.partial(synchronize, torch.device(device)))
