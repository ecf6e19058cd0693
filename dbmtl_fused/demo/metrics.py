"""Test metrics, and the paper's relative improvement over single-task training (Delta_p)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Percentage of right answers, 0-d, from ``logits`` (N, classes) and ``labels`` (N,)."""
    return 100 * (logits.argmax(1) == labels).float().mean()


def mean_absolute_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean of ``|prediction - target|``, 0-d, in the target's own unit; both have shape (N,)."""
    return (predictions - targets).abs().mean()


@dataclass(frozen=True)
class Metric:
    """What is measured on the test set: ``measure(predictions, targets)`` gives a 0-d tensor in ``unit``."""

    name: str
    unit: str
    higher_is_better: bool
    measure: Callable[[Tensor, Tensor], Tensor]


def delta_p_task(values: Sequence[float], baseline: Sequence[float], higher_is_better: Sequence[bool]) -> float:
    """Relative improvement of one task over its single-task baseline, in percent, averaged over the task's metrics::

        Delta_p,t = 100 % * mean_i (-1)^s_i * (M_i - STL_i) / STL_i        s_i = 0 if larger is better, else 1

    so that positive always means better than single-task training (paper, Eq. 3-4).

    :param values: ``M_i``, the multi-task model's value of each metric of the task.
    :param baseline: ``STL_i``, the same of the model trained on this task alone; never 0.
    :param higher_is_better: One for each metric: True for accuracies, False for errors.
    :raises ValueError: If a baseline is 0, for then there is no relative difference.
    """
    if 0 in baseline:
        raise ValueError(f"Delta_p divides by the single-task baseline, which must not be 0, got {list(baseline)}")
    terms = zip(values, baseline, higher_is_better, strict=True)
    return fmean(100 * (1 if higher else -1) * (value - stl) / stl for value, stl, higher in terms)


def delta_p(
    values: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]],
    higher_is_better: Sequence[Sequence[bool]],
) -> float:
    """Mean of :func:`delta_p_task` over the tasks, in percent (paper, Eq. 3-4).

    Every argument has one row for each task, as there. Tasks weigh the same however many metrics they have.
    """
    return fmean(delta_p_task(*task) for task in zip(values, baseline, higher_is_better, strict=True))
