"""Peak memory of a DB-MTL step over the bare loop that drops gradients after each backward, and gradients in flight.

Every figure comes from a new process. Two measures that share no code: tensors, from torch's own record of what its
allocator handed out (exact, blind to what C++ code allocates by itself), and resident pages (the kernel's high-water
mark, reset after warm-up; sees everything, fragmentation of the heap included). Each has its bar: `T P` numbers and one
bucket in tensors, `(T + 1) P` and some MB in pages. On a GPU, where gradients do not come in buckets: the latter, of
what its allocator had handed out.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks import steps
from benchmarks.bandwidth import ITEM
from benchmarks.models import Problem, Size
from benchmarks.plan import Options, Table
from benchmarks.report import Section
from benchmarks.steps import AFTER, FORWARD, OURS, Step
from benchmarks.timing import Bar
from benchmarks.workers import Here, Worker
from dbmtl_fused.balancer import CPU_BUCKET_BYTES

SIZE, QUICK_SIZE = Size(), Size(depth=2, width=64, batch=8)
MB = 1e6
SLACK = 16 * MB
STEPS = 3
PROCESSES = 3
"""How often resident pages are measured: fragmentation differs from process to process."""

GROWING_WIDTH, GROWING_T = (256, 512, 1024, 2048), (1, 2, 4, 8, 16)
GROWN = Size(depth=8, width=512, tasks=3, batch=64)
"""What grows in width or in tasks."""


def tables(options: Options) -> Iterator[Table]:
    """The same MLP as the step's; then wider ones, then ones with more tasks."""
    size = QUICK_SIZE if options.quick else SIZE
    yield Table(f"memory: {size}", functools.partial(_all, size, options))
    grown = [("P", GROWN._replace(width=width)) for width in GROWING_WIDTH]
    grown += [("T", GROWN._replace(tasks=tasks)) for tasks in GROWING_T]
    if options.quick:
        grown = [("P", QUICK_SIZE), ("T", QUICK_SIZE._replace(tasks=2))]
    for series, size in grown:
        title = f"growing {series}: memory of {size}"
        yield Table(title, functools.partial(_growth, title, series, size, options))


def _all(size: Size, options: Options) -> Section:
    """Every way to do the step."""
    cpu = options.device.type == "cpu"
    measures: dict[str, dict[str, float]] = {}
    resident: dict[str, list[float]] = {}
    for name, kind in steps.subjects(options.device).items():
        if name == FORWARD:
            continue
        measures[name] = {"tensors": _tensors(kind, size, options)}
        if not cpu:
            continue
        resident[name] = []
        for _ in range(PROCESSES if name in (AFTER, OURS) and not options.quick else 1):
            with Here(kind, size) if options.quick else Worker(options.threads, kind, size) as worker:
                resident[name].append(worker.call(peak_of_pages))
                in_flight = worker.call(peak_of_gradients) if name in (AFTER, OURS) else None
        measures[name]["resident"] = statistics.median(resident[name])
        if in_flight is not None:
            measures[name]["gradients in flight"] = in_flight

    title = f"memory: {size}"
    name = f"{title}: peak over the bare loop"
    tensors = [measures[OURS]["tensors"] - measures[AFTER]["tensors"]]
    state = size.tasks * size.P * ITEM
    if cpu:
        bucket = CPU_BUCKET_BYTES + size.width**2 * ITEM
        pages = [own - bare for own, bare in zip(resident[OURS], resident[AFTER], strict=True)]
        in_flight_most = f"{title}: gradients in flight, against one bucket and the gradient that fills it"
        bars = [
            _bar(f"{name}, tensors, against T*P*4 and such a bucket", state + bucket, tensors),
            _bar(f"{name}, resident pages", state + size.P * ITEM + SLACK, pages),
            _bar(in_flight_most, bucket, [measures[OURS]["gradients in flight"]]),
        ]
    else:
        bars = [_bar(f"{name}, tensors", state + size.P * ITEM + SLACK, tensors)]
    notes = [f"P*4 = {size.P * ITEM / MB:.1f} MB, bucket_bytes = {CPU_BUCKET_BYTES / MB:.2f} MB"]
    return _section(title, "memory", size, measures, bars=bars, notes=notes)


def _growth(title: str, series: str, size: Size, options: Options) -> Section:
    """The step and the bare loop."""
    kinds = {AFTER: steps.FLOORS[AFTER], OURS: steps.BALANCED[OURS]}
    measures = {name: {"tensors": _tensors(kind, size, options)} for name, kind in kinds.items()}
    return _section(title, "memory growth", size, measures, series=series)


def _section(
    title: str, kind: str, size: Size, measures: dict[str, dict[str, float]], series: str = "", **others: Any
) -> Section:
    table = {name: {key: value / MB for key, value in of.items()} for name, of in measures.items()}
    facts = {"T": size.tasks, "P": size.P, "own": OURS, "bare": AFTER, **({"series": series} if series else {})}
    return Section(title, {}, others.pop("bars", []), kind=kind, facts=facts, megabytes=table, **others)


def _tensors(kind: Callable[..., Step], size: Problem, options: Options) -> float:
    """Most bytes in tensors at once, in a new process."""
    measure = peak_of_tensors if options.device.type == "cpu" else peak_of_device
    with Here(_nothing) if options.quick else Worker(options.threads, _nothing, forked=True) as worker:
        return worker.call(measure, kind, size)


def peak_of_pages(step: Step) -> float:
    """Highest resident set size in bytes during :data:`STEPS` steps after as many to warm up."""
    # Makes torch import sympy (40 MB), as any optimizer and any backward with a seed does: not the step's memory.
    torch.zeros(1, requires_grad=True).backward(torch.ones(1))
    for _ in range(STEPS):
        step()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    for _ in range(STEPS):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def peak_of_device(_: object, kind: Callable[..., Step], size: Problem) -> float:
    """Most bytes that the GPU's allocator had handed out at once, from building the model on."""
    step = kind(size, "cuda")
    for _ in range(STEPS):
        step()
    return float(torch.cuda.max_memory_allocated())


def peak_of_tensors(_: object, kind: Callable[..., Step], size: Problem) -> float:
    """Most bytes torch's CPU allocator had handed out at once, from building the model through :data:`STEPS` steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    # acc_events: nothing to accumulate here, but torch 2.11 warns without it.
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step = kind(size)
        for _ in range(STEPS):
            step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return float(peak)


def peak_of_gradients(step: Step) -> float:
    """Most bytes of shared gradients alive at once while the backward passes run, the one just arriving included.

    Seen from prehooks that come before the step's own. Weak references to storages tell which are still alive, whoever
    holds them; that number only grows when a gradient arrives, so looking then misses nothing.
    """
    storages: dict[int, tuple[StorageWeakRef, int]] = {}
    peak = 0

    def arrive(grads: tuple[Any, ...]) -> None:
        nonlocal peak
        for key in [key for key, (storage, _) in storages.items() if storage.expired()]:
            del storages[key]
        storage = grads[0].untyped_storage()
        storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        peak = max(peak, sum(size for _, size in storages.values()))

    # Of a copy, whose nodes have these prehooks before a balancer adds its own.
    memo: dict[int, Any] = {}
    model = copy.deepcopy(step.model, memo)
    nodes = [get_gradient_edge(p).node for p in model.shared()]
    for node in nodes:
        node.register_prehook(arrive)
    copy.deepcopy(step, memo)()
    return float(peak)


def _bar(name: str, most: float, values: list[float]) -> Bar:
    return Bar(name, most / MB, False, [value / MB for value in values], unit="MB")


def _nothing() -> None:
    """A subject for workers that build their own."""
