"""Gradients that somebody else holds, changed strides, and parameters converted in the middle of a step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interruptions import World, same
from torch import Tensor, nn

from dbmtl_fused import DBMTL, capture

BUCKETS = [None, 8, "auto"]


# --- Strides and memory


@pytest.mark.parametrize("how", ["backward", "drop-in"])
def test_changed_strides_are_stale_or_give_gradients_of_the_new_ones(how: str) -> None:
    conv = nn.Conv2d(3, 4, 3)
    balancer = DBMTL(conv, num_tasks=1)
    conv.to(memory_format=torch.channels_last)
    loss = conv(torch.ones(1, 3, 5, 5)).square().mean()
    with pytest.raises(RuntimeError, match=r"shared parameter 'weight' had strides \(27, 9, 3, 1\)"):
        balancer.backward([loss]) if how == "backward" else balancer([loss])


class SharedWorkspace(torch.autograd.Function):
    """A product whose backward pass writes the weight's gradient into one buffer for all calls."""

    buffer = torch.empty(4)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, torch.mul(grad, x, out=SharedWorkspace.buffer)


def of_workspace(a: Tensor, c: Tensor) -> Tensor:
    return SharedWorkspace.apply(SharedWorkspace.apply(torch.arange(1.0, 5.0), a), c).sum()


def of_workspace_view(a: Tensor, c: Tensor) -> Tensor:
    class Viewed(SharedWorkspace):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            torch.mul(grad, x, out=SharedWorkspace.buffer)
            return grad * weight, SharedWorkspace.buffer[:]

    return Viewed.apply(Viewed.apply(torch.arange(1.0, 5.0), a), c).sum()


def of_hook_buffer(a: Tensor, c: Tensor) -> Tensor:
    buffer = torch.empty(4)
    left, right = a * 1, c * 1
    for each in (left, right):
        each.register_hook(lambda grad: buffer.copy_(grad))
    return (left * torch.arange(1.0, 5.0)).sum() + (right * 3).sum()


def of_inplace_hook(a: Tensor, c: Tensor) -> Tensor:
    hidden = a * torch.arange(1.0, 5.0)
    hidden.register_hook(lambda grad: grad.mul_(0.1))
    return (hidden + c).square().sum()


def of_numpy_buffer(a: Tensor, c: Tensor) -> Tensor:
    held = torch.zeros(4).numpy()
    left, right = a * 1, c * 1
    for each in (left, right):
        each.register_hook(lambda grad: torch.from_numpy(held).copy_(grad))
    return (left * 2).sum() + (right * 3).sum()


HELD = [of_workspace, of_workspace_view, of_hook_buffer, of_inplace_hook, of_numpy_buffer]


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("loss", HELD)
def test_gradients_that_somebody_else_holds_are_copied(
    loss: Callable[[Tensor, Tensor], Tensor], bucket_bytes: int | str | None
) -> None:
    a, c = (nn.Parameter(torch.arange(4.0) + offset) for offset in (1, 5))
    expected = [torch.autograd.grad(loss(a, c), p)[0].clone() for p in (a, c)]
    balancer = DBMTL(
        [a, c], num_tasks=1, beta=0.5, beta_sigma=0.0, alpha=1.0, log_losses=False, bucket_bytes=bucket_bytes
    )
    balancer.backward([loss(a, c)])
    for row, grad in zip(balancer.ema.values(), expected, strict=True):
        torch.testing.assert_close(2 * row[0], grad)


@pytest.mark.parametrize(
    "mode",
    [
        "device context",
        "anomaly mode",
        "locals read by a tracer",
    ],
)
def test_what_nobody_else_holds_is_counted_right_whatever_the_first_balancer_is_built_under(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_sole_holder", None)
    capture.count_sole_holder.cache_clear()

    def read_locals(frame: Any, event: str, argument: object) -> Any:
        _ = frame.f_locals
        return read_locals

    p = nn.Parameter(torch.ones(2))
    if mode == "device context":
        with torch.device("cpu"):
            DBMTL([p], num_tasks=1)
    elif mode == "anomaly mode":
        with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
            DBMTL([p], num_tasks=1)
    else:
        before = sys.gettrace()
        sys.settrace(read_locals)
        try:
            DBMTL([p], num_tasks=1)
        finally:
            sys.settrace(before)
    for loss in HELD:
        test_gradients_that_somebody_else_holds_are_copied(loss, None)


# --- Parameters converted between forward and backward pass


def set_memory(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.set_(layer.weight.detach().clone())


CONVERSIONS = [set_memory, lambda layer: layer.half().float(), lambda layer: layer.double().float()]


def assert_conversions_do_not_matter(
    convert: Callable[[nn.Linear], object], bucket_bytes: int | str | None, existing: bool, steps: int
) -> None:
    worlds = [World(bucket_bytes=bucket_bytes) for _ in range(2)]
    for world, is_late in zip(worlds, (True, False), strict=True):
        world.encoder[0].weight.detach().copy_(world.encoder[0].weight.detach().half())
        world.encoder[0].bias.detach().copy_(world.encoder[0].bias.detach().half())
        for step in range(steps):
            losses = world.losses(step)
            if existing:
                for p in world.params:
                    p.grad = torch.full_like(p, 2)
            if is_late:
                convert(world.encoder[0])
            world.balancer.backward(losses)
    assert same(worlds[0].state(), worlds[1].state())
    assert same(worlds[0].shared_grads(), worlds[1].shared_grads())


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_parameter_converted_between_forward_and_backward_is_balanced(
    convert: Callable[[nn.Linear], object], bucket_bytes: int | str | None, existing: bool
) -> None:
    assert_conversions_do_not_matter(convert, bucket_bytes, existing, steps=1)
