"""``begin_step``: from losses to the seeds of their backward passes and the coefficients of their rows.

Math      seed_t = scale / micro_batches / (max(loss_t, 0) + log_eps);   beta_t = beta / (step + 1)^beta_sigma, or 1
          where the loss is unusable or scale vanishes;   inv_scale = 1 / scale, or 1 where that vanishes
Traffic   O(T): a launch is all that this costs.
Parallel  one program of one warp goes through the tasks BLOCK at a time.
Sync      none.
Numerics  seeds: one correctly rounded operation after the other, in the losses' dtype. (step + 1)^beta_sigma is
          2^(beta_sigma log2(step + 1)) in float64, to 1e-13 up to 2^400: the exponent's rounding errors grow with it.
Limits    none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbmtl_fused._ops import NEGATIVE_LOSS_TOLERANCE
from dbmtl_fused.triton_kernels import checks, tuning
from dbmtl_fused.triton_kernels.device import divide, is_finite, smallest_normal
from dbmtl_fused.triton_kernels.launch import on_device

_TOLERANCE = tl.constexpr(NEGATIVE_LOSS_TOLERANCE)


@triton.jit
def _decayed(beta, beta_sigma, k):
    """``beta`` itself in the first step and without a decay, whatever a device makes of 2^0."""
    power = tl.exp2(beta_sigma * tl.log2(k.to(tl.float64)))
    return beta / tl.where((k == 1) | (beta_sigma == 0), 1.0, power)


@triton.jit(
    do_not_specialize=["T", "micro_batches"],
    do_not_specialize_on_alignment=[
        "losses", "active", "scale", "step", "seeds", "betas", "inv_scale", "found_inf",
    ],
)  # fmt: skip
def begin_step_kernel(
    losses, active, T, scale, step, beta: tl.float64, beta_sigma: tl.float64, micro_batches, log_eps: tl.float64,
    seeds, betas, inv_scale, found_inf,
    LOG: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    factor, k = tl.load(scale), tl.load(step) + 1
    unscaled = factor.to(betas.dtype.element_ty)
    vanishes = tl.abs(unscaled) < smallest_normal(unscaled.dtype)
    tl.store(inv_scale, tl.where(vanishes, 1, divide(1.0, unscaled)))
    coefficient = tl.where(vanishes, 1, _decayed(beta, beta_sigma, k).to(unscaled.dtype))
    derivative = divide(factor, micro_batches.to(factor.dtype))

    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, T, BLOCK):
        tasks = first + tl.arange(0, BLOCK)
        there = tasks < T
        loss = tl.load(losses + tasks, mask=there, other=0.0)
        is_active = there if active is None else tl.load(active + tasks, mask=there, other=0) != 0
        usable, seed = is_finite(loss), derivative
        if LOG:
            usable = usable & (loss >= tl.full([], -_TOLERANCE, loss.dtype))
            seed = divide(derivative, tl.maximum(loss, 0) + tl.cast(log_eps, loss.dtype))
        seed = tl.where(usable, seed, float("nan"))
        tl.store(seeds + tasks, tl.where(is_active, seed, 0), mask=there)
        tl.store(betas + tasks, tl.where(is_active & usable, coefficient, 1), mask=there)
        found |= (is_active & ~usable).to(tl.int32)

    any_found = tl.max(found, axis=0)
    if not ACCUMULATE:
        tl.store(found_inf, any_found.to(tl.float32))
    elif any_found > 0:
        tl.store(found_inf, 1)


def begin_step(
    losses: Tensor,
    active: Tensor | None,
    scale: Tensor,
    step: Tensor,
    beta: float,
    beta_sigma: float,
    micro_batches: int,
    log_eps: float | None,
    accumulate: bool,
    seeds: Tensor,
    betas: Tensor,
    inv_scale: Tensor,
    found_inf: Tensor,
) -> None:
    device = losses.device
    T = checks.tasks("losses", losses)
    dtype, coefficient_dtype = checks.real("losses", losses), checks.real("betas", betas)
    checks.at_least_one("micro_batches", micro_batches)
    checks.vector("seeds", seeds, T, dtype, device)
    checks.vector("betas", betas, T, coefficient_dtype, device)
    if active is not None:
        checks.vector("active", active, T, torch.bool, device)
    checks.scalar("scale", scale, dtype, device)
    checks.scalar("step", step, torch.int64, device)
    checks.scalar("inv_scale", inv_scale, coefficient_dtype, device)
    checks.scalar("found_inf", found_inf, torch.float32, device)

    with on_device(losses):
        begin_step_kernel[(1,)](
            losses,
            active,
            T,
            scale,
            step,
            beta,
            beta_sigma,
            micro_batches,
            0.0 if log_eps is None else log_eps,
            seeds,
            betas,
            inv_scale,
            found_inf,
            LOG=log_eps is not None,
            ACCUMULATE=accumulate,
            BLOCK=tuning.BEGIN_STEP.block,
            num_warps=tuning.BEGIN_STEP.num_warps,
            **tuning.ARITHMETIC,
        )
