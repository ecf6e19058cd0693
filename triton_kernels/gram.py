"""``gram``: inner products of all pairs of rows.

Math      out[s, t] = sum_p ema[s, p] * ema[t, p]
Traffic   fp32: reads 4TP bytes, once each up to ROWS tasks. Beyond, a program goes through a span of columns once for
          each pair of blocks of ROWS rows, T / ROWS times in all: up to about 32 tasks the span stays in L2. The
          workspace is 4 T^2 bytes a program.
Parallel  as many programs as are resident at once; spans of columns are dealt to them in turn. A thread has its columns
          of two blocks of rows, and a sum for every pair of their rows.
Sync      an atomic counter; the program that arrives last adds up what all have left in the workspace.
Numerics  in the state's compute dtype, no multiply-adds. A program's sums are always of the same columns, and added to
          those of others in a fixed order: the same bits run after run, on one kind of device. Both triangles are
          written from one.
Limits    ema and out must not overlap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbmtl_fused.triton_kernels import checks, tuning
from dbmtl_fused.triton_kernels.device import fold, is_last, load_tile
from dbmtl_fused.triton_kernels.launch import multiprocessors, on_device


@triton.jit
def _products(
    ema, ema_stride, T, P, left, right, start, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Of a block of rows and another, summed over the columns that a thread has side by side."""
    columns = (start + tl.arange(0, BLOCK))[None, None, :]
    lefts, rights = (left + tl.arange(0, ROWS))[:, None, None], (right + tl.arange(0, ROWS))[None, :, None]
    left_tile = load_tile(ema + lefts.to(tl.int64) * ema_stride + columns, lefts < T, columns, P, WHOLE)
    right_tile = load_tile(ema + rights.to(tl.int64) * ema_stride + columns, rights < T, columns, P, WHOLE)
    products = left_tile.to(dtype) * right_tile.to(dtype)
    return tl.sum(fold(tl.reshape(products, [ROWS * ROWS, BLOCK])), axis=2)


@triton.jit
def _write_sums(partials, programs, T, out, PAIRS: tl.constexpr, PROGRAMS: tl.constexpr):
    for first in range(0, T * T, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        s, t = pairs // T, pairs % T
        there = (pairs < T * T) & (s <= t)
        sums = tl.zeros([PROGRAMS, PAIRS], partials.dtype.element_ty)
        for program in range(0, programs, PROGRAMS):
            others = program + tl.arange(0, PROGRAMS)[:, None]
            pointers = partials + others.to(tl.int64) * T * T + pairs[None, :]
            # Not from the first-level cache: other programs have just written them.
            sums += tl.load(pointers, mask=(others < programs) & there[None, :], other=0.0, cache_modifier=".cg")
        products = tl.sum(sums, axis=0)
        tl.store(out + pairs, products, mask=there)
        tl.store(out + t * T + s, products, mask=there)


@triton.jit(
    do_not_specialize=["T", "P", "span", "spans"], do_not_specialize_on_alignment=["out", "partials", "arrivals"]
)  # fmt: skip
def gram_kernel(
    ema, ema_stride, T, P, span, spans, out, partials, arrivals,
    SMALL_T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    num_tasks = T if SMALL_T == 0 else SMALL_T
    dtype: tl.constexpr = out.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    own = partials + program.to(tl.int64) * num_tasks * num_tasks
    pairs = tl.arange(0, ROWS * ROWS)
    tiles = tl.cdiv(tl.cast(P, tl.int64), BLOCK)
    for i in range(program, spans, programs):
        begin, end = i * span, tl.minimum((i + 1) * span, tiles)
        for left in range(0, num_tasks, ROWS):
            for right in range(left, num_tasks, ROWS):
                sums = tl.sum(fold(tl.zeros([ROWS * ROWS, BLOCK], dtype)), axis=2)
                for tile in range(begin, end):
                    start = tl.cast(tile, tl.int64) * BLOCK
                    if start + BLOCK <= P:
                        sums += _products(ema, ema_stride, num_tasks, P, left, right, start, dtype, ROWS, BLOCK, True)
                    else:
                        sums += _products(ema, ema_stride, num_tasks, P, left, right, start, dtype, ROWS, BLOCK, False)
                s, t = left + pairs // ROWS, right + pairs % ROWS
                there = (s < num_tasks) & (t < num_tasks)
                products = tl.sum(sums, axis=1)
                if i != program:  # not this program's first span
                    products += tl.load(own + s * num_tasks + t, mask=there, other=0.0)
                tl.store(own + s * num_tasks + t, products, mask=there)
        tl.debug_barrier()  # other threads may read what these have stored
    if is_last(arrivals):
        _write_sums(partials, programs, num_tasks, out, PAIRS, PROGRAMS)


def gram(ema: Tensor, out: Tensor, arrivals: Tensor) -> None:
    device = ema.device
    T, P = checks.matrix("ema", ema)
    dtype = checks.state("ema", ema)
    checks.square("out", out, T, dtype, device)
    checks.scalar("arrivals", arrivals, torch.int32, device)

    config = tuning.gram(T)
    span, spans = config.spans(T, P, multiprocessors(device))
    programs = min(spans, multiprocessors(device) * tuning.GRAM_PROGRAMS)
    pairs = min(256, triton.next_power_of_2(T * T))
    with on_device(ema):
        gram_kernel[(programs,)](
            ema,
            ema.stride(0),
            T,
            P,
            span,
            spans,
            out,
            torch.empty(programs, T, T, dtype=dtype, device=device),
            arrivals,
            SMALL_T=T if config.rows >= T else 0,
            ROWS=config.rows,
            BLOCK=config.block,
            PAIRS=pairs,
            PROGRAMS=min(256, 2048 // pairs),
            num_warps=config.num_warps,
            **tuning.ARITHMETIC,
        )
