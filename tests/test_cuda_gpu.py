"""What only a GPU can answer about the CUDA backend: barriers, streams and graphs, often.

With ``beta=0`` the EMA is the gradients, whatever it was: every launch must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from op_inputs import DEVICE, Row, Segments, array, arrivals
from torch import Tensor

from dbmtl_fused import backends

REASON = "DBMTL_FUSED_TEST_DEVICE is not cuda" if DEVICE.type != "cuda" else backends.why_not("cuda", "cuda")

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"needs the CUDA backend on a GPU: {REASON}")


class Problem:
    """Inputs and outputs of ``balance_``."""

    def __init__(self, rng: np.random.Generator, T: int, P: int, *, beta: float = 0.0) -> None:
        self.grads = torch.from_numpy(rng.standard_normal((T, P))).to(DEVICE, torch.float32)
        self.ema = torch.zeros_like(self.grads)
        self.beta = torch.tensor(beta, device=DEVICE)
        self.found_inf = torch.zeros((), device=DEVICE)
        self.out, self.norms, self.weights = (torch.empty(size, device=DEVICE) for size in (P, T, T))
        self.bad = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def run(self, backend: str = "cuda") -> None:
        written = self.out, self.norms, self.weights, self.found_inf
        backends.operators(backend).balance_(self.ema, self.grads, self.beta, None, "max", 1.0, 1e-8, *written)

    def expect(self) -> None:
        """What comes now is what must come from now on."""
        self.run()
        self.expected = self.out.clone(), self.norms.clone()

    def count(self) -> None:
        """Count differences, without waiting for the device."""
        out, norms = self.expected
        self.bad += (self.out != out).sum() + (self.norms != norms).sum()


def test_same_bits_in_many_launches(rng: np.random.Generator) -> None:
    problem = Problem(rng, 3, 4099)
    problem.expect()
    for _ in range(100_000):
        problem.run()
        problem.count()
    assert int(problem.bad) == 0


def test_same_bits_with_changing_grids(rng: np.random.Generator) -> None:
    """From one block to all of them, with and without what does not fit in shared memory."""
    problems = [
        Problem(rng, T, P) for T, P in ((1, 1), (3, 300), (3, 100_000), (5, 4097), (16, 70_001), (2, 4_000_000))
    ]
    for problem in problems:
        problem.expect()
    for index in rng.integers(0, len(problems), 10_000):
        problems[index].run()
        problems[index].count()
    assert [int(problem.bad) for problem in problems] == [0] * len(problems)


def test_same_bits_on_two_streams(rng: np.random.Generator) -> None:
    problems = [Problem(rng, 3, 200_003), Problem(rng, 5, 60_001)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for problem in problems:
        problem.expect()
    torch.cuda.synchronize()
    for _ in range(10_000):
        for problem, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                problem.run()
                problem.count()
    torch.cuda.synchronize()
    assert [int(problem.bad) for problem in problems] == [0, 0]


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def test_same_bits_in_many_replays(rng: np.random.Generator) -> None:
    problem = Problem(rng, 3, 100_003)
    problem.expect()
    graph = captured(problem.run)
    for _ in range(10_000):
        graph.replay()
        problem.count()
    assert int(problem.bad) == 0


def test_replays_read_beta_anew(rng: np.random.Generator) -> None:
    problem, eager = (Problem(np.random.default_rng(1), 3, 5003) for _ in range(2))
    graph = captured(problem.run)
    problem.ema.zero_()
    for k in range(1, 20):
        for each in (problem, eager):
            each.beta.fill_(0.9 / k**0.5)
        graph.replay()
        eager.run("reference")
        torch.testing.assert_close(problem.ema, eager.ema, rtol=0, atol=0)
        torch.testing.assert_close(problem.out, eager.out, rtol=1e-5, atol=1e-5)


class Beginning:
    """Inputs and outputs of ``begin_step``; a block has fewer threads than there are losses."""

    def __init__(self, rng: np.random.Generator, T: int = 300) -> None:
        self.losses = torch.from_numpy(rng.uniform(0.1, 2, T)).to(DEVICE, torch.float32)
        self.scale, self.step = torch.ones((), device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
        self.seeds, self.betas = torch.empty(T, device=DEVICE), torch.empty(T, device=DEVICE)
        self.inv_scale, self.found_inf = torch.empty((), device=DEVICE), torch.empty((), device=DEVICE)

    def run(self, backend: str = "cuda") -> None:
        written = self.seeds, self.betas, self.inv_scale, self.found_inf
        given = self.losses, None, self.scale, self.step, 0.9, 0.5, 1, 1e-8, False
        backends.operators(backend).begin_step(*given, *written)


def test_replays_begin_anew(rng: np.random.Generator) -> None:
    """What losses, scale and step are by then."""
    beginning, eager = (Beginning(np.random.default_rng(1)) for _ in range(2))
    graph = captured(beginning.run)
    for k in range(20):
        for each in (beginning, eager):
            each.losses.mul_(1.1)
            each.losses[k] = -1 if k % 2 else 1
            each.scale.fill_(2.0**k)
            each.step.fill_(k)
        graph.replay()
        eager.run("reference")
        torch.testing.assert_close(beginning.seeds, eager.seeds, rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(beginning.betas, eager.betas, rtol=1e-6, atol=0)
        torch.testing.assert_close(beginning.inv_scale, eager.inv_scale, rtol=1e-6, atol=0)
        assert bool(beginning.found_inf) == bool(eager.found_inf)


def test_flag_is_raised_after_it_is_lowered(rng: np.random.Generator) -> None:
    """By another warp than the one that lowers it."""
    beginning, bad = Beginning(rng), torch.zeros((), dtype=torch.int64, device=DEVICE)
    for index in rng.integers(0, 300, 10_000):
        kept = beginning.losses[index].clone()
        beginning.losses[index] = torch.nan
        beginning.run()
        bad += beginning.found_inf != 1
        beginning.losses[index] = kept
    beginning.run()
    assert int(bad) == int(beginning.found_inf) == 0


def test_runs_on_the_current_stream(rng: np.random.Generator) -> None:
    """What the stream has not done yet is waited for, and nothing else."""
    problem = Problem(rng, 3, 10_001)
    problem.expect()
    values = problem.grads.clone()
    problem.grads.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        problem.grads.copy_(values)
        problem.run()
        problem.count()
    torch.cuda.synchronize()
    assert int(problem.bad) == 0


def streaming_row(rng: np.random.Generator) -> tuple[Row, list[Tensor]]:
    numels = [100_000, 5, 4097, 300, 0, 70_001]
    segments = Segments.of(numels)
    grads = [torch.from_numpy(rng.standard_normal(numel)).to(DEVICE, torch.float32) for numel in numels]
    return Row(torch.zeros(segments.P, device=DEVICE), segments), grads


def test_last_block_is_known_in_many_launches(rng: np.random.Generator) -> None:
    """The sum of the partials is complete each time, and the counter is left at zero."""
    row, grads = streaming_row(rng)
    row.update("cuda", grads, beta=0.0)
    expected = float(sum(np.square(array(grad)).sum() for grad in grads))
    torch.testing.assert_close(float(row.sq_norm), expected, rtol=1e-5, atol=0)
    first, bad = row.sq_norm.clone(), torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(10_000):
        row.update("cuda", grads, beta=0.0)
        bad += row.sq_norm != first
    assert int(bad) == 0


def test_sums_of_blocks_are_complete_in_many_launches(rng: np.random.Generator) -> None:
    """Those of ``combine`` and ``gram``; the counter that they share is left at zero, and no step counted twice."""
    T, P = 5, 300_001
    ema = torch.from_numpy(rng.standard_normal((T, P))).to(DEVICE, torch.float32)
    sq_norms, found_inf, scale = ema.square().sum(1), torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)
    outputs = [torch.empty(size, device=DEVICE) for size in ((P,), (T,), (T,), (), ())]
    out, sq_norm = outputs[0], outputs[-1]
    products, counter = torch.empty(T, T, device=DEVICE), arrivals()
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)
    ops = backends.operators("cuda")

    def run() -> None:
        ops.combine(ema, sq_norms, None, found_inf, scale, "max", 1.0, 1e-8, False, *outputs, step, counter)
        ops.gram(ema, products, counter)

    run()
    torch.testing.assert_close(float(sq_norm), float(np.square(array(out)).sum()), rtol=1e-5, atol=0)
    exact = ema.double() @ ema.double().t()
    torch.testing.assert_close(products.double(), exact, rtol=0, atol=1e-5 * P)
    first, bad = (sq_norm.clone(), products.clone()), torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(10_000):
        run()
        bad += (sq_norm != first[0]) + (products != first[1]).sum()
    assert int(bad) == int(counter) == 0
    assert int(step) == 10_001


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_need_not_be_the_current_one(rng: np.random.Generator) -> None:
    grads = torch.from_numpy(rng.standard_normal((3, 5003))).to("cuda:1", torch.float32)
    ema, out = torch.zeros_like(grads), torch.empty(5003, device="cuda:1")
    norms, weights = (torch.empty(3, device="cuda:1") for _ in range(2))
    scalars = torch.zeros(2, device="cuda:1")
    with torch.cuda.device(0):
        backends.operators("cuda").balance_(
            ema, grads, scalars[0], None, "max", 1.0, 1e-8, out, norms, weights, scalars[1]
        )
    torch.testing.assert_close(ema, grads, rtol=0, atol=0)
