"""The training loop that the demo and the programs in ``examples`` share: every method is DBMTL with some options."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dbmtl_fused import DBMTL
from dbmtl_fused.demo.metrics import Metric
from dbmtl_fused.demo.stopwatch import Stopwatch


@dataclass(frozen=True)
class Method:
    """A way to train all tasks together: a name for tables and the keyword arguments of :class:`DBMTL`."""

    name: str
    options: Mapping[str, Any]

    @property
    def is_plain_sum(self) -> bool:
        """Whether all gradients just add up: :class:`DBMTL` then runs one backward pass and keeps nothing."""
        return self.options.get("beta") == 0 and self.options.get("alpha", "max") is None


EQUAL_WEIGHTING = Method("EW", {"beta": 0.0, "alpha": None, "log_losses": False})
METHODS = {
    "ew": EQUAL_WEIGHTING,
    "log": Method("log only", {"beta": 0.0, "alpha": None, "log_losses": True}),
    "magnitude": Method("magnitude only", {"log_losses": False}),
    "db-mtl": Method("DB-MTL", {}),
}
BFLOAT16_EMA = Method("DB-MTL, bfloat16 EMA", {"state_dtype": torch.bfloat16})
ALL_METHODS = METHODS | {"db-mtl-bf16": BFLOAT16_EMA}
"""What ``--methods`` knows; METHODS are those that run unless told otherwise."""


@dataclass(frozen=True)
class Task:
    """One task: ``loss(predictions, targets)`` is a 0-d tensor on the task's own, raw scale."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric


@dataclass(frozen=True)
class Split:
    """Inputs, shape (N, ...), and for each task its targets, shape (N,)."""

    inputs: Tensor
    targets: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Tensor) -> Split:
        return Split(self.inputs[index], {name: target[index] for name, target in self.targets.items()})

    def to(self, device: torch.device) -> Split:
        return Split(self.inputs.to(device), {name: target.to(device) for name, target in self.targets.items()})


class Scale(nn.Module):
    """Multiplies a head's output by a constant.

    A regression head then starts in its target's range, whatever the unit, while targets, losses and their gradients
    stay raw: what the methods have to balance is not touched.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def regression_head(features: int, scale: float) -> nn.Sequential:
    """A linear head (N, features) -> (N,) in the target's unit; ``scale``: the targets' standard deviation."""
    return nn.Sequential(nn.Linear(features, 1), nn.Flatten(0), Scale(scale))


class MultiTaskModel(nn.Module):
    """A shared encoder and one head for each task; gives the predictions by task name."""

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        shared = self.encoder(inputs)
        return {name: head(shared) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Problem:
    """Tasks, data (test examples are never seen in training) and how to build the untrained model of all tasks."""

    tasks: Sequence[Task]
    train: Split
    test: Split
    build_model: Callable[[], MultiTaskModel]


@dataclass(frozen=True)
class Settings:
    """What all methods have in common."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    device: torch.device
    record_every: int


@dataclass
class History:
    """What happened every ``record_every`` steps: lists over time, by task name or by pair of tasks (``"a / b"``).

    ``norms`` are those of the task gradients ``m_t`` that the method adds up with ``weights``, ``cosines`` those
    between two of them: gradients of the log-losses where it takes logarithms, of the raw losses elsewhere.
    """

    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)
    cosines: dict[str, list[float]] = field(default_factory=dict)

    def record(self, step: int, losses: Mapping[str, Tensor], weights: Tensor, gradients: Tensor) -> None:
        """Add a point, from the tasks' losses and ``weights`` (T,), ``gradients`` (T, P)."""
        self.steps.append(step)
        for series, values in (
            (self.losses, torch.stack(list(losses.values()))),
            (self.norms, gradients.norm(dim=1)),
            (self.weights, weights),
        ):
            for name, value in zip(losses, values.tolist(), strict=True):
                series.setdefault(name, []).append(value)
        directions = nn.functional.normalize(gradients, dim=1)
        cosines = (directions @ directions.T).tolist()
        for (i, a), (j, b) in itertools.combinations(enumerate(losses), 2):
            self.cosines.setdefault(f"{a} / {b}", []).append(cosines[i][j])


@dataclass
class Run:
    """A trained model, its test metric and test loss by task name, and how training went."""

    model: MultiTaskModel
    scores: dict[str, float]
    losses: dict[str, float]
    seconds_per_epoch: float
    backend: str
    history: History


def initial_model(problem: Problem, tasks: Sequence[Task], settings: Settings) -> MultiTaskModel:
    """The untrained model of ``tasks``: same seed, same initial values, whichever tasks are taken."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = problem.build_model()  # always all heads, or the random numbers of the later ones would differ
    return MultiTaskModel(model.encoder, {task.name: model.heads[task.name] for task in tasks}).to(settings.device)


def make_balancer(model: MultiTaskModel, method: Method) -> DBMTL:
    """The balancer of the encoder's parameters, as ``method`` wants it."""
    return DBMTL(model.encoder, task_names=list(model.heads), **method.options)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Adam over all parameters."""
    # The default eps of 1e-8 is not small beside the gradients of a loss whose unit is small (zero-point energy:
    # 1e-9): such a task would hardly train alone, and any method would look good beside its single-task baseline.
    return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, eps=1e-16)


def batches(data: Split, settings: Settings) -> Iterator[Split]:
    """One epoch after the other, without end, each in a new order that depends on the seed only; full batches only."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(len(data), generator=generator).to(data.inputs.device)
        for index in order.split(settings.batch_size)[: steps_per_epoch(data, settings)]:
            yield data[index]


def steps_per_epoch(data: Split, settings: Settings) -> int:
    """Full batches in ``data``."""
    return len(data) // settings.batch_size


def compute_losses(model: MultiTaskModel, tasks: Sequence[Task], batch: Split) -> dict[str, Tensor]:
    """Each task's loss, 0-d, by task name."""
    predictions = model(batch.inputs)
    return {task.name: task.loss(predictions[task.name], batch.targets[task.name]) for task in tasks}


def buffered_gradients(balancer: DBMTL) -> Tensor:
    """The balancer's EMA of the task gradients, shape (T, P), in at least float32."""
    return torch.cat([rows.flatten(1).to(balancer.weights) for rows in balancer.ema.values()], dim=1)


def summed_gradients(losses: Mapping[str, Tensor], balancer: DBMTL, shared: Sequence[Tensor]) -> Tensor:
    """Task gradients that a plain sum adds up unseen, shape (T, P); keeps the graph."""
    rows = []
    for loss in losses.values():
        summand = loss if balancer.log_eps is None else (loss + balancer.log_eps).log()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(summand, shared, retain_graph=True)]))
    return torch.stack(rows)


def train(problem: Problem, tasks: Sequence[Task], method: Method, settings: Settings, bar: tqdm[None]) -> Run:
    """Train ``tasks`` together by ``method`` and measure the last model on the test set."""
    model = initial_model(problem, tasks, settings)
    balancer = make_balancer(model, method)
    optimizer = make_optimizer(model, settings)
    shared = list(model.encoder.parameters())
    history, clock = History(), Stopwatch(settings.device)
    data = problem.train.to(settings.device)
    steps = settings.epochs * steps_per_epoch(data, settings)
    # Down to 0, or the last model's errors depend on which batches happened to come last.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, batch in enumerate(itertools.islice(batches(data, settings), steps), start=1):
        recording = len(tasks) > 1 and (step % settings.record_every == 0 or step in (1, steps))
        with clock:
            losses = compute_losses(model, tasks, batch)
            optimizer.zero_grad()
        if recording and method.is_plain_sum:
            history.record(step, losses, torch.ones(len(tasks)), summed_gradients(losses, balancer, shared))
        with clock:
            balancer.backward(losses)
            optimizer.step()
            schedule.step()
        if recording and not method.is_plain_sum:
            history.record(step, losses, balancer.weights, buffered_gradients(balancer))
        bar.update()
    scores, test_losses = evaluate(model, tasks, problem.test.to(settings.device))
    return Run(model, scores, test_losses, clock.seconds / settings.epochs, balancer.backend, history)


@torch.no_grad()
def evaluate(model: MultiTaskModel, tasks: Sequence[Task], data: Split) -> tuple[dict[str, float], dict[str, float]]:
    """Each task's metric and its loss over all of ``data``."""
    predictions = model(data.inputs)
    scores, losses = {}, {}
    for task in tasks:
        answer = predictions[task.name], data.targets[task.name]
        scores[task.name], losses[task.name] = task.metric.measure(*answer).item(), task.loss(*answer).item()
    return scores, losses
