"""All methods against the single-task baselines, over one or more seeds."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dbmtl_fused.demo.metrics import delta_p
from dbmtl_fused.demo.timing import StepTimes, measure_steps
from dbmtl_fused.demo.training import (
    EQUAL_WEIGHTING,
    History,
    Method,
    Problem,
    Settings,
    Task,
    steps_per_epoch,
    train,
)

SINGLE_TASK = "STL"
"""Name of the baseline: one model for each task, trained on that task alone."""


@dataclass(frozen=True)
class Result:
    """One method with one seed: test metric and test loss by task name, ``delta_p`` in percent against the same seed's
    baseline.

    ``seconds_per_epoch`` of the baseline is that of all its models together; it has no history. Only methods that
    balance have step times.
    """

    seed: int
    scores: Mapping[str, float]
    delta_p: float
    seconds_per_epoch: float
    step_times: StepTimes | None = None
    history: History | None = None
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Results by method name (:data:`SINGLE_TASK` first), one for each seed, with what is needed to read them."""

    tasks: Sequence[Task]
    settings: Settings
    backend: str
    machine: str
    timing_rounds: int
    results: Mapping[str, Sequence[Result]]

    def to_json(self) -> dict[str, Any]:
        settings = asdict(self.settings) | {"device": str(self.settings.device)}
        tasks = [
            {
                "name": task.name,
                "metric": task.metric.name,
                "unit": task.metric.unit,
                "higher_is_better": task.metric.higher_is_better,
            }
            for task in self.tasks
        ]
        return {
            "machine": self.machine,
            "backend": self.backend,
            "settings": settings,
            "timing_rounds": self.timing_rounds,
            "tasks": tasks,
            "results": {name: [_result_to_json(result) for result in runs] for name, runs in self.results.items()},
        }


def _result_to_json(result: Result) -> dict[str, Any]:
    values = asdict(result)
    if result.step_times:
        values["balancing_share"] = result.step_times.share
    return values


def add_arguments(parser: argparse.ArgumentParser, *, epochs: int) -> None:
    """The options of everything that runs a study; ``epochs``: the default."""

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise ValueError
        return number

    parser.add_argument("--seed", type=int, default=0, help="first seed (default %(default)s)")
    parser.add_argument("--seeds", type=positive, default=1, help="how many seeds (default %(default)s)")
    parser.add_argument("--epochs", type=positive, default=epochs, help="default %(default)s")
    # One: on a busy machine two threads that wait for each other can be ten times slower.
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default %(default)s)")


def run_study(
    load_problem: Callable[[int], Problem],
    methods: Sequence[Method],
    settings: Settings,
    seeds: int,
    timing_rounds: int,
) -> Study:
    """Train the single-task baselines and every method, for ``seeds`` seeds from ``settings.seed`` on.

    :param load_problem: Gives the data for a seed; same tasks and sizes for every seed.
    :param timing_rounds: Steps of each kind that are timed for balancing's share (see :mod:`dbmtl_fused.demo.timing`).
    """
    results: dict[str, list[Result]] = {name: [] for name in (SINGLE_TASK, *(method.name for method in methods))}
    backend = ""
    # Where nobody watches, a line now and then is enough for the log.
    seconds_per_line = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(unit="step", dynamic_ncols=True, mininterval=seconds_per_line) as bar:
        for seed in range(settings.seed, settings.seed + seeds):
            problem, of_seed = load_problem(seed), replace(settings, seed=seed)
            tasks = problem.tasks
            bar.total = seeds * settings.epochs * steps_per_epoch(problem.train, settings) * (len(tasks) + len(methods))
            alone = []
            for task in tasks:
                bar.set_description(f"seed {seed}: {SINGLE_TASK} {task.name}")
                alone.append(train(problem, [task], EQUAL_WEIGHTING, of_seed, bar))
            baseline = {name: score for run in alone for name, score in run.scores.items()}
            losses = {name: loss for run in alone for name, loss in run.losses.items()}
            seconds = sum(run.seconds_per_epoch for run in alone)
            results[SINGLE_TASK].append(Result(seed, baseline, 0.0, seconds, losses=losses))
            for method in methods:
                bar.set_description(f"seed {seed}: {method.name}")
                run = train(problem, tasks, method, of_seed, bar)
                backend = run.backend
                improvement = delta_p(
                    [[run.scores[task.name]] for task in tasks],
                    [[baseline[task.name]] for task in tasks],
                    [[task.metric.higher_is_better] for task in tasks],
                )
                times = None
                if not method.is_plain_sum:
                    times = measure_steps(run.model, problem, method, of_seed, timing_rounds)
                results[method.name].append(
                    Result(seed, run.scores, improvement, run.seconds_per_epoch, times, run.history, run.losses)
                )
    return Study(tasks, settings, backend, describe_machine(settings.device), timing_rounds, results)


def describe_machine(device: torch.device) -> str:
    """Processor, threads and torch's version, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    return f"{processor}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
