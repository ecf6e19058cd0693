"""``triton_interpreter.py`` does what it says: each of these fails, or would be silently wrong, without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_ins import INTERPRETED

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="about Triton's interpreter (TRITON_INTERPRET=1)")


@triton.jit
def _convert(source, target, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(target + columns, tl.load(source + columns).to(target.dtype.element_ty))


@triton.jit
def _double(source, target, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    values = tl.load(source + columns)
    tl.store(target + columns, values + values)


@triton.jit
def _count(bound, target):
    total = 0
    for i in range(tl.load(bound)):
        total += i
    tl.store(target, total)


@triton.jit
def _store_float(value: tl.float64, target):
    tl.store(target, value)


def test_bfloat16_is_rounded_to_nearest_even(rng: np.random.Generator) -> None:
    values = torch.from_numpy(rng.integers(0, 2**32, 4096, np.uint32).view(np.float32))
    rounded = torch.empty(4096, dtype=torch.bfloat16)
    _convert[(1,)](values, rounded, BLOCK=4096)
    assert torch.equal(rounded.nan_to_num(7), values.bfloat16().nan_to_num(7))


def test_every_bfloat16_is_read_exactly() -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    read = torch.empty(2**16)
    _convert[(1,)](values, read, BLOCK=2**16)
    assert torch.equal(read.nan_to_num(7), values.float().nan_to_num(7))


def test_arithmetic_on_bfloat16_raises() -> None:
    values = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="interpreted arithmetic on bfloat16"):
        _double[(1,)](values, torch.empty_like(values), BLOCK=16)


def test_overflow_is_no_warning() -> None:
    values = torch.full((16,), 3e38)
    doubled = torch.empty(16)
    _double[(1,)](values, doubled, BLOCK=16)
    assert doubled.isinf().all()


def test_bounds_of_loops_may_come_from_memory() -> None:
    total = torch.zeros((), dtype=torch.int32)
    _count[(1,)](torch.tensor(5, dtype=torch.int32), total)
    assert total == 10


def test_declared_float64_stays_exact() -> None:
    stored = torch.zeros((), dtype=torch.float64)
    _store_float[(1,)](1e-8, stored)
    assert float(stored) == 1e-8
