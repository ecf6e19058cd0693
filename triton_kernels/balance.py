"""``balance_``: EMA, norms, weights and weighted sum of a ready gradient matrix.

Math      ema = beta * ema + (1 - beta) * grads;   w_t = alpha / (|ema_t| + eps);   out = sum_t w_t ema[t]
Traffic   fp32: phase 1 reads 8TP and writes 4TP bytes, phase 2 reads 4TP and writes 4P. Together 4 (4T + 1) P, less
          what phase 2 still finds in L2: it goes backwards, and gradients are loaded so as to be evicted first.
Parallel  as many programs as multiprocessors stay for the whole launch; tiles of columns are dealt to them in turn. Up
          to SMALL_T tasks a tile has all rows, beyond that phase 1 goes down the matrix ROWS rows at a time.
Sync      one grid barrier between the phases, so the launch is cooperative. Where that cannot be had, the phases are
          two launches of the same code.
Numerics  in the state's compute dtype, no multiply-adds: ema equals the reference bit for bit. Every program leaves
          one partial sum a row, and all add them up in the same order: the same bits run after run, on one kind of
          device.
Limits    ema, grads and out must not overlap.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbmtl_fused.triton_kernels import checks, tuning
from dbmtl_fused.triton_kernels.device import (
    alignment,
    alpha_of,
    convert_out,
    fold,
    load_tile,
    round_state,
    square_root,
    store_columns,
    weights_of,
)
from dbmtl_fused.triton_kernels.launch import barrier_words, multiprocessors, on_device, target

logger = logging.getLogger("dbmtl_fused")


@triton.jit
def _update_tile(
    ema, ema_stride, grads, grads_stride, T, P, first, start, coefficient, seed, squares, bad,
    GRADS_ALIGNED: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """EMA of one tile, in place. Adds the squares of what was stored to ``squares``, what was held back to ``bad``."""
    columns = (start + tl.arange(0, BLOCK))[None, :]
    if GRADS_ALIGNED:
        tile_grads = tl.multiple_of(grads + start, alignment(grads.dtype.element_ty, ema.dtype.element_ty))
    else:
        tile_grads = grads + start
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    there = rows < T if WHOLE else (rows < T) & (columns < P)
    pointers = ema + rows * ema_stride + columns
    state = tl.load(pointers, mask=there, other=0.0)
    grad_pointers = tile_grads + rows * grads_stride + tl.arange(0, BLOCK)[None, :]
    grad = tl.load(grad_pointers, mask=there, other=0.0, eviction_policy="evict_first")
    old = state.to(squares.dtype)
    updated = coefficient * old + (1 - coefficient) * grad.to(squares.dtype)
    stored, within_limit = round_state(updated, old, seed + rows, columns, ROUND)
    tl.store(pointers, stored.to(ema.dtype.element_ty), mask=there)
    squares += tl.sum(fold(stored * stored), axis=2)
    bad += tl.sum(fold(tl.where(within_limit, 0.0, 1.0).to(squares.dtype)), axis=2)
    return squares, bad


@triton.jit
def _update(
    ema, ema_stride, grads, grads_stride, T, P, beta, seed_pointer, partials, found_inf,
    GRADS_ALIGNED: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 1: this program's tiles, and its partial squared norm of every row."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    coefficient = tl.load(beta)
    seed = tl.load(seed_pointer) if ROUND else 0
    whole_tiles = P // BLOCK
    for first in range(0, T, ROWS):
        squares = tl.sum(fold(tl.zeros([ROWS, BLOCK], coefficient.dtype)), axis=2)
        bad = tl.zeros_like(squares)
        for tile in range(program, whole_tiles, programs):
            squares, bad = _update_tile(
                ema, ema_stride, grads, grads_stride, T, P, first, tl.cast(tile, tl.int64) * BLOCK, coefficient, seed,
                squares, bad, GRADS_ALIGNED, ROUND, ROWS, BLOCK, True,
            )  # fmt: skip
        if whole_tiles * BLOCK < P and whole_tiles % programs == program:
            squares, bad = _update_tile(
                ema, ema_stride, grads, grads_stride, T, P, first, tl.cast(whole_tiles, tl.int64) * BLOCK, coefficient,
                seed, squares, bad, GRADS_ALIGNED, ROUND, ROWS, BLOCK, False,
            )  # fmt: skip
        if tl.max(tl.max(bad, axis=1), axis=0) > 0:
            tl.store(found_inf, 1)
        rows = first + tl.arange(0, ROWS)
        tl.store(partials + rows.to(tl.int64) * programs + program, tl.sum(squares, axis=1), mask=rows < T)


@triton.jit
def _sum_tile(
    ema, ema_stride, T, P, start, weights, out,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The weighted sum of one tile of columns."""
    columns = start + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    total = tl.zeros([BLOCK], weights.dtype.element_ty)
    for first in range(0, T, ROWS):
        there = first + rows < T
        pointers = ema + tl.cast(first + rows, tl.int64)[:, None] * ema_stride + columns[None, :]
        tile = load_tile(pointers, there[:, None], columns[None, :], P, WHOLE)
        factors = tl.load(weights + first + rows, mask=there, other=0.0)
        total += tl.sum(factors[:, None] * tile.to(total.dtype), axis=0)
    store_columns(out + columns, convert_out(total, out.dtype.element_ty), columns, P, WHOLE)


@triton.jit
def _balanced_sum(
    ema, ema_stride, T, P, partials, alpha_constant, eps, out, norms_out, weights_out, found_inf,
    MODE: tl.constexpr, TASKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Phase 2: weights, by every program for itself, and this program's tiles, the last ones first."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tasks = tl.arange(0, TASKS)
    sums = tl.zeros([TASKS, PARTIALS], partials.dtype.element_ty)
    for first in range(0, programs, PARTIALS):
        others = first + tl.arange(0, PARTIALS)[None, :]
        there = (tasks[:, None] < T) & (others < programs)
        pointers = partials + tasks.to(tl.int64)[:, None] * programs + others
        sums += tl.load(pointers, mask=there, other=0.0, cache_modifier=".cg")
    norms = square_root(tl.sum(sums, axis=1))
    alpha = alpha_of(norms, tasks, tasks < T, T, alpha_constant, MODE)
    flag = tl.load(found_inf, cache_modifier=".cg")
    tl.store(norms_out + tasks, norms, mask=tasks < T)
    # All programs store the same; each then reads back what its own threads have stored.
    tl.store(weights_out + tasks, weights_of(norms, None, alpha, eps, flag, MODE), mask=tasks < T)
    tl.debug_barrier()

    whole_tiles = P // BLOCK
    if whole_tiles * BLOCK < P and whole_tiles % programs == program:
        _sum_tile(ema, ema_stride, T, P, tl.cast(whole_tiles, tl.int64) * BLOCK, weights_out, out, ROWS, BLOCK, False)
    for i in range(program, whole_tiles, programs):
        start = tl.cast(whole_tiles - 1 - i, tl.int64) * BLOCK
        _sum_tile(ema, ema_stride, T, P, start, weights_out, out, ROWS, BLOCK, True)


@triton.jit
def _grid_barrier(words):
    """Wait for all programs. ``words`` are two zeros, and are again when the last program has left."""
    programs = tl.num_programs(0)
    tl.debug_barrier()
    tl.atomic_add(words, 1, sem="acq_rel")
    while tl.atomic_add(words, 0, sem="acquire") < programs:
        pass
    if tl.atomic_add(words + 1, 1, sem="acq_rel") == programs - 1:
        tl.store(words, 0)
        tl.store(words + 1, 0)
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=["T", "P"],
    do_not_specialize_on_alignment=[
        "grads", "beta", "seed", "norms_out", "weights_out", "found_inf", "partials", "barrier_words",
    ],
)  # fmt: skip
def balance_kernel(
    ema, ema_stride, grads, grads_stride, T, P, beta, seed, alpha_constant: tl.float64, eps: tl.float64, out, norms_out,
    weights_out, found_inf, partials, barrier_words,
    PHASES: tl.constexpr, MODE: tl.constexpr, GRADS_ALIGNED: tl.constexpr, ROUND: tl.constexpr, TASKS: tl.constexpr,
    SMALL_T: tl.constexpr, ROWS: tl.constexpr, UPDATE_BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    num_tasks = T if SMALL_T == 0 else SMALL_T
    if PHASES != "second":
        _update(
            ema, ema_stride, grads, grads_stride, num_tasks, P, beta, seed, partials, found_inf, GRADS_ALIGNED, ROUND,
            ROWS, UPDATE_BLOCK,
        )  # fmt: skip
    if PHASES == "both":
        _grid_barrier(barrier_words)
    if PHASES != "first":
        _balanced_sum(
            ema, ema_stride, num_tasks, P, partials, alpha_constant, eps, out, norms_out, weights_out, found_inf, MODE,
            TASKS, ROWS, SUM_BLOCK, PARTIALS,
        )  # fmt: skip


_SECOND_LAUNCH: set[torch.device] = set()
"""Devices on which a cooperative launch failed."""


def balance_(
    ema: Tensor,
    grads: Tensor,
    beta: Tensor,
    seed: Tensor | None,
    alpha: str,
    alpha_constant: float,
    eps: float,
    out: Tensor,
    norms: Tensor,
    weights: Tensor,
    found_inf: Tensor,
) -> None:
    device = ema.device
    T, P = checks.matrix("ema", ema)
    dtype = checks.state("ema", ema)
    checks.seed("ema", ema, seed)
    checks.gradient_matrix(grads, ema)
    checks.alpha_mode(alpha)
    checks.scalar("beta", beta, dtype, device)
    for name, vector in {"norms": norms, "weights": weights}.items():
        checks.vector(name, vector, T, dtype, device)
    checks.scalar("found_inf", found_inf, torch.float32, device)
    checks.out(out, P, device)

    config = tuning.balance(T, P, ema.dtype, multiprocessors(device))
    programs = config.programs(P, multiprocessors(device))
    partials = torch.empty(T, programs, dtype=dtype, device=device)
    tasks = triton.next_power_of_2(T)

    def launch(phases: str, words: Tensor | None, **options: Any) -> None:
        balance_kernel[(programs,)](
            ema,
            ema.stride(0),
            grads,
            grads.stride(0),
            T,
            P,
            beta,
            seed,
            alpha_constant,
            eps,
            out,
            norms,
            weights,
            found_inf,
            partials,
            words,
            PHASES=phases,
            MODE=alpha,
            GRADS_ALIGNED=grads.data_ptr() % 16 == 0,
            ROUND=seed is not None,
            TASKS=tasks,
            SMALL_T=tuning.small(T),
            ROWS=config.rows,
            UPDATE_BLOCK=config.update_block,
            SUM_BLOCK=config.sum_block,
            PARTIALS=max(1, min(256, 4096 // tasks)),
            num_warps=config.num_warps,
            **tuning.ARITHMETIC,
            **options,
        )

    with on_device(ema):
        if _is_cooperative(device):
            limit = {"maxnreg": tuning.BALANCE_REGISTERS} if target() == "cuda" else {}
            try:
                launch("both", barrier_words(device), launch_cooperative_grid=True, **limit)
            except RuntimeError as error:
                if "cooperative" not in str(error):
                    raise
                logger.warning("balance_ takes two launches instead of one on %s: %s", device, error)
                _SECOND_LAUNCH.add(device)
            else:
                return
        launch("first", None)
        launch("second", None)


def _is_cooperative(device: torch.device) -> bool:
    """Whether all programs of a grid can wait for each other."""
    return target() in ("cuda", "hip") and device not in _SECOND_LAUNCH
