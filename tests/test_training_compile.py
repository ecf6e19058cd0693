"""Compiled models: a backward pass per task, nothing compiled twice, and a cure in the message where torch refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch_config
from op_inputs import DEVICE
from small_models import LOSS_SCALES, Net, grads_of, make_net, relative_error
from torch import Tensor

from dbmtl_fused import DBMTL

Rng = np.random.Generator
Losses = Callable[[Tensor, Tensor], list[Tensor]]

CAPTURES = {"from .grad": None, "buckets": 64}
PARTS = ("encoder", "encoder and heads", "whole forward pass")

MESSAGE = (
    "a torch.compile'd part of the model gave its buffers away, so that it cannot run one backward pass per task; set "
    "torch._functorch.config.donated_buffer = False before the model is compiled"
)

captures = pytest.mark.parametrize("bucket_bytes", CAPTURES.values(), ids=CAPTURES)
ways = pytest.mark.parametrize("drop_in", [False, True], ids=["backward", "drop-in loss"])


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def _no_donated_buffers() -> Iterator[None]:
    with functorch_config.patch(donated_buffer=False):
        yield


def compiled_losses(net: Net, part: str, compiler: str) -> Losses:
    """``net.losses`` with a part of it compiled."""
    compiled: Callable[[Any], Any] = partial(torch.compile, backend=compiler, fullgraph=True)
    if part == "whole forward pass":
        return compiled(net.losses)
    encoder = compiled(net.encoder)
    heads = [compiled(head) for head in net.heads] if part == "encoder and heads" else list(net.heads)

    def losses(x: Tensor, target: Tensor) -> list[Tensor]:
        features = encoder(x)
        return [
            scale * (head(features) - target).square().mean() for scale, head in zip(LOSS_SCALES, heads, strict=True)
        ]

    return losses


def run_backward(balancer: DBMTL, losses: list[Tensor], drop_in: bool) -> None:
    if drop_in:
        balancer(losses).backward()
    else:
        balancer.backward(losses)


def assert_trains_as_without_compiling(
    part: str, compiler: str, bucket_bytes: int | None, rng: Rng, *, drop_in: bool = False, steps: int = 4
) -> None:
    """Every step as that of an eager twin; from the second on nothing is compiled any more."""
    net, twin = make_net(), make_net()
    losses = compiled_losses(net, part, compiler)
    balancer, other = (DBMTL(n.encoder, num_tasks=3, bucket_bytes=bucket_bytes) for n in (net, twin))
    optimizers = [torch.optim.SGD(n.parameters(), lr=1e-3, momentum=0.9) for n in (net, twin)]
    for step in range(steps):
        x, target = net.batch(rng)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            run_backward(balancer, losses(x, target), drop_in)
        other.backward(twin.losses(x, target))
        assert relative_error(grads_of(list(net.parameters())), grads_of(list(twin.parameters()))) < 1e-5
        for optimizer in optimizers:
            optimizer.step()
    assert balancer.step == steps


@pytest.mark.usefixtures("_no_donated_buffers")
@captures
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own, of features
def test_many_steps(part: str, bucket_bytes: int | None, rng: Rng) -> None:
    assert_trains_as_without_compiling(part, "aot_eager", bucket_bytes, rng)


@pytest.mark.usefixtures("_no_donated_buffers")
@captures
def test_many_steps_by_the_drop_in_loss(bucket_bytes: int | None, rng: Rng) -> None:
    assert_trains_as_without_compiling("whole forward pass", "aot_eager", bucket_bytes, rng, drop_in=True)


@pytest.mark.skipif(DEVICE.type == "cpu" and not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when Inductor is imported
@pytest.mark.usefixtures("_no_donated_buffers")
def test_many_steps_with_generated_code(rng: Rng) -> None:
    assert_trains_as_without_compiling("whole forward pass", "inductor", 64, rng)


@pytest.mark.usefixtures("_no_donated_buffers")
def test_a_recompilation_would_show(rng: Rng) -> None:
    """Another size, as every torch compiles anew for it; torch 2.11 does not for a parameter that was frozen."""
    net = make_net()
    losses = compiled_losses(net, "encoder", "aot_eager")
    x, target = net.batch(rng)
    losses(x, target)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        losses(x[1:], target[1:])


# --- Donated buffers


def compiled_for_one_pass(net: Net, rng: Rng) -> Losses:
    """Torch compiles a backward pass when it first runs; a plain one, as here, gives its buffers away."""
    losses = compiled_losses(net, "encoder", "aot_eager")
    sum(losses(*net.batch(rng))).backward()
    net.zero_grad()
    return losses


@captures
@ways
def test_donated_buffers_are_explained(bucket_bytes: int | None, drop_in: bool, rng: Rng) -> None:
    """``.grad`` and hooks are as before; nothing has changed, and the setting is the cure."""
    net, twin = make_net(), make_net()
    losses = compiled_for_one_pass(net, rng)
    balancer = DBMTL(net.encoder, num_tasks=3, bucket_bytes=bucket_bytes)
    params = list(net.encoder.parameters())
    kept = [torch.ones_like(p) for p in params]
    for p, grad in zip(params, kept, strict=True):
        p.grad = grad
    with pytest.raises(RuntimeError, match=f"^{re.escape(MESSAGE)}$") as caught:
        run_backward(balancer, losses(*net.batch(rng)), drop_in)
    assert "donated" in str(caught.value.__cause__)
    assert all(p.grad is grad and (grad == 1).all() for p, grad in zip(params, kept, strict=True))
    net.batch_losses(rng)[0].backward()
    assert not any((grad == 1).all() for grad in kept), "no hook may be left behind"

    net.zero_grad()
    torch._dynamo.reset()
    x, target = net.batch(rng)
    with functorch_config.patch(donated_buffer=False):
        run_backward(balancer, compiled_for_one_pass(net, rng)(x, target), drop_in)
    DBMTL(twin.encoder, num_tasks=3).backward(twin.losses(x, target))
    assert relative_error(grads_of(list(net.parameters())), grads_of(list(twin.parameters()))) < 1e-5


@ways
def test_a_plain_sum_runs_on_donated_buffers(drop_in: bool, rng: Rng) -> None:
    """It takes one backward pass."""
    net = make_net()
    losses = compiled_for_one_pass(net, rng)
    balancer = DBMTL(net.encoder, num_tasks=3, beta=0.0, alpha=None)
    run_backward(balancer, losses(*net.batch(rng)), drop_in)
    assert balancer.step == 1
