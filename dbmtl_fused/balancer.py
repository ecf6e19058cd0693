"""``DBMTL``: dual-balancing multi-task learning for any training loop and optimizer."""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbmtl_fused import backends, checkpoint
from dbmtl_fused._ops import NEGATIVE_LOSS_TOLERANCE, STATE_DTYPES, compute_dtype
from dbmtl_fused.capture import Collector, Sink, assign_grads, count_sole_holder, with_hooks
from dbmtl_fused.engine import SECOND_PASS, backward_pass, balanced_loss, entry_point
from dbmtl_fused.functional import alpha_arguments, check_beta, check_eps, check_in_range
from dbmtl_fused.grads import accumulate
from dbmtl_fused.guards import Guard
from dbmtl_fused.layout import FlatLayout, large_first, named_shared_parameters
from dbmtl_fused.losses import TaskLosses
from dbmtl_fused.rows import EmaRows, Step, SumRows
from dbmtl_fused.schedule import BetaSchedule
from dbmtl_fused.tasks import Losses, check_active, positive_integer, preferences_of, task_names_of, tasks_of
from dbmtl_fused.window import Window, check_accumulation_steps

CPU_BUCKET_BYTES = 1 << 20
"""Default bucket on CPUs: gradients are used while they are in the cache, and malloc reuses the same warm pages."""

FIXED = ("log_losses", "state_dtype", "drop_ema_below", "bucket_bytes", "backend", "layout", "task_names")
"""Options and facts of a balancer that stay as they were built."""


class _Call(NamedTuple):
    """The losses of one call and the step they are for, checked."""

    tasks: list[int]
    losses: TaskLosses
    active: Tensor | None
    accumulation_steps: int | None


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
    :param eps: Added to norms, >= 1e-12 (float64: 1e-150): norms below 1e-19 (1e-154) count as 0.
    :param log_eps: Added to losses under the log, > 0.
    :param state_dtype: dtype of the EMA: float32, float64, or bfloat16, which halves the buffer and is rounded
        stochastically (arithmetic stays in float32). None: float64 if any shared parameter is float64, else float32.
    :param drop_ema_below: Free the buffer once ``β_k`` is below this: late in a training, each step's gradients speak
        for themselves, as with ``beta=0``. None: never.
    :param bucket_bytes: Gradients of one task that are gathered before its row is updated: None for all of them, ``n``
        for buckets of at least ``n`` bytes, of which one is alive at a time. On a GPU, buckets need shared parameters
        that are all used on one stream. ``"auto"``: 1 MiB on CPUs, else None.
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
        advance ``k``. Other entries of that step have advanced. An entry beyond ``2**46`` in magnitude (float64 state:
        ``2**490``) counts as non-finite: the squares of a row of them would overflow.
    """

    task_names: list[str]
    layout: FlatLayout
    backend: str

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
        named = named_shared_parameters(shared)
        self._build(
            [(name, p) for name, p in named if p.requires_grad],
            [(name, p) for name, p in named if not p.requires_grad],
            {
                "task_names": task_names_of(num_tasks, task_names),
                "beta": beta,
                "beta_sigma": beta_sigma,
                "alpha": alpha,
                "preference": preference,
                "log_losses": log_losses,
                "eps": eps,
                "log_eps": log_eps,
                "state_dtype": state_dtype,
                "drop_ema_below": drop_ema_below,
                "bucket_bytes": bucket_bytes,
                "backend": backend,
            },
        )
        self._guard.watch(shared if isinstance(shared, torch.nn.Module) else None)

    def _build(
        self, named: list[tuple[str, Tensor]], left_out: list[tuple[str, Tensor]], options: dict[str, Any]
    ) -> None:
        """Build the balancer.

        :param named: The shared parameters that are balanced.
        :param left_out: Those that are frozen.
        :param options: The other arguments of the constructor.
        """
        named, self._options = large_first(named), options
        self.__dict__["task_names"] = list(options["task_names"])
        self._schedule = BetaSchedule(options["beta"], options["beta_sigma"], options["drop_ema_below"])
        self.__dict__["layout"] = FlatLayout(named)
        self._state_dtype = self._checked_state_dtype(options["state_dtype"])
        self._dtype = compute_dtype(self._state_dtype)
        check_beta(options["beta"], self._dtype)
        self._alpha = alpha_arguments(options["alpha"], self._dtype)
        check_eps(options["eps"], self._dtype)
        _check_log_eps(options["log_eps"])
        preferences = preferences_of(options["preference"], self.task_names, self._dtype)
        bucket_bytes = self._checked_bucket_bytes(options["bucket_bytes"])
        self.__dict__["backend"] = backends.resolve(options["backend"], self.layout.device)

        self._ops = backends.operators(self.backend)
        self._params = [named[i][1] for i in self.layout.order]
        self._guard = Guard(self.layout, self._params, left_out)
        count_sole_holder()
        self._collector = Collector(self.layout, self._params, _weak_sink(self), bucket_bytes)
        self._is_plain_sum = options["alpha"] is None and preferences is None  # without EMA: one ordinary backward pass
        self._preference = None if preferences is None else self._tensor(preferences)
        self._step = torch.zeros((), dtype=torch.int64, device=self.layout.device)
        self._one = torch.ones((), dtype=self._dtype, device=self.layout.device)
        self._all_shared_graphs = False
        self._is_running = False
        self._held: _Held | None = None
        self._rows: EmaRows | SumRows | None = self._new_ema_rows() if self.beta > 0 else self._rows_without_ema()
        self.reset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED:
            raise AttributeError(f"{name} of a DBMTL cannot be changed after it is built; build a new one")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        options = {name: value for name, value in self._options.items() if name not in ("task_names", "backend")}
        shown = [f"task_names={self.task_names}", *(f"{name}={value!r}" for name, value in options.items())]
        size = f"{len(self.layout.slots)} shared parameters, {self.layout.numel:,} numbers on {self.layout.device}"
        return f"DBMTL({', '.join(shown)}, backend={self.backend!r}: {size})"

    @property
    def beta(self) -> float:
        """EMA coefficient; may be set, but not between 0 and others."""
        return self._options["beta"]

    @beta.setter
    def beta(self, beta: float) -> None:
        check_beta(beta, self._dtype)
        if (beta > 0) != (self.beta > 0):
            raise ValueError(f"beta must stay {'above 0' if self.beta else '0'}, got {beta}; build a new balancer")
        self._set_schedule(beta, self.beta_sigma)

    @property
    def beta_sigma(self) -> float:
        """Decay of the EMA coefficient; may be set."""
        return self._options["beta_sigma"]

    @beta_sigma.setter
    def beta_sigma(self, beta_sigma: float) -> None:
        self._set_schedule(self.beta, beta_sigma)

    def _set_schedule(self, beta: float, beta_sigma: float) -> None:
        schedule = BetaSchedule(beta, beta_sigma, self._options["drop_ema_below"])
        schedule.restart(self._schedule.at_most)
        self._schedule = schedule
        self._options |= {"beta": beta, "beta_sigma": beta_sigma}

    @property
    def alpha(self) -> str | float | None:
        """``alpha`` as it was given; may be set."""
        return self._options["alpha"]

    @alpha.setter
    def alpha(self, alpha: str | float | None) -> None:
        arguments = alpha_arguments(alpha, self._dtype)
        if (alpha is None) != (self.alpha is None):
            raise ValueError(
                f"alpha must {'stay None' if self.alpha is None else 'not become None'}, got {alpha!r}; build a new "
                "balancer"
            )
        self._options["alpha"], self._alpha = alpha, arguments
        self._update_weighting()

    @property
    def eps(self) -> float:
        """Number added to norms; may be set."""
        return self._options["eps"]

    @eps.setter
    def eps(self, eps: float) -> None:
        check_eps(eps, self._dtype)
        self._options["eps"] = eps
        self._update_weighting()

    def _update_weighting(self) -> None:
        if self._rows is not None:
            self._rows.set_weighting(self._alpha, self.eps)

    @property
    def log_eps(self) -> float | None:
        """Number added to losses under the log, None without a log; may be set."""
        return self._options["log_eps"] if self._options["log_losses"] else None

    @log_eps.setter
    def log_eps(self, log_eps: float) -> None:
        if not self._options["log_losses"]:
            raise ValueError(f"log_eps must stay unset with log_losses=False, got {log_eps!r}")
        _check_log_eps(log_eps)
        self._options["log_eps"] = log_eps

    @property
    def preference(self) -> Tensor | None:
        """Preferences ``(T,)`` on the device, which may be written to between steps; None: 1 for all. May be set, as in
        the constructor."""
        return self._preference

    @preference.setter
    def preference(self, preference: Sequence[float] | Mapping[str, float] | Tensor | None) -> None:
        values = preferences_of(preference, self.task_names, self._dtype)
        if values is not None and self._is_plain_sum:
            raise ValueError("preference must be given when a balancer with alpha=None is built, got one afterwards")
        self._preference = None if values is None else self._tensor(values)
        self._options["preference"] = values

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=self._dtype, device=self.layout.device)

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
        if self._last is None:
            return self.alpha_value.new_full((), torch.nan)
        return self._last.grad_norm() if isinstance(self._last, Step) else self._last.clone()

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
        """Return each task's norm and weight, alpha and the norm of the balanced gradient of the last step, by name.

        Values are 0-d device tensors, as TensorBoard, W&B and Lightning's ``self.log_dict`` take them; HF Trainer's
        ``log`` wants numbers: ``{name: value.item() for ...}``.
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
        self._failure: str | None = "reset() did not finish"
        self._collector.end()
        self._is_running = False
        self._step.zero_()
        self._schedule.restart()
        if self.beta > 0:
            self._ema_rows().clear()
        self._reached = [False] * len(self._params)  # by any task, ever
        self._window: Window | None = None
        self._last_values: tuple[Sequence[str], Tensor] | None = None  # of the losses, if the host has not seen them
        self._forget_results()
        self._hold_anew()
        self._failure = None

    def _reset_task(self, task: str) -> None:
        if task not in self.task_names:
            raise ValueError(f"task must be one of {self.task_names}, got {task!r}")
        if self._window is not None:
            raise RuntimeError("one task cannot be reset in the middle of an accumulation window; flush() it first")
        if isinstance(self._rows, EmaRows):
            self._rows.clear(self.task_names.index(task))

    def _forget_results(self) -> None:
        self._last: Step | Tensor | None = None
        unmeasured = torch.full((self.num_tasks,), torch.nan, dtype=self._dtype, device=self.layout.device)
        self.norms, self.weights, self.alpha_value = unmeasured, unmeasured.clone(), unmeasured[0].clone()

    @entry_point
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
            pass fails or reaches no shared parameter. Shared ``.grad`` is unchanged then. If the EMA is not,
            ``reset()`` or ``load_state_dict()`` must follow, and the next call says so.
        """
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
        call = self._checked_call(losses, active, accumulation_steps, overwrite)
        scale = self._one.to(call.losses.dtype)
        if scaler is not None:
            scale = scaler.scale(scale)
        self._run(call, scale, retain_graph=retain_graph, overwrite=overwrite)

    @entry_point
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
        self._check_usable(overwrite)
        if self._rows is None:
            self._end_plain_step(self._window, None)
        else:
            self._write(self._finish_step(self._window), overwrite)

    @entry_point
    def __call__(
        self,
        losses: Losses,
        *,
        active: Tensor | None = None,
        accumulation_steps: int | None = None,
    ) -> Tensor:
        """A loss for loops that call ``loss.backward()`` themselves: ``Σ_t log(l_t + log_eps)``, 0-d.

        Its backward pass runs the ``T`` backward passes. ``loss.backward()`` accumulates into every ``.grad``, heads
        included; ``backward(inputs=...)`` and ``autograd.grad`` get the balanced shared gradients alone. A factor on
        the loss scales gradients, not the EMA. Under ``no_grad`` it is just the value.

        :param losses, active, accumulation_steps: As in :meth:`backward`. The value is that of these losses alone;
            gradients are divided by the number of micro-batches.
        :raises RuntimeError: In backward: with ``create_graph=True``, and when run a second time.
        """
        if not torch.is_grad_enabled():
            return self._task_losses(losses, active, accumulation_steps, need_graph=False).losses.value()
        if active is not None:
            check_active(active, self.num_tasks, self.layout.device)
            active = active.clone()  # the mask of this call, whenever its backward pass runs
        call = self._checked_call(losses, active, accumulation_steps)
        return self._plain_loss(call) if self._next_is_plain() else balanced_loss(_PendingStep(self, call))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Return a context in which steps give gradients but leave the EMA and ``k`` as they are.

        For optimizers that evaluate the model several times in one step (LBFGS, SAM). Takes as much memory as the EMA.
        On the way out, a step that has failed and an accumulation window that is still open are forgotten.

        :raises RuntimeError: In the middle of an accumulation window.
        """
        if self._window is not None:
            raise RuntimeError("hold() cannot begin in the middle of an accumulation window; flush() it first")
        before, self._held = self._held, _Held(self._rows, self._step, self._schedule)
        try:
            yield
        finally:
            if self._failure or self._window is not None:
                self._held.restore(self._rows, self._step, self._schedule)
                self._failure = self._window = None
            self._held = before

    def _hold_anew(self) -> None:
        """Hold the state that has been loaded, or that of a reset, from now on."""
        if self._held is not None:
            self._held = _Held(self._rows, self._step, self._schedule)

    def _checked_call(
        self, losses: Losses, active: Tensor | None, accumulation_steps: int | None, overwrite: bool = False
    ) -> _Call:
        """Return the losses of a call; raise, before anything has changed, if they could not be balanced."""
        self._check_usable(overwrite)
        call = self._task_losses(losses, active, accumulation_steps)
        if self._next_is_plain():
            return call
        nodes, ids = set(self._collector.nodes), {id(p) for p in self._params}
        if (name := call.losses.unreachable(nodes, ids)) is not None:
            raise self._reaches_nothing(name)
        return call

    def _check_usable(self, overwrite: bool = False) -> None:
        """Raise if a step now would be wrong, before anything has changed."""
        if self._is_running:
            raise RuntimeError(
                "a step of this balancer is running: this call came from within its backward passes, or from another "
                "thread; call reset() if an interrupt left it so"
            )
        self._check_complete()
        self._guard.check(overwrite)
        if type(self._preference) is Tensor and self._preference.device.type == "cpu":  # elsewhere it would wait
            preferences_of(self._preference, self.task_names, self._dtype)

    def _check_complete(self) -> None:
        if self._failure:
            raise RuntimeError(
                f"the balancer's state is incomplete: {self._failure}; call reset() or load_state_dict() before the "
                "next step"
            )

    def _task_losses(
        self, losses: Losses, active: Tensor | None, accumulation_steps: int | None, need_graph: bool = True
    ) -> _Call:
        """Return the losses and their tasks, checked against the window they fall into."""
        if accumulation_steps is not None:
            accumulation_steps = self._checked_accumulation(accumulation_steps, active)
        if active is not None:
            check_active(active, self.num_tasks, self.layout.device)
            active = active.contiguous()
        tasks, present = tasks_of(losses, self.task_names)
        if self._window is not None and need_graph:
            self._window.check(tasks, accumulation_steps)
        names = [self.task_names[task] for task in tasks]
        of_losses = active
        if active is not None and len(tasks) < self.num_tasks:
            of_losses = torch.stack([active[task] for task in tasks])
        device = self.layout.device
        checked = TaskLosses(present, names, self.log_eps, device, active=of_losses, need_graph=need_graph)
        return _Call(tasks, checked, active, accumulation_steps)

    def _checked_accumulation(self, accumulation_steps: int, active: Tensor | None) -> int:
        number = check_accumulation_steps(accumulation_steps)
        if active is not None:
            raise ValueError(
                "active must be None with accumulation_steps: within a window, give the losses of the tasks that are "
                "there"
            )
        lacks_buffer = isinstance(self._rows, SumRows) or (self._schedule.ends and not self._is_plain_sum)
        if number > 1 and lacks_buffer:
            option = "drop_ema_below" if self._schedule.ends else "beta=0"
            raise ValueError(
                f"accumulation_steps must be 1 with {option}, got {number}: without an EMA there is no "
                "buffer in which each task's gradients could be added up"
            )
        return number

    def _reaches_nothing(self, task: str) -> RuntimeError:
        return RuntimeError(
            f"the loss of task {task!r} reaches no shared parameter; if it should, the balancer is stale (was it built "
            "before parameters were replaced, by fully_shard, weight_norm or to_empty, or copied without its model?)"
        )

    # --- A step

    def _run(self, call: _Call, scale: Tensor, *, retain_graph: bool, overwrite: bool = False) -> None:
        """Run the backward passes of a call and accumulate into every ``.grad``."""
        if self._next_is_plain():
            self._run_plain(call, scale, retain_graph, overwrite)
        else:
            self._write(self._balanced_grads(call, scale, retain_graph=retain_graph), overwrite)

    @torch.no_grad()
    def _write(self, grads: Sequence[Tensor | None], overwrite: bool) -> None:
        accumulate(self._params, list(map(with_hooks, self._params, grads)), overwrite)
        self._end_call()

    def _end_call(self) -> None:
        if self._held is not None and self._window is None:
            self._held.restore(self._rows, self._step, self._schedule)
        self._failure = None

    @torch.no_grad()
    def _balanced_grads(
        self, call: _Call, scale: Tensor, *, retain_graph: bool, inputs: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        """Run the backward passes of a call and, if that completes it, a step of the EMA.

        :param scale: Factor on all gradients that come out, not on those that go into the EMA, 0-d.
        :param inputs: The only leaves to reach; None: all.
        :returns: The balanced gradient of each shared parameter, in the layout's order; None where none is to be
            assigned: frozen parameters, those that no task has ever reached, and all of them until the step is
            complete.
        """
        window = self._window or Window(self.task_names, call.accumulation_steps)
        window.check(call.tasks, call.accumulation_steps)
        keep = [retain_graph or shared for shared in self._shared_graphs(call.losses)]
        # An interrupt may hit any line, so that cleaning up stands in two places, of which it cannot hit both.
        try:
            self._is_running = True
            self._collect(window, call, scale, keep, inputs)
        except BaseException as error:
            if self._failure:
                self._failure = (
                    f"the backward pass of task {self._task_name!r} failed ({type(error).__name__}: {error})"
                )
            elif window.step is not None:
                window.step.undo_take()
            raise
        finally:
            self._stop()
        if self.log_eps is not None and self.layout.device.type != "cpu":
            self._last_values = call.losses.task_names, call.losses.values
        if window.is_complete():
            return self._finish_step(window)
        self._window = window
        return [None] * len(self._params)

    def _collect(
        self, window: Window, call: _Call, scale: Tensor, keep: list[bool], inputs: Sequence[Tensor] | None
    ) -> None:
        """Take the gradients of all tasks of a call."""
        if window.step is None:
            self._drop_ema_in_time()
            window.step = self._new_step(window, call.active)
            self._rows_now().begin(window.step)
        seeds = self._seeds(window.step, call, scale, window.size)
        try:
            self._collector.begin()
            with self._collector.backward_pass():
                for task, root, seed, kept in zip(call.tasks, call.losses.roots, seeds, keep, strict=True):
                    self._task, self._task_name = task, self.task_names[task]
                    backward_pass(root, seed, retain_graph=kept, inputs=inputs)
                    with self._no_autocast():
                        reached = self._collector.finish_task()
                        if not reached:
                            raise self._reaches_nothing(self._task_name)
                        self._rows_now().end_task(task)
                    window.reached |= reached
                    window.taken[task] += 1
        finally:
            self._stop()

    def _stop(self) -> None:
        self._collector.end()
        self._is_running = False

    def _sink(self, slots: Sequence[int], grads: Sequence[Tensor | None], accumulate: bool) -> None:
        with self._no_autocast():  # hooks run inside the backward pass, under whatever the user has on
            if isinstance(self._rows, EmaRows):
                self._failure = "its last step did not finish"  # until it has: the EMA changes from here on
            self._rows_now().update(self._task, slots, grads, accumulate)

    @torch.no_grad()
    def _finish_step(self, window: Window) -> list[Tensor | None]:
        """End the window: balance what it got."""
        assert window.step is not None
        rows, step, absent = self._rows_now(), window.step, window.absent()
        try:
            self._failure, self._window = "the balancing of its last step did not finish", None
            if not absent:
                self._guard.check_reached(window.reached, self._reached)
            reached = [already or i in window.reached for i, already in enumerate(self._reached)]
            slots = [i for i, is_reached in enumerate(reached) if is_reached]
            with self._no_autocast():
                step.leave_out(absent)
                balanced = rows.finish(slots)
        except BaseException as error:
            self._failure = f"the balancing of its last step failed ({type(error).__name__}: {error})"
            raise
        self._reached = reached
        self.norms, self.weights, self.alpha_value = step.norms, step.weights, step.alpha_value
        self._last = step
        grads: list[Tensor | None] = [None] * len(self._params)
        for i, grad in zip(slots, balanced, strict=True):
            grads[i] = grad if self._params[i].requires_grad else None
        return grads

    def _new_ema_rows(self) -> EmaRows:
        return EmaRows(self.num_tasks, self.layout, self._ops, self._alpha, self.eps, self._state_dtype)

    def _rows_without_ema(self) -> SumRows | None:
        if self._is_plain_sum:
            return None
        return SumRows(self.num_tasks, self.layout, self._ops, self._alpha, self.eps, self._state_dtype)

    def _rows_now(self) -> EmaRows | SumRows:
        if self._rows is None:
            raise RuntimeError("the EMA was dropped after this loss was made; call balancer(losses) again")
        return self._rows

    def _ema_rows(self) -> EmaRows:
        """Return the buffer; a new one if it has been dropped."""
        if not isinstance(self._rows, EmaRows):
            self._rows = self._new_ema_rows()
        return self._rows

    def _ema_is_over(self) -> bool:
        return self._window is None and isinstance(self._rows, EmaRows) and self._schedule.is_over(self._step)

    def _next_is_plain(self) -> bool:
        """Return whether the next step is one ordinary backward pass."""
        return self._rows is None or (self._is_plain_sum and self._ema_is_over())

    def _drop_ema_in_time(self) -> None:
        """Free the EMA if the step that begins is the first without one."""
        if self._ema_is_over():
            self._rows = self._rows_without_ema()
        self._schedule.count(self._step)

    def _new_step(self, window: Window, active: Tensor | None) -> Step:
        beta = self.beta if isinstance(self._rows, EmaRows) else 0.0
        return Step(
            window.taken, self._step, beta, self.beta_sigma, self._dtype, preference=self._preference, active=active
        )

    def _seeds(self, step: Step, call: _Call, scale: Tensor, micro_batches: int) -> list[Tensor]:
        """Return the ``grad_outputs`` of each task's backward pass."""
        losses, begin_step = call.losses, self._ops.begin_step
        options: dict[str, Any] = {"active": losses.active, "log_eps": self.log_eps, "micro_batches": micro_batches}
        return losses.of_roots(step.take(begin_step, call.tasks, losses.values, scale, **options))

    def _shared_graphs(self, losses: TaskLosses) -> list[bool]:
        """Return which tasks' graphs must outlive their backward pass.

        Where all tasks but the last shared theirs once, the walk over the graph is not repeated: keeping a graph
        needlessly costs memory until the losses die, no more.
        """
        if not self._all_shared_graphs or len(losses.roots) < self.num_tasks:
            shared = losses.shared_with_later()
            self._all_shared_graphs = len(shared) == self.num_tasks and all(shared[:-1])
            return shared
        return [True] * (self.num_tasks - 1) + [False]

    def _no_autocast(self) -> AbstractContextManager:
        device_type = self.layout.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.autocast(device_type, enabled=False)
        return nullcontext()  # entered for every bucket: switching off what is off would cost more than the check

    # --- A step without balancing: equal weighting, of losses or of their logs, in one ordinary backward pass

    def _run_plain(self, call: _Call, scale: Tensor, retain_graph: bool, overwrite: bool) -> None:
        self._drop_ema_in_time()
        window = self._window or Window(self.task_names, call.accumulation_steps)
        window.check(call.tasks, call.accumulation_steps)
        seeds = self._seeds(self._new_step(window, None), call, scale, window.size)
        replaced = self._params if overwrite and not any(window.taken) else []
        kept = [p.grad for p in replaced]
        try:
            assign_grads(replaced, [None] * len(kept))
            backward_pass(call.losses.roots, seeds, retain_graph=retain_graph)
        except BaseException:
            assign_grads(replaced, kept)
            raise
        for p, grad in zip(replaced, kept, strict=True):
            if p.grad is None:  # frozen, or not reached
                p.grad = grad
        self._count_plain(window, call)

    def _plain_loss(self, call: _Call) -> Tensor:
        """Return equal weighting as a differentiable loss, for ``balancer(losses)``."""

        calls = [call]

        def on_backward(grad: Tensor) -> Tensor:
            if not calls:
                raise RuntimeError(SECOND_PASS)
            self._check_usable()
            self._drop_ema_in_time()
            window = self._window or Window(self.task_names, call.accumulation_steps)
            window.check(call.tasks, call.accumulation_steps)
            self._count_plain(window, calls.pop())
            return grad / window.size

        value = call.losses.differentiable_value()
        value.register_hook(on_backward)
        return value

    def _count_plain(self, window: Window, call: _Call) -> None:
        taken = [taken + (task in call.tasks) for task, taken in enumerate(window.taken)]
        is_complete = window.is_complete(taken)
        self._window = None if is_complete else window  # before it has counted, as an interrupt may come
        window.taken[:] = taken
        if is_complete:
            self._end_plain_step(window, call.active)

    def _end_plain_step(self, window: Window, active: Tensor | None) -> None:
        self._forget_results()
        self.weights = torch.ones_like(self.weights)
        if active is not None:
            self.weights *= active
        for task in window.absent():
            self.weights[task].zero_()
        self._window = None
        self._step += 1
        self._end_call()

    # --- Persistence

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to continue bit for bit, by parameter name and in logical order.

        ``{"ema": {name: (T, *shape)}, "step": int64, "reached": [name, ...], "task_names": [name, ...], "preference":
        (T,) or None}``. As in an optimizer's state, ``ema`` holds views of the live buffer. It is empty without a
        buffer.

        :raises RuntimeError: In the middle of an accumulation window, or if the state is incomplete.
        """
        self._check_complete()
        if self._window is not None:
            raise RuntimeError(
                "the state in the middle of an accumulation window cannot be saved; save after its last backward(), or "
                "flush() first"
            )
        self._warn_of_negative_losses()
        return self._state()

    def _state(self) -> dict[str, Any]:
        names = (slot.name for slot in self.layout.slots)
        return {
            "ema": self.ema,
            "step": self.step,
            "reached": [name for name, reached in zip(names, self._reached, strict=True) if reached],
            "task_names": list(self.task_names),
            "preference": None if self._preference is None else self._preference.clone(),
        }

    @entry_point
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> checkpoint.IncompatibleKeys:
        """Take over a ``state_dict``, from any device, dtype and memory format.

        :param strict: Whether tasks and parameters must be the same. If not, those that the state does not have start
            at zero: after unfreezing a layer, or adding a task.
        :returns: ``missing_keys`` and ``unexpected_keys``, the names of tasks and parameters that differ.
        :raises TypeError, ValueError: If an entry has a wrong kind or value or, if ``strict``, is of other tasks or
            parameters. The message names all that differ, and nothing has changed.
        """
        loaded = checkpoint.validate(state_dict, self.task_names, self.layout.slots, self._state_dtype, strict)
        has_ema = self.beta > 0 and bool(loaded.ema or not self._schedule.has_ended(loaded.step))
        if strict and has_ema != bool(loaded.ema):
            names = [slot.name for slot in self.layout.slots] if has_ema else list(loaded.ema)
            raise ValueError(
                "state_dict does not fit the shared parameters: "
                + "; ".join(f"{'missing' if has_ema else 'unexpected'} {name!r}" for name in names)
            )
        self._failure = "load_state_dict() did not finish"
        self._collector.end()
        self._is_running = False
        if has_ema:
            rows, sources = self._ema_rows(), dict(loaded.tasks)
            for name, view in self.ema.items():
                for task in range(self.num_tasks):
                    if name in loaded.ema and task in sources:
                        view[task].copy_(loaded.ema[name][sources[task]])
                    else:
                        view[task].zero_()
            rows.measure()
        else:
            self._rows = self._rows_without_ema()
        self._step.fill_(loaded.step)
        self._schedule.restart(loaded.step)
        self._reached = [slot.name in loaded.reached for slot in self.layout.slots]
        self._window = None
        if loaded.has_preference:
            self._preference = None if loaded.preference is None else self._tensor(loaded.preference)
        self._hold_anew()
        self._failure = None
        return loaded.differences

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, self._parts(), self.__getstate__()

    def _parts(self) -> tuple[Any, ...]:
        """Return the arguments of ``_rebuilt``."""
        named = [(slot.name, p) for slot, p in zip(self.layout.slots, self._params, strict=True)]
        return type(self), named, self._guard.left_out, dict(self._options)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "state": self._state(),
            "results": (self.norms, self.weights, self.alpha_value, self.grad_norm),
            "failure": self._failure,
            "module": self._guard.module,
            "window": None if self._window is None else (self._rows, self._window, self._step),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state["state"])
        self.norms, self.weights, self.alpha_value, self._last = state["results"]
        self._failure = state["failure"]
        self._guard.watch(state["module"])
        if state["window"] is not None:
            self._rows, self._window, self._step = state["window"]
            self._schedule.count(self._step)  # the step that has begun
            if self._rows is not None:
                self._rows.complete(self._ops)

    def __deepcopy__(self, memo: dict[int, Any]) -> DBMTL:
        is_alone = sys._getframe(2).f_code.co_filename != copy.__file__  # called by the user's copy.deepcopy itself
        if is_alone and not all(id(p) in memo for p in self._params):
            raise RuntimeError(
                "a DBMTL balancer cannot be deep-copied without its model: the copy would balance parameters of no "
                "model; copy both at once, copy.deepcopy((model, balancer)), or build a new one and load_state_dict()"
            )
        copied = memo[id(self)] = _rebuilt(*copy.deepcopy(self._parts(), memo))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def _warn_of_negative_losses(self) -> None:
        """Warn of losses below zero in the last step, which was not counted, where the host has not seen them."""
        if self._last_values is None:
            return
        (names, values), self._last_values = self._last_values, None
        for name, value in zip(names, values.tolist(), strict=True):
            if value < -NEGATIVE_LOSS_TOLERANCE:
                warnings.warn(
                    f"loss of task {name!r} must be >= 0 to take its log, got {value} in the last step, which was not "
                    "counted; shift it, or use log_losses=False",
                    stacklevel=3,
                )

    def _checked_state_dtype(self, state_dtype: torch.dtype | None) -> torch.dtype:
        if state_dtype is None:
            return self.layout.state_dtype
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be None or one of {STATE_DTYPES}, got {state_dtype}")
        return state_dtype

    def _checked_bucket_bytes(self, bucket_bytes: int | str | None) -> int | None:
        if isinstance(bucket_bytes, str) and bucket_bytes == "auto":
            return CPU_BUCKET_BYTES if self.layout.device.type == "cpu" else None
        number = positive_integer(bucket_bytes)
        if bucket_bytes is not None and number is None:
            raise ValueError(f'bucket_bytes must be "auto", None or a positive integer, got {bucket_bytes!r}')
        return number


class _PendingStep:
    """A step whose losses are known and checked, and whose backward passes are to run."""

    def __init__(self, balancer: DBMTL, call: _Call) -> None:
        self._balancer, self._call = balancer, call
        self.value, self.params = call.losses.value(), balancer._params

    def run(self, scale: Tensor, *, retain_graph: bool) -> None:
        """Run the step and accumulate into every ``.grad``."""
        self._balancer._check_usable()
        self._balancer._rows_now()
        self._balancer._write(self._balancer._balanced_grads(self._call, scale, retain_graph=retain_graph), False)

    def grads(self, scale: Tensor, *, retain_graph: bool, with_heads: bool) -> list[Tensor | None]:
        """Run the step and return the gradients of the shared parameters; heads get theirs only if ``with_heads``."""
        balancer = self._balancer
        balancer._check_usable(overwrite=True)
        inputs = None if with_heads else [p for p in self.params if p.requires_grad]
        grads = balancer._balanced_grads(self._call, scale, retain_graph=retain_graph, inputs=inputs)
        balancer._end_call()
        return grads


class _Held:
    """The EMA and the number of steps at the beginning of :meth:`DBMTL.hold`."""

    def __init__(self, rows: EmaRows | SumRows | None, step: Tensor, schedule: BetaSchedule) -> None:
        self._step, self._at_most = step.clone(), schedule.at_most
        self._ema = (rows.buffer.clone(), rows.sq_norms.clone()) if isinstance(rows, EmaRows) else None

    def restore(self, rows: EmaRows | SumRows | None, step: Tensor, schedule: BetaSchedule) -> None:
        """Undo a step."""
        step.copy_(self._step)
        schedule.restart(self._at_most)
        if isinstance(rows, EmaRows) and self._ema is not None:
            rows.buffer.copy_(self._ema[0])
            rows.sq_norms.copy_(self._ema[1])


def _weak_sink(balancer: DBMTL) -> Sink:
    """Return the balancer's sink, which does not keep it alive: a collector would, until the garbage collector runs."""
    sink = weakref.WeakMethod(balancer._sink)

    def to_balancer(slots: Sequence[int], grads: Sequence[Tensor | None], accumulate: bool) -> None:
        method = sink()
        assert method is not None, "a step that runs holds its balancer"
        method(slots, grads, accumulate)

    return to_balancer


def _rebuilt(
    cls: type[DBMTL], named: list[tuple[str, Tensor]], left_out: list[tuple[str, Tensor]], options: dict[str, Any]
) -> DBMTL:
    """Return a balancer with an empty state, as pickle and deepcopy build them."""
    balancer = object.__new__(cls)
    balancer._build(named, left_out, options)
    return balancer


def _check_log_eps(log_eps: float) -> None:
    check_in_range("log_eps", log_eps, torch.float32, low=torch.finfo(torch.float32).tiny, cure="")
