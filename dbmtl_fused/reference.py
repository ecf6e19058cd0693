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

from dbmtl_fused._ops import CHUNK, _library, compute_dtype
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
    """EMA of one dense stretch of columns, in place, with the non-finite guard.

    :param random: Random bits of the columns if the state is bfloat16.
    """
    updated = row.to(compute_dtype(row.dtype), copy=True)
    if not accumulate:
        updated *= beta
    if grad is not None:
        updated += (1 - beta) * (grad.to(updated.dtype) * inv_scale)
    stored = updated if random is None else round_to_bfloat16(updated, random)
    finite = updated.isfinite() & stored.isfinite()  # a random step up may overflow
    found_inf.logical_or_(~finite.all())
    row.copy_(torch.where(finite, stored, row))


def _chunk_sq_norms(columns: Tensor) -> Tensor:
    """Sums of squares of chunks of the last dimension, shape ``(..., ceil(P / CHUNK))``."""
    columns = columns.to(compute_dtype(columns.dtype))
    padding = -columns.shape[-1] % CHUNK
    return torch.nn.functional.pad(columns, (0, padding)).unflatten(-1, (-1, CHUNK)).square().sum(-1)


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


def _alpha(norms: Tensor, mode: str, constant: float) -> Tensor:
    match mode:
        case "max":
            return norms.amax()
        case "min":
            return norms.amin()
        case "mean":
            return norms.mean()
        case "median":  # of an even number: the mean of the middle two
            ordered, T = norms.sort().values, norms.numel()
            return (ordered[(T - 1) // 2] + ordered[T // 2]) / 2
        case "constant":
            return torch.full_like(norms[0], constant)
        case "none":
            return torch.ones_like(norms[0])
        case _:
            raise ValueError(f"unknown alpha mode {mode!r}")


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
    norms.copy_(sq_norms.sqrt())
    alpha_value.copy_(_alpha(norms, alpha, alpha_constant))
    balanced = torch.ones_like(norms) if alpha == "none" else alpha_value / (norms + eps)
    weights.copy_(balanced.masked_fill(found_inf != 0, torch.nan))
    total = out.to(weights.dtype) if accumulate else torch.zeros_like(out, dtype=weights.dtype)
    for weight, row in zip(scale * weights, ema, strict=True):
        total = total + weight * row.to(weights.dtype)
    out.copy_(total)


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
    combine(
        ema, sq_norms, found_inf, one, alpha, alpha_constant, eps, False, out, norms, weights, torch.empty_like(one)
    )


for _implementation in (ema_update_, combine, balance_):
    _library.impl(f"{_implementation.__name__}.reference", _implementation, "CompositeExplicitAutograd")
