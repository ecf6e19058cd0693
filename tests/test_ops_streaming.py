"""What only ``ema_update_`` has: absent gradients, mixed dtypes, parts that come later, slots in any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_checks import assert_balanced, assert_ema, check_combine, check_ema_update, ema_magnitude
from op_inputs import (
    DEVICE,
    GRAD_DTYPES,
    STATE_DTYPES,
    Row,
    Segments,
    array,
    assert_same_bits,
    flags,
    random_rows,
    run_balance,
    tensor,
)
from torch import Tensor

from dbmtl_fused import oracle

NUMELS = [129, 4097, 1, 8192, 300, 77]
SEGMENTS = Segments.of(NUMELS)


@pytest.fixture
def row(rng: np.random.Generator) -> Row:
    return Row(tensor(rng.standard_normal(SEGMENTS.P)), SEGMENTS)


@pytest.fixture
def grads(rng: np.random.Generator) -> list[Tensor]:
    return [tensor(rng.standard_normal(numel)) for numel in NUMELS]


def test_absent_gradients_only_decay(backend: str, row: Row, grads: list[Tensor]) -> None:
    check_ema_update(backend, row, [None, grads[1], None, None, grads[4], None])


def test_all_gradients_absent(backend: str, row: Row) -> None:
    check_ema_update(backend, row, [None] * len(NUMELS))


def test_absent_gradient_equals_zeros(backend: str, row: Row, grads: list[Tensor]) -> None:
    absent = Row(row.row.clone(), SEGMENTS).update(backend, [None, *grads[1:]])
    zeros = Row(row.row.clone(), SEGMENTS).update(backend, [torch.zeros_like(grads[0]), *grads[1:]])
    for name, values in absent.state().items():
        assert_same_bits(name, values, zeros.state()[name])


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_every_dtype_in_one_call(backend: str, rng: np.random.Generator, state_dtype: torch.dtype) -> None:
    row = Row(tensor(rng.standard_normal(SEGMENTS.P), state_dtype), SEGMENTS)
    dtypes = [*GRAD_DTYPES, torch.bfloat16, torch.float32]
    grads = [tensor(rng.standard_normal(n), dtype) for n, dtype in zip(NUMELS, dtypes, strict=True)]
    check_ema_update(backend, row, grads)


def test_later_part_is_added_without_a_second_decay(backend: str, row: Row, grads: list[Tensor]) -> None:
    """Two firings of one leaf: the EMA of the sum of both parts, not two steps."""
    start = array(row.row)
    parts = [grad * 0.25 for grad in grads], [grad * 0.75 for grad in grads]
    row.update(backend, parts[0], beta=0.5)
    check_ema_update(backend, row, parts[1], beta=0.5, accumulate=True)

    for slot in range(len(NUMELS)):
        columns = SEGMENTS.columns(slot)
        whole = array(parts[0][slot]) + array(parts[1][slot])
        exact = oracle.ema_update(start[columns], whole, 0.5).ema
        magnitude = 2 * ema_magnitude(start[columns], whole, 0.5)
        actual = row.row[columns]
        assert_ema(actual, actual, exact, magnitude)


def test_later_part_of_some_slots(backend: str, row: Row, grads: list[Tensor]) -> None:
    row.update(backend, grads)
    check_ema_update(backend, row, [None, grads[1], None, grads[3], None, None], inv_scale=0.5, accumulate=True)


def test_slots_of_other_calls_are_left_alone(backend: str, row: Row, grads: list[Tensor]) -> None:
    row.update(backend, grads)
    before = {name: values.clone() for name, values in row.state().items()}
    row.update(backend, [grads[3], grads[0]], [3, 0])
    for slot in (1, 2, 4, 5):
        columns, chunks = SEGMENTS.columns(slot), SEGMENTS.chunks_of(slot)
        assert_same_bits("row", row.row[columns], before["row"][columns])
        assert_same_bits("partials", row.partials[chunks], before["partials"][chunks])
    for slot in (0, 3):
        columns, chunks = SEGMENTS.columns(slot), SEGMENTS.chunks_of(slot)
        assert not torch.equal(row.row[columns], before["row"][columns])
        assert not torch.equal(row.partials[chunks], before["partials"][chunks])
    assert not torch.equal(row.sq_norm, before["sq_norm"])


def test_no_slots(backend: str, row: Row, grads: list[Tensor]) -> None:
    """An empty bucket is legal and changes nothing."""
    row.update(backend, grads)
    before = {name: values.clone() for name, values in row.state().items()}
    row.update(backend, [], [])
    for name, values in row.state().items():
        assert_same_bits(name, values, before[name])


def test_one_call_for_many_small_slots(backend: str, rng: np.random.Generator) -> None:
    numels = [int(n) for n in rng.integers(0, 40, 700)]
    segments = Segments.of(numels)
    row = Row(tensor(rng.standard_normal(segments.P)), segments)
    check_ema_update(backend, row, [tensor(rng.standard_normal(n)) if n % 7 else None for n in numels])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_non_finite_entries_stay_as_they_were(
    backend: str, rng: np.random.Generator, row: Row, grads: list[Tensor], bad: float, dtype: torch.dtype
) -> None:
    grads = [grad.to(dtype) for grad in grads]
    before = row.row.clone()
    places = [(slot, int(rng.integers(NUMELS[slot]))) for slot in (0, 1, 1, 5)]
    for slot, place in places:
        grads[slot][place] = bad
    check_ema_update(backend, row, grads)
    assert float(row.found_inf) == 1
    for slot, place in places:
        column = SEGMENTS.columns(slot).start + place
        assert_same_bits("held entry", row.row[column], before[column])


def test_flag_of_an_earlier_call_stays(backend: str, row: Row, grads: list[Tensor]) -> None:
    row.found_inf = flags(1.0)
    check_ema_update(backend, row, grads)
    assert float(row.found_inf) == 1


@pytest.mark.parametrize(
    ("entry", "grad", "inv_scale", "accumulate", "dtype"),
    [
        (3e38, 3e38, 1.0, True, torch.float32),  # the sum overflows
        (1.0, 1e300, 1.0, False, torch.float64),  # the gradient does, in the state's dtype
        (1.0, 3e38, 65536.0, False, torch.float32),  # the unscaled gradient does
        (1.0, 1.0, np.inf, False, torch.float32),
    ],
    ids=["sum", "gradient", "unscaled", "inv_scale"],
)
def test_overflow_is_held_back_too(
    backend: str, entry: float, grad: float, inv_scale: float, accumulate: bool, dtype: torch.dtype
) -> None:
    segments = Segments.of([3])
    start = tensor([1.0, entry, 2.0] + [0.0] * 253)
    row = Row(start.clone(), segments)
    row.update(backend, [tensor([0.0, grad, 0.0], dtype)], inv_scale=inv_scale, accumulate=accumulate)
    assert float(row.found_inf) == 1
    assert_same_bits("held entry", row.row[1], start[1])


def test_a_row_that_is_not_finite_raises_the_flag(backend: str, row: Row, grads: list[Tensor]) -> None:
    """A buffer that was loaded broken must not go unnoticed."""
    row.row[5] = torch.inf
    row.update(backend, grads)
    assert float(row.found_inf) == 1
    assert float(row.row[5]) == np.inf


def test_streaming_equals_one_shot(backend: str, rng: np.random.Generator) -> None:
    """``balance_`` is ``ema_update_`` of every row and ``combine``."""
    T, P = 5, 9001
    segments = Segments.of([P], align=1)
    ema, grads = tensor(random_rows(rng, T, P)), tensor(random_rows(rng, T, P))
    rows = [Row(row, segments).update(backend, [grad]) for row, grad in zip(ema.clone(), grads, strict=True)]
    streamed = torch.stack([row.row for row in rows])
    combined = check_combine(
        backend, streamed, torch.stack([row.sq_norm for row in rows]), torch.empty(P, device=DEVICE)
    )

    one_shot = run_balance(backend, ema.clone(), grads, 0.75)
    magnitude = ema_magnitude(array(ema), array(grads), 0.75)
    expected_ema, expected = oracle.balance(array(ema), array(grads), 0.75)
    assert_ema(streamed, one_shot.ema, expected_ema.ema, magnitude)
    assert_balanced(combined, one_shot, expected, magnitude)
