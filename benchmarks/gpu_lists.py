"""From ready lists of gradients, one for each task, to the list that goes into ``.grad``, on any device.

As in :mod:`benchmarks.list_comparators`, flattening and writing back are part of the work; here without autograd and
its hooks, so that a CUDA graph can hold a call. States start at zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.comparators import EPS, libmtl_sum, relative_error
from benchmarks.gpu_problems import BETA
from benchmarks.shapes import Shape
from benchmarks.step_base import views_of, weights_of
from benchmarks.steps import foreach_sum
from dbmtl_fused import backends
from dbmtl_fused.layout import FlatLayout

SHIPPED, LIBMTL = "LibMTL as it ships", "LibMTL, kept on the device"
FOREACH, TIGHT = "torch._foreach on the lists", "torch ops, flatten"


class Lists:
    """For each task gradients of all parameters, each in memory of its own; rows of different scale."""

    def __init__(self, params: Sequence[Shape], T: int, device: torch.device, number: int = 0) -> None:
        random = torch.Generator(device).manual_seed(number)
        scales = torch.logspace(-2, 2, T).tolist()
        self.grads = [
            [torch.randn(shape, device=device, generator=random).mul_(scale) for shape in params] for scale in scales
        ]
        self.T, self.P, self.device = T, sum(grad.numel() for grad in self.grads[0]), device

    def error(self, found: Sequence[Tensor]) -> float:
        """Of what the first step from zero left, against float64."""
        norms = torch.stack([torch.stack([(1 - BETA) * g.double().norm() for g in row]).norm() for row in self.grads])
        weights = (1 - BETA) * norms.max() / (norms + EPS)
        errors = []
        for actual, *grads in zip(found, *self.grads, strict=True):
            exact = sum((weight * g.double() for weight, g in zip(weights, grads, strict=True)), torch.zeros(()))
            errors.append(relative_error(actual, exact))
        return max(errors)


class Candidate(ABC):
    """One call: from the lists to the list."""

    def __init__(self, lists: Lists) -> None:
        self.lists = lists

    @abstractmethod
    def __call__(self) -> list[Tensor]: ...


class LibMTL(Candidate):
    """LibMTL's way, each vector of gradients gathered on the device."""

    gathered_on: str | None = None

    def __init__(self, lists: Lists) -> None:
        super().__init__(lists)
        self.ema = torch.zeros(lists.T, lists.P, device=lists.device)

    def __call__(self) -> list[Tensor]:
        matrix = torch.zeros_like(self.ema)
        for t, grads in enumerate(self.lists.grads):
            matrix[t] = self._vector(grads)
        self.ema = matrix + BETA * (self.ema - matrix)
        return [part.clone() for part in views_of(libmtl_sum(self.ema), self.lists.grads[0])]

    def _vector(self, grads: Sequence[Tensor]) -> Tensor:
        vector, start = torch.zeros(self.lists.P, device=self.gathered_on or self.lists.device), 0
        for grad in grads:
            vector[start : start + grad.numel()] = grad.view(-1)
            start += grad.numel()
        return vector


class LibMTLShipped(LibMTL):
    """The same as it ships: each vector is gathered in host memory and goes back from there."""

    gathered_on = "cpu"


class TightFlatten(Candidate):
    """``cat`` into rows of a matrix that is kept, then ``lerp_``, ``vector_norm``, ``mv``; the list are views."""

    def __init__(self, lists: Lists) -> None:
        super().__init__(lists)
        self.ema, self.matrix = (torch.zeros(lists.T, lists.P, device=lists.device) for _ in range(2))
        self.out = torch.empty(lists.P, device=lists.device)

    def __call__(self) -> list[Tensor]:
        for row, grads in zip(self.matrix, self.lists.grads, strict=True):
            torch.cat([grad.view(-1) for grad in grads], out=row)
        self.ema.lerp_(self.matrix, 1 - BETA)
        torch.mv(self.ema.t(), weights_of(self.ema), out=self.out)
        return views_of(self.out, self.lists.grads[0])


class Foreach(Candidate):
    """``torch._foreach_*`` on the lists as they are: nothing is flattened."""

    def __init__(self, lists: Lists) -> None:
        super().__init__(lists)
        self.rows = [[torch.zeros_like(grad) for grad in grads] for grads in lists.grads]

    def __call__(self) -> list[Tensor]:
        for row, grads in zip(self.rows, self.lists.grads, strict=True):
            torch._foreach_lerp_(row, grads, 1 - BETA)
        return foreach_sum(self.rows)


class Operators(Candidate):
    """The package's: ``ema_update_`` of each list where it lies, then ``combine``; the list are views."""

    def __init__(self, lists: Lists, backend: str) -> None:
        super().__init__(lists)
        layout = FlatLayout([(str(i), grad) for i, grad in enumerate(lists.grads[0])])
        self.ops, self.slots = backends.operators(backend), list(range(len(layout.slots)))
        self.tables = layout.segments, layout.chunks
        device = lists.device
        self.ema, self.sq_norms = torch.zeros(lists.T, layout.P, device=device), torch.zeros(lists.T, device=device)
        self.partials, self.out = torch.zeros(layout.num_chunks, device=device), torch.empty(layout.P, device=device)
        self.norms, self.weights = torch.empty_like(self.sq_norms), torch.empty_like(self.sq_norms)
        self.beta, self.one = torch.tensor(BETA, device=device), torch.tensor(1.0, device=device)
        self.alpha, self.out_sq_norm = torch.empty_like(self.one), torch.empty_like(self.one)
        self.found_inf = torch.zeros((), device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.arrivals = torch.zeros((), dtype=torch.int32, device=device)
        self.views = [slot.view(self.out) for slot in layout.slots]

    def __call__(self) -> list[Tensor]:
        for row, grads, sq_norm in zip(self.ema, self.lists.grads, self.sq_norms, strict=True):
            written = self.partials, sq_norm, self.found_inf, self.arrivals
            self.ops.ema_update_(row, grads, self.slots, *self.tables, self.beta, self.one, None, *written, False)
        results = self.out, self.norms, self.weights, self.alpha, self.out_sq_norm, self.step, self.arrivals
        self.ops.combine(self.ema, self.sq_norms, None, self.found_inf, self.one, "max", 0.0, EPS, False, *results)
        return self.views
