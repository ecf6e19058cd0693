"""What all ways to do a training step have in common: ``zero_grad``, forward, T backwards; without the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.comparators import EPS
from benchmarks.models import Problem

BETA, BETA_SIGMA, LOG_EPS = 0.9, 0.5, 1e-8


class Step(ABC):
    """One step of one problem. All call ``zero_grad(set_to_none=True)`` first, which frees what the last step left."""

    def __init__(self, size: Problem, device: str | torch.device = "cpu") -> None:
        self.model = size.build().to(device)
        self.size = size

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.features = self.model.features()
        self.backward(self.model.losses_of(self.features))
        del self.features

    @abstractmethod
    def backward(self, losses: list[Tensor]) -> None:
        """From the losses to ``.grad``."""

    def backward_of(self, losses: list[Tensor], t: int) -> None:
        """The backward of task ``t``, which keeps the graph if tasks after it share it."""
        losses[t].backward(retain_graph=not self.model.own_batches and t + 1 < len(losses))


class Balanced(Step):
    """What implementations of DB-MTL share: the count of steps and the schedule of beta."""

    def __init__(self, size: Problem, device: str | torch.device = "cpu") -> None:
        super().__init__(size, device)
        self.step = 0

    def next_beta(self) -> float:
        self.step += 1
        return BETA / self.step**BETA_SIGMA

    def new_ema(self) -> Tensor:
        """A ``T x P`` buffer of zeros."""
        return torch.zeros(self.size.tasks, self.size.P, device=self.model.shared()[0].device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The part of each shared parameter of a vector of ``P``."""
        return views_of(flat, self.model.shared())

    def write_grads(self, flat: Tensor) -> None:
        """Make every shared ``.grad`` a view of its part of ``flat``."""
        for p, part in zip(self.model.shared(), self.views(flat), strict=True):
            p.grad = part


def logs_of(losses: list[Tensor]) -> list[Tensor]:
    """What DB-MTL balances."""
    return [torch.log(l + LOG_EPS) for l in losses]


def views_of(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The part of each of ``like`` of a vector of as many numbers, in its shape."""
    return [part.view_as(of) for of, part in zip(like, flat.split([of.numel() for of in like]), strict=True)]


def weights_of(ema: Tensor) -> Tensor:
    """Largest norm over own norm, shape ``(T,)``."""
    norms = torch.linalg.vector_norm(ema, dim=1)
    return norms.amax() / (norms + EPS)
