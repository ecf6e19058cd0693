"""What the balancer promises about ``.grad``, the drop-in loss, heads and losses; one test per promise."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from op_inputs import DEVICE
from small_models import LOSS_SCALES, Net, flat, grads_of, make_net, relative_error
from torch import Tensor, nn

from dbmtl_fused import DBMTL

Rng = np.random.Generator


def encoder_of(net: Net) -> list[nn.Parameter]:
    return list(net.encoder.parameters())


def heads_of(net: Net) -> list[nn.Parameter]:
    return list(net.heads.parameters())


def twins(backend: str, **options: object) -> tuple[tuple[Net, DBMTL], tuple[Net, DBMTL]]:
    """The same net with the same balancer, twice."""
    nets = make_net(), make_net()
    return tuple((net, DBMTL(net.encoder, num_tasks=3, backend=backend, **options)) for net in nets)  # type: ignore[return-value, arg-type]


def assert_same_grads(net: Net, other: Net) -> None:
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad)


# --- .grad accumulates


def test_grad_accumulates_over_backwards(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    total = np.zeros(1)
    for _ in range(3):
        x, target = net.batch(rng)
        other.zero_grad()
        other_balancer.backward(other.losses(x, target))
        total = total + grads_of(encoder_of(other))
        balancer.backward(net.losses(x, target))
    assert relative_error(grads_of(encoder_of(net)), total) < 1e-6


def test_overwrite_replaces_shared_grads_only(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    x, target = net.batch(rng)
    for p in encoder_of(net):
        p.grad = torch.full_like(p, torch.nan)
    for p in heads_of(net):
        p.grad = torch.ones_like(p)
    balancer.backward(net.losses(x, target), overwrite=True)
    other_balancer.backward(other.losses(x, target))
    assert relative_error(grads_of(encoder_of(net)), grads_of(encoder_of(other))) == 0
    assert relative_error(grads_of(heads_of(net)), grads_of(heads_of(other)) + 1) < 1e-6


@pytest.mark.parametrize("options", [{}, {"alpha": None, "beta": 0.0}], ids=["DB-MTL", "log only"])
def test_overwrite_with_and_without_balancing(backend: str, options: dict[str, object], rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend, **options)
    x, target = net.batch(rng)
    for p in encoder_of(net):
        p.grad = torch.full_like(p, torch.nan)
    balancer.backward(net.losses(x, target), overwrite=True)
    other_balancer.backward(other.losses(x, target))
    assert_same_grads(net, other)


def test_quarter_of_the_loss_four_times(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    total_shared, total_heads = np.zeros(1), np.zeros(1)
    for _ in range(4):
        x, target = net.batch(rng)
        (balancer(net.losses(x, target)) / 4).backward()
        other.zero_grad()
        other_balancer.backward(other.losses(x, target))
        total_shared = total_shared + grads_of(encoder_of(other)) / 4
        total_heads = total_heads + grads_of(heads_of(other)) / 4
    assert relative_error(grads_of(encoder_of(net)), total_shared) < 1e-6
    assert relative_error(grads_of(heads_of(net)), total_heads) < 1e-6
    for name, m in balancer.ema.items():
        torch.testing.assert_close(m, other_balancer.ema[name], rtol=1e-5, atol=1e-9)


def test_loss_plus_regulariser(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    x, target = net.batch(rng)
    regulariser = sum(p.square().sum() for p in net.parameters())
    (balancer(net.losses(x, target)) + 0.3 * regulariser).backward()
    other_balancer.backward(other.losses(x, target))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad + 0.6 * q, rtol=1e-5, atol=1e-6)


def test_loss_plus_auxiliary_loss_on_the_same_graph_needs_retain_graph(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    x, target = net.batch(rng)
    features = net.encoder(x)
    losses = [(head(features) - target).square().mean() for head in net.heads]
    (balancer(losses) + features.square().mean()).backward(retain_graph=True)
    other_features = other.encoder(x)
    other_balancer.backward(
        [(head(other_features) - target).square().mean() for head in other.heads], retain_graph=True
    )
    other_features.square().mean().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_a_kept_grad_is_not_written_again(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    balancer.backward(net.batch_losses(rng))
    kept = [p.grad for p in encoder_of(net)]
    copies = [None if g is None else g.clone() for g in kept]
    net.zero_grad()
    balancer.backward(net.batch_losses(rng))
    for grad, copy in zip(kept, copies, strict=True):
        assert torch.equal(grad, copy)


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}], ids=["EMA", "beta 0"])
def test_memory_of_dropped_grads_is_used_again_and_of_kept_ones_is_not(
    backend: str, options: dict[str, float], rng: Rng
) -> None:
    params, _, step = large_parameters(backend, rng, **options)

    def address_of_next_grad() -> int:
        for p in params:
            p.grad = None
        step()
        return params[0].grad.untyped_storage().data_ptr()

    address = address_of_next_grad()
    if DEVICE.type == "cpu":  # elsewhere that is the caching allocator's business
        assert address_of_next_grad() == address
    kept, value = params[0].grad, params[0].grad.clone()
    assert address_of_next_grad() != address
    assert torch.equal(kept, value)


Holder = Callable[[Tensor], object]
HOLDERS: dict[str, Holder] = {
    "storage": lambda grad: grad.untyped_storage(),
    "view": lambda grad: grad[:1],
    "NumPy": lambda grad: grad.numpy(),
    "DLPack": torch.utils.dlpack.to_dlpack,
    "shared memory": lambda grad: grad.share_memory_().data_ptr(),  # as when it is sent to another process
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_memory_that_anybody_holds_is_not_written_again(hold: Holder, rng: Rng) -> None:
    if DEVICE.type != "cpu":
        pytest.skip("on GPUs no memory is kept")
    params, _, step = large_parameters("auto", rng)
    step()
    address, kept = params[0].grad.data_ptr(), hold(params[0].grad)
    address = params[0].grad.data_ptr()
    for _ in range(3):
        for p in params:
            p.grad = None
        step()
        assert params[0].grad.data_ptr() != address
    del kept


def test_grads_are_tensors_of_their_own(backend: str, rng: Rng) -> None:
    """Not views, with version counters of their own, whatever dtype; small ones with memory of their own."""
    kinds = [(n, dtype) for n in (3, 5000) for dtype in (torch.float32, torch.bfloat16)]
    params = [nn.Parameter(torch.ones(n, dtype=dtype, device=DEVICE)) for n, dtype in kinds]
    balancer = DBMTL(params, num_tasks=2, backend=backend)
    balancer.backward([(c * sum(p.float().square().sum() for p in params)).float() for c in (1.0, 2.0)])
    for p in params:
        assert p.grad is not None
        assert p.grad.dtype == p.dtype
        assert not p.grad._is_view()
        versions = [q.grad._version for q in params]
        p.grad += 0.1 * (p - p.detach())  # in place, with autograd on
        assert [q.grad._version - before for q, before in zip(params, versions, strict=True)] == [
            q is p for q in params
        ]
        p.grad.detach_().zero_()
        if DEVICE.type == "cpu" or p.numel() == 3:
            assert p.grad.untyped_storage().nbytes() == p.grad.nbytes


def large_parameters(backend: str, rng: Rng, **options: Any) -> tuple[list[nn.Parameter], DBMTL, Callable[[], None]]:
    """Parameters whose gradients are parts of one, their balancer and a step on random losses."""
    params = [nn.Parameter(torch.ones(n, device=DEVICE)) for n in (5000, 6000, 7000)]
    balancer = DBMTL(params, num_tasks=2, backend=backend, **options)

    def step() -> None:
        factors = torch.from_numpy(rng.standard_normal(2) + 3).float().to(DEVICE)
        balancer.backward([(factor * sum(p.square().sum() for p in params)).square() for factor in factors])

    return params, balancer, step


# --- The drop-in loss


def test_drop_in_loss_equals_backward(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    for _ in range(3):
        x, target = net.batch(rng)
        net.zero_grad()
        other.zero_grad()
        balancer(net.losses(x, target)).backward()
        other_balancer.backward(other.losses(x, target))
        assert_same_grads(net, other)


def test_drop_in_loss_runs_nothing_before_backward(backend: str, rng: Rng) -> None:
    """Lightning calls zero_grad between computing the loss and its backward."""
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    loss = balancer(net.batch_losses(rng))
    assert all(p.grad is None for p in net.parameters())
    assert balancer.step == 0
    net.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    assert balancer.step == 1


def test_drop_in_loss_with_autograd_grad(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    x, target = net.batch(rng)
    grads = torch.autograd.grad(balancer(net.losses(x, target)), encoder_of(net))
    assert all(p.grad is None for p in net.parameters()), "autograd.grad must not touch .grad, of heads neither"
    other_balancer.backward(other.losses(x, target))
    for grad, p in zip(grads, encoder_of(other), strict=True):
        assert torch.equal(grad, p.grad)


def test_drop_in_loss_with_inputs(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    x, target = net.batch(rng)
    first, *rest = encoder_of(net)
    balancer(net.losses(x, target)).backward(inputs=[first])
    other_balancer.backward(other.losses(x, target))
    assert torch.equal(first.grad, encoder_of(other)[0].grad)
    assert all(p.grad is None for p in [*rest, *heads_of(net)])


def test_drop_in_loss_under_no_grad_is_just_the_value(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    with torch.no_grad():
        losses = net.batch_losses(rng)
        value = balancer(losses)
    assert not value.requires_grad
    torch.testing.assert_close(value, sum((l + 1e-8).log() for l in losses))
    assert balancer.step == 0


@pytest.mark.parametrize("kind", ["sequence", "dict", "tensor"])
def test_losses_in_every_form_give_the_same(backend: str, kind: str, rng: Rng) -> None:
    names = ["a", "b", "c"]
    nets = make_net(), make_net()
    balancers = [DBMTL(net.encoder, task_names=names, backend=backend) for net in nets]
    x, target = nets[0].batch(rng)
    forms: dict[str, Callable[[list[Tensor]], object]] = {
        "sequence": tuple,
        "dict": lambda losses: dict(reversed(list(zip(names, losses, strict=True)))),
        "tensor": torch.stack,
    }
    balancers[0].backward(forms[kind](nets[0].losses(x, target)))  # type: ignore[arg-type]
    balancers[1].backward(nets[1].losses(x, target))
    assert_same_grads(*nets)


def test_losses_of_one_element_and_several_dtypes(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    a, b, c = net.batch_losses(rng)
    balancer.backward([a.reshape(1), b.double().reshape(1, 1), c.bfloat16()])
    assert np.isfinite(grads_of(encoder_of(net))).all()


# --- Gradient scalers


def test_scaling_the_drop_in_loss_scales_grads_but_not_the_ema(backend: str, rng: Rng) -> None:
    """Scaled before the log, a loss scale would cancel; scaled after it, the EMA must not see it."""
    (net, balancer), (other, other_balancer) = twins(backend)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**16)
    for _ in range(3):
        x, target = net.batch(rng)
        net.zero_grad()
        other.zero_grad()
        scaler.scale(balancer(net.losses(x, target))).backward()
        other_balancer.backward(other.losses(x, target))
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad * 2.0**16), "a power of two scales without rounding"
    for name, m in balancer.ema.items():
        assert torch.equal(m, other_balancer.ema[name])


def test_a_scaler_skips_the_step_of_a_bad_batch_and_backs_off(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**16)
    optimizer = torch.optim.AdamW(net.encoder.parameters())
    before = [p.clone() for p in net.encoder.parameters()]
    losses = net.batch_losses(rng)
    losses[2] = losses[2] * torch.inf
    scaler.scale(balancer(losses)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    for p, kept in zip(net.encoder.parameters(), before, strict=True):
        assert torch.equal(p, kept)


# --- Heads


def test_heads_get_the_plain_log_loss_gradient_bit_for_bit(backend: str, rng: Rng) -> None:
    net, other = make_net(), make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    x, target = net.batch(rng)
    balancer.backward(net.losses(x, target))
    for loss in other.losses(x, target):
        (loss + 1e-8).log().backward(retain_graph=True)
    for p, q in zip(heads_of(net), heads_of(other), strict=True):
        assert torch.equal(p.grad, q.grad)


# --- Non-finite losses and gradients


@pytest.mark.parametrize("bad", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("form", [list, torch.stack], ids=["list", "stack"])
def test_one_bad_loss_does_not_reach_other_tasks_or_the_ema(
    backend: str, form: Callable[[list[Tensor]], object], bad: float, rng: Rng
) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    balancer.backward(net.batch_losses(rng))
    before = {name: m.clone() for name, m in balancer.ema.items()}
    net.zero_grad()
    losses = net.batch_losses(rng)
    losses[1] = losses[1] * bad
    balancer.backward(form(losses))  # type: ignore[arg-type]
    assert all(p.grad is not None and p.grad.isnan().all() for p in encoder_of(net)), "all of .grad must be NaN"
    assert balancer.weights.isnan().all()
    assert balancer.step == 1, "k must not advance"
    for name, m in balancer.ema.items():
        assert m.isfinite().all()
        assert torch.equal(m[1], before[name][1]), "the bad task's row must stay as it was"
        assert not torch.equal(m[0], before[name][0])
    for head, finite in zip(net.heads, (True, False, True), strict=True):
        assert head.weight.grad.isfinite().all() == finite
    net.zero_grad()
    balancer.backward(net.batch_losses(rng))
    assert np.isfinite(grads_of(encoder_of(net))).all(), "the next step must be as usual"


def test_stacked_losses_that_cannot_be_peeled_warn(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    x, target = net.batch(rng)
    with pytest.warns(UserWarning, match="not a plain torch.stack of the task losses"):
        balancer.backward(torch.stack(net.losses(x, target)) * 1.0)
    other_balancer.backward(other.losses(x, target))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_loss_of_zero_is_legal(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    losses = net.batch_losses(rng)
    losses[0] = losses[0] - losses[0].detach()
    balancer.backward(losses)
    assert np.isfinite(grads_of(encoder_of(net))).all()


# --- Tasks with their own batches


def multi_input_losses(net: Net, rng: Rng) -> list[Tensor]:
    """Every task has its own batch and its own forward pass, as in Office-31."""
    return [net.batch_losses(rng)[task] for task in range(len(LOSS_SCALES))]


def test_multi_input_tasks_are_balanced_as_one_batch_is(backend: str, rng: Rng) -> None:
    (net, balancer), (other, other_balancer) = twins(backend)
    x, target = net.batch(rng)
    balancer.backward([net.losses(x, target)[task] for task in range(3)])
    other_balancer.backward(other.losses(x, target))
    assert relative_error(grads_of(encoder_of(net)), grads_of(encoder_of(other))) < 1e-6


def test_multi_input_frees_each_graph_after_its_backward(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    alive_at_backward: list[int] = []
    saved: list[weakref.ref[Tensor]] = []

    class Marked(torch.autograd.Function):
        """Saves a tensor of its own, as a layer saves its activation."""

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            activation = torch.ones(3)
            saved.append(weakref.ref(activation))
            ctx.save_for_backward(activation)
            del activation
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            gc.collect()
            alive_at_backward.append(sum(ref() is not None for ref in saved))
            return grad

    losses = [Marked.apply(net.batch_losses(rng)[task]) for task in range(3)]
    balancer.backward(losses)
    assert alive_at_backward == [3, 2, 1]
    assert sum(ref() is not None for ref in saved) == 0


def test_shared_graph_is_freed_after_the_last_backward_unless_retained(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    losses = net.batch_losses(rng)
    balancer.backward(losses, retain_graph=True)
    balancer.backward(losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses[0].backward()


def test_tasks_sharing_a_graph_only_at_times(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    for step in range(4):
        balancer.backward(multi_input_losses(net, rng) if step % 2 else net.batch_losses(rng))
    assert balancer.step == 4


# --- Diagnostics


def test_norms_weights_and_alpha_are_those_of_the_step_and_fresh(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    balancer.backward(net.batch_losses(rng))
    rows = torch.cat([m.reshape(3, -1) for m in balancer.ema.values()], dim=1).double()
    norms, weights = balancer.norms, balancer.weights
    torch.testing.assert_close(norms.double(), rows.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(balancer.alpha_value, norms.max())
    torch.testing.assert_close(weights, norms.max() / (norms + 1e-8))
    grad = torch.from_numpy(grads_of(encoder_of(net)))
    torch.testing.assert_close(grad, (weights.double().cpu() @ rows.cpu()), rtol=1e-5, atol=1e-6)
    kept = norms.clone()
    balancer.backward(net.batch_losses(rng))
    assert torch.equal(norms, kept)
    assert balancer.norms is not norms


def test_equal_weighting_says_that_norms_are_not_measured(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, alpha=None, beta=0.0, backend=backend)
    balancer.backward(net.batch_losses(rng))
    assert balancer.norms.isnan().all()
    assert torch.equal(balancer.weights, torch.ones(3, device=DEVICE))


def test_beta_zero_keeps_no_buffer(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, beta=0.0, backend=backend)
    assert balancer.ema == {}
    balancer.backward(net.batch_losses(rng))
    held = [value.numel() for value in vars(balancer._rows).values() if isinstance(value, Tensor)]
    T, layout = 3, balancer.layout
    assert (
        sum(held) == 2 * layout.P + layout.num_chunks + T + 2
    )  # scratch row, running sum, partial sums, norms, a counter, a one


def test_accumulation_into_a_grad_of_another_layout(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    weight = net.encoder[5].weight
    weight.grad = torch.ones_like(weight).t().contiguous().t()
    balancer.backward(net.batch_losses(rng))
    other = make_net()
    assert weight.grad.stride() == (1, weight.shape[0])
    assert not torch.equal(weight.grad, torch.ones_like(other.encoder[5].weight))


def test_default_task_names_and_attributes() -> None:
    balancer = DBMTL([nn.Parameter(torch.ones(2, 3))], num_tasks=2)
    assert balancer.task_names == ["0", "1"]
    assert balancer.num_tasks == 2
    assert {name: m.shape for name, m in balancer.ema.items()} == {"0": (2, 2, 3)}
    assert re.fullmatch("cpu|reference|cuda|triton", balancer.backend)
    assert flat([None], [torch.ones(2)]).tolist() == [0, 0]
