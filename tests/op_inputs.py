"""Inputs, calls and comparisons that the operator tests share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from stand_ins import INTERPRETED
from torch import Tensor

from dbmtl_fused import backends, oracle
from dbmtl_fused._ops import ALPHA_MODES, CHUNK, GRAD_DTYPES, STATE_DTYPES, compute_dtype
from dbmtl_fused.layout import chunk_table

__all__ = ["ALPHA_MODES", "CHUNK", "GRAD_DTYPES", "STATE_DTYPES"]

DEVICE = torch.device(os.environ.get("DBMTL_FUSED_TEST_DEVICE", "cpu"))
BACKENDS = backends.available(DEVICE.type)
NATIVE_BACKENDS = [name for name in BACKENDS if name != "reference"]

ORDERED_BACKENDS = [name for name in BACKENDS if name != "triton"]
"""Backends that add the weighted rows in task order, as the reference does; Triton's reductions have another."""

EXACT_STATE_DTYPES = (torch.float32, torch.float64)
"""State that an oracle can follow step by step; bfloat16 is rounded randomly."""

ALPHA_CONSTANT = 2.5
EPS = 1e-8
STEPS = 7  # taken before
SEED = 2**40 + 12345  # of the rounding of bfloat16 state; both halves of it count
LARGE = 2**16 + 3 if INTERPRETED else 2**20 + 3  # columns; the interpreter takes a millisecond for every block of them
SENTINEL = 13.0  # exact in every dtype


# --- Tensors and arrays


def tensor(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """``values``, rounded to ``dtype``, on the device under test."""
    return torch.from_numpy(np.array(values, dtype=np.float64)).to(DEVICE, dtype)


def exactly(value: float, state_dtype: torch.dtype = torch.float32) -> float:
    """``value`` as an operator with this state dtype gets it, so that the oracle gets the same."""
    return float(coefficient(value, state_dtype))


def coefficient(value: float, state_dtype: torch.dtype) -> Tensor:
    """A 0-d ``beta``, ``scale``, ... for state of this dtype."""
    return tensor(value, compute_dtype(state_dtype))


def seed_for(state_dtype: torch.dtype) -> Tensor | None:
    """What operators on state of this dtype must be given."""
    return torch.tensor(SEED, device=DEVICE) if state_dtype is torch.bfloat16 else None


def array(values: Tensor) -> oracle.Array:
    """The exact values of a tensor, for the oracle."""
    return oracle.real(values.detach().cpu().double().numpy())


def random_rows(rng: np.random.Generator, T: int, P: int) -> oracle.Array:
    """Normal numbers; magnitudes differ between rows, so that so do weights."""
    return rng.standard_normal((T, P)) * 10.0 ** rng.uniform(-2, 2, (T, 1))


def flags(value: float = 0.0) -> Tensor:
    """A ``found_inf``."""
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


def arrivals() -> Tensor:
    """The scratch of operators that sum over blocks."""
    return torch.zeros((), dtype=torch.int32, device=DEVICE)


def in_memory_order(flat: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """A dense tensor of ``shape`` over the memory of ``flat``; ``order`` lists its dimensions, slowest first."""
    inverse = [list(order).index(dim) for dim in range(len(shape))]
    return flat.view([shape[dim] for dim in order]).permute(inverse)


class Guarded:
    """A 0-d to 2-d tensor inside a larger buffer full of sentinels, misaligned by ``offset`` elements."""

    MARGIN = 64

    def __init__(self, values: Tensor, *, offset: int = 0, row_padding: int = 0) -> None:
        rows, columns = (1, 1, *values.shape)[-2:]
        pitch = columns + row_padding
        size = 2 * self.MARGIN + offset + rows * pitch
        self._buffer = torch.full((size,), SENTINEL, dtype=values.dtype, device=values.device)
        self._layout = (values.shape, (pitch, 1)[2 - values.dim() :], self.MARGIN + offset)
        self.view = self._buffer.as_strided(*self._layout).copy_(values)

    def assert_intact(self) -> None:
        """Nothing around the view was written."""
        around = self._buffer.clone()
        around.as_strided(*self._layout).fill_(SENTINEL)
        assert torch.equal(around, torch.full_like(around, SENTINEL)), "wrote outside the view"


# --- Calls


class Begun(NamedTuple):
    """Everything ``begin_step`` writes."""

    seeds: Tensor
    betas: Tensor
    inv_scale: Tensor
    found_inf: Tensor


class Balanced(NamedTuple):
    """Everything ``balance_`` writes."""

    ema: Tensor
    out: Tensor
    norms: Tensor
    weights: Tensor
    found_inf: Tensor


class Combined(NamedTuple):
    """Everything ``combine`` writes."""

    out: Tensor
    norms: Tensor
    weights: Tensor
    alpha: Tensor
    out_sq_norm: Tensor
    step: Tensor


def run_begin_step(
    backend: str,
    losses: Tensor,
    step: int,
    *,
    dtype: torch.dtype = torch.float32,
    active: Tensor | None = None,
    scale: float = 1.0,
    beta: float = 0.9,
    beta_sigma: float = 0.5,
    micro_batches: int = 1,
    log_eps: float | None = 1e-8,
    accumulate: bool = False,
    found_inf: float = 0.0,
) -> Begun:
    """Call ``begin_step``; all outputs are fresh, poisoned and between sentinels.

    :param dtype: Of ``betas``.
    """
    betas = losses.new_empty(len(losses), dtype=dtype)
    fresh = losses.new_empty(len(losses)), betas, betas.new_empty(()), flags(found_inf)
    guarded = [Guarded(values, offset=1) for values in fresh]
    result = Begun(*(of.view for of in guarded))
    factor, taken = tensor(scale, losses.dtype), torch.tensor(step, device=DEVICE)
    op = backends.operators(backend).begin_step
    given = losses, active, factor, taken, beta, beta_sigma, micro_batches, log_eps, accumulate
    assert op(*given, *result) is None
    for of in guarded:
        of.assert_intact()
    return result


def run_balance(
    backend: str,
    ema: Tensor,
    grads: Tensor,
    beta: Any,
    *,
    alpha: str = "max",
    constant: float = ALPHA_CONSTANT,
    eps: float = EPS,
    out: Tensor | None = None,
    found_inf: float = 0.0,
) -> Balanced:
    """Call ``balance_``; ``ema`` and ``out`` are written in place, the rest is fresh, poisoned and between
    sentinels."""
    T, P = ema.shape
    beta = coefficient(beta, ema.dtype)
    out = torch.empty(P, dtype=grads.dtype, device=DEVICE) if out is None else out
    small = [Guarded(values, offset=1) for values in (beta.new_empty(T), beta.new_empty(T), flags(found_inf))]
    result = Balanced(ema, out, *(guarded.view for guarded in small))
    op = backends.operators(backend).balance_
    assert op(ema, grads, beta, seed_for(ema.dtype), alpha, constant, eps, *result[1:]) is None
    for guarded in small:
        guarded.assert_intact()
    return result


def run_combine(
    backend: str,
    ema: Tensor,
    sq_norms: Tensor,
    *,
    preference: Tensor | None = None,
    found_inf: float = 0.0,
    scale: float = 1.0,
    alpha: str = "max",
    constant: float = ALPHA_CONSTANT,
    eps: float = EPS,
    accumulate: bool = False,
    out: Tensor | None = None,
    counts: bool = True,
) -> Combined:
    """Call ``combine``; all outputs but a given ``out`` are fresh, poisoned and between sentinels.

    :param counts: Give it the number of steps, :data:`STEPS`, to count up.
    """
    T, P = ema.shape
    out = ema.new_empty(P) if out is None else out
    flag, factor = flags(found_inf), coefficient(scale, ema.dtype)
    small = [Guarded(factor.new_empty(shape), offset=1) for shape in ((T,), (T,), (), ())]
    small.append(Guarded(torch.tensor(STEPS, device=DEVICE), offset=1))
    result = Combined(out, *(guarded.view for guarded in small))
    counter = arrivals()
    op = backends.operators(backend).combine
    given = ema, sq_norms, preference, flag, factor, alpha, constant, eps, accumulate
    assert op(*given, *result[:-1], result.step if counts else None, counter) is None
    for guarded in small:
        guarded.assert_intact()
    assert int(counter) == 0
    return result


def run_gram(backend: str, ema: Tensor) -> Tensor:
    """Call ``gram``; the output is fresh, poisoned and between sentinels."""
    T = len(ema)
    guarded, counter = Guarded(coefficient(0, ema.dtype).new_empty(T, T), offset=1), arrivals()
    assert backends.operators(backend).gram(ema, guarded.view, counter) is None
    guarded.assert_intact()
    assert int(counter) == 0
    return guarded.view


class Segments(NamedTuple):
    """Where each slot lives in a row."""

    table: Tensor  # (S, 3) of (start, numel, first_chunk), on the CPU
    P: int
    chunks: int
    chunk_table: Tensor  # (C, 3) of (slot, start, numel)

    @classmethod
    def at(cls, rows: Sequence[tuple[int, int, int]], P: int) -> Segments:
        table = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        chunks = chunk_table(rows).to(DEVICE)
        return cls(table, P, len(chunks), chunks)

    @classmethod
    def of(cls, numels: Sequence[int], align: int = 256) -> Segments:
        rows, column, chunk = [], 0, 0
        for numel in numels:
            rows.append((column, numel, chunk))
            column += -(-numel // align) * align
            chunk += -(-numel // CHUNK)
        return cls.at(rows, column)

    def columns(self, slot: int) -> slice:
        start, numel, _ = self.table[slot].tolist()
        return slice(start, start + numel)

    def chunks_of(self, slot: int) -> slice:
        _, numel, first = self.table[slot].tolist()
        return slice(first, first + -(-numel // CHUNK))


@dataclass
class Row:
    """One task's row and everything ``ema_update_`` writes; partials start poisoned, so that a forgotten one shows."""

    row: Tensor
    segments: Segments
    found_inf: Tensor = field(default_factory=flags)

    def __post_init__(self) -> None:
        like = coefficient(0, self.row.dtype)
        self._partials = Guarded(like.new_empty(self.segments.chunks), offset=1)
        self._sq_norm = Guarded(like.new_empty(()), offset=1)
        self.partials, self.sq_norm = self._partials.view, self._sq_norm.view
        self.arrivals = arrivals()

    def update(
        self,
        backend: str,
        grads: Sequence[Tensor | None],
        slots: Sequence[int] | None = None,
        *,
        beta: float = 0.75,
        inv_scale: float = 1.0,
        accumulate: bool = False,
    ) -> Row:
        """Call ``ema_update_`` with all slots, or the given ones."""
        slots = range(len(grads)) if slots is None else slots
        tables = self.segments.table, self.segments.chunk_table
        scalars = coefficient(beta, self.row.dtype), coefficient(inv_scale, self.row.dtype), seed_for(self.row.dtype)
        written = self.partials, self.sq_norm, self.found_inf, self.arrivals
        op = backends.operators(backend).ema_update_
        assert op(self.row, list(grads), list(slots), *tables, *scalars, *written, accumulate) is None
        self._partials.assert_intact()
        self._sq_norm.assert_intact()
        assert int(self.arrivals) == 0
        return self

    def state(self) -> dict[str, Tensor]:
        """Everything that was written."""
        return {"row": self.row, "partials": self.partials, "sq_norm": self.sq_norm, "found_inf": self.found_inf}


# --- Comparisons


def assert_same_bits(what: str, actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, signs of zeros included; only NaNs may differ among themselves."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.itemsize]
    same = actual.contiguous().view(integers) == expected.contiguous().view(integers)
    same |= actual.isnan() & expected.isnan()
    assert same.all(), f"{what}: {int((~same).sum())} of {same.numel()} entries differ in their bits"
