"""What the operators are measured on: buffers, what they must hold afterwards, and copies of as many bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import comparators, shapes
from benchmarks.bandwidth import byte_model
from benchmarks.comparators import EPS, relative_error
from benchmarks.graph_timing import Calls, buffer_sets
from dbmtl_fused._ops import compute_dtype
from dbmtl_fused.layout import FlatLayout

BETA = 0.9
TASKS = (3, 11, 2, 5, 16)
LARGE_BYTES = 2**30
"""A ``T x P`` buffer far beyond any cache."""

COPY_BYTES = 8 * 2**30
"""Of two buffers beyond which they are copied several times instead: memory is for what is measured."""

MEMCPY, COPY_KERNEL = "cudaMemcpyAsync", "copy kernel"
FLOAT32_RTOL, BFLOAT16_RTOL = comparators.RTOL, 1e-2
"""Largest errors allowed, as shares of the largest entry; stochastic rounding is up to one part in 128 off."""

_CHECKED_BYTES = 2**30
"""Of float64, to hold results against at a time."""


class Dtypes(NamedTuple):
    """What a measurement is done in."""

    state: torch.dtype
    grad: torch.dtype  # of the weighted sum, too

    def __str__(self) -> str:
        if self.state == torch.bfloat16:
            return "bf16 state and gradients"
        return "fp32" if self.grad == torch.float32 else "fp32 state, bf16 gradients"

    @property
    def rtol(self) -> float:
        return FLOAT32_RTOL if self == FP32 else BFLOAT16_RTOL

    def bytes(self, operator: str, T: int, P: int) -> int:
        """The least traffic of an operator."""
        return sum(byte_model(operator, T, P, self.state.itemsize, self.grad.itemsize))


FP32 = Dtypes(torch.float32, torch.float32)
BF16_GRADS = Dtypes(torch.float32, torch.bfloat16)
BF16_STATE = Dtypes(torch.bfloat16, torch.bfloat16)


class Matrices:
    """One set of buffers of ``balance_``, ``combine`` and ``gram``: normal numbers, rows of different scale, as tasks'
    are."""

    def __init__(self, T: int, P: int, dtypes: Dtypes, device: torch.device, number: int = 0) -> None:
        random = torch.Generator(device).manual_seed(number)
        scales = torch.logspace(-2, 2, T, device=device).unsqueeze(1)
        self.ema = (scales * torch.randn(T, P, device=device, generator=random)).to(dtypes.state)
        self.grads = (scales * torch.randn(T, P, device=device, generator=random)).to(dtypes.grad)
        self.out = torch.empty(P, dtype=dtypes.grad, device=device)
        compute = compute_dtype(dtypes.state)
        self.beta, self.one = (torch.tensor(value, dtype=compute, device=device) for value in (BETA, 1.0))
        self.seed = _seed(dtypes, device)
        self.norms, self.weights = (torch.empty(T, dtype=compute, device=device) for _ in range(2))
        self.alpha_value, self.out_sq_norm = torch.empty_like(self.one), torch.empty_like(self.one)
        self.found_inf = torch.zeros((), device=device)
        self.step, self.arrivals = (torch.zeros((), dtype=of, device=device) for of in (torch.int64, torch.int32))
        self.products = torch.empty(T, T, dtype=compute, device=device)
        self.sq_norms = torch.linalg.vector_norm(self.ema, dim=1, dtype=compute).square()

    def balance_(self, op: Callable[..., None]) -> None:
        results = self.out, self.norms, self.weights, self.found_inf
        op(self.ema, self.grads, self.beta, self.seed, "max", 0.0, EPS, *results)

    def combine(self, op: Callable[..., None]) -> None:
        results = self.out, self.norms, self.weights, self.alpha_value, self.out_sq_norm, self.step, self.arrivals
        op(self.ema, self.sq_norms, None, self.found_inf, self.one, "max", 0.0, EPS, False, *results)

    def combine_eagerly(self) -> None:
        """``combine`` in torch's own operators: the matrix is read once."""
        norms = self.sq_norms.sqrt()
        torch.mv(self.ema.t(), norms.amax() / (norms + EPS), out=self.out)

    def gram(self, op: Callable[..., None]) -> None:
        op(self.ema, self.products, self.arrivals)

    def gram_eagerly(self) -> None:
        """``gram`` in torch's own operator, which knows nothing of symmetry."""
        torch.mm(self.ema, self.ema.t(), out=self.products)


class Beginning:
    """Buffers of ``begin_step``: losses of different size, as tasks' are, of the tenth step."""

    def __init__(self, T: int, device: torch.device) -> None:
        self.losses = torch.logspace(-2, 2, T, device=device)
        self.scale, self.step = torch.tensor(1024.0, device=device), torch.tensor(9, device=device)
        self.seeds, self.betas = torch.empty_like(self.losses), torch.empty_like(self.losses)
        self.inv_scale, self.found_inf = torch.empty_like(self.scale), torch.empty_like(self.scale)

    def begin_step(self, op: Callable[..., None]) -> None:
        results = self.seeds, self.betas, self.inv_scale, self.found_inf
        op(self.losses, None, self.scale, self.step, BETA, 0.5, 1, EPS, False, *results)

    def error_of(self, op: Callable[..., None]) -> float:
        """Run an operator, its results poisoned."""
        results = self.seeds, self.betas, self.inv_scale
        for of in (*results, self.found_inf):
            of.fill_(torch.nan)
        self.begin_step(op)
        scale, losses = self.scale.double(), self.losses.double()
        exact = scale / (losses + EPS), torch.full_like(losses, BETA / 10**0.5), 1 / scale
        errors = [relative_error(*pair) for pair in zip(results, exact, strict=True)]
        return max(errors) if self.found_inf == 0 else torch.inf


class Exact:
    """What ``balance_`` must make of ``matrices``, in float64, some columns at a time: the largest fill the memory."""

    def __init__(self, matrices: Matrices) -> None:
        self._matrices, self._before = matrices, matrices.ema.clone()
        norms = torch.stack([rows.square().sum(1) for _, rows in self._updated()]).sum(0).sqrt()
        self._weights = norms.max() / (norms + EPS)

    def _updated(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns, and the state there."""
        beta, grads = float(self._matrices.beta), self._matrices.grads
        T, P = grads.shape
        width = max(1, _CHECKED_BYTES // (8 * T))
        for columns in (slice(start, start + width) for start in range(0, P, width)):
            new = grads[:, columns].double().mul_(1 - beta)
            yield columns, new.add_(self._before[:, columns].double(), alpha=beta)

    def error_of(self, op: Callable[..., None]) -> float:
        """Run an operator on the matrices as they were, ``out`` poisoned."""
        self._matrices.ema.copy_(self._before)
        self._matrices.out.fill_(torch.nan)
        self._matrices.balance_(op)
        return self._error(self._matrices.ema, self._matrices.out)

    def error_of_expression(self, candidate: comparators.OneShot) -> float:
        """The same for what has its own copies."""
        out = candidate()
        return self._error(candidate.ema, out)

    def _error(self, ema: Tensor, out: Tensor) -> float:
        """The larger of two errors: of the rows, each by itself as they differ in scale, and of the sum."""
        wrong, largest = (torch.zeros(len(ema) + 1, dtype=torch.float64, device=ema.device) for _ in range(2))
        for columns, rows in self._updated():
            for t, (actual, exact) in enumerate((*zip(ema, rows, strict=True), (out, self._weights @ rows))):
                wrong[t] = torch.maximum(wrong[t], (actual[columns] - exact).abs().max())
                largest[t] = torch.maximum(largest[t], exact.abs().max())
        error = (wrong / largest).max().item()
        return math.inf if math.isnan(error) else error


class RowLists:
    """One set of buffers of ``ema_update_``: a row, and gradients each in memory of its own."""

    def __init__(self, params: Sequence[shapes.Shape], dtypes: Dtypes, device: torch.device, number: int = 0) -> None:
        random = torch.Generator(device).manual_seed(number)
        self.grads = [torch.randn(shape, device=device, generator=random).to(dtypes.grad).div_(8) for shape in params]
        layout = FlatLayout([(str(i), grad) for i, grad in enumerate(self.grads)])
        self.slots, self.P = list(range(len(self.grads))), layout.P
        self.tables = layout.segments, layout.chunks
        self.row = torch.zeros(layout.P, dtype=dtypes.state, device=device)
        self.views = [slot.view(self.row) for slot in layout.slots]
        for view in self.views:
            view.copy_(torch.randn(view.shape, device=device, generator=random))
        compute = compute_dtype(dtypes.state)
        self.beta, self.one = (torch.tensor(value, dtype=compute, device=device) for value in (BETA, 1.0))
        self.seed = _seed(dtypes, device)
        self.partials = torch.zeros(layout.num_chunks, dtype=compute, device=device)
        self.sq_norm, self.found_inf = torch.zeros_like(self.one), torch.zeros((), device=device)
        self.arrivals = torch.zeros((), dtype=torch.int32, device=device)

    def ema_update_(self, op: Callable[..., None]) -> None:
        scalars = self.beta, self.one, self.seed
        written = self.partials, self.sq_norm, self.found_inf, self.arrivals
        op(self.row, self.grads, self.slots, *self.tables, *scalars, *written, False)

    def ema_update_eagerly(self) -> None:
        """``ema_update_`` in torch's own operators: a foreach, and the norm of the row."""
        torch._foreach_lerp_(self.views, self.grads, 1 - BETA)
        self.sq_norm = torch.linalg.vector_norm(self.row).square()


def _seed(dtypes: Dtypes, device: torch.device) -> Tensor | None:
    return torch.tensor(1, device=device) if dtypes.state == torch.bfloat16 else None


class TightEagerMixed(comparators.TightEager):
    """The same for gradients of another dtype than the state, which ``lerp_`` does not take."""

    def __call__(self) -> Tensor:
        self.ema.mul_(self.beta).add_(self.grads, alpha=1 - self.beta)
        norms = torch.linalg.vector_norm(self.ema, dim=1)
        return torch.mv(self.ema.t(), norms.amax() / (norms + EPS), out=self.out)


# --- Yardsticks


def copies(total_bytes: int, device: torch.device) -> dict[str, Calls]:
    """Ways to copy, reading and writing ``total_bytes`` together."""
    times = -(-total_bytes // COPY_BYTES)
    count = max(64, total_bytes // (8 * times) // 64 * 64)
    sources = [torch.randn(count, device=device) for _ in range(buffer_sets(total_bytes, device))]
    pairs = [(source, torch.empty_like(source)) for source in sources]
    found: dict[str, Calls] = {MEMCPY: [functools.partial(target.copy_, source) for source, target in pairs]}
    if device.type == "cuda":
        from benchmarks import stream_kernels

        found[COPY_KERNEL] = [functools.partial(stream_kernels.copy, *pair) for pair in pairs]
    return {name: [functools.partial(_repeat, copy, times) for copy in calls] for name, calls in found.items()}


def _repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


def columns_of(T: int, total_bytes: int) -> int:
    """Columns of the smallest ``T x P`` float32 buffer of at least ``total_bytes`` whose rows are whole kilobytes."""
    return -(-total_bytes // (4 * T * 256)) * 256
