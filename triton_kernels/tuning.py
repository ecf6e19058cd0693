"""Launch parameters of every kernel, in one place; ``benchmarks/sweep_triton.py`` measures the alternatives.

They are constants, not autotuned: an autotuner runs a kernel many times, and these update their operands in place.

Reasons. A thread should have four to eight 16-byte loads on their way (about 40 KB a multiprocessor cover the latency
of HBM3), all issued before the first use, and a tile must fit the registers of its threads: ``num_warps * 32`` of them,
at most 255 registers each, fewer where several blocks are to share a multiprocessor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

ARITHMETIC = {"enable_fp_fusion": False}
"""Options of every compilation: products and sums are rounded one by one, as in the reference, whose EMA is so matched
bit for bit. Memory is the limit, not arithmetic."""

SMALL_T = 16
"""Up to here the number of tasks is a constant of the kernel and all rows of a tile are loaded at once."""


class BeginStep(NamedTuple):
    block: int  # tasks at a time
    num_warps: int


class Combine(NamedTuple):
    block: int  # columns of a program
    rows: int  # loaded at once
    num_warps: int


class EmaUpdate(NamedTuple):
    num_warps: int


class Balance(NamedTuple):
    rows: int  # loaded at once
    update_block: int  # columns of a tile of phase 1
    sum_block: int  # columns of a tile of phase 2
    num_warps: int

    def programs(self, P: int, multiprocessors: int) -> int:
        """How many there are, all of which must be resident at once."""
        return max(1, min(-(P // -self.update_block), multiprocessors * BALANCE_WARPS // self.num_warps))


class Gram(NamedTuple):
    rows: int  # of a block
    block: int  # columns of a tile
    num_warps: int

    def spans(self, T: int, P: int, multiprocessors: int) -> tuple[int, int]:
        """How many tiles a program takes at a time, and how many such spans there are: one for each program if it goes
        through them only once."""
        tiles, programs = -(P // -self.block), GRAM_PROGRAMS * multiprocessors
        span = max(1, -(tiles // -programs) if self.rows >= T else GRAM_SPAN // (T * self.block))
        return span, max(1, -(tiles // -span))


# begin_step, which costs little but its launch and is not swept: a block has all tasks of most users; one warp, because
# every thread computes the schedule, in float64, of which small GPUs do two operations a cycle.
BEGIN_STEP = BeginStep(block=128, num_warps=1)

# ema_update_: a program has CHUNK = 4096 columns, so 16 of each operand a thread: 4 + 4 loads of 16 bytes.
EMA_UPDATE = EmaUpdate(num_warps=8)

# combine, by the largest T. The tile has 32 numbers a thread (64 from 9 tasks on); 128 columns a warp keep a column's
# rows in one thread, so that their sum needs no other.
COMBINE = {
    1: Combine(block=4096, rows=1, num_warps=4),
    2: Combine(block=2048, rows=2, num_warps=4),
    4: Combine(block=1024, rows=4, num_warps=4),
    8: Combine(block=512, rows=8, num_warps=4),
    16: Combine(block=512, rows=16, num_warps=4),
}
COMBINE_LARGE = Combine(block=1024, rows=4, num_warps=4)
COMBINE_PARTIALS = 2048  # which the last program loads at once; more would cost the others registers

# balance_, by the largest T. 16 warps of at most 128 registers a thread on each multiprocessor, so that a cooperative
# grid always fits. Phase 1 has 16 numbers of each operand a thread, 32 where that would make too few loads; 16 again
# from 13 tasks on and for bfloat16 state, whose rounding needs registers too, where more would spill. Phase 2 has 32,
# 64 from 9 tasks on, but for bfloat16 state from 13 on, where some compilers would spill on sm_100. For float64, which
# takes two registers, half of all that. Where there is not a tile for every multiprocessor, tiles and programs are a
# quarter as large, and a multiprocessor takes up to four.
BALANCE_WARPS = 16
BALANCE_REGISTERS = 128
BALANCE = {
    1: Balance(rows=1, update_block=8192, sum_block=8192, num_warps=16),
    2: Balance(rows=2, update_block=4096, sum_block=8192, num_warps=16),
    4: Balance(rows=4, update_block=2048, sum_block=4096, num_warps=16),
    8: Balance(rows=8, update_block=2048, sum_block=2048, num_warps=16),
    12: Balance(rows=16, update_block=1024, sum_block=2048, num_warps=16),
    16: Balance(rows=16, update_block=512, sum_block=2048, num_warps=16),
}
_UPDATE_NUMBERS = 16 * 32 * BALANCE_WARPS  # of a tile, 16 a thread
BALANCE_LARGE = Balance(rows=8, update_block=1024, sum_block=2048, num_warps=16)

# gram, by the largest T. A thread has 16 numbers of one or two rows, beyond that 4 columns of two blocks of 4 rows (of
# one up to 4 tasks) beside the 16 sums of their pairs; blocks of 8 rows would spill. At most 128 registers, so that all
# programs are resident (float64: half of them). Those that go through their columns several times take so few at a time
# that what all of them have taken stays in L2: 35 MB of float32 with 132 multiprocessors.
GRAM_PROGRAMS = 4  # a multiprocessor
GRAM_SPAN = 2**14  # numbers of a program
GRAM = {
    1: Gram(rows=1, block=2048, num_warps=4),
    2: Gram(rows=2, block=1024, num_warps=4),
}
GRAM_LARGE = Gram(rows=4, block=512, num_warps=4)


def small(T: int) -> int:
    """``T`` if it is to be a constant of the kernel, else 0."""
    return T if T <= SMALL_T else 0


def combine(T: int) -> Combine:
    return next((config for most, config in COMBINE.items() if most >= T), COMBINE_LARGE)


def gram(T: int) -> Gram:
    return next((config for most, config in GRAM.items() if most >= T), GRAM_LARGE)


def balance(T: int, P: int, state_dtype: torch.dtype, multiprocessors: int) -> Balance:
    config = next((config for most, config in BALANCE.items() if most >= T), BALANCE_LARGE)
    if state_dtype is torch.bfloat16:
        update_block = min(config.update_block, _UPDATE_NUMBERS // config.rows)
        sum_block = min(config.sum_block, 2 * config.update_block)
        config = config._replace(update_block=update_block, sum_block=sum_block)
    if state_dtype is torch.float64:
        update_block = min(config.update_block, _UPDATE_NUMBERS // config.rows) // 2
        config = config._replace(update_block=update_block, sum_block=config.sum_block // 2)
    if config.sum_block * multiprocessors > P:
        config = Balance(config.rows, config.update_block // 4, config.sum_block // 4, config.num_warps // 4)
    return config
