"""Killed runs continue bit for bit; checkpoints in every state dtype, by ``torch.save`` and by torch's distributed one.

The program that is killed is the one in ``docs/training.md``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from op_inputs import STATE_DTYPES
from small_models import Net, make_net
from test_docs import PROGRAMS, ROOT
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from dbmtl_fused import DBMTL

Rng = np.random.Generator


def assert_same(value: Any, expected: Any) -> None:
    """Nested dicts and lists of tensors, bit for bit."""
    (leaves, spec), (expected_leaves, expected_spec) = tree_flatten(value), tree_flatten(expected)
    assert spec == expected_spec
    for leaf, other in zip(leaves, expected_leaves, strict=True):
        if isinstance(leaf, Tensor):
            assert leaf.dtype == other.dtype
            assert torch.equal(leaf, other)
        else:
            assert leaf == other


# --- kill -9


UNTIL_KILLED = 10**9


def program(state_dtype: torch.dtype, steps: int) -> str:
    """The docs' program, which trains up to step ``steps``, from the last checkpoint on if there is one."""
    source = PROGRAMS["Checkpoints"]
    for old, new in (("STEPS, EVERY = 40, 5", f"STEPS, EVERY = {steps}, 3"), ("torch.bfloat16", str(state_dtype))):
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source


def start(source: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def saved(folder: Path) -> Any:
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.exists() else {"step": 0}


def kill_in_training(run: subprocess.Popen[str], folder: Path, after_step: int, rng: Rng) -> int:
    """SIGKILL some milliseconds after a checkpoint beyond ``after_step``; return the last checkpoint's step."""
    deadline = time.monotonic() + 120
    try:
        while saved(folder)["step"] <= after_step:
            assert run.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, f"no checkpoint beyond step {after_step} within two minutes"
            time.sleep(0.01)
        time.sleep(0.02 * rng.random())
    finally:
        run.kill()
        output = run.communicate()[0]
    assert run.returncode == -9, output
    return saved(folder)["step"]


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_killed_run_ends_as_one_that_was_not(
    state_dtype: torch.dtype, rng: Rng, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, optimizer and EMA; with bfloat16 state its random rounding is a part of that."""
    step = kill_in_training(start(program(state_dtype, UNTIL_KILLED), tmp_path), tmp_path, 10, rng)
    whole_run = program(state_dtype, step + 30)
    assert start(whole_run, tmp_path).communicate(timeout=120)[0] == f"after step {step}\n"
    end = saved(tmp_path)
    assert end["step"] == step + 30
    assert {m.dtype for m in end["balancer"]["ema"].values()} == {state_dtype}

    not_killed = tmp_path / "not killed"
    not_killed.mkdir()
    monkeypatch.chdir(not_killed)
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        exec(compile(whole_run, "whole run", "exec"), {})
    assert_same(end, saved(not_killed))


# --- Round trips


def save_and_load(state: Any, path: Path) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def by_torch_save(source: DBMTL, target: DBMTL, folder: Path) -> None:
    target.load_state_dict(save_and_load(source.state_dict(), folder / "balancer.pt"))


def by_dcp(source: DBMTL, target: DBMTL, folder: Path) -> None:
    """The state, as one passes an optimizer's."""
    dcp.save({"balancer": source.state_dict()}, checkpoint_id=folder, no_dist=True)
    state = {"balancer": target.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    target.load_state_dict(state["balancer"])


def by_dcp_stateful(source: DBMTL, target: DBMTL, folder: Path) -> None:
    """The balancer itself: torch asks it for its state and hands one back."""
    dcp.save({"balancer": source}, checkpoint_id=folder, no_dist=True)
    dcp.load({"balancer": target}, checkpoint_id=folder, no_dist=True)


ROUND_TRIPS = [by_torch_save, by_dcp, by_dcp_stateful]

dcp_in_one_process = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def steps(net: Net, balancer: DBMTL, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, target in batches:
        balancer.backward(net.losses(x, target), overwrite=True)


@dcp_in_one_process
@pytest.mark.parametrize("round_trip", ROUND_TRIPS)
@pytest.mark.parametrize("options", [{"state_dtype": dtype} for dtype in STATE_DTYPES] + [{"beta": 0.0}], ids=str)
def test_round_trip(
    options: dict[str, Any], round_trip: Callable[[DBMTL, DBMTL, Path], None], rng: Rng, tmp_path: Path
) -> None:
    """Into a balancer that has been elsewhere, whose next steps are then the same bit for bit."""
    net, other = make_net(), make_net().to(memory_format=torch.channels_last)
    balancer, target = (DBMTL(n.encoder, num_tasks=3, **options) for n in (net, other))
    batches = [net.batch(rng) for _ in range(5)]
    steps(net, balancer, batches[:3])
    steps(other, target, batches[3:])
    round_trip(balancer, target, tmp_path)
    assert_same(target.state_dict(), balancer.state_dict())
    restored = make_net()
    continued = DBMTL(restored.encoder, num_tasks=3, **options)
    continued.load_state_dict(target.state_dict())
    steps(net, balancer, batches[3:])
    steps(restored, continued, batches[3:])
    assert_same(continued.state_dict(), balancer.state_dict())
    for p, q in zip(net.encoder.parameters(), restored.encoder.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# --- What does not fit


def another_layout() -> nn.Sequential:
    encoder = make_net().encoder
    encoder[2] = nn.Conv2d(4, 6, 3, bias=False)
    encoder[5] = nn.Linear(24, 41)
    return encoder.append(nn.Linear(41, 5))


def test_a_checkpoint_of_another_layout_is_refused_by_name(rng: Rng, tmp_path: Path) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3)
    balancer.backward(net.batch_losses(rng))
    before = save_and_load(balancer.state_dict(), tmp_path / "before.pt")
    foreign = save_and_load(DBMTL(another_layout(), num_tasks=3).state_dict(), tmp_path / "foreign.pt")
    expected = (
        "state_dict does not fit the shared parameters: missing '2.bias'; unexpected '7.weight'; unexpected '7.bias'; "
        "'5.weight' has shape (3, 41, 24), not (3, 40, 24); '5.bias' has shape (3, 41), not (3, 40)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        balancer.load_state_dict(foreign)
    assert_same(balancer.state_dict(), before)
    balancer.backward(net.batch_losses(rng))


@dcp_in_one_process
def test_torchs_distributed_checkpoint_names_what_is_missing(rng: Rng, tmp_path: Path) -> None:
    """Its own message; the load is refused as a whole."""
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3)
    balancer.backward(net.batch_losses(rng))
    before = save_and_load(balancer.state_dict(), tmp_path / "before.pt")
    dcp.save({"balancer": DBMTL(another_layout(), num_tasks=3)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(dcp.api.CheckpointException, match=r"balancer\.ema\.(2\.bias|5\.weight)"):
        dcp.load({"balancer": balancer}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_same(balancer.state_dict(), before)
