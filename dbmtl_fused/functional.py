"""``balance_``: one step of DB-MTL's gradient balancing on a ready ``T x P`` gradient matrix."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from dbmtl_fused import backends
from dbmtl_fused._ops import GRAD_DTYPES, STATE_DTYPES, compute_dtype

ALPHA_NAMES = ("max", "min", "mean", "median")

_RANGES = {torch.float32: (1e-19, 1e19), torch.float64: (1e-150, 1e150)}
"""Least and largest positive argument, by what is computed in: like a norm, whose square must be a normal number."""

_LEAST_EPS = {torch.float32: 1e-12, torch.float64: 1e-150}
"""A weight is at most alpha / eps, which must be finite."""


def balance_(
    ema: Tensor,
    grads: Tensor,
    beta: float | Tensor,
    *,
    eps: float = 1e-8,
    alpha: str | float | None = "max",
    seed: int | Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Update the EMA of the task gradients in place and return their balanced sum.

    Algorithm 1 of DB-MTL (arXiv 2308.12029), gradient part::

        ema     = beta * ema + (1 - beta) * grads
        norms   = norm of each row of ema
        weights = alpha / (norms + eps)                 alpha = max(norms)
        out     = sum_t weights[t] * ema[t]

    Not differentiable: gradients go in, a gradient comes out.

    :param ema: EMA of the task gradients, shape ``(T, P)``, float32, float64 or bfloat16, adjacent columns; updated in
        place. bfloat16 is rounded stochastically, so that updates too small for one step are not lost over many.
    :param grads: Task gradients, shape ``(T, P)``, float32, bfloat16, float16 or float64, adjacent columns.
    :param beta: EMA coefficient of this step in ``[0, 1)``: a number, or a 0-d tensor on the same device that is read
        by the kernel without a host sync (and whose range is therefore not checked).
    :param eps: Added to the norms, from 1e-12 to 1e19; from 1e-150 to 1e150 if ``ema`` is float64.
    :param alpha: ``"max"``, ``"min"``, ``"mean"``, ``"median"`` of the norms, a positive number, or None for a plain
        sum (weights 1). A number is from 1e-19 to 1e19; from 1e-150 to 1e150 if ``ema`` is float64.
    :param seed: For a bfloat16 ``ema``, and only then: what its rounding is drawn from, an integer or a 0-d int64
        tensor on the same device. Row ``t`` takes ``seed + t``, so give ``T`` more at each step.
    :param out: Where to write the sum, shape ``(P,)``, any of the dtypes of ``grads``; by default a new tensor of the
        dtype of ``grads``.
    :param backend: ``"auto"``, or the one to use: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"reference"``.
    :returns: ``out (P,)``, ``norms (T,)``, ``weights (T,)``; the latter two float32, or float64 if ``ema`` is.
    :raises TypeError: If an argument has the wrong type or dtype.
    :raises ValueError: If a shape, device, stride or value does not fit, or tensors overlap.
    :raises RuntimeError: If the requested backend cannot run here.

    .. note:: An entry of the EMA whose update is NaN or larger than 2**46 (2**490 if ``ema`` is float64) stays as it
        was and makes all of ``weights`` and ``out`` NaN. A norm below about 1e-19 (1e-154) counts as 0.
        Same inputs, same bits; on CPUs whatever the number of threads.
    """
    _check_matrix("ema", ema, STATE_DTYPES)
    dtype = compute_dtype(ema.dtype)
    check_eps(eps, dtype)
    alpha_mode, alpha_constant = alpha_arguments(alpha, dtype)
    _check_matrix("grads", grads, GRAD_DTYPES)
    if grads.shape != ema.shape:
        raise ValueError(f"grads must have the shape of ema, {tuple(ema.shape)}, got {tuple(grads.shape)}")
    if grads.device != ema.device:
        raise ValueError(f"grads must be on the device of ema, {ema.device}, got {grads.device}")
    T, P = ema.shape
    if T == 0:
        raise ValueError("ema must have at least one row (task), got shape " + str(tuple(ema.shape)))
    beta, seed = _beta_tensor(beta, ema), _seed_tensor(seed, ema)
    if out is None:
        out = torch.empty(P, dtype=grads.dtype, device=grads.device)
    else:
        _check_out(out, ema)
    if not torch.compiler.is_compiling():  # traced tensors have no addresses
        _check_overlap(ema, grads, out)
    op = getattr(torch.ops.dbmtl_fused.balance_, backends.resolve(backend, ema.device))
    norms, weights = beta.new_empty(T), beta.new_empty(T)
    found_inf = torch.zeros((), dtype=torch.float32, device=ema.device)
    if ema.requires_grad or grads.requires_grad:
        ema, grads = ema.detach(), grads.detach()
    op(ema, grads, beta, seed, alpha_mode, alpha_constant, eps, out, norms, weights, found_inf)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((ema, out))  # so that autograd notices if it still needs the old values
    return out, norms, weights


def alpha_arguments(alpha: str | float | None, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
    """Turn ``alpha`` as users give it into the operators' ``(alpha, alpha_constant)``.

    :param dtype: What is computed in.
    :raises ValueError: If it is none of what :func:`balance_` documents.
    """
    if alpha is None:
        return "none", 0.0
    if alpha in ALPHA_NAMES:
        return str(alpha), 0.0
    if isinstance(alpha, numbers.Real) and not isinstance(alpha, bool) and 0 < alpha < math.inf:
        check_in_range("alpha", alpha, dtype)
        return "constant", float(alpha)
    raise ValueError(f"alpha must be one of {ALPHA_NAMES}, a positive number or None, got {alpha!r}")


def check_finite_float(
    name: str, value: float, *, above: float = -math.inf, low: float = -math.inf, below: float = math.inf
) -> None:
    """Raise unless ``value`` is a finite number with ``above < value``, ``low <= value`` and ``value < below``."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):  # the last takes longest to ask
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and above < value and low <= value < below):
        rules = (
            [f"> {above:g}"] * (above > -math.inf)
            + [f">= {low:g}"] * (low > -math.inf)
            + [f"< {below:g}"] * (below < math.inf)
        )
        raise ValueError(f"{name} must be {' and '.join(rules) or 'finite'}, got {value}")


def check_in_range(
    name: str,
    value: float,
    dtype: torch.dtype,
    *,
    low: float | None = None,
    or_zero: bool = False,
    cure: str = "a float64 ema",
) -> None:
    """Raise unless ``value`` is a positive number that ``dtype``, what is computed in, has room for.

    :param low: Least number; by default one whose square is a normal number.
    :param or_zero: Whether 0 will do.
    :param cure: What has a wider range.
    """
    check_finite_float(name, value, above=-math.inf if or_zero else 0.0, low=0.0 if or_zero else -math.inf)
    least, most = _RANGES[dtype]
    least = least if low is None else low
    if not (least <= value <= most or (or_zero and value == 0)):
        rule = f"{'0 or ' * or_zero}from {least:g} to {most:g} in {_name(dtype)} arithmetic"
        raise ValueError(f"{name} must be {rule}, got {value}{_advice(cure, dtype)}")


def check_eps(eps: float, dtype: torch.dtype) -> None:
    """Raise unless ``eps`` is what :func:`balance_` documents; ``dtype`` is what is computed in."""
    check_in_range("eps", eps, dtype, low=_LEAST_EPS[dtype])


def check_beta(beta: float, dtype: torch.dtype) -> None:
    """Raise unless ``beta`` is in ``[0, 1)``, also once it is rounded to ``dtype``, what is computed in."""
    check_finite_float("beta", beta, low=0.0, below=1.0)
    if beta >= 1 - torch.finfo(dtype).eps / 4:  # half way from 1 to the number below it: a tie, which goes to 1
        advice = _advice("a float64 ema", dtype)
        raise ValueError(f"beta must be < 1 once rounded to {_name(dtype)}, got {beta!r}{advice}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _advice(cure: str, dtype: torch.dtype) -> str:
    return "" if not cure or dtype is torch.float64 else f"; use {cure} for more"


def _beta_tensor(beta: float | Tensor, ema: Tensor) -> Tensor:
    dtype = compute_dtype(ema.dtype)
    if not isinstance(beta, Tensor):
        check_beta(beta, dtype)
        return torch.full((), beta, dtype=dtype, device=ema.device)
    if beta.dim() != 0 or beta.device != ema.device or not beta.is_floating_point():
        raise ValueError(
            f"beta must be a number or a 0-d floating-point tensor on {ema.device}, "
            f"got shape {tuple(beta.shape)}, {beta.dtype}, on {beta.device}"
        )
    return beta.detach().to(dtype) if beta.requires_grad or beta.dtype != dtype else beta


def _seed_tensor(seed: int | Tensor | None, ema: Tensor) -> Tensor | None:
    if (seed is not None) != (ema.dtype is torch.bfloat16):
        raise ValueError(f"seed must be given if ema is bfloat16, and only then, got {seed} for {ema.dtype}")
    if seed is None:
        return None
    if not isinstance(seed, Tensor):
        number = _integer(seed)
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {number}")
        return torch.full((), number, dtype=torch.int64, device=ema.device)
    if seed.dim() != 0 or seed.device != ema.device or seed.dtype != torch.int64:
        raise ValueError(
            f"seed must be an integer or a 0-d int64 tensor on {ema.device}, "
            f"got shape {tuple(seed.shape)}, {seed.dtype}, on {seed.device}"
        )
    return seed


def _integer(seed: Any) -> int:
    try:
        if not isinstance(seed, bool):
            return operator.index(seed)  # NumPy's integers are not Python's
    except TypeError:
        pass
    raise TypeError(f"seed must be an integer or a tensor, got {type(seed).__name__}")


def _check_matrix(name: str, matrix: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(matrix).__name__}")
    if matrix.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {dtypes}, got {matrix.dtype}")
    if matrix.dim() != 2:
        raise ValueError(f"{name} must have shape (T, P), got {tuple(matrix.shape)}")
    if matrix.is_contiguous():
        return
    T, P = matrix.shape
    if (P > 1 and matrix.stride(1) != 1) or (T > 1 and matrix.stride(0) < P):
        raise ValueError(
            f"{name} must have adjacent columns and rows that do not overlap, got strides {matrix.stride()}"
        )


def _check_out(out: Tensor, ema: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.dtype not in GRAD_DTYPES:
        raise TypeError(f"out must have one of the dtypes {GRAD_DTYPES}, got {out.dtype}")
    P = ema.shape[1]
    if out.shape != (P,):
        raise ValueError(f"out must have shape ({P},), got {tuple(out.shape)}")
    if P > 1 and out.stride(0) != 1:
        raise ValueError(f"out must have adjacent elements, got stride {out.stride(0)}")
    if out.device != ema.device:
        raise ValueError(f"out must be on the device of ema, {ema.device}, got {out.device}")
    if out.requires_grad:
        raise ValueError("out must not require grad")


def _check_overlap(ema: Tensor, grads: Tensor, out: Tensor) -> None:
    """Raise if two of them share memory; interleaved rows of one buffer do not."""
    T, P = ema.shape
    if P == 0:
        return
    ema_start, grads_start, out_start = ema.data_ptr(), grads.data_ptr(), out.data_ptr()
    ema_stop = ema_start + ema.itemsize * (P + (T - 1) * ema.stride(0))
    grads_stop = grads_start + grads.itemsize * (P + (T - 1) * grads.stride(0))
    out_stop = out_start + out.itemsize * P
    if grads_start < ema_stop and ema_start < grads_stop and not _interleaved(ema, grads, grads_start - ema_start):
        raise ValueError("grads must not share memory with ema")
    if out_start < ema_stop and ema_start < out_stop:
        raise ValueError("out must not share memory with ema")
    if out_start < grads_stop and grads_start < out_stop:
        raise ValueError("out must not share memory with grads")


def _interleaved(ema: Tensor, grads: Tensor, offset: int) -> bool:
    """Whether the rows of two matrices with one row stride pass each other; ``offset`` from ema to grads in bytes."""
    pitch = ema.stride(0) * ema.itemsize
    if pitch == 0 or grads.stride(0) * grads.itemsize != pitch:  # 0: a single row, whose stride means nothing
        return False
    shift = offset % pitch
    return shift >= ema.shape[1] * ema.itemsize and pitch - shift >= grads.shape[1] * grads.itemsize
