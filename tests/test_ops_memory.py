"""Wherever the tensors lie: misaligned views, rows with gaps, any memory order; and nothing else is written.

Views lie in buffers full of sentinels which must survive. Fresh outputs hold NaN, so that whatever is not written
shows.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from op_checks import check_balance, check_combine, check_ema_update
from op_inputs import (
    DEVICE,
    GRAD_DTYPES,
    SENTINEL,
    STATE_DTYPES,
    Guarded,
    Row,
    Segments,
    array,
    in_memory_order,
    random_rows,
    tensor,
)

offsets = pytest.mark.parametrize(
    "offsets", [(0, 0, 0), (1, 1, 1), (1, 2, 3), (3, 0, 5), (0, 7, 0), (0, 0, 1)], ids=str
)
paddings = pytest.mark.parametrize("row_padding", [0, 1, 6, 64], ids="row_padding={}".format)
columns = pytest.mark.parametrize("P", [1, 15, 129, 4097], ids="P={}".format)
dtypes = pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
states = pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)


@offsets
@paddings
@columns
def test_balance_views(
    backend: str, rng: np.random.Generator, offsets: tuple[int, int, int], row_padding: int, P: int
) -> None:
    ema = Guarded(tensor(random_rows(rng, 3, P)), offset=offsets[0], row_padding=row_padding)
    grads = Guarded(tensor(random_rows(rng, 3, P)), offset=offsets[1], row_padding=row_padding // 2)
    out = Guarded(torch.empty(P, device=DEVICE), offset=offsets[2])
    check_balance(backend, ema.view, grads.view, 0.75, out=out.view)
    for guarded in (ema, grads, out):
        guarded.assert_intact()


@dtypes
@states
@pytest.mark.parametrize("T", [1, 3, 17])
def test_balance_views_of_each_dtype(
    backend: str, rng: np.random.Generator, dtype: torch.dtype, state_dtype: torch.dtype, T: int
) -> None:
    """Misalignment in bytes depends on the dtype, and rows of odd pitch are each misaligned differently."""
    ema = Guarded(tensor(random_rows(rng, T, 131), state_dtype), offset=1, row_padding=2)
    grads = Guarded(tensor(random_rows(rng, T, 131), dtype), offset=3, row_padding=4)
    out = Guarded(torch.empty(131, dtype=dtype, device=DEVICE), offset=5)
    check_balance(backend, ema.view, grads.view, 0.75, out=out.view)
    for guarded in (ema, grads, out):
        guarded.assert_intact()


def test_balance_on_interleaved_rows(backend: str, rng: np.random.Generator) -> None:
    """Rows of ``ema`` and ``grads`` alternate in one buffer: they overlap as ranges but share no element."""
    P = 129
    both = tensor(np.hstack([random_rows(rng, 5, P), random_rows(rng, 5, P)]))
    check_balance(backend, both[:, :P], both[:, P:], 0.75)


def test_balance_of_one_row_with_any_stride(backend: str, rng: np.random.Generator) -> None:
    """The stride of a dimension of size 1 means nothing."""
    ema, grads = (tensor(random_rows(rng, 1, 100)).as_strided((1, 100), (stride, 1)) for stride in (0, 3))
    check_balance(backend, ema, grads, 0.75)


def test_balance_of_one_column_with_any_stride(backend: str, rng: np.random.Generator) -> None:
    ema, grads = (tensor(random_rows(rng, 6, 5))[:, 2:3].as_strided((6, 1), (5, 3)) for _ in range(2))
    check_balance(backend, ema, grads, 0.75)


@offsets
@paddings
@columns
@dtypes
def test_combine_views(
    backend: str,
    rng: np.random.Generator,
    offsets: tuple[int, int, int],
    row_padding: int,
    P: int,
    dtype: torch.dtype,
) -> None:
    """A group of columns of the buffer whose ``.grad`` has another dtype is a view with long rows."""
    ema = Guarded(tensor(random_rows(rng, 3, P)), offset=offsets[0], row_padding=row_padding)
    sq_norms = Guarded(tensor(np.square(array(ema.view)).sum(axis=1)), offset=offsets[1])
    out = Guarded(torch.empty(P, dtype=dtype, device=DEVICE), offset=offsets[2])
    check_combine(backend, ema.view, sq_norms.view, out.view)
    for guarded in (ema, sq_norms, out):
        guarded.assert_intact()


@dtypes
@states
@pytest.mark.parametrize("align", [256, 1], ids="align={}".format)
@pytest.mark.parametrize("offset", [0, 1, 3], ids="offset={}".format)
def test_ema_update_views(
    backend: str, rng: np.random.Generator, dtype: torch.dtype, state_dtype: torch.dtype, align: int, offset: int
) -> None:
    """Gradients and row misaligned; padding between slots belongs to nobody and must not be written."""
    numels = [129, 1, 0, 4097, 7, 256]
    segments = Segments.of(numels, align)
    values = tensor(np.full(segments.P, SENTINEL), state_dtype)
    for slot, numel in enumerate(numels):
        values[segments.columns(slot)] = tensor(rng.standard_normal(numel), state_dtype)
    row = Guarded(values, offset=offset)
    grads = [Guarded(tensor(rng.standard_normal(numel), dtype), offset=i + offset) for i, numel in enumerate(numels)]

    check_ema_update(backend, Row(row.view, segments), [grad.view for grad in grads])
    for guarded in (row, *grads):
        guarded.assert_intact()
    padding = torch.ones(segments.P, dtype=torch.bool, device=DEVICE)
    for slot in range(len(numels)):
        padding[segments.columns(slot)] = False
    assert (row.view[padding] == SENTINEL).all(), "wrote to columns of no slot"


ORDERS = {
    "scalar": ((), ()),
    "contiguous": ((3, 5, 7), (0, 1, 2)),
    "transposed": ((40, 129), (1, 0)),
    "channels_last": ((8, 3, 5, 7), (0, 2, 3, 1)),
    "channels_last_3d": ((4, 3, 5, 7, 2), (0, 2, 3, 4, 1)),
    "reversed": ((3, 5, 300), (2, 1, 0)),
    "ones": ((1, 129, 1, 1), (0, 2, 3, 1)),
    "empty": ((3, 0, 5), (2, 1, 0)),
}


@dtypes
@pytest.mark.parametrize("offset", [0, 1], ids="offset={}".format)
def test_ema_update_takes_gradients_of_any_shape_and_memory_order(
    backend: str, rng: np.random.Generator, dtype: torch.dtype, offset: int
) -> None:
    """All orders in one call; elements are taken as they lie in memory, which is the order of the parameter's."""
    guards, grads = [], []
    for shape, order in ORDERS.values():
        guards.append(Guarded(tensor(rng.standard_normal(math.prod(shape)), dtype), offset=offset))
        grads.append(in_memory_order(guards[-1].view, shape, order))
    segments = Segments.of([grad.numel() for grad in grads])
    row = Row(tensor(rng.standard_normal(segments.P)), segments)
    check_ema_update(backend, row, grads, [guarded.view for guarded in guards])
    for guarded in guards:
        guarded.assert_intact()
