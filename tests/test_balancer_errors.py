"""Every user error of the balancer: the exact message, and that nothing has changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_models import make_net
from torch import Tensor, nn

from dbmtl_fused import DBMTL

Rng = np.random.Generator


def parameter(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, **options))


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
    "too few": (lambda l: [l], ValueError, "losses must hold one loss per task, 2 (a, b), got 1"),
    "unknown and missing name": (
        lambda l: {"a": l, "c": l},
        ValueError,
        "losses must have the keys ['a', 'b']; missing ['b'], unknown ['c']",
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
    run = balancer if drop_in else balancer.backward
    with pytest.raises(kind, match="^" + re.escape(message) + "$"):
        run(losses(p.sum()))
    assert p.grad is None
    assert balancer.step == 0
    balancer.backward([p.sum(), p.sum()])  # usable as before


def test_negative_losses_are_fine_without_the_log(rng: Rng) -> None:
    p = parameter(2)
    balancer = DBMTL([p], num_tasks=2, log_losses=False)
    balancer.backward([p.sum() - 5, p.sum()])
    assert p.grad is not None
    assert p.grad.isfinite().all()


# --- Using a balancer that cannot be used


def test_a_task_that_reaches_no_shared_parameter_is_named(backend: str) -> None:
    p, q = parameter(2), parameter(2)
    balancer = DBMTL([p], task_names=["a", "b"], backend=backend)
    with pytest.raises(RuntimeError, match="the loss of task 'b' reaches no shared parameter"):
        balancer.backward([p.sum(), q.sum()])
    assert p.grad is None
    with pytest.raises(
        RuntimeError, match=r"state is incomplete: .*task 'b' failed.* call reset\(\) or load_state_dict"
    ):
        balancer.backward([p.sum(), p.sum()])
    balancer.reset()
    balancer.backward([p.sum(), p.sum()])


def test_a_loaded_state_makes_a_failed_balancer_usable() -> None:
    p, q = parameter(2), parameter(2)
    balancer = DBMTL([p], num_tasks=1)
    state = balancer.state_dict()
    with pytest.raises(RuntimeError):
        balancer.backward([q.sum()])
    balancer.load_state_dict(state)
    balancer.backward([p.sum()])


def test_a_balancer_built_before_the_model_was_converted_is_stale() -> None:
    layer = nn.Linear(2, 3)
    balancer = DBMTL(layer, num_tasks=1)
    layer.half()
    expected = (
        "the balancer is stale: shared parameter 'weight' was (3, 2) torch.float32 on cpu when it was built and is "
        "(3, 2) torch.float16 on cpu now; build it after moving or converting the model"
    )
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        balancer.backward([layer.weight.float().square().sum()])


def test_a_parameter_unfrozen_after_the_balancer_was_built_is_named() -> None:
    layer = nn.Linear(2, 3)
    layer.bias.requires_grad_(False)
    balancer = DBMTL(layer, num_tasks=1)
    balancer.backward([layer.weight.square().sum()])
    layer.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match="stale: shared parameter 'bias' was frozen when it was built"):
        balancer.backward([layer.weight.square().sum()])


def test_an_optimizer_in_the_backward_pass_is_refused_by_name() -> None:
    layer = nn.Linear(2, 3)
    balancer = DBMTL(layer, num_tasks=1)
    handle = layer.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match="shared parameter 'bias' has a post-accumulate-grad hook"):
        balancer.backward([layer.weight.square().sum()])
    handle.remove()
    balancer.backward([layer.weight.square().sum()])


def test_sparse_gradients_are_refused_by_name(backend: str) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    for bucket_bytes in (None, 64):
        balancer = DBMTL(table, num_tasks=1, backend=backend, bucket_bytes=bucket_bytes)
        with pytest.raises(TypeError, match="gradient of 'weight' must be dense and real, got a sparse_coo one"):
            balancer.backward([table(torch.tensor([1, 2])).square().sum()])
        assert table.weight.grad is None


def test_a_live_ddp_module_is_refused(tmp_path: Any) -> None:
    import torch.distributed as dist

    layer = nn.Linear(2, 3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(layer)
        with pytest.raises(RuntimeError, match="shared parameter 'weight' belongs to a DistributedDataParallel module"):
            DBMTL(layer, num_tasks=1).backward([ddp(torch.ones(1, 2)).square().sum()])
        other = nn.Linear(2, 3)
        DBMTL(other, num_tasks=1).backward([other(torch.ones(1, 2)).square().sum()])
    finally:
        dist.destroy_process_group()


# --- The drop-in loss


def test_create_graph_raises_and_changes_nothing(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    loss = balancer(net.batch_losses(rng))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice: create_graph=True is not supported"):
        loss.backward(create_graph=True)
    assert balancer.step == 0
    assert all(p.grad is None for p in net.parameters())
    loss.backward()
    assert balancer.step == 1


def test_a_second_backward_raises_and_changes_nothing(backend: str, rng: Rng) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    loss = balancer(net.batch_losses(rng))
    loss.backward(retain_graph=True)
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="supports one backward pass, and this is a second one"):
        loss.backward()
    assert balancer.step == 1
    for p, grad in zip(net.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)
    balancer(net.batch_losses(rng)).backward()
    assert balancer.step == 2
