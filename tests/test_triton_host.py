"""The host's side of the Triton backend: what it launches, what it remembers, what it does where a launch fails."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from dbmtl_fused._ops import STATE_DTYPES
from dbmtl_fused.layout import FlatLayout

pytest.importorskip("triton")
from triton_launches import (
    MULTIPROCESSORS,
    Recorder,
    balance_launch,
    begin_step_launch,
    combine_launch,
    ema_update_launch,
    gram_launch,
)

from dbmtl_fused.triton_kernels import balance, gradients, launch, tuning

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_tables", type(gradients._tables)())
    monkeypatch.setattr(balance, "_SECOND_LAUNCH", set())


def layout_of(*shapes: tuple[int, ...]) -> FlatLayout:
    return FlatLayout([(str(i), torch.zeros(shape)) for i, shape in enumerate(shapes)])


def listed(layout: FlatLayout, slots: list[int]) -> gradients.Listed:
    return gradients.listed_chunks(slots, layout.segments, layout.P, layout.num_chunks)


# --- Which launches


def test_balance_is_one_launch(record: Any) -> None:
    _, parameters, options = balance_launch(record, 3, F32, F32)
    assert parameters["PHASES"] == "both"
    assert options["launch_cooperative_grid"]


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 11, 12, 13, 16, 17, 64])
@pytest.mark.parametrize("P", [0, 1, 5000, 100_000, 1_000_000, 10**9])
def test_the_whole_grid_of_balance_is_resident(T: int, P: int, state_dtype: torch.dtype) -> None:
    """Else it would wait for itself: registers, of which a multiprocessor has 65,536, and warps, of which it has 64."""
    config = tuning.balance(T, P, state_dtype, MULTIPROCESSORS)
    blocks_each = -(config.programs(P, MULTIPROCESSORS) // -MULTIPROCESSORS)
    assert blocks_each * config.num_warps * 32 * tuning.BALANCE_REGISTERS <= 65_536
    assert config.programs(P, MULTIPROCESSORS) >= 1
    for block in (config.update_block, config.sum_block):
        assert block & (block - 1) == 0


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 9, 13, 16, 17, 1000])
def test_a_tile_has_all_rows_up_to_a_number_of_tasks(T: int) -> None:
    for config in (tuning.combine(T), tuning.balance(T, 10**8, F32, MULTIPROCESSORS)):
        assert config.rows >= T or not tuning.small(T)
    assert tuning.small(T) == (T if T <= 16 else 0)


@pytest.mark.parametrize("T", [1, 2, 4, 5, 64, 1000])
@pytest.mark.parametrize("P", [0, 1, 4097, 1_000_000, 10**10])
def test_spans_of_gram(T: int, P: int) -> None:
    """They cover all columns, none in vain; one a program, or so short that those of all programs stay in L2."""
    config = tuning.gram(T)
    span, spans = config.spans(T, P, MULTIPROCESSORS)
    assert (spans - 1) * span * config.block < max(P, 1) <= spans * span * config.block
    if config.rows >= T:
        assert spans <= tuning.GRAM_PROGRAMS * MULTIPROCESSORS
    else:
        assert span == 1 or T * span * config.block <= tuning.GRAM_SPAN


def test_two_launches_where_a_cooperative_one_fails(
    record: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Said once; then it is not tried again on that device."""
    phases = []

    class TooMany(Recorder):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launch = super().__getitem__(grid)

            def fail(*args: Any, **kwargs: Any) -> None:
                phases.append(kwargs["PHASES"])
                if kwargs.get("launch_cooperative_grid"):
                    raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
                launch(*args, **kwargs)

            return fail

    monkeypatch.setattr("triton_launches.Recorder", TooMany)
    with caplog.at_level(logging.WARNING, logger="dbmtl_fused"):
        balance_launch(record, 3, F32, F32)
        balance_launch(record, 3, F32, F32)
    assert phases == ["both", "first", "second", "first", "second"]
    assert len(caplog.records) == 1
    assert "two launches instead of one" in caplog.text


def test_other_errors_of_a_launch_are_raised(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Recorder):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise RuntimeError("out of memory")

    monkeypatch.setattr("triton_launches.Recorder", Broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        balance_launch(record, 3, F32, F32)


def test_two_launches_where_grids_cannot_wait(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "target", lambda: "xpu")
    _, parameters, options = balance_launch(record, 3, F32, F32)
    assert parameters["PHASES"] == "second"
    assert set(options) == {"num_warps", "enable_fp_fusion"}, "options that not every compiler knows"


def test_options_of_streaming_kernels_are_known_to_every_compiler(record: Any) -> None:
    for made in (
        begin_step_launch(record, 3, F32, F32),
        combine_launch(record, 3, F32, F32),
        ema_update_launch(record, F32, F32),
        gram_launch(record, 3, F32),
    ):
        assert set(made[2]) == {"num_warps", "enable_fp_fusion"}


def test_only_dtypes_of_the_call_are_compiled(record: Any) -> None:
    _, parameters, _ = ema_update_launch(record, F32, F32, BF16)
    assert parameters["DTYPES"] == 0b11
    _, parameters, _ = ema_update_launch(record, F32, BF16)
    assert parameters["DTYPES"] == 0b10


# --- Which chunks and slots


def test_chunks_between_the_first_and_last_slot() -> None:
    layout = layout_of((5000,), (0,), (4096,), (3, 3), (9000,))
    assert listed(layout, [0, 1, 2, 3, 4])[:4] == (0, 7, 0, 5)
    assert listed(layout, [3, 2])[:4] == (2, 2, 2, 2)
    assert listed(layout, [4, 0])[:4] == (0, 7, 0, 5)
    assert listed(layout, [1])[:4] == (0, 0, 1, 1)
    assert listed(layout, [])[:4] == (0, 0, 0, 1)


def test_changed_segments_are_read_again() -> None:
    layout = layout_of((5000,), (300,))
    before = listed(layout, [1])
    layout.segments[1, 1] = 77
    assert before.numels == (300,)
    assert listed(layout, [1]).numels == (77,)


# --- Where the gradients are


def table(layout: FlatLayout, grads: list[torch.Tensor | None], slots: list[int]) -> gradients.Table:
    return gradients.gradient_table(grads, slots, listed(layout, slots), CPU)


def test_table_of_gradients() -> None:
    """Addresses count from the row's first column; a slot in between that is not listed is skipped."""
    layout = layout_of((300,), (5,), (64, 64))
    first, last = torch.zeros(300), torch.zeros(64, 64, dtype=BF16)
    values, dtypes = table(layout, [last, first], [2, 0])
    starts = layout.segments[:, 0].tolist()
    assert values.tolist() == [[first.data_ptr(), 0, last.data_ptr() - 2 * starts[2]], [0, gradients.SKIPPED.value, 1]]
    assert dtypes == 0b11
    values, dtypes = table(layout, [None], [1])
    assert values.tolist() == [[0], [gradients.ABSENT.value]]
    assert dtypes == 0


def test_tables_are_kept_by_address() -> None:
    layout, grads = layout_of((300,), (5,)), [torch.zeros(300), torch.zeros(5)]
    known = table(layout, grads, [0, 1])
    assert table(layout, grads, [0, 1]) is known
    for other in ([grads[0].clone(), grads[1]], [grads[0], None], [None, grads[1]]):
        assert table(layout, other, [0, 1]) is not known
    half = torch.zeros(300, dtype=BF16)
    assert table(layout, [half, None], [0, 1]).dtypes == 0b10


def test_only_so_many_tables_are_kept() -> None:
    layout, buffer = layout_of((1,)), torch.zeros(1000)
    first = table(layout, [buffer[:1]], [0])
    for i in range(1, 1000):
        table(layout, [buffer[i : i + 1]], [0])
    assert len(gradients._tables) == gradients._KEPT_TABLES
    assert table(layout, [buffer[:1]], [0]) is not first


def test_a_table_that_a_graph_reads_is_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_captured_tables", [])
    layout, buffer = layout_of((1,)), torch.zeros(1000)
    known = table(layout, [buffer[:1]], [0])
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "is_capturing", lambda device: True)
        assert table(layout, [buffer[:1]], [0]) is known
    for i in range(1, 1000):
        table(layout, [buffer[i : i + 1]], [0])
    assert gradients._captured_tables == [known]


@pytest.mark.parametrize("supply", [True, False])
def test_every_captured_launch_has_its_own_barrier(monkeypatch: pytest.MonkeyPatch, supply: bool) -> None:
    monkeypatch.setattr(launch, "_graph_barriers", {CPU: list(torch.zeros(2, 2, dtype=torch.int32))} if supply else {})
    monkeypatch.setattr(launch, "is_capturing", lambda device: True)
    words = [launch.barrier_words(CPU) for _ in range(3)]
    assert len({pair.data_ptr() for pair in words}) == 3
    assert all(pair.tolist() == [0, 0] for pair in words)


def test_a_captured_table_is_its_graphs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is filled by replays only, from memory that is never used again."""
    arena = torch.zeros(8, dtype=torch.int64)
    monkeypatch.setattr(gradients, "_arena", lambda: arena)
    monkeypatch.setattr(gradients, "_ARENA_NUMBERS", 8)
    monkeypatch.setattr(gradients, "_arena_used", 0)
    monkeypatch.setattr(gradients, "is_capturing", lambda device: True)
    layout, grad = layout_of((300,), (5,)), torch.zeros(300)
    for used in (4, 8):
        table(layout, [grad, None], [0, 1])
        assert gradients._arena_used == used
    assert arena[:4].tolist() == arena[4:].tolist() == [grad.data_ptr(), 0, 0, gradients.ABSENT.value]
    assert not gradients._tables
    with pytest.raises(RuntimeError, match="captured graphs hold tables of 8 gradient addresses, 4 more do not fit 8"):
        table(layout, [grad, None], [0, 1])
