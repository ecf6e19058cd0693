"""``combine``: squared norms to weights, and the weighted sum of the rows.

Math      w_t = alpha / (sqrt(sq_norm_t) + eps);   out = scale * sum_t w_t ema[t]   (+ out if accumulate)
Traffic   fp32: 4 (T + 1) P bytes; 4P more if accumulate. ``sq_norms`` come from L2.
Parallel  one program for BLOCK columns of all rows; rows lie in the registers of one thread, ROWS at a time.
Sync      none: every program computes the weights again, while its first rows are on their way. Program 0 writes them.
Numerics  in the state's compute dtype, no multiply-adds; rows in a fixed order, not the reference's; one rounding to
          out's dtype.
Limits    ema and out must not overlap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbmtl_fused.triton_kernels import checks, tuning
from dbmtl_fused.triton_kernels.device import (
    alpha_of,
    convert_out,
    load_columns,
    load_tile,
    square_root,
    store_columns,
    weights_of,
)
from dbmtl_fused.triton_kernels.launch import on_device


@triton.jit
def _add_rows(total, tile, first, rows, T, sq_norms, factor, alpha, eps, flag, MODE: tl.constexpr):
    """``total`` plus the weighted rows ``first + rows``."""
    there = first + rows < T
    norms = square_root(tl.load(sq_norms + first + rows, mask=there, other=0.0))
    weights = tl.where(there, factor * weights_of(norms, alpha, eps, flag, MODE), 0)
    return total + tl.sum(weights[:, None] * tile.to(total.dtype), axis=0)


@triton.jit
def _combine_columns(
    ema, ema_stride, T, P, sq_norms, found_inf, scale, alpha_constant, eps, out, norms_out, weights_out, alpha_out,
    start, MODE: tl.constexpr, ACCUMULATE: tl.constexpr, TASKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    pointers = ema + rows[:, None].to(tl.int64) * ema_stride + columns[None, :]
    tile = load_tile(pointers, rows[:, None] < T, columns[None, :], P, WHOLE)
    if ACCUMULATE:
        total = load_columns(out + columns, columns, P, WHOLE).to(scale.dtype.element_ty)
    else:
        total = tl.zeros([BLOCK], scale.dtype.element_ty)

    tasks = tl.arange(0, TASKS)
    norms = square_root(tl.load(sq_norms + tasks, mask=tasks < T, other=0.0))
    alpha = alpha_of(norms, tasks, T, alpha_constant, MODE)
    flag = tl.load(found_inf)
    if tl.program_id(0) == 0:
        tl.store(norms_out + tasks, norms, mask=tasks < T)
        tl.store(weights_out + tasks, weights_of(norms, alpha, eps, flag, MODE), mask=tasks < T)
        tl.store(alpha_out, alpha)

    factor = tl.load(scale)
    total = _add_rows(total, tile, 0, rows, T, sq_norms, factor, alpha, eps, flag, MODE)
    for first in range(ROWS, T, ROWS):
        pointers += ROWS * ema_stride
        tile = load_tile(pointers, first + rows[:, None] < T, columns[None, :], P, WHOLE)
        total = _add_rows(total, tile, first, rows, T, sq_norms, factor, alpha, eps, flag, MODE)
    store_columns(out + columns, convert_out(total, out.dtype.element_ty), columns, P, WHOLE)


@triton.jit(
    do_not_specialize=["T", "P"],
    do_not_specialize_on_alignment=["sq_norms", "found_inf", "scale", "norms_out", "weights_out", "alpha_out"],
)
def combine_kernel(
    ema, ema_stride, T, P, sq_norms, found_inf, scale, alpha_constant: tl.float64, eps: tl.float64, out, norms_out,
    weights_out, alpha_out,
    MODE: tl.constexpr, ACCUMULATE: tl.constexpr, SMALL_T: tl.constexpr, TASKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    num_tasks = T if SMALL_T == 0 else SMALL_T
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= P:
        _combine_columns(
            ema, ema_stride, num_tasks, P, sq_norms, found_inf, scale, alpha_constant, eps, out, norms_out, weights_out,
            alpha_out, start, MODE, ACCUMULATE, TASKS, ROWS, BLOCK, True,
        )  # fmt: skip
    else:
        _combine_columns(
            ema, ema_stride, num_tasks, P, sq_norms, found_inf, scale, alpha_constant, eps, out, norms_out, weights_out,
            alpha_out, start, MODE, ACCUMULATE, TASKS, ROWS, BLOCK, False,
        )  # fmt: skip


def combine(
    ema: Tensor,
    sq_norms: Tensor,
    found_inf: Tensor,
    scale: Tensor,
    alpha: str,
    alpha_constant: float,
    eps: float,
    accumulate: bool,
    out: Tensor,
    norms: Tensor,
    weights: Tensor,
    alpha_value: Tensor,
) -> None:
    T, P = checks.matrix("ema", ema)
    dtype = checks.state("ema", ema)
    checks.alpha_mode(alpha)
    for name, vector in {"sq_norms": sq_norms, "norms": norms, "weights": weights}.items():
        checks.vector(name, vector, T, dtype, ema.device)
    checks.scalar("found_inf", found_inf, torch.float32, ema.device)
    for name, scalar in {"scale": scale, "alpha_value": alpha_value}.items():
        checks.scalar(name, scalar, dtype, ema.device)
    checks.out(out, P, ema.device)

    config = tuning.combine(T)
    with on_device(ema):
        combine_kernel[(max(1, triton.cdiv(P, config.block)),)](
            ema,
            ema.stride(0),
            T,
            P,
            sq_norms,
            found_inf,
            scale,
            alpha_constant,
            eps,
            out,
            norms,
            weights,
            alpha_value,
            MODE=alpha,
            ACCUMULATE=accumulate,
            SMALL_T=tuning.small(T),
            TASKS=triton.next_power_of_2(T),
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
            **tuning.ARITHMETIC,
        )
