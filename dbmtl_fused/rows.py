"""Where the task gradients of a step go, row by row: the EMA buffer, or without an EMA a running sum.

Both are used the same way: ``begin`` a step, take a task's gradients with ``update``, ``end_task``, and ``finish``
with one flat gradient per ``.grad`` dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dbmtl_fused._ops import compute_dtype
from dbmtl_fused.backends import Operators
from dbmtl_fused.layout import FlatLayout


class Step:
    """The small tensors of one step, fresh each step, so that what users keep stays what it was.

    ``norms``, ``weights`` ``(T,)``, ``alpha_value`` 0-d: results. ``sq_norms`` ``(T,)``, ``found_inf``, ``scale``,
    ``inv_scale`` 0-d: see ``_ops``. ``betas``, ``row_sq_norms``: the 0-d coefficient and squared norm of each row.

    A step takes its gradients in one call of :meth:`take` or in several, of which each task's first decays its row and
    the others add to it.

    :param beta: EMA coefficient, 0-d, of the dtype that is computed in.
    :param taken: How many gradients each task has had; the caller counts, here it is read.
    :param number: ``k``, 0-d int64: rows of bfloat16 draw the random bits of their rounding from it.
    """

    def __init__(self, beta: Tensor, taken: Sequence[int], number: Tensor) -> None:
        T = len(taken)
        self._beta, self.taken = beta, taken
        self.betas: list[Tensor] = [beta] * T
        self.found_inf = torch.zeros((), dtype=torch.float32, device=beta.device)
        self.sq_norms, self.norms, self.weights = (beta.new_empty(T) for _ in range(3))
        self.row_sq_norms = self.sq_norms.unbind()
        self.alpha_value = torch.empty_like(beta)
        self._number = number

    def take(self, tasks: Sequence[int], scale: Tensor, unusable: Tensor) -> None:
        """Begin to take gradients of ``tasks``.

        :param scale: Factor on the gradients that come in and, again, on those that go out, 0-d.
        :param unusable: Those of ``tasks`` whose loss carries no information, shape ``(len(tasks),)``, bool. Their rows
            stay as they are (a coefficient of 1), and the step counts as non-finite.
        """
        for task, beta in zip(tasks, torch.where(unusable, 1, self._beta).unbind(), strict=True):
            if self.taken[task] == 0:
                self.betas[task] = beta
        self.found_inf = self.found_inf.maximum(unusable.any())
        self.scale = scale.to(self._beta.dtype)
        self.inv_scale = self.scale.reciprocal()

    def seeds(self) -> tuple[Tensor, ...]:
        """Of the rounding of each row: no two alike, over all steps."""
        T = len(self.betas)
        return (self._number * T + torch.arange(T, device=self._number.device)).unbind()


class FlatGrads:
    """Memory for the flat gradients that a step hands out.

    On CPUs that of the last step is used again once nobody else holds it (``zero_grad`` has dropped every view): fresh
    pages from the system cost about as much as the weighted sum written into them. On GPUs the caching allocator does
    that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, shape ``(numel,)``, that no tensor handed out earlier can see."""
        kept = self._kept.get((numel, dtype))
        if kept is not None and _holders(kept) == _SOLE_HOLDER:
            return kept
        fresh = torch.empty(numel, dtype=dtype, device=self._device)
        if self._device.type == "cpu":
            self._kept[numel, dtype] = fresh
        return fresh


def _holders(tensor: Tensor) -> int:
    """References to the tensor's storage: by tensors, views of it, and what else shares its memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_SOLE_HOLDER = _holders(torch.empty(1))


class _Rows:
    """What both kinds share: the operators' constant arguments and the per-row workspace."""

    def __init__(
        self, layout: FlatLayout, ops: Operators, alpha: tuple[str, float], eps: float, state_dtype: torch.dtype
    ) -> None:
        self._layout, self._ops, self._alpha, self._eps = layout, ops, alpha, eps
        self._dtype = state_dtype
        self._flat_grads = FlatGrads(layout.device)
        self._partials = self._zeros(layout.num_chunks, dtype=compute_dtype(state_dtype))
        self._arrivals = self._zeros(dtype=torch.int32)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._layout.device)

    def _row(self, task: int) -> Tensor:
        raise NotImplementedError

    def begin(self, step: Step) -> None:
        self._step = step
        self._seeds = step.seeds() if self._dtype is torch.bfloat16 else [None] * len(step.betas)

    def update(self, task: int, slots: Sequence[int], grads: Sequence[Tensor | None], accumulate: bool) -> None:
        """Take gradients of ``task``; see ``ema_update_``. Only the first of several in a step decay the row."""
        step = self._step
        accumulate = accumulate or step.taken[task] > 0
        self._ops.ema_update_(
            self._row(task),
            grads,
            slots,
            self._layout.segments,
            self._layout.chunks,
            step.betas[task],
            step.inv_scale,
            self._seeds[task],
            self._partials,
            step.row_sq_norms[task],
            step.found_inf,
            self._arrivals,
            accumulate,
        )

    def _combine(
        self, rows: Tensor, out: Tensor, tasks: slice, alpha: tuple[str, float], scale: Tensor, accumulate: bool = False
    ) -> None:
        step = self._step
        self._ops.combine(
            rows,
            step.sq_norms[tasks],
            step.found_inf,
            scale,
            *alpha,
            self._eps,
            accumulate,
            out,
            step.norms[tasks],
            step.weights[tasks],
            step.alpha_value,
        )


class EmaRows(_Rows):
    """The ``T x P`` EMA buffer, the only big state: ``(4T + 1) P`` numbers of traffic a step.

    ``buffer`` has shape ``(T, P)``.
    """

    def __init__(
        self, T: int, layout: FlatLayout, ops: Operators, alpha: tuple[str, float], eps: float, state_dtype: torch.dtype
    ) -> None:
        super().__init__(layout, ops, alpha, eps, state_dtype)
        self.buffer = self._zeros(T, layout.P, dtype=state_dtype)
        self._rows = self.buffer.unbind()

    def _row(self, task: int) -> Tensor:
        return self._rows[task]

    def end_task(self, task: int) -> None:
        """Nothing to do: the row stays in the buffer until ``finish``."""

    def finish(self) -> list[Tensor]:
        """The balanced gradient, one flat tensor per group of the layout."""
        outs = []
        for dtype, start, stop in self._layout.groups:
            outs.append(self._flat_grads.take(stop - start, dtype))
            self._combine(self.buffer[:, start:stop], outs[-1], slice(None), self._alpha, self._step.scale)
        torch.autograd.graph.increment_version(self.buffer)  # for graphs that users build on views of it
        return outs


class SumRows(_Rows):
    """Without an EMA no row is needed twice: ``alpha * sum_t g_t / (n_t + eps)`` in two vectors of ``P`` numbers.

    Each task's gradient is gathered into the one scratch row, then added to the sum with weight ``1 / (n_t + eps)``;
    ``alpha`` comes in at the end. With no state to keep, nothing is rounded to its dtype: only :func:`compute_dtype` of
    it matters.
    """

    def __init__(
        self, layout: FlatLayout, ops: Operators, alpha: tuple[str, float], eps: float, state_dtype: torch.dtype
    ) -> None:
        super().__init__(layout, ops, alpha, eps, compute_dtype(state_dtype))
        self._scratch = self._zeros(layout.P, dtype=self._dtype)

    def _row(self, task: int) -> Tensor:
        return self._scratch

    def begin(self, step: Step) -> None:
        super().begin(step)
        self._is_empty = True
        self._sum = self._flat_grads.take(self._layout.P, self._dtype)

    def end_task(self, task: int) -> None:
        """Add the finished row to the sum."""
        one = torch.ones_like(self._step.scale)
        tasks = slice(task, task + 1)
        self._combine(self._scratch[None], self._sum, tasks, ("constant", 1.0), one, accumulate=not self._is_empty)
        self._is_empty = False

    def finish(self) -> list[Tensor]:
        """The balanced gradient, one flat tensor per group of the layout."""
        step = self._step
        empty = self._scratch[:0]
        self._combine(empty.expand(len(step.norms), 0), empty, slice(None), self._alpha, step.scale)
        total = self._sum.mul_(step.alpha_value * step.scale)
        del self._sum
        return [total[start:stop].to(dtype) for dtype, start, stop in self._layout.groups]
