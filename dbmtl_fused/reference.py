"""The operators in pure torch: the definition of correct, for every device.

Arithmetic is written so that a native backend can match it bit for bit where the order of operations is fixed:
products and sums are rounded one by one (no fused multiply-add) and rows are added in task order. Norms may differ in
the last bits: sums of squares associate differently, and torch's own square root is not always correctly rounded. What
follows from them, weights and the weighted sum, is the same given the same norms, but for the mean of five or more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dbmtl_fused._ops import CHUNK, ENTRY_LIMIT, NEGATIVE_LOSS_TOLERANCE, _library, compute_dtype
from dbmtl_fused.rounding import random_bits, round_to_bfloat16


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, shape ``(numel,)``."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _ema_(
    row: Tensor,
    grad: Tensor | None,
    beta: Tensor,
    inv_scale: Tensor,
    found_inf: Tensor,
    accumulate: bool,
    random: Tensor | None,
) -> None:
    """EMA of one dense stretch of columns, in place; entries beyond the limit stay as they were.

    :param random: Random bits of the columns if the state is bfloat16.
    """
    updated = row.to(compute_dtype(row.dtype), copy=True)
    if not accumulate:
        updated *= beta
    if grad is not None:
        added = updated + (1 - beta) * (grad.to(updated.dtype) * inv_scale)
        updated = added.where(beta != 1, updated)
    stored = updated if random is None else round_to_bfloat16(updated, random)
    within_limit = updated.abs() <= ENTRY_LIMIT[updated.dtype]  # false for NaN
    found_inf.logical_or_(~within_limit.all())
    row.copy_(torch.where(within_limit, stored, row))


def _chunk_sums(columns: Tensor) -> Tensor:
    """Sums of chunks of the last dimension, shape ``(..., ceil(P / CHUNK))``."""
    padding = -columns.shape[-1] % CHUNK
    return torch.nn.functional.pad(columns, (0, padding)).unflatten(-1, (-1, CHUNK)).sum(-1)


def _chunk_sq_norms(columns: Tensor) -> Tensor:
    return _chunk_sums(columns.to(compute_dtype(columns.dtype)).square())


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
    unusable = ~losses.isfinite()
    derivative = (scale / micro_batches).expand_as(losses)
    if log_eps is not None:
        unusable |= losses < -NEGATIVE_LOSS_TOLERANCE
        derivative = derivative / (losses.clamp(min=0) + log_eps)
    absent = torch.zeros_like(unusable) if active is None else ~active
    unusable &= ~absent
    seeds.copy_(derivative.masked_fill(unusable, torch.nan).masked_fill(absent, 0))
    beta_k = beta / (step + 1).double().pow(beta_sigma)
    factor = scale.to(betas.dtype)
    vanishes = factor.abs() < torch.finfo(factor.dtype).tiny
    betas.copy_(beta_k.expand_as(losses).masked_fill(unusable | absent | vanishes, 1))
    inv_scale.copy_(factor.reciprocal().masked_fill(vanishes, 1))
    found = unusable.any()
    found_inf.copy_(torch.where(found, 1, found_inf) if accumulate else found)


def ema_update_(
    row: Tensor,
    grads: Sequence[Tensor | None],
    slots: Sequence[int],
    segments: Tensor,
    chunks: Tensor,
    beta: Tensor,
    inv_scale: Tensor,
    seed: Tensor | None,
    partials: Tensor,
    sq_norm: Tensor,
    found_inf: Tensor,
    arrivals: Tensor,
    accumulate: bool,
) -> None:
    for grad, (start, numel, first_chunk) in zip(grads, segments[list(slots)].tolist(), strict=True):
        columns = row[start : start + numel]
        random = None if seed is None else random_bits(seed, torch.arange(start, start + numel, device=row.device))
        _ema_(columns, None if grad is None else _flat(grad), beta, inv_scale, found_inf, accumulate, random)
        sums = _chunk_sq_norms(columns)
        partials[first_chunk : first_chunk + sums.numel()] = sums
    sq_norm.copy_(partials.sum())


def _alpha(norms: Tensor, preference: Tensor | None, mode: str, constant: float) -> Tensor:
    if mode in ("constant", "none"):
        return torch.full_like(norms[0], constant if mode == "constant" else 1)
    counts = torch.ones_like(norms, dtype=torch.bool) if preference is None else preference != 0
    if mode == "min":
        counts = counts & (norms != 0)
    number = counts.sum()
    match mode:
        case "max":
            value = norms.where(counts, -torch.inf).amax()
        case "min":
            value = norms.where(counts, torch.inf).amin()
        case "mean":
            value = norms.where(counts, 0).sum() / number
        case "median":  # of an even number: the mean of the middle two; what does not count is put behind all others
            by_norm = norms.argsort(stable=True)
            ordered = norms[by_norm[(~counts[by_norm]).to(torch.int8).argsort(stable=True)]]
            middle = torch.stack([number - 1, number]).clamp(min=0) // 2
            value = ordered.gather(0, middle).sum() / 2
        case _:
            raise ValueError(f"unknown alpha mode {mode!r}")
    return value.where(number > 0, 0)


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
    norms.copy_(sq_norms.sqrt())
    alpha_value.copy_(_alpha(norms, preference, alpha, alpha_constant))
    balanced = torch.ones_like(norms) if alpha == "none" else alpha_value / (norms + eps)
    if preference is not None:
        balanced = preference * balanced
    weights.copy_(balanced.masked_fill(found_inf != 0, torch.nan))
    total = out.to(weights.dtype) if accumulate else torch.zeros_like(out, dtype=weights.dtype)
    for weight, row in zip(scale * weights, ema, strict=True):
        total = total + weight * row.to(weights.dtype)
    out.copy_(total)
    out_sq_norm.copy_(_chunk_sq_norms(total).sum())
    if step is not None:
        step += found_inf == 0


def gram(ema: Tensor, out: Tensor, arrivals: Tensor) -> None:
    rows = ema.to(out.dtype)
    for t, row in enumerate(rows):  # as matrix products do not: in full precision everywhere, and no bit depends on T
        products = torch.stack([_chunk_sums(row * other).sum() for other in rows[t:]])
        out[t, t:] = products
        out[t:, t] = products


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
    one, random = torch.ones_like(beta), None
    if seed is not None:
        rows, columns = (torch.arange(size, device=ema.device) for size in ema.shape)
        random = random_bits(seed + rows[:, None], columns)
    _ema_(ema, grads, beta, one, found_inf, False, random)
    sq_norms = _chunk_sq_norms(ema).sum(-1)
    alpha_value, out_sq_norm, arrivals = (torch.empty_like(one) for _ in range(3))
    written = out, norms, weights, alpha_value, out_sq_norm
    combine(ema, sq_norms, None, found_inf, one, alpha, alpha_constant, eps, False, *written, None, arrivals)


for _implementation in (begin_step, ema_update_, combine, gram, balance_):
    _library.impl(f"{_implementation.__name__}.reference", _implementation, "CompositeExplicitAutograd")
