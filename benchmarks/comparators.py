"""Ways to do the one-shot step on a ready ``T x P`` gradient matrix, and the float64 computation they must agree with.

Each keeps its own copies of all it reads and writes, so that none finds in cache what another left there.
Traffic in units of ``P`` numbers: LibMTL's expression ``14 T - 1``, tight eager ``5 T + 1``, fused ``4 T + 1``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dbmtl_fused import backends, balance_
from dbmtl_fused.reference import balance_ as reference_balance_

EPS = 1e-8
RTOL = 1e-4
"""Largest error allowed before anything is timed, as a share of the largest entry of the exact result."""
LARGE_RTOL = 1e-2
"""The same for torch's own operators at the sizes that are timed: on CPUs their float32 norms get worse as ``P`` grows,
4e-5 at 11 M, 1e-3 at 100 M. What they compute has to be right to :data:`RTOL` at :data:`SMALL` first."""
SMALL = 10_000
"""``P`` at which no rounding hides a wrong formula."""


class OneShot(Protocol):
    """One call: updates its EMA (attribute ``ema``) and returns the balanced gradient, shape ``(P,)``."""

    ema: Tensor

    def __call__(self) -> Tensor: ...


class LibMTLExpression:
    """``ema = g + beta (ema - g)``, the norm of each row, a Python sum of ``weight * row``; all allocated anew."""

    def __init__(self, ema: Tensor, grads: Tensor, beta: float) -> None:
        self.ema, self.grads, self.beta = ema.clone(), grads.clone(), beta

    def __call__(self) -> Tensor:
        self.ema = self.grads + self.beta * (self.ema - self.grads)
        return libmtl_sum(self.ema)


def libmtl_sum(ema: Tensor) -> Tensor:
    """The balanced gradient as LibMTL forms it from its EMA."""
    norms = ema.norm(dim=-1)
    weights = norms.max() / (norms + EPS)
    return sum((weights[t] * ema[t] for t in range(len(ema))), start=torch.zeros(()))


class TightEager:
    """The least traffic torch's own operators allow: ``lerp_``, ``vector_norm``, ``mv`` into a preallocated output."""

    def __init__(self, ema: Tensor, grads: Tensor, beta: float) -> None:
        self.ema, self.grads, self.beta = ema.clone(), grads.clone(), beta
        self.out = ema.new_empty(ema.shape[1])

    def __call__(self) -> Tensor:
        self.ema.lerp_(self.grads, 1 - self.beta)
        norms = torch.linalg.vector_norm(self.ema, dim=1)
        return torch.mv(self.ema.t(), norms.amax() / (norms + EPS), out=self.out)


class Foreach:
    """``torch._foreach_*`` on the rows: what torch has fused for lists of tensors."""

    def __init__(self, ema: Tensor, grads: Tensor, beta: float) -> None:
        self.ema, self.grads, self.beta = ema.clone(), grads.clone(), beta

    def __call__(self) -> Tensor:
        rows = list(self.ema)
        torch._foreach_lerp_(rows, list(self.grads), 1 - self.beta)
        norms = torch.stack(torch._foreach_norm(rows))
        out, *others = torch._foreach_mul(rows, list(norms.amax() / (norms + EPS)))
        for row in others:
            out.add_(row)
        return out


class Fused:
    """``dbmtl_fused.balance_`` as users call it, checks included, into a preallocated output."""

    def __init__(self, backend: str, ema: Tensor, grads: Tensor, beta: float) -> None:
        self.ema, self.grads, self.beta = ema.clone(), grads.clone(), beta
        self.backend = "auto" if backend == backends.resolve("auto", ema.device) else backend
        self.out = ema.new_empty(ema.shape[1])

    def __call__(self) -> Tensor:
        return balance_(self.ema, self.grads, self.beta, eps=EPS, out=self.out, backend=self.backend)[0]


class CompiledReference:
    """``torch.compile`` of the reference implementation, at its most thorough."""

    def __init__(self, ema: Tensor, grads: Tensor, beta: float) -> None:
        T, P = ema.shape
        self.ema, self.grads, self.beta = ema.clone(), grads.clone(), ema.new_tensor(beta)
        self.out, self.norms, self.weights = ema.new_empty(P), ema.new_empty(T), ema.new_empty(T)
        self.found_inf = torch.zeros((), device=ema.device)
        self.compiled = torch.compile(
            reference_balance_, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs"
        )

    def __call__(self) -> Tensor:
        self.compiled(
            self.ema, self.grads, self.beta, None, "max", 0.0, EPS, self.out, self.norms, self.weights, self.found_inf
        )
        return self.out


LIBMTL, TIGHT, COMPILED = "LibMTL's expression", "tight eager", "torch.compile(reference)"
FOREACH = "torch._foreach"
ALLOCATING = (LIBMTL, FOREACH)
"""What allocates anew in every call, so that its time depends on the state of malloc's heap."""
_KEPT = ", memory kept"


def kept(name: str) -> str:
    """The name of a candidate in a process that keeps its memory: :func:`benchmarks.workers.keep_memory`."""
    return name + _KEPT


def rtol(name: str) -> float:
    """The error allowed at the size that is timed."""
    return LARGE_RTOL if name.removesuffix(_KEPT) in (LIBMTL, TIGHT, FOREACH) else RTOL


def fused(backend: str) -> str:
    """The name of :class:`Fused` on ``backend``."""
    return f"dbmtl_fused {backend}"


def factories(
    *, compiled: bool = False, device_type: str = "cpu"
) -> dict[str, Callable[[Tensor, Tensor, float], OneShot]]:
    """``name -> factory(ema, grads, beta)`` of all that run on this machine, the package's own last, its best at the
    very end."""
    found: dict[str, Callable[[Tensor, Tensor, float], OneShot]] = {
        LIBMTL: LibMTLExpression,
        TIGHT: TightEager,
        FOREACH: Foreach,
    }
    if compiled:
        found[COMPILED] = CompiledReference
    for backend in reversed(backends.available(device_type)):
        found[fused(backend)] = functools.partial(Fused, backend)
    return found


def inputs(T: int, P: int, seed: int = 0, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """``ema`` and ``grads``: normal numbers, rows of different scale as the gradients of different losses are."""
    generator = torch.Generator(device).manual_seed(seed)
    scales = torch.logspace(-2, 2, T, device=device).unsqueeze(1)
    ema, grads = (torch.randn(T, P, generator=generator, device=device).mul_(scales) for _ in range(2))
    return ema, grads


def exact(ema: Tensor, grads: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The updated EMA and the balanced gradient in float64."""
    updated = torch.empty_like(ema, dtype=torch.float64)
    for row, m, g in zip(updated, ema, grads, strict=True):  # row by row, for the sake of memory
        torch.add((1 - beta) * g.double(), m.double(), alpha=beta, out=row)
    norms = torch.stack([row.norm() for row in updated])
    return updated, (norms.max() / (norms + EPS)) @ updated


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest entry of ``expected``; infinite if there is a NaN."""
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    return math.inf if math.isnan(error) else error


def check(name: str, candidate: OneShot, expected: tuple[Tensor, Tensor], rtol: float = RTOL) -> float:
    """Call ``candidate`` once and return its error against what :func:`exact` returned.

    :raises AssertionError: If it is above ``rtol``; nothing is timed that computes something else.
    """
    out = candidate()
    ema, total = expected
    # Row by row: rows differ in scale.
    errors = [relative_error(*rows) for rows in zip(candidate.ema, ema, strict=True)]
    error = max(*errors, relative_error(out, total))
    if error > rtol:
        raise AssertionError(f"{name} differs from float64 by {error:.1e} of the largest entry, more than {rtol:.0e}")
    return error


def check_small(
    kinds: Mapping[str, Callable[[Tensor, Tensor, float], OneShot]], T: int, beta: float, device: torch.device
) -> None:
    """:func:`check` those of ``kinds`` that are allowed more at the size that is timed, at a small one."""
    ema, grads = inputs(T, SMALL, device=device)
    expected = exact(ema, grads, beta)
    for name, build in kinds.items():
        if rtol(name) > RTOL:
            check(name, build(ema, grads, beta), expected)
