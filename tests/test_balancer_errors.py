"""Every user error of the balancer: the exact message, and that nothing has changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from op_inputs import DEVICE
from small_models import make_net
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dbmtl_fused import DBMTL

Rng = np.random.Generator


def parameter(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, **options))


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@contextmanager
def grads_unchanged(params: Iterable[Tensor]) -> Iterator[None]:
    """``.grad`` stays what and where it was, and no hook is left behind."""
    params = list(params)
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in params]
    yield
    for p, (grad, values) in zip(params, before, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, values)
        p.grad = None
        p.sum().backward()
        assert torch.equal(p.grad, torch.ones_like(p)), "a hook took this gradient"
        p.grad = grad


@contextmanager
def unchanged(balancer: DBMTL, params: Iterable[Tensor]) -> Iterator[None]:
    """And the balancer stays as it was, too."""

    def state() -> list[Tensor]:
        return [*balancer.ema.values(), balancer.step, balancer.norms, balancer.weights, balancer.alpha_value]

    before = [value.clone() for value in state()]
    with grads_unchanged(params):
        yield
    for value, old in zip(state(), before, strict=True):
        torch.testing.assert_close(value, old, rtol=0, atol=0, equal_nan=True)


def assert_must_be_reset(balancer: DBMTL, params: Iterable[Tensor], losses: list[Tensor], reason: str) -> None:
    """The next step is refused and says why; after a reset it is taken."""
    expected = f"the balancer's state is incomplete: {reason}; call reset() or load_state_dict() before the next step"
    with unchanged(balancer, params), pytest.raises(RuntimeError, match=exactly(expected)):
        balancer.backward(losses)
    balancer.reset()
    balancer.backward(losses)
    assert balancer.step == 1


CONSTRUCTION: dict[str, tuple[Callable[[], DBMTL], type[Exception], str]] = {
    "no parameters": (
        lambda: DBMTL([], num_tasks=2),
        ValueError,
        "shared parameters must hold at least one that requires grad, got none",
    ),
    "only frozen parameters": (
        lambda: DBMTL([torch.ones(2)], num_tasks=2),
        ValueError,
        "shared parameters must hold at least one that requires grad, got none",
    ),
    "a tensor": (
        lambda: DBMTL(parameter(2), num_tasks=2),
        TypeError,
        "shared parameters must be a Module, (name, tensor) pairs or tensors, got a single Tensor",
    ),
    "a number": (
        lambda: DBMTL([1.0], num_tasks=2),  # type: ignore[list-item]
        TypeError,
        "shared parameter 0 must be a tensor or a (name, tensor) pair, got a tuple of ('str', 'float')",
    ),
    "same name twice": (
        lambda: DBMTL([("w", parameter(2)), ("w", parameter(3))], num_tasks=2),
        ValueError,
        "names of shared parameters must be unique, got 'w' twice",
    ),
    "complex": (
        lambda: DBMTL([("w", parameter(2, dtype=torch.complex64))], num_tasks=2),
        TypeError,
        "shared parameter 'w' must have one of the dtypes (torch.float32, torch.bfloat16, torch.float16, "
        "torch.float64), got torch.complex64",
    ),
    "sparse": (
        lambda: DBMTL([("w", torch.ones(2, 2).to_sparse().requires_grad_())], num_tasks=2),
        TypeError,
        "shared parameter 'w' must be dense, got layout torch.sparse_coo",
    ),
    "not a leaf": (
        lambda: DBMTL([("w", parameter(2) * 2)], num_tasks=2),
        TypeError,
        "shared parameter 'w' must be a leaf tensor, got the result of <MulBackward0",
    ),
    "several devices": (
        lambda: DBMTL([("w", parameter(2)), ("v", parameter(2, device="meta"))], num_tasks=2),
        ValueError,
        "shared parameters must be on one device, got 'w' on cpu and 'v' on meta",
    ),
    "no tasks": (
        lambda: DBMTL([parameter(2)]),
        ValueError,
        "num_tasks must be a positive integer (or give task_names), got None",
    ),
    "zero tasks": (
        lambda: DBMTL([parameter(2)], num_tasks=0),
        ValueError,
        "num_tasks must be a positive integer (or give task_names), got 0",
    ),
    "a string of tasks": (
        lambda: DBMTL([parameter(2)], task_names="abc"),
        ValueError,
        "task_names must be a non-empty sequence of strings, got 'abc'",
    ),
    "same task twice": (
        lambda: DBMTL([parameter(2)], task_names=["a", "a"]),
        ValueError,
        "task_names must be unique, got ['a', 'a']",
    ),
    "two numbers of tasks": (
        lambda: DBMTL([parameter(2)], num_tasks=3, task_names=["a", "b"]),
        ValueError,
        "num_tasks must be the number of task_names, 2, or be left out, got 3",
    ),
    "beta 1": (lambda: DBMTL([parameter(2)], num_tasks=2, beta=1.0), ValueError, "beta must be >= 0 and < 1, got 1.0"),
    "beta nan": (
        lambda: DBMTL([parameter(2)], num_tasks=2, beta=float("nan")),
        ValueError,
        "beta must be >= 0 and < 1, got nan",
    ),
    "beta of text": (
        lambda: DBMTL([parameter(2)], num_tasks=2, beta="0.9"),  # type: ignore[arg-type]
        TypeError,
        "beta must be a number, got str",
    ),
    "beta_sigma": (
        lambda: DBMTL([parameter(2)], num_tasks=2, beta_sigma=-1),
        ValueError,
        "beta_sigma must be >= 0, got -1",
    ),
    "eps": (lambda: DBMTL([parameter(2)], num_tasks=2, eps=0.0), ValueError, "eps must be > 0, got 0.0"),
    "log_eps": (lambda: DBMTL([parameter(2)], num_tasks=2, log_eps=0), ValueError, "log_eps must be > 0, got 0"),
    "alpha": (
        lambda: DBMTL([parameter(2)], num_tasks=2, alpha="sum"),
        ValueError,
        "alpha must be one of ('max', 'min', 'mean', 'median'), a positive number or None, got 'sum'",
    ),
    "alpha 0": (
        lambda: DBMTL([parameter(2)], num_tasks=2, alpha=0),
        ValueError,
        "alpha must be one of ('max', 'min', 'mean', 'median'), a positive number or None, got 0",
    ),
    "state_dtype": (
        lambda: DBMTL([parameter(2)], num_tasks=2, state_dtype=torch.float16),
        ValueError,
        "state_dtype must be None or one of (torch.float32, torch.float64, torch.bfloat16), got torch.float16",
    ),
    "bucket_bytes": (
        lambda: DBMTL([parameter(2)], num_tasks=2, bucket_bytes=0),
        ValueError,
        'bucket_bytes must be "auto", None or a positive integer, got 0',
    ),
    "backend": (
        lambda: DBMTL([parameter(2)], num_tasks=2, backend="metal"),
        ValueError,
        "backend must be one of ('auto', 'cuda', 'triton', 'cpu', 'reference'), got 'metal'",
    ),
}


@pytest.mark.parametrize(("build", "kind", "message"), CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_construction(build: Callable[[], DBMTL], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)):
        build()


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("ds_id", "shared parameter 'w' is partitioned by DeepSpeed ZeRO, which is not supported"),
        ("_is_flat_param", "shared parameter 'w' is an FSDP1 FlatParameter, which is not supported"),
        ("device_mesh", "shared parameter 'w' is a DTensor (FSDP2, tensor parallel), which is not supported yet"),
    ],
)
def test_sharded_parameters_are_refused_by_name(mark: str, message: str) -> None:
    w = parameter(2)
    setattr(w, mark, True)
    with pytest.raises(TypeError, match=re.escape(message)):
        DBMTL([("w", w)], num_tasks=2)


# --- Losses

a, b = "a", "b"
LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "too few": (
        lambda l: [l],
        ValueError,
        "losses must hold one loss per task, 2 (a, b), got 1; None stands for a task that is not there",
    ),
    "unknown name": (
        lambda l: {"a": l, "c": l},
        ValueError,
        "losses must have keys out of ['a', 'b'], unknown ['c']",
    ),
    "not iterable": (lambda l: 3, TypeError, "losses must be a sequence, a mapping or a tensor, got int"),
    "a float": (lambda l: [l, 1.0], TypeError, "loss of task 'b' must be a floating-point tensor, got float"),
    "integers": (
        lambda l: [l, torch.ones((), dtype=torch.int64)],
        TypeError,
        "loss of task 'b' must be a floating-point tensor, got torch.int64",
    ),
    "not scalar": (
        lambda l: [l, l.expand(3)],
        ValueError,
        "loss of task 'b' must have one element, got shape (3,)",
    ),
    "no graph": (
        lambda l: [l, l.detach()],
        ValueError,
        "loss of task 'b' must require grad; it has no graph (detached, or computed under no_grad?)",
    ),
    "no graph in a stack": (
        lambda l: torch.stack([l, l.detach()]),
        ValueError,
        "loss of task 'b' must require grad; it has no graph (detached, or computed under no_grad?)",
    ),
    "tensor without graph": (
        lambda l: torch.stack([l, l]).detach(),
        ValueError,
        "loss of task 'a, b' must require grad; it has no graph (detached, or computed under no_grad?)",
    ),
    "tensor of another shape": (
        lambda l: torch.stack([l, l])[None],
        ValueError,
        "losses as a tensor must have shape (2,), one per task, got (1, 2)",
    ),
    "negative": (
        lambda l: [l, l - 5],
        ValueError,
        "loss of task 'b' must be >= 0 to take its log, got -3.0; shift it, or use log_losses=False",
    ),
}


@pytest.mark.parametrize("drop_in", [False, True], ids=["backward", "drop-in loss"])
@pytest.mark.parametrize(("losses", "kind", "message"), LOSSES.values(), ids=LOSSES)
def test_losses(losses: Callable[[Tensor], Any], kind: type[Exception], message: str, drop_in: bool) -> None:
    p = parameter(2)
    balancer = DBMTL([p], task_names=["a", "b"])
    balancer.backward([p.sum(), 2 * p.sum()])
    run = balancer if drop_in else balancer.backward
    with unchanged(balancer, [p]), pytest.raises(kind, match=exactly(message)):
        run(losses(p.sum()))
    balancer.backward([p.sum(), p.sum()])  # usable as before


def test_negative_losses_are_fine_without_the_log(rng: Rng) -> None:
    p = parameter(2)
    balancer = DBMTL([p], num_tasks=2, log_losses=False)
    balancer.backward([p.sum() - 5, p.sum()])
    assert p.grad is not None
    assert p.grad.isfinite().all()


# --- Using a balancer that cannot be used: found before the first backward pass, nothing has changed


def stepped(shared: nn.Module) -> DBMTL:
    """A balancer of one task that has taken a step."""
    balancer = DBMTL(shared, num_tasks=1)
    balancer.backward([sum(p.square().sum() for p in shared.parameters() if p.requires_grad)])
    return balancer


def test_a_balancer_built_before_the_model_was_converted_is_stale() -> None:
    layer = nn.Linear(2, 3)
    balancer = stepped(layer)
    layer.half()
    expected = (
        "the balancer is stale: shared parameter 'weight' was (3, 2) torch.float32 on cpu when it was built and is "
        "(3, 2) torch.float16 on cpu now; build it after moving or converting the model"
    )
    with unchanged(balancer, layer.parameters()), pytest.raises(RuntimeError, match=exactly(expected)):
        balancer.backward([layer.weight.float().square().sum()])
    layer.float()
    balancer.backward([layer.weight.square().sum()])


def test_a_parameter_unfrozen_after_the_balancer_was_built_is_named() -> None:
    layer = nn.Linear(2, 3)
    layer.bias.requires_grad_(False)
    balancer = stepped(layer)
    layer.bias.requires_grad_(True)
    expected = (
        "the balancer is stale: shared parameter 'bias' was frozen when it was built and requires grad now; build it "
        "anew (its state loads with load_state_dict(strict=False)), or unfreeze before building"
    )
    with unchanged(balancer, layer.parameters()), pytest.raises(RuntimeError, match=exactly(expected)):
        balancer.backward([layer.weight.square().sum()])


def test_an_optimizer_in_the_backward_pass_is_refused_by_name() -> None:
    layer = nn.Linear(2, 3)
    balancer = stepped(layer)
    handle = layer.bias.register_post_accumulate_grad_hook(lambda p: None)
    expected = (
        "shared parameter 'bias' has a post-accumulate-grad hook (an optimizer in the backward pass?), which would "
        "not run on the balanced gradient; remove it"
    )
    with unchanged(balancer, layer.parameters()), pytest.raises(RuntimeError, match=exactly(expected)):
        balancer.backward([layer.weight.square().sum()])
    handle.remove()
    balancer.backward([layer.weight.square().sum()])


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_a_live_ddp_module_is_refused() -> None:
    layer = nn.Linear(2, 3)
    ddp = nn.parallel.DistributedDataParallel(layer)
    balancer = DBMTL(layer, num_tasks=1)
    expected = (
        "shared parameter 'weight' belongs to a DistributedDataParallel module: several backward passes over one DDP "
        "forward desynchronise the ranks; use the module without DDP"
    )
    for run in (balancer.backward, balancer):
        losses = [ddp(torch.ones(1, 2)).square().sum()]
        with unchanged(balancer, layer.parameters()), pytest.raises(RuntimeError, match=exactly(expected)):
            run(losses)
    other = nn.Linear(2, 3)
    DBMTL(other, num_tasks=1).backward([other(torch.ones(1, 2)).square().sum()])


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_by_name(use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    layer = FullyShardedDataParallel(nn.Linear(2, 3), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    expected = "^shared parameter '_fsdp_wrapped_module.*' is .*an FSDP1 FlatParameter, which is not supported$"
    with pytest.raises(TypeError, match=expected):
        DBMTL(layer, num_tasks=1)


@pytest.mark.usefixtures("_one_rank")
def test_fsdp2_is_refused_by_name() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = nn.Linear(2, 3)
    before = DBMTL(layer, num_tasks=1)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    expected = "shared parameter 'weight' is a DTensor (FSDP2, tensor parallel), which is not supported yet"
    with pytest.raises(TypeError, match=exactly(expected)):
        DBMTL(layer, num_tasks=1)
    with pytest.raises(RuntimeError, match=exactly(REPLACED.format("weight"))):
        before.backward([layer(torch.ones(1, 2)).square().sum()])


# --- Failures inside a backward pass: ``.grad`` and hooks are as before, and a reset must follow


REPLACED = (
    "the balancer is stale: shared parameter {!r} was added or replaced after it was built; build it anew (its state "
    "loads with load_state_dict(strict=False))"
)
REACHES_NOTHING = (
    "the loss of task {!r} reaches no shared parameter; if it should, the balancer is stale (was it built before "
    "parameters were replaced, by fully_shard, weight_norm or to_empty, or copied without its model?)"
)


@pytest.mark.parametrize("bucket_bytes", [None, 64])
def test_a_task_that_reaches_no_shared_parameter_is_named(backend: str, bucket_bytes: int | None) -> None:
    p, q = (parameter(2, device=DEVICE) for _ in range(2))
    p.grad = torch.full_like(p, 3)
    balancer = DBMTL([p], task_names=["a", "b"], backend=backend, bucket_bytes=bucket_bytes)
    message = REACHES_NOTHING.format("b")
    with grads_unchanged([p]), pytest.raises(RuntimeError, match=exactly(message)):
        balancer.backward([p.sum(), q.sum()])
    balancer.backward([p.sum(), p.sum()])  # nothing had changed
    assert balancer.step == 1


def test_a_balancer_built_before_weight_norm_is_stale() -> None:
    layer = nn.Linear(2, 3, bias=False)
    shared, balancer = [layer.weight], stepped(layer)
    weight_norm(layer)
    message = exactly(REPLACED.format("parametrizations.weight.original0"))
    with grads_unchanged(shared), pytest.raises(RuntimeError, match=message):
        balancer.backward([layer(torch.ones(1, 2)).square().sum()])


@pytest.mark.parametrize("bucket_bytes", [None, 64])
def test_sparse_gradients_are_refused_by_name(backend: str, bucket_bytes: int | None) -> None:
    table = nn.Embedding(5, 3, sparse=True, device=DEVICE)
    table.weight.grad = torch.ones_like(table.weight)
    balancer = DBMTL(table, num_tasks=1, backend=backend, bucket_bytes=bucket_bytes)
    message = "gradient of 'weight' must be dense and real, got a sparse_coo one"
    with grads_unchanged([table.weight]), pytest.raises(TypeError, match=exactly(message)):
        balancer.backward([table(torch.tensor([1, 2], device=DEVICE)).square().sum()])
    balancer.backward([table.weight.square().sum()])  # nothing had changed
    assert balancer.step == 1


def test_a_loaded_state_makes_a_failed_balancer_usable() -> None:
    p, q = parameter(2), parameter(2)
    balancer = DBMTL([p], num_tasks=1)
    state = balancer.state_dict()
    with pytest.raises(RuntimeError, match="reaches no shared parameter"):
        balancer.backward([q.sum()])
    balancer.load_state_dict(state)
    balancer.backward([p.sum()])


# --- The drop-in loss


def test_create_graph_raises_and_changes_nothing(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    balancer.backward(net.batch_losses(rng))
    loss = balancer(net.batch_losses(rng))
    expected = "the balanced loss cannot be differentiated twice: create_graph=True is not supported"
    with unchanged(balancer, net.parameters()), pytest.raises(RuntimeError, match=exactly(expected)):
        torch.autograd.grad(loss, list(net.encoder.parameters()), create_graph=True)
    with unchanged(balancer, net.parameters()), pytest.raises(RuntimeError, match=exactly(expected)):
        loss.backward(create_graph=True)
    loss.backward()
    assert balancer.step == 2


def test_a_second_backward_raises_and_changes_nothing(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    loss = balancer(net.batch_losses(rng))
    loss.backward(retain_graph=True)
    expected = "the balanced loss supports one backward pass, and this is a second one; call balancer(losses) again"
    with unchanged(balancer, net.parameters()), pytest.raises(RuntimeError, match=exactly(expected)):
        loss.backward()
    balancer(net.batch_losses(rng)).backward()
    assert balancer.step == 2
