"""The edges of a step: what is replaced, held, converted, scaled by nothing or wrong in a state; nothing goes wrong
without a word, and an error leaves everything as it was."""

from __future__ import annotations

import copy
import math
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dbmtl_fused import DBMTL, guards

pytestmark = pytest.mark.filterwarnings("ignore:losses that are views")


class Net(nn.Module):
    """An encoder, heads and losses of a batch that ``seed`` draws."""

    def __init__(self, T: int = 2, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.heads = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, T)
        self.balancer = DBMTL(self.encoder, num_tasks=T, **options)

    def losses(self, seed: int = 0) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(self.heads(self.encoder(torch.randn(5, 3))).square().mean(0))

    def step(self, seed: int = 0) -> list[Tensor]:
        self.zero_grad()
        self.balancer.backward(self.losses(seed))
        return self.grads()

    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.encoder.parameters() if p.grad is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# --- Parameters that are replaced, added, converted


class Adapted(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base.requires_grad_(False), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x)


REPLACED: dict[str, Callable[[nn.Sequential], object]] = {
    "a layer": lambda encoder: encoder.__setitem__(2, nn.Linear(4, 4)),
    "a parameter": lambda encoder: setattr(encoder[2], "weight", nn.Parameter(torch.ones(4, 4))),
    "by a state": lambda encoder: encoder.load_state_dict({"2.bias": torch.ones(4)}, strict=False, assign=True),
    "weight_norm": lambda encoder: weight_norm(encoder[2]),
    "an adapter": lambda encoder: encoder.__setitem__(2, Adapted(encoder[2])),
    "appended": lambda encoder: encoder.append(nn.Linear(4, 4)),
    "removed": lambda encoder: encoder.__delitem__(2),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_a_partly_replaced_encoder_is_stale(replace: Callable[[nn.Sequential], object]) -> None:
    net = Net()
    net.step()
    ema, step = copy.deepcopy(net.balancer.ema), net.balancer.step
    replace(net.encoder)
    for call in (net.balancer.backward, net.balancer):
        with pytest.raises(RuntimeError, match=r"the balancer is stale: shared parameter '[23]\."):
            call(net.losses())
    assert all(torch.equal(ema[name], m) for name, m in net.balancer.ema.items())
    assert net.balancer.step == step


def test_other_modules_and_frozen_parameters_may_come() -> None:
    net = Net()
    net.step()
    net.encoder[1] = nn.ReLU()
    net.encoder.append(nn.Linear(4, 4).requires_grad_(False))
    net.step()
    net.encoder[3].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'3\.weight' was frozen when it was built and requires grad now"):
        net.balancer.backward(net.losses())


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_list_notices_a_replaced_layer(is_kept: bool) -> None:
    net = Net()
    balancer, old = DBMTL(net.encoder.parameters(), num_tasks=2), net.encoder[2]
    balancer.backward(net.losses())
    net.encoder[2] = nn.Linear(4, 4)
    if not is_kept:
        del old
    with pytest.raises(RuntimeError, match=r"'[23]' was reached before and no task reaches it now"):
        balancer.backward(net.losses())


@pytest.mark.parametrize("as_list", [False, True])
def test_layers_may_be_left_out_at_times(as_list: bool) -> None:
    """As in stochastic depth."""
    net = Net()
    balancer = DBMTL(net.encoder.parameters() if as_list else net.encoder, num_tasks=2)
    balancer.backward(net.losses())
    x = torch.randn(5, 3)
    balancer.backward(list(net.heads(net.encoder[0](x)).square().mean(0)))
    balancer.backward(net.losses())
    assert balancer.step == 3


@pytest.mark.parametrize("bucket_bytes", [None, "auto"])
@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: layer.half().float(),
        lambda layer: [p.data.set_(p.detach().clone()) for p in layer.parameters()],
        lambda layer: [p.set_(p.detach().clone()) for p in layer.parameters()],
    ],
    ids=["half and back", "data.set_", "set_"],
)
def test_parameters_converted_between_forward_and_backward(
    convert: Callable[[nn.Module], object], has_grad: bool, bucket_bytes: int | str | None
) -> None:
    """Once, and once more: the graph's node is then neither the first one nor the last."""
    net, other = (Net(bucket_bytes=bucket_bytes) for _ in range(2))
    for n in (net, other):
        for p in n.encoder.parameters():
            p.data.copy_(p.data.half())  # numbers that a conversion leaves as they are
        n.step()
        for seed in (1, 2):
            n.zero_grad()
            for p in n.parameters() if has_grad else ():
                p.grad = torch.ones_like(p)
            losses = n.losses(seed)
            if n is net:
                with torch.no_grad():
                    convert(n.encoder[0])
            n.balancer.backward(losses)
    assert_same(net.grads(), other.grads())
    assert all(torch.equal(m, other.balancer.ema[name]) for name, m in net.balancer.ema.items())


def test_strides_changed_after_building_are_stale() -> None:
    conv = nn.Conv2d(3, 4, 3)
    balancer = DBMTL(conv, num_tasks=1)
    conv.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"'weight' had strides \(27, 9, 3, 1\) .* and has \(27, 1, 9, 3\) now"):
        balancer.backward([conv(torch.randn(1, 3, 4, 4)).square().mean()])


# --- Gradients that somebody else holds


@pytest.mark.parametrize("bucket_bytes", [None, "auto"])
def test_a_workspace_that_is_used_again(bucket_bytes: int | str | None) -> None:
    work = torch.empty(4)

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return grads[0] * w, torch.mul(grads[0], x, out=work)

    a, c = (torch.rand(4, requires_grad=True) for _ in range(2))
    x = torch.rand(4)
    balancer = DBMTL([a, c], num_tasks=1, beta=0.5, beta_sigma=0.0, log_losses=False, bucket_bytes=bucket_bytes)
    balancer.backward([Scale.apply(Scale.apply(x, a), c).sum()])
    torch.testing.assert_close(2 * balancer.ema["0"][0], x * c.detach())
    torch.testing.assert_close(2 * balancer.ema["1"][0], x * a.detach())


@pytest.mark.parametrize("bucket_bytes", [None, "auto"])
def test_in_place_code_on_a_gradient_that_a_leaf_shares(bucket_bytes: int | str | None) -> None:
    def gradient(step: Callable[[Tensor, Tensor], object]) -> Tensor:
        torch.manual_seed(0)
        linear, pos = nn.Linear(4, 6), nn.Parameter(torch.randn(8, 6))
        h = linear(torch.randn(8, 4))
        h.register_hook(lambda g: g.mul_(0.1))
        step(torch.relu(h + pos).square().mean(), pos)
        assert pos.grad is not None
        return pos.grad

    def balanced(loss: Tensor, pos: Tensor) -> None:
        options: dict[str, Any] = {"beta": 0.0, "alpha": 1.0, "log_losses": False, "bucket_bytes": bucket_bytes}
        DBMTL([pos], num_tasks=1, **options).backward([loss])

    plain = gradient(lambda loss, pos: loss.backward())
    torch.testing.assert_close(gradient(balanced), plain / plain.norm(), rtol=1e-4, atol=1e-6)


# --- Scales, pending losses


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 0.0, "alpha": None}], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-40, -0.0])
def test_a_vanishing_factor_gives_zeros(scale: float, options: dict[str, Any]) -> None:
    net = Net(**options)
    net.step()
    ema, step = copy.deepcopy(net.balancer.ema), int(net.balancer.step)
    net.zero_grad()
    (net.encoder[0].weight.square().sum() + scale * net.balancer(net.losses())).backward()
    torch.testing.assert_close(net.encoder[0].weight.grad, 2 * net.encoder[0].weight.detach())
    for p in net.heads.parameters():
        torch.testing.assert_close(p.grad, torch.zeros_like(p), atol=1e-30, rtol=0)
    assert all(torch.equal(ema[name], m) for name, m in net.balancer.ema.items())
    assert net.balancer.step == step + 1
    assert not net.balancer.grad_norm.isinf()


def test_a_negative_factor() -> None:
    net, other = Net(), Net()
    (-net.balancer(net.losses())).backward()
    other.step()
    assert_same(net.grads(), [-grad for grad in other.grads()])
    assert net.balancer.grad_norm == other.balancer.grad_norm > 0


def test_a_pending_loss_is_checked_when_it_runs() -> None:
    net, other = Net(bucket_bytes=1), Net(bucket_bytes=1)
    pending, after_reset = net.balancer(net.losses(1)), net.balancer(net.losses(1))
    bad = net.losses()
    bad[1] = bad[1] + 0
    bad[1].register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net.balancer.backward(bad)
    net.zero_grad()
    with pytest.raises(RuntimeError, match=re.escape("call reset()")):
        pending.backward()
    assert not net.grads()
    net.balancer.reset()
    after_reset.backward()
    assert_same(net.grads(), other.step(1))


def test_the_mask_is_that_of_the_call() -> None:
    net, other = Net(), Net()
    mask = torch.tensor([True, False])
    loss = net.balancer(net.losses(), active=mask)
    mask.fill_(True)
    loss.backward()
    other.balancer.backward(other.losses(), active=torch.tensor([True, False]))
    assert_same(net.grads(), other.grads())


# --- Forms of losses


def test_forms_of_losses() -> None:
    net = Net(1)
    net.balancer.backward(net.losses()[0])
    with pytest.raises(TypeError, match=r"got a set, which has no order"):
        net.balancer.backward(set(net.losses()))
    assert DBMTL(net.encoder, num_tasks=np.int64(3)).num_tasks == 3


def test_losses_just_below_zero_count_as_zero() -> None:
    grads = []
    for offset in (0.0, -1e-7):
        p = nn.Parameter(torch.ones(3))
        balancer = DBMTL([p], num_tasks=2, log_eps=1e-3)
        loss = (p - 1).sum() + offset
        (balancer([loss, p.square().sum()]) + 0).backward()
        grads.append(p.grad)
    assert torch.equal(*grads)
    with pytest.raises(ValueError, match=r"must be >= 0 to take its log, got -0\.0099"):
        balancer.backward([p.sum() * 0 - 1e-2, p.sum()])


@pytest.mark.parametrize("how", [list, lambda losses: [losses[0], losses[-1]]], ids=["list", "index"])
def test_views_of_a_stack_are_peeled(how: Callable[[Tensor], list[Tensor]]) -> None:
    """Each head runs once, and a NaN stays with its task."""
    p = nn.Parameter(torch.ones(3))
    heads, runs = [nn.Linear(3, 1) for _ in range(2)], []
    outputs = [head(p) for head in heads]
    for y in outputs:
        y.register_hook(lambda grad: runs.append(0))
    losses = torch.stack([outputs[0].square().sum(), outputs[1].sum() * math.nan])
    balancer = DBMTL([p], num_tasks=2)
    balancer.backward(how(losses))
    assert len(runs) == 2
    assert balancer.ema["0"][0].any()
    assert not balancer.ema["0"][1].any()


def test_losses_written_into_one_tensor_warn() -> None:
    p, losses = nn.Parameter(torch.ones(3)), torch.zeros(2)
    losses[0], losses[1] = p.sum(), p.square().sum()
    with pytest.warns(UserWarning, match=r"views of one tensor, into which they were written"):
        DBMTL([p], num_tasks=2).backward(list(losses))


def test_hooks_of_stacked_losses_run() -> None:
    net, seen = Net(), []
    losses = torch.stack(net.losses())
    losses.register_hook(lambda grad: seen.append(grad))
    with pytest.warns(UserWarning, match=r"not a plain"):
        net.balancer.backward(losses)
    assert len(seen) == 2


# --- States


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no step": lambda state: state.pop("step"),
    "two steps": lambda state: state.update(step=torch.tensor([1, 2])),
    "negative step": lambda state: state.update(step=torch.tensor(-7)),
    "NaN step": lambda state: state.update(step=math.nan),
    "true step": lambda state: state.update(step=True),
    "no reached": lambda state: state.update(reached=None),
    "reached numbers": lambda state: state.update(reached=[1]),
    "NaN": lambda state: state["ema"]["2.bias"][0, 0].fill_(math.nan),
    "beyond the limit": lambda state: state["ema"]["2.bias"][0, 0].fill_(1e20),
    "NumPy": lambda state: state["ema"].update({"2.bias": np.zeros((2, 4))}),
    "meta": lambda state: state["ema"].update({"2.bias": torch.zeros(2, 4, device="meta")}),
    "sparse": lambda state: state["ema"].update({"2.bias": torch.zeros(2, 4).to_sparse()}),
    "complex": lambda state: state["ema"].update({"2.bias": torch.zeros(2, 4, dtype=torch.complex64)}),
    "another shape": lambda state: state["ema"].update({"2.bias": torch.zeros(2, 5)}),
    "one missing": lambda state: state["ema"].pop("2.bias"),
    "preference": lambda state: state.update(preference=[1.0]),
    "preference on meta": lambda state: state.update(preference=torch.ones(2, device="meta")),
    "keys that are no names": lambda state: state["ema"].update({3: torch.zeros(2, 4)}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_changes_nothing(damage: Callable[[dict[str, Any]], object]) -> None:
    source, net, other = Net(), Net(), Net()
    source.step(3)
    net.step(5)
    other.step(5)
    state = copy.deepcopy(source.balancer.state_dict())
    damage(state)
    with pytest.raises((TypeError, ValueError), match=r"state_dict|preference"):
        net.balancer.load_state_dict(state)
    assert_same(net.step(6), other.step(6))


def test_a_state_of_a_smaller_model_and_of_fewer_tasks() -> None:
    source = DBMTL([("a", p := nn.Parameter(torch.ones(3)))], task_names=["x", "y"], preference=[1.0, 0.5])
    source.backward([p.sum(), 2 * p.sum()])
    q = nn.Parameter(torch.ones(2))
    balancer = DBMTL([("a", p), ("b", q)], task_names=["y", "z"])
    with pytest.raises(ValueError, match=r"is of the tasks"):
        balancer.load_state_dict(source.state_dict())
    found = balancer.load_state_dict(source.state_dict(), strict=False)
    assert found.missing_keys == ["z", "b"]
    assert found.unexpected_keys == ["x"]
    assert torch.equal(balancer.ema["a"][0], source.ema["a"][1])
    assert not balancer.ema["a"][1].any()
    assert not balancer.ema["b"].any()
    assert balancer.preference.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers(prefix: str) -> None:
    source, net = Net(), Net()
    source.step()
    state = source.balancer.state_dict()
    state["ema"] = {prefix + name: m for name, m in state["ema"].items()}
    state["reached"] = [prefix + name for name in state["reached"]]
    net.balancer.load_state_dict(state)
    assert_same(net.step(1), source.step(1))


def test_a_default_device_does_no_harm() -> None:
    net, other = Net(), Net()
    other.step()
    state = other.balancer.state_dict()
    with torch.device("meta"):
        net.balancer.backward(other_losses(net))
        net.balancer.load_state_dict(state)
    assert_same(net.step(1), other.step(1))


def other_losses(net: Net) -> list[Tensor]:
    with torch.device("cpu"):
        return net.losses()


def through_pickle(both: Any) -> Any:
    return pickle.loads(pickle.dumps(both))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("order", ["model first", "balancer first", "in the module"])
def test_copies_continue_bit_for_bit(copied: Callable[[Any], Any], order: str) -> None:
    net = Net(preference=[1.0, 0.5])
    net.step()
    if order == "in the module":
        twin = copied(net)
    else:
        pair = (net.encoder, net.heads, net.balancer)
        first, second, third = copied(pair if order == "model first" else pair[::-1])
        twin = Net()
        twin.encoder, twin.heads, twin.balancer = (
            (first, second, third) if order == "model first" else (third, second, first)
        )
    assert twin.balancer is not net.balancer
    for seed in (1, 2):
        assert_same(twin.step(seed), net.step(seed))
    assert torch.equal(twin.balancer.norms, net.balancer.norms)


def test_a_copy_without_its_model_says_so() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match=r"cannot be deep-copied without its model"):
        copy.deepcopy(net.balancer)
    with pytest.raises(RuntimeError, match=r"or copied without its model"):
        through_pickle(net.balancer).backward(net.losses())


def test_hold_leaves_the_state() -> None:
    net, other = Net(), Net()
    net.step()
    other.step()
    ema = copy.deepcopy(net.balancer.ema)
    with net.balancer.hold():
        first = [grad.clone() for grad in net.step(1)]
        assert_same(net.step(1), first)
    assert all(torch.equal(ema[name], m) for name, m in net.balancer.ema.items())
    assert net.balancer.step == 1
    assert_same(net.step(1), other.step(1))


# --- Options, and calls that raise before anything has changed


@pytest.mark.parametrize(
    "option",
    [
        {"beta": 1 - 1e-9},
        {"alpha": 1e300},
        {"alpha": 1e-300},
        {"eps": 1e300},
        {"eps": 1e-30},
        {"log_eps": 1e300},
        {"log_eps": 1e-50},
        {"preference": [1e300, 1.0]},
        {"preference": [1e-50, 1.0]},
    ],
    ids=str,
)
def test_numbers_that_float32_cannot_hold_raise(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(option))}"):
        Net(**option)


def test_options_set_later_act() -> None:
    net, other = Net(alpha="max"), Net(alpha="min", eps=1e-3, beta=0.5, beta_sigma=0.25, log_eps=1e-4)
    net.balancer.alpha, net.balancer.eps, net.balancer.log_eps = "min", 1e-3, 1e-4
    net.balancer.beta, net.balancer.beta_sigma = 0.5, 0.25
    for seed in range(3):
        assert_same(net.step(seed), other.step(seed))
    net.balancer.preference = {"0": 1.0, "1": 2.0}
    assert net.balancer.preference.tolist() == [1.0, 2.0]
    for name in ("bucket_bytes", "state_dtype", "log_losses", "task_names", "backend"):
        with pytest.raises(AttributeError, match=f"{name} of a DBMTL cannot be changed"):
            setattr(net.balancer, name, None)
    with pytest.raises(ValueError, match=r"eps must be"):
        net.balancer.eps = 0.0
    assert "alpha='min'" in repr(net.balancer)


def sparse_grad(net: Net) -> list[Tensor]:
    net.encoder[0].bias.grad = torch.ones(4).to_sparse()
    return net.losses()


def expanded_grad(net: Net) -> list[Tensor]:
    net.encoder[0].bias.grad = torch.ones(1).expand(4)
    return net.losses()


def bad_preference(net: Net) -> list[Tensor]:
    assert net.balancer.preference is not None
    net.balancer.preference[0] = math.nan
    return net.losses()


def all_frozen(net: Net) -> list[Tensor]:
    losses = net.losses()
    net.encoder.requires_grad_(False)
    return losses


def detached_task(net: Net) -> list[Tensor]:
    return [net.losses()[0], net.heads(torch.ones(4)).square().sum()]


RAISING: dict[str, tuple[Callable[[Net], list[Tensor]], str]] = {
    "sparse .grad": (sparse_grad, r"\.grad of shared parameter '0\.bias' must be a dense tensor .* sparse_coo"),
    "expanded .grad": (expanded_grad, "an expanded tensor, whose elements share memory"),
    "preference": (bad_preference, "preference of task '0' must be"),
    "all frozen": (all_frozen, "no shared parameter requires grad"),
    "a detached task": (detached_task, "the loss of task '1' reaches no shared parameter"),
}


@pytest.mark.parametrize(("losses_of", "message"), RAISING.values(), ids=RAISING)
def test_errors_before_anything_changes(losses_of: Callable[[Net], list[Tensor]], message: str) -> None:
    net, other = (Net(preference=[1.0, 1.0]) for _ in range(2))
    net.step()
    other.step()
    net.zero_grad()
    losses = losses_of(net)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        net.balancer.backward(losses)
    net.encoder.requires_grad_(True)
    net.balancer.preference = [1.0, 1.0]
    assert_same(net.step(1), other.step(1))


def test_inference_mode_raises() -> None:
    net = Net()
    losses = net.losses()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"must not run under torch\.inference_mode"):
        net.balancer.backward(losses)
    net.balancer.backward(losses)


def test_running_out_of_memory_in_the_first_task_changes_nothing() -> None:
    net, other = Net(), Net()
    losses = net.losses()

    def out_of_memory(grad: Tensor) -> None:
        raise torch.OutOfMemoryError("planted")

    losses[0].register_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        net.balancer.backward(losses)
    assert_same(net.step(), other.step())


def test_two_balancers_over_parts_of_one_model_raise() -> None:
    net = Net()
    parts = [DBMTL(net.encoder[i], num_tasks=2) for i in (0, 2)]
    with pytest.raises(RuntimeError, match=r"belongs to another DBMTL of the same model"):
        parts[0].backward(net.losses())
    del parts
    DBMTL(net.encoder, num_tasks=2).backward(net.losses())
    net.step()


# --- Rounding, memory, compilers


def test_micro_batches_round_by_bits_of_their_own() -> None:
    """With the same bits the errors of 16 would add up to four times as much."""
    p, M = nn.Parameter(torch.zeros(50_000)), 16
    balancer = DBMTL([p], num_tasks=1, state_dtype=torch.bfloat16, beta_sigma=0.0, log_losses=False)
    balancer.ema["0"].fill_(1.0)
    for _ in range(M):
        balancer.backward([(p * 0.1001).sum()], accumulation_steps=M)
    assert balancer.ema["0"].double().std() < 0.008


def test_autocast_caches_do_not_keep_graphs() -> None:
    encoder, heads = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)]), [nn.Linear(16, 1) for _ in range(3)]
    alive, at = [0], []

    class Packed:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive[0] += 1

        def __del__(self) -> None:
            alive[0] -= 1

    hooks = torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        losses = [head(encoder(torch.randn(4, 16))).float().square().mean() for head in heads]
    for loss in losses:
        loss.register_hook(lambda grad: at.append(alive[0]))
    DBMTL(encoder, num_tasks=3).backward(losses)
    assert at[0] > at[1] > at[2]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look at it
@pytest.mark.parametrize("drop_in", [False, True])
def test_a_compiled_step_runs_the_balancer_eagerly(drop_in: bool) -> None:
    net, other = Net(), Net()

    @torch.compile(backend="eager")
    def step() -> None:
        losses = net.losses()
        net.balancer(losses).backward() if drop_in else net.balancer.backward(losses)

    step()
    other.step()
    for a, b in zip(net.grads(), other.grads(), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 0.0, "alpha": None}], ids=str)
def test_a_copy_in_the_middle_of_a_window_goes_on(options: dict[str, Any], copied: Callable[[Net], Net]) -> None:
    net = Net(**options)
    net.step()
    net.zero_grad()
    net.balancer.backward({"0": net.losses(1)[0]}, accumulation_steps=1)
    twin = copied(net)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()  # which copies do not take along
    for n in (net, twin):
        n.balancer.backward({"1": n.losses(2)[1]}, accumulation_steps=1)
    assert_same(twin.grads(), net.grads())
    assert twin.balancer.step == net.balancer.step == 2


def test_hooks_of_a_stack_run_for_its_elements() -> None:
    net, seen = Net(), []
    losses = torch.stack(net.losses())
    losses.register_hook(lambda grad: seen.append(grad))
    with pytest.warns(UserWarning, match="views of one tensor"):
        net.balancer.backward(list(losses))
    assert len(seen) == 2


def test_a_dropped_balancer_is_gone_at_once() -> None:
    net = Net()
    balancer = DBMTL(net.encoder, num_tasks=2)
    balancer.backward(net.losses())
    alive, buffer = weakref.ref(balancer), weakref.ref(balancer._rows.buffer)
    del balancer
    assert alive() is None
    assert buffer() is None


def test_losses_are_not_kept() -> None:
    net = Net()
    losses = [loss + 0 for loss in net.losses()]
    alive = [weakref.ref(loss) for loss in losses]
    net.balancer.backward(losses)
    del losses
    assert not any(ref() is not None for ref in alive)


def test_equal_weighting_as_a_loss_has_one_backward_pass() -> None:
    net = Net(beta=0.0, alpha=None)
    loss = net.balancer(net.losses())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="supports one backward pass, and this is a second one"):
        loss.backward()
    assert net.balancer.step == 1


def test_overwriting_leaves_a_frozen_parameter_alone() -> None:
    net = Net(beta=0.0, alpha=None)
    net.step()
    frozen = net.encoder[2].bias.requires_grad_(False)
    kept = frozen.grad
    net.balancer.backward(net.losses(), overwrite=True)
    assert frozen.grad is kept


def test_an_incomplete_state_is_not_saved() -> None:
    net = Net(bucket_bytes=1)
    losses = [loss + 0 for loss in net.losses()]
    losses[1].register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net.balancer.backward(losses)
    with pytest.raises(RuntimeError, match="the balancer's state is incomplete"):
        net.balancer.state_dict()


@pytest.mark.parametrize("drop_in", [False, True])
def test_compiled_autograd(drop_in: bool) -> None:
    import torch._dynamo.compiled_autograd as compiled_autograd

    net, other = Net(), Net()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        losses = net.losses()
        net.balancer(losses).backward() if drop_in else net.balancer.backward(losses)
    other.step()
    assert_same(net.grads(), other.grads())
    torch._dynamo.reset()


def test_layers_left_out_of_a_list_are_looked_for_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and again only if a parameter is let go of or stays away for long."""
    net, looks = Net(), []
    balancer, look = DBMTL(net.encoder.parameters(), num_tasks=2), guards._roots_of
    monkeypatch.setattr(guards, "_roots_of", lambda params: looks.append(0) or look(params))
    for every in (True, False, False, True, False):
        features = net.encoder[: 3 if every else 1](torch.randn(5, 3))
        balancer.backward(list(net.heads(features).square().mean(0)))
    assert len(looks) == 1
    net.encoder[2] = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="was reached before"):
        balancer.backward(list(net.heads(net.encoder(torch.randn(5, 3))).square().mean(0)))
