"""Whole training steps without the optimizer: what each way of balancing adds to forward and backward passes.

:data:`FLOORS` balance nothing: they are the loops that everything else is measured against. Those that are
:func:`balanced` are DB-MTL and leave the same gradients (:func:`check`). :data:`OTHERS` compute something else and are
there for scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from benchmarks import comparators, torchjd_steps
from benchmarks.comparators import EPS, libmtl_sum
from benchmarks.models import Problem, Size
from benchmarks.step_base import BETA, BETA_SIGMA, LOG_EPS, Balanced, Step, logs_of, weights_of
from dbmtl_fused import DBMTL

OWN_RTOL = 1e-5
"""Largest error of our gradients allowed before anything is timed, as a share of a parameter's largest term."""
RTOL = comparators.LARGE_RTOL
"""The same for all others. Room for the norms that torch computes of float32 rows on CPUs: of a ResNet-18's gradients
they are 8e-4 off. With a small model, all have to be right to :data:`SMALL_RTOL` first."""
SMALL_RTOL = comparators.RTOL


class Forward(Step):
    """No backward at all."""

    def backward(self, losses: list[Tensor]) -> None:
        pass


class OneBackward(Step):
    """Equal weighting: one backward of the sum."""

    def backward(self, losses: list[Tensor]) -> None:
        torch.stack(losses).sum().backward()


class DropInHook(Step):
    """T backwards; a prehook of every shared leaf drops its gradient on arrival: the floor, nothing is ever stored."""

    def __init__(self, size: Problem, device: str | torch.device = "cpu") -> None:
        super().__init__(size, device)
        self.nodes = [get_gradient_edge(p).node for p in self.model.shared()]
        for node in self.nodes:
            node.register_prehook(lambda grads: (None,))

    def backward(self, losses: list[Tensor]) -> None:
        for t in range(len(losses)):
            self.backward_of(losses, t)


class DropAfter(Step):
    """T backwards, with all shared gradients dropped after each (``p.grad = None``): the loop anyone would write."""

    def backward(self, losses: list[Tensor]) -> None:
        for t in range(len(losses)):
            self.backward_of(losses, t)
            for p in self.model.shared():
                p.grad = None


class LibMTL(Balanced):
    """LibMTL's way, written from what it does: each gradient is copied into a new vector in host memory, that into a
    row of a new matrix on the device, and zeroed in place; then its EMA and sum expressions; the result is cloned into
    every ``.grad``.
    """

    gather_on_host = True

    def __init__(self, size: Problem, device: str | torch.device = "cpu") -> None:
        super().__init__(size, device)
        self.ema = self.new_ema()

    def backward(self, losses: list[Tensor]) -> None:
        logs = logs_of(losses)
        grads = torch.zeros_like(self.ema)
        for t in range(len(logs)):
            self.backward_of(logs, t)
            grads[t] = self._vector()
            self.model.encoder.zero_grad(set_to_none=False)
        beta = self.next_beta()
        self.ema = grads + beta * (self.ema - grads)
        for p, part in zip(self.model.shared(), self.views(libmtl_sum(self.ema)), strict=True):
            p.grad = part.clone()

    def _vector(self) -> Tensor:
        vector, start = torch.zeros(self.size.P, device="cpu" if self.gather_on_host else self.ema.device), 0
        for p in self.model.shared():
            assert p.grad is not None
            vector[start : start + p.numel()] = p.grad.view(-1)
            start += p.numel()
        return vector


class LibMTLOnDevice(LibMTL):
    """The same without the way through host memory, which only a GPU has to make."""

    gather_on_host = False


class TorchFlatten(Balanced):
    """Torch's operators on gradients flattened after each backward: ``cat`` into a vector, ``lerp_``; norms, ``mv``."""

    def __init__(self, size: Problem, device: str | torch.device = "cpu") -> None:
        super().__init__(size, device)
        self.ema = self.new_ema()
        self.flat = torch.empty_like(self.ema[0])

    def backward(self, losses: list[Tensor]) -> None:
        logs, beta, shared = logs_of(losses), self.next_beta(), self.model.shared()
        for t in range(len(logs)):
            self.backward_of(logs, t)
            torch.cat([p.grad.view(-1) for p in shared if p.grad is not None], out=self.flat)
            for p in shared:
                p.grad = None
            self.ema[t].lerp_(self.flat, 1 - beta)
        self.write_grads(torch.mv(self.ema.t(), weights_of(self.ema)))


class TorchForeach(Balanced):
    """Torch's operators on lists of tensors: ``_foreach_lerp_`` after each backward; norms, products, sums likewise."""

    def __init__(self, size: Problem, device: str | torch.device = "cpu") -> None:
        super().__init__(size, device)
        self.ema = self.new_ema()
        self.rows = [self.views(row) for row in self.ema]

    def backward(self, losses: list[Tensor]) -> None:
        logs, beta, shared = logs_of(losses), self.next_beta(), self.model.shared()
        for t in range(len(logs)):
            self.backward_of(logs, t)
            torch._foreach_lerp_(self.rows[t], [p.grad for p in shared if p.grad is not None], 1 - beta)
            for p in shared:
                p.grad = None
        for p, grad in zip(shared, foreach_sum(self.rows), strict=True):
            p.grad = grad


class TorchInHook(Balanced):
    """Torch's operators at their best: the prehook that drops a gradient first takes it into the EMA with ``lerp_``,
    while it is in the cache; no flatten.
    """

    def __init__(self, size: Problem, device: str | torch.device = "cpu") -> None:
        super().__init__(size, device)
        self.ema = self.new_ema()
        self.task, self.weight = 0, 0.0
        shared = self.model.shared()
        self.nodes = [get_gradient_edge(p).node for p in shared]
        columns = self.ema.split([p.numel() for p in shared], dim=1)
        for p, node, part in zip(shared, self.nodes, columns, strict=True):
            node.register_prehook(self._hook(part.unflatten(1, p.shape)))

    def _hook(self, ema: Tensor) -> Any:
        def take(grads: tuple[Tensor, ...]) -> tuple[None]:
            ema[self.task].lerp_(grads[0], self.weight)
            return (None,)

        return take

    def backward(self, losses: list[Tensor]) -> None:
        logs, self.weight = logs_of(losses), 1 - self.next_beta()
        for self.task in range(len(logs)):
            self.backward_of(logs, self.task)
        self.write_grads(torch.mv(self.ema.t(), weights_of(self.ema)))


class Fused(Step):
    """``DBMTL.backward``."""

    def __init__(self, size: Problem, device: str | torch.device = "cpu", **options: Any) -> None:
        super().__init__(size, device)
        self.balancer = DBMTL(
            self.model.encoder,
            num_tasks=size.tasks,
            beta=BETA,
            beta_sigma=BETA_SIGMA,
            eps=EPS,
            log_eps=LOG_EPS,
            **options,
        )

    def backward(self, losses: list[Tensor]) -> None:
        self.balancer.backward(losses)


OURS, IN_HOOK, AFTER = "DBMTL", "drop in a hook", "drop after backward"
FORWARD, ONE_BACKWARD = "forward alone", "equal weighting"
LIBMTL = "LibMTL's way"

PARTS: dict[str, Callable[..., Step]] = {FORWARD: Forward, ONE_BACKWARD: OneBackward}
FLOORS: dict[str, Callable[..., Step]] = {IN_HOOK: DropInHook, AFTER: DropAfter}
BALANCED: dict[str, Callable[..., Step]] = {
    LIBMTL: LibMTL,
    "torch ops, flatten": TorchFlatten,
    "torch ops, foreach": TorchForeach,
    "torch ops in hooks": TorchInHook,
    **torchjd_steps.BALANCED,
    OURS: Fused,
}
OTHERS = torchjd_steps.OTHERS


def balanced(device: torch.device) -> dict[str, Callable[..., Step]]:
    """Every DB-MTL that is measured on ``device``."""
    on_device = {"LibMTL's way, kept on the device": LibMTLOnDevice} if device.type != "cpu" else {}
    return {**on_device, **BALANCED}


def subjects(device: torch.device) -> dict[str, Callable[..., Step]]:
    """Everything that is measured on ``device``."""
    return {**PARTS, **FLOORS, **balanced(device), **OTHERS}


def foreach_sum(rows: list[list[Tensor]]) -> list[Tensor]:
    """The balanced sum of lists of gradients, in new tensors."""
    norms = torch.stack([torch.stack(torch._foreach_norm(row)).norm() for row in rows])
    weights = norms.amax() / (norms + EPS)
    total = torch._foreach_mul(rows[0], weights[0])
    for weight, row in zip(weights[1:], rows[1:], strict=True):
        torch._foreach_add_(total, torch._foreach_mul(row, weight))
    return list(total)


def check(
    size: Problem, steps: int = 3, device: torch.device | str = "cpu", refused: dict[str, str] | None = None
) -> dict[str, float]:
    """Largest error of the gradients that each way to balance leaves after ``steps`` steps, against :func:`exact`.

    Of a small MLP first, with which no rounding of long rows hides a wrong formula.

    :param refused: Where to note what a way raised instead of running; None lets it through.
    :raises AssertionError: If one is above what is allowed, or a loop that should drop gradients keeps some.
    """
    for name, kind in FLOORS.items():
        step = kind(size, device)
        step()
        if any(p.grad is not None for p in step.model.shared()):
            raise AssertionError(f"{name!r} left gradients")
    kinds = balanced(torch.device(device))
    small = Size(depth=2, width=64, tasks=size.tasks, batch=8)
    _errors(small, kinds, SMALL_RTOL, steps, device, refused)
    return _errors(size, without(refused or {}, kinds), RTOL, steps, device, refused)


def _errors(
    size: Problem,
    kinds: Mapping[str, Callable[..., Step]],
    rtol: float,
    steps: int,
    device: torch.device | str,
    refused: dict[str, str] | None,
) -> dict[str, float]:
    expected, scales = exact(size, steps, device)
    errors = {}
    for name, kind in kinds.items():
        try:
            found = _grads_after(kind(size, device), steps)
        except RuntimeError as error:
            if refused is None or name == OURS:
                raise
            refused[name] = str(error).strip().splitlines()[0]
            continue
        wrong = [(grad - other).abs().max() / scale for grad, other, scale in zip(found, expected, scales, strict=True)]
        errors[name] = torch.stack(wrong).max().item()  # NaN if one is
        allowed = OWN_RTOL if name == OURS else rtol
        if not errors[name] <= allowed:
            raise AssertionError(
                f"gradients of {name!r} differ from float64 by {errors[name]:.1e} of the largest entry, "
                f"more than {allowed:.0e}"
            )
    return errors


def exact(size: Problem, steps: int, device: torch.device | str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Every parameter's balanced gradient after ``steps`` steps, balanced in float64 from float32 gradients, and the
    largest entry among the terms it is the sum of, since terms may cancel."""
    model = size.build().to(device)
    shared, every = model.shared(), list(model.parameters())
    ema = [[torch.zeros_like(p, dtype=torch.float64) for p in shared] for _ in range(size.tasks)]
    for k in range(1, steps + 1):
        beta = BETA / k**BETA_SIGMA
        logs = logs_of(model.losses())
        grads = [torch.autograd.grad(l, every, retain_graph=True, materialize_grads=True) for l in logs]
        for row, found in zip(ema, grads, strict=True):
            for m, g in zip(row, found, strict=False):  # the encoder's come first
                m.lerp_(g.double(), 1 - beta)
    norms = torch.stack([torch.stack([m.norm() for m in row]).norm() for row in ema])
    weights = norms.amax() / (norms + EPS)
    terms = [torch.stack([w * m for w, m in zip(weights, rows, strict=True)]) for rows in zip(*ema, strict=True)]
    terms += [torch.stack(of_head).double() for of_head in list(zip(*grads, strict=True))[len(shared) :]]
    return [rows.sum(0) for rows in terms], [rows.abs().max() for rows in terms]


def _grads_after(step: Step, steps: int) -> list[Tensor]:
    for _ in range(steps):
        step()
    return [p.grad for p in step.model.parameters() if p.grad is not None]


def without(refused: Mapping[str, str], kinds: Mapping[str, Callable[..., Step]]) -> dict[str, Callable[..., Step]]:
    """``kinds`` but those refused."""
    return {name: kind for name, kind in kinds.items() if name not in refused}
