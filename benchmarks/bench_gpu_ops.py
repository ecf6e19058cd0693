"""Every operator of every backend on a GPU, as a share of what copying the same bytes takes, and against torch's own.

``python -m benchmarks.bench_gpu_ops --out FILE.json``. Sizes are those of real encoders and beyond; see
:mod:`benchmarks.graph_timing` for how times are taken. Every candidate is held against a float64 computation before it
is timed; one that differs, or fails, is left out and makes the exit code 1. FILE.json and FILE.txt are written anew
after each table. ``--device cpu --quick`` shows that everything runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks import comparators, report, shapes
from benchmarks.comparators import COMPILED, EPS, LIBMTL, TIGHT, fused, relative_error
from benchmarks.gpu_info import device_facts, nvidia_smi
from benchmarks.graph_timing import Calls, HostTimer, buffer_sets, graph_timer, slope_timer
from benchmarks.report import Section
from benchmarks.timing import Bar, Quartiles, Sample, Samples, interleave, per_round
from dbmtl_fused import backends, balance_
from dbmtl_fused._ops import compute_dtype
from dbmtl_fused.layout import FlatLayout
from dbmtl_fused.reference import balance_ as reference_balance_

BETA = 0.9
TASKS = (3, 11, 2, 5, 16)
MILLIONS = (11.2, 25.6, 6.7, 0.1)
LARGE_BYTES = 2**30
"""A ``T x P`` buffer far beyond any cache."""

MEMCPY, COPY_KERNEL, STREAM, EMPTY = "cudaMemcpyAsync", "copy kernel", "stream kernels", "empty kernel"
FLOAT32_RTOL, BFLOAT16_RTOL = comparators.RTOL, 1e-2
"""Largest errors allowed, as shares of the largest entry; stochastic rounding is up to one part in 128 off."""

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

_GRAPH_CALLS_SMALL = 100
_HOST_CALLS = 100
_MEMORY_OVERHEAD = 32
"""Bytes a table may need, at most, for each byte of its ``T x P`` buffer: comparators, their temporaries, float64."""


class Dtypes(NamedTuple):
    """What a measurement is done in."""

    state: torch.dtype
    grad: torch.dtype  # of the weighted sum, too

    def __str__(self) -> str:
        if self.state == torch.bfloat16:
            return "bf16 state and gradients"
        return "fp32" if self.grad == torch.float32 else "fp32 state, bf16 gradients"

    @property
    def rtol(self) -> float:
        return FLOAT32_RTOL if self == FP32 else BFLOAT16_RTOL

    def balance_bytes(self, T: int, P: int) -> int:
        """Least traffic of ``balance_`` in two phases: state read, written and read, gradients read, sum written."""
        return (3 * T * self.state.itemsize + (T + 1) * self.grad.itemsize) * P

    def combine_bytes(self, T: int, P: int) -> int:
        """Least traffic of ``combine``: the state read, the sum written."""
        return (T * self.state.itemsize + self.grad.itemsize) * P

    def gram_bytes(self, T: int, P: int) -> int:
        """Least traffic of ``gram``: the state read."""
        return T * self.state.itemsize * P

    def ema_update_bytes(self, P: int) -> int:
        """Least traffic of ``ema_update_`` over a whole row: the row read and written, gradients read."""
        return (2 * self.state.itemsize + self.grad.itemsize) * P


FP32 = Dtypes(torch.float32, torch.float32)
BF16_GRADS = Dtypes(torch.float32, torch.bfloat16)
BF16_STATE = Dtypes(torch.bfloat16, torch.bfloat16)


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

    def largest(self, T: int, P: int) -> int:
        """``P``, or as many columns, in whole kilobytes, as surely fit the device's memory."""
        if self.device.type != "cuda":
            return P
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(P, free // (_MEMORY_OVERHEAD * 4 * T) // 256 * 256)


# --- Buffers and what is done with them


class Matrices:
    """One set of buffers of ``balance_``, ``combine`` and ``gram``: normal numbers, rows of different scale, as tasks'
    are."""

    def __init__(self, T: int, P: int, dtypes: Dtypes, device: torch.device, number: int = 0) -> None:
        random = torch.Generator(device).manual_seed(number)
        scales = torch.logspace(-2, 2, T, device=device).unsqueeze(1)
        self.ema = (scales * torch.randn(T, P, device=device, generator=random)).to(dtypes.state)
        self.grads = (scales * torch.randn(T, P, device=device, generator=random)).to(dtypes.grad)
        self.out = torch.empty(P, dtype=dtypes.grad, device=device)
        compute = compute_dtype(dtypes.state)
        self.beta, self.one = (torch.tensor(value, dtype=compute, device=device) for value in (BETA, 1.0))
        self.seed = _seed(dtypes, device)
        self.norms, self.weights = (torch.empty(T, dtype=compute, device=device) for _ in range(2))
        self.alpha_value, self.out_sq_norm = torch.empty_like(self.one), torch.empty_like(self.one)
        self.found_inf = torch.zeros((), device=device)
        self.step, self.arrivals = (torch.zeros((), dtype=of, device=device) for of in (torch.int64, torch.int32))
        self.products = torch.empty(T, T, dtype=compute, device=device)
        self.sq_norms = torch.linalg.vector_norm(self.ema, dim=1, dtype=compute).square()

    def balance_(self, op: Callable[..., None]) -> None:
        results = self.out, self.norms, self.weights, self.found_inf
        op(self.ema, self.grads, self.beta, self.seed, "max", 0.0, EPS, *results)

    def combine(self, op: Callable[..., None]) -> None:
        results = self.out, self.norms, self.weights, self.alpha_value, self.out_sq_norm, self.step, self.arrivals
        op(self.ema, self.sq_norms, None, self.found_inf, self.one, "max", 0.0, EPS, False, *results)

    def combine_eagerly(self) -> None:
        """``combine`` in torch's own operators: the matrix is read once."""
        norms = self.sq_norms.sqrt()
        torch.mv(self.ema.t(), norms.amax() / (norms + EPS), out=self.out)

    def gram(self, op: Callable[..., None]) -> None:
        op(self.ema, self.products, self.arrivals)

    def gram_eagerly(self) -> None:
        """``gram`` in torch's own operator, which knows nothing of symmetry."""
        torch.mm(self.ema, self.ema.t(), out=self.products)


class Beginning:
    """Buffers of ``begin_step``: losses of different size, as tasks' are, of the tenth step."""

    def __init__(self, T: int, device: torch.device) -> None:
        self.losses = torch.logspace(-2, 2, T, device=device)
        self.scale, self.step = torch.tensor(1024.0, device=device), torch.tensor(9, device=device)
        self.seeds, self.betas = torch.empty_like(self.losses), torch.empty_like(self.losses)
        self.inv_scale, self.found_inf = torch.empty_like(self.scale), torch.empty_like(self.scale)

    def begin_step(self, op: Callable[..., None]) -> None:
        results = self.seeds, self.betas, self.inv_scale, self.found_inf
        op(self.losses, None, self.scale, self.step, BETA, 0.5, 1, EPS, False, *results)

    def error_of(self, op: Callable[..., None]) -> float:
        """Run an operator, its results poisoned."""
        results = self.seeds, self.betas, self.inv_scale
        for of in (*results, self.found_inf):
            of.fill_(torch.nan)
        self.begin_step(op)
        scale, losses = self.scale.double(), self.losses.double()
        exact = scale / (losses + EPS), torch.full_like(losses, BETA / 10**0.5), 1 / scale
        errors = [relative_error(*pair) for pair in zip(results, exact, strict=True)]
        return max(errors) if self.found_inf == 0 else torch.inf


class Exact:
    """What ``balance_`` must make of ``matrices``, in float64."""

    def __init__(self, matrices: Matrices) -> None:
        self._matrices, self._before = matrices, matrices.ema.clone()
        self._ema, self._out = comparators.exact(matrices.ema, matrices.grads, float(matrices.beta))

    def error_of(self, op: Callable[..., None]) -> float:
        """Run an operator on the matrices as they were, ``out`` poisoned."""
        self._matrices.ema.copy_(self._before)
        self._matrices.out.fill_(torch.nan)
        self._matrices.balance_(op)
        return self._error(self._matrices.ema, self._matrices.out)

    def error_of_expression(self, candidate: comparators.OneShot) -> float:
        """The same for what has its own copies."""
        out = candidate()
        return self._error(candidate.ema, out)

    def _error(self, ema: Tensor, out: Tensor) -> float:
        """The larger of two errors: of the rows, each by itself as they differ in scale, and of the sum."""
        errors = [relative_error(*rows) for rows in zip(ema, self._ema, strict=True)]
        return max(*errors, relative_error(out, self._out))


class RowLists:
    """One set of buffers of ``ema_update_``: a row, and gradients each in memory of its own."""

    def __init__(self, params: Sequence[shapes.Shape], dtypes: Dtypes, device: torch.device, number: int = 0) -> None:
        random = torch.Generator(device).manual_seed(number)
        self.grads = [torch.randn(shape, device=device, generator=random).to(dtypes.grad).div_(8) for shape in params]
        layout = FlatLayout([(str(i), grad) for i, grad in enumerate(self.grads)])
        self.slots, self.P = list(range(len(self.grads))), layout.P
        self.tables = layout.segments, layout.chunks
        self.row = torch.zeros(layout.P, dtype=dtypes.state, device=device)
        self.views = [slot.view(self.row) for slot in layout.slots]
        for view in self.views:
            view.copy_(torch.randn(view.shape, device=device, generator=random))
        compute = compute_dtype(dtypes.state)
        self.beta, self.one = (torch.tensor(value, dtype=compute, device=device) for value in (BETA, 1.0))
        self.seed = _seed(dtypes, device)
        self.partials = torch.zeros(layout.num_chunks, dtype=compute, device=device)
        self.sq_norm, self.found_inf = torch.zeros_like(self.one), torch.zeros((), device=device)
        self.arrivals = torch.zeros((), dtype=torch.int32, device=device)

    def ema_update_(self, op: Callable[..., None]) -> None:
        scalars = self.beta, self.one, self.seed
        written = self.partials, self.sq_norm, self.found_inf, self.arrivals
        op(self.row, self.grads, self.slots, *self.tables, *scalars, *written, False)

    def ema_update_eagerly(self) -> None:
        """``ema_update_`` in torch's own operators: a foreach, and the norm of the row."""
        torch._foreach_lerp_(self.views, self.grads, 1 - BETA)
        self.sq_norm = torch.linalg.vector_norm(self.row).square()


def _seed(dtypes: Dtypes, device: torch.device) -> Tensor | None:
    return torch.tensor(1, device=device) if dtypes.state == torch.bfloat16 else None


class TightEagerMixed(comparators.TightEager):
    """The same for gradients of another dtype than the state, which ``lerp_`` does not take."""

    def __call__(self) -> Tensor:
        self.ema.mul_(self.beta).add_(self.grads, alpha=1 - self.beta)
        norms = torch.linalg.vector_norm(self.ema, dim=1)
        return torch.mv(self.ema.t(), norms.amax() / (norms + EPS), out=self.out)


# --- Yardsticks


def copies(total_bytes: int, device: torch.device) -> dict[str, Calls]:
    """Ways to copy, reading and writing ``total_bytes`` together."""
    count = max(64, total_bytes // 8 // 64 * 64)
    sources = [torch.randn(count, device=device) for _ in range(buffer_sets(total_bytes, device))]
    pairs = [(source, torch.empty_like(source)) for source in sources]
    found: dict[str, Calls] = {MEMCPY: [functools.partial(target.copy_, source) for source, target in pairs]}
    if device.type == "cuda":
        from benchmarks import stream_kernels

        found[COPY_KERNEL] = [functools.partial(stream_kernels.copy, *pair) for pair in pairs]
    return found


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


def measure_balance(run: Run, T: int, P: int, dtypes: Dtypes) -> None:
    """``balance_`` on a ready gradient matrix."""
    P = run.largest(T, P)
    moved = dtypes.balance_bytes(T, P)
    # What one call touches: the state, the gradients and the sum, each once.
    sets = _matrices(run, T, P, dtypes, dtypes.combine_bytes(T, P) + T * P * dtypes.grad.itemsize)
    exact = Exact(sets[0])

    def operator(op: Callable[..., None]) -> Subject:
        return Subject([functools.partial(of.balance_, op) for of in sets], functools.partial(exact.error_of, op))

    subjects: dict[str, Callable[[], Subject]] = {}
    if dtypes != BF16_STATE:  # whose stochastic rounding torch's operators do not have
        tight = comparators.TightEager if dtypes == FP32 else TightEagerMixed
        for name, build in ((LIBMTL, comparators.LibMTLExpression), (TIGHT, tight)):

            def expression(build: Callable[..., comparators.OneShot] = build) -> Subject:
                built = [build(of.ema, of.grads, BETA) for of in sets]
                return Subject(built, functools.partial(exact.error_of_expression, built[0]))

            subjects[name] = expression
    if run.compiled and dtypes == FP32 and (run.quick or _is_large(T, P) or (T, P) == (3, 11_200_000)):
        torch._dynamo.reset()
        subjects[COMPILED] = functools.partial(
            operator, torch.compile(reference_balance_, fullgraph=True, dynamic=False)
        )
    for backend in reversed(run.backends):
        subjects[fused(backend)] = functools.partial(operator, backends.operators(backend).balance_)

    streams = _stream(sets, update=True) if _has_streams(run, dtypes) else None
    title = f"balance_ {dtypes}, T={T}, P={P / 1e6:.4g}M"
    samples, errors, better = _measure(run, title, subjects, moved, streams, dtypes.rtol)
    bars = [*_balance_bars(title, run, samples, better, T, P, dtypes), *_beside_triton(title, samples)]
    _publish(run, title, samples, bars, moved, better, errors, dtypes.rtol, len(sets))


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


def measure_combine(run: Run, T: int, P: int, dtypes: Dtypes) -> None:
    """``combine`` on a buffer that the caches do not hold."""
    P = run.largest(T, P)
    moved = dtypes.combine_bytes(T, P)
    sets = _matrices(run, T, P, dtypes, moved)
    norms = sets[0].sq_norms.double().sqrt()
    exact = (norms.max() / (norms + EPS)) @ sets[0].ema.double()

    def error(call: Callable[[], object]) -> float:
        sets[0].out.fill_(torch.nan)
        sets[0].out_sq_norm.copy_(exact.square().sum())  # not every candidate has it
        call()
        errors = relative_error(sets[0].out, exact), relative_error(sets[0].out_sq_norm, exact.square().sum())
        return max(errors)

    def subject(calls: Calls) -> Subject:
        return Subject(calls, functools.partial(error, calls[0]))

    subjects: dict[str, Callable[[], Subject]] = {}
    if dtypes == FP32:
        subjects[TIGHT] = functools.partial(subject, [of.combine_eagerly for of in sets])
    for backend in reversed(run.backends):
        op = backends.operators(backend).combine
        subjects[fused(backend)] = functools.partial(subject, [functools.partial(of.combine, op) for of in sets])

    streams = _stream(sets, update=False) if _has_streams(run, dtypes) else None
    title = f"combine {dtypes}, T={T}, P={P / 1e6:.4g}M"
    samples, errors, better = _measure(run, title, subjects, moved, streams, dtypes.rtol)
    target = COMBINE_SHARE if T * P * 4 >= LARGE_BYTES // 2 else COMBINE_COLD_SHARE
    bars = [
        _share(f"{title}: {fused(backend)}", samples, better, fused(backend), target)
        for backend in _measured(run, samples)
        if dtypes == FP32
    ]
    bars += _beside_triton(title, samples)
    _publish(run, title, samples, bars, moved, better, errors, dtypes.rtol, len(sets))


def measure_gram(run: Run, T: int, P: int, dtypes: Dtypes) -> None:
    """``gram`` on a buffer that the caches do not hold."""
    P = run.largest(T, P)
    moved = dtypes.gram_bytes(T, P)
    sets = _matrices(run, T, P, dtypes, moved)
    scales = sets[0].sq_norms.double().sqrt()
    exact = sets[0].ema.double() @ sets[0].ema.double().t() / scales.outer(scales)

    def error(call: Callable[[], object]) -> float:
        sets[0].products.fill_(torch.nan)
        call()
        return relative_error(sets[0].products / scales.outer(scales), exact)

    def subject(calls: Calls) -> Subject:
        return Subject(calls, functools.partial(error, calls[0]))

    subjects: dict[str, Callable[[], Subject]] = {}
    if dtypes == FP32:
        subjects[TIGHT] = functools.partial(subject, [of.gram_eagerly for of in sets])
    for backend in reversed(run.kernels):
        op = backends.operators(backend).gram
        subjects[fused(backend)] = functools.partial(subject, [functools.partial(of.gram, op) for of in sets])

    title = f"gram {dtypes}, T={T}, P={P / 1e6:.4g}M"
    samples, errors, better = _measure(run, title, subjects, moved, None, dtypes.rtol)
    _publish(run, title, samples, _beside_triton(title, samples), moved, better, errors, dtypes.rtol, len(sets))


def measure_ema_update(run: Run, model: str, params: Sequence[shapes.Shape], dtypes: Dtypes) -> None:
    """``ema_update_`` over all parameters of a model in one call."""
    first = RowLists(params, dtypes, run.device)
    moved = dtypes.ema_update_bytes(sum(grad.numel() for grad in first.grads))
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

    def subject(calls: Calls) -> Subject:
        return Subject(calls, functools.partial(error, calls[0]))

    subjects: dict[str, Callable[[], Subject]] = {}
    if dtypes == FP32:
        subjects[TIGHT] = functools.partial(subject, [of.ema_update_eagerly for of in sets])
    for backend in reversed(run.kernels):
        op = backends.operators(backend).ema_update_
        subjects[fused(backend)] = functools.partial(subject, [functools.partial(of.ema_update_, op) for of in sets])

    streams: Calls | None = None
    if _has_streams(run, dtypes):
        from benchmarks import stream_kernels

        streams = [functools.partial(stream_kernels.update, of.row, torch.randn_like(of.row)) for of in sets]
    title = f"ema_update_ {dtypes}, {model}, {len(params)} tensors, P={moved / dtypes.ema_update_bytes(1) / 1e6:.4g}M"
    samples, errors, better = _measure(run, title, subjects, moved, streams, dtypes.rtol)
    bars = [
        _share(f"{title}: {fused(backend)}", samples, better, fused(backend), EMA_UPDATE_SHARE[backend])
        for backend in _measured(run, samples)
        if dtypes == FP32
    ]
    bars += _beside_triton(title, samples)
    _publish(run, title, samples, bars, moved, better, errors, dtypes.rtol, len(sets))


def measure_small(run: Run, T: int, P: int) -> None:
    """``balance_`` where the launch counts: what one more call in a graph adds, less an empty kernel."""
    touched = FP32.balance_bytes(T, P) // 2
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
) -> tuple[Samples, dict[str, float], str]:
    """Samples of the yardsticks and of all subjects that are right, their errors, and which copy was the better."""
    timers = {name: graph_timer(calls, run.device) for name, calls in copies(moved, run.device).items()}
    copy_names = tuple(timers)
    errors: dict[str, float] = {}
    for name, build in subjects.items():
        with run.going_on(f"{title}: {name}"):
            subject = build()
            error = subject.error()
            _assert_right(error, rtol)
            timers[name] = graph_timer(subject.calls, run.device)
            errors[name] = error
    if streams:  # not before: they write to the buffers that comparators start from
        timers[STREAM] = graph_timer(streams, run.device)
    samples = interleave(timers, run.rounds, warmup=2, title=title)
    return samples, errors, min(copy_names, key=lambda name: _median(samples[name]))


def _assert_right(error: float, rtol: float) -> None:
    if not error <= rtol:
        raise AssertionError(f"differs from float64 by {error:.1e} of the largest entry, more than {rtol:.0e}")


def _median(taken: Sequence[Sample]) -> float:
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
) -> None:
    ours = next((fused(backend) for backend in run.backends if fused(backend) in samples), None)
    notes = [f"{sets} buffer set(s) in turn; copy: {better}", *_skipped_without_gpu(run.device)]
    checks = {"rtol": rtol, "errors": dict(errors)} if errors else {}
    run.sections.append(Section(title, samples, bars, moved, copy=better, ratio_to=ours, checks=checks, notes=notes))


# --- The whole


def plan(quick: bool) -> list[tuple[str, Callable[[Run], None]]]:
    """Every table, those that carry bars first, so that a run that is cut off has shown the most."""
    jobs: list[tuple[str, Callable[[Run], None]]] = []

    def add(function: Callable[..., None], *arguments: Any) -> None:
        name = ", ".join([function.__name__.removeprefix("measure_"), *(str(of)[:40] for of in arguments)])
        jobs.append((name, lambda run: function(run, *arguments)))

    if quick:
        few: list[shapes.Shape] = [(64, 3, 7, 7), (64,), (300, 17)]
        for dtypes in (FP32, BF16_GRADS, BF16_STATE):
            add(measure_balance, 3, 5_000, dtypes)
            add(measure_combine, 3, 5_000, dtypes)
            if dtypes != BF16_GRADS:  # gram sees none
                add(measure_gram, 3, 5_000, dtypes)
            add(measure_ema_update, "few", few, dtypes)
        add(measure_small, 3, 1_000)
        add(measure_begin_step, 3)
        add(measure_host, 3, 1_000, few)
        return jobs

    models = {"ResNet-50": shapes.resnet50(), "ViT-L/16": shapes.vit_large()}
    for P in (6_700_000, 11_200_000, 25_600_000):
        add(measure_balance, 3, P, FP32)
    for T in TASKS:
        add(measure_balance, T, columns_of(T, LARGE_BYTES), FP32)
    for model, params in models.items():
        add(measure_ema_update, model, params, FP32)
    for T in TASKS:
        add(measure_combine, T, columns_of(T, LARGE_BYTES // 2), FP32)
        add(measure_combine, T, 11_200_000, FP32)
    for T in TASKS:
        add(measure_gram, T, columns_of(T, LARGE_BYTES // 2), FP32)
    add(measure_small, 3, 100_000)
    add(measure_begin_step, 11)
    add(measure_host, 3, 100_000, models["ResNet-50"])
    for T in TASKS:
        for millions in MILLIONS:
            if not (T == 3 and millions in TIME_OVER_COPY):
                add(measure_balance, T, round(millions * 1e6), FP32)
    for dtypes in (BF16_GRADS, BF16_STATE):
        for T in (3, 11):
            add(measure_balance, T, 11_200_000, dtypes)
            add(measure_balance, T, columns_of(T, LARGE_BYTES), dtypes)
            add(measure_combine, T, columns_of(T, LARGE_BYTES // 2), dtypes)
            if dtypes != BF16_GRADS:
                add(measure_gram, T, columns_of(T, LARGE_BYTES // 2), dtypes)
        for model, params in models.items():
            add(measure_ema_update, model, params, dtypes)
    return jobs


def columns_of(T: int, total_bytes: int) -> int:
    """Columns of the smallest ``T x P`` float32 buffer of at least ``total_bytes`` whose rows are whole kilobytes."""
    return -(-total_bytes // (4 * T * 256)) * 256


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    :returns: 0, or 1 if a candidate was wrong or failed; missed bars are in the report.
    """
    options = _parse(argv)
    device = torch.device(options.device)
    rounds = 3 if options.quick else options.repeats
    run = Run(device, rounds, options.quick, options.compile, time.monotonic() + options.seconds)
    found = report.environment(torch.get_num_threads())
    found |= {"device": device_facts(device), "nvidia_smi before": nvidia_smi(device)}
    settings = {"rounds": rounds, "quick": options.quick, "compile": options.compile, "device": options.device}
    for name, job in plan(options.quick):
        if time.monotonic() > run.deadline:
            run.left_out.append(name)
            continue
        before = len(run.sections)
        with run.going_on(name):
            job(run)
        for section in run.sections[before:]:
            print(section.to_text(), flush=True)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        _write(options.out, found, settings, run)
    found["nvidia_smi after"] = nvidia_smi(device)
    _write(options.out, found, settings, run)
    print(to_text(run))
    return int(bool(run.failures))


def to_text(run: Run) -> str:
    """One line for each table, all bars, and what went wrong."""
    rows = [_line(section) for section in run.sections if section.copy]
    parts = [f"\n{tabulate(rows, headers='keys', floatfmt='.2f')}"] if rows else []
    parts.append(report.bars_to_text(run.sections, run.quick))
    for title, lines in (("FAILED", run.failures), ("left out for want of time", run.left_out)):
        if lines:
            parts.append("\n".join([f"\n{title}:", *(f"  {line}" for line in lines)]))
    return "\n".join(parts)


def _line(section: Section) -> dict[str, Any]:
    """Shares of the copy of each of our backends, and how many times as long the others take as the first."""

    def ratio(first: str, second: str) -> float:
        return Quartiles.of(per_round(lambda a, b: a / b, section.samples, first, second)).median

    line: dict[str, Any] = {"": section.title}
    if section.copy and section.bytes_moved:
        line["copy GB/s"] = section.bytes_moved / _median(section.samples[section.copy]) / 1e9
        for name in (*(fused(backend) for backend in backends.BACKENDS), STREAM):
            if name in section.samples:
                line[f"{name.removeprefix('dbmtl_fused ')}: of copy"] = ratio(section.copy, name)
    for name in (LIBMTL, TIGHT, COMPILED):
        if section.ratio_to and name in section.samples:
            line[f"{name} / ours"] = ratio(name, section.ratio_to)
    return line


def _write(path: Path | None, found: Mapping[str, Any], settings: Mapping[str, Any], run: Run) -> None:
    if path is None:
        return
    lists = {"failures": run.failures, "left_out": run.left_out}
    report.write_json(path, found, {**settings, **lists}, run.sections)
    tables = "\n".join(section.to_text() for section in run.sections)
    path.with_suffix(".txt").write_text(f"{tables}\n{to_text(run)}\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu_ops", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: shows that everything runs")
    parser.add_argument("--repeats", type=int, default=20, help="rounds, each with one sample of every candidate")
    parser.add_argument("--compile", action="store_true", help="torch.compile(reference) too, at some sizes")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no table after so many (default: 3600)")
    parser.add_argument("--out", type=Path, help="JSON file to write; the tables go into a .txt beside it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
