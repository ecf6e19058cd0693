"""``Window``: which losses of which tasks make one step."""

from __future__ import annotations

from collections.abc import Sequence

from dbmtl_fused.rows import Step
from dbmtl_fused.tasks import positive_integer


class Window:
    """The micro-batches of one step; complete when every task has had ``accumulation_steps`` of them.

    :param task_names: Of all tasks.
    :param accumulation_steps: As the user gave it; None: all that is to come comes at once, one loss a task.

    Attributes: ``size`` (micro-batches of a task), ``taken`` (how many each task has had), ``step`` (None before the
    first, and where there is nothing to balance).
    """

    def __init__(self, task_names: Sequence[str], accumulation_steps: int | None) -> None:
        self._task_names, self._accumulation_steps = task_names, accumulation_steps
        self.size = accumulation_steps or 1
        self.taken = [0] * len(task_names)
        self.step: Step | None = None
        self.reached: set[int] = set()  # slots, by any task

    def check(self, tasks: Sequence[int], accumulation_steps: int | None) -> None:
        """Raise unless losses of ``tasks`` may come next.

        :raises ValueError: If the window began with other ``accumulation_steps``, or a task has had all of its own.
        """
        if accumulation_steps != self._accumulation_steps:
            raise ValueError(
                f"accumulation_steps must stay what the window began with, {self._accumulation_steps}, got "
                f"{accumulation_steps}; flush() ends the window"
            )
        for task in tasks:
            if self.taken[task] >= self.size:
                waiting = [name for name, taken in zip(self._task_names, self.taken, strict=True) if taken < self.size]
                raise ValueError(
                    f"task {self._task_names[task]!r} has had its {self.size} of this accumulation window, which waits "
                    f"for {waiting}; flush() ends the window"
                )

    def is_complete(self, taken: Sequence[int] | None = None) -> bool:
        """Return whether every task has had its micro-batches, or would have with ``taken``."""
        return self._accumulation_steps is None or all(n == self.size for n in (taken or self.taken))

    def absent(self) -> list[int]:
        """Tasks that have had nothing."""
        return [task for task, taken in enumerate(self.taken) if taken == 0]


def check_accumulation_steps(value: int) -> int:
    """Return the number of micro-batches as an int.

    :raises ValueError: If it is not a positive integer.
    """
    if (number := positive_integer(value)) is None:
        raise ValueError(f"accumulation_steps must be a positive integer or None, got {value!r}")
    return number
