"""Activation checkpointing, both kinds: gradients are those without it, step after step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from op_inputs import DEVICE
from small_models import LOSS_SCALES, grads_of, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbmtl_fused import DBMTL

Rng = np.random.Generator
T = len(LOSS_SCALES)
WIDTH = 24

kinds = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
captures = pytest.mark.parametrize("bucket_bytes", [None, 64], ids=["from .grad", "buckets"])
ways = pytest.mark.parametrize("drop_in", [False, True], ids=["backward", "drop-in loss"])


class Segments(nn.Module):
    """Segments with BatchNorm and dropout, the last within a checkpoint within a checkpoint, and three heads.

    :param use_reentrant: Of the checkpoints around the segments; None: none.
    :param order: Which segments run, one after the other.
    """

    def __init__(self, use_reentrant: bool | None, order: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        self.use_reentrant, self.order = use_reentrant, order
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.3))
                for _ in range(3)
            )
            self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in LOSS_SCALES)

    def run(self, function: nn.Module, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.use_reentrant)

    def losses(self, x: Tensor, target: Tensor, dropout_seed: int) -> list[Tensor]:
        def outer(x: Tensor) -> Tensor:
            return self.run(self.encoder[self.order[-1]], x)

        with torch.random.fork_rng():
            torch.manual_seed(dropout_seed)
            for i in self.order[:-1]:
                x = self.run(self.encoder[i], x)
            features = self.run(outer, x)  # type: ignore[arg-type]
        return [s * (head(features) - target).square().mean() for s, head in zip(LOSS_SCALES, self.heads, strict=True)]


def batch(rng: Rng) -> tuple[Tensor, Tensor]:
    """Inputs, which reentrant checkpoints want to require grad, and targets."""
    x, target = (torch.from_numpy(rng.standard_normal((8, n))).to(DEVICE, torch.float32) for n in (WIDTH, 2))
    return x.requires_grad_(), target


@kinds
@captures
@ways
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 0)], ids=["each layer once", "a layer twice"])
def test_many_steps(use_reentrant: bool, bucket_bytes: int | None, drop_in: bool, order: list[int], rng: Rng) -> None:
    """Beside a twin without checkpoints: bit for bit, but where a layer's gradient may come in parts, whose sum rounds
    differently."""
    net, twin = Segments(use_reentrant, order).to(DEVICE), Segments(None, order).to(DEVICE)
    balancer, other = (DBMTL(n.encoder, num_tasks=T, bucket_bytes=bucket_bytes) for n in (net, twin))
    optimizers = [torch.optim.SGD(n.parameters(), lr=1e-3, momentum=0.9) for n in (net, twin)]
    for step in range(4):
        x, target = batch(rng)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = net.losses(x, target, step)
        if drop_in:
            balancer(losses).backward()
        else:
            balancer.backward(losses)
        other.backward(twin.losses(x, target, step))
        for optimizer in optimizers:
            optimizer.step()
        grads, expected = (grads_of([p for p in n.parameters() if p.grad is not None]) for n in (net, twin))
        assert relative_error(grads, expected) <= (0 if order == (0, 1, 2) else 1e-5)
        for name, m in balancer.ema.items():
            torch.testing.assert_close(m, other.ema[name])


@kinds
@captures
def test_tasks_with_batches_of_their_own(use_reentrant: bool, bucket_bytes: int | None, rng: Rng) -> None:
    """Each graph is freed after its backward pass, in which it is computed again."""
    net, twin = Segments(use_reentrant).to(DEVICE), Segments(None).to(DEVICE)
    balancer, other = (DBMTL(n.encoder, num_tasks=T, bucket_bytes=bucket_bytes) for n in (net, twin))
    for _ in range(2):
        batches = [batch(rng) for _ in range(T)]
        for n, b in ((net, balancer), (twin, other)):
            n.zero_grad()
            b.backward([n.losses(x, target, task)[task] for task, (x, target) in enumerate(batches)])
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@kinds
@captures
def test_the_checkpointed_part_runs_once_more_for_every_task(
    use_reentrant: bool, bucket_bytes: int | None, rng: Rng
) -> None:
    net = Segments(use_reentrant).to(DEVICE)
    DBMTL(net.encoder, num_tasks=T, bucket_bytes=bucket_bytes).backward(net.losses(*batch(rng), 0))
    assert [int(segment[1].num_batches_tracked) for segment in net.encoder[:-1]] == [1 + T] * 2


@captures
def test_reentrant_checkpoints_under_autograd_grad(bucket_bytes: int | None, rng: Rng) -> None:
    """Torch does not see parameters behind them: an error, and all is as before."""
    net = Segments(use_reentrant=True).to(DEVICE)
    balancer = DBMTL(net.encoder, num_tasks=T, bucket_bytes=bucket_bytes)
    loss = balancer(net.losses(*batch(rng), 0))
    with pytest.raises(RuntimeError, match="the loss of task '0' reaches no shared parameter"):
        torch.autograd.grad(loss, list(net.encoder.parameters()))
    assert all(p.grad is None for p in net.parameters())
    balancer.backward(net.losses(*batch(rng), 0))
    assert balancer.step == 1
