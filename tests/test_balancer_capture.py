"""Gradients arrive whole, once and in the right place, whatever the model does in its backward pass."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from op_inputs import DEVICE
from small_models import Algorithm1, Net, flat, grads_of, make_net, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbmtl_fused import DBMTL
from dbmtl_fused.capture import Collector
from dbmtl_fused.layout import FlatLayout

Rng = np.random.Generator
BUCKETS = {"whole tasks": None, "tiny buckets": 64, "default": "auto"}


@pytest.fixture(params=BUCKETS.values(), ids=BUCKETS)
def bucket_bytes(request: pytest.FixtureRequest) -> int | str | None:
    return request.param


def assert_follows_algorithm1(
    params: list[Tensor],
    losses: Callable[[], list[Tensor]],
    backend: str,
    bucket_bytes: int | str | None,
    steps: int = 3,
    reference_losses: Callable[[], list[Tensor]] | None = None,
) -> DBMTL:
    """Steps on ``losses()`` give what Algorithm 1 gives on ``reference_losses()``, by default the same."""
    expected = Algorithm1(params)
    balancer = DBMTL(params, num_tasks=len(losses()), backend=backend, bucket_bytes=bucket_bytes)
    for _ in range(steps):
        shared_grad = expected.step((reference_losses or losses)())
        for p in params:
            p.grad = None
        balancer.backward(losses())
        assert relative_error(grads_of(params), shared_grad) < 1e-5
    return balancer


def three(y: Tensor) -> list[Tensor]:
    """Three losses on features ``y``, their scales far apart."""
    return [y.square().mean(), 1e3 * y.abs().mean(), 1e-3 * (y - 1).square().mean()]


def fixed(*shape: int, rng: Rng) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(DEVICE, torch.float32)


# --- Parameters


def test_tied_and_reused_parameters(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    layer, x = nn.Linear(5, 5).to(DEVICE), fixed(7, 5, rng=rng)
    tied = nn.Linear(5, 5).to(DEVICE)
    tied.weight = layer.weight
    net = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), tied)
    balancer = assert_follows_algorithm1(list(net.parameters()), lambda: three(net(x)), backend, bucket_bytes)
    assert len(balancer.ema) == 3


def test_parameters_that_one_task_does_not_use(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    a, b, x = nn.Linear(4, 300).to(DEVICE), nn.Linear(4, 300).to(DEVICE), fixed(6, 4, rng=rng)

    def losses() -> list[Tensor]:
        return [a(x).square().mean(), b(x).square().mean(), (a(x) * b(x)).square().mean()]

    assert_follows_algorithm1([*a.parameters(), *b.parameters()], losses, backend, bucket_bytes)


def test_a_frozen_parameter_decays_and_is_left_alone_by_adamw(
    backend: str, bucket_bytes: int | str | None, rng: Rng
) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend, bucket_bytes=bucket_bytes, beta_sigma=0.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    balancer.backward(net.batch_losses(rng))
    frozen = net.encoder[5].weight.requires_grad_(False)
    before, ema = frozen.clone(), balancer.ema["5.weight"].clone()
    optimizer.zero_grad()
    balancer.backward(net.batch_losses(rng))
    optimizer.step()
    assert frozen.grad is None
    assert torch.equal(frozen, before)
    torch.testing.assert_close(balancer.ema["5.weight"], 0.9 * ema)
    frozen.requires_grad_(True)
    balancer.backward(net.batch_losses(rng))
    assert frozen.grad is not None


def test_a_parameter_no_task_ever_reached_gets_no_grad(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    net = make_net()
    unused = nn.Parameter(torch.ones(3, device=DEVICE))
    balancer = DBMTL([*net.encoder.parameters(), unused], num_tasks=3, backend=backend, bucket_bytes=bucket_bytes)
    optimizer = torch.optim.AdamW([*net.parameters(), unused], weight_decay=0.5)
    for drop_in in (False, True):
        optimizer.zero_grad()
        losses = net.batch_losses(rng)
        balancer(losses).backward() if drop_in else balancer.backward(losses)
        assert unused.grad is None
        optimizer.step()
    assert torch.equal(unused, torch.ones_like(unused))


def test_what_was_in_grad_of_unreached_parameters_stays(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    net = make_net()
    unused = nn.Parameter(torch.ones(3, device=DEVICE))
    unused.grad = kept = torch.ones_like(unused)
    balancer = DBMTL([*net.encoder.parameters(), unused], num_tasks=3, backend=backend, bucket_bytes=bucket_bytes)
    balancer.backward(net.batch_losses(rng))
    assert unused.grad is kept


def test_empty_and_scalar_parameters(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    params = [nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in [(), (0, 3), (2, 2)]]
    x = fixed(2, 2, rng=rng)
    assert_follows_algorithm1(params, lambda: three(params[0] * params[2] @ x + params[1].sum()), backend, bucket_bytes)


# --- Memory formats


def test_channels_last(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    net = make_net().to(memory_format=torch.channels_last)
    x, target = net.batch(rng)
    params: list[Tensor] = list(net.encoder.parameters())
    assert_follows_algorithm1(params, lambda: net.losses(x, target), backend, bucket_bytes)
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in params)


class Reordered(torch.autograd.Function):
    """Identity whose gradient arrives in another memory order than the parameter's."""

    @staticmethod
    def forward(ctx, p: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.how = how
        return p.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return ctx.how(grad), None


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.t().contiguous().t(),
    "expanded": lambda g: g.mean().expand_as(g),
    "strided": lambda g: torch.stack([g, g + 1], -1)[..., 0],
    "offset": lambda g: torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view_as(g),
}


@pytest.mark.parametrize("how", ORDERS.values(), ids=ORDERS)
def test_gradients_in_any_memory_order(
    backend: str, bucket_bytes: int | str | None, how: Callable[[Tensor], Tensor], rng: Rng
) -> None:
    w, x = nn.Parameter(fixed(3, 5, rng=rng)), fixed(4, 3, rng=rng)
    assert_follows_algorithm1([w], lambda: three(x @ Reordered.apply(w, how)), backend, bucket_bytes)


def test_parameters_in_any_memory_order(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    base = fixed(6, 8, rng=rng)
    params = [nn.Parameter(base.t()), nn.Parameter(base[:, ::2].t()), nn.Parameter(base[:1].expand(3, 8).clone())]
    x = fixed(8, 8, rng=rng)
    losses = lambda: three(x @ params[0] @ params[1].t() @ (params[2].t() @ params[2])[:4])  # noqa: E731
    assert_follows_algorithm1(params, losses, backend, bucket_bytes)


# --- What models do in their backward pass


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(backend: str, bucket_bytes: int | str | None, use_reentrant: bool, rng: Rng) -> None:
    """The reentrant kind delivers a leaf's gradient in parts: here one part per checkpointed use of the layer."""
    layer, x = nn.Linear(5, 5).to(DEVICE), fixed(7, 5, rng=rng).requires_grad_()
    body = nn.Sequential(layer, nn.Tanh())

    def plain() -> list[Tensor]:
        return three(body(body(x)))

    def checkpointed() -> list[Tensor]:
        y = checkpoint(body, x, use_reentrant=use_reentrant)
        return three(checkpoint(body, y, use_reentrant=use_reentrant))

    params = list(layer.parameters())
    assert_follows_algorithm1(params, checkpointed, backend, bucket_bytes, reference_losses=plain)


@pytest.mark.parametrize("how", ["backward", "drop-in loss", "autograd.grad"])
def test_hooks_on_parameters_see_the_balanced_gradient_once(
    backend: str, bucket_bytes: int | str | None, how: str, rng: Rng
) -> None:
    net = make_net()
    x, target = net.batch(rng)
    params = list(net.encoder.parameters())
    expected = Algorithm1(params).step(net.losses(x, target))
    seen: list[Tensor] = []
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend, bucket_bytes=bucket_bytes)
    for p in params:
        p.register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
    if how == "backward":
        balancer.backward(net.losses(x, target))
    elif how == "drop-in loss":
        balancer(net.losses(x, target)).backward()
    else:
        for p, grad in zip(params, torch.autograd.grad(balancer(net.losses(x, target)), params), strict=True):
            p.grad = grad
    assert len(seen) == len(params)
    assert relative_error(grads_of(params), 2 * expected) < 1e-5
    net.zero_grad()
    net.losses(x, target)[0].backward()
    assert len(seen) == 2 * len(params), "an ordinary backward pass runs them as before"


def test_batchnorm_and_dropout_run_once(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).to(DEVICE)
    balancer = DBMTL(encoder, num_tasks=3, backend=backend, bucket_bytes=bucket_bytes)
    balancer.backward(three(encoder(fixed(6, 4, rng=rng))))
    assert encoder[1].num_batches_tracked == 1


@pytest.mark.parametrize("where", ["forward", "forward and backward"])
def test_autocast(backend: str, bucket_bytes: int | str | None, where: str, rng: Rng) -> None:
    net = make_net()
    x, target = net.batch(rng)
    autocast = torch.autocast(DEVICE.type, dtype=torch.bfloat16)
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend, bucket_bytes=bucket_bytes)
    expected = Algorithm1(net.encoder.parameters())
    with autocast:
        shared_grad = expected.step(net.losses(x, target))
    with autocast:
        losses = net.losses(x, target)
        if where != "forward":
            balancer.backward(losses)
    if where == "forward":
        balancer.backward(losses)
    assert {m.dtype for m in balancer.ema.values()} == {torch.float32}
    # bf16 backward passes from other seeds: their rounding is all that differs
    assert relative_error(grads_of(list(net.encoder.parameters())), shared_grad) < 0.03


# --- Compiled models


@pytest.fixture
def no_donated_buffers() -> object:
    import torch._functorch.config as config

    with config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_donated_buffers")
def test_compiled_encoder(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    net = make_net()
    compiled = torch.compile(net.encoder, backend="aot_eager", fullgraph=True)
    x, target = net.batch(rng)

    def losses() -> list[Tensor]:
        features = compiled(x)
        return [(head(features) - target).square().mean() for head in net.heads]

    balancer = assert_follows_algorithm1(list(net.encoder.parameters()), losses, backend, bucket_bytes)
    assert balancer.step == 3


def test_donated_buffers_of_a_compiled_encoder_are_explained(backend: str, rng: Rng) -> None:
    """A plain backward first makes torch compile the graph for one pass only."""
    net = make_net()
    compiled = torch.compile(net.encoder, backend="aot_eager")
    x, _ = net.batch(rng)
    compiled(x).sum().backward()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    with pytest.raises(RuntimeError, match="donated_buffer = False before the model is compiled"):
        balancer.backward(three(compiled(x)))
    torch._dynamo.reset()


# --- .grad during and after a step


def test_grad_is_untouched_until_the_step_is_complete(backend: str, bucket_bytes: int | str | None, rng: Rng) -> None:
    """Also when a task's backward fails: ``.grad`` and hooks are as before, and the balancer asks for a reset."""
    net = make_net()
    params = list(net.encoder.parameters())
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend, bucket_bytes=bucket_bytes)
    kept = [torch.ones_like(p) for p in params]
    for p, grad in zip(params, kept, strict=True):
        p.grad = grad

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            raise ArithmeticError("planted")

    losses = net.batch_losses(rng)
    losses[1] = Failing.apply(losses[1])
    with pytest.raises(ArithmeticError, match="planted"):
        balancer.backward(losses)
    assert all(p.grad is grad for p, grad in zip(params, kept, strict=True))
    assert flat([p.grad for p in params], params).tolist() == [1.0] * sum(p.numel() for p in params)
    net.losses(*net.batch(rng))[0].backward()
    assert not torch.equal(params[0].grad, torch.ones_like(params[0])), "no hook may be left behind"
    with pytest.raises(RuntimeError, match=r"task '1' failed .*planted.* call reset"):
        balancer.backward(net.batch_losses(rng))
    balancer.reset()
    balancer.backward(net.batch_losses(rng))
    assert balancer.step == 1


def test_only_one_bucket_of_gradients_is_alive(backend: str, rng: Rng) -> None:
    """Live gradient bytes, counted when each gradient arrives, stay below the bucket plus the gradient itself."""
    layers = [nn.Linear(32, 32, bias=False).to(DEVICE) for _ in range(12)]
    net, one = nn.Sequential(*layers), 32 * 32 * 4
    balancer = DBMTL(net, num_tasks=3, backend=backend, bucket_bytes=2 * one)
    collector, seen = balancer._collector, []
    take = collector.take

    def watched(index: int, grad: Tensor) -> None:
        take(index, grad)
        seen.append(collector._bytes)

    collector.take = watched  # type: ignore[method-assign]
    balancer.backward(three(net(fixed(4, 32, rng=rng))))
    assert len(seen) == 36
    assert max(seen) < 2 * one


def test_same_bits_whatever_the_capture(backend: str, rng: Rng) -> None:
    nets: list[Net] = [make_net() for _ in range(4)]
    balancers = [
        DBMTL(net.encoder, num_tasks=3, backend=backend, bucket_bytes=b)
        for net, b in zip(nets, (None, 1, 2000, 1 << 30), strict=True)
    ]
    for _ in range(3):
        x, target = nets[0].batch(rng)
        for net, balancer in zip(nets, balancers, strict=True):
            net.zero_grad()
            balancer.backward(net.losses(x, target))
        for net, balancer in zip(nets[1:], balancers[1:], strict=True):
            assert torch.equal(balancer.norms, balancers[0].norms)
            for p, q in zip(nets[0].parameters(), net.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)


def test_buckets_of_several_streams_are_refused(rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where hooks run on streams of their own. Another task may come on another: that waits for the first."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    layout = FlatLayout(list(net.named_parameters()))
    streams = iter(["a", "a", "b", "b", "a", "b"])
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: next(streams))
    collector = Collector(layout, list(net.parameters()), lambda *args, **options: None, 1)
    collector._check_streams = True
    x = torch.from_numpy(rng.standard_normal((2, 4))).float()
    collector.begin()
    with collector.backward_pass():
        for _ in range(2):
            net(x).sum().backward()
            assert collector.finish_task() == {0, 1}
        expected = (
            "bucket_bytes must be None where parameters were used on several streams: the gradient of '0.weight' came "
            "on b, others of its task on a"
        )
        with pytest.raises(RuntimeError, match=rf"^{re.escape(expected)}$"):
            net(x).sum().backward()
    collector.end()
