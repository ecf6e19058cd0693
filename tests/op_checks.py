"""Run an operator on given tensors and hold everything it wrote against the float64 oracle.

The rule: error at most twice that of the reference in the same dtype, plus a floor. Floors and caps are in units of
machine epsilon, relative to the magnitudes that were added up. Where they come from: an EMA entry takes five roundings
of half an epsilon (gradient to state dtype, inv_scale, 1 - beta, product, sum); squared norms of ``n`` positive numbers
lose a few epsilons in any blocked order; weights are a quotient of two norms; the weighted sum adds ``T`` terms and is
rounded once more to ``out``'s dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from op_inputs import (
    ALPHA_CONSTANT,
    CHUNK,
    EPS,
    STEPS,
    Balanced,
    Begun,
    Combined,
    Row,
    Segments,
    array,
    run_balance,
    run_begin_step,
    run_combine,
    run_gram,
    tensor,
)
from torch import Tensor

from dbmtl_fused import oracle


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def error(actual: Tensor, exact: oracle.Array, magnitude: oracle.Array) -> float:
    """Largest distance from ``exact``, in units of ``magnitude``: the size of what was added up to get there."""
    assert actual.shape == exact.shape
    unit = magnitude + oracle.REAL(torch.finfo(actual.dtype).tiny)
    distance = np.abs(array(actual) - exact) / unit
    assert not np.isnan(distance).any(), f"{np.isnan(distance).sum()} entries are NaN"
    return float(distance.max(initial=0))


def assert_accurate(
    what: str, actual: Tensor, reference: Tensor, exact: oracle.Array, magnitude: oracle.Array, floor: float, cap: float
) -> None:
    """The error is at most twice that of the reference in the same dtype plus ``floor``, and at most ``cap``.

    ``floor`` is for inputs on which the reference is right by chance. ``cap`` is what is known in advance about any
    sensible order of operations; it is there because "twice my own error" says nothing about the reference itself.
    """
    found, allowed = error(actual, exact, magnitude), error(reference, exact, magnitude)
    limit = min(2 * allowed + floor, cap)
    assert found <= limit, f"{what}: error {found:.3g}, the reference's is {allowed:.3g}, the limit {limit:.3g}"


def ema_magnitude(
    ema: oracle.Array, grads: oracle.Array, beta: float, *, accumulate: bool = False, largest: Any = np.inf
) -> oracle.Array:
    """What is added up in one update of the EMA; entries that the guard holds back count as their old value."""
    if beta == 1:  # gradients are not looked at
        return np.abs(ema)
    updated = np.abs(ema) * (1 if accumulate else beta) + (1 - beta) * np.abs(grads)
    return np.where(updated <= oracle.entry_limit(largest), updated, np.abs(ema))


def assert_ema(actual: Tensor, reference: Tensor, exact: oracle.Array, magnitude: oracle.Array) -> None:
    eps = eps_of(actual.dtype)
    assert_accurate("ema", actual, reference, exact, magnitude, floor=2 * eps, cap=4 * eps)


def assert_balanced(
    actual: Balanced | Combined,
    reference: Balanced | Combined,
    exact: oracle.Balanced,
    ema_magnitude: oracle.Array,
    *,
    scale: float = 1.0,
    base: oracle.Array | float = 0.0,
) -> None:
    """Norms, weights and weighted sum; the latter two all NaN if the oracle's are.

    :param ema_magnitude: What was added up to get the EMA. Where that cancels, the EMA's relative error grows, and with
        it those of the norms (by ``condition``) and everything after them.
    """
    eps = eps_of(actual.norms.dtype)
    T = len(exact.norms)
    norms_magnitude = oracle.row_norms(ema_magnitude)
    assert_accurate("norms", actual.norms, reference.norms, exact.norms, norms_magnitude, 4 * eps, 16 * eps)
    if np.isnan(exact.weights).any():
        assert actual.weights.isnan().all()
        assert actual.out.isnan().all()
        assert not isinstance(actual, Combined) or actual.out_sq_norm.isnan() or actual.out.numel() == 0
        return
    condition = (norms_magnitude[exact.norms > 0] / exact.norms[exact.norms > 0]).max(initial=1)
    weights_magnitude = np.abs(exact.weights) * condition
    assert_accurate("weights", actual.weights, reference.weights, exact.weights, weights_magnitude, 8 * eps, 40 * eps)
    magnitude = np.abs(base) + scale * (weights_magnitude[:, None] * ema_magnitude).sum(axis=0)
    floor = eps_of(actual.out.dtype) + 8 * eps
    assert_accurate("out", actual.out, reference.out, exact.out, magnitude, floor, floor + (40 + T) * eps)
    if isinstance(actual, Combined) and isinstance(reference, Combined):
        values = actual.out_sq_norm, reference.out_sq_norm, np.asarray(exact.out_sq_norm)
        whole = np.asarray(np.square(magnitude).sum())
        assert_accurate("out_sq_norm", *values, whole, 16 * eps, (112 + 2 * T) * eps)


def is_rounded_randomly(state_dtype: torch.dtype) -> bool:
    """Norms, weights and the sum then follow from what was stored, which is off by up to one epsilon of its own."""
    return state_dtype is torch.bfloat16


def _balance_as_stored(actual: Balanced, reference: Balanced, **options: Any) -> Balanced:
    """The reference's norms, weights and sum of the EMA that ``actual`` stored: a step that changes nothing."""
    unchanged = actual.ema.clone(memory_format=torch.contiguous_format)
    options["found_inf"] = float(actual.found_inf)
    out = torch.empty_like(reference.out)
    return run_balance("reference", unchanged, torch.zeros_like(unchanged), 1.0, out=out, **options)


def check_begin_step(backend: str, losses: Tensor, step: int, **options: Any) -> Begun:
    """Run ``begin_step`` and check all that it wrote; ``options`` as of ``run_begin_step``."""
    before = array(losses)
    actual, reference = (run_begin_step(name, losses, step, **options) for name in (backend, "reference"))
    given = {name: value for name, value in options.items() if name not in ("dtype", "accumulate", "found_inf")}
    given["scale"] = float(tensor(options.get("scale", 1.0), losses.dtype))
    given["tiny"] = torch.finfo(actual.betas.dtype).tiny
    if (active := options.get("active")) is not None:
        given["active"] = active.cpu().numpy()
    flag = bool(options.get("accumulate") and options.get("found_inf"))
    exact = oracle.begin_step(before, step + 1, found_inf=flag, **given)

    unusable = np.isnan(exact.seeds)
    np.testing.assert_array_equal(actual.seeds.isnan().cpu().numpy(), unusable)
    seeds = [torch.where(begun.seeds.isnan(), 0, begun.seeds) for begun in (actual, reference)]
    expected, eps = np.where(unusable, 0, exact.seeds), eps_of(losses.dtype)
    assert_accurate("seeds", *seeds, expected, np.abs(expected), 2 * eps, 4 * eps)
    eps = eps_of(actual.betas.dtype)
    floor = eps + 1e-13 if actual.betas.dtype is torch.float64 else eps
    assert_accurate("betas", actual.betas, reference.betas, exact.betas, exact.betas, floor, floor + eps)
    inv_scale = np.asarray(exact.inv_scale)
    assert_accurate("inv_scale", actual.inv_scale, reference.inv_scale, inv_scale, np.abs(inv_scale), eps, 2 * eps)
    assert float(actual.found_inf) == float(exact.found_inf)
    np.testing.assert_array_equal(array(losses), before, err_msg="losses were changed")
    return actual


def check_balance(
    backend: str,
    ema: Tensor,
    grads: Tensor,
    beta: float,
    *,
    out: Tensor | None = None,
    alpha: str = "max",
    eps: float = EPS,
    found_inf: float = 0.0,
) -> Balanced:
    """Run ``balance_`` in place on ``ema`` and ``out`` as they lie in memory, and check all that it wrote."""
    before, given = array(ema), array(grads)
    largest = torch.finfo(ema.dtype).max
    expected_ema, expected = oracle.balance(
        before, given, beta, alpha, ALPHA_CONSTANT, eps, found_inf=found_inf != 0, largest=largest
    )
    options: dict[str, Any] = {"alpha": alpha, "eps": eps, "found_inf": found_inf}
    dense = {"memory_format": torch.contiguous_format}
    reference_out = None if out is None else torch.empty_like(out)
    reference = run_balance("reference", ema.clone(**dense), grads.clone(**dense), beta, out=reference_out, **options)

    actual = run_balance(backend, ema, grads, beta, out=out, **options)
    magnitude = ema_magnitude(before, given, beta, largest=largest)
    assert_ema(actual.ema, reference.ema, expected_ema.ema, magnitude)
    if is_rounded_randomly(ema.dtype):
        stored = array(actual.ema)
        expected = oracle.combine(
            stored, oracle.row_norms(stored), alpha, ALPHA_CONSTANT, eps, found_inf=expected_ema.found_inf
        )
        reference, magnitude = _balance_as_stored(actual, reference, **options), np.abs(stored)
    assert_balanced(actual, reference, expected, magnitude)
    assert bool(actual.found_inf) == expected_ema.found_inf
    np.testing.assert_array_equal(array(grads), given, err_msg="grads were changed")
    return actual


def check_combine(
    backend: str,
    ema: Tensor,
    sq_norms: Tensor,
    out: Tensor,
    *,
    preference: Tensor | None = None,
    alpha: str = "max",
    scale: float = 1.0,
    accumulate: bool = False,
    found_inf: float = 0.0,
    counts: bool = True,
) -> Combined:
    """Run ``combine`` on tensors as they lie in memory, and check all that it wrote."""
    before, base = array(ema), array(out) if accumulate else 0.0
    expected = oracle.combine(
        before,
        np.sqrt(array(sq_norms)),
        alpha,
        ALPHA_CONSTANT,
        EPS,
        preference=None if preference is None else array(preference),
        scale=scale,
        found_inf=found_inf != 0,
        base=base,
    )
    options: dict[str, Any] = {"alpha": alpha, "scale": scale, "accumulate": accumulate, "found_inf": found_inf}
    options["preference"] = preference
    dense = {"memory_format": torch.contiguous_format}
    reference = run_combine("reference", ema.clone(**dense), sq_norms, out=out.clone(), **options)

    actual = run_combine(backend, ema, sq_norms, out=out, counts=counts, **options)
    assert_balanced(actual, reference, expected, np.abs(before), scale=scale, base=base)
    eps = eps_of(actual.norms.dtype)
    alpha_value = np.asarray(expected.alpha)
    assert_accurate("alpha", actual.alpha, reference.alpha, alpha_value, np.abs(alpha_value), 4 * eps, 16 * eps)
    assert int(actual.step) == STEPS + (counts and found_inf == 0)
    np.testing.assert_array_equal(array(ema), before, err_msg="ema was changed")
    return actual


def check_gram(backend: str, ema: Tensor) -> Tensor:
    """Run ``gram`` on ``ema`` as it lies in memory, and check all that it wrote."""
    before = array(ema)
    reference = run_gram("reference", ema.clone(memory_format=torch.contiguous_format))
    actual = run_gram(backend, ema)
    eps = eps_of(actual.dtype)
    exact, magnitude = oracle.gram(before), oracle.gram(np.abs(before))
    assert_accurate("gram", actual, reference, exact, magnitude, 8 * eps, 32 * eps)
    assert torch.equal(actual, actual.t()), "not symmetric"
    np.testing.assert_array_equal(array(ema), before, err_msg="ema was changed")
    return actual


def check_ema_update(
    backend: str,
    row: Row,
    grads: Sequence[Tensor | None],
    flat_grads: Sequence[Tensor | None] | None = None,
    *,
    beta: float = 0.75,
    inv_scale: float = 1.0,
    accumulate: bool = False,
) -> None:
    """Run ``ema_update_`` on all slots of ``row`` and check all that it wrote.

    :param flat_grads: Elements of each gradient in the order of their memory; by default ``grads`` are 1-D.
    """
    flat_grads = grads if flat_grads is None else flat_grads
    call: dict[str, Any] = {"beta": beta, "inv_scale": inv_scale, "accumulate": accumulate}
    reference = Row(row.row.clone(), row.segments, row.found_inf.clone()).update("reference", flat_grads, **call)
    exact, flag = array(row.row), bool(row.found_inf)
    magnitude, largest = np.abs(exact), torch.finfo(row.row.dtype).max
    for (start, numel, _), grad in zip(row.segments.table.tolist(), flat_grads, strict=True):
        columns = exact[start : start + numel]
        given = np.zeros(numel, dtype=oracle.REAL) if grad is None else array(grad)
        with np.errstate(invalid="ignore"):
            scaled = given * oracle.REAL(inv_scale)
        options: dict[str, Any] = {"accumulate": accumulate, "largest": largest}
        magnitude[start : start + numel] = ema_magnitude(columns, scaled, beta, **options)
        updated = oracle.ema_update(columns, given, beta, inv_scale, **options)
        exact[start : start + numel] = updated.ema
        flag |= updated.found_inf

    row.update(backend, grads, **call)
    assert_ema(row.row, reference.row, exact, magnitude)
    if is_rounded_randomly(row.row.dtype):
        exact = array(row.row)
        magnitude = np.abs(exact)
        reference = Row(row.row.clone(), row.segments).update("reference", [None] * len(grads), beta=1.0)
    eps = eps_of(row.sq_norm.dtype)
    partials, magnitudes = _chunk_sq_norms(row.segments, exact), _chunk_sq_norms(row.segments, magnitude)
    total, total_magnitude = np.asarray(partials.sum()), np.asarray(magnitudes.sum())
    assert_accurate("partials", row.partials, reference.partials, partials, magnitudes, 8 * eps, 32 * eps)
    assert_accurate("sq_norm", row.sq_norm, reference.sq_norm, total, total_magnitude, 8 * eps, 32 * eps)
    assert bool(row.found_inf) == flag


def _chunk_sq_norms(segments: Segments, row: oracle.Array) -> oracle.Array:
    sums = np.zeros(segments.chunks, dtype=oracle.REAL)
    for start, numel, first_chunk in segments.table.tolist():
        for i in range(-(-numel // CHUNK)):
            sums[first_chunk + i] = np.square(row[start : start + numel][i * CHUNK : (i + 1) * CHUNK]).sum()
    return sums
