"""Every operator of one backend on small, odd inputs, for a sanitizer to watch.

``python -m benchmarks.sanitize_driver --backend cuda``; :mod:`benchmarks.sanitize` runs it.

Inputs are made on the CPU and copied, each into memory of its own that ends where they end: nothing but the backend's
kernels runs on the device, nothing is initialised that should not be, and one element too far shows. Results are held
against the reference on the CPU, so that kernels that did nothing do not pass for clean ones.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.sanitize import DONE, NOT_HERE, READY
from dbmtl_fused import backends
from dbmtl_fused._ops import ALPHA_MODES, CHUNK, compute_dtype
from dbmtl_fused.layout import ALIGN, chunk_table

MATRICES = ((1, 1), (3, 4097), (17, 300), (300, 65), (2, 70_001))
"""``T x P``: more tasks than a block has room for, more columns than the grid takes at once."""

LOSSES = (1, 33, 300)
"""How many of them ``begin_step`` gets: fewer than a block has threads, and more."""

ROWS = ((5, 4097, 0, 300, 20_001, 17, 64), tuple(range(30, 100)))
"""Sizes of the parameters: several chunks, none; and more of them than the smallest block of pointers holds."""

DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.float32, torch.float16),
)
"""Of the state, and of gradients and ``out``."""

_ERROR = 2e-2
"""As a share of the largest entry; one rounding of bfloat16 and a little."""

Dtypes = tuple[torch.dtype, torch.dtype]
Results = dict[str, Tensor]


class Case(NamedTuple):
    """One operator on one set of inputs."""

    name: str
    run: Callable[[str, torch.device], Results]


class Layout(NamedTuple):
    """Where an array lies in its memory, in elements."""

    offset: int = 0
    padding: int = 0  # between rows


STRAIGHT, CROOKED = Layout(), Layout(offset=1, padding=3)


class Inputs:
    """Random numbers, the same each time, on the CPU or copied from there."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self._random = device, torch.Generator().manual_seed(seed)

    def normal(
        self, shape: Sequence[int], dtype: torch.dtype, layout: Layout = STRAIGHT, *, infinite: bool = False
    ) -> Tensor:
        values = torch.randn(*shape, generator=self._random, dtype=torch.float64)
        if infinite:
            values[..., -1] = torch.inf
        return self.placed(values.to(dtype), layout)

    def placed(self, values: Tensor, layout: Layout = STRAIGHT) -> Tensor:
        """``values`` on the device, the last element at the very end of its memory."""
        rows, columns = (1, *values.shape)[-2:] if values.dim() else (1, 1)
        pitch = columns + layout.padding
        buffer = torch.zeros(layout.offset + max(0, rows * pitch - layout.padding), dtype=values.dtype)
        geometry = values.shape, (pitch, 1)[2 - values.dim() :], layout.offset
        buffer.as_strided(*geometry).copy_(values)
        return buffer.to(self.device).as_strided(*geometry)

    def scalar(self, value: float, dtype: torch.dtype) -> Tensor:
        return self.placed(torch.tensor(value, dtype=dtype))

    def seed_for(self, state: torch.dtype) -> Tensor | None:
        return self.placed(torch.tensor(2**40 + 7)) if state == torch.bfloat16 else None

    def fresh(self, size: Sequence[int], dtype: torch.dtype, layout: Layout = STRAIGHT) -> Tensor:
        """Memory that nothing was written to."""
        numel = torch.Size(size).numel()
        return torch.empty(layout.offset + numel, dtype=dtype, device=self.device)[layout.offset :].view(size)


def begin_step(T: int, dtypes: Dtypes, kind: int, backend: str, device: torch.device) -> Results:
    """``begin_step`` of losses of which half are negative, with and without the log, tasks missing or not.

    ``dtypes``: of losses and of betas.
    """
    (loss, real), layout, inputs = dtypes, _layout(kind), Inputs(device, kind)
    losses, scale, step = inputs.normal((T,), loss, layout), inputs.scalar(1024, loss), inputs.scalar(9, torch.int64)
    active = inputs.placed(torch.arange(T) % 3 > 0, layout) if kind % 4 > 1 else None
    log_eps, accumulate = (1e-8 if kind % 7 < 5 else None), kind % 5 < 2
    flag = inputs.scalar(0.0, torch.float32) if accumulate else inputs.fresh((), torch.float32)
    seeds, betas, inv_scale = inputs.fresh((T,), loss, layout), inputs.fresh((T,), real, layout), inputs.fresh((), real)
    op = backends.operators(backend).begin_step
    op(losses, active, scale, step, 0.9, 0.5, 3, log_eps, accumulate, seeds, betas, inv_scale, flag)
    return {"seeds": seeds, "betas": betas, "inv_scale": inv_scale, "found_inf": flag}


def balance(T: int, P: int, dtypes: Dtypes, kind: int, backend: str, device: torch.device) -> Results:
    """``balance_``; ``kind`` chooses the layout, the mode of alpha, and whether there are infinite gradients."""
    (state, grad), layout, inputs = dtypes, _layout(kind), Inputs(device, kind)
    compute = compute_dtype(state)
    ema = inputs.normal((T, P), state, layout)
    grads = inputs.normal((T, P), grad, layout, infinite=kind % 7 == 3)
    out = inputs.fresh((P,), grad, layout)
    norms, weights = (inputs.fresh((T,), compute, layout) for _ in range(2))
    beta, found_inf = inputs.scalar(0.75, compute), inputs.scalar(0.0, torch.float32)
    written = out, norms, weights, found_inf
    op = backends.operators(backend).balance_
    op(ema, grads, beta, inputs.seed_for(state), _alpha(kind), 2.5, 1e-8, *written)
    return {"ema": _memory_of(ema), "out": out, "norms": norms, "weights": weights, "found_inf": found_inf}


def combine(T: int, P: int, dtypes: Dtypes, kind: int, backend: str, device: torch.device) -> Results:
    """``combine``, into fresh memory or added to what is there, half of the time with tasks that take no part."""
    (state, grad), layout, inputs = dtypes, _layout(kind), Inputs(device, kind)
    compute, accumulate = compute_dtype(state), kind % 3 == 0
    ema = inputs.normal((T, P), state, layout)
    sq_norms = inputs.placed(torch.linspace(1, 4, T, dtype=compute), layout)
    out = inputs.normal((P,), grad, layout) if accumulate else inputs.fresh((P,), grad, layout)
    preference = inputs.placed((torch.arange(T) % 3).to(compute), layout) if kind % 4 > 1 else None
    norms, weights, alpha, out_sq_norm = (inputs.fresh(size, compute) for size in ((T,), (T,), (), ()))
    found_inf, scale = inputs.scalar(0.0, torch.float32), inputs.scalar(0.5, compute)
    step, arrivals = inputs.scalar(7, torch.int64), inputs.scalar(0, torch.int32)
    written = out, norms, weights, alpha, out_sq_norm, step, arrivals
    op = backends.operators(backend).combine
    op(ema, sq_norms, preference, found_inf, scale, _alpha(kind), 2.5, 1e-8, accumulate, *written)
    results = {"out": out, "norms": norms, "weights": weights, "alpha": alpha, "out_sq_norm": out_sq_norm}
    return {**results, "step": step, "arrivals": arrivals}


def gram(T: int, P: int, state: torch.dtype, kind: int, backend: str, device: torch.device) -> Results:
    """``gram``."""
    inputs = Inputs(device, kind)
    ema = inputs.normal((T, P), state, _layout(kind))
    out, arrivals = inputs.fresh((T, T), compute_dtype(state)), inputs.scalar(0, torch.int32)
    backends.operators(backend).gram(ema, out, arrivals)
    return {"out": out, "arrivals": arrivals}


def ema_update(numels: Sequence[int], state: torch.dtype, kind: int, backend: str, device: torch.device) -> Results:
    """``ema_update_`` of every parameter, then of every other one once more, accumulating.

    Gradients are of all dtypes, one in four misaligned and one in five None.
    """
    inputs, compute = Inputs(device, kind), compute_dtype(state)
    segments, P = _segments(numels)
    chunks = inputs.placed(chunk_table(segments.tolist()))
    row = inputs.normal((P,), state, _layout(kind))
    partials, sq_norm = inputs.fresh((len(chunks),), compute), inputs.fresh((), compute)
    found_inf, arrivals = inputs.scalar(0.0, torch.float32), inputs.scalar(0, torch.int32)
    scalars = inputs.scalar(0.75, compute), inputs.scalar(0.5, compute), inputs.seed_for(state)
    written = partials, sq_norm, found_inf, arrivals
    op = backends.operators(backend).ema_update_
    for step in (1, 2):
        slots = list(range(0, len(numels), step))
        grads = [None if slot % 5 == 1 else _gradient(inputs, numels[slot], slot + kind) for slot in slots]
        op(row, grads, slots, segments, chunks, *scalars, *written, step > 1)
    return {"row": row, "partials": partials, "sq_norm": sq_norm, "found_inf": found_inf, "arrivals": arrivals}


def _memory_of(matrix: Tensor) -> Tensor:
    """All of it, padding included: what can be copied as it is."""
    return matrix.as_strided((matrix.untyped_storage().nbytes() // matrix.itemsize,), (1,), 0)


def _layout(kind: int) -> Layout:
    return CROOKED if kind % 2 else STRAIGHT


def _alpha(kind: int) -> str:
    return ALPHA_MODES[kind % len(ALPHA_MODES)]


def _gradient(inputs: Inputs, numel: int, kind: int) -> Tensor:
    return inputs.normal((numel,), DTYPES[kind % len(DTYPES)][1], CROOKED if kind % 4 == 3 else STRAIGHT)


def _segments(numels: Sequence[int]) -> tuple[Tensor, int]:
    """``segments`` of parameters that start at multiples of :data:`ALIGN` columns, and how many columns there are."""
    rows, column, chunk = [], 0, 0
    for numel in numels:
        rows.append((column, numel, chunk))
        column, chunk = column + -(-numel // ALIGN) * ALIGN, chunk + -(-numel // CHUNK)
    return torch.tensor(rows, dtype=torch.int64), column


def cases() -> Iterator[Case]:
    """Every operator on every size, in every dtype; the rest varies from one to the next."""
    kinds = itertools.count()
    for T, P in MATRICES:
        for dtypes, kind in zip(DTYPES, kinds, strict=False):
            sizes = f"{T} x {P}, {_short(dtypes[0])} state, {_short(dtypes[1])}"
            yield Case(f"balance_ {sizes}", functools.partial(balance, T, P, dtypes, kind))
            yield Case(f"combine {sizes}", functools.partial(combine, T, P, dtypes, kind))
        for (state, _), kind in zip(DTYPES[1:4], kinds, strict=False):
            yield Case(f"gram {T} x {P}, {_short(state)} state", functools.partial(gram, T, P, state, kind))
    for numels in ROWS:
        for (state, _), kind in zip(DTYPES[1:4], kinds, strict=False):
            name = f"ema_update_ {len(numels)} tensors, {_short(state)} state"
            yield Case(name, functools.partial(ema_update, numels, state, kind))
    for loss, real in itertools.product((torch.float32, torch.float64), repeat=2):
        for T, kind in zip(LOSSES, kinds, strict=False):
            name = f"begin_step {T}, {_short(loss)} losses, {_short(real)} betas"
            yield Case(name, functools.partial(begin_step, T, (loss, real), kind))


def run(case: Case, backend: str, device: torch.device) -> None:
    """Run it, and the reference on the CPU.

    :raises AssertionError: If results differ by more than roundings.
    """
    found, expected = case.run(backend, device), case.run("reference", torch.device("cpu"))
    for name, exact in expected.items():
        largest = float(exact.double().nan_to_num(0, 0, 0).abs().max())
        actual = found[name].cpu().double()
        message = functools.partial("{}: {}: {}".format, case.name, name)
        torch.testing.assert_close(actual, exact.double(), rtol=0, atol=_ERROR * largest, equal_nan=True, msg=message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases one after the other, naming each that is done; 0 unless one raises."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize_driver", description=__doc__)
    parser.add_argument("--backend", default="cuda", choices=backends.BACKENDS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--every", type=int, default=1, help="run every so many cases only (default: 1)")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if reason := backends.why_not(options.backend, device.type):
        print(f"{NOT_HERE}{reason}")
        return 0
    torch.empty(1, device=device)
    print(READY, flush=True)
    chosen = list(itertools.islice(cases(), 0, None, options.every))
    for number, case in enumerate(chosen, 1):
        run(case, options.backend, device)
        print(f"case {number} of {len(chosen)}: {case.name}", flush=True)
    print(DONE)
    return 0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
