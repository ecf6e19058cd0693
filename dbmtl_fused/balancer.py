"""``DBMTL``: dual-balancing multi-task learning for any training loop and optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbmtl_fused import backends
from dbmtl_fused._ops import STATE_DTYPES, compute_dtype
from dbmtl_fused.capture import BucketCapture, Capture, GradCapture
from dbmtl_fused.checkpoint import check_keys, check_shapes
from dbmtl_fused.engine import backward_pass, balanced_loss
from dbmtl_fused.functional import alpha_arguments, check_finite_float
from dbmtl_fused.guards import Guard
from dbmtl_fused.layout import FlatLayout, named_shared_parameters
from dbmtl_fused.losses import TaskLosses
from dbmtl_fused.rows import EmaRows, Step, SumRows
from dbmtl_fused.schedule import BetaSchedule
from dbmtl_fused.tasks import Losses, check_active, preferences_of, task_names_of, tasks_of
from dbmtl_fused.window import Window, check_accumulation_steps

CPU_BUCKET_BYTES = 1 << 20
"""Default bucket on CPUs: gradients are used while they are in the cache, and malloc reuses the same warm pages."""


class DBMTL:
    """Balances task gradients on shared parameters: log of each loss, then each task's gradient EMA at one norm.

    Algorithm 1 of DB-MTL (Lin et al., Neural Networks 2025, arXiv 2308.12029). With losses ``l_t`` of tasks ``t =
    1..T``, shared parameters ``θ`` (``P`` numbers) and step ``k = 1, 2, ...``::

        g_t    = ∇_θ log(l_t + log_eps)
        m_t    = β_k m_t + (1 - β_k) g_t            β_k = beta / k**beta_sigma, m_t starts at 0
        n_t    = norm of m_t,   α = max_t n_t
        θ.grad = Σ_t α / (n_t + eps) m_t

    Parameters that are not shared (heads) get the plain gradient of ``Σ_t log(l_t + log_eps)``. Gradients accumulate
    into ``.grad`` as in every backward pass.

    Every backward pass runs once per task over the shared graph; BatchNorm and dropout run once, in your forward.

    :param shared: The shared parameters: a Module, ``(name, tensor)`` pairs, or tensors (then named ``"0"``, ``"1"``,
        ...). Tied ones count once. Those that do not require grad now are left out.
    :param num_tasks: ``T``; or give
    :param task_names: the tasks' names, the keys of losses given as a dict (default ``"0"``, ``"1"``, ...).
    :param beta: EMA coefficient in ``[0, 1)``. 0 keeps no EMA and no ``T x P`` buffer.
    :param beta_sigma: Decay of the EMA coefficient, >= 0.
    :param alpha: ``"max"``, ``"min"``, ``"mean"``, ``"median"`` of the norms, a positive number, or None: no magnitude
        balancing (weights 1).
    :param preference: How much each task counts, one number >= 0 per task or a dict by task name: a factor on its
        weight after normalisation (a factor on the loss would cancel). A task with 0 takes no part in ``alpha`` and in
        the sum. None: 1 for all.
    :param log_losses: Whether losses are balanced by their log. With ``alpha=None, beta=0`` only the log is left;
        without the log too it is equal weighting, the plain sum of losses: both take one backward pass.
    :param eps: Added to norms, > 0.
    :param log_eps: Added to losses under the log, > 0.
    :param state_dtype: dtype of the EMA: float32, float64, or bfloat16, which halves the buffer and is rounded
        stochastically (arithmetic stays in float32). None: float64 if any shared parameter is float64, else float32.
    :param drop_ema_below: Free the buffer once ``β_k`` is below this: late in a training, each step's gradients speak
        for themselves, as with ``beta=0``. None: never.
    :param bucket_bytes: None gathers gradients from ``.grad`` after each task's backward pass; ``n`` takes them on
        their way there, in buckets of at least ``n`` bytes, of which one is alive at a time; on a GPU that takes shared
        parameters that are all used on one stream. ``"auto"``: 1 MiB on CPUs, else None.
    :param backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"``, ``"reference"``. See ``python -m dbmtl_fused
        info``.
    :raises TypeError: If an argument or a shared parameter is of a kind that is not supported.
    :raises ValueError: If an argument's value is not allowed.
    :raises RuntimeError: If the requested backend cannot run here.

    Attributes after a step, as fresh device tensors (reading them is what waits for the device): ``norms`` ``(T,)``,
    ``weights`` ``(T,)``, ``alpha_value`` 0-d, and ``grad_norm``. With ``beta=0, alpha=None`` norms are not measured and
    NaN. ``preference`` ``(T,)`` may be written to between steps.

    .. note:: A task without a loss (None, or a key that is not there) keeps its row of the EMA as it is, has a weight
        of 0 and does not count for ``alpha``. ``k`` goes on for all.

    .. note:: A non-finite gradient entry leaves its EMA entry as it was (a non-finite loss: its whole row), turns
        the whole shared ``.grad`` into NaN, so that a gradient scaler or a guard in your loop sees it, and does not
        advance ``k``. Finite entries of that step have advanced.
    """

    def __init__(
        self,
        shared: torch.nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        *,
        num_tasks: int | None = None,
        task_names: Sequence[str] | None = None,
        beta: float = 0.9,
        beta_sigma: float = 0.5,
        alpha: str | float | None = "max",
        preference: Sequence[float] | Mapping[str, float] | None = None,
        log_losses: bool = True,
        eps: float = 1e-8,
        log_eps: float = 1e-8,
        state_dtype: torch.dtype | None = None,
        drop_ema_below: float | None = None,
        bucket_bytes: int | str | None = "auto",
        backend: str = "auto",
    ) -> None:
        self.task_names = task_names_of(num_tasks, task_names)
        self._schedule = BetaSchedule(beta, beta_sigma, drop_ema_below)
        check_finite_float("eps", eps, above=0.0)
        check_finite_float("log_eps", log_eps, above=0.0)
        self.beta, self.beta_sigma = beta, beta_sigma
        self.log_eps = log_eps if log_losses else None
        alpha_mode = alpha_arguments(alpha)
        preferences = preferences_of(preference, self.task_names)

        named = named_shared_parameters(shared)
        left_out = [(name, p) for name, p in named if not p.requires_grad]
        named = [(name, p) for name, p in named if p.requires_grad]
        self.layout = FlatLayout(named)
        self._params = [named[i][1] for i in self.layout.order]
        self._guard = Guard(self.layout, self._params, left_out)
        self._state_dtype = self._checked_state_dtype(state_dtype)
        self._bucket_bytes = self._checked_bucket_bytes(bucket_bytes)
        self.backend = backends.resolve(backend, self.layout.device)

        self._ops = backends.operators(self.backend)
        arguments = self.layout, self._ops, alpha_mode, eps, self._state_dtype
        self._new_ema_rows = partial(EmaRows, self.num_tasks, *arguments)
        self._new_sum_rows = partial(SumRows, self.num_tasks, *arguments)
        self._is_plain_sum = alpha is None and preference is None  # without an EMA: one ordinary backward pass
        self._rows: EmaRows | SumRows | None = self._new_ema_rows() if beta > 0 else self._rows_without_ema()
        self.preference: Tensor | None = None
        if preferences is not None:
            dtype = compute_dtype(self._state_dtype)
            self.preference = torch.tensor(preferences, dtype=dtype, device=self.layout.device)
        self._step = torch.zeros((), dtype=torch.int64, device=self.layout.device)
        self._one = torch.ones((), dtype=compute_dtype(self._state_dtype), device=self.layout.device)
        self._all_shared_graphs = False
        self.reset()

    @property
    def num_tasks(self) -> int:
        """``T``."""
        return len(self.task_names)

    @property
    def step(self) -> Tensor:
        """Steps taken so far, 0-d int64 on the device; a copy."""
        return self._step.clone()

    @property
    def ema(self) -> dict[str, Tensor]:
        """EMA of the task gradients by parameter name, as ``(T, *shape)`` views of the buffer; empty without one."""
        if not isinstance(self._rows, EmaRows):
            return {}
        return {slot.name: slot.view(self._rows.buffer) for slot in self.layout.slots}

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the balanced shared gradient of the last step, 0-d: as ``clip_grad_norm_`` would find it in ``.grad``
        if that was empty before, without another pass. Not in the units of a gradient scaler."""
        return self.alpha_value.new_full((), torch.nan) if self._last is None else self._last.grad_norm()

    @torch.no_grad()
    def gram(self) -> Tensor:
        """Inner products of the tasks' rows of the EMA, shape ``(T, T)``, in one pass over the buffer.

        :raises RuntimeError: If there is no EMA.
        """
        rows = self._rows
        if rows is None or isinstance(rows, SumRows):
            raise RuntimeError("gram() compares the rows of the EMA, and there is none (beta=0, or dropped)")
        with self._no_autocast():
            return rows.gram()

    def cosine_similarity(self) -> Tensor:
        """Cosines of the angles between the tasks' rows of the EMA, shape ``(T, T)``; 0 where a row is zero.

        :raises RuntimeError: If there is no EMA.
        """
        gram = self.gram()
        norms = gram.diagonal().sqrt()
        return (gram / (norms[:, None] * norms)).where(gram != 0, 0).clamp(-1, 1)

    def log_dict(self, prefix: str = "dbmtl/") -> dict[str, Tensor]:
        """What to watch, by name, for TensorBoard, W&B and the like: each task's norm and weight, alpha and the norm of
        the balanced gradient; 0-d device tensors of the last step.
        """
        logged = {"alpha": self.alpha_value, "grad_norm": self.grad_norm}
        for name, norm, weight in zip(self.task_names, self.norms.unbind(), self.weights.unbind(), strict=True):
            logged |= {f"norm/{name}": norm, f"weight/{name}": weight}
        return {prefix + name: value for name, value in logged.items()}

    def reset(self, task: str | None = None) -> None:
        """Forget everything: EMA at 0, ``k`` at 0. Or only the EMA of one task.

        :param task: Its name; None: all.
        :raises ValueError: If no task has this name.
        :raises RuntimeError: If one task is to be reset in the middle of an accumulation window.
        """
        if task is not None:
            self._reset_task(task)
            return
        self._step.zero_()
        self._schedule.restart()
        if self.beta > 0:
            self._ema_rows().clear()
        self._reached = [False] * len(self._params)  # by any task, ever
        self._failure: str | None = None
        self._window: Window | None = None
        self._forget_results()

    def _forget_results(self) -> None:
        self._last: Step | None = None
        dtype, device = compute_dtype(self._state_dtype), self.layout.device
        unmeasured = torch.full((self.num_tasks,), torch.nan, dtype=dtype, device=device)
        self.norms, self.weights, self.alpha_value = unmeasured, unmeasured.clone(), unmeasured[0].clone()

    def backward(
        self,
        losses: Losses,
        *,
        active: Tensor | None = None,
        accumulation_steps: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
        overwrite: bool = False,
        retain_graph: bool = False,
    ) -> None:
        """Run the ``T`` backward passes of ``losses``, take a step of the EMA and accumulate gradients into ``.grad``.

        The graph of each task is freed as soon as no later task needs it.

        :param losses: One loss per task: a sequence in task order, a dict by task name, or a tensor of shape ``(T,)``.
            None or a missing key: this task is not there this time.
        :param active: Which tasks are there, shape ``(T,)``, bool, on the balancer's device, where it is read: for who
            does not know on the host, and for captured graphs. The losses of the others are not looked at, and their
            backward passes start from 0: their heads get zeros, unless 0 times the derivative of such a loss is NaN.
        :param accumulation_steps: ``M`` micro-batches make one step: ``g_t`` is the mean of their gradients of the log
            of the loss (do not divide the losses: that cancels in the log). Shared ``.grad`` is written when every task
            has had ``M``; no more memory is needed. Tasks may come one by one, as dicts of some of them, so that each
            graph is freed at once. A window that stays short ends with :meth:`flush`.
        :param scaler: Of fp16 training: scales what goes through the graph (the *log*-losses: before the log a scale
            would cancel) and ``.grad``, so that its ``unscale_``, ``step`` and ``update`` work as usual. The EMA gets
            gradients unscaled.
        :param overwrite: Replace the shared parameters' ``.grad`` instead of adding to it.
        :param retain_graph: Keep the graphs for further backward passes.
        :raises TypeError, ValueError: If an argument does not fit; nothing has changed then.
        :raises RuntimeError: If the balancer cannot be used (stale, DDP, an earlier failure), or a task's backward
            pass fails or reaches no shared parameter. In the last two cases shared ``.grad`` is unchanged and
            ``reset()`` or ``load_state_dict()`` must follow.
        """
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
        self._prepare()
        tasks, task_losses = self._task_losses(losses, active, accumulation_steps)
        scale = self._one.to(task_losses.values.dtype)
        if scaler is not None:
            scale = scaler.scale(scale)
        if self._rows is None:
            self._plain_backward(tasks, task_losses, scale, active, overwrite, retain_graph, accumulation_steps)
        else:
            grads = self.balanced_grads(
                task_losses,
                scale,
                tasks=tasks,
                active=active,
                accumulation_steps=accumulation_steps,
                retain_graph=retain_graph,
            )
            self._accumulate(grads, overwrite)

    def flush(self, *, overwrite: bool = False) -> None:
        """End an accumulation window that stays short, as at the end of an epoch, and take its step.

        What did not come counts as zero: means are still over ``accumulation_steps``. Where the smaller number is known
        before the window begins, give that instead. A task that had nothing at all takes no part. Without a window that
        has begun, nothing happens.

        :param overwrite: As in :meth:`backward`.
        :raises RuntimeError: If the balancer cannot be used, as in :meth:`backward`.
        """
        if self._window is None:
            return
        self._check_usable()
        if self._rows is None:
            self._end_plain_step()
        else:
            self._accumulate(self._finish_step(), overwrite)

    def __call__(
        self,
        losses: Losses,
        *,
        active: Tensor | None = None,
        accumulation_steps: int | None = None,
    ) -> Tensor:
        """A loss for loops that call ``loss.backward()`` themselves: ``Σ_t log(l_t + log_eps)``, 0-d.

        Its backward pass runs the ``T`` backward passes and returns the balanced shared gradients to autograd; scaling
        the loss scales them and the heads' gradients, not the EMA. Heads are reached by ``loss.backward()`` only, not
        by ``backward(inputs=...)`` or ``autograd.grad``. Under ``no_grad`` it is just the value.

        :param losses, active, accumulation_steps: As in :meth:`backward`. The value is that of these losses alone;
            gradients are divided by the number of micro-batches.
        :raises RuntimeError: In backward: with ``create_graph=True``, and when run a second time.
        """
        if not torch.is_grad_enabled():
            return self._task_losses(losses, active, accumulation_steps, need_graph=False)[1].value()
        self._prepare()
        tasks, task_losses = self._task_losses(losses, active, accumulation_steps)
        if self._rows is None:
            return self._plain_loss(tasks, task_losses, active, accumulation_steps)
        grads = partial(self.balanced_grads, tasks=tasks, active=active, accumulation_steps=accumulation_steps)
        return balanced_loss(grads, task_losses, self._params)

    @torch.no_grad()
    def balanced_grads(
        self,
        losses: TaskLosses,
        scale: Tensor,
        *,
        tasks: Sequence[int],
        active: Tensor | None,
        accumulation_steps: int | None,
        retain_graph: bool,
        inputs: Sequence[Tensor] | None = None,
    ) -> list[Tensor | None]:
        """Run the backward passes of ``losses`` and, if that completes it, a step of the EMA.

        :param scale: Factor on all gradients that come out, not on those that go into the EMA, 0-d.
        :param tasks: Whose losses they are.
        :param active, accumulation_steps: As in :meth:`backward`.
        :param retain_graph: Keep the graphs.
        :param inputs: The only leaves to reach; None: all.
        :returns: The balanced gradient of each shared parameter, in the layout's order; None where none is to be
            assigned: frozen parameters, those that no task has ever reached, and all of them until the step is
            complete.
        """
        rows = self._rows
        assert rows is not None, "a plain sum has no balanced gradients"
        window = self._open_window(tasks, accumulation_steps)
        keep = [retain_graph or shared for shared in self._shared_graphs(losses)]
        self._task = tasks[0]
        try:
            if window.step is None:
                window.step = self._new_step(window, active)
                rows.begin(window.step)
            seeds = self._seeds(window.step, tasks, losses, scale, window.size)
            with self._capture() as capture:
                for task, root, seed, kept in zip(tasks, losses.roots, seeds, keep, strict=True):
                    self._task = task
                    backward_pass(root, seed, retain_graph=kept, inputs=inputs)
                    with self._no_autocast():
                        reached = capture.finish_task()
                        self._note_reached(task, reached)
                        rows.end_task(task)
                    window.taken[task] += 1
        except BaseException as error:
            name = self.task_names[self._task]
            self._failure = f"the backward pass of task {name!r} failed ({type(error).__name__}: {error})"
            raise
        return self._finish_step() if window.is_complete() else [None] * len(self._params)

    @torch.no_grad()
    def _finish_step(self) -> list[Tensor | None]:
        """End the window: balance what it got."""
        rows, window = self._rows, self._window
        assert rows is not None
        assert window is not None
        assert window.step is not None
        step, self._window = window.step, None
        try:
            with self._no_autocast():
                step.leave_out(window.absent())
                flats = rows.finish()
        except BaseException as error:
            self._failure = f"the balancing of its last step failed ({type(error).__name__}: {error})"
            raise
        self.norms, self.weights, self.alpha_value = step.norms, step.weights, step.alpha_value
        self._last = step
        return self._views(flats)

    def _task_losses(
        self, losses: Losses, active: Tensor | None, accumulation_steps: int | None, need_graph: bool = True
    ) -> tuple[list[int], TaskLosses]:
        """The tasks that ``losses`` are of, and the losses, checked against the window they fall into."""
        if accumulation_steps is not None:
            self._check_accumulation(accumulation_steps, active)
        if active is not None:
            check_active(active, self.num_tasks, self.layout.device)
            active = active.contiguous()
        tasks, present = tasks_of(losses, self.task_names)
        if self._window is not None and need_graph:
            self._window.check(tasks, accumulation_steps)
        names = [self.task_names[task] for task in tasks]
        if active is not None and len(tasks) < self.num_tasks:
            active = torch.stack([active[task] for task in tasks])
        device = self.layout.device
        return tasks, TaskLosses(present, names, self.log_eps, device, active=active, need_graph=need_graph)

    def _check_accumulation(self, accumulation_steps: int, active: Tensor | None) -> None:
        check_accumulation_steps(accumulation_steps)
        if active is not None:
            raise ValueError(
                "active must be None with accumulation_steps: within a window, give the losses of the tasks that are "
                "there"
            )
        lacks_buffer = isinstance(self._rows, SumRows) or (self._schedule.ends and not self._is_plain_sum)
        if accumulation_steps > 1 and lacks_buffer:
            option = "drop_ema_below" if self._schedule.ends else "beta=0"
            raise ValueError(
                f"accumulation_steps must be 1 with {option}, got {accumulation_steps}: without an EMA there is no "
                "buffer in which each task's gradients could be added up"
            )

    def _open_window(self, tasks: Sequence[int], accumulation_steps: int | None) -> Window:
        """The window that has begun, or a new one."""
        if self._window is None:
            self._window = Window(self.task_names, accumulation_steps)
        self._window.check(tasks, accumulation_steps)
        return self._window

    def _prepare(self) -> None:
        """Before the losses of a call are looked at: raise if they could not be balanced, and let go of an EMA whose
        time is over."""
        self._check_usable()
        if self._window is None and isinstance(self._rows, EmaRows) and self._schedule.is_over(self._step):
            self._rows = self._rows_without_ema()

    def _rows_without_ema(self) -> SumRows | None:
        return None if self._is_plain_sum else self._new_sum_rows()

    def _ema_rows(self) -> EmaRows:
        """The buffer; a new one if it has been dropped."""
        if not isinstance(self._rows, EmaRows):
            self._rows = self._new_ema_rows()
        return self._rows

    def _reset_task(self, task: str) -> None:
        if task not in self.task_names:
            raise ValueError(f"task must be one of {self.task_names}, got {task!r}")
        if self._window is not None:
            raise RuntimeError("one task cannot be reset in the middle of an accumulation window; flush() it first")
        if isinstance(self._rows, EmaRows):
            self._rows.clear(self.task_names.index(task))

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to continue bit for bit, by parameter name and in logical order.

        ``{"ema": {name: (T, *shape)}, "step": int64, "reached": [name, ...], "task_names": [name, ...]}``. As in an
        optimizer's state, ``ema`` holds views of the live buffer. It is empty without a buffer.

        :raises RuntimeError: In the middle of an accumulation window.
        """
        if self._window is not None:
            raise RuntimeError(
                "the state in the middle of an accumulation window cannot be saved; save after its last backward(), or "
                "flush() first"
            )
        names = (slot.name for slot in self.layout.slots)
        return {
            "ema": self.ema,
            "step": self.step,
            "reached": [name for name, reached in zip(names, self._reached, strict=True) if reached],
            "task_names": list(self.task_names),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a ``state_dict``, from whatever device, dtype and memory format.

        :raises ValueError: If it is of other tasks or parameters; the message names what differs, and nothing has
            changed.
        """
        check_keys(state_dict, self.task_names)
        loaded, step = state_dict["ema"], torch.as_tensor(state_dict["step"])
        has_ema = self.beta > 0 and not (not loaded and self._schedule.has_ended(int(step)))
        check_shapes(loaded, self.num_tasks, self.layout.slots if has_ema else [])
        if has_ema:
            rows = self._ema_rows()
            for name, view in self.ema.items():
                view.copy_(loaded[name])
            rows.measure()
        else:
            self._rows = self._rows_without_ema()
        self._step.copy_(step)
        self._schedule.restart(int(step))
        reached = set(state_dict["reached"])
        self._reached = [slot.name in reached for slot in self.layout.slots]
        self._failure = self._window = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DBMTL:
        if not all(id(p) in memo for p in self._params):
            raise RuntimeError(
                "a DBMTL balancer cannot be deep-copied without its model: the copy would balance parameters of no "
                "model; copy both at once, copy.deepcopy((model, balancer)), or build a new one and load_state_dict()"
            )
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return copied

    def _checked_state_dtype(self, state_dtype: torch.dtype | None) -> torch.dtype:
        if state_dtype is None:
            return self.layout.state_dtype
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be None or one of {STATE_DTYPES}, got {state_dtype}")
        return state_dtype

    def _checked_bucket_bytes(self, bucket_bytes: int | str | None) -> int | None:
        if bucket_bytes == "auto":
            return CPU_BUCKET_BYTES if self.layout.device.type == "cpu" else None
        if bucket_bytes is not None and (not isinstance(bucket_bytes, int) or bucket_bytes <= 0):
            raise ValueError(f'bucket_bytes must be "auto", None or a positive integer, got {bucket_bytes!r}')
        return bucket_bytes

    def _check_usable(self) -> None:
        """Raise if a step now would be wrong, before anything has changed."""
        if self._failure:
            raise RuntimeError(
                f"the balancer's state is incomplete: {self._failure}; call reset() or load_state_dict() before the "
                "next step"
            )
        self._guard.check()

    def _new_step(self, window: Window, active: Tensor | None) -> Step:
        beta = self.beta if isinstance(self._rows, EmaRows) else 0.0
        dtype, preference = compute_dtype(self._state_dtype), self.preference
        return Step(window.taken, self._step, beta, self.beta_sigma, dtype, preference=preference, active=active)

    def _seeds(
        self, step: Step, tasks: Sequence[int], losses: TaskLosses, scale: Tensor, micro_batches: int
    ) -> list[Tensor]:
        """What each task's backward pass starts from."""
        options: dict[str, Any] = {"active": losses.active, "log_eps": self.log_eps}
        seeds = step.take(self._ops.begin_step, tasks, losses.values, scale, micro_batches=micro_batches, **options)
        return losses.of_roots(seeds)

    def _shared_graphs(self, losses: TaskLosses) -> list[bool]:
        """Which tasks' graphs must outlive their backward pass.

        Where all tasks but the last shared theirs once, the walk over the graph is not repeated: keeping a graph
        needlessly costs memory until the losses die, no more.
        """
        if not self._all_shared_graphs or len(losses.roots) < self.num_tasks:
            shared = losses.shared_with_later()
            self._all_shared_graphs = len(shared) == self.num_tasks and all(shared[:-1])
            return shared
        return [True] * (self.num_tasks - 1) + [False]

    def _capture(self) -> Capture:
        if self._bucket_bytes is None:
            return GradCapture(self.layout, self._params, self._sink)
        return BucketCapture(self.layout, self._params, self._sink, self._bucket_bytes)

    def _sink(self, slots: Sequence[int], grads: Sequence[Tensor | None], accumulate: bool) -> None:
        assert self._rows is not None
        with self._no_autocast():  # hooks run inside the backward pass, under whatever the user has on
            self._rows.update(self._task, slots, grads, accumulate)

    def _no_autocast(self) -> AbstractContextManager:
        device_type = self.layout.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.autocast(device_type, enabled=False)
        return nullcontext()  # entered for every bucket: switching off what is off would cost more than the check

    def _note_reached(self, task: int, reached: set[int]) -> None:
        if not reached:
            raise RuntimeError(
                f"the loss of task {self.task_names[task]!r} reaches no shared parameter; if it should, the balancer "
                "is stale (was it built before parameters were replaced, by fully_shard, weight_norm or to_empty?)"
            )
        for i in reached:
            self._reached[i] = True

    def _views(self, flats: Sequence[Tensor]) -> list[Tensor | None]:
        groups = {group.dtype: (flat, group.start) for flat, group in zip(flats, self.layout.groups, strict=True)}
        assigned = [reached and p.requires_grad for reached, p in zip(self._reached, self._params, strict=True)]
        return [
            slot.view(*groups[slot.dtype]) if wanted else None
            for slot, wanted in zip(self.layout.slots, assigned, strict=True)
        ]

    @torch.no_grad()
    def _accumulate(self, grads: Sequence[Tensor | None], overwrite: bool) -> None:
        """What autograd does at leaves: take the gradient where there is none, else add."""
        existing, added = [], []
        for p, grad in zip(self._params, grads, strict=True):
            if grad is None:
                continue
            if p.grad is None or overwrite:
                p.grad = grad
            else:
                existing.append(p.grad)
                added.append(grad)
        if existing:
            torch._foreach_add_(existing, added)

    def _plain_backward(
        self,
        tasks: Sequence[int],
        losses: TaskLosses,
        scale: Tensor,
        active: Tensor | None,
        overwrite: bool,
        retain_graph: bool,
        accumulation_steps: int | None,
    ) -> None:
        """Equal weighting, of losses or of their logs: one ordinary backward pass over the sum."""
        window = self._open_window(tasks, accumulation_steps)
        if overwrite and not any(window.taken):
            for p in self._params:
                p.grad = None
        seeds = self._seeds(self._new_step(window, None), tasks, losses, scale, window.size)
        backward_pass(losses.roots, seeds, retain_graph=retain_graph)
        self._count_plain(tasks, active)

    def _plain_loss(
        self, tasks: Sequence[int], losses: TaskLosses, active: Tensor | None, accumulation_steps: int | None
    ) -> Tensor:
        """The same as a loss."""

        def on_backward(grad: Tensor) -> Tensor:
            window = self._open_window(tasks, accumulation_steps)
            self._count_plain(tasks, active)
            return grad / window.size

        value = losses.differentiable_value()
        value.register_hook(on_backward)
        return value

    def _count_plain(self, tasks: Sequence[int], active: Tensor | None) -> None:
        assert self._window is not None
        for task in tasks:
            self._window.taken[task] += 1
        if self._window.is_complete():
            self._end_plain_step(active)

    def _end_plain_step(self, active: Tensor | None = None) -> None:
        assert self._window is not None
        self._forget_results()
        self.weights = torch.ones_like(self.weights)
        if active is not None:
            self.weights *= active
        for task in self._window.absent():
            self.weights[task].zero_()
        self._window = None
        self._step += 1
