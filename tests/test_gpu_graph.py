"""A whole training step in a CUDA graph: what only a GPU can answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from op_inputs import DEVICE
from small_models import Net, make_net
from torch import Tensor

from dbmtl_fused import DBMTL

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: DBMTL_FUSED_TEST_DEVICE is not cuda")

Rng = np.random.Generator
OPTIONS: dict[str, dict[str, Any]] = {
    "EMA": {},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "beta 0": {"beta": 0.0},
    "preference": {"preference": [1.0, 0.5, 2.0]},
    "buckets": {"bucket_bytes": 1 << 10},
}


class Training:
    """A model, its optimizer and balancer, and the memory that a captured step reads its batch and mask from."""

    def __init__(self, backend: str, **options: Any) -> None:
        self.net: Net = make_net()
        self.balancer = DBMTL(self.net.encoder, num_tasks=3, backend=backend, **options)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, capturable=True)
        self.x, self.target = self.net.batch(np.random.default_rng(0))
        self.active = torch.ones(3, dtype=torch.bool, device=DEVICE)

    def fill(self, x: Tensor, target: Tensor, active: Tensor) -> None:
        self.x.copy_(x)
        self.target.copy_(target)
        self.active.copy_(active)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.balancer.backward(self.net.losses(self.x, self.target), active=self.active)
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        return [*self.net.parameters(), *self.balancer.ema.values(), self.balancer.step, self.balancer.norms]


def captured(step: Callable[[], None], warm_up: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_replays_equal_eager_steps(rng: Rng, backend: str, options: dict[str, Any]) -> None:
    """β_k keeps moving, the mask is read anew, and nothing is allocated by a replay."""
    batches = [(*make_net().batch(rng), torch.from_numpy(rng.random(3) < 0.7).to(DEVICE)) for _ in range(20)]
    eager, replayed = Training(backend, **options), Training(backend, **options)

    def warm_up(training: Training) -> None:
        training.fill(*batches[0])
        training.step()

    for _ in range(3):
        warm_up(eager)
    graph = captured(replayed.step, lambda: warm_up(replayed))
    allocations: set[int] = set()
    for batch in batches:
        eager.fill(*batch)
        eager.step()
        replayed.fill(*batch)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        graph.replay()
        allocations.add(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
        for value, expected in zip(replayed.state(), eager.state(), strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    assert allocations == {0}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_step_waits_for_the_device(rng: Rng, backend: str, options: dict[str, Any]) -> None:
    training = Training(backend, **options)
    training.step()  # tables of what does not change are copied once
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            training.step()
            training.optimizer.zero_grad()
            training.balancer(training.net.losses(training.x, training.target)).backward()
            training.balancer.backward([training.net.losses(training.x, training.target)[0], None, None])
            training.balancer.log_dict()
    finally:
        torch.cuda.set_sync_debug_mode("default")
