"""What is right, in plain NumPy: the judge of every backend, so it shares no code with them and does not know torch.

Everything is computed in ``REAL``: float64 at least, and on x86 its 80-bit extension, so that float64 state can be
judged too. ``T`` tasks, ``P`` parameters; ``ema`` and ``grads`` have shape ``(T, P)``, or any other shape as long as
they agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

REAL = np.longdouble
Array = np.ndarray[Any, np.dtype[Any]]


class Begun(NamedTuple):
    """What ``begin_step`` computes."""

    seeds: Array  # (T,)
    betas: Array  # (T,)
    inv_scale: Any  # 0-d
    found_inf: bool


class Ema(NamedTuple):
    """An updated EMA and whether the guard had to hold back one of its entries."""

    ema: Array
    found_inf: bool


class Balanced(NamedTuple):
    """What ``combine`` computes."""

    norms: Array  # (T,)
    alpha: Any  # 0-d
    weights: Array  # (T,)
    out: Array  # (P,)
    out_sq_norm: Any  # 0-d


def real(values: Any) -> Array:
    """``values`` in the oracle's precision."""
    return np.asarray(values, dtype=REAL)


def begin_step(
    losses: Array,
    k: int,
    *,
    active: Array | None = None,
    scale: Any = 1.0,
    beta: float = 0.9,
    beta_sigma: float = 0.5,
    micro_batches: int = 1,
    log_eps: float | None = 1e-8,
    found_inf: bool = False,
    tiny: Any = 2.0**-126,
) -> Begun:
    """What the backward passes of iteration ``k = 1, 2, ...`` start from, and each row's coefficient, task by task.

    :param tiny: Smallest normal number of the dtype of the coefficients: a smaller scale cannot be divided by.
    """
    seeds, betas = [], []
    vanishes = np.abs(real(scale)) < tiny
    seed: Any
    for t, loss in enumerate(real(losses)):
        seed, beta_k = real(scale) / micro_batches, REAL(beta) / REAL(k) ** REAL(beta_sigma)
        if active is not None and not active[t]:
            seed, beta_k = REAL(0), REAL(1)
        elif not np.isfinite(loss) or (log_eps is not None and loss < -1e-6):
            seed, beta_k, found_inf = REAL(np.nan), REAL(1), True
        elif log_eps is not None:
            seed = seed / (max(loss, REAL(0)) + REAL(log_eps))
        seeds.append(seed)
        betas.append(REAL(1) if vanishes else beta_k)
    inv_scale = REAL(1) if vanishes else 1 / real(scale)
    return Begun(np.stack(seeds), np.stack(betas), inv_scale, found_inf)


def ema_update(
    ema: Array, grads: Array | None, beta: Any, inv_scale: Any = 1.0, *, accumulate: bool = False, largest: Any = np.inf
) -> Ema:
    """``beta * ema + (1 - beta) * inv_scale * grads``; an entry for which that is beyond its limit stays as it was.

    :param grads: None counts as zeros.
    :param accumulate: Add to ``ema`` without decaying it: the second part of one gradient.
    :param largest: Largest finite number of the dtype that holds the state; whatever exceeds it there is infinite.
    """
    ema, beta, inv_scale = real(ema), real(beta), real(inv_scale)
    with np.errstate(invalid="ignore", over="ignore"):
        updated = ema if accumulate else beta * ema
        if grads is not None and beta != 1:
            stored = _saturate(real(grads), largest)
            updated = updated + (1 - beta) * _saturate(stored * inv_scale, largest)
        fits = np.abs(updated) <= entry_limit(largest)
    return Ema(np.where(fits, updated, ema), not fits.all())


def entry_limit(largest: Any) -> Any:
    """Largest entry, by the largest finite number of its dtype; the squares of many such entries have a finite sum."""
    return REAL(2) ** (46 if largest < REAL(2) ** 128 else 490)


def _saturate(values: Array, largest: Any) -> Array:
    return np.where(np.abs(values) > largest, np.copysign(REAL(np.inf), values), values)


def row_norms(ema: Array) -> Array:
    """Euclidean norm of each row."""
    return np.sqrt(np.square(real(ema)).sum(axis=1))


def alpha_of(norms: Array, alpha: str, constant: float = 1.0) -> Any:
    """The magnitude that rows with these norms are scaled to; 0 if there are none."""
    if alpha == "min":
        norms = norms[norms != 0]
    match alpha:
        case "constant":
            return REAL(constant)
        case "none":
            return REAL(1)
        case _ if len(norms) == 0:
            return REAL(0)
        case "max" | "min" | "mean":
            return getattr(norms, alpha)()
        case "median":  # np.median would go through float64
            ordered, T = np.sort(norms), len(norms)
            return ordered[T // 2] if T % 2 else (ordered[T // 2 - 1] + ordered[T // 2]) / 2
    raise AssertionError(alpha)


def combine(
    ema: Array,
    norms: Array,
    alpha: str = "max",
    constant: float = 1.0,
    eps: float = 1e-8,
    *,
    preference: Array | None = None,
    scale: Any = 1.0,
    found_inf: bool = False,
    base: Array | float = 0.0,
) -> Balanced:
    """Weights from the row norms, and the weighted sum of the rows times ``scale``, added to ``base``.

    :param preference: Of the tasks, shape ``(T,)``; one with 0 takes no part.
    """
    norms = real(norms)
    preference = np.ones_like(norms) if preference is None else real(preference)
    value = alpha_of(norms[preference != 0], alpha, constant)
    weights = preference * (np.ones_like(norms) if alpha == "none" else value / (norms + REAL(eps)))
    if found_inf:
        weights = np.full_like(norms, np.nan)
    out = real(base) + real(scale) * (weights[:, None] * real(ema)).sum(axis=0)
    return Balanced(norms, value, weights, out, np.square(out).sum())


def gram(ema: Array) -> Array:
    """Inner products of all pairs of rows."""
    rows = real(ema)
    return np.stack([(row * rows).sum(axis=1) for row in rows])


def balance(
    ema: Array,
    grads: Array,
    beta: Any,
    alpha: str = "max",
    constant: float = 1.0,
    eps: float = 1e-8,
    *,
    found_inf: bool = False,
    largest: Any = np.inf,
) -> tuple[Ema, Balanced]:
    """One step on a ready gradient matrix; ``found_inf`` as it was before the step."""
    updated, flag = ema_update(ema, grads, beta, largest=largest)
    flag = flag or found_inf
    return Ema(updated, flag), combine(updated, row_norms(updated), alpha, constant, eps, found_inf=flag)


def algorithm1_step(
    ema: Array,
    loss_grads: Sequence[Array],
    losses: Sequence[float] | None,
    k: int,
    *,
    beta: float = 0.9,
    beta_sigma: float = 0.5,
    eps: float = 1e-8,
    log_eps: float = 1e-8,
) -> tuple[Array, Array]:
    """Iteration ``k = 1, 2, ...`` of the paper's Algorithm 1, line by line and loop by loop, for the shared parameters.

    Deliberately not built from the functions above: each checks the other.

    :param loss_grads: Gradient of each task's loss (not of its logarithm), each of shape ``(P,)``.
    :param losses: The losses, for the gradient of the logarithm; None if ``loss_grads`` are of log-losses already.
    :returns: The new ``ema`` and the gradient of the shared parameters.
    """
    beta_k = REAL(beta) / REAL(k) ** REAL(beta_sigma)
    new_ema = []
    for t, loss_grad in enumerate(loss_grads):
        g_t = real(loss_grad)
        if losses is not None:
            g_t = g_t / (REAL(losses[t]) + REAL(log_eps))
        new_ema.append(beta_k * real(ema[t]) + (1 - beta_k) * g_t)
    norms = [np.sqrt(sum((x * x for x in m_t), start=REAL(0))) for m_t in new_ema]
    alpha_k = max(norms)
    direction = np.zeros_like(new_ema[0])
    for m_t, n_t in zip(new_ema, norms, strict=True):
        direction = direction + alpha_k * m_t / (n_t + REAL(eps))
    return np.stack(new_ema), direction
