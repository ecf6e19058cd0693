"""Checkpoints continue bit for bit, go from layout to layout by name, and refuse what does not fit."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_inputs import DEVICE
from small_models import make_net
from torch import Tensor, nn

from dbmtl_fused import DBMTL

Rng = np.random.Generator


def steps(
    net: nn.Module, balancer: DBMTL, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
) -> None:
    for x, target in batches:
        optimizer.zero_grad()
        balancer.backward(net.losses(x, target))
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.0}, {"alpha": None, "beta": 0.0}, {"state_dtype": torch.bfloat16}],
    ids=["EMA", "beta 0", "log only", "bfloat16 EMA"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_resumed_run_continues_bit_for_bit(
    backend: str, options: dict[str, Any], dtype: torch.dtype, rng: Rng, tmp_path: Path
) -> None:
    net = make_net(dtype)
    batches = [net.batch(rng) for _ in range(8)]
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend, **options)
    optimizer = torch.optim.Adam(net.parameters())
    steps(net, balancer, optimizer, batches[:4])
    torch.save([net.state_dict(), optimizer.state_dict(), balancer.state_dict()], tmp_path / "checkpoint.pt")
    steps(net, balancer, optimizer, batches[4:])

    resumed = make_net(dtype, seed=1)
    other = DBMTL(resumed.encoder, num_tasks=3, backend=backend, **options)
    other_optimizer = torch.optim.Adam(resumed.parameters())
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for target, state in zip((resumed, other_optimizer, other), checkpoint, strict=True):
        target.load_state_dict(state)
    steps(resumed, other, other_optimizer, batches[4:])
    assert other.step == balancer.step == 8
    for p, q in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    for name, m in balancer.ema.items():
        assert torch.equal(m, other.ema[name])


def test_state_dict_names_everything_in_logical_order(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, task_names=["a", "b", "c"], backend=backend)
    balancer.backward(net.batch_losses(rng))
    state = balancer.state_dict()
    assert set(state) == {"ema", "step", "reached", "task_names", "preference"}
    assert {name: m.shape for name, m in state["ema"].items()} == {
        name: (3, *p.shape) for name, p in net.encoder.named_parameters()
    }
    assert state["step"] == 1
    assert state["step"].dtype == torch.int64
    assert sorted(state["reached"]) == sorted(name for name, _ in net.encoder.named_parameters())
    assert state["task_names"] == ["a", "b", "c"]


@pytest.mark.parametrize("to_channels_last", [True, False], ids=["to channels_last", "from channels_last"])
def test_checkpoints_cross_memory_formats(backend: str, to_channels_last: bool, rng: Rng, tmp_path: Path) -> None:
    nets = make_net(), make_net().to(memory_format=torch.channels_last)
    source, target = nets if to_channels_last else nets[::-1]
    balancer = DBMTL(source.encoder, num_tasks=3, backend=backend)
    balancer.backward(source.batch_losses(rng))
    torch.save(balancer.state_dict(), tmp_path / "balancer.pt")
    other = DBMTL(target.encoder, num_tasks=3, backend=backend)
    other.load_state_dict(torch.load(tmp_path / "balancer.pt", weights_only=True))
    for name, m in balancer.ema.items():
        assert torch.equal(m, other.ema[name])
    weights = "0.weight", "2.weight"
    assert any(balancer.ema[name].stride() != other.ema[name].stride() for name in weights)


def test_checkpoints_cross_dtypes_and_orders_of_parameters(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    balancer.backward(net.batch_losses(rng))
    reordered = list(make_net().encoder.double().named_parameters())[::-1]
    other = DBMTL(reordered, num_tasks=3, backend=backend)
    other.load_state_dict(balancer.state_dict())
    for name, m in balancer.ema.items():
        assert torch.equal(m.double(), other.ema[name])


def test_a_parameter_reached_before_the_checkpoint_gets_its_grad_after_it(backend: str) -> None:
    a, b = (nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2))
    balancer = DBMTL([a, b], num_tasks=1, backend=backend)
    balancer.backward([(a * b).square().sum()])
    other = DBMTL([a, b], num_tasks=1, backend=backend)
    other.load_state_dict(balancer.state_dict())
    b.grad = None
    other.backward([a.square().sum()])
    assert b.grad is not None
    assert b.grad.abs().min() > 0, "what is left of its EMA"


def test_distributed_checkpoint_takes_it_as_stateful() -> None:
    from torch.distributed.checkpoint.stateful import Stateful

    assert isinstance(DBMTL([nn.Parameter(torch.ones(2))], num_tasks=2), Stateful)


def test_reset_forgets_everything(backend: str, rng: Rng) -> None:
    net, other = make_net(), make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    balancer.backward(net.batch_losses(rng))
    balancer.reset()
    assert balancer.step == 0
    assert all((m == 0).all() for m in balancer.ema.values())
    assert balancer.norms.isnan().all()
    net.zero_grad()
    x, target = net.batch(rng)
    balancer.backward(net.losses(x, target))
    DBMTL(other.encoder, num_tasks=3, backend=backend).backward(other.losses(x, target))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# --- What does not fit


def state_of(net: nn.Module, rng: Rng, **options: Any) -> dict[str, Any]:
    balancer = DBMTL(net.encoder, **{"num_tasks": 3, **options})
    balancer.backward(net.batch_losses(rng))
    return balancer.state_dict()


def test_load_refuses_other_parameters_by_name(rng: Rng) -> None:
    net = make_net()
    state = state_of(net, rng)
    state["ema"] = dict(state["ema"])
    state["ema"]["extra"] = state["ema"].pop("5.weight")
    state["ema"]["0.weight"] = state["ema"]["0.weight"][:2]
    balancer = DBMTL(net.encoder, num_tasks=3)
    expected = (
        "state_dict does not fit the shared parameters: missing '5.weight'; unexpected 'extra'; "
        "'0.weight' has shape (2, 4, 1, 3, 3), not (3, 4, 1, 3, 3)"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        balancer.load_state_dict(state)
    assert balancer.step == 0
    assert all((m == 0).all() for m in balancer.ema.values()), "nothing may have changed"


def test_load_refuses_other_tasks(rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, task_names=["a", "b", "c"])
    with pytest.raises(ValueError, match=re.escape("of the tasks ['0', '1', '2'], the balancer of ['a', 'b', 'c']")):
        balancer.load_state_dict(state_of(net, rng))


def test_load_refuses_a_state_without_ema_where_one_is_kept(rng: Rng) -> None:
    net = make_net()
    with pytest.raises(ValueError, match=r"missing '0\.weight'; missing '0\.bias'"):
        DBMTL(net.encoder, num_tasks=3).load_state_dict(state_of(net, rng, beta=0.0))
    with pytest.raises(ValueError, match=r"unexpected '0\.weight'; unexpected '0\.bias'"):
        DBMTL(net.encoder, num_tasks=3, beta=0.0).load_state_dict(state_of(net, rng))


def test_load_refuses_what_is_no_state_dict() -> None:
    balancer = DBMTL([nn.Parameter(torch.ones(2))], num_tasks=2)
    with pytest.raises(ValueError, match=re.escape("missing ['ema', 'reached', 'task_names']")):
        balancer.load_state_dict({"step": torch.tensor(3)})


# --- Copies


def test_deepcopy_without_the_model_raises() -> None:
    net = make_net()
    with pytest.raises(RuntimeError, match="cannot be deep-copied without its model"):
        copy.deepcopy(DBMTL(net.encoder, num_tasks=3))


def test_deepcopy_with_the_model_is_independent(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    balancer.backward(net.batch_losses(rng))
    net.zero_grad()
    other, other_balancer = copy.deepcopy((net, balancer))
    x, target = net.batch(rng)
    other_balancer.backward(other.losses(x, target))
    assert all(p.grad is None for p in net.parameters())
    assert (balancer.step, other_balancer.step) == (1, 2)
    balancer.backward(net.losses(x, target))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_deepcopy_of_a_module_that_holds_its_balancer(backend: str, rng: Rng) -> None:
    net = make_net()
    net.balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    other = copy.deepcopy(net)
    other.balancer.backward(other.batch_losses(rng))
    assert other.balancer.step == 1
    assert net.balancer.step == 0
