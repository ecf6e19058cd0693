"""What a run consists of: tables that are measured one by one, or left out with the reason said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from benchmarks.report import Section

MEMORY_SHARE = 0.8
"""Of the memory that is free now, how much a table may take."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    device: torch.device
    rounds: int
    quick: bool
    threads: int
    compiled: bool
    data: Path | None


class LeftOut(Exception):
    """What cannot be measured here; its text says why."""


class Table(NamedTuple):
    """A section still to be measured."""

    title: str
    measure: Callable[[], Section]  # raises LeftOut


def free_bytes(device: torch.device) -> float:
    """What may be allocated on ``device`` now."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return MEMORY_SHARE * free


def require_memory(needed: float, device: torch.device) -> None:
    """Raise :class:`LeftOut` if ``needed`` bytes are not free."""
    if needed > (free := free_bytes(device)):
        raise LeftOut(f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB may be taken")
