"""Validation of a ``state_dict``: all of it, before any of it is loaded."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbmtl_fused._ops import ENTRY_LIMIT, GRAD_DTYPES, compute_dtype
from dbmtl_fused.layout import Slot, clean_name
from dbmtl_fused.tasks import preferences_of

KEYS = ("ema", "step", "reached", "task_names")


class IncompatibleKeys(NamedTuple):
    """The differences that ``load_state_dict(strict=False)`` has passed over."""

    missing_keys: list[str]
    """Tasks and parameters of the balancer that the state does not have; they start at zero."""
    unexpected_keys: list[str]
    """Tasks and parameters of the state that the balancer does not have."""


class Loaded(NamedTuple):
    """A state that fits the balancer."""

    ema: dict[str, Tensor]  # by the balancer's names; (T of the state, *shape)
    step: int
    reached: set[str]
    tasks: list[tuple[int, int]]  # rows that are loaded: task of the balancer, task of the state
    preference: list[float] | None  # of the balancer's tasks; 1 for those that the state does not have
    has_preference: bool  # states of version 0.1 have none
    differences: IncompatibleKeys


def validate(
    state: Mapping[str, Any], task_names: Sequence[str], slots: Sequence[Slot], state_dtype: torch.dtype, strict: bool
) -> Loaded:
    """Return what ``load_state_dict`` takes over.

    :param slots: The shared parameters; they may all be missing in the state, which then has no EMA.
    :raises TypeError: If an entry is of a wrong kind.
    :raises ValueError: If an entry is missing, has a wrong value, or, if ``strict``, is of other tasks or parameters.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
    if missing := [key for key in KEYS if key not in state]:
        raise ValueError(f"state_dict must have the keys {', '.join(KEYS)}; missing {missing}")
    names = _names("task_names", state["task_names"])
    if strict and names != list(task_names):
        raise ValueError(f"state_dict is of the tasks {names}, the balancer of {list(task_names)}")
    reached = {_plain_name(name) for name in _names("reached", state["reached"])}
    ema = _ema(state["ema"], compute_dtype(state_dtype))
    expected = {_plain_name(slot.name): slot for slot in slots}
    missing_keys = [slot.name for name, slot in expected.items() if name not in ema] if ema else []
    unexpected_keys = [name for name in ema if name not in expected]
    differences = [f"missing {name!r}" for name in missing_keys] + [f"unexpected {name!r}" for name in unexpected_keys]
    shapes = [
        f"{slot.name!r} has shape {tuple(ema[name].shape)}, not {(len(names), *slot.shape)}"
        for name, slot in expected.items()
        if name in ema and ema[name].shape != (len(names), *slot.shape)
    ]
    if shapes or (strict and differences):
        raise ValueError(
            "state_dict does not fit the shared parameters: " + "; ".join((differences if strict else []) + shapes)
        )
    preference = preferences_of(state.get("preference"), names, compute_dtype(state_dtype))
    if preference is not None:
        by_name = dict(zip(names, preference, strict=True))
        preference = [by_name.get(name, 1.0) for name in task_names]
    return Loaded(
        ema={slot.name: ema[name] for name, slot in expected.items() if name in ema},
        step=_step(state["step"]),
        reached={slot.name for name, slot in expected.items() if name in reached},
        tasks=[(task, names.index(name)) for task, name in enumerate(task_names) if name in names],
        preference=preference,
        has_preference="preference" in state,
        differences=IncompatibleKeys(
            missing_keys=[name for name in task_names if name not in names] + missing_keys,
            unexpected_keys=[name for name in names if name not in task_names] + unexpected_keys,
        ),
    )


def _plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers: ``torch.compile``, and (Distributed)DataParallel."""
    return clean_name(name).removeprefix("module.")


def _names(key: str, value: Any) -> list[str]:
    names = list(value) if isinstance(value, (list, tuple)) else None
    if names is None or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise TypeError(f"state_dict[{key!r}] must be a list of different names, got {value!r}")
    return names


def _step(value: Any) -> int:
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_meta or value.layout is not torch.strided):
        raise ValueError(f"state_dict['step'] must be one integer >= 0, got a tensor of shape {tuple(value.shape)}")
    number = value.item() if isinstance(value, Tensor) else value
    if isinstance(number, bool) or not hasattr(number, "__index__") or not 0 <= operator.index(number) < 2**62:
        raise ValueError(f"state_dict['step'] must be one integer >= 0, got {number!r}")
    return operator.index(number)


def _ema(ema: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    if not isinstance(ema, Mapping):
        raise TypeError(f"state_dict['ema'] must be a mapping of names to tensors, got {type(ema).__name__}")
    for name, entry in ema.items():
        if not isinstance(name, str):
            raise TypeError(f"state_dict['ema'] must have names of parameters as keys, got {name!r}")
        if not isinstance(entry, Tensor) or entry.layout is not torch.strided or entry.is_meta:
            found = f"a {entry.layout} tensor on {entry.device}" if isinstance(entry, Tensor) else type(entry).__name__
            raise TypeError(f"state_dict['ema'][{name!r}] must be a dense tensor with memory, got {found}")
        if entry.dtype not in GRAD_DTYPES:
            raise TypeError(f"state_dict['ema'][{name!r}] must have one of the dtypes {GRAD_DTYPES}, got {entry.dtype}")
        largest = entry.abs().max().item() if entry.numel() else 0.0
        if not largest <= ENTRY_LIMIT[dtype]:
            raise ValueError(
                f"state_dict['ema'][{name!r}] must be finite and at most {ENTRY_LIMIT[dtype]:g} in magnitude, got "
                f"{largest}"
            )
    return {_plain_name(name): entry for name, entry in ema.items()}
