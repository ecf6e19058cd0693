"""Random sequences of calls, each compared with a model of the balancer in the oracle's precision.

Every run draws new sequences from the run's seed; ``DBMTL_FUSED_TEST_SEED`` brings them back.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from fuzz_model import EPS, KINDS, SLACK, Bounded, Model, Net, State
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from op_inputs import DEVICE
from stand_ins import EMULATED, INTERPRETED
from torch import Tensor

from dbmtl_fused import DBMTL, backends

SEQUENCES = int(os.environ.get("DBMTL_FUSED_TEST_SEQUENCES", "300"))
CALLS = 20  # at most, in one sequence

NOT_YET: set[str] = set()
"""Behaviour that is promised and not there yet: what it names is not tried."""

PHASES = (
    tuple(hypothesis.Phase) if os.environ.get("DBMTL_FUSED_TEST_SHRINK", "1") == "1" else (hypothesis.Phase.generate,)
)
REGULARISER = 0.3


class BoomError(Exception):
    """Raised inside a backward pass."""


@dataclass(frozen=True)
class Call:
    """One call of the balancer.

    :param way: ``"backward"`` of the balancer, or the drop-in ``"loss"`` and its backward pass, ``"grad"``:
        ``autograd.grad`` of it, ``"inputs"``: its backward pass to some parameters.
    :param factor: On the drop-in loss.
    """

    seed: int
    way: str = "backward"
    form: str = "list"
    graph: str = "one"
    variants: tuple[str, ...] = ("", "", "", "")
    absent: frozenset[int] = frozenset()
    specials: tuple[str, ...] = ("", "", "", "")
    active: tuple[bool, ...] | None = None
    M: int | None = None
    factor: float = 1.0
    scale: float | None = None
    regularise: bool = False
    overwrite: bool = False
    retain: bool = False
    nested: bool = False
    is_late: bool = False


@dataclass
class Prepared:
    """A call whose losses have been computed, twice: for the balancer and for the model."""

    call: Call
    tasks: list[int]
    M: int | None
    active: list[bool] | None
    losses: list[Tensor]
    first: Tensor
    argument: Any
    twins: list[Tensor]
    values: list[float]
    is_stacked: bool
    kind: tuple[bool, bool]
    loss: Tensor | None = None


seeds = st.integers(0, 2**16)
forms = st.sampled_from(["list", "list", "tuple", "dict", "stack", "stack", "unplain", "0-d"])
graphs = st.sampled_from(["one", "one", "each", "mixed"])
variants = st.tuples(*[st.sampled_from(["", "", "", "(1,)", "(1, 1)", "double"])] * 4)
factors = st.sampled_from([1.0, 1.0, 0.25, -2.0, 1024.0, 0.0, 1e-40])
bad = st.sampled_from(["", "", "nan", "inf", "flat", "flat", "zero", "below zero", "inf gradient", "huge gradient"])
subsets = st.frozensets(st.integers(0, 3), max_size=3)
flips = st.booleans()
rarely = st.sampled_from([False, False, False, True])


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    T = draw(st.integers(1, 4))
    beta = draw(st.sampled_from([0.0, 0.5, 0.9, 0.9]))
    beta_sigma = draw(st.sampled_from([0.5, 0.5, 0.0, 1.0]))
    drop = draw(st.sampled_from([None, None, 0.35, 0.5])) if beta_sigma else None
    preference = draw(st.sampled_from([None, None, "list", "dict"]))
    if preference is not None:
        preference = draw(st.tuples(*[st.sampled_from([1.0, 0.5, 3.0, 0.0])] * T).filter(any))
    return {
        "T": T,
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.float64])),
        "kinds": draw(st.lists(st.sampled_from(KINDS), unique=True, max_size=6)),
        "as_pairs": draw(flips),
        "seed": draw(seeds),
        "options": {
            "beta": beta,
            "beta_sigma": beta_sigma,
            "alpha": draw(st.sampled_from(["max", "max", "min", "min", "mean", "median", 2.5, None])),
            "log_losses": draw(st.sampled_from([True, True, False])),
            "preference": preference,
            "state_dtype": draw(st.sampled_from([None, None, torch.float32, torch.float64, torch.bfloat16])),
            "bucket_bytes": draw(st.sampled_from([None, 1, 64, "auto"])),
            "drop_ema_below": drop if drop is None or drop <= beta else None,
            "backend": draw(st.sampled_from(backends.available(DEVICE.type))),
        },
    }


def values_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().double().numpy().copy()


def largest(tensors: Iterable[Tensor]) -> float:
    """Magnitude of the largest finite number."""
    return max((float(t.detach().double().abs().nan_to_num(0, 0, 0).max()) for t in tensors if t.numel()), default=0.0)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; NaN is NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_bounded(name: str, actual: Tensor, expected: Bounded | None) -> None:
    if expected is None:
        return
    value, error = np.float64(expected.value), np.float64(expected.error)
    actual_values = values_of(actual)
    close = (np.abs(actual_values - value) <= error) | (actual_values == value)
    assert (close | (np.isnan(actual_values) & np.isnan(value))).all(), (
        f"{name}: {actual_values}, not {value} ± {error}"
    )


def looked_at(balancer: DBMTL, *, with_ema: bool = True) -> list[Tensor]:
    """What users see of a balancer, as it is now."""
    ema = balancer.ema.values() if with_ema else ()
    seen = [*ema, balancer.step, balancer.norms, balancer.weights, balancer.alpha_value]
    return [tensor.clone() for tensor in seen]


def varied(loss: Tensor, variant: str) -> Tensor:
    """The same loss in another shape or dtype."""
    match variant:
        case "(1,)":
            return loss.reshape(1)
        case "(1, 1)":
            return loss.reshape(1, 1)
        case "double":
            return loss.double()
    return loss


def options_of(prepared: Prepared) -> dict[str, Any]:
    active = None if prepared.active is None else torch.tensor(prepared.active)
    return {"active": active, "accumulation_steps": prepared.M}


@contextmanager
def expected_warning(prepared: Prepared) -> Iterator[None]:
    if prepared.is_stacked:
        with pytest.warns(UserWarning, match="not a plain torch.stack of the task losses"):
            yield
    else:
        yield


def always(machine: Sequences) -> bool:
    return True


def has_several(machine: Sequences) -> bool:
    return machine.T > 1


def in_window(machine: Sequences) -> bool:
    return machine.model.window is not None


def logs(machine: Sequences) -> bool:
    return machine.options["log_losses"]


def with_first(value: Callable[[Tensor], Any]) -> Callable[[Sequences, list[Tensor]], Any]:
    return lambda machine, losses: [value(losses[0]), *losses[1:]]


def as_list(machine: Sequences, losses: list[Tensor]) -> Any:
    return losses


def no_options(machine: Sequences) -> dict[str, Any]:
    return {} if machine.model.window is None else {"accumulation_steps": machine.model.window.M}


WRONG_CALLS: dict[str, tuple[Callable[..., bool], Callable[..., Any], Callable[..., dict[str, Any]], Any]] = {
    "unknown task": (always, lambda m, l: {**dict(zip(m.names, l, strict=True)), "who": l[0]}, no_options, ValueError),
    "too many": (always, lambda m, l: [*l, l[0]], no_options, ValueError),
    "none": (always, lambda m, l: [None] * m.T, no_options, ValueError),
    "wrong shape": (always, with_first(lambda l: l.expand(3)), no_options, ValueError),
    "no graph": (always, with_first(lambda l: l.detach()), no_options, ValueError),
    "integer": (always, with_first(lambda l: l.detach().long()), no_options, TypeError),
    "number": (always, with_first(Tensor.item), no_options, TypeError),
    "no losses at all": (always, lambda m, l: None, no_options, TypeError),
    "stack of another shape": (always, lambda m, l: torch.stack(l)[None], no_options, ValueError),
    "stack without graph": (always, lambda m, l: torch.stack(l).detach(), no_options, ValueError),
    "set of losses": (has_several, lambda m, l: set(l), no_options, TypeError),
    "negative": (logs, with_first(lambda l: l - l.detach() - 3), no_options, ValueError),
    "no micro-batch": (always, as_list, lambda m: {"accumulation_steps": 0}, ValueError),
    "True micro-batches": (always, as_list, lambda m: {"accumulation_steps": True}, ValueError),
    "another window": (in_window, as_list, lambda m: {"accumulation_steps": m.model.window.size + 1}, ValueError),
    "no window": (in_window, as_list, lambda m: {}, ValueError),
    "mask in a window": (
        always,
        as_list,
        lambda m: {"accumulation_steps": 1, "active": torch.ones(m.T, dtype=torch.bool)},
        ValueError,
    ),
    "mask of another shape": (always, as_list, lambda m: {"active": torch.ones(m.T + 1, dtype=torch.bool)}, ValueError),
    "mask of numbers": (always, as_list, lambda m: {"active": torch.ones(m.T)}, ValueError),
    "mask as a list": (always, as_list, lambda m: {"active": [True] * m.T}, TypeError),
}
"""When it applies, losses, options, and what is raised."""


def shortened(state: dict[str, Any]) -> None:
    state["ema"]["plain"] = state["ema"]["plain"][:, :2]


def renamed(state: dict[str, Any]) -> None:
    state["ema"]["other"] = state["ema"].pop("plain")


ANY_KIND = (TypeError, ValueError, AttributeError, RuntimeError)
WRONG_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], Any]] = {
    "no EMA": (lambda state: state.pop("ema"), ValueError),
    "no step": (lambda state: state.pop("step"), ValueError),
    "no names": (lambda state: state.pop("reached"), ValueError),
    "other tasks": (lambda state: state.update(task_names=[*state["task_names"], "x"]), ValueError),
    "another shape": (shortened, ValueError),
    "another parameter": (renamed, ValueError),
    "step is a word": (lambda state: state.update(step="x"), ANY_KIND),
    "a number of names": (lambda state: state.update(reached=5), ANY_KIND),
    "an EMA of words": (lambda state: state["ema"].update(plain="x"), ANY_KIND),
}
"""How a state is spoilt, and what is raised; more than a ValueError: only if loading is all or nothing."""


class Sequences(RuleBasedStateMachine):
    """A balancer and its model."""

    @initialize(config=configurations())
    def build(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)  # every product here is tiny
        self.T, self.options = config["T"], config["options"]
        self.net = Net(config["kinds"], self.T, config["dtype"], config["seed"])
        self.names = [f"task {t}" for t in range(self.T)] if config["seed"] % 2 else [str(t) for t in range(self.T)]
        self.as_pairs = config["as_pairs"]
        self.balancer = self.new_balancer()
        self.model = Model(self.named_shared(), self.T, config["dtype"], self.options)
        self.saved: tuple[dict[str, Any], State, Tensor | None] | None = None
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.asleep: list[tuple[DBMTL, list[Tensor]]] = []
        self.pending: Prepared | None = None

    # --- What is there

    def named_shared(self) -> list[tuple[str, Tensor]]:
        """Parameters that required grad when the balancer was built."""
        return [(name, p) for name, p in self.net.encoder.named_parameters() if name != "frozen"]

    def new_balancer(self, **options: Any) -> DBMTL:
        options = {**self.options, **options}
        if options["preference"] is not None and self.T > 1:
            options["preference"] = dict(zip(self.names, options["preference"], strict=True))
        shared = list(self.net.encoder.named_parameters()) if self.as_pairs else self.net.encoder
        if self.names[0] != "0":
            tasks: dict[str, Any] = {"task_names": self.names}
        else:
            tasks = {"num_tasks": self.T if "numpy num_tasks" in NOT_YET else np.int64(self.T)}
        frozen = [p for _, p in self.named_shared() if not p.requires_grad]
        for p in frozen:  # since then
            p.requires_grad_(True)
        balancer = DBMTL(shared, **tasks, **options)
        for p in frozen:
            p.requires_grad_(False)
        return balancer

    @property
    def shared(self) -> list[Tensor]:
        return [p for _, p in self.named_shared()]

    @property
    def heads(self) -> list[Tensor]:
        return list(self.net.heads.parameters())

    @property
    def everything(self) -> list[Tensor]:
        return list(self.net.parameters())

    def ema_of(self, balancer: DBMTL) -> list[Tensor]:
        return [*balancer.ema.values()]

    def flat_ema(self) -> np.ndarray[Any, Any] | None:
        ema = self.balancer.ema
        assert bool(ema) == self.model.has_ema
        if not ema:
            return None
        assert set(ema) == set(self.model.names)
        for name, p in self.named_shared():
            assert ema[name].shape == (self.T, *p.shape)
            assert ema[name].dtype == self.model.state_dtype
        return values_of(torch.cat([ema[name].double().reshape(self.T, -1) for name in self.model.names], dim=1))

    # --- A call, for both

    def prepare(self, call: Call) -> Prepared:
        model, window = self.model, self.model.window
        model.drop_if_over()
        tasks = [t for t in range(self.T) if t not in call.absent] or [0]
        M, active = call.M, None
        if window is not None:
            M = window.M
            left = [t for t in range(self.T) if window.taken[t] < window.size]
            tasks = [t for t in tasks if t in left] or left
        elif M is not None and M > 1 and not model.may_accumulate:
            M = 1
        if call.active is not None and M is None:
            active = list(call.active[: self.T])
        form = call.form
        if form in ("stack", "unplain") and len(tasks) < self.T:
            form = "dict"
        if form == "0-d" and (self.T > 1 or "0-d tensor" in NOT_YET):
            form = "list"
        specials = {t: kind for t in tasks if (kind := self.possible(call.specials[t]))}
        batch = self.net.batch(call.seed, specials, call.is_late)
        # A backward pass inside a backward pass reaches leaves by itself, whatever the outer one is asked for.
        nested = call.nested and call.way in ("backward", "loss") and self.model.state_dtype is not torch.bfloat16
        losses, first = self.net.losses(batch, tasks, graph=call.graph, nested=nested)
        twins, _ = self.net.losses(batch, tasks)
        if form in ("list", "dict", "tuple"):
            losses, twins = (
                [varied(l, call.variants[t]) for t, l in zip(tasks, ls, strict=True)] for ls in (losses, twins)
            )
        values = [l.item() for l in twins]
        if form == "unplain":
            twins = [torch.stack(twins) * 1.0] * self.T
        return Prepared(
            call,
            tasks,
            M,
            active,
            losses,
            first,
            self.argument(form, tasks, losses),
            twins,
            values,
            form == "unplain",
            (model.has_ema, model.is_plain),
        )

    def possible(self, special: str) -> str:
        if special == "huge gradient" and (
            "huge gradients" in NOT_YET or self.model.compute_dtype is torch.float64 or self.model.is_plain
        ):
            return ""
        if special == "below zero" and "losses just below zero" in NOT_YET:
            return ""
        return special

    def argument(self, form: str, tasks: Sequence[int], losses: list[Tensor]) -> Any:
        by_task: list[Tensor | None] = [None] * self.T
        for t, loss in zip(tasks, losses, strict=True):
            by_task[t] = loss
        match form:
            case "dict":
                pairs = [(self.names[t], loss) for t, loss in enumerate(by_task) if t % 2 or loss is not None]
                return dict(reversed(pairs))
            case "tuple":
                return tuple(by_task)
            case "stack":
                return torch.stack(losses)
            case "unplain":
                return torch.stack(losses) * 1.0
            case "0-d":
                return losses[0]
        return by_task

    def make_loss(self, prepared: Prepared) -> None:
        """The drop-in loss; its value."""
        with expected_warning(prepared):
            prepared.loss = self.balancer(prepared.argument, **options_of(prepared))
        log = self.options["log_losses"]
        counting = [
            v
            for t, v in zip(prepared.tasks, prepared.values, strict=True)
            if prepared.active is None or prepared.active[t]
        ]
        if all(np.isfinite(counting)):
            terms = [np.log(max(v, 0.0) + 1e-8) if log else v for v in counting]
            bound = SLACK * torch.finfo(prepared.loss.dtype).eps * (1 + np.abs(terms).sum())
            assert_bounded("loss", prepared.loss, Bounded(np.asarray(np.sum(terms)), np.asarray(bound)))

    def execute(self, prepared: Prepared) -> None:
        """Run the call and compare everything."""
        call, model = prepared.call, self.model
        is_loss = call.way != "backward"
        factor, scale, scaler = 1.0, call.scale or 1.0, None
        if is_loss:
            if prepared.loss is None:
                self.make_loss(prepared)
            assert prepared.loss is not None
            factor = self.factor_of(call)
            scale = float(torch.tensor(factor, dtype=prepared.loss.dtype))
        elif call.scale is not None:
            scaler = torch.amp.GradScaler(DEVICE.type, init_scale=call.scale)
        was_plain, is_first = model.is_plain, model.window is None
        expected = self.expect(prepared, scale)
        before = {id(p): None if p.grad is None else p.grad.clone() for p in self.everything}
        asked, got = self.asked_for(call), {}

        if is_loss:
            got = self.run_loss(prepared, factor, asked)
        else:
            with expected_warning(prepared):
                self.balancer.backward(
                    prepared.argument,
                    **options_of(prepared),
                    scaler=scaler,
                    overwrite=call.overwrite,
                    retain_graph=call.retain,
                )
        expected |= self.settle()
        if is_loss and call.regularise:
            self.add_regulariser(expected, scale, asked)
        replaced = {id(p) for p in self.shared} if call.overwrite and not is_loss else set()
        for p in self.everything:
            contribution = expected.get(id(p))
            old = before[id(p)]
            if call.way in ("grad", "inputs") and not any(p is q for q in asked):
                contribution = None
            if call.way == "grad":
                self.check_grad(p, None, got.get(id(p)), contribution, any_strides=was_plain)
                contribution = None
            if id(p) in replaced and was_plain and is_first and contribution is None:
                assert p.grad is None or (old is not None and same(p.grad, old))
                continue
            if id(p) in replaced and contribution is not None and (is_first or not was_plain):
                old = None
            self.check_grad(p, old, p.grad, contribution)
        self.check()

    def run_loss(self, prepared: Prepared, factor: float, asked: list[Tensor]) -> dict[int, Tensor | None]:
        """Run the backward pass of the drop-in loss; gradients that it returned."""
        call = prepared.call
        assert prepared.loss is not None
        total = prepared.loss * factor
        if call.regularise:
            squares = sum(p.double().square().sum() for p in self.everything if p.requires_grad)
            total = total + factor * REGULARISER * squares
        if call.way == "grad":
            grads = torch.autograd.grad(total, asked, retain_graph=call.retain, allow_unused=True)
            return {id(p): grad for p, grad in zip(asked, grads, strict=True)}
        total.backward(inputs=asked if call.way == "inputs" else None, retain_graph=call.retain)
        return {}

    def asked_for(self, call: Call) -> list[Tensor]:
        """Some of the shared parameters."""
        some = [p for i, p in enumerate(self.shared) if p.requires_grad and (i + call.seed) % 3]
        if not some or self.model.is_plain:  # there only a backward pass that reaches something counts
            some = [self.net.encoder.plain, *(p for p in some if p is not self.net.encoder.plain)]
        return some

    def add_regulariser(self, expected: dict[int, Bounded], scale: float, asked: list[Tensor]) -> None:
        for p in self.everything:
            if p.requires_grad:
                value = 2 * REGULARISER * scale * values_of(p)
                error = 4 * torch.finfo(p.dtype).eps * np.abs(value)
                base = expected.get(id(p), Bounded(np.zeros(p.shape), np.zeros(p.shape)))
                expected[id(p)] = Bounded(base.value + value, base.error + error)

    def factor_of(self, call: Call) -> float:
        if abs(call.factor) < 1e-30:
            model = self.model
            in_window = model.window is not None or call.M is not None
            if "scale zero" in NOT_YET or in_window or any(call.specials) or model.compute_dtype is torch.float64:
                return 1.0
        return call.factor

    def expect(self, prepared: Prepared, scale: float) -> dict[int, Bounded]:
        """Move the model on; what heads get, and shared parameters if nothing is balanced."""
        model, tasks, call = self.model, prepared.tasks, prepared.call
        options: dict[str, Any] = {"scale": scale, "active": prepared.active, "M": prepared.M}
        begun = model.begin(tasks, prepared.values, **options)
        seeds = begun.seeds
        if model.is_plain and prepared.loss is not None:
            seeds = self.plain_seeds(prepared, scale)
        twin_seeds = []
        for t, twin, seed in zip(tasks, prepared.twins, seeds, strict=True):
            flat = torch.zeros(twin.numel(), dtype=twin.dtype)
            flat[t if prepared.is_stacked else 0] = float(seed)
            twin_seeds.append(flat.reshape(twin.shape))
        inputs = [p for p in [*self.shared, *self.heads] if p.requires_grad]
        per_task = [
            torch.autograd.grad(twin, inputs, seed, retain_graph=True, allow_unused=True)
            for twin, seed in zip(prepared.twins, twin_seeds, strict=True)
        ]
        expected = {}
        if call.way in ("backward", "loss"):
            heads = {id(p) for p in self.heads}
            expected = {id(p): self.summed(per_task, j) for j, p in enumerate(inputs) if id(p) in heads}
        if model.is_plain:
            whole = torch.autograd.grad(prepared.twins, inputs, twin_seeds, retain_graph=True, allow_unused=True)
            for j, (p, grad) in enumerate(zip(inputs, whole, strict=True)):
                if grad is not None and id(p) not in expected:
                    _, error = self.summed(per_task, j)
                    sizes = sum(np.abs(values_of(g[j])) for g in per_task if g[j] is not None)
                    expected[id(p)] = Bounded(values_of(grad), error + 2 * torch.finfo(p.dtype).eps * sizes)
            model.count_plain(tasks, prepared.active, prepared.M)
        else:
            number = {id(p): i for i, p in enumerate(self.shared)}
            rows, reached = np.zeros((len(tasks), model.P)), set()
            for row, grads in zip(rows, per_task, strict=True):
                for p, grad in zip(inputs, grads, strict=True):
                    if grad is not None and id(p) in number:
                        reached.add(number[id(p)])
                        row[model.slices[number[id(p)]]] = values_of(grad).reshape(-1)
            model.take(tasks, begun, list(rows), reached, **options)
        return {key: value for key, value in expected.items() if value is not None}

    def plain_seeds(self, prepared: Prepared, scale: float) -> np.ndarray[Any, Any]:
        """Autograd's derivative of the sum of logs, which asks nothing of a loss."""
        seeds = []
        for t, value in zip(prepared.tasks, prepared.values, strict=True):
            seed = scale / (prepared.M or 1)
            if self.options["log_losses"]:
                seed = seed / (value if np.isnan(value) else max(value, 0.0) + EPS)
            seeds.append(seed if prepared.active is None or prepared.active[t] else 0.0)
        return np.array(seeds)

    def summed(self, per_task: Sequence[Sequence[Tensor | None]], number: int) -> Bounded | None:
        """The gradient of one parameter over tasks, known as well as the largest of each task's."""
        present = [values_of(grads[number]) for grads in per_task if grads[number] is not None]
        if not present:
            return None
        size = sum(largest(grad for grad in grads if grad is not None) for grads in per_task)
        with np.errstate(invalid="ignore"):
            value = np.sum(present, axis=0)
        return Bounded(value, np.full(value.shape, SLACK * self.model.eps * size + 1e-37))

    def settle(self) -> dict[int, Bounded]:
        """Compare the EMA and end the step if it is complete; what shared parameters get then."""
        model = self.model
        if model.window is None:
            return {}  # nothing is balanced
        if model.has_ema:
            ema = self.flat_ema()
            assert ema is not None
            model.settle(ema)
        return self.finish() if model.is_complete() else {}

    def finish(self) -> dict[int, Bounded]:
        model = self.model
        if model.is_plain:
            model.finish_plain()
            return {}
        value, error = model.finish()
        return {
            id(p): Bounded(value[part].reshape(p.shape), error[part].reshape(p.shape))
            for i, (p, part) in enumerate(zip(self.shared, model.slices, strict=True))
            if i in model.state.reached and p.requires_grad
        }

    # --- Comparisons

    def check_grad(
        self,
        p: Tensor,
        old: Tensor | None,
        new: Tensor | None,
        contribution: Bounded | None,
        *,
        any_strides: bool = False,
    ) -> None:
        """``new`` is ``old`` plus the contribution, rounded to the parameter's dtype.

        :param any_strides: As autograd returns it.
        """
        if contribution is None:
            assert (new is None) == (old is None), (old, new)
            assert new is None or (old is not None and same(new, old)), (old, new)
            return
        assert new is not None
        assert new.dtype == p.dtype
        assert new.shape == p.shape
        if old is None and not any_strides:
            dense = torch.empty_like(p).stride()
            assert all(n < 2 or a == b for n, a, b in zip(p.shape, new.stride(), dense, strict=True)), new.stride()
        info, value, error = torch.finfo(p.dtype), np.float64(contribution.value), np.float64(contribution.error)
        with np.errstate(invalid="ignore"):
            total, sizes = value, np.abs(value)
            if old is not None:
                total, sizes = total + values_of(old), sizes + np.abs(values_of(old))
            bound = error + 2 * info.eps * sizes + info.smallest_normal * info.eps
            actual, rounded = values_of(new), values_of(torch.from_numpy(np.array(total)).to(p.dtype))
            right = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded)) | (np.abs(actual - total) <= bound)
        assert right.all(), f"gradient {actual[~right]}, not {total[~right]}"

    def check(self) -> None:
        """Everything that can be looked at without a call."""
        balancer, model = self.balancer, self.model
        assert balancer.step.dtype == torch.int64
        assert int(balancer.step) == model.state.k
        ema = self.flat_ema()
        if ema is not None and model.window is None:
            within = np.abs(ema - model.state.ema) <= model.state.error
            assert within.all(), "the EMA has changed"
        results = model.results
        assert_bounded("norms", balancer.norms, results.norms)
        assert_bounded("weights", balancer.weights, results.weights)
        assert_bounded("alpha_value", balancer.alpha_value, results.alpha)
        grad_norm = results.grad_norm
        if grad_norm is not None and "negative grad_norm" in NOT_YET:
            assert_bounded("grad_norm", balancer.grad_norm.abs(), grad_norm)
        else:
            assert_bounded("grad_norm", balancer.grad_norm, grad_norm)
        if ema is not None and model.window is None:
            self.check_gram(ema)
        for tensor, copied in self.kept:
            assert same(tensor, copied), "a tensor handed out earlier has changed"
        for other, state in self.asleep:
            assert all(same(a, b) for a, b in zip(looked_at(other), state, strict=True)), "a copied balancer changed"

    def check_gram(self, ema: np.ndarray[Any, Any]) -> None:
        gram, norms = ema @ ema.T, np.sqrt(np.square(ema).sum(axis=1))
        sizes, eps = np.outer(norms, norms), SLACK * torch.finfo(self.model.compute_dtype).eps
        assert_bounded("gram", self.balancer.gram(), Bounded(gram, eps * sizes + 1e-37))
        if (norms[norms > 0] > 1e-15).all():
            cosine = np.divide(gram, sizes, out=np.zeros_like(gram), where=sizes != 0)
            assert_bounded("cosine", self.balancer.cosine_similarity(), Bounded(cosine, np.full_like(gram, eps)))

    @contextmanager
    def unchanged(self, *, but_heads: bool = False) -> Iterator[None]:
        params = self.shared if but_heads else self.everything
        grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in params]
        before = looked_at(self.balancer)
        yield
        for p, (grad, values) in zip(params, grads, strict=True):
            assert p.grad is grad
            assert grad is None or (values is not None and same(grad, values))
        assert all(same(a, b) for a, b in zip(looked_at(self.balancer), before, strict=True))

    # --- Rules: steps

    def run(self, call: Call) -> None:
        self.execute(self.prepare(call))

    @rule(seed=seeds, form=forms, graph=graphs, variants=variants, overwrite=rarely, nested=rarely, is_late=rarely)
    def backward(self, **options: Any) -> None:
        self.run(Call(**options))

    @rule(
        seed=seeds,
        way=st.sampled_from(["loss", "loss", "grad", "inputs"]),
        form=forms,
        graph=graphs,
        factor=factors,
        regularise=rarely,
        nested=rarely,
        absent=subsets,
    )
    def drop_in_loss(self, **options: Any) -> None:
        self.run(Call(**options))

    @rule(
        seed=seeds,
        way=st.sampled_from(["backward", "loss"]),
        graph=graphs,
        absent=subsets,
        specials=st.sampled_from([("", "", "", ""), ("flat", "", "", ""), ("", "flat", "flat", "")]),
        is_late=rarely,
    )
    def without_some(self, **options: Any) -> None:
        self.run(Call(**options))

    @rule(
        seed=seeds,
        way=st.sampled_from(["backward", "loss", "grad"]),
        form=forms,
        active=st.tuples(flips, flips, flips, flips),
        absent=st.sampled_from([frozenset(), frozenset(), frozenset([1])]),
        specials=st.sampled_from([("", "", "", ""), ("nan", "", "", ""), ("", "inf", "negative", "")]),
    )
    def masked(self, **options: Any) -> None:
        call = Call(**options)
        alive = call.active is not None and self.model.window is None
        specials = [s if alive and not call.active[t] else "" for t, s in enumerate(call.specials)]  # type: ignore[index]
        if self.model.window is not None:
            call = replace(call, active=None)
        self.run(replace(call, specials=tuple(specials)))

    @rule(
        seed=seeds,
        M=st.sampled_from([1, 2, 2, 3]),
        way=st.sampled_from(["backward", "backward", "loss", "grad"]),
        absent=subsets,
        graph=graphs,
        form=forms,
        factor=st.sampled_from([1.0, 1.0, 1.0, 0.25]),
        overwrite=rarely,
        is_late=rarely,
    )
    def micro_batch(self, **options: Any) -> None:
        self.run(Call(**options))

    @precondition(lambda self: hasattr(self, "model") and self.model.window is not None)
    @rule(overwrite=rarely)
    def flush(self, overwrite: bool) -> None:
        before = {id(p): None if p.grad is None else p.grad.clone() for p in self.shared}
        was_plain = self.model.is_plain
        self.balancer.flush(overwrite=overwrite)
        expected = self.finish()
        for p in self.shared:
            contribution = expected.get(id(p))
            old = None if overwrite and not was_plain and contribution is not None else before[id(p)]
            self.check_grad(p, old, p.grad, contribution)
        self.check()

    @rule(seed=seeds, exponent=st.sampled_from([0, 3, 10, 16]), form=forms, specials=st.sampled_from([0, 0, 1]))
    def with_a_scaler(self, seed: int, exponent: int, form: str, specials: int) -> None:
        special = ("", "", "", "") if not specials else ("inf gradient", "", "", "")
        self.run(Call(seed, form=form, scale=2.0**exponent, specials=special))

    @rule(
        seed=seeds,
        way=st.sampled_from(["backward", "loss", "inputs"]),
        form=forms,
        graph=graphs,
        specials=st.tuples(bad, bad, bad, bad),
        M=st.sampled_from([None, None, 2]),
    )
    def with_bad_losses(self, **options: Any) -> None:
        self.run(Call(**options))

    @rule(seed=seeds, form=forms, graph=graphs)
    def twice_on_one_graph(self, seed: int, form: str, graph: str) -> None:
        prepared = self.prepare(Call(seed, form=form, graph=graph, retain=True))
        if prepared.M is not None:
            return
        self.execute(prepared)
        self.model.drop_if_over()
        prepared.call = replace(prepared.call, retain=False)
        self.execute(prepared)

    @rule(seed=seeds, form=forms, way=st.sampled_from(["loss", "grad"]), absent=subsets)
    def prepare_loss(self, **options: Any) -> None:
        """The backward pass of this one comes later."""
        if self.model.window is None and not self.model.is_over():
            self.pending = self.prepare(Call(**options))
            self.make_loss(self.pending)

    @precondition(lambda self: getattr(self, "pending", None) is not None and self.model.window is None)
    @rule()
    def run_prepared_loss(self) -> None:
        prepared, self.pending = self.pending, None
        assert prepared is not None
        if prepared.kind == (self.model.has_ema, self.model.is_plain) and not self.model.is_over():
            self.execute(prepared)

    @rule(seed=seeds)
    def ordinary_backward(self, seed: int) -> None:
        """Of the sum of losses, without the balancer."""
        batch = self.net.batch(seed)
        losses, twins = (self.net.losses(batch, range(self.T))[0] for _ in range(2))
        inputs = [p for p in [*self.shared, *self.heads] if p.requires_grad]
        grads = torch.autograd.grad(sum(twins), inputs, allow_unused=True)
        before = {id(p): None if p.grad is None else p.grad.clone() for p in self.everything}
        torch.stack(losses).sum().backward()
        expected = {id(p): self.summed([grads], j) for j, p in enumerate(inputs)}
        for p in self.everything:
            self.check_grad(p, before[id(p)], p.grad, expected.get(id(p)))
        self.check()

    # --- Rules: gradients and parameters

    @rule(set_to_none=flips)
    def zero_grad(self, set_to_none: bool) -> None:
        self.net.zero_grad(set_to_none=set_to_none)

    @rule(numbers=st.frozensets(st.integers(0, 7), min_size=1, max_size=7))
    def keep_some(self, numbers: frozenset[int]) -> None:
        """Gradients and results that a user holds on to."""
        for i, p in enumerate(self.everything):
            if i in numbers and p.grad is not None:
                self.kept.append((p.grad, p.grad.clone()))
        results = self.balancer.norms, self.balancer.weights, self.balancer.alpha_value, self.balancer.step
        self.kept = [*self.kept, *((tensor, tensor.clone()) for tensor in results)][-30:]
        self.net.zero_grad()

    @rule(number=st.integers(0, 9), head=rarely)
    def freeze_or_unfreeze(self, number: int, head: bool) -> None:
        params = self.heads if head else [p for p in self.shared if p is not self.net.encoder.plain]
        if params:
            p = params[number % len(params)]
            p.requires_grad_(not p.requires_grad)
            self.pending = None

    @precondition(lambda self: hasattr(self, "model") and self.options["preference"] is not None)
    @rule(values=st.tuples(*[st.sampled_from([1.0, 0.5, 2.0, 0.0])] * 4))
    def change_preference(self, values: tuple[float, ...]) -> None:
        if self.model.window is None and any(values[: self.T]):
            assert self.balancer.preference is not None
            self.balancer.preference.copy_(torch.tensor(values[: self.T]))
            self.model.state.preference = np.array(values[: self.T])

    # --- Rules: state

    @rule()
    def save(self) -> None:
        if self.model.window is not None:
            with self.unchanged(), pytest.raises(RuntimeError, match="in the middle of an accumulation window"):
                self.balancer.state_dict()
            return
        state = self.balancer.state_dict()
        reached = {self.model.names[i] for i in self.model.state.reached}
        assert set(state["reached"]) == reached
        assert int(state["step"]) == self.model.state.k
        preference = self.balancer.preference
        kept = None if preference is None else preference.clone()
        self.saved = copy.deepcopy(state), self.model.saved(), kept

    @precondition(lambda self: getattr(self, "saved", None) is not None)
    @rule(into_new=flips, through_file=flips, bucket_bytes=st.sampled_from([None, 1, "auto"]))
    def load(self, into_new: bool, through_file: bool, bucket_bytes: Any) -> None:
        assert self.saved is not None
        state, model_state, preference = copy.deepcopy(self.saved)
        if through_file:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        if into_new:
            self.balancer = self.new_balancer(bucket_bytes=bucket_bytes)
        self.balancer.load_state_dict(state)
        if "preference in state_dict" in NOT_YET and preference is not None:
            assert self.balancer.preference is not None
            self.balancer.preference.copy_(preference)
        if preference is not None:
            assert self.balancer.preference is not None
            assert same(self.balancer.preference, preference)
        self.model.load(model_state)
        self.pending = None
        self.check()

    @rule(task=st.sampled_from([None, 0, 1, 2, 3]))
    def reset(self, task: int | None) -> None:
        if task is None:
            self.balancer.reset()
            self.model.reset()
        elif self.model.window is not None:
            with self.unchanged(), pytest.raises(RuntimeError, match="in the middle of an accumulation window"):
                self.balancer.reset(self.names[0])
        else:
            self.balancer.reset(self.names[task % self.T])
            self.model.reset(task % self.T)
        self.check()

    @rule(by_pickle=flips)
    def go_on_with_a_copy(self, by_pickle: bool) -> None:
        """And what was copied must stay as it is."""
        pair = self.net, self.balancer
        self.asleep = [*self.asleep, (self.balancer, looked_at(self.balancer))][-2:]
        if by_pickle and "pickle" not in NOT_YET:
            self.net, self.balancer = pickle.loads(pickle.dumps(pair))
        else:
            self.net, self.balancer = copy.deepcopy(pair)
        self.pending = None
        self.check()

    # --- Rules: what goes wrong

    @precondition(lambda self: getattr(self, "saved", None) is not None)
    @rule(name=st.sampled_from(list(WRONG_STATES)))
    def wrong_load(self, name: str) -> None:
        """It raises, and nothing has changed."""
        assert self.saved is not None
        spoil, kinds = WRONG_STATES[name]
        if (
            (kinds is not ValueError and "atomic load" in NOT_YET)
            or self.saved[1].is_dropped
            or self.options["beta"] == 0
        ):
            return
        state = dict(copy.deepcopy(self.saved[0]))
        spoil(state)
        preference = self.balancer.preference
        kept = None if preference is None else preference.clone()
        with self.unchanged(), pytest.raises(kinds):
            self.balancer.load_state_dict(state)
        assert preference is None or (kept is not None and same(preference, kept))
        self.check()

    @rule(seed=seeds, name=st.sampled_from(list(WRONG_CALLS)), drop_in=flips)
    def wrong_call(self, seed: int, name: str, drop_in: bool) -> None:
        """It raises, and nothing has changed."""
        applies, argument, options, kinds = WRONG_CALLS[name]
        if not applies(self) or name in NOT_YET or self.model.is_over():
            return  # an EMA whose time is over may go with any call
        if self.model.window is not None:
            kinds = (TypeError, ValueError)  # the tasks may have had their micro-batches, too
        losses, _ = self.net.losses(self.net.batch(seed), range(self.T))
        run: Callable[..., Any] = self.balancer if drop_in else self.balancer.backward
        with self.unchanged(), pytest.raises(kinds):
            run(argument(self, losses), **options(self))
        self.check()

    @rule(seed=seeds, second=flips)
    def wrong_backward_of_the_loss(self, seed: int, second: bool) -> None:
        """With ``create_graph``, or once more."""
        if self.model.is_over():
            return  # the EMA goes when the step begins
        prepared = self.prepare(Call(seed, way="loss", retain=True))
        if self.model.is_plain:
            return
        if second:
            self.execute(prepared)
            message = "supports one backward pass"
        else:
            self.make_loss(prepared)
            message = "cannot be differentiated twice"
        assert prepared.loss is not None
        with self.unchanged(), pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(prepared.loss, self.net.encoder.plain, create_graph=not second)
        self.check()

    @precondition(lambda self: hasattr(getattr(self, "net", None) and self.net.encoder, "frozen"))
    @rule(seed=seeds)
    def unfrozen_after_construction(self, seed: int) -> None:
        if self.model.is_over():
            return
        self.net.encoder.frozen.requires_grad_(True)
        losses, _ = self.net.losses(self.net.batch(seed), range(self.T))
        with self.unchanged(), pytest.raises(RuntimeError, match="stale"):
            self.balancer.backward(losses)
        self.net.encoder.frozen.requires_grad_(False)

    @rule(
        seed=seeds,
        way=st.sampled_from(["backward", "loss"]),
        form=st.sampled_from(["list", "dict", "stack"]),
        graph=graphs,
        where=st.integers(-1, 3),
        M=st.sampled_from([None, None, 2]),
        load=flips,
    )
    def failure(self, seed: int, way: str, form: str, graph: str, where: int, M: int | None, load: bool) -> None:
        """An exception in the backward pass of a task; ``where`` is -1: somewhere in the first one's encoder."""
        if self.model.is_over():
            return  # the EMA goes when the step begins
        prepared = self.prepare(Call(seed, way=way, form=form, graph=graph, M=M))
        if self.model.is_plain and (way == "loss" or self.model.window is not None):
            return  # an ordinary backward pass of an ordinary loss, which has counted by then
        if self.model.window is None and not self.options["drop_ema_below"]:
            self.save()
        place = prepared.first if where < 0 else prepared.losses[where % len(prepared.losses)]
        is_early = where >= 0 and where % len(prepared.losses) == 0

        def boom(grad: Tensor) -> None:
            raise BoomError

        if way == "loss":
            self.make_loss(prepared)
        handle = place.register_hook(boom)
        with_ema = self.model.has_ema
        before = looked_at(self.balancer, with_ema=with_ema)
        run = partial(self.balancer.backward, prepared.argument, **options_of(prepared))
        with self.unchanged_shared_grads(), pytest.raises(BoomError):
            (run if prepared.loss is None else prepared.loss.backward)()
        handle.remove()
        after = looked_at(self.balancer, with_ema=with_ema)
        has_changed = not all(same(a, b) for a, b in zip(after, before, strict=True))
        assert not (is_early and has_changed)
        self.recover(seed, is_early, has_changed, load)

    @contextmanager
    def unchanged_shared_grads(self) -> Iterator[None]:
        before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in self.shared]
        yield
        for p, (grad, values) in zip(self.shared, before, strict=True):
            if not self.model.is_plain:
                assert p.grad is grad
                assert grad is None or (values is not None and same(grad, values))

    def recover(self, seed: int, is_early: bool, has_changed: bool, load: bool) -> None:
        """After a failure: usable as before, or only after ``reset()``; ordinary gradients in any case."""
        model = self.model
        self.pending = None
        self.ordinary_backward_after_failure(seed)
        if model.is_plain:
            if "usable after a failed plain sum" in NOT_YET:
                self.balancer.reset()
                model.reset()
            return
        losses, _ = self.net.losses(self.net.batch(seed), range(self.T))
        left = [t for t in range(self.T) if model.window is None or model.window.taken[t] < model.window.size]
        M = None if model.window is None else model.window.M
        if "usable after a failure" not in NOT_YET and not has_changed:
            if is_early:
                self.run(Call(seed, M=M))
                return
            self.balancer.reset()  # it may ask for that or not
            model.reset()
            return
        with self.unchanged(), pytest.raises(RuntimeError, match=r"reset\(\)"):
            self.balancer.backward({self.names[t]: losses[t] for t in left}, accumulation_steps=M)
        if load and self.saved is not None:
            self.load(False, False, None)
        else:
            self.balancer.reset()
            model.reset()
        self.check()

    def ordinary_backward_after_failure(self, seed: int) -> None:
        """``check`` would look at an EMA that has changed in part."""
        batch = self.net.batch(seed + 1)
        losses, twins = (self.net.losses(batch, range(self.T))[0] for _ in range(2))
        inputs = [p for p in [*self.shared, *self.heads] if p.requires_grad]
        grads = torch.autograd.grad(sum(twins), inputs, allow_unused=True)
        self.net.zero_grad()
        torch.stack(losses).sum().backward()
        for j, p in enumerate(inputs):
            self.check_grad(p, None, p.grad, self.summed([grads], j))


@pytest.mark.skipif(INTERPRETED or EMULATED or DEVICE.type != "cpu", reason="made for the CPU's own backends")
def test_sequences_of_calls(rng: np.random.Generator) -> None:
    settings = hypothesis.settings(
        max_examples=SEQUENCES,
        stateful_step_count=CALLS,
        derandomize=False,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=PHASES,
        report_multiple_bugs=False,
    )
    machine = hypothesis.seed(int(rng.integers(2**32)))(Sequences)
    run_state_machine_as_test(machine, settings=settings)
