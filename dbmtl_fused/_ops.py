"""The operators of ``dbmtl_fused``: each schema once, its fake (meta) implementation right below it.

Every operator has one overload per backend (``torch.ops.dbmtl_fused.combine.cpu``), so that two backends can be
compared in one process. Implementations are registered elsewhere: ``reference`` in :mod:`dbmtl_fused.reference`,
``cpu`` and ``cuda`` by the native module, ``triton`` in ``dbmtl_fused.triton_kernels``.

Shared conventions:

* ``T`` tasks, ``P`` columns. A matrix may have any row stride; its columns are adjacent.
* State (``ema``, ``row``) is float32, float64 or bfloat16. Arithmetic is done, and ``beta``, ``scale``, ``norms``,
  ``weights``, ... are held, in :func:`compute_dtype` of it, on its device, so that no step ever waits for the host.
* bfloat16 state is rounded stochastically: what lies between two neighbours becomes either, so that their mean is
  right, and an update too small for one step is not lost over many. ``seed`` (0-d int64) is given for it and for no
  other state; which random bits it stands for is written down in :mod:`dbmtl_fused.rounding`. Norms are those of the
  stored values.
* Gradients and ``out`` may be float32, bfloat16, float16 or float64, whatever the state.
* ``found_inf`` (0-d float32, as in ``torch.amp``) is read and written: an EMA entry whose update is beyond
  :data:`ENTRY_LIMIT` in magnitude, or NaN, stays as it was and sets it to 1; once it is set, ``weights`` and with them
  ``out`` are NaN.
* Norms come from sums of squares, so that those below about 1e-19 count as zero (float64: 1e-154).
* No operator returns what it mutates; ``P = 0`` is legal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

NAMESPACE = "dbmtl_fused"
BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Every backend an operator may have, fastest first."""

CHUNK = 4096
"""Columns summed into one partial squared norm. A multiple of :data:`dbmtl_fused.layout.ALIGN`."""

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What gradients and ``out`` may be."""

STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""What the EMA may be."""

ALPHA_MODES = ("max", "min", "mean", "median", "constant", "none")
"""What ``alpha`` is made of; ``"none"`` switches the magnitude balancing off (weights 1)."""

ENTRY_LIMIT = {torch.float32: 2.0**46, torch.float64: 2.0**490}
"""Largest magnitude of an entry of the EMA, by what is computed in: the squares of 1e10 such entries have a finite sum.
A bfloat16 number, so that an update within the limit is rounded to one within it."""

NEGATIVE_LOSS_TOLERANCE = 1e-6
"""Under the log, a loss that is no further below zero counts as zero: rounding makes such losses of, say, 1 - cos."""

_library = torch.library.Library(NAMESPACE, "DEF")


def compute_dtype(state_dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and what norms, weights and coefficients are held in: float32, or float64 for float64."""
    return torch.float64 if state_dtype is torch.float64 else torch.float32


def _define(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Define ``schema`` for every backend, with the decorated function as the fake of each."""
    name, arguments = schema.split("(", 1)

    def register(fake: Callable[..., None]) -> Callable[..., None]:
        for backend in BACKENDS:
            _library.define(f"{name}.{backend}({arguments}")
            torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}", fake, lib=_library)
            op = getattr(getattr(getattr(torch.ops, NAMESPACE), name), backend)
            for key in ("Negative", "ZeroTensor"):
                _library.impl(f"{name}.{backend}", _resolving(op), key)
        return fake

    return register


def _resolving(op: OpOverload) -> Callable[..., None]:
    """``op`` for tensors whose memory does not hold what they stand for: lazily negated, or zeros without memory.

    The dispatcher itself leaves those in a list as they are, and fails if an operator that returns nothing writes one.
    """

    def call(*args: Any) -> None:
        resolved = tree_map_only(Tensor, _resolve, args)
        op(*resolved)
        for argument, given, values in zip(op._schema.arguments, args, resolved, strict=True):
            if argument.is_write and values is not given:
                given.copy_(values)

    return call


def _resolve(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def _check_devices(*tensors: Tensor) -> None:
    """A meta tensor among others would run the fake, which writes nothing."""
    devices = {tensor.device for tensor in tensors}
    torch._check(len(devices) == 1, lambda: f"all tensors must be on one device, got {sorted(map(str, devices))}")


def _check_seed(name: str, state: Tensor, seed: Tensor | None) -> None:
    needed = state.dtype not in (torch.float32, torch.float64)
    torch._check(
        (seed is not None) == needed,
        lambda: f"seed must be given if and only if {name} is rounded stochastically, got {seed} for {state.dtype}",
    )


def _check_vectors(T: int, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        message = f"{name} must have shape ({T},), got {tuple(vector.shape)}"
        torch._check(vector.shape == (T,), partial(str, message))


@_define(
    "begin_step(Tensor losses, Tensor? active, Tensor scale, Tensor step, float beta, float beta_sigma, "
    "int micro_batches, float? log_eps, bool accumulate, Tensor(a!) seeds, Tensor(b!) betas, Tensor(c!) inv_scale, "
    "Tensor(d!) found_inf) -> ()"
)
def _begin_step_fake(
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
    """What the backward passes of ``T`` losses start from, and the coefficient that each takes its row of the EMA with.

    All that a step knows before its first backward pass, in one go (paper, Algorithm 1: the gradient of the log, and
    the coefficient of iteration ``k = step + 1``)::

        unusable  = active and not (isfinite(losses) and losses >= -1e-6)  the latter only under the log
        seeds     = scale / micro_batches / (max(losses, 0) + log_eps)     without the last factor if log_eps is None;
                                                                           NaN where unusable, 0 where not active
        vanishes  = abs(scale) < tiny                                      smallest normal number of the dtype of betas
        betas     = beta / (step + 1)**beta_sigma                          1 where unusable or not active, or vanishes
        inv_scale = 1 / scale                                              1 if vanishes
        found_inf = any(unusable)                                          or as it was, if accumulate

    Gradients times a scale that vanishes cannot be unscaled: all rows stay as they are. The ``1e-6`` is
    :data:`NEGATIVE_LOSS_TOLERANCE`.

    :param losses: Shape ``(T,)``, float32 or float64. Those that are not active may be anything.
    :param active: Which tasks take part, shape ``(T,)``, bool; None: all.
    :param scale: Factor on all gradients, 0-d, of the dtype of ``losses``.
    :param step: Steps taken so far, 0-d int64.
    :param beta, beta_sigma: The schedule; computed in float64, to 1e-13 of the value.
    :param micro_batches: How many of them make a step, >= 1.
    :param log_eps: Added to losses under the log; None: losses are balanced as they are.
    :param seeds: Shape ``(T,)``, of the dtype of ``losses``; written.
    :param betas: Shape ``(T,)``, float32 or float64; written.
    :param inv_scale: 0-d, of the dtype of ``betas``; written.
    """
    _check_devices(losses, scale, step, seeds, betas, inv_scale, found_inf, *([] if active is None else [active]))
    torch._check(losses.dim() == 1, lambda: f"losses must be 1-D, got {losses.dim()}-D")
    (T,) = losses.shape
    _check_vectors(T, seeds=seeds, betas=betas)
    if active is not None:
        _check_vectors(T, active=active)


@_define(
    "ema_update_(Tensor(a!) row, Tensor?[] grads, int[] slots, Tensor segments, Tensor chunks, Tensor beta, "
    "Tensor inv_scale, Tensor? seed, Tensor(b!) partials, Tensor(c!) sq_norm, Tensor(d!) found_inf, "
    "Tensor(e!) arrivals, bool accumulate) -> ()"
)
def _ema_update_fake(
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
    """Gather gradients of one task into its row of the EMA and keep the row's squared norm up to date.

    For each column of slot ``slots[i]``, with ``g = grads[i] * inv_scale`` (``None`` counts as zeros)::

        row = beta * row + (1 - beta) * g          accumulate=False
        row = row + (1 - beta) * g                 accumulate=True

    (a ``beta`` of 1 leaves the row as it is, whatever the gradients: they are not looked at), then ``partials`` of the
    slot's chunks (sums of ``row**2``) and ``sq_norm``, the sum of all partials in chunk order.

    :param row: One row of the EMA, shape ``(P,)``; updated in place.
    :param grads: Dense gradients in the memory order of their parameters; the shape is irrelevant.
    :param slots: Which row of ``segments`` each gradient belongs to; no slot twice.
    :param segments: ``(start, numel, first_chunk)`` of every parameter, shape ``(S, 3)``, int64, **on the CPU**: what
        the host must know to launch.
    :param chunks: ``(slot, start, numel)`` of every chunk, shape ``(C, 3)``, int64: the same seen by a kernel; see
        :func:`dbmtl_fused.layout.chunk_table`.
    :param beta: EMA coefficient of this step, 0-d.
    :param inv_scale: What gradients are multiplied by first, 0-d.
    :param seed: Of the rounding of this row in this step.
    :param partials: Squared norm of every chunk of the row, shape ``(C,)``.
    :param sq_norm: Squared norm of the row, 0-d; only complete once every slot was updated for this step.
    :param found_inf: See the module's conventions.
    :param arrivals: Scratch by which a kernel knows its last block, 0-d int32; 0 before and after.
    """
    given = [grad for grad in (*grads, seed) if grad is not None]
    _check_devices(row, chunks, beta, inv_scale, partials, sq_norm, found_inf, arrivals, *given)
    _check_seed("row", row, seed)
    torch._check(row.dim() == 1, lambda: f"row must be 1-D, got {row.dim()}-D")
    torch._check(len(grads) == len(slots), lambda: f"got {len(grads)} grads for {len(slots)} slots")


@_define(
    "combine(Tensor ema, Tensor sq_norms, Tensor? preference, Tensor found_inf, Tensor scale, str alpha, "
    "float alpha_constant, float eps, bool accumulate, Tensor(a!) out, Tensor(b!) norms, Tensor(c!) weights, "
    "Tensor(d!) alpha_value, Tensor(e!) out_sq_norm, Tensor(f!)? step, Tensor(g!) arrivals) -> ()"
)
def _combine_fake(
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
    """Turn squared row norms into weights and write the weighted sum of the rows (paper, Eq. 2 and Algorithm 1)::

        norms       = sqrt(sq_norms)
        alpha       = max(norms)                       or what ``alpha`` says; of rows with a preference other than 0
        weights     = preference * alpha / (norms + eps)      preference if alpha is "none"; NaN if found_inf
        out         = scale * sum_t weights[t] * ema[t]         (+ out if accumulate)
        out_sq_norm = sum_p out[p]**2                  before out is rounded to its dtype
        step        = step + 1                         as it was if found_inf

    ``"min"`` is that of the norms other than 0, a row of zeros having no magnitude to balance by; ``max``, ``min``,
    ``mean`` and ``median`` of no norm at all are 0.

    :param ema: EMA of the task gradients, shape ``(T, P)``.
    :param sq_norms: Squared norms of its rows (all-reduced first where rows are sharded), shape ``(T,)``.
    :param preference: Of the tasks, shape ``(T,)``, >= 0; one with 0 takes no part. None: 1 for all.
    :param scale: Factor on ``out``, not on ``weights``, 0-d.
    :param alpha: One of :data:`ALPHA_MODES`.
    :param alpha_constant: ``alpha`` if the mode is ``"constant"``; else ignored.
    :param out: Shape ``(P,)``, adjacent columns.
    :param norms, weights: Shape ``(T,)``; written.
    :param alpha_value: 0-d; written (1 if the mode is ``"none"``).
    :param out_sq_norm: Squared norm of ``out``, 0-d; written.
    :param step: Steps taken so far, 0-d int64; read and written. None: this is not the end of a step.
    :param arrivals: See ``ema_update_``.
    """
    given = [tensor for tensor in (preference, step) if tensor is not None]
    _check_devices(ema, sq_norms, found_inf, scale, out, norms, weights, alpha_value, out_sq_norm, arrivals, *given)
    T, P = ema.shape
    torch._check(out.shape == (P,), lambda: f"out must have shape ({P},), got {tuple(out.shape)}")
    _check_vectors(T, sq_norms=sq_norms, norms=norms, weights=weights)
    if preference is not None:
        _check_vectors(T, preference=preference)


@_define("gram(Tensor ema, Tensor(a!) out, Tensor(b!) arrivals) -> ()")
def _gram_fake(ema: Tensor, out: Tensor, arrivals: Tensor) -> None:
    """Inner products of all pairs of rows: ``out = ema @ ema.T``, in :func:`compute_dtype` of ``ema``.

    :param ema: Shape ``(T, P)``.
    :param out: Shape ``(T, T)``, contiguous; written, symmetric bit for bit.
    :param arrivals: See ``ema_update_``.
    """
    _check_devices(ema, out, arrivals)
    T, _ = ema.shape
    torch._check(out.shape == (T, T), lambda: f"out must have shape ({T}, {T}), got {tuple(out.shape)}")


@_define(
    "balance_(Tensor(a!) ema, Tensor grads, Tensor beta, Tensor? seed, str alpha, float alpha_constant, float eps, "
    "Tensor(b!) out, Tensor(c!) norms, Tensor(d!) weights, Tensor(e!) found_inf) -> ()"
)
def _balance_fake(
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
    """``ema_update_`` of every row and ``combine``, on a ready gradient matrix, in one go.

    :param ema: Shape ``(T, P)``; updated in place.
    :param grads: Shape ``(T, P)``; must not overlap ``ema``.
    :param seed: Of the rounding of the first row; ``seed + t`` is that of row ``t``.

    The rest as in ``ema_update_`` and ``combine``.
    """
    _check_devices(ema, grads, beta, out, norms, weights, found_inf, *([] if seed is None else [seed]))
    _check_seed("ema", ema, seed)
    torch._check(
        ema.shape == grads.shape,
        lambda: f"ema {tuple(ema.shape)} and grads {tuple(grads.shape)} must have the same shape",
    )
    T, P = ema.shape
    torch._check(out.shape == (P,), lambda: f"out must have shape ({P},), got {tuple(out.shape)}")
    _check_vectors(T, norms=norms, weights=weights)
