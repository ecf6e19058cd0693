"""``combine``: squared norms to weights, and the weighted sum of the rows.

Math      w_t = preference_t alpha / (sqrt(sq_norm_t) + eps);   out = scale * sum_t w_t ema[t]   (+ out if accumulate);
          out_sq_norm = sum_p out[p]^2;   step + 1 unless found_inf
Traffic   fp32: 4 (T + 1) P bytes; 4P more if accumulate. ``sq_norms``, ``preference`` and the partial sums, one a
          program, come from L2.
Parallel  one program for BLOCK columns of all rows; rows lie in the registers of one thread, ROWS at a time.
Sync      every program computes the weights again, while its first rows are on their way; program 0 writes them. An
          atomic counter: the program that arrives last adds up the partial sums, in the order of their columns, and
          counts the step.
Numerics  in the state's compute dtype, no multiply-adds; rows in a fixed order, not the reference's; one rounding to
          out's dtype, after the squares are taken.
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
    is_last,
    load_columns,
    load_tile,
    square_root,
    store_columns,
    sum_of_programs,
    weights_of,
)
from dbmtl_fused.triton_kernels.launch import on_device


@triton.jit
def _add_rows(total, tile, tasks, T, sq_norms, preference, factor, alpha, eps, flag, MODE: tl.constexpr):
    """``total`` plus the weighted rows ``tasks``."""
    norms = square_root(tl.load(sq_norms + tasks, mask=tasks < T, other=0.0))
    preferences = None if preference is None else tl.load(preference + tasks, mask=tasks < T, other=0.0)
    weights = tl.where(tasks < T, factor * weights_of(norms, preferences, alpha, eps, flag, MODE), 0)
    return total + tl.sum(weights[:, None] * tile.to(total.dtype), axis=0)


@triton.jit
def _load_rows(ema, ema_stride, rows, T, columns, P, WHOLE: tl.constexpr):
    pointers = ema + rows[:, None].to(tl.int64) * ema_stride + columns[None, :]
    return load_tile(pointers, rows[:, None] < T, columns[None, :], P, WHOLE)


@triton.jit
def _combine_columns(
    ema, ema_stride, T, P, sq_norms, preference, found_inf, scale, alpha_constant, eps, out, norms_out, weights_out,
    alpha_out, start, MODE: tl.constexpr, ACCUMULATE: tl.constexpr, TASKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Returns the squared norm of what goes to ``out``."""
    columns = start + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    tile = _load_rows(ema, ema_stride, rows, T, columns, P, WHOLE)
    if ACCUMULATE:
        total = load_columns(out + columns, columns, P, WHOLE).to(scale.dtype.element_ty)
    else:
        total = tl.zeros([BLOCK], scale.dtype.element_ty)

    tasks = tl.arange(0, TASKS)
    norms = square_root(tl.load(sq_norms + tasks, mask=tasks < T, other=0.0))
    preferences = None if preference is None else tl.load(preference + tasks, mask=tasks < T, other=0.0)
    counts = tasks < T if preferences is None else preferences != 0
    alpha = alpha_of(norms, tasks, counts, T, alpha_constant, MODE)
    flag = tl.load(found_inf)
    if tl.program_id(0) == 0:
        tl.store(norms_out + tasks, norms, mask=tasks < T)
        tl.store(weights_out + tasks, weights_of(norms, preferences, alpha, eps, flag, MODE), mask=tasks < T)
        tl.store(alpha_out, alpha)

    factor = tl.load(scale)
    total = _add_rows(total, tile, rows, T, sq_norms, preference, factor, alpha, eps, flag, MODE)
    for first in range(ROWS, T, ROWS):
        tile = _load_rows(ema, ema_stride, first + rows, T, columns, P, WHOLE)
        total = _add_rows(total, tile, first + rows, T, sq_norms, preference, factor, alpha, eps, flag, MODE)
    store_columns(out + columns, convert_out(total, out.dtype.element_ty), columns, P, WHOLE)
    squares = total * total
    return tl.sum(squares if WHOLE else tl.where(columns < P, squares, 0), axis=0)


@triton.jit(
    do_not_specialize=["T", "P"],
    do_not_specialize_on_alignment=[
        "sq_norms", "preference", "found_inf", "scale", "norms_out", "weights_out", "alpha_out", "out_sq_norm", "step",
        "arrivals",
    ],
)  # fmt: skip
def combine_kernel(
    ema, ema_stride, T, P, sq_norms, preference, found_inf, scale, alpha_constant: tl.float64, eps: tl.float64, out,
    norms_out, weights_out, alpha_out, partials, out_sq_norm, step, arrivals,
    MODE: tl.constexpr, ACCUMULATE: tl.constexpr, SMALL_T: tl.constexpr, TASKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    num_tasks = T if SMALL_T == 0 else SMALL_T
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= P:
        partial = _combine_columns(
            ema, ema_stride, num_tasks, P, sq_norms, preference, found_inf, scale, alpha_constant, eps, out, norms_out,
            weights_out, alpha_out, start, MODE, ACCUMULATE, TASKS, ROWS, BLOCK, True,
        )  # fmt: skip
    else:
        partial = _combine_columns(
            ema, ema_stride, num_tasks, P, sq_norms, preference, found_inf, scale, alpha_constant, eps, out, norms_out,
            weights_out, alpha_out, start, MODE, ACCUMULATE, TASKS, ROWS, BLOCK, False,
        )  # fmt: skip
    tl.store(partials + tl.program_id(0), partial)
    if is_last(arrivals):
        tl.store(out_sq_norm, sum_of_programs(partials, tl.num_programs(0), PARTIALS))
        if step is not None:
            tl.store(step, tl.load(step) + (tl.load(found_inf) == 0).to(tl.int64))


def combine(
    ema: Tensor,
    sq_norms: Tensor,
    preference: Tensor | None,
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
    out_sq_norm: Tensor,
    step: Tensor | None,
    arrivals: Tensor,
) -> None:
    device = ema.device
    T, P = checks.matrix("ema", ema)
    dtype = checks.state("ema", ema)
    checks.alpha_mode(alpha)
    vectors = {"sq_norms": sq_norms, "norms": norms, "weights": weights}
    for name, vector in (vectors if preference is None else {**vectors, "preference": preference}).items():
        checks.vector(name, vector, T, dtype, device)
    checks.scalar("found_inf", found_inf, torch.float32, device)
    for name, scalar in {"scale": scale, "alpha_value": alpha_value, "out_sq_norm": out_sq_norm}.items():
        checks.scalar(name, scalar, dtype, device)
    if step is not None:
        checks.scalar("step", step, torch.int64, device)
    checks.scalar("arrivals", arrivals, torch.int32, device)
    checks.out(out, P, device)

    config = tuning.combine(T)
    programs = max(1, triton.cdiv(P, config.block))
    with on_device(ema):
        combine_kernel[(programs,)](
            ema,
            ema.stride(0),
            T,
            P,
            sq_norms,
            preference,
            found_inf,
            scale,
            alpha_constant,
            eps,
            out,
            norms,
            weights,
            alpha_value,
            torch.empty(programs, dtype=dtype, device=device),
            out_sq_norm,
            step,
            arrivals,
            MODE=alpha,
            ACCUMULATE=accumulate,
            SMALL_T=tuning.small(T),
            TASKS=triton.next_power_of_2(T),
            ROWS=config.rows,
            BLOCK=config.block,
            PARTIALS=tuning.COMBINE_PARTIALS,
            num_warps=config.num_warps,
            **tuning.ARITHMETIC,
        )
