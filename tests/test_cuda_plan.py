"""Launch plans of the CUDA kernels: plain functions, asked here for devices that are not there."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
from cuda_emu.build import COMPILER, MODULE, load_module
from op_inputs import CHUNK

H200 = {"sms": 132, "shared_bytes": 232_448}
SMALL = {"sms": 20, "shared_bytes": 101_376}


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    """The module itself where it is built, else the emulated one, for a dispatch key that no test uses then."""
    try:
        return importlib.import_module(MODULE)
    except ImportError:
        if COMPILER is None:
            pytest.skip("needs the CUDA backend or g++")
        return load_module("CUDA")


@pytest.mark.parametrize("device", [H200, SMALL], ids=["H200", "small"])
@pytest.mark.parametrize("state_bytes", [2, 4, 8])
@pytest.mark.parametrize("P", [0, 1, 4097, 100_000, 11_200_000])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 11, 16, 17, 1000])
def test_balance(plans: ModuleType, T: int, P: int, state_bytes: int, device: dict[str, int]) -> None:
    plan = plans.balance_plan(T, P, state_bytes=state_bytes, **device)
    assert 1 <= plan["grid"] <= device["sms"]
    assert plan["threads"] % 32 == 0
    assert 128 <= plan["threads"] <= 512
    assert plan["units"] * plan["unit_columns"] >= P > (plan["units"] - 1) * plan["unit_columns"]
    assert plan["grid"] == min(device["sms"], max(plan["units"], 1))
    # What is kept fits, beside what the kernel has anyway, and is as much as fits or all there is.
    word = plan["threads"] * 16
    assert plan["shared_bytes"] == plan["kept"] * word <= device["shared_bytes"]
    words = -(-plan["units"] // (plan["grid"] * plan["threads"] // 32)) * plan["unit_columns"] // (512 // state_bytes)
    assert plan["kept"] <= words * T
    assert plan["kept"] == words * T or plan["shared_bytes"] + word > device["shared_bytes"] - 5000
    assert plan["workspace"] >= T * plan["grid"]


def test_balance_keeps_most_of_shared_memory(plans: ModuleType) -> None:
    plan = plans.balance_plan(3, 25_600_000, **H200)
    assert plan["grid"] == 132
    assert plan["threads"] == 512
    assert plan["shared_bytes"] == 224 * 1024


def test_rows_are_dealt_evenly(plans: ModuleType) -> None:
    slots = {T: plans.balance_plan(T, 1000, **H200)["slots"] for T in (1, 2, 3, 4, 5, 6, 7, 9, 11, 16)}
    assert slots == {1: 1, 2: 2, 3: 3, 4: 4, 5: 3, 6: 3, 7: 4, 9: 3, 11: 4, 16: 4}


def test_two_launches_keep_nothing(plans: ModuleType) -> None:
    plan = plans.balance_plan(3, 1_000_000, cooperative=False, **H200)
    assert not plan["cooperative"]
    assert plan["shared_bytes"] == 0


@pytest.mark.parametrize("state_bytes", [2, 4, 8])
@pytest.mark.parametrize("P", [0, 1, 4097, 11_200_000])
@pytest.mark.parametrize("T", [1, 8, 9, 1000])
def test_combine(plans: ModuleType, T: int, P: int, state_bytes: int) -> None:
    plan = plans.combine_plan(T, P, state_bytes=state_bytes, sms=132)
    assert 1 <= plan["grid"] <= 4 * 132
    assert plan["threads"] in (128, 160, 192, 224, 256)
    assert plan["units"] * plan["unit_columns"] >= P
    assert plan["rows"] == (T if T <= 8 and state_bytes == 4 else 0)
    assert plan["workspace"] == plan["grid"] * (1 + (T if T > 256 else 0))


@pytest.mark.parametrize("state_bytes", [2, 4, 8])
@pytest.mark.parametrize("P", [0, 1, 4097, 11_200_000])
@pytest.mark.parametrize("T", [1, 3, 4, 5, 16, 17, 33, 1000])
def test_gram(plans: ModuleType, T: int, P: int, state_bytes: int) -> None:
    plan = plans.gram_plan(T, P, state_bytes=state_bytes, sms=132)
    assert plan["rows"] == (T if T <= 4 else 8 if state_bytes == 4 else 4)
    blocks = -(-T // plan["rows"])
    assert plan["tiles"] == blocks * (blocks + 1) // 2
    assert plan["units"] * plan["unit_columns"] >= P > (plan["units"] - 1) * plan["unit_columns"]
    assert plan["grid"] == min(132, max(plan["units"], 1))
    # A warp for every tile of a pass, each tile for as many as there are, and passes of the same number of tiles.
    warps = 16 if plan["rows"] <= 4 else 12
    teams, rest = divmod(plan["threads"] // 32, plan["tiles_at_once"])
    assert rest == 0
    assert teams == warps // plan["tiles_at_once"] >= 1
    passes = -(-plan["tiles"] // plan["tiles_at_once"])
    assert passes == -(-plan["tiles"] // warps)
    assert plan["tiles_at_once"] == -(-plan["tiles"] // passes)
    assert plan["workspace"] >= plan["tiles"] * min(T, plan["rows"]) ** 2 * plan["grid"]


@pytest.mark.parametrize(("state_bytes", "most"), [(2, 20), (4, 32), (8, 20)])
def test_gram_reads_once(plans: ModuleType, state_bytes: int, most: int) -> None:
    passes = {}
    for T in range(1, most + 2):
        plan = plans.gram_plan(T, 1000, state_bytes=state_bytes, sms=132)
        passes[T] = -(-plan["tiles"] // plan["tiles_at_once"])
    assert passes == dict.fromkeys(range(1, most + 1), 1) | {most + 1: 2}


def segments(numels: list[int]) -> list[list[int]]:
    rows: list[list[int]] = []
    start = chunk = 0
    for numel in numels:
        rows.append([start, numel, chunk])
        start += -(-numel // 256) * 256
        chunk += -(-numel // CHUNK)
    return rows


@pytest.mark.parametrize(
    ("slots", "launches"),
    [
        pytest.param([0, 1, 2, 3, 4], [[0, 5, 0, 6]], id="all"),
        pytest.param([3, 1], [[1, 3, 1, 3]], id="some, backwards"),
        pytest.param([2], [[0, 0, 0, 0]], id="empty"),
        pytest.param([], [[0, 0, 0, 0]], id="none"),
    ],
)
def test_ema_update(plans: ModuleType, slots: list[int], launches: Any) -> None:
    """The chunks between the first and the last listed; one launch even for nothing, as sq_norm is due."""
    assert plans.ema_update_plan(segments([5, 4097, 0, 300, 8192]), slots) == launches


def test_ema_update_in_several_launches(plans: ModuleType) -> None:
    table = segments([1] * 9001)
    assert plans.ema_update_plan(table, list(range(9001))) == [
        [0, 4000, 0, 4000],
        [4000, 4000, 4000, 4000],
        [8000, 1001, 8000, 1001],
    ]
    assert plans.ema_update_plan(table, [3999, 4000]) == [[3999, 1, 3999, 1], [4000, 1, 4000, 1]]
