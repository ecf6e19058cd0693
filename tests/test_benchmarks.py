"""The benchmarks measure what they say: same answers, right arithmetic, consistent JSON. No time is judged."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dbmtl_fused import oracle

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import (
    bandwidth,
    bench_lists,
    bench_memory,
    bench_ops,
    comparators,
    list_comparators,
    plan,
    run,
    steps,
    timing,
)
from benchmarks.models import MultiTaskMLP, Size
from benchmarks.report import Section
from benchmarks.timing import Bar, Quartiles, Sample
from benchmarks.workers import SETTLING_CALLS, Worker, can_keep_memory, keep_memory

ROOT = Path(__file__).resolve().parent.parent
TINY = Size(depth=2, width=16, tasks=3, batch=4)
BETA = 0.7
MEASURED = plan.Options(torch.device("cpu"), rounds=2, quick=False, threads=1, compiled=False, data=None)


@pytest.mark.parametrize("name", comparators.factories())
@pytest.mark.parametrize(("T", "P"), [(1, 5), (3, 1000), (11, 257)])
def test_one_shot_comparators_agree_with_the_oracle_for_several_steps(name: str, T: int, P: int) -> None:
    ema, grads = comparators.inputs(T, P)
    candidate = comparators.factories()[name](ema, grads, BETA)
    expected = ema.double().numpy()
    for _ in range(3):
        expected = oracle.ema_update(expected, grads.double().numpy(), BETA).ema
        out = candidate()
    norms = np.sqrt((expected**2).sum(1))
    total = (norms.max() / (norms + comparators.EPS)) @ expected
    np.testing.assert_allclose(
        candidate.ema.numpy(), expected.astype(float), rtol=1e-5, atol=1e-6 * abs(expected).max()
    )
    np.testing.assert_allclose(out.numpy(), total.astype(float), rtol=1e-5, atol=1e-6 * float(abs(total).max()))


def test_the_float64_computation_of_the_benchmarks_is_the_oracles() -> None:
    ema, grads = comparators.inputs(3, 100)
    updated, total = comparators.exact(ema, grads, BETA)
    expected = oracle.ema_update(ema.double().numpy(), grads.double().numpy(), BETA).ema
    norms = np.sqrt((expected**2).sum(1))
    np.testing.assert_allclose(updated.numpy(), expected.astype(float), rtol=1e-14)
    np.testing.assert_allclose(
        total.numpy(), ((norms.max() / (norms + comparators.EPS)) @ expected).astype(float), rtol=1e-13
    )


class _Wrong(comparators.TightEager):
    """Off by a per mille in one entry of ``out``, or NaN there."""

    factor = 1 + 1e-3

    def __call__(self) -> Tensor:
        out = super().__call__()
        out[out.abs().argmax()] *= self.factor
        return out


class _Nan(_Wrong):
    factor = float("nan")


@pytest.mark.parametrize("wrong", [_Wrong, _Nan])
def test_a_comparator_with_another_answer_is_refused(wrong: type[_Wrong]) -> None:
    ema, grads = comparators.inputs(3, 100)
    with pytest.raises(
        AssertionError, match=r"^some name differs from float64 by .* of the largest entry, more than 1e-04"
    ):
        comparators.check("some name", wrong(ema, grads, BETA), comparators.exact(ema, grads, BETA))


class _SubtlyWrong(comparators.TightEager):
    """Weights off by a per mille of what they are more than 1: less than is allowed for rounding at large sizes."""

    def __call__(self) -> Tensor:
        out = super().__call__()
        return out.add_(self.ema.sum(0), alpha=-1e-3)


def test_what_rounding_would_hide_at_the_size_that_is_timed_is_refused_at_a_small_one() -> None:
    ema, grads = comparators.inputs(3, 100)
    wrong, expected = _SubtlyWrong(ema, grads, BETA), comparators.exact(ema, grads, BETA)
    assert comparators.check(comparators.TIGHT, wrong, expected, comparators.rtol(comparators.TIGHT)) > comparators.RTOL
    for name in (comparators.TIGHT, comparators.kept(comparators.LIBMTL)):
        with pytest.raises(AssertionError, match=r"differs from float64 by .*, more than 1e-04$"):
            bench_ops._build(3, 100, bench_ops._Group({name: _SubtlyWrong}), torch.device("cpu"), True)


def test_only_torchs_own_operators_are_allowed_more() -> None:
    allowed = {name: comparators.rtol(name) for name in comparators.factories(compiled=True)}
    more = {comparators.LIBMTL, comparators.TIGHT, comparators.FOREACH}
    assert {name for name, rtol in allowed.items() if rtol != comparators.RTOL} == more


def test_a_way_from_lists_that_is_subtly_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(list_comparators.TightFlatten):
        def __call__(self) -> None:
            super().__call__()
            self.out.mul_(1 + 1e-3)

    monkeypatch.setitem(list_comparators.KINDS, "wrong", Wrong)
    params = bench_lists.QUICK["two layers"]
    assert bench_lists._checked(params, ["wrong"], comparators.LARGE_RTOL)[1]["wrong"] > comparators.RTOL
    with pytest.raises(AssertionError, match=r"^wrong differs from float64 by .*, more than 1e-04$"):
        bench_lists._build(params, ["wrong"], True)


def test_comparators_share_no_memory() -> None:
    ema, grads = comparators.inputs(2, 10)
    built = [build(ema, grads, BETA) for build in comparators.factories().values()]
    tensors = [tensor for candidate in built for tensor in vars(candidate).values() if isinstance(tensor, Tensor)]
    addresses = [tensor.data_ptr() for tensor in (ema, grads, *tensors)]
    assert len(set(addresses)) == len(addresses)


def test_all_ways_to_do_the_step_leave_the_same_gradients() -> None:
    errors = steps.check(TINY, steps=4)
    assert errors.keys() == steps.BALANCED.keys()


def test_a_way_with_other_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(steps.TorchInHook):
        def next_beta(self) -> float:
            return super().next_beta() / 2

    monkeypatch.setitem(steps.BALANCED, "halved", Halved)
    with pytest.raises(AssertionError, match=r"^gradients of 'halved' differ from float64"):
        steps.check(TINY)


def test_a_way_with_subtly_other_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(steps.TorchFlatten):
        def backward(self, losses: list[Tensor]) -> None:
            super().backward(losses)
            for p in self.model.shared():
                assert p.grad is not None
                p.grad.mul_(1 + 1e-3)

    monkeypatch.setitem(steps.BALANCED, "wrong", Wrong)
    with pytest.raises(AssertionError, match=r"^gradients of 'wrong' .*, more than 1e-04$"):
        steps.check(TINY)


def test_every_way_that_is_measured_on_a_gpu_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    measured, ways = steps.subjects(cuda), steps.balanced(cuda)
    assert measured.keys() - ways.keys() == {**steps.PARTS, **steps.FLOORS, **steps.OTHERS}.keys()
    assert steps.LibMTLOnDevice in ways.values()
    monkeypatch.setattr(steps, "balanced", lambda device: ways)
    assert steps.check(TINY).keys() == ways.keys()


def test_a_floor_that_keeps_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.FLOORS, "keeps", steps.TorchFlatten)
    with pytest.raises(AssertionError, match=r"^'keeps' left gradients"):
        steps.check(TINY)


def test_the_step_of_libmtls_way_follows_algorithm_1() -> None:
    step = steps.LibMTL(TINY)
    parameters = step.model.shared()
    ema = np.zeros((TINY.tasks, TINY.P))
    for k in range(1, 4):
        step()
        logs = [torch.log(l + steps.LOG_EPS) for l in step.model.losses()]
        grads = [torch.autograd.grad(l, parameters, retain_graph=True) for l in logs]
        rows = np.stack([np.concatenate([g.double().numpy().ravel() for g in row]) for row in grads])
        ema = np.asarray(oracle.ema_update(ema, rows, steps.BETA / k**steps.BETA_SIGMA).ema, dtype=float)
    norms = np.linalg.norm(ema, axis=1)
    expected = (norms.max() / (norms + comparators.EPS)) @ ema
    found = np.concatenate([p.grad.numpy().ravel() for p in parameters if p.grad is not None])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


def test_sizes_and_bytes() -> None:
    assert Size().P == 8_396_800
    assert sum(p.numel() for p in MultiTaskMLP(TINY).shared()) == TINY.P
    assert bandwidth.fused_bytes(3, 100) == 13 * 100 * 4
    copy = bandwidth.Copy(bandwidth.fused_bytes(3, 100))
    assert copy.source.nbytes + copy.target.nbytes == 13 * 100 * 4


def test_quartiles() -> None:
    assert Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert Quartiles.of([2.0, 1.0]) == (1.25, 1.5, 1.75)
    assert Quartiles.of([7.0]) == (7.0, 7.0, 7.0)


def test_candidates_take_turns_and_warm_up_is_thrown_away() -> None:
    order: list[str] = []

    def candidate(name: str) -> Sample:
        order.append(name)
        return Sample(float(len(order)))

    samples = timing.interleave(
        {"a": lambda: candidate("a"), "b": lambda: candidate("b")}, rounds=3, warmup=2, title="turns"
    )
    assert order == ["a", "b"] * 5
    assert samples == {"a": [Sample(5.0), Sample(7.0), Sample(9.0)], "b": [Sample(6.0), Sample(8.0), Sample(10.0)]}


def test_figures_are_formed_within_a_round() -> None:
    samples = {"own": [Sample(2.0), Sample(30.0)], "floor": [Sample(1.0), Sample(10.0)]}
    assert timing.per_round(lambda own, floor: own / floor, samples, "own", "floor") == [2.0, 3.0]
    assert timing.per_round(lambda floor, own: own - floor, samples, "floor", "own") == [1.0, 20.0]


def test_a_fast_function_is_called_many_times_for_a_sample() -> None:
    count = 0

    def function() -> None:
        nonlocal count
        count += 1

    calls = timing.calls_lasting(function, 1e-3)
    assert calls > 10
    before = count
    timing.sample(function, calls)
    assert count - before == calls
    assert timing.calls_lasting(lambda: time.sleep(2e-3), 1e-3) == 1


@pytest.mark.parametrize(
    ("at_least", "values", "passed"),
    [
        (True, [9.0, 10.0, 30.0], True),
        (True, [9.9, 9.9, 30.0], False),
        (False, [1.0, 10.0, 30.0], True),
        (False, [11.0], False),
    ],
)
def test_a_bar_is_judged_by_the_median(at_least: bool, values: list[float], passed: bool) -> None:
    bar = Bar("name", 10.0, at_least, values)
    assert bar.passed is passed
    assert bar.to_json()["median"] == statistics.median(values)
    assert bar.to_json()["relation"] == (">=" if at_least else "<=")


def test_a_section_writes_its_raw_samples() -> None:
    samples = {"a": [Sample(1.0, 2.0), Sample(3.0, 4.0)], "b": [Sample(2.0), Sample(2.0)]}
    section = Section("title", samples, [Bar("bar", 1.0, True, [1.0])], bytes_moved=10, copy="b", ratio_to="b")
    written = json.loads(json.dumps(section.to_json()))
    assert written["candidates"]["a"]["samples"] == [
        {"seconds": 1.0, "page_faults": 2.0},
        {"seconds": 3.0, "page_faults": 4.0},
    ]
    assert written["candidates"]["a"]["seconds"] == {"q1": 1.5, "median": 2.0, "q3": 2.5}
    assert "title" in section.to_text()


def test_gradients_in_flight_are_counted_while_they_live() -> None:
    sizes = [p.numel() * 4 for p in MultiTaskMLP(TINY).shared()]
    # The loop that drops gradients after the backward has them all at its end.
    assert bench_memory.peak_of_gradients(steps.DropAfter(TINY)) == sum(sizes)
    # Taken one by one; in flight is the one that arrives, and at most one that the engine has not let go of yet.
    assert max(sizes) <= bench_memory.peak_of_gradients(steps.Fused(TINY, bucket_bytes=1)) <= 2 * max(sizes)


def test_tensors_at_the_peak_are_those_torch_allocated() -> None:
    kept, passing = 1_000_000, 3_000_000

    class Subject(steps.DropAfter):
        def __call__(self) -> None:
            torch.empty(passing, dtype=torch.uint8)
            self.kept = torch.empty(kept, dtype=torch.uint8)

    # The buffer of the step before lives until the new one is assigned.
    model = bench_memory.peak_of_tensors(None, steps.DropAfter, TINY)
    assert passing + kept <= bench_memory.peak_of_tensors(None, Subject, TINY) <= passing + kept + model


def test_a_quick_run_measures_everything_and_writes_consistent_json(tmp_path: Path) -> None:
    out = tmp_path / "results" / "quick.json"
    # One thread: two on a busy machine wait for each other.
    arguments = ["bench", "all", "--quick", "--threads", "1", "--data", str(tmp_path), "--out", str(out)]
    command = [sys.executable, "-m", "dbmtl_fused", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    written = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "dirty", "environment", "settings", "sections"} <= written.keys()
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["threads"] == 1
    assert written["backend"] in written["backends"]
    kinds = [section["kind"] for section in written["sections"]]
    assert kinds == ["balance"] * 2 + ["lists", "step", "memory"] + ["memory growth"] * 2 + ["growth"] * 4
    ((title, reason),) = written["left_out"].items()
    assert title.startswith("step: QM9")
    assert reason.startswith("needs QM9: ")
    assert f"{title}\nleft out: {reason}" in ran.stdout

    bars = [bar for section in written["sections"] for bar in section["bars"]]
    assert len(bars) == 3 + 2 + 2 + 3
    for bar in bars:
        _check_bar(bar)
        assert bar["name"] in ran.stdout
    for section in written["sections"]:
        for candidate in section["candidates"].values():
            seconds = [sample["seconds"] for sample in candidate["samples"]]
            assert len(seconds) == written["settings"]["rounds"]
            assert candidate["seconds"]["median"] == pytest.approx(statistics.median(seconds))
        if section["checks"]:
            assert max(section["checks"]["errors"].values()) <= section["checks"]["rtol"]
            assert {section["copy"], section["ratio_to"]} <= section["candidates"].keys()
    step, memory = written["sections"][3:5]
    assert {*steps.PARTS, *steps.FLOORS, *steps.BALANCED, *steps.OTHERS} < step["candidates"].keys()
    peaks = memory["megabytes"]
    assert peaks["DBMTL"]["tensors"] > peaks["drop after backward"]["tensors"] > 0


def test_a_table_for_which_no_time_is_left_is_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "none.json"
    with mock.patch("torch.set_num_threads"), mock.patch.dict("os.environ"):
        assert run.main(["ops", "--device", "cpu", "--quick", "--seconds", "-1", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["sections"] == []
    assert set(written["left_out"].values()) == {"no time left of -1 s"}
    assert "left out: no time left" in capsys.readouterr().out


def test_a_table_that_does_not_fit_into_memory_is_left_out() -> None:
    with pytest.raises(plan.LeftOut, match=r"^needs 1000000000\.0 GB of memory, \d+\.\d GB may be taken$"):
        plan.require_memory(1e18, torch.device("cpu"))


def test_a_subject_lives_in_a_process_of_its_own() -> None:
    with Worker(1, _State, 3, forked=True) as worker:
        assert worker.call(_State.add, 4) == 7
        assert worker.call(_State.add, 4) == 11
        with pytest.raises(ValueError, match=r"^no more$"):
            worker.call(_State.fail)


@pytest.mark.skipif(not can_keep_memory(), reason="malloc is not glibc's")
def test_where_malloc_keeps_memory_no_page_comes_from_the_system_twice() -> None:
    pages = _Allocating.BYTES // 4096
    with Worker(1, _Allocating, forked=True) as worker:
        assert worker.call(_Allocating.page_faults) >= 0.9 * pages
        worker.call(_Allocating.keep)
        assert worker.call(_Allocating.page_faults) <= 0.01 * pages


class _Allocating:
    """Writes to a block larger than any that malloc keeps by default."""

    BYTES = 40_000_000

    def __call__(self) -> None:
        torch.empty(self.BYTES, dtype=torch.uint8).zero_()

    def keep(self) -> None:
        keep_memory()
        for _ in range(SETTLING_CALLS):
            self()

    def page_faults(self) -> float:
        return timing.sample(self, calls=3).page_faults


@pytest.mark.skipif(not can_keep_memory(), reason="malloc is not glibc's")
def test_what_allocates_is_measured_in_both_states_of_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    T, P = 2, 4_500_000  # a matrix of 36 MB
    # Its thousands of blocks would take most of this test's time.
    kinds = {name: kind for name, kind in comparators.factories().items() if name != "dbmtl_fused reference"}
    monkeypatch.setattr(comparators, "factories", lambda **_: kinds)
    section = bench_ops._shape("title", T, P, [comparators.LIBMTL], MEASURED)
    again = [comparators.kept(name) for name in comparators.ALLOCATING]
    assert list(section.samples) == [bandwidth.COPY, *kinds, *again]
    faults = {name: [sample.page_faults for sample in of] for name, of in section.samples.items()}
    pages = T * P * 4 / 4096
    # Of one matrix at least. Now and then a call finds a hole as large that was freed before.
    assert max(faults[comparators.LIBMTL]) > 0.9 * pages, faults[comparators.LIBMTL]
    assert min(faults[comparators.kept(comparators.LIBMTL)]) < 0.01 * pages
    assert section.checks["errors"].keys() == {*kinds, *again}
    (bar,) = section.bars
    assert bar.name == f"title: {comparators.LIBMTL} / {section.ratio_to}"

    grown = bench_ops._growth("title", "P", T, P, MEASURED)
    assert grown.facts == {"T": T, "P": P, "series": "P", "malloc": "kept"}
    assert min(sample.page_faults for sample in grown.samples[comparators.LIBMTL]) < 0.01 * pages


def test_where_malloc_cannot_be_told_to_keep_memory_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "can_keep_memory", lambda: False)
    small = bench_ops._shape("title", 2, 1_000, [], MEASURED)
    assert "malloc keeps blocks of up to 32 MB anyway" in small.notes
    monkeypatch.setattr(bench_ops, "KEPT_BY_DEFAULT", 0)  # no matrix is small
    section = bench_ops._shape("title", 2, 1_000, [], MEASURED)
    assert f"left out: {comparators.kept(comparators.LIBMTL)} (malloc is not glibc's)" in section.notes
    assert comparators.kept(comparators.LIBMTL) not in section.samples
    assert bench_ops._growth("title", "P", 2, 1_000, MEASURED).facts["malloc"] == "default"


def test_a_table_of_lists_is_measured_in_a_process_of_its_own() -> None:
    section = bench_lists._model("title", "few", bench_lists.QUICK["two layers"], MEASURED)
    assert list(section.samples) == [bandwidth.COPY, *list_comparators.KINDS]
    assert section.checks["errors"].keys() == list_comparators.KINDS.keys()


class _State:
    def __init__(self, value: int) -> None:
        self.value = value

    def add(self, more: int) -> int:
        self.value += more
        return self.value

    def fail(self) -> None:
        raise ValueError("no more")


def _check_bar(bar: dict[str, Any]) -> None:
    assert bar["q1"] <= bar["median"] <= bar["q3"]
    assert bar["median"] == pytest.approx(statistics.median(bar["values"]))
    reached = bar["median"] >= bar["target"] if bar["relation"] == ">=" else bar["median"] <= bar["target"]
    assert bar["passed"] is reached
