"""The eleven properties of all molecules of QM9, with a message-passing network.

Trains equal weighting, DB-MTL's two halves, DB-MTL, and DB-MTL once more through LibMTL's expression; prints a Markdown
table of test errors, and how far the losses of the last two are apart. Runs from a checkout::

    pip install -e '.[demo,bench]'
    python examples/qm9.py --data qm9 --out runs/qm9_whole

The folder holds ``qm9_geometry_milliA.npz`` and ``qm9_y11_pyg_units.npz``. Of 130,000 molecules 110,000 are trained on,
10,000 are for validation (nothing is chosen by them) and 10,000 for testing. Targets are standardised by the training
molecules, errors are absolute, in the target's own unit. Batches of 128, Adam 0.001 falling to 0 along a cosine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import models
from benchmarks.molecule_model import GEOMETRY, TARGETS, MessagePassing, shuffled
from benchmarks.report import environment
from benchmarks.steps import LibMTLOnDevice
from dbmtl_fused.demo import report
from dbmtl_fused.demo.metrics import Metric, delta_p, mean_absolute_error
from dbmtl_fused.demo.stopwatch import Stopwatch
from dbmtl_fused.demo.study import Result, Study, describe_machine
from dbmtl_fused.demo.training import (
    EQUAL_WEIGHTING,
    METHODS,
    Method,
    MultiTaskModel,
    Problem,
    Settings,
    Split,
    Task,
    batches,
    compute_losses,
    evaluate,
    initial_model,
    make_balancer,
    make_optimizer,
    steps_per_epoch,
)

UNITS = {
    "mu": "D",
    "alpha": "a0³",
    "homo": "eV",
    "lumo": "eV",
    "r2": "a0²",
    "zpve": "eV",
    "U0": "eV",
    "U": "eV",
    "H": "eV",
    "G": "eV",
    "Cv": "cal/mol/K",
}
"""The eleven tasks of the paper's Table 3 in the order of the file; the four energies are those of atomisation."""

DB_MTL = METHODS["db-mtl"].name
THROUGH_LIBMTL = "DB-MTL through LibMTL's expression"
MOLECULES, HELD_OUT = 130_000, 13
"""One in so many molecules is for validation, as many for testing."""

PIECE = 1000
"""Molecules evaluated at once."""
PILOT = 10
"""Steps of each method that are timed to see how many fit."""
PILOT_SHARE = 0.8
"""Of the time that is left, what the steps may take; evaluation needs some, and not every step is as fast."""
COMPARED = (10, 100)
"""First steps whose losses are compared by themselves: later on, roundings have grown."""
POINTS = 200
"""Of a curve in the file, at most."""


class Encoder(nn.Module):
    """Message passing on molecules as one tensor, shape (N, A, 4): element index, then position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = MessagePassing(width, rounds=3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs[..., 0].long(), inputs[..., 1:])


class Balancer(Protocol):
    """What trains: ``DBMTL``, or :class:`ThroughLibMTL`."""

    def backward(self, losses: Mapping[str, Tensor]) -> object: ...


class ThroughLibMTL:
    """DB-MTL in torch's operators on a ``T x P`` matrix, as LibMTL does it but for its way through host memory."""

    def __init__(self, model: MultiTaskModel, device: torch.device) -> None:
        self._model = model
        self.tasks, self.P = len(model.heads), sum(p.numel() for p in model.encoder.parameters())
        self._step = LibMTLOnDevice(self, device)

    def build(self) -> models.MultiTaskModel:
        """The model as the benchmarks know it, sharing its parameters."""
        return models.MultiTaskModel(self._model.encoder, list(self._model.heads.values()))

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        self._step.backward(list(losses.values()))


@dataclass(frozen=True)
class Molecules:
    """The problem, its validation split, and what all methods have in common."""

    problem: Problem
    validation: Split
    settings: Settings

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.settings.epochs * steps_per_epoch(self.problem.train, self.settings)


@dataclass(frozen=True)
class Trained:
    """A trained model, every task's loss at every step, shape (steps, T), and the seconds that took."""

    model: MultiTaskModel
    losses: Tensor
    seconds: float
    backend: str


def load_molecules(folder: Path, count: int, width: int, settings: Settings) -> Molecules:
    """``count`` molecules, split and ordered by the seed; statistics are the training molecules'."""
    atoms, positions, y = shuffled(folder, count, settings.seed)
    inputs = torch.cat([atoms.unsqueeze(2).float(), positions], dim=2)
    held_out = count // HELD_OUT
    train, validation, test = torch.arange(count).split([count - 2 * held_out, held_out, held_out])
    raw = torch.from_numpy(y[:count])
    spread, mean = torch.std_mean(raw[train], dim=0)
    targets = dict(zip(UNITS, ((raw - mean) / spread).float().T.contiguous(), strict=True))
    scales = dict(zip(UNITS, spread.tolist(), strict=True))

    def build_model() -> MultiTaskModel:
        heads = {
            name: nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1), nn.Flatten(0))
            for name in UNITS
        }
        return MultiTaskModel(Encoder(width), heads)

    tasks = [
        Task(name, nn.functional.mse_loss, Metric("MAE", unit, False, partial(_error_in_unit, scales[name])))
        for name, unit in UNITS.items()
    ]
    everything = Split(inputs, targets).to(settings.device)
    return Molecules(Problem(tasks, everything[train], everything[test], build_model), everything[validation], settings)


def _error_in_unit(scale: float, predictions: Tensor, targets: Tensor) -> Tensor:
    return scale * mean_absolute_error(predictions, targets)


def through_dbmtl(method: Method) -> Callable[[MultiTaskModel, torch.device], tuple[Balancer, str]]:
    """How to make the balancer of ``method``, and the name of its backend."""

    def make(model: MultiTaskModel, device: torch.device) -> tuple[Balancer, str]:
        balancer = make_balancer(model, method)
        return balancer, balancer.backend

    return make


BALANCERS: dict[str, Callable[[MultiTaskModel, torch.device], tuple[Balancer, str]]] = {
    **{method.name: through_dbmtl(method) for method in METHODS.values()},
    THROUGH_LIBMTL: lambda model, device: (ThroughLibMTL(model, device), "torch"),
}


def train(molecules: Molecules, name: str, steps: int, total: int, bar: tqdm[None]) -> Trained:
    """The first ``steps`` steps of ``total``. Nothing waits for the device but the network itself, until the end."""
    problem, settings = molecules.problem, molecules.settings
    model = initial_model(problem, problem.tasks, settings)
    balancer, backend = BALANCERS[name](model, settings.device)
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    kept = torch.empty(steps, len(problem.tasks), device=settings.device)
    bar.set_description(name)
    clock = Stopwatch(settings.device)
    with clock:
        for row, batch in zip(kept, itertools.islice(batches(problem.train, settings), steps), strict=True):
            losses = compute_losses(model, problem.tasks, batch)
            row.copy_(torch.stack([loss.detach() for loss in losses.values()]))
            optimizer.zero_grad()
            balancer.backward(losses)
            optimizer.step()
            schedule.step()
            bar.update()
    return Trained(model, kept.cpu(), clock.seconds, backend)


def errors(model: MultiTaskModel, tasks: Sequence[Task], data: Split) -> dict[str, float]:
    """Each task's mean absolute error over ``data``; the pairs of all its molecules at once would take gigabytes."""
    found = dict.fromkeys((task.name for task in tasks), 0.0)
    for rows in torch.arange(len(data), device=data.inputs.device).split(PIECE):
        scores, _ = evaluate(model, tasks, data[rows])
        for name, score in scores.items():
            found[name] += score * len(rows) / len(data)
    return found


def steps_that_fit(molecules: Molecules, deadline: float, bar: tqdm[None]) -> int:
    """As many for every method as all together can do until ``deadline`` of ``time.monotonic()``."""
    seconds = {}
    for name in BALANCERS:
        train(molecules, name, 1, molecules.steps, bar)
        seconds[name] = train(molecules, name, PILOT, molecules.steps, bar).seconds / PILOT
    left, each, again = PILOT_SHARE * (deadline - time.monotonic()), sum(seconds.values()), seconds[DB_MTL]
    # Few steps are all done by DB-MTL a second time; of many, the first ones.
    fit = max(left / (each + again), (left - max(COMPARED) * again) / each)
    return max(1, int(min(molecules.steps, fit)))


def differences(first: Tensor, second: Tensor, per_epoch: int) -> dict[str, float]:
    """The largest relative difference of any task's loss: over the first steps, all, and between means of epochs."""
    apart = ((first - second).abs() / second.abs()).amax(1)
    found = {f"first {steps} steps": apart[:steps].max().item() for steps in COMPARED if steps < len(apart)}
    found[f"all {len(apart)} steps"] = apart.max().item()
    means = [torch.stack([epoch.mean(0) for epoch in curve.split(per_epoch)]) for curve in (first, second)]
    found["means of an epoch"] = ((means[0] - means[1]).abs() / means[1].abs()).max().item()
    return found


@dataclass
class Comparison:
    """What was found so far, by the method's name."""

    molecules: Molecules
    steps: int
    command: str
    runs: dict[str, Trained]
    test: dict[str, dict[str, float]]
    validation: dict[str, dict[str, float]]
    again: Tensor | None = None  # the losses of DB-MTL's first steps when it is trained a second time

    @property
    def per_epoch(self) -> int:
        return steps_per_epoch(self.molecules.problem.train, self.molecules.settings)

    def study(self) -> Study:
        """The same as the demo's reports know it, with EW for the baseline of Δp."""
        tasks, settings = self.molecules.problem.tasks, self.molecules.settings
        baseline = [[self.test[EQUAL_WEIGHTING.name][task.name]] for task in tasks]
        results = {}
        for name, run in self.runs.items():
            improvement = delta_p([[self.test[name][task.name]] for task in tasks], baseline, [[False]] * len(tasks))
            seconds = run.seconds * self.per_epoch / self.steps
            results[name] = [Result(settings.seed, self.test[name], improvement, seconds)]
        backend = next(iter(self.runs.values())).backend
        return Study(tasks, settings, backend, describe_machine(settings.device), 0, results)

    def apart(self) -> dict[str, float]:
        """DB-MTL's losses and LibMTL's; empty unless both are there."""
        pair = [self.runs[name].losses for name in (DB_MTL, THROUGH_LIBMTL) if name in self.runs]
        return differences(pair[0], pair[1], self.per_epoch) if len(pair) == 2 else {}

    def apart_again(self) -> dict[str, float]:
        """DB-MTL's losses and those of its second time."""
        if self.again is None:
            return {}
        return differences(self.runs[DB_MTL].losses[: len(self.again)], self.again, self.per_epoch)

    def text(self) -> str:
        """Markdown."""
        study = self.study()
        parts = [f"`{self.command}`", report.table(study, tasks_in_rows=True)]
        if apart := self.apart():
            parts.append(
                f"How far any task's loss of DB-MTL is from that of {THROUGH_LIBMTL}, at most and relative: "
                f"{_listed(apart)}. DB-MTL trained a second time, from the first: {_listed(self.apart_again())}."
            )
        parts.append("\n".join(f"- {note}" for note in self._notes(study)))
        return "\n\n".join(parts)

    def _notes(self, study: Study) -> list[str]:
        problem, settings = self.molecules.problem, self.molecules.settings
        sizes = [f"{len(split):,}" for split in (problem.train, self.molecules.validation, problem.test)]
        P = sum(p.numel() for p in next(iter(self.runs.values())).model.encoder.parameters())
        return [
            f"{sizes[0]} molecules to train, {sizes[1]} for validation, {sizes[2]} to test; seed {settings.seed}. "
            f"{self.steps} steps for each method (epochs: {self.steps / self.per_epoch:.3g}), batches of "
            f"{settings.batch_size}, Adam {settings.learning_rate:g} falling to 0 along a cosine over these steps. "
            f"{P:,} shared parameters.",
            "Δp: relative improvement in percent, mean over tasks, against EW. Single-task baselines, as in the paper, "
            f"would take {len(problem.tasks)} more trainings.",
            "s/epoch: training steps only. EW and log only take one backward a step, the others one for each task.",
            f"Backend {study.backend!r}; {study.machine}.",
        ]

    def save(self, folder: Path) -> None:
        """Write ``results.md`` and ``results.json``, replacing those of fewer methods."""
        folder.mkdir(parents=True, exist_ok=True)
        window = math.ceil(self.steps / POINTS)
        content = {
            "command": self.command,
            "seed": self.molecules.settings.seed,
            "environment": environment(torch.get_num_threads(), self.molecules.settings.device),
            **self.study().to_json(),
            "steps": self.steps,
            "steps_per_epoch": self.per_epoch,
            "validation": self.validation,
            "differences": {"DB-MTL and LibMTL": self.apart(), "DB-MTL twice": self.apart_again()},
            "steps_per_point": window,
            "curves": {name: self._curves(run.losses, window) for name, run in self.runs.items()},
        }
        for name, text in (("results.json", json.dumps(content, indent=1)), ("results.md", self.text())):
            new = folder / f"{name}.new"
            new.write_text(f"{text}\n", encoding="utf-8")
            new.replace(folder / name)

    def _curves(self, losses: Tensor, window: int) -> dict[str, list[float]]:
        means = torch.stack([piece.mean(0) for piece in losses.split(window)])
        names = [task.name for task in self.molecules.problem.tasks]
        return {name: [float(f"{x:.5g}") for x in curve] for name, curve in zip(names, means.T.tolist(), strict=True)}


def _listed(of: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.1e} ({name})" for name, value in of.items())


def compare(molecules: Molecules, command: str, deadline: float, out: Path | None) -> Comparison:
    """Train by every method; what is found is written after each."""
    problem = molecules.problem
    with tqdm(unit="step", dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10.0) as bar:
        steps = molecules.steps if math.isinf(deadline) else steps_that_fit(molecules, deadline, bar)
        found = Comparison(molecules, steps, command, {}, {}, {})
        for name in BALANCERS:
            train(molecules, name, 1, steps, bar)  # compiles and allocates what is not to be timed
            bar.reset(steps)
            run = train(molecules, name, steps, steps, bar)
            found.runs[name] = run
            found.test[name] = errors(run.model, problem.tasks, problem.test)
            found.validation[name] = errors(run.model, problem.tasks, molecules.validation)
            if name == DB_MTL:
                found.again = train(molecules, name, min(steps, max(COMPARED)), steps, bar).losses
            if out:
                found.save(out)
    return found


def main(argv: Sequence[str]) -> int:
    """Run the comparison with the command line ``argv`` and return the exit status."""
    started = time.monotonic()
    args = argument_parser().parse_args(argv)
    if not all((args.data / name).is_file() for name in (GEOMETRY, TARGETS)):
        argument_parser().error(f"--data must be a folder with {GEOMETRY} and {TARGETS}, got {str(args.data)!r}")
    torch.set_num_threads(args.threads)
    settings = Settings(args.epochs, args.batch_size, 1e-3, args.seed, args.device, record_every=0)
    molecules = load_molecules(args.data, args.molecules, args.width, settings)
    if not molecules.steps:
        argument_parser().error(f"--molecules must leave one batch to train on, got {args.molecules}")
    found = compare(molecules, _command(argv, args), started + 60 * args.minutes, args.out)
    print(f"\n{found.text()}\n")
    return 0


def _command(argv: Sequence[str], args: argparse.Namespace) -> str:
    """What to type; folders by their last name, as where they are is of no interest elsewhere."""
    shown: dict[str, Any] = {str(folder): folder.name for folder in (args.data, args.out) if folder}
    return shlex.join(["python", "examples/qm9.py", *(shown.get(word, word) for word in argv)])


def argument_parser() -> argparse.ArgumentParser:
    """What the program can be told."""
    result = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    result.add_argument("--data", type=Path, required=True, help="folder of QM9")
    result.add_argument("--epochs", type=int, default=30, help="default %(default)s")
    minutes = "stop earlier, every method after as many steps, so that all take about so long"
    result.add_argument("--minutes", type=float, default=math.inf, help=minutes)
    result.add_argument("--molecules", type=int, default=MOLECULES, help="drawn by the seed (default %(default)s)")
    result.add_argument("--batch-size", type=int, default=128, help="default %(default)s")
    result.add_argument("--width", type=int, default=64, help="of the network (default %(default)s)")
    result.add_argument("--seed", type=int, default=0, help="default %(default)s")
    result.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    result.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default %(default)s")
    result.add_argument("--out", type=Path, help="folder for the table and all numbers (default: only print)")
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
