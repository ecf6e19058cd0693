"""``BetaSchedule``: when the EMA has become too short to keep."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dbmtl_fused.functional import check_finite_float

_NEVER = 2**62


class BetaSchedule:
    """``β_k = beta / k**beta_sigma`` for step ``k = 1, 2, ...``.

    :param drop_below: The EMA is over at the first step with ``β_k < drop_below``; None: never.
    :raises TypeError: If an argument is not a number.
    :raises ValueError: If an argument's value is not allowed.
    """

    def __init__(self, beta: float, beta_sigma: float, drop_below: float | None) -> None:
        check_finite_float("beta", beta, low=0.0, below=1.0)
        check_finite_float("beta_sigma", beta_sigma, low=0.0)
        self._last_step = _NEVER  # of the EMA
        if drop_below is not None:
            check_finite_float("drop_ema_below", drop_below, above=0.0)
            if not (drop_below <= beta and beta_sigma > 0):
                raise ValueError(
                    f"drop_ema_below must be at most beta={beta:g}, with a beta_sigma above 0 so that the coefficient "
                    f"falls, got {drop_below:g} and beta_sigma={beta_sigma:g}"
                )
            self._last_step = _last_step(beta, beta_sigma, drop_below)
        self.restart()

    @property
    def ends(self) -> bool:
        """Whether the EMA will be over some time."""
        return self._last_step < _NEVER

    def restart(self, step: int = 0) -> None:
        """``step`` steps have been taken."""
        self.at_most = step  # steps taken, as far as the host knows: those that overflowed do not count

    def is_over(self, step: Tensor) -> bool:
        """Return whether the step about to be taken needs no EMA any more.

        Waits for the device only when the number of calls says that it may be so: as a rule once in a training. Never
        while a graph is captured, which keeps its EMA.

        :param step: Steps taken so far, 0-d int64 on the device.
        """
        if _is_capturing(step.device):
            return False
        if self.at_most >= self._last_step:
            self.at_most = int(step)
        return self.at_most >= self._last_step

    def count(self, step: Tensor) -> None:
        """Count a step that begins."""
        if not _is_capturing(step.device):
            self.at_most += 1

    def has_ended(self, step: int) -> bool:
        """Whether after ``step`` steps the EMA is over."""
        return step >= self._last_step


def _last_step(beta: float, beta_sigma: float, drop_below: float) -> int:
    """The last ``k`` whose coefficient is not below ``drop_below``."""
    try:
        estimate = int((beta / drop_below) ** (1 / beta_sigma))
    except OverflowError:
        return _NEVER - 1
    if estimate >= 2**52:  # beyond what float64 counts; no training gets there
        return min(estimate, _NEVER - 1)
    # The power is off by a few units in its last place, and so may be the estimate by a step.
    return next(
        k for k in itertools.count(estimate + 2, -1) if k < 1 or not beta / math.pow(k, beta_sigma) < drop_below
    )


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
