"""The balancer seen from outside, in the oracle's precision, and the small net that both are driven with.

``Model`` knows what every call has to do to the EMA, the step count, the weights and the shared gradient. It gets each
task's gradient from autograd on a graph of its own. Every value comes with a bound on what rounding may have changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dbmtl_fused import oracle

Array = oracle.Array

WIDTH = 5  # of the features
LOSS_SCALES = (1.0, 30.0, 0.1, 5.0)
SLACK = 64  # roundings that a value may be off by
ENTRY_LIMIT = 2.0**46  # of an entry of the EMA that is computed in float32
ALIGN = 256  # columns; where the random bits of a bfloat16 state are counted from
EPS = 1e-8  # of the norms, and of the logs

KINDS = (
    *("scalar", "empty", "conv", "strided", "transposed", "tied", "twice"),
    *("bf16", "fp16", "fp64", "even", "late", "unreached", "frozen"),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


# --- The net


def make_parameter(kind: str, dtype: torch.dtype) -> nn.Parameter:
    match kind:
        case "scalar":
            values = torch.randn((), dtype=dtype)
        case "empty":
            values = torch.randn(0, 3, dtype=dtype)
        case "conv":
            values = torch.randn(3, 2, 2, 2, dtype=dtype).to(memory_format=torch.channels_last)
        case "strided":
            values = torch.randn(4, 6, dtype=dtype)[:, ::2]
        case "transposed":
            values = torch.randn(5, 3, dtype=dtype).t()
        case "bf16" | "fp16" | "fp64":
            values = torch.randn(2, 3, dtype=DTYPES[kind])
        case _:
            values = torch.randn(3, dtype=dtype)
    return nn.Parameter(values, requires_grad=kind != "frozen")


class Spike(torch.autograd.Function):
    """Zero, with a derivative of ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Nested(torch.autograd.Function):
    """``z + (p * c).sum() * b`` by a backward pass within the backward pass, as reentrant checkpointing does it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, held: list[Tensor], c: Tensor, b: Tensor) -> Tensor:
        ctx.parts = z.detach(), held[0], c, b
        return z + (held[0] * c).sum() * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, p, c, b = ctx.parts
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(z + (p * c).sum() * b, grad)
        return z.grad, None, None, None


@dataclass
class Batch:
    """Random numbers of one forward pass.

    :param specials: The fault of a task's loss, by task: ``"nan"``, ``"inf"``, ``"zero"``, ``"below zero"`` (by a
        rounding error), ``"negative"``, ``"flat"`` (its gradient is 0), ``"inf gradient"``, ``"huge gradient"``.
    """

    x: Tensor
    y: Tensor
    coefficients: dict[str, Tensor]
    directions: dict[str, Tensor]
    is_late: bool
    specials: dict[int, str]


class Net(nn.Module):
    """An encoder of several kinds of parameters and ``T`` heads.

    :param kinds: Of the encoder's parameters, in this order; one plain matrix comes in the middle.
    """

    def __init__(self, kinds: Sequence[str], T: int, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.T, self.dtype, self.kinds = T, dtype, list(kinds)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Module()
            middle = len(kinds) // 2
            for kind in [*kinds[:middle], "plain", *kinds[middle:]]:
                p = make_parameter(kind, dtype) if kind != "plain" else nn.Parameter(torch.randn(4, WIDTH, dtype=dtype))
                self.encoder.register_parameter(kind, p)
                if kind == "tied":
                    self.encoder.register_parameter("tied_again", p)
            self.heads = nn.ModuleList(nn.Linear(WIDTH, 1, dtype=dtype) for _ in range(T))

    def batch(self, seed: int, specials: dict[int, str] | None = None, is_late: bool = False) -> Batch:
        sizes = [3 * 4, 3 * self.T]
        for kind in self.kinds:
            sizes += [getattr(self.encoder, kind).numel(), WIDTH]
        rng = np.random.default_rng(seed)
        x, y, *rest = torch.from_numpy(rng.standard_normal(sum(sizes))).to(self.dtype).split(sizes)
        shapes = [getattr(self.encoder, kind).shape for kind in self.kinds]
        coefficients = {kind: c.view(s) for kind, c, s in zip(self.kinds, rest[::2], shapes, strict=True)}
        directions = dict(zip(self.kinds, rest[1::2], strict=True))
        return Batch(x.view(3, 4), y.view(3, self.T), coefficients, directions, is_late, specials or {})

    def features(self, batch: Batch, nested: bool) -> tuple[Tensor, Tensor]:
        z = first = batch.x @ self.encoder.plain
        for kind in self.kinds:
            if kind in ("even", "unreached") or (kind == "late" and not batch.is_late):
                continue
            p, c, b = getattr(self.encoder, kind), batch.coefficients[kind], batch.directions[kind]
            z = z + (p.to(self.dtype) * c).sum() * b
            if kind == "tied":
                z = z + p.square().sum() * b
            if kind == "twice":
                z = Nested.apply(z, [p], c.flip(0), b) if nested else z + (p * c.flip(0)).sum() * b
        return z.tanh(), first

    def losses(
        self, batch: Batch, tasks: Sequence[int], *, graph: str = "one", nested: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """The losses of ``tasks``, and an early tensor of the first one's graph.

        :param graph: ``"one"``, ``"each"`` (every task has its own), or ``"mixed"``.
        """
        losses: list[Tensor] = []
        h, first = self.features(batch, nested)
        for t in tasks:
            own = losses and (graph == "each" or (graph == "mixed" and t % 2))
            features = self.features(batch, nested)[0] if own else h
            y = self.heads[t](features)[:, 0]
            if "even" in self.kinds and t % 2 == 0:
                y = y + (self.encoder.even * batch.coefficients["even"]).sum()
            losses.append(self._special(LOSS_SCALES[t] * (y - batch.y[:, t]).square().mean(), batch.specials.get(t)))
        return losses, first

    def _special(self, loss: Tensor, kind: str | None) -> Tensor:
        match kind:
            case "nan" | "inf":
                return loss * float(kind)
            case "flat":
                return loss.detach() + 0 * loss
            case "zero":
                return loss - loss.detach()
            case "below zero":
                return loss - loss.detach() - 5e-7
            case "negative":
                return loss - loss.detach() - 0.5
            case "inf gradient" | "huge gradient":
                factor = float("inf") if kind == "inf gradient" else 1e25
                return loss + Spike.apply(self.encoder.plain[0, 0], factor)
        return loss


# --- The balancer


class Bounded(NamedTuple):
    """A value and a bound on its error."""

    value: Array
    error: Array


@dataclass
class ModelWindow:
    """The calls that make one step."""

    M: int | None
    taken: list[int]
    betas: dict[int, Any] = field(default_factory=dict)
    found_inf: bool = False
    active: list[bool] | None = None
    scale: Any = 1.0

    @property
    def size(self) -> int:
        return self.M or 1

    def is_complete(self) -> bool:
        return self.M is None or all(n == self.M for n in self.taken)


@dataclass
class State:
    """What outlives a step."""

    ema: Array
    error: Array
    k: int
    reached: set[int]
    is_dropped: bool
    preference: Array | None


class Results(NamedTuple):
    """What the last step shows; None: not to be looked at."""

    norms: Bounded | None
    weights: Bounded | None
    alpha: Bounded | None
    grad_norm: Bounded | None


class Model:
    """A balancer.

    :param named: The shared parameters that it was built with and that required grad then.
    :param dtype: Of the net's arithmetic.
    :param options: As the balancer got them.
    """

    def __init__(
        self, named: Sequence[tuple[str, Tensor]], T: int, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        self.names, self.T, self.options = [name for name, _ in named], T, options
        params = [p for _, p in named]
        self.sizes = [p.numel() for p in params]
        stops = np.cumsum(self.sizes)
        self.slices = [slice(stop - size, stop) for stop, size in zip(stops, self.sizes, strict=True)]
        self.P = int(sum(self.sizes))
        self.beta, self.beta_sigma = options["beta"], options["beta_sigma"]
        alpha = options["alpha"]
        self.alpha = "none" if alpha is None else alpha if isinstance(alpha, str) else "constant"
        self.constant = alpha if self.alpha == "constant" else 1.0
        self.log_eps = EPS if options["log_losses"] else None
        dtypes = {p.dtype for p in params}
        self.state_dtype = options["state_dtype"] or (torch.float64 if torch.float64 in dtypes else torch.float32)
        self.compute_dtype = torch.float64 if self.state_dtype is torch.float64 else torch.float32
        # What gradients are known to: that of their own dtype, and that of the float32 or float64 graph they came from.
        self.eps_of_columns, self.tiny_of_columns = (np.zeros(self.P) for _ in range(2))
        for p, part in zip(params, self.slices, strict=True):
            if p.dtype in (torch.bfloat16, torch.float16):
                self.eps_of_columns[part] = torch.finfo(p.dtype).eps
                self.tiny_of_columns[part] = torch.finfo(p.dtype).smallest_normal * torch.finfo(p.dtype).eps
        self.eps = max(torch.finfo(graph_dtype).eps for graph_dtype in (dtype, self.compute_dtype))
        self.is_noisy = bool(self.eps_of_columns.any()) or self.state_dtype is torch.bfloat16
        self._set_rounding_columns(params)
        self.reset()
        preference = options["preference"]
        self.is_plain_sum = self.alpha == "none" and preference is None
        self.state.preference = None if preference is None else np.array(preference, dtype=np.float64)

    def _set_rounding_columns(self, params: Sequence[Tensor]) -> None:
        columns, start = np.zeros(self.P, dtype=np.int64), 0
        dtypes = list(dict.fromkeys(p.dtype for p in params))
        for i in sorted(range(len(params)), key=lambda i: dtypes.index(params[i].dtype)):
            p = params[i]
            memory = torch.empty_like(p, dtype=torch.int64, requires_grad=False)  # dense: in the parameter's own order
            memory.as_strided((p.numel(),), (1,)).copy_(torch.arange(p.numel()))
            columns[self.slices[i]] = start + memory.reshape(-1).numpy()
            start += -(-p.numel() // ALIGN) * ALIGN
        self.columns = columns

    # --- State

    def reset(self, task: int | None = None) -> None:
        if task is not None:
            self.state.ema[task] = self.state.error[task] = 0
            return
        zeros = np.zeros((self.T, self.P))
        preference = self.state.preference if hasattr(self, "state") else None
        self.state = State(oracle.real(zeros), zeros.copy(), 0, set(), False, preference)
        self.window: ModelWindow | None = None
        self.results = self._unmeasured()

    def _unmeasured(self, weights: Array | None = None) -> Results:
        nan = Bounded(np.full(self.T, np.nan), np.zeros(self.T))
        return Results(nan, nan if weights is None else Bounded(weights, np.zeros(self.T)), *[nan_scalar()] * 2)

    def vanishes(self, scale: float) -> bool:
        """Whether gradients with this factor cannot be divided by it."""
        return abs(scale) < torch.finfo(self.compute_dtype).tiny

    def saved(self) -> State:
        return copy.deepcopy(self.state)

    def load(self, state: State) -> None:
        self.state, self.window = copy.deepcopy(state), None
        self.results = Results(None, None, None, None)

    @property
    def has_ema(self) -> bool:
        return self.beta > 0 and not self.state.is_dropped

    @property
    def is_plain(self) -> bool:
        return not self.has_ema and self.is_plain_sum

    @property
    def may_accumulate(self) -> bool:
        """Whether windows of several micro-batches are allowed."""
        return self.is_plain_sum or (self.has_ema and self.options["drop_ema_below"] is None)

    def is_over(self) -> bool:
        """Whether the coefficient of the next step is too small for an EMA."""
        below, k = self.options["drop_ema_below"], self.state.k + 1
        return below is not None and self.window is None and self.has_ema and self.beta / k**self.beta_sigma < below

    def drop_if_over(self) -> None:
        """Before a call."""
        if self.is_over():
            self.state.is_dropped = True
            self.state.ema[:] = self.state.error[:] = 0

    # --- Steps

    def begin(
        self, tasks: Sequence[int], losses: Sequence[float], *, scale: Any, active: list[bool] | None, M: int | None
    ) -> oracle.Begun:
        """Begin a call, or what it would do: seeds of the backward passes, coefficients of the rows."""
        window = self.window or ModelWindow(M, [0] * self.T)
        here = None if active is None else np.array([active[t] for t in tasks])
        values = np.array([0.0 if self.log_eps is not None and -1e-6 <= l < 0 else l for l in losses])
        if self.vanishes(scale):
            begun = oracle.begin_step(values, 1, active=np.zeros(len(tasks), dtype=bool))
            return begun._replace(inv_scale=oracle.real(1))
        return oracle.begin_step(
            values,
            self.state.k + 1,
            active=here,
            scale=scale,
            beta=self.beta if self.has_ema else 0.0,
            beta_sigma=self.beta_sigma,
            micro_batches=window.size,
            log_eps=self.log_eps,
        )

    def take(
        self,
        tasks: Sequence[int],
        begun: oracle.Begun,
        grads: Sequence[Array],
        reached: Iterable[int],
        *,
        scale: Any,
        active: list[bool] | None,
        M: int | None,
    ) -> None:
        """Take one gradient of each of ``tasks``, as autograd gave it from the seeds."""
        if self.window is None:
            self.window = ModelWindow(M, [0] * self.T)
            if not self.has_ema:
                self.state.ema[:] = self.state.error[:] = 0
        window, state = self.window, self.state
        window.active, window.scale = active, scale
        window.found_inf |= begun.found_inf
        state.reached |= set(reached)
        self.updated_rows, self.held = set(), np.zeros((self.T, self.P), dtype=bool)
        for task, new_beta, grad in zip(tasks, begun.betas, grads, strict=True):
            beta, accumulate = window.betas.setdefault(task, new_beta), window.taken[task] > 0
            before = state.ema[task]
            largest = torch.finfo(self.compute_dtype).max
            after = oracle.ema_update(before, grad, beta, begun.inv_scale, accumulate=accumulate, largest=largest).ema
            if beta != 1:
                self._take_row(task, before, after, grad, beta, float(begun.inv_scale), accumulate)
            window.taken[task] += 1

    def _take_row(
        self, task: int, before: Array, after: Array, grad: Array, beta: Any, inv_scale: float, accumulate: bool
    ) -> None:
        state = self.state
        limit = ENTRY_LIMIT if self.compute_dtype is torch.float32 else 2.0**490
        with np.errstate(invalid="ignore", over="ignore"):
            exact = (1 if accumulate else beta) * before + (1 - beta) * oracle.real(inv_scale) * oracle.real(grad)
            held = ~(np.abs(exact) <= limit)
        magnitude = np.where(np.isfinite(grad), np.abs(grad), 0).astype(np.float64)
        row = magnitude.max(initial=0.0)
        of_grad = SLACK * self.eps * row + self.eps_of_columns * magnitude + self.tiny_of_columns
        error = (1.0 if accumulate else float(beta)) * state.error[task]
        error = error + (1 - float(beta)) * abs(inv_scale) * of_grad
        error = error + 8 * torch.finfo(self.compute_dtype).eps * np.abs(np.where(held, 0, exact)).astype(np.float64)
        state.error[task] = np.where(held, state.error[task], error)
        state.ema[task] = np.where(held, before, after)
        assert self.window is not None
        self.window.found_inf |= bool(held.any())
        self.updated_rows.add(task)
        self.held[task] = held

    def settle(self, ema: Array) -> None:
        """Compare the EMA with the balancer's, and take over the latter's rounding where it cannot be followed."""
        low, high = self.state.ema - self.state.error, self.state.ema + self.state.error
        if self.state_dtype is torch.bfloat16 and self.window is not None:
            for task in self.updated_rows:
                micro_batch = self.window.taken[task] - 1
                bits = rounding_bits(self.state.k * self.T + task + (micro_batch << 40), self.columns)
                rounded = [np.where(self.held[task], m[task], round_to_bfloat16(m[task], bits)) for m in (low, high)]
                low[task], high[task] = rounded
        wrong = ~((low <= ema) & (ema <= high))
        assert not wrong.any(), f"EMA of (task, column) {np.argwhere(wrong).tolist()}: {ema[wrong]}, not {low[wrong]}"
        if self.is_noisy:
            self.state.ema, self.state.error = oracle.real(ema), np.zeros_like(self.state.error)

    def is_complete(self) -> bool:
        return self.window is not None and self.window.is_complete()

    def finish(self) -> Bounded:
        """End the step; what the shared gradient gets."""
        window, state = self.window, self.state
        assert window is not None
        self.window = None
        counts = np.array([n > 0 for n in window.taken])
        if window.active is not None:
            counts &= np.array(window.active)
        preference = counts * (1.0 if state.preference is None else state.preference)
        norms, scale = oracle.row_norms(state.ema), oracle.real(window.scale)
        balanced = oracle.combine(
            state.ema,
            norms,
            self.alpha,
            self.constant,
            preference=preference,
            scale=scale,
            found_inf=window.found_inf,
        )
        if not window.found_inf:
            state.k += 1
        eps = SLACK * torch.finfo(self.compute_dtype).eps
        norm_error = np.sqrt(np.square(state.error).sum(axis=1)) + eps * norms
        alpha_error = norm_error.max() if self.alpha not in ("constant", "none") else eps * abs(balanced.alpha)
        if self.alpha == "none":
            weight_error = eps * np.abs(balanced.weights)
        else:
            denominator = norms + 1e-8
            weight_error = np.abs(balanced.weights) * (norm_error / denominator + eps)
            weight_error = weight_error + preference * alpha_error / denominator
        terms = np.abs(balanced.weights)[:, None] * state.error
        terms = terms + (weight_error + eps * np.abs(balanced.weights))[:, None] * np.abs(state.ema)
        out_error = np.abs(scale) * terms.sum(axis=0)
        if self.vanishes(window.scale):
            out_error = out_error + 1e-25  # times rows that keep what they had, which is anything without an EMA
        grad_norm = nan_scalar()
        if not window.found_inf and window.scale:
            size = np.abs(scale)
            value = np.sqrt(balanced.out_sq_norm) / size
            grad_norm = Bounded(value, np.sqrt(np.square(out_error).sum()) / size + eps * value)
        is_garbage = window.found_inf and not self.has_ema
        weights = np.full(self.T, np.nan) if window.found_inf else balanced.weights
        self.results = Results(
            None if is_garbage else Bounded(norms, norm_error),
            Bounded(weights, weight_error),
            None if is_garbage else Bounded(np.asarray(balanced.alpha), np.asarray(alpha_error)),
            None if self.vanishes(window.scale) else grad_norm,
        )
        return Bounded(balanced.out, out_error)

    def count_plain(self, tasks: Sequence[int], active: list[bool] | None, M: int | None) -> None:
        """The same of equal weighting, whose gradients go straight into ``.grad``."""
        if self.window is None:
            self.window = ModelWindow(M, [0] * self.T)
        for task in tasks:
            self.window.taken[task] += 1
        if self.window.is_complete():
            self.finish_plain(active)

    def finish_plain(self, active: list[bool] | None = None) -> None:
        assert self.window is not None
        weights = np.array([float(n > 0) for n in self.window.taken])
        if active is not None:
            weights *= active
        self.results = self._unmeasured(weights)
        self.state.k += 1
        self.window = None


def nan_scalar() -> Bounded:
    return Bounded(np.asarray(np.nan), np.asarray(0.0))


def _mix(word: Array) -> Array:
    word = word ^ (word >> np.uint64(16))
    word = (word * np.uint64(0x7FEB352D)) & np.uint64(0xFFFFFFFF)
    word = word ^ (word >> np.uint64(15))
    word = (word * np.uint64(0x846CA68B)) & np.uint64(0xFFFFFFFF)
    return word ^ (word >> np.uint64(16))


def rounding_bits(seed: int, columns: Array) -> Array:
    """Random numbers below ``2**16``, as ``dbmtl_fused.rounding`` describes them."""
    low, high = (np.array([half], dtype=np.uint64) for half in (seed & 0xFFFFFFFF, seed >> 32))
    key = _mix(low ^ _mix((high + np.uint64(0x9E3779B9)) & np.uint64(0xFFFFFFFF)))
    return (_mix(columns.astype(np.uint64) ^ key) >> np.uint64(16)).astype(np.uint32)


def round_to_bfloat16(values: Array, bits: Array) -> Array:
    """``values`` after a float32's lower half was cut off, and the random number added before."""
    words = values.astype(np.float32).view(np.uint32) + bits
    return oracle.real((words & np.uint32(0xFFFF0000)).view(np.float32))
