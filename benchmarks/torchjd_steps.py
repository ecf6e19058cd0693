"""Steps with TorchJD, a library for Jacobians of several losses, which can aggregate them in many ways, not by DB-MTL.

``mtl_backward`` leaves the Jacobian in ``.jac``, ``jac_to_grad`` hands it, as a matrix, to an aggregator and writes
what that returns into ``.grad``. Ours, :class:`DBMTLAggregator`, keeps the EMA. UPGrad and MGDA are theirs: they
compute something else, and stand beside it for scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Problem
from benchmarks.step_base import Balanced, Step, logs_of, weights_of

try:
    from torchjd.aggregation import MGDA, Aggregator, UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward
except ImportError as error:
    WHY_NOT: str | None = f"TorchJD was skipped: {error} (pip install 'dbmtl_fused[bench]')"
    BALANCED: dict[str, Callable[..., Step]] = {}
    OTHERS: dict[str, Callable[..., Step]] = {}
else:
    WHY_NOT = None

    class DBMTLAggregator(Aggregator):
        """DB-MTL of a Jacobian with the tightest operators torch has: ``lerp_``, ``vector_norm``, a product."""

        def __init__(self, ema: Tensor, next_beta: Callable[[], float]) -> None:
            super().__init__()
            self.ema, self.next_beta = ema, next_beta

        def forward(self, matrix: Tensor, /) -> Tensor:
            self.ema.lerp_(matrix, 1 - self.next_beta())
            return weights_of(self.ema) @ self.ema

    class TorchJD(Balanced):
        """``mtl_backward`` and ``jac_to_grad``.

        :param chunk: Rows of the Jacobian computed at once, by vmap; 1: one after the other, None: all.
        """

        def __init__(
            self,
            size: Problem,
            device: str | torch.device = "cpu",
            *,
            chunk: int | None,
            aggregator: Callable[[], Aggregator] | None = None,
        ) -> None:
            super().__init__(size, device)
            self.chunk = chunk
            self.aggregator = aggregator() if aggregator else DBMTLAggregator(self.new_ema(), self.next_beta)

        def backward(self, losses: list[Tensor]) -> None:
            shared = self.model.shared()
            tasks = [list(head.parameters()) for head in self.model.heads]
            arguments: dict[str, Any] = {"tasks_params": tasks, "shared_params": shared}
            mtl_backward(logs_of(losses), self.features, parallel_chunk_size=self.chunk, **arguments)
            jac_to_grad(shared, self.aggregator)

    BALANCED = {
        "TorchJD, one by one": functools.partial(TorchJD, chunk=1),
        "TorchJD, vmap": functools.partial(TorchJD, chunk=None),
    }
    OTHERS = {
        "TorchJD UPGrad": functools.partial(TorchJD, chunk=1, aggregator=UPGrad),
        "TorchJD MGDA": functools.partial(TorchJD, chunk=1, aggregator=MGDA),
    }
