"""Entries beyond ``ENTRY_LIMIT`` stay out of the EMA: finite gradients whose squares overflow must not spoil norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_checks import check_balance, check_ema_update
from op_inputs import (
    DEVICE,
    GRAD_DTYPES,
    STATE_DTYPES,
    Row,
    Segments,
    assert_same_bits,
    random_rows,
    run_balance,
    tensor,
)
from torch import Tensor

from dbmtl_fused._ops import ENTRY_LIMIT, compute_dtype

dtypes = pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
states = pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
accumulates = pytest.mark.parametrize("accumulate", [False, True], ids=["decay", "add"])

NUMELS = [129, 4097, 1]
SEGMENTS = Segments.of(NUMELS)
SPREAD = [0, 1, 31, 64, 127, 128]  # columns of a gradient that are large: first and last, whole words and the rest


def limit_of(state_dtype: torch.dtype) -> float:
    return ENTRY_LIMIT[compute_dtype(state_dtype)]


def next_above(value: float, dtype: torch.dtype) -> float:
    """Of a positive ``value`` of ``dtype``; infinity where ``dtype`` ends below it."""
    given = torch.tensor(value, dtype=dtype)
    return float(given.nextafter(torch.tensor(torch.inf, dtype=dtype)))


def holds(dtype: torch.dtype, value: float) -> bool:
    return abs(value) <= torch.finfo(dtype).max


REACHING = [(state, dtype) for state in STATE_DTYPES for dtype in GRAD_DTYPES if holds(dtype, limit_of(state))]


@states
@dtypes
@accumulates
@pytest.mark.parametrize("large", [1e14, 3e14, 1e19, 1e25, -1e30, 1e200, -1e300])
def test_large_gradients_in_streams(
    backend: str, rng: np.random.Generator, state_dtype: torch.dtype, dtype: torch.dtype, accumulate: bool, large: float
) -> None:
    row = Row(tensor(rng.standard_normal(SEGMENTS.P), state_dtype), SEGMENTS)
    before, grads = row.row.clone(), [tensor(rng.standard_normal(numel), dtype) for numel in NUMELS]
    entry = tensor(large, dtype)
    grads[0][SPREAD], grads[1][4096], grads[2][0] = entry, entry, -entry
    check_ema_update(backend, row, grads, beta=0.5, accumulate=accumulate)
    held = not holds(dtype, large) or abs(large) / 2 > limit_of(state_dtype)
    assert bool(row.found_inf) == held
    assert row.sq_norm.isfinite()
    assert row.partials.isfinite().all()
    if held:
        for slot, places in enumerate([SPREAD, [4096], [0]]):
            columns = SEGMENTS.columns(slot)
            assert_same_bits("held entries", row.row[columns][places], before[columns][places])


@states
@dtypes
@pytest.mark.parametrize("large", [1e14, 3e14, 1e19, 1e25, -1e30, 1e200, -1e300])
def test_large_gradients_in_a_matrix(
    backend: str, rng: np.random.Generator, state_dtype: torch.dtype, dtype: torch.dtype, large: float
) -> None:
    ema, grads = tensor(random_rows(rng, 3, 129), state_dtype), tensor(random_rows(rng, 3, 129), dtype)
    before = ema.clone()
    grads[1, SPREAD] = tensor(large, dtype)
    result = check_balance(backend, ema, grads, 0.5)
    held = not holds(dtype, large) or abs(large) / 2 > limit_of(state_dtype)
    assert bool(result.found_inf) == held
    assert bool(result.out.isnan().all()) == held
    assert result.norms.isfinite().all()
    if held:
        assert_same_bits("held entries", ema[1, SPREAD], before[1, SPREAD])


@pytest.mark.parametrize(("state_dtype", "dtype"), REACHING, ids=str)
@accumulates
@pytest.mark.parametrize("sign", [1, -1])
def test_both_sides_of_the_limit(
    backend: str, state_dtype: torch.dtype, dtype: torch.dtype, accumulate: bool, sign: int
) -> None:
    """The limit itself is let in, the next number that gradients and what is computed in both hold is not."""
    limit = limit_of(state_dtype)
    coarser = max(dtype, compute_dtype(state_dtype), key=lambda dtype: torch.finfo(dtype).eps)
    above = next_above(limit, coarser)
    for value, expected in ((limit, limit), (above, 0.0)):
        for grads in (torch.full((129,), sign * value, dtype=dtype, device=DEVICE), tensor([sign * value], dtype)):
            segments = Segments.of([len(grads)])
            row = Row(torch.zeros(segments.P, dtype=state_dtype, device=DEVICE), segments)
            row.update(backend, [grads], beta=0.0, accumulate=accumulate)
            assert (row.row[: len(grads)] == sign * expected).all()
            assert bool(row.found_inf) == (value == above)
            ema = torch.zeros(1, len(grads), dtype=state_dtype, device=DEVICE)
            result = run_balance(backend, ema, grads[None], 0.0)
            assert (ema == sign * expected).all()
            assert bool(result.found_inf) == (value == above)


@states
def test_a_row_at_the_limit_has_a_finite_norm(backend: str, state_dtype: torch.dtype) -> None:
    """So have 1e10 entries of them, which no test has the time for: the norm of a few says how much room is left."""
    P, limit = 70_001, limit_of(state_dtype)
    grads = torch.full((2, P), limit, dtype=compute_dtype(state_dtype), device=DEVICE)
    grads[1] *= -1
    ema = torch.zeros(2, P, dtype=state_dtype, device=DEVICE)
    result = check_balance(backend, ema, grads, 0.0)
    assert not result.found_inf
    assert (ema == grads).all()
    row = Row(torch.zeros(P, dtype=state_dtype, device=DEVICE), Segments.of([P], align=1))
    row.update(backend, [grads[0]], beta=0.0)
    for norm in (float(result.norms[0]), float(row.sq_norm) ** 0.5):
        assert norm == pytest.approx(limit * P**0.5, rel=1e-5)
        assert (norm / P**0.5) ** 2 * 1e10 < torch.finfo(compute_dtype(state_dtype)).max


@states
def test_an_entry_that_is_beyond_the_limit_already(backend: str, state_dtype: torch.dtype) -> None:
    """A buffer that was loaded broken must not go unnoticed, whatever the gradients; nor must one with NaN."""
    for broken in (2 * limit_of(state_dtype), -torch.inf, torch.nan):
        for grad in (None, torch.ones(3, device=DEVICE)):
            segments = Segments.of([3])
            start = tensor([1.0, broken, 2.0] + [0.0] * 253, state_dtype)
            row = Row(start.clone(), segments).update(backend, [grad], beta=1.0)
            assert row.found_inf
            assert_same_bits("row", row.row, start)


def test_the_sum_of_two_parts_is_what_counts(backend: str) -> None:
    limit: Tensor = tensor([ENTRY_LIMIT[torch.float32]])
    row = Row(torch.zeros(256, device=DEVICE), Segments.of([1]))
    row.update(backend, [limit], beta=0.5)
    assert not row.found_inf
    row.update(backend, [limit * 1.001], beta=0.5, accumulate=True)
    assert row.found_inf
    assert float(row.row[0]) == float(limit) / 2
