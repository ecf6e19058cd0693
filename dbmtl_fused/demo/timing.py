"""How much of a training step is balancing.

Two kinds of steps over the same batches, in turns (so that a busy machine slows both), medians of each:

* *step*: forward, losses, ``zero_grad``, ``balancer.backward(losses)``, ``optimizer.step()``;
* *floor*, the hook-drop floor: the same loop with balancing left out. T backwards over the same losses, whose
  gradients are dropped before they reach ``.grad`` of a shared parameter (the heads get theirs as usual); then the
  optimizer steps with the gradients that the balancer had left, so that it does the same work.

Balancing's share = (step - floor) / step: what logarithms, EMA, norms, weights and the weighted sum add.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from statistics import median

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dbmtl_fused.demo.stopwatch import Stopwatch
from dbmtl_fused.demo.training import (
    Method,
    MultiTaskModel,
    Problem,
    Settings,
    batches,
    compute_losses,
    make_balancer,
    make_optimizer,
)

WARM_UP = 3
"""Steps of each kind that do not count: the first ones allocate."""


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of each kind of step."""

    step: float
    floor: float

    @property
    def share(self) -> float:
        """Balancing's share of a step, 0 to 1 (noise can make a small one negative)."""
        return (self.step - self.floor) / self.step


@contextmanager
def gradients_dropped(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """While this is open, backward computes the gradients of ``parameters`` but never stores them in ``.grad``."""
    nodes = [get_gradient_edge(parameter).node for parameter in parameters]  # kept, or the hooks would go with them
    handles = [node.register_prehook(lambda _: (None,)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward_each(losses: Mapping[str, Tensor]) -> None:
    """T backwards over one graph."""
    *others, last = losses.values()
    for loss in others:
        loss.backward(retain_graph=True)
    last.backward()


def measure_steps(
    trained: MultiTaskModel, problem: Problem, method: Method, settings: Settings, rounds: int
) -> StepTimes:
    """Time ``rounds`` steps of each kind on a copy of a trained model."""
    model = deepcopy(trained)
    shared = list(model.encoder.parameters())
    balancer = make_balancer(model, method)
    optimizer = make_optimizer(model, settings)
    step_seconds, floor_seconds = [], []
    for batch in islice(batches(problem.train.to(settings.device), settings), WARM_UP + rounds):
        with Stopwatch(settings.device) as step:
            losses = compute_losses(model, problem.tasks, batch)
            optimizer.zero_grad()
            balancer.backward(losses)
            optimizer.step()
        balanced = [parameter.grad for parameter in shared]
        with gradients_dropped(shared), Stopwatch(settings.device) as floor:
            losses = compute_losses(model, problem.tasks, batch)
            optimizer.zero_grad()
            backward_each(losses)
            for parameter, gradient in zip(shared, balanced, strict=True):
                parameter.grad = gradient
            optimizer.step()
        step_seconds.append(step.seconds)
        floor_seconds.append(floor.seconds)
    return StepTimes(median(step_seconds[WARM_UP:]), median(floor_seconds[WARM_UP:]))
