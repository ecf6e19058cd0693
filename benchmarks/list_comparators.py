"""From ready lists of gradients, one for each task, to ``.grad``: what is between ``T`` backwards and the optimizer.

Unlike in :mod:`benchmarks.comparators` flattening and writing back are part of the work. States start at zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.bandwidth import ITEM, LARGEST
from benchmarks.comparators import EPS, FOREACH, libmtl_sum
from benchmarks.shapes import Shape
from benchmarks.step_base import views_of, weights_of
from benchmarks.steps import OURS, foreach_sum
from dbmtl_fused import DBMTL


class Lists:
    """Parameters of the given shapes, and for each task a list of their gradients, which all candidates read."""

    def __init__(self, shapes: Sequence[Shape], T: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.T, self.params = T, [torch.zeros(shape, requires_grad=True) for shape in shapes]
        self.P = sum(p.numel() for p in self.params)
        scales = torch.logspace(-2, 2, T).tolist()
        self.grads = [[torch.randn(shape, generator=random).mul_(scale) for shape in shapes] for scale in scales]

    def write(self, grads: Sequence[Tensor | None]) -> None:
        """Make them the parameters' ``.grad``."""
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad

    def error(self, beta: float) -> float:
        """Of ``.grad`` after one step from zero, as a share of the largest entry of each parameter's terms."""
        norms = torch.stack([torch.stack([(1 - beta) * g.double().norm() for g in row]).norm() for row in self.grads])
        weights = norms.max() / (norms + EPS)
        worst = torch.zeros((), dtype=torch.float64)
        for p, *grads in zip(self.params, *self.grads, strict=True):
            terms = [weight * (1 - beta) * g.double() for weight, g in zip(weights, grads, strict=True)]
            scale = max(term.abs().max() for term in terms)
            assert p.grad is not None
            worst = torch.maximum(worst, (p.grad - sum(terms)).abs().max() / scale)
        return worst.item()


class Candidate(ABC):
    """One call: from the lists to ``.grad``."""

    matrices: float
    """``T x P`` buffers at the peak, the gradients not counted."""

    def __init__(self, lists: Lists, beta: float) -> None:
        self.lists, self.beta = lists, beta

    @abstractmethod
    def __call__(self) -> None: ...


class LibMTLShipped(Candidate):
    """LibMTL as it ships: see :class:`benchmarks.steps.LibMTL`; the offset of each parameter is summed up anew."""

    matrices = 4.0

    def __init__(self, lists: Lists, beta: float) -> None:
        super().__init__(lists, beta)
        self.ema = torch.zeros(lists.T, lists.P)
        self.sizes = [p.numel() for p in lists.params]

    def __call__(self) -> None:
        matrix = torch.zeros(self.lists.T, self.lists.P)
        for t, grads in enumerate(self.lists.grads):
            matrix[t] = self._vector(grads)
        self.ema = matrix + self.beta * (self.ema - matrix)
        self.lists.write([part.clone() for part in views_of(libmtl_sum(self.ema), self.lists.params)])

    def _vector(self, grads: Sequence[Tensor]) -> Tensor:
        vector = torch.zeros(self.lists.P)
        for i, grad in enumerate(grads):
            start = sum(self.sizes[:i])
            vector[start : start + self.sizes[i]] = grad.view(-1)
        return vector


class TightFlatten(Candidate):
    """``cat`` into rows of a matrix that is kept, then ``lerp_``, ``vector_norm``, ``mv``; ``.grad`` are views."""

    matrices = 2.0

    def __init__(self, lists: Lists, beta: float) -> None:
        super().__init__(lists, beta)
        self.ema, self.matrix = (torch.zeros(lists.T, lists.P) for _ in range(2))
        self.out = torch.empty(lists.P)

    def __call__(self) -> None:
        for row, grads in zip(self.matrix, self.lists.grads, strict=True):
            torch.cat([grad.view(-1) for grad in grads], out=row)
        self.ema.lerp_(self.matrix, 1 - self.beta)
        torch.mv(self.ema.t(), weights_of(self.ema), out=self.out)
        self.lists.write(views_of(self.out, self.lists.params))


class Foreach(Candidate):
    """``torch._foreach_*`` on the lists as they are: nothing is flattened."""

    matrices = 1.7

    def __init__(self, lists: Lists, beta: float) -> None:
        super().__init__(lists, beta)
        self.rows = [[torch.zeros_like(g) for g in grads] for grads in lists.grads]

    def __call__(self) -> None:
        for row, grads in zip(self.rows, self.lists.grads, strict=True):
            torch._foreach_lerp_(row, grads, 1 - self.beta)
        self.lists.write(foreach_sum(self.rows))


class _Ready(torch.autograd.Function):
    """A loss of 1 whose backward pass costs nothing: the gradients are there already."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return torch.ones(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *ctx.grads


class Balancer(Candidate):
    """``DBMTL.backward``: its hooks, its buckets and torch's engine included."""

    matrices = 1.4

    def __init__(self, lists: Lists, beta: float) -> None:
        super().__init__(lists, beta)
        self.balancer = DBMTL(lists.params, num_tasks=lists.T, beta=beta, beta_sigma=0.0, eps=EPS)

    def __call__(self) -> None:
        self.lists.write([None] * len(self.lists.params))
        losses = [_Ready.apply(grads, *self.lists.params) for grads in self.lists.grads]
        self.balancer.backward(losses)


SHIPPED, TIGHT = "LibMTL as it ships", "torch ops, flatten"
KINDS: dict[str, type[Candidate]] = {
    SHIPPED: LibMTLShipped,
    FOREACH: Foreach,
    TIGHT: TightFlatten,
    OURS: Balancer,
}


def bytes_of(kinds: Sequence[str], T: int, P: int) -> float:
    """What parameters, gradients, candidates and a copy take together, at the most."""
    return (1 + sum(KINDS[name].matrices for name in kinds)) * T * P * ITEM + P * ITEM + LARGEST
