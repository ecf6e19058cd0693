"""Whole training steps without the optimizer: ``zero_grad``, forward, T backwards, and what each way of balancing adds.

:class:`DropInHook` and :class:`DropAfter` balance nothing: they are the loops that everything else is measured against.
All others are DB-MTL and leave the same gradients (:func:`check`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from benchmarks.comparators import EPS, relative_error
from benchmarks.models import MultiTaskMLP, Size
from dbmtl_fused import DBMTL

BETA, BETA_SIGMA, LOG_EPS = 0.9, 0.5, 1e-8
RTOL = 1e-4
"""Largest difference of gradients between two ways of balancing, as a share of a parameter's largest entry."""


class Step(ABC):
    """One step of one problem. All call ``zero_grad(set_to_none=True)`` first, which frees what the last step left."""

    def __init__(self, size: Size) -> None:
        self.model = MultiTaskMLP(size)
        self.size = size

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.backward(self.model.losses())

    @abstractmethod
    def backward(self, losses: list[Tensor]) -> None:
        """From the losses to ``.grad``."""

    def backward_of(self, losses: list[Tensor], t: int) -> None:
        """The backward of task ``t``, which keeps the graph for the tasks after it."""
        losses[t].backward(retain_graph=t + 1 < len(losses))


class DropInHook(Step):
    """T backwards; a prehook of every shared leaf drops its gradient on arrival: the floor, nothing is ever stored."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
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


class Balanced(Step):
    """What implementations of DB-MTL share: the count of steps and the schedule of beta."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.step = 0

    def next_beta(self) -> float:
        self.step += 1
        return BETA / self.step**BETA_SIGMA

    def write_grads(self, flat: Tensor) -> None:
        """Make every shared ``.grad`` a view of its part of ``flat``."""
        shared = self.model.shared()
        for p, part in zip(shared, flat.split([p.numel() for p in shared]), strict=True):
            p.grad = part.view_as(p)


class LibMTL(Balanced):
    """LibMTL's way, written from what it does: each gradient is copied into a new vector, then into a row of a new
    matrix, and zeroed in place; then its EMA and sum expressions; the result is cloned into every ``.grad``.
    """

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.ema = torch.zeros(size.tasks, size.P)

    def backward(self, losses: list[Tensor]) -> None:
        logs = [torch.log(l + LOG_EPS) for l in losses]
        grads = torch.zeros(self.size.tasks, self.size.P)
        for t in range(len(logs)):
            self.backward_of(logs, t)
            grads[t] = self._vector()
            self.model.encoder.zero_grad(set_to_none=False)
        beta = self.next_beta()
        self.ema = grads + beta * (self.ema - grads)
        norms = self.ema.norm(dim=-1)
        weights = norms.max() / (norms + EPS)
        total = sum((weights[t] * self.ema[t] for t in range(len(losses))), start=torch.zeros(()))
        start = 0
        for p in self.model.shared():
            p.grad = total[start : start + p.numel()].view_as(p).clone()
            start += p.numel()

    def _vector(self) -> Tensor:
        vector, start = torch.zeros(self.size.P), 0
        for p in self.model.shared():
            assert p.grad is not None
            vector[start : start + p.numel()] = p.grad.view(-1)
            start += p.numel()
        return vector


class TorchFlatten(Balanced):
    """Torch's operators on gradients flattened after each backward: ``cat`` into a vector, ``lerp_``; norms, ``mv``."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.ema, self.flat = torch.zeros(size.tasks, size.P), torch.empty(size.P)

    def backward(self, losses: list[Tensor]) -> None:
        logs, beta, shared = [torch.log(l + LOG_EPS) for l in losses], self.next_beta(), self.model.shared()
        for t in range(len(logs)):
            self.backward_of(logs, t)
            torch.cat([p.grad.view(-1) for p in shared if p.grad is not None], out=self.flat)
            for p in shared:
                p.grad = None
            self.ema[t].lerp_(self.flat, 1 - beta)
        self.write_grads(_weighted_sum(self.ema))


class TorchInHook(Balanced):
    """Torch's operators at their best: the prehook that drops a gradient first takes it into the EMA with ``lerp_``,
    while it is in cache; norms and ``mv`` at the end.
    """

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.ema = torch.zeros(size.tasks, size.P)
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
        logs, self.weight = [torch.log(l + LOG_EPS) for l in losses], 1 - self.next_beta()
        for self.task in range(len(logs)):
            self.backward_of(logs, self.task)
        self.write_grads(_weighted_sum(self.ema))


class Fused(Step):
    """``DBMTL.backward``."""

    def __init__(self, size: Size, **options: Any) -> None:
        super().__init__(size)
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


BALANCED: dict[str, type[Step]] = {
    "LibMTL's way": LibMTL,
    "torch ops, flatten": TorchFlatten,
    "torch ops in hooks": TorchInHook,
    "DBMTL": Fused,
}
FLOORS: dict[str, type[Step]] = {"drop in a hook": DropInHook, "drop after backward": DropAfter}


def _weighted_sum(ema: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(ema, dim=1)
    return torch.mv(ema.t(), norms.amax() / (norms + EPS))


def check(size: Size, steps: int = 3) -> dict[str, float]:
    """Largest difference between the gradients of all ways to balance and LibMTL's, after ``steps`` steps of each.

    :raises AssertionError: If one is above :data:`RTOL`, or a loop that should drop gradients keeps some.
    """
    for name, kind in FLOORS.items():
        step = kind(size)
        step()
        if any(p.grad is not None for p in step.model.shared()):
            raise AssertionError(f"{name!r} left gradients")
    grads = {name: _grads_after(kind(size), steps) for name, kind in BALANCED.items()}
    expected = grads["LibMTL's way"]
    errors = {
        name: max(relative_error(*pair) for pair in zip(found, expected, strict=True)) for name, found in grads.items()
    }
    for name, error in errors.items():
        if error > RTOL:
            raise AssertionError(
                f"gradients of {name!r} differ from LibMTL's by {error:.1e} of the largest entry, more than {RTOL:.0e}"
            )
    return errors


def _grads_after(step: Step, steps: int) -> list[Tensor]:
    for _ in range(steps):
        step()
    return [p.grad for p in step.model.parameters() if p.grad is not None]
