"""A step never waits for the device: it runs where values do not exist.

Under ``FakeTensorMode`` tensors have shapes and no data: ``.item()``, ``.tolist()``, a branch on a value and an output
whose shape depends on one all raise. On CPUs the balancer does look at one value on purpose, for looking is free there:
whether a loss is negative.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_inputs import DEVICE
from small_models import Net
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dbmtl_fused import DBMTL, balance_
from dbmtl_fused.losses import TaskLosses

OPTIONS: dict[str, dict[str, Any]] = {
    "EMA": {},
    "beta 0": {"beta": 0.0},
    "log only": {"beta": 0.0, "alpha": None},
    "losses themselves": {"log_losses": False},
    "median": {"alpha": "median"},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "preference": {"preference": [1.0, 0.5, 2.0]},
    "preference, beta 0": {"preference": [1.0, 0.5, 2.0], "beta": 0.0},
    "a buffer to be dropped": {"drop_ema_below": 0.1},
}

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="fake tensors are made on CPUs here")


@pytest.fixture
def _no_look_at_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskLosses, "_check_not_negative", lambda self: None)


@pytest.mark.usefixtures("_no_look_at_losses")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bucket_bytes", [None, 64], ids=["from .grad", "buckets"])
def test_whole_steps(backend: str, bucket_bytes: int | None, options: dict[str, Any]) -> None:
    """Forward, T backwards, balancing and optimizer, by both ways in, into fresh and into existing ``.grad``."""
    with FakeTensorMode():
        net = Net()
        x, target = torch.randn(8, 1, 6, 6), torch.randn(8, 2)
        balancer = DBMTL(net.encoder, num_tasks=3, backend=backend, bucket_bytes=bucket_bytes, **options)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            balancer.backward(net.losses(x, target))
            balancer(net.losses(x, target)).backward()
            optimizer.step()
            active = torch.ones(3, dtype=torch.bool)
            balancer.backward(net.losses(x, target), active=active)
            balancer(net.losses(x, target), active=active).backward()
            balancer.backward([net.losses(x, target)[0], None, None])
            assert all(value.shape == () for value in balancer.log_dict().values())
            if balancer.ema:
                assert balancer.cosine_similarity().shape == (3, 3)
        assert all(p.grad.shape == p.shape for p in net.parameters())
        assert balancer.norms.shape == balancer.weights.shape == (3,)


@pytest.mark.usefixtures("_no_look_at_losses")
def test_one_shot(backend: str) -> None:
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbmtl_fused.functional._check_overlap", lambda *matrices: None)  # fake tensors have no addresses
        out, norms, weights = balance_(torch.zeros(3, 50), torch.randn(3, 50), torch.tensor(0.5), backend=backend)
    assert out.shape == (50,)
    assert norms.shape == weights.shape == (3,)


def test_a_look_would_show(backend: str) -> None:
    """The check of negative losses is one, and is found."""
    with FakeTensorMode():
        net = Net()
        balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
        losses = net.losses(torch.randn(8, 1, 6, 6), torch.randn(8, 2))
        with pytest.raises(DataDependentOutputException):
            balancer.backward(losses)
