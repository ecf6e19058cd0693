"""The tables of :mod:`benchmarks.bench_gpu_ops`: what is measured beside what, and which bars it has to reach."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks import comparators, gpu_lists, shapes
from benchmarks.comparators import COMPILED, EPS, FOREACH, LIBMTL, TIGHT, fused, relative_error
from benchmarks.gpu_problems import (
    BETA,
    BF16_STATE,
    COPY_BYTES,
    COPY_KERNEL,
    FP32,
    LARGE_BYTES,
    Beginning,
    Dtypes,
    Exact,
    Matrices,
    RowLists,
    TightEagerMixed,
    copies,
)
from benchmarks.graph_timing import Calls, HostTimer, buffer_sets, graph_timer, open_timer, slope_timer
from benchmarks.report import Section
from benchmarks.timing import Bar, Quartiles, Sample, Samples, interleave, per_round
from dbmtl_fused import backends, balance_
from dbmtl_fused.reference import balance_ as reference_balance_

STREAM, EMPTY = "stream kernels", "empty kernel"
SHARE = {"cuda": 0.95, "triton": 0.93}
EMA_UPDATE_SHARE = {"cuda": 0.92, "triton": 0.90}
COMBINE_SHARE, COMBINE_COLD_SHARE = 0.95, 0.85
TIME_OVER_COPY = {6.7: 0.92, 11.2: 0.95, 25.6: 1.00}
"""T = 3: millions of columns -> time over that of copying what two phases move. Below 1 takes what L2 still holds."""
OVER_LIBMTL, OVER_TIGHT = 2.8, 1.2
OVER_COMPILED, OVER_COMPILED_MANY = 1.4, 1.15
SMALL_WARM_US, SMALL_COLD_US = 3.0, 4.0
BEGIN_US = 2.0
CUDA_OVER_TRITON = 1.03
"""Time of the CUDA kernels over that of the Triton kernels, in every table that has both."""

OVER_SHIPPED, OVER_LIBMTL_LISTS, OVER_TIGHT_LISTS = 50.0, 4.0, 1.5
"""From lists of gradients to lists of gradients: with the others' own flatten and write-back."""

_GRID_ROUNDS = 5
_GRAPH_CALLS_SMALL = 100
_HOST_CALLS = 100
_MEMORY_SHARE = 0.9
_OWN_MATRICES = 4
_MATRICES = {LIBMTL: 8, FOREACH: 4, TIGHT: 2}
"""``(T + 1) x P`` float32 buffers: state, gradients, the state as it was, results; what comparators take besides."""


class Subject(NamedTuple):
    """A candidate: the same work on each buffer set, and its error when it runs once on the first."""

    calls: Calls
    error: Callable[[], float]


@dataclass
class Run:
    """Settings, and what was found so far."""

    device: torch.device
    rounds: int
    quick: bool
    compiled: bool
    deadline: float  # of time.monotonic()
    sections: list[Section] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def backends(self) -> list[str]:
        return backends.available(self.device.type)

    @property
    def kernels(self) -> list[str]:
        """Those but the reference, which on a GPU takes hundreds of launches where others take one."""
        return [name for name in self.backends if name != "reference" or self.device.type == "cpu"]

    @contextlib.contextmanager
    def going_on(self, name: str) -> Iterator[None]:
        """What fails is noted, such as for want of memory; the rest is worth measuring all the same."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}")

    def backends_for(self, T: int, P: int) -> tuple[list[str], list[str]]:
        """Those of a table, the best last, and notes: at gigabytes the reference would take a third of the time."""
        if self.device.type == "cpu" or not _is_large(T, P):
            return self.backends[::-1], []
        return self.kernels[::-1], [f"left out, as it takes long: {fused('reference')}"]

    def largest(self, T: int, P: int) -> int:
        """``P``, or as many columns, in whole kilobytes, as fit the device's memory without comparators."""
        fitting = (self._free() - COPY_BYTES) / (4 * (T + 1) * _OWN_MATRICES)
        return P if fitting >= P else int(fitting) // 256 * 256

    def fitting(self, T: int, P: int, names: Sequence[str]) -> list[str]:
        """The comparators for which there is memory; the greediest, which come first, give way."""
        found, each = list(names), 4 * (T + 1) * P
        while found and COPY_BYTES + each * (_OWN_MATRICES + sum(_MATRICES[name] for name in found)) > self._free():
            del found[0]
        return found

    def _free(self) -> float:
        """Bytes that may be taken."""
        return _MEMORY_SHARE * torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else math.inf


def _stream(sets: Sequence[Matrices], *, update: bool) -> Calls:
    """Stream kernels with the reads and writes of ``combine``, and with ``update`` of ``balance_``; float32."""
    from benchmarks import stream_kernels

    def call(of: Matrices) -> None:
        if update:
            stream_kernels.update(of.ema, of.grads)
        stream_kernels.add_rows(of.ema, of.out)

    return [functools.partial(call, of) for of in sets]


def _skipped_without_gpu(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return []
    return [f"skipped, as they need a GPU: {COPY_KERNEL}, {STREAM}, {EMPTY}, CUDA graphs; times are the clock's"]


# --- Tables


def measure_balance(run: Run, T: int, P: int, dtypes: Dtypes, *, grid: bool = False) -> None:
    """``balance_`` on a ready gradient matrix.

    :param grid: Few rounds and no bars.
    """
    P = run.largest(T, P)
    moved = dtypes.bytes("balance_", T, P)
    # What one call touches: the state, the gradients and the sum, each once.
    sets = _matrices(run, T, P, dtypes, dtypes.bytes("combine", T, P) + T * P * dtypes.grad.itemsize)
    exact = Exact(sets[0])

    def operator(op: Callable[..., None]) -> Subject:
        return Subject([functools.partial(of.balance_, op) for of in sets], functools.partial(exact.error_of, op))

    expressions = _expressions(dtypes)
    fitting = run.fitting(T, P, list(expressions))
    notes = [f"left out for want of memory: {name}" for name in expressions if name not in fitting]
    subjects: dict[str, Callable[[], Subject]] = {}
    for name in fitting:

        def expression(build: Callable[..., comparators.OneShot] = expressions[name]) -> Subject:
            built = [build(of.ema, of.grads, BETA) for of in sets]
            return Subject(built, functools.partial(exact.error_of_expression, built[0]))

        subjects[name] = expression
    if run.compiled and not grid and dtypes == FP32 and (run.quick or _is_compiled(T, P)):
        torch._dynamo.reset()
        compiled = torch.compile(reference_balance_, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
        subjects[COMPILED] = functools.partial(operator, compiled)
    chosen, left_out = run.backends_for(T, P)
    for backend in chosen:
        subjects[fused(backend)] = functools.partial(operator, backends.operators(backend).balance_)

    streams = _stream(sets, update=True) if _has_streams(run, dtypes) else None
    title = f"{'grid: ' if grid else ''}balance_ {dtypes}, T={T}, P={P / 1e6:.4g}M"
    rounds = min(run.rounds, _GRID_ROUNDS) if grid else run.rounds
    samples, errors, better = _measure(run, title, subjects, moved, streams, dtypes.rtol, rounds)
    bars = [] if grid else [*_balance_bars(title, run, samples, better, T, P, dtypes), *_beside_triton(title, samples)]
    facts = {"T": T, "P": P, "dtypes": str(dtypes)}
    others: dict[str, Any] = {"kind": "grid" if grid else "", "facts": facts, "notes": [*notes, *left_out]}
    _publish(run, title, samples, bars, moved, better, errors, dtypes.rtol, len(sets), **others)


def measure_grid(run: Run, T: int, P: int, dtypes: Dtypes) -> None:
    """One of many sizes of ``balance_``."""
    measure_balance(run, T, P, dtypes, grid=True)


def _expressions(dtypes: Dtypes) -> dict[str, Callable[..., comparators.OneShot]]:
    """What computes the same in torch's own operators, the greediest for memory first."""
    if dtypes == BF16_STATE:  # they do not round stochastically
        return {}
    if dtypes != FP32:
        return {LIBMTL: comparators.LibMTLExpression, TIGHT: TightEagerMixed}
    return {LIBMTL: comparators.LibMTLExpression, FOREACH: comparators.Foreach, TIGHT: comparators.TightEager}


def _is_compiled(T: int, P: int) -> bool:
    """Where torch.compile has bars; it takes its time for each."""
    return (T, P) == (3, 11_200_000) or (T in (3, 11) and _is_large(T, P))


def _balance_bars(title: str, run: Run, samples: Samples, better: str, T: int, P: int, dtypes: Dtypes) -> Iterator[Bar]:
    if dtypes != FP32:
        return
    large = _is_large(T, P)
    for backend in _measured(run, samples):
        own = fused(backend)
        if large or run.quick:
            yield _share(f"{title}: {own}", samples, better, own, SHARE[backend])
        if T == 3 and (limit := TIME_OVER_COPY.get(P / 1e6)):
            ratios = per_round(lambda own, copy: own / copy, samples, own, better)
            yield Bar(f"{title}: {own} / copy of as many bytes", limit, False, ratios)
        if large or P / 1e6 in TIME_OVER_COPY:
            many = OVER_COMPILED if T <= 5 else OVER_COMPILED_MANY
            for name, target in ((LIBMTL, OVER_LIBMTL), (TIGHT, OVER_TIGHT), (COMPILED, many)):
                if name in samples:
                    ratios = per_round(lambda other, own: other / own, samples, name, own)
                    yield Bar(f"{title}: {name} / {own}", target, True, ratios)


def measure_lists(run: Run, model: str, T: int, params: Sequence[shapes.Shape]) -> None:
    """From the tasks' lists of gradients to one list, as ``T`` backward passes and the optimizer see it."""
    P = shapes.numbers(list(params))
    moved = FP32.bytes("balance_", T, P)
    sets = [gpu_lists.Lists(params, T, run.device, i) for i in range(buffer_sets(8 * T * P, run.device))]
    kinds: dict[str, Callable[[gpu_lists.Lists], gpu_lists.Candidate]] = {
        gpu_lists.LIBMTL: gpu_lists.LibMTL,
        gpu_lists.FOREACH: gpu_lists.Foreach,
        gpu_lists.TIGHT: gpu_lists.TightFlatten,
    }
    for backend in reversed(run.kernels):
        kinds[fused(backend)] = functools.partial(gpu_lists.Operators, backend=backend)

    def subject(kind: Callable[[gpu_lists.Lists], gpu_lists.Candidate]) -> Subject:
        built = [kind(of) for of in sets]
        return Subject(built, lambda: sets[0].error(built[0]()))

    subjects = {name: functools.partial(subject, kind) for name, kind in kinds.items()}
    # The host takes part in each call, which no graph can hold.
    shipped = functools.partial(subject, gpu_lists.LibMTLShipped)
    title = f"lists to .grad, fp32, T={T}, {model}, {len(params)} tensors, P={P / 1e6:.4g}M"
    arguments = run, title, subjects, moved, None, FP32.rtol, run.rounds
    samples, errors, better = _measure(*arguments, in_the_open={gpu_lists.SHIPPED: shipped})
    bars = []
    for own in map(fused, _measured(run, samples)):
        for name, target in (
            (gpu_lists.SHIPPED, OVER_SHIPPED),
            (gpu_lists.LIBMTL, OVER_LIBMTL_LISTS),
            (gpu_lists.TIGHT, OVER_TIGHT_LISTS),
        ):
            if name in samples:
                ratios = per_round(lambda other, own: other / own, samples, name, own)
                bars.append(Bar(f"{title}: {name} / {own}", target, True, ratios))
    bars += _beside_triton(title, samples)
    notes = [f"{gpu_lists.SHIPPED}: by the clock, its way through host memory included"]
    _publish(run, title, samples, bars, moved, better, errors, FP32.rtol, len(sets), notes=notes)


def measure_combine(run: Run, T: int, P: int, dtypes: Dtypes) -> None:
    """``combine`` on a buffer that the caches do not hold."""
    P = run.largest(T, P)
    moved = dtypes.bytes("combine", T, P)
    sets = _matrices(run, T, P, dtypes, moved)
    norms = sets[0].sq_norms.double().sqrt()
    exact = (norms.max() / (norms + EPS)) @ sets[0].ema.double()

    def error(call: Callable[[], object]) -> float:
        sets[0].out.fill_(torch.nan)
        sets[0].out_sq_norm.copy_(exact.square().sum())  # not every candidate has it
        call()
        errors = relative_error(sets[0].out, exact), relative_error(sets[0].out_sq_norm, exact.square().sum())
        return max(errors)

    chosen, left_out = run.backends_for(T, P)
    eagerly = Matrices.combine_eagerly if dtypes == FP32 else None
    subjects = _operator("combine", Matrices.combine, eagerly, sets, chosen, error)
    streams = _stream(sets, update=False) if _has_streams(run, dtypes) else None
    title = f"combine {dtypes}, T={T}, P={P / 1e6:.4g}M"
    samples, errors, better = _measure(run, title, subjects, moved, streams, dtypes.rtol, run.rounds)
    target = COMBINE_SHARE if T * P * 4 >= LARGE_BYTES // 2 else COMBINE_COLD_SHARE
    bars = [
        _share(f"{title}: {fused(backend)}", samples, better, fused(backend), target)
        for backend in _measured(run, samples)
        if dtypes == FP32
    ]
    bars += _beside_triton(title, samples)
    _publish(run, title, samples, bars, moved, better, errors, dtypes.rtol, len(sets), notes=left_out)


def measure_gram(run: Run, T: int, P: int, dtypes: Dtypes) -> None:
    """``gram`` on a buffer that the caches do not hold."""
    P = run.largest(T, P)
    moved = dtypes.bytes("gram", T, P)
    sets = _matrices(run, T, P, dtypes, moved)
    scales = sets[0].sq_norms.double().sqrt()
    exact = sets[0].ema.double() @ sets[0].ema.double().t() / scales.outer(scales)

    def error(call: Callable[[], object]) -> float:
        sets[0].products.fill_(torch.nan)
        call()
        return relative_error(sets[0].products / scales.outer(scales), exact)

    eagerly = Matrices.gram_eagerly if dtypes == FP32 else None
    subjects = _operator("gram", Matrices.gram, eagerly, sets, run.kernels[::-1], error)
    title = f"gram {dtypes}, T={T}, P={P / 1e6:.4g}M"
    samples, errors, better = _measure(run, title, subjects, moved, None, dtypes.rtol, run.rounds)
    _publish(run, title, samples, _beside_triton(title, samples), moved, better, errors, dtypes.rtol, len(sets))


def measure_ema_update(run: Run, model: str, params: Sequence[shapes.Shape], dtypes: Dtypes) -> None:
    """``ema_update_`` over all parameters of a model in one call."""
    first = RowLists(params, dtypes, run.device)
    P = sum(grad.numel() for grad in first.grads)
    moved = dtypes.bytes("ema_update_", 1, P)
    number = buffer_sets(first.row.nbytes + sum(grad.nbytes for grad in first.grads), run.device)
    sets = [first, *(RowLists(params, dtypes, run.device, i) for i in range(1, number))]
    before = first.row.clone()
    exact = first.row.double() * float(first.beta)
    for slot, grad in zip(first.tables[0].tolist(), first.grads, strict=True):
        exact[slot[0] : slot[0] + slot[1]] += (1 - float(first.beta)) * grad.double().flatten()
    exact_sq_norm = exact.square().sum()

    def error(call: Callable[[], object]) -> float:
        first.row.copy_(before)
        first.sq_norm.fill_(torch.nan)
        call()
        return max(relative_error(first.row, exact), relative_error(first.sq_norm, exact_sq_norm))

    eagerly = RowLists.ema_update_eagerly if dtypes == FP32 else None
    subjects = _operator("ema_update_", RowLists.ema_update_, eagerly, sets, run.kernels[::-1], error)
    streams: Calls | None = None
    if _has_streams(run, dtypes):
        from benchmarks import stream_kernels

        streams = [functools.partial(stream_kernels.update, of.row, torch.randn_like(of.row)) for of in sets]
    title = f"ema_update_ {dtypes}, {model}, {len(params)} tensors, P={P / 1e6:.4g}M"
    samples, errors, better = _measure(run, title, subjects, moved, streams, dtypes.rtol, run.rounds)
    bars = [
        _share(f"{title}: {fused(backend)}", samples, better, fused(backend), EMA_UPDATE_SHARE[backend])
        for backend in _measured(run, samples)
        if dtypes == FP32
    ]
    bars += _beside_triton(title, samples)
    _publish(run, title, samples, bars, moved, better, errors, dtypes.rtol, len(sets))


def measure_small(run: Run, T: int, P: int) -> None:
    """``balance_`` where the launch counts: what one more call in a graph adds, less an empty kernel."""
    touched = FP32.bytes("balance_", T, P) // 2
    cold = _matrices(run, T, P, FP32, touched)
    exact = Exact(cold[0])
    for backend in run.kernels:
        _assert_right(exact.error_of(backends.operators(backend).balance_), FP32.rtol)
    for temperature, sets, limit in (("warm", cold[:1], SMALL_WARM_US), ("cold", cold, SMALL_COLD_US)):
        title = f"balance_ fp32, T={T}, P={P / 1e3:.4g}k, {temperature}: slope of a graph"
        calls = {
            fused(backend): [functools.partial(of.balance_, backends.operators(backend).balance_) for of in sets]
            for backend in reversed(run.kernels)
        }
        _slopes(run, title, calls, limit)


def measure_begin_step(run: Run, T: int) -> None:
    """``begin_step``, which is all launch: what one more call in a graph adds, less an empty kernel."""
    buffers = Beginning(T, run.device)
    calls: dict[str, Calls] = {}
    for backend in reversed(run.backends):
        op = backends.operators(backend).begin_step
        _assert_right(buffers.error_of(op), FP32.rtol)
        calls[fused(backend)] = [functools.partial(buffers.begin_step, op)]
    _slopes(run, f"begin_step fp32, T={T}: slope of a graph", calls, BEGIN_US)


def _slopes(run: Run, title: str, calls: Mapping[str, Calls], limit: float) -> None:
    """The table of what one more call adds; ``limit``: microseconds above an empty kernel."""
    number = 4 if run.quick else _GRAPH_CALLS_SMALL
    timers = {name: slope_timer(of, run.device, number) for name, of in calls.items()}
    if run.device.type == "cuda":
        from benchmarks import stream_kernels

        empty = functools.partial(stream_kernels.empty, torch.empty(1, device=run.device))
        timers[EMPTY] = slope_timer([empty], run.device, number)
    samples = interleave(timers, run.rounds, warmup=2, title=title)
    bars = [
        Bar(
            f"{title}, {fused(backend)} less {EMPTY}",
            limit,
            False,
            per_round(lambda own, empty: (own - empty) * 1e6, samples, fused(backend), EMPTY),
            "µs",
        )
        for backend in _measured(run, samples)
        if EMPTY in samples
    ]
    bars += _beside_triton(title, samples)
    run.sections.append(Section(title, samples, bars, notes=_skipped_without_gpu(run.device)))


def measure_host(run: Run, T: int, P: int, params: Sequence[shapes.Shape]) -> None:
    """What one call costs the host, launches not waited for."""
    matrices, lists = Matrices(T, P, FP32, run.device), RowLists(params, FP32, run.device)
    beginning = Beginning(T, run.device)
    functions: dict[str, Callable[[], object]] = {}
    for backend in run.kernels:
        ops = backends.operators(backend)
        functions[f"begin_step, {backend}"] = functools.partial(beginning.begin_step, ops.begin_step)
        functions[f"balance_, {backend}"] = functools.partial(matrices.balance_, ops.balance_)
        functions[f"dbmtl_fused.balance_, {backend}"] = functools.partial(
            balance_, matrices.ema, matrices.grads, matrices.beta, out=matrices.out, backend=backend
        )
        functions[f"combine, {backend}"] = functools.partial(matrices.combine, ops.combine)
        functions[f"gram, {backend}"] = functools.partial(matrices.gram, ops.gram)
        name = f"ema_update_, {len(params)} tensors, {backend}"
        functions[name] = functools.partial(lists.ema_update_, ops.ema_update_)
    for function in functions.values():
        function()
    calls = 2 if run.quick else _HOST_CALLS
    timers = {name: HostTimer(function, run.device, calls) for name, function in functions.items()}
    title = f"the host's time for a call, T={T}, P={P / 1e3:.4g}k"
    samples = interleave(timers, run.rounds, warmup=2, title=title)
    bars = [bar for name in functions for bar in _beside_triton(title, samples, name)]
    run.sections.append(Section(title, samples, bars))


def _operator(
    name: str,
    call: Callable[..., None],
    eagerly: Callable[..., None] | None,
    sets: Sequence[object],
    chosen: Sequence[str],
    error: Callable[[Callable[[], object]], float],
) -> dict[str, Callable[[], Subject]]:
    """The operator ``name`` of every backend that is ``chosen``, and before them torch's own way.

    :param call, eagerly: Of a buffer set, with the operator and without.
    :param error: Of a call on the first set.
    """

    def subject(calls: Calls) -> Subject:
        return Subject(calls, functools.partial(error, calls[0]))

    subjects: dict[str, Callable[[], Subject]] = {}
    if eagerly is not None:
        subjects[TIGHT] = functools.partial(subject, [functools.partial(eagerly, of) for of in sets])
    for backend in chosen:
        op = getattr(backends.operators(backend), name)
        subjects[fused(backend)] = functools.partial(subject, [functools.partial(call, of, op) for of in sets])
    return subjects


def _matrices(run: Run, T: int, P: int, dtypes: Dtypes, touched: int) -> list[Matrices]:
    return [Matrices(T, P, dtypes, run.device, i) for i in range(buffer_sets(touched, run.device))]


def _is_large(T: int, P: int) -> bool:
    return T * P * 4 >= LARGE_BYTES


def _has_streams(run: Run, dtypes: Dtypes) -> bool:
    return run.device.type == "cuda" and dtypes == FP32


def _measured(run: Run, samples: Samples) -> list[str]:
    """The backends with kernels of their own for this device, of those that were timed."""
    return [backend for backend in run.backends if fused(backend) in samples and backend in SHARE]


def _measure(
    run: Run,
    title: str,
    subjects: Mapping[str, Callable[[], Subject]],
    moved: int,
    streams: Calls | None,
    rtol: float,
    rounds: int,
    in_the_open: Mapping[str, Callable[[], Subject]] | None = None,
) -> tuple[Samples, dict[str, float], str]:
    """Samples of the yardsticks and of all subjects that are right, their errors, and which copy was the better.

    :param in_the_open: Subjects that no graph can hold.
    """
    timers = {name: graph_timer(calls, run.device) for name, calls in copies(moved, run.device).items()}
    copy_names = tuple(timers)
    errors: dict[str, float] = {}
    for of, timer in ((in_the_open or {}, open_timer), (subjects, graph_timer)):
        for name, build in of.items():
            with run.going_on(f"{title}: {name}"):
                subject = build()
                error = subject.error()
                _assert_right(error, rtol)
                timers[name] = timer(subject.calls, run.device)
                errors[name] = error
    if streams:  # not before: they write to the buffers that comparators start from
        timers[STREAM] = graph_timer(streams, run.device)
    samples = interleave(timers, rounds, warmup=2, title=title)
    return samples, errors, min(copy_names, key=lambda name: median(samples[name]))


def _assert_right(error: float, rtol: float) -> None:
    if not error <= rtol:
        raise AssertionError(f"differs from float64 by {error:.1e} of the largest entry, more than {rtol:.0e}")


def median(taken: Sequence[Sample]) -> float:
    """Seconds."""
    return Quartiles.of([sample.seconds for sample in taken]).median


def _share(name: str, samples: Samples, better: str, own: str, target: float) -> Bar:
    return Bar(name, target, True, per_round(lambda copy, own: copy / own, samples, better, own), "of copy")


def _beside_triton(title: str, samples: Samples, own: str = fused("cuda")) -> list[Bar]:
    """The bar of the CUDA backend's candidate ``own`` against its like of the Triton backend, where there are both."""
    other = own.removesuffix("cuda") + "triton"
    if not own.endswith("cuda") or not {own, other} <= samples.keys():
        return []
    ratios = per_round(lambda own, other: own / other, samples, own, other)
    return [Bar(f"{title}: {own} / {other}", CUDA_OVER_TRITON, False, ratios)]


def _publish(
    run: Run,
    title: str,
    samples: Samples,
    bars: Sequence[Bar],
    moved: int,
    better: str,
    errors: Mapping[str, float],
    rtol: float,
    sets: int,
    notes: Sequence[str] = (),
    **others: Any,
) -> None:
    ours = next((fused(backend) for backend in run.backends if fused(backend) in samples), None)
    all_notes = [f"{sets} buffer set(s) in turn; copy: {better}", *_skipped_without_gpu(run.device), *notes]
    checks = {"rtol": rtol, "errors": dict(errors)} if errors else {}
    roles: dict[str, Any] = {"copy": better, "ratio_to": ours, "checks": checks, "notes": all_notes}
    run.sections.append(Section(title, samples, bars, moved, **roles, **others))
