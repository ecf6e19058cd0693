"""What must be true of a ``state_dict`` before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dbmtl_fused.layout import Slot

KEYS = ("ema", "step", "reached", "task_names")


def check_keys(state_dict: Mapping[str, Any], task_names: Sequence[str]) -> None:
    """Raise a ValueError unless everything is there, and of these tasks."""
    if missing := [key for key in KEYS if key not in state_dict]:
        raise ValueError(f"state_dict must have the keys {', '.join(KEYS)}; missing {missing}")
    if list(state_dict["task_names"]) != list(task_names):
        raise ValueError(
            f"state_dict is of the tasks {list(state_dict['task_names'])}, the balancer of {list(task_names)}"
        )


def check_shapes(ema: Mapping[str, Tensor], T: int, slots: Sequence[Slot]) -> None:
    """Raise a ValueError, in which every difference is named, unless ``ema`` is that of the parameters in ``slots``."""
    expected = {slot.name: (T, *slot.shape) for slot in slots}
    differences = [f"missing {name!r}" for name in expected if name not in ema]
    differences += [f"unexpected {name!r}" for name in ema if name not in expected]
    for name, shape in expected.items():
        if name in ema and tuple(ema[name].shape) != shape:
            differences.append(f"{name!r} has shape {tuple(ema[name].shape)}, not {shape}")
    if differences:
        raise ValueError("state_dict does not fit the shared parameters: " + "; ".join(differences))
