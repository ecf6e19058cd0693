"""What is said of tasks by name: who they are, which of them a call has losses of, and their preferences."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import cast

import torch
from torch import Tensor

from dbmtl_fused.functional import check_in_range

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor
"""One loss per task: in task order, by task name, or as a tensor of shape ``(T,)``. None, or a missing key: a task that
is not there this time."""


def task_names_of(num_tasks: int | None, task_names: Sequence[str] | None) -> list[str]:
    """The names of all tasks.

    :raises ValueError: If the two say nothing, do not fit each other, or names are not unique strings.
    """
    if task_names is None:
        if (number := positive_integer(num_tasks)) is None:
            raise ValueError(f"num_tasks must be a positive integer (or give task_names), got {num_tasks!r}")
        return [str(task) for task in range(number)]
    names = list(task_names)
    if isinstance(task_names, str) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"task_names must be a non-empty sequence of strings, got {task_names!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"task_names must be unique, got {names}")
    if num_tasks is not None and positive_integer(num_tasks) != len(names):
        raise ValueError(f"num_tasks must be the number of task_names, {len(names)}, or be left out, got {num_tasks}")
    return names


def positive_integer(value: object) -> int | None:
    """Return ``value`` as an int if it is an integer of any kind (NumPy's too) above 0, else None."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    number = operator.index(value)
    return number if number > 0 else None


def preferences_of(
    preference: Sequence[float] | Mapping[str, float] | Tensor | None, task_names: Sequence[str], dtype: torch.dtype
) -> list[float] | None:
    """Return the preference of every task, in task order.

    :param dtype: The dtype in which they are held.
    :raises TypeError: If one is not a number.
    :raises ValueError: If there is not one for every task, one is negative or beyond ``dtype``, or all are 0.
    """
    if preference is None:
        return None
    if isinstance(preference, Tensor):
        if preference.is_meta:
            raise TypeError("preference must be numbers or a tensor with memory, got a tensor on meta")
        preference = preference.detach().reshape(-1).tolist()
    if isinstance(preference, Mapping):
        if set(preference) != set(task_names):
            raise ValueError(f"preference must have the keys {list(task_names)}, got {list(preference)}")
        values = [preference[name] for name in task_names]
    else:
        values = list(preference)
        if len(values) != len(task_names):
            raise ValueError(f"preference must hold one number per task, {len(task_names)}, got {len(values)}")
    for name, value in zip(task_names, values, strict=True):
        check_in_range(f"preference of task {name!r}", value, dtype, or_zero=True, cure="float64 parameters")
    if not any(values):
        raise ValueError("preference must be above 0 for at least one task, got 0 for all")
    return values


def tasks_of(losses: Losses, task_names: Sequence[str]) -> tuple[list[int], Tensor | list[Tensor]]:
    """Which tasks ``losses`` are of, and their losses in that order; a tensor is of all tasks and stays one.

    :raises TypeError: If ``losses`` is neither a sequence, a mapping nor a tensor.
    :raises ValueError: If a name is unknown, a sequence is not one entry per task, or there is no loss.
    """
    if isinstance(losses, Tensor):
        is_single = losses.dim() == 0 and len(task_names) == 1
        return list(range(len(task_names))), [losses] if is_single else losses
    if isinstance(losses, Set):
        raise TypeError("losses must be in task order or by task name, got a set, which has no order")
    if isinstance(losses, Mapping):
        unknown = [name for name in losses if name not in task_names]
        if unknown:
            raise ValueError(f"losses must have keys out of {list(task_names)}, unknown {unknown}")
        by_task = [losses.get(name) for name in task_names]
    elif isinstance(losses, Iterable):
        by_task = list(cast(Iterable[Tensor | None], losses))
        if len(by_task) != len(task_names):
            raise ValueError(
                f"losses must hold one loss per task, {len(task_names)} ({', '.join(task_names)}), got {len(by_task)}; "
                "None stands for a task that is not there"
            )
    else:
        raise TypeError(f"losses must be a sequence, a mapping or a tensor, got {type(losses).__name__}")
    present = [(task, loss) for task, loss in enumerate(by_task) if loss is not None]
    if not present:
        raise ValueError("losses must hold the loss of at least one task, got none")
    return [task for task, _ in present], [loss for _, loss in present]


def check_active(active: Tensor, T: int, device: torch.device) -> None:
    """Raise unless ``active`` says of each of ``T`` tasks whether it is there.

    :raises TypeError: If it is no tensor.
    :raises ValueError: If it is not bool, of shape ``(T,)``, on ``device``.
    """
    if not isinstance(active, Tensor):
        raise TypeError(f"active must be a tensor or None, got {type(active).__name__}")
    if active.shape != (T,) or active.dtype != torch.bool or active.device != device:
        raise ValueError(
            f"active must be bool, of shape ({T},), on {device}, got {active.dtype}, {tuple(active.shape)}, on "
            f"{active.device}"
        )
