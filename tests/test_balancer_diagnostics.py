"""What can be read after a step: the norm of the gradient, angles between tasks, names for loggers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from op_inputs import DEVICE
from small_models import Net, make_net

from dbmtl_fused import DBMTL

Rng = np.random.Generator
OPTIONS: dict[str, dict[str, Any]] = {
    "EMA": {},
    "beta 0": {"beta": 0.0},
    "preference": {"preference": [1.0, 0.5, 2.0]},
    "beta 0, plain sum of preferences": {"beta": 0.0, "alpha": None, "preference": [1.0, 0.5, 2.0]},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "float64 state": {"state_dtype": torch.float64},
}


def make(backend: str, **options: Any) -> tuple[Net, DBMTL]:
    net = make_net()
    return net, DBMTL(net.encoder, num_tasks=3, backend=backend, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_grad_norm(backend: str, rng: Rng, options: dict[str, Any]) -> None:
    """What clip_grad_norm_ finds, at no other pass; fresh each step."""
    net, balancer = make(backend, **options)
    found = []
    for _ in range(3):
        net.zero_grad()
        balancer.backward(net.batch_losses(rng))
        found.append(balancer.grad_norm)
        expected = torch.nn.utils.get_total_norm([p.grad for p in net.encoder.parameters()])
        torch.testing.assert_close(found[-1].to(expected), expected, rtol=1e-5, atol=0)
    assert len({float(norm) for norm in found}) == 3


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}], ids=["EMA", "beta 0"])
def test_grad_norm_is_not_scaled(backend: str, rng: Rng, options: dict[str, Any]) -> None:
    net, balancer = make(backend, **options)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    balancer.backward(net.batch_losses(rng), scaler=scaler)
    expected = torch.nn.utils.get_total_norm([p.grad / 2**10 for p in net.encoder.parameters()])
    torch.testing.assert_close(balancer.grad_norm, expected, rtol=1e-5, atol=0)


def test_grad_norm_over_groups_of_dtypes(backend: str, rng: Rng) -> None:
    """Parameters of two dtypes have two flat gradients, and one norm."""
    net = make_net()
    net.encoder[0].to(torch.float64)
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    x, target = net.batch(rng)
    features = net.encoder[1:](net.encoder[0](x.double()).float())
    balancer.backward([(head(features) - target).square().mean() for head in net.heads])
    expected = torch.stack([p.grad.double().norm() for p in net.encoder.parameters()]).norm()
    torch.testing.assert_close(balancer.grad_norm, expected, rtol=1e-5, atol=0)


def test_grad_norm_of_a_bad_step_and_of_none(backend: str, rng: Rng) -> None:
    net, balancer = make(backend)
    assert balancer.grad_norm.isnan()
    losses = net.batch_losses(rng)
    balancer.backward([losses[0], losses[1] * torch.inf, losses[2]])
    assert balancer.grad_norm.isnan()
    balancer.backward(net.batch_losses(rng))
    assert balancer.grad_norm.isfinite()
    balancer.reset()
    assert balancer.grad_norm.isnan()


def test_gram_and_cosines(backend: str, rng: Rng) -> None:
    net, balancer = make(backend)
    for _ in range(2):
        balancer.backward(net.batch_losses(rng))
    rows = torch.cat([ema.flatten(1).double() for ema in balancer.ema.values()], dim=1)
    expected = rows @ rows.t()
    torch.testing.assert_close(balancer.gram().double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    cosines = balancer.cosine_similarity()
    norms = rows.norm(dim=1)
    torch.testing.assert_close(cosines.double(), expected / (norms[:, None] * norms), rtol=0, atol=1e-5)
    assert torch.equal(cosines, cosines.t())
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3, device=DEVICE))
    balancer.reset("1")
    assert not balancer.cosine_similarity()[1].any()
    assert balancer.cosine_similarity().isfinite().all()


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": 0.0, "alpha": None}], ids=["beta 0", "log only"])
def test_gram_without_an_ema(rng: Rng, options: dict[str, Any]) -> None:
    _, balancer = make("reference", **options)
    for ask in (balancer.gram, balancer.cosine_similarity):
        with pytest.raises(RuntimeError, match=r"gram\(\) compares the rows of the EMA, and there is none"):
            ask()


def test_log_dict(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, task_names=["seg", "depth", "normal"], backend=backend)
    balancer.backward(net.batch_losses(rng))
    logged = balancer.log_dict()
    assert set(logged) == {
        "dbmtl/alpha",
        "dbmtl/grad_norm",
        *(f"dbmtl/{kind}/{name}" for kind in ("norm", "weight") for name in ("seg", "depth", "normal")),
    }
    assert all(value.shape == () and value.device.type == DEVICE.type for value in logged.values())
    assert logged["dbmtl/weight/depth"] == balancer.weights[1]
    assert logged["dbmtl/norm/normal"] == balancer.norms[2]
    assert set(balancer.log_dict(prefix="")) >= {"alpha", "norm/seg"}
