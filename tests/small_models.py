"""Small multi-task models, and Algorithm 1 run beside a balancer on the same model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from op_inputs import DEVICE
from torch import Tensor, nn

from dbmtl_fused import oracle

LOSS_SCALES = (1.0, 1e3, 1e-4)
"""Tasks whose losses differ by seven orders of magnitude."""


class Net(nn.Module):
    """A convolutional encoder and three regression heads; input ``(N, 1, 6, 6)``, ``T = 3`` losses."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 40), nn.Tanh()
            )
            self.heads = nn.ModuleList(nn.Linear(40, 2) for _ in LOSS_SCALES)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.encoder(x)
        return [head(features) for head in self.heads]

    def losses(self, x: Tensor, target: Tensor) -> list[Tensor]:
        outputs = self(x)
        return [scale * (y - target).square().mean() for scale, y in zip(LOSS_SCALES, outputs, strict=True)]

    def batch_losses(self, rng: np.random.Generator) -> list[Tensor]:
        """Losses of a fresh random batch."""
        return self.losses(*self.batch(rng))

    def batch(self, rng: np.random.Generator, n: int = 8) -> tuple[Tensor, Tensor]:
        like = next(self.parameters())
        x, target = rng.standard_normal((n, 1, 6, 6)), rng.standard_normal((n, 2))
        return torch.from_numpy(x).to(like), torch.from_numpy(target).to(like)


def make_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    return Net(seed).to(DEVICE, dtype)


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    """Logical elements of all tensors in float64, None as zeros."""
    parts = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True)]
    return torch.cat([t.detach().reshape(-1).cpu().double() for t in parts]).numpy()


def grads_of(params: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    return flat([p.grad for p in params], params)


def relative_error(value: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(np.float64(value - expected)) / np.linalg.norm(np.float64(expected)))


class Algorithm1:
    """The paper's algorithm in the oracle's precision, on gradients that autograd gives for one task at a time.

    :param options: As of the balancer it stands beside: ``beta``, ``beta_sigma``, ``alpha``, ``log_losses``,
        ``preference``.
    """

    def __init__(self, params: Iterator[Tensor] | Sequence[Tensor], **options: Any) -> None:
        self.params = list(params)
        self.beta, self.beta_sigma = options.get("beta", 0.9), options.get("beta_sigma", 0.5)
        self.log_losses, alpha = options.get("log_losses", True), options.get("alpha", "max")
        self.alpha = "none" if alpha is None else alpha if isinstance(alpha, str) else "constant"
        self.constant = alpha if self.alpha == "constant" else 1.0
        self.preference = options.get("preference")
        self.k, self.ema = 0, oracle.real(0.0)

    def step(self, *micro_batches: Sequence[Tensor | None]) -> np.ndarray[Any, Any]:
        """Take a step on the losses of one batch or several, whose graphs are kept; return the shared gradient, flat.

        A task with None keeps its row and takes no part. An entry of the EMA whose update is not finite stays as it
        was; such a step returns NaN and does not count.
        """
        task_grads = np.mean([self._task_grads(losses) for losses in micro_batches], axis=0)
        there = np.array([loss is not None for loss in micro_batches[0]])
        beta_k = oracle.real(self.beta) / oracle.real(self.k + 1) ** oracle.real(self.beta_sigma)
        before = np.broadcast_to(self.ema, task_grads.shape)
        updated, found_inf = oracle.ema_update(before, task_grads, beta_k)
        self.ema = np.where(there[:, None], updated, before)
        if found_inf:
            return np.full(task_grads.shape[1], np.nan)
        self.k += 1
        preference = there * (1.0 if self.preference is None else np.array(self.preference))
        norms = oracle.row_norms(self.ema)
        self.balanced = oracle.combine(self.ema, norms, self.alpha, self.constant, preference=preference)
        return self.balanced.out

    def _task_grads(self, losses: Sequence[Tensor | None]) -> np.ndarray[Any, Any]:
        rows = []
        for loss in losses:
            if loss is None:
                rows.append(oracle.real(flat([None] * len(self.params), self.params)))
                continue
            grads = torch.autograd.grad(loss, self.params, retain_graph=True, allow_unused=True)
            rows.append(oracle.real(flat(grads, self.params)))
            if self.log_losses:
                rows[-1] = rows[-1] / (oracle.real(loss.item()) + oracle.real(1e-8))
        return np.stack(rows)
