"""The least that a memory-bound kernel can be: what moves bytes, with given shares of reads and writes, and no more.

Yardsticks beside ``cudaMemcpyAsync``. All in float32, 16 bytes a thread and access, 4 accesses of an operand under way.
"""
# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments have no Python types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _empty_kernel(unused):
    pass


@triton.jit
def _copy_kernel(source, target, count, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + columns, tl.load(source + columns, mask=columns < count), mask=columns < count)


@triton.jit
def _update_kernel(state, other, count, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = columns < count
    old = tl.load(state + columns, mask=there)
    new = tl.load(other + columns, mask=there)
    tl.store(state + columns, 0.5 * (old + new), mask=there)


@triton.jit
def _add_rows_kernel(rows, stride, out, count, T: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = columns < count
    total = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        total += tl.load(rows + t * stride + columns, mask=there)
    tl.store(out + columns, total, mask=there)


def empty(anything: Tensor) -> None:
    """A launch that does nothing."""
    _empty_kernel[(1,)](anything, num_warps=1)


def copy(source: Tensor, target: Tensor) -> None:
    """``target = source``: 4 bytes read and 4 written for each number. Both contiguous, as in all of these."""
    count = source.numel()
    _copy_kernel[(triton.cdiv(count, _BLOCK),)](source, target, count, BLOCK=_BLOCK, num_warps=_WARPS)


def update(state: Tensor, other: Tensor) -> None:
    """``state = (state + other) / 2``: two reads and one write, as in ``ema_update_``."""
    count = state.numel()
    _update_kernel[(triton.cdiv(count, _BLOCK),)](state, other, count, BLOCK=_BLOCK, num_warps=_WARPS)


def add_rows(rows: Tensor, out: Tensor) -> None:
    """``out = rows.sum(0)``: ``T`` reads and one write, as in ``combine``."""
    T, P = rows.shape
    block = max(512, _BLOCK // triton.next_power_of_2(T))
    _add_rows_kernel[(triton.cdiv(P, block),)](rows, rows.stride(0), out, P, T=T, BLOCK=block, num_warps=4)
