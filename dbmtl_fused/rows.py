"""Where the task gradients of a step go, row by row: the EMA buffer, or without an EMA a running sum.

Both are used the same way: ``begin`` a step, take a task's gradients with ``update``, ``end_task``, and ``finish``
with one flat gradient per ``.grad`` dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dbmtl_fused._ops import compute_dtype
from dbmtl_fused.backends import Operators
from dbmtl_fused.grads import GradMemory
from dbmtl_fused.layout import FlatLayout


class Step:
    """The small tensors of one step, fresh each step, so that what users keep stays what it was.

    ``norms``, ``weights`` ``(T,)``, ``alpha_value`` 0-d, ``out_sq_norms`` (one for each flat gradient): results.
    ``found_inf``, ``scale``, ``inv_scale`` 0-d, ``preference`` ``(T,)`` or None: see ``_ops``. ``betas``: the 0-d
    coefficient of each row, by task. ``number``: of steps taken, which the last operator of this one counts up.

    A step takes its gradients in one call of :meth:`take` or in several, of which each task's first decays its row and
    the others add to it. A task that has nothing to give, or is not active, keeps its row and takes no part.

    :param taken: How many gradients each task has had; the caller counts, here it is read.
    :param number: Steps taken before, 0-d int64: beta is made of it, and the random bits by which bfloat16 is rounded.
    :param beta, beta_sigma: The schedule of the EMA coefficient.
    :param dtype: What is computed in.
    :param preference: Of the tasks, shape ``(T,)``; None: 1 for all.
    :param active: Which tasks take part, shape ``(T,)``, bool; None: all that give something.
    """

    def __init__(
        self,
        taken: Sequence[int],
        number: Tensor,
        beta: float,
        beta_sigma: float,
        dtype: torch.dtype,
        *,
        preference: Tensor | None = None,
        active: Tensor | None = None,
    ) -> None:
        T = len(taken)
        self._schedule, self.number, self.taken, self.active = (beta, beta_sigma), number, taken, active
        self.betas: dict[int, Tensor] = {}
        self._before: tuple[Tensor, dict[int, Tensor]] | None = None  # flag and betas before the last take
        self.norms, self.weights = (torch.empty(T, dtype=dtype, device=number.device) for _ in range(2))
        self.alpha_value, self.inv_scale = (self.norms.new_empty(()) for _ in range(2))
        self.found_inf = torch.empty((), dtype=torch.float32, device=number.device)
        self.out_sq_norms: list[Tensor] = []
        self.preference = preference
        if active is not None:
            self.preference = (torch.ones_like(self.norms) if preference is None else preference).where(active, 0)

    def take(
        self,
        begin_step: Callable[..., None],
        tasks: Sequence[int],
        losses: Tensor,
        scale: Tensor,
        *,
        active: Tensor | None = None,
        micro_batches: int = 1,
        log_eps: float | None = None,
    ) -> Tensor:
        """Begin to take gradients of ``tasks``; returns what the backward passes of their losses start from.

        A loss that carries no information leaves its row as it is, and the step counts as non-finite.

        :param begin_step: The operator; ``losses``, ``scale`` and so on are of ``tasks`` alone and as it wants them.
        :param scale: Factor on the gradients that come in and, again, on those that go out.
        """
        self._before = (self.found_inf.clone(), dict(self.betas)) if self.betas else None
        seeds, betas = torch.empty_like(losses), self.norms.new_empty(len(tasks))
        begin_step(
            losses,
            active,
            scale,
            self.number,
            *self._schedule,
            micro_batches,
            log_eps,
            bool(self.betas),  # a flag raised before stays
            seeds,
            betas,
            self.inv_scale,
            self.found_inf,
        )
        for task, beta in zip(tasks, betas.unbind(), strict=True):
            self.betas.setdefault(task, beta)
        self.scale = scale.to(self.norms.dtype)
        return seeds

    def undo_take(self) -> None:
        """Forget the last :meth:`take`, none of whose gradients has come."""
        if self._before is not None:
            self.found_inf, self.betas = self._before

    def leave_out(self, tasks: Sequence[int]) -> None:
        """``tasks`` have had nothing."""
        if tasks:
            self.preference = torch.ones_like(self.norms) if self.preference is None else self.preference.clone()
        for task in tasks:
            assert self.preference is not None
            self.preference[task].zero_()  # assigning a number to an element would wait for the device

    def rounding_seeds(self) -> tuple[Tensor, ...]:
        """Return one seed per row, unique over rows and steps."""
        T = len(self.taken)
        return (self.number * T + torch.arange(T, device=self.number.device)).unbind()

    def grad_norm(self) -> Tensor:
        """Norm of the balanced gradient, not scaled, 0-d; 0 if the scale was."""
        norm = torch.stack(self.out_sq_norms).sum().sqrt() / self.scale.abs()
        return norm.where(self.scale != 0, 0)


class _Rows:
    """What both kinds share: the operators' constant arguments and the per-row workspace.

    ``sq_norms``: squared norm of each row, shape ``(T,)``.
    """

    def __init__(
        self, T: int, layout: FlatLayout, ops: Operators, alpha: tuple[str, float], eps: float, state_dtype: torch.dtype
    ) -> None:
        self._layout, self._ops, self._alpha, self._eps = layout, ops, alpha, eps
        self._dtype, self._compute_dtype = state_dtype, compute_dtype(state_dtype)
        self._memory = GradMemory(layout.device)
        self._partials = self._zeros(layout.num_chunks, dtype=self._compute_dtype)
        self._arrivals = self._zeros(dtype=torch.int32)
        self.sq_norms = self._zeros(T, dtype=self._compute_dtype)
        self._row_sq_norms = self.sq_norms.unbind()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ops": None, "_memory": GradMemory(self._layout.device)}

    def complete(self, ops: Operators) -> None:
        """Complete a copy: it has no operators, and its views are not those of its tensors."""
        self._ops, self._row_sq_norms = ops, self.sq_norms.unbind()

    def set_weighting(self, alpha: tuple[str, float], eps: float) -> None:
        """Replace ``alpha``, as the operators take it, and ``eps``."""
        self._alpha, self._eps = alpha, eps

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._layout.device)

    def _row(self, task: int) -> Tensor:
        raise NotImplementedError

    def begin(self, step: Step) -> None:
        """Start a step."""
        self._step = step
        self._seeds = step.rounding_seeds() if self._dtype is torch.bfloat16 else None
        self._seed_of, self._part = (-1, -1, -1), 0

    def _seed(self, task: int) -> Tensor | None:
        """Return the seed of a row's rounding: another one for every micro-batch, and for every further part of a
        gradient, because errors of the same random bits would add up."""
        if self._seeds is None:
            return None
        micro_batch = self._step.taken[task]
        if (task, micro_batch, self._part) != self._seed_of:
            self._seed_of, self._last_seed = (task, micro_batch, self._part), self._seeds[task]
            if offset := (micro_batch << 40) + (self._part << 52):
                self._last_seed = self._seeds[task] + offset
        return self._last_seed

    def update(self, task: int, slots: Sequence[int], grads: Sequence[Tensor | None], accumulate: bool) -> None:
        """Take gradients of ``task``; see ``ema_update_``. Only the first of several in a step decay the row."""
        step = self._step
        self._part = self._part + 1 if accumulate else 0
        accumulate = accumulate or step.taken[task] > 0
        self._ops.ema_update_(
            self._row(task),
            grads,
            slots,
            self._layout.segments,
            self._layout.chunks,
            step.betas[task],
            step.inv_scale,
            self._seed(task),
            self._partials,
            self._row_sq_norms[task],
            step.found_inf,
            self._arrivals,
            accumulate,
        )

    def _combine(
        self,
        rows: Tensor,
        out: Tensor,
        tasks: slice,
        alpha: tuple[str, float],
        scale: Tensor,
        out_sq_norm: Tensor,
        *,
        accumulate: bool = False,
        is_last: bool = False,
    ) -> None:
        """Weights of ``tasks``, and the weighted sum of ``rows``; the last one of a step counts it."""
        step = self._step
        self._ops.combine(
            rows,
            self.sq_norms[tasks],
            None if step.preference is None else step.preference[tasks],
            step.found_inf,
            scale,
            *alpha,
            self._eps,
            accumulate,
            out,
            step.norms[tasks],
            step.weights[tasks],
            step.alpha_value,
            out_sq_norm,
            step.number if is_last else None,
            self._arrivals,
        )


class EmaRows(_Rows):
    """The ``T x P`` EMA buffer, the only big state: ``(4T + 1) P`` numbers of traffic a step.

    ``buffer`` has shape ``(T, P)``.
    """

    def __init__(
        self, T: int, layout: FlatLayout, ops: Operators, alpha: tuple[str, float], eps: float, state_dtype: torch.dtype
    ) -> None:
        super().__init__(T, layout, ops, alpha, eps, state_dtype)
        self.buffer = self._zeros(T, layout.P, dtype=state_dtype)
        self._rows = self.buffer.unbind()

    def complete(self, ops: Operators) -> None:
        """Complete a copy."""
        super().complete(ops)
        self._rows = self.buffer.unbind()

    def _row(self, task: int) -> Tensor:
        return self._rows[task]

    def clear(self, task: int | None = None) -> None:
        """Back to zero: one row, or all."""
        rows = slice(None) if task is None else task
        self.buffer[rows].zero_()
        self.sq_norms[rows].zero_()

    def measure(self) -> None:
        """Bring ``sq_norms`` up to date after the buffer was written to: a step in which no task is active."""
        T, slots = len(self._rows), range(len(self._layout.slots))
        step = Step([0] * T, self._zeros(dtype=torch.int64), 0.0, 0.0, self._compute_dtype)
        losses, nobody = self._zeros(T, dtype=self._compute_dtype), self._zeros(T, dtype=torch.bool)
        step.take(self._ops.begin_step, range(T), losses, losses.new_ones(()), active=nobody)
        self.begin(step)
        for task in range(T):
            self.update(task, slots, [None] * len(slots), accumulate=False)

    def end_task(self, task: int) -> None:
        """Nothing to do: the row stays in the buffer until ``finish``."""

    def finish(self, slots: Sequence[int]) -> list[Tensor]:
        """Return the balanced gradient of each of ``slots``, which any task has reached; at least one."""
        step, grads = self._step, []
        blocks = self._layout.blocks(slots)
        for block in blocks:
            columns, sq_norm = self.buffer[:, block.start : block.stop], torch.empty_like(step.alpha_value)
            out = self._memory.take(block)
            self._combine(columns, out, slice(None), self._alpha, step.scale, sq_norm, is_last=block is blocks[-1])
            grads += self._memory.hand_out(out, block)
            step.out_sq_norms.append(sq_norm)
        torch.autograd.graph.increment_version(self.buffer)  # for graphs that users build on views of it
        return grads

    def gram(self) -> Tensor:
        """Inner products of all pairs of rows, shape ``(T, T)``."""
        T = len(self._rows)
        out = torch.empty(T, T, dtype=self._compute_dtype, device=self._layout.device)
        self._ops.gram(self.buffer, out, self._arrivals)
        return out


class SumRows(_Rows):
    """Without an EMA no row is needed twice: ``alpha * sum_t g_t / (n_t + eps)`` in two vectors of ``P`` numbers.

    Each task's gradient is gathered into the one scratch row, then added to the sum with weight ``1 / (n_t + eps)``;
    ``alpha`` comes in at the end. With no state to keep, nothing is rounded to its dtype: only :func:`compute_dtype` of
    it matters.
    """

    def __init__(
        self, T: int, layout: FlatLayout, ops: Operators, alpha: tuple[str, float], eps: float, state_dtype: torch.dtype
    ) -> None:
        super().__init__(T, layout, ops, alpha, eps, compute_dtype(state_dtype))
        self._scratch, self._sum = (self._zeros(layout.P, dtype=self._dtype) for _ in range(2))
        self._one = torch.ones((), dtype=self._dtype, device=layout.device)

    def _row(self, task: int) -> Tensor:
        return self._scratch

    def begin(self, step: Step) -> None:
        """Start a step."""
        super().begin(step)
        self.sq_norms.zero_()  # of tasks that stay away
        self._is_empty = True
        step.out_sq_norms = [torch.empty_like(step.alpha_value)]

    def end_task(self, task: int) -> None:
        """Add the finished row to the sum."""
        tasks, (sq_norm,) = slice(task, task + 1), self._step.out_sq_norms
        alpha, add = self._alpha if self._alpha[0] == "none" else ("constant", 1.0), not self._is_empty
        self._combine(self._scratch[None], self._sum, tasks, alpha, self._one, sq_norm, accumulate=add)
        self._is_empty = False

    def finish(self, slots: Sequence[int]) -> list[Tensor]:
        """Return the balanced gradient of each of ``slots``, which any task has reached."""
        step = self._step
        # Where a coefficient of 1 kept gradients out, the scratch row still held the task before.
        betas = [step.betas.get(task, self._one) for task in range(len(step.norms))]
        self.sq_norms.masked_fill_(torch.stack(betas) == 1, 0)
        empty = self._scratch[:0]
        unused = torch.empty_like(step.alpha_value)
        no_columns = empty.expand(len(step.norms), 0)
        self._combine(no_columns, empty, slice(None), self._alpha, step.scale, unused, is_last=True)
        factor = step.alpha_value * step.scale
        step.out_sq_norms[0] *= factor.square()
        grads = []
        for block in self._layout.blocks(slots):
            memory = self._memory.take(block)
            torch.mul(self._sum[block.start : block.stop], factor, out=memory)
            grads += self._memory.hand_out(memory, block)
        return grads
