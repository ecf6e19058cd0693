"""bfloat16 state: stochastic rounding, drawn from (seed, column) and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_inputs import (
    DEVICE,
    GRAD_DTYPES,
    SEED,
    Row,
    Segments,
    assert_same_bits,
    flags,
    random_rows,
    run_balance,
    tensor,
)
from torch import Tensor

from dbmtl_fused import backends, rounding
from dbmtl_fused._ops import ENTRY_LIMIT

WORD = 2**32


def mix(word: int) -> int:
    word ^= word >> 16
    word = word * 0x7FEB352D % WORD
    word ^= word >> 15
    word = word * 0x846CA68B % WORD
    return word ^ word >> 16


def random_bits(seed: int, column: int) -> int:
    """The documented formula on Python's integers."""
    low, high = seed % WORD, seed // WORD % WORD
    key = mix(low ^ mix((high + 0x9E3779B9) % WORD))
    return mix(column % WORD ^ column // WORD ^ key) >> 16


def test_random_bits_are_the_documented_ones(rng: np.random.Generator) -> None:
    columns = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, *rng.integers(0, 2**33, 50)])
    for seed in (0, 1, SEED, -1, -(2**63), 2**63 - 1, int(rng.integers(-(2**63), 2**63))):
        found = rounding.random_bits(torch.tensor(seed), columns)
        assert found.tolist() == [random_bits(seed, int(column)) for column in columns]


def test_random_bits_are_uniform_and_independent() -> None:
    """Over columns, over successive seeds, and between the two: counts of 16 x 16 pairs against their expectation."""
    count = 2**18
    line = torch.arange(count)
    zero, one = torch.tensor(0), torch.tensor(1)
    pairs = {
        "neighbouring columns": (rounding.random_bits(zero, line), rounding.random_bits(zero, line + 1)),
        "neighbouring seeds": (rounding.random_bits(zero, line), rounding.random_bits(one, line)),
        "one column, seed after seed": (rounding.random_bits(line, zero), rounding.random_bits(line + 1, zero)),
    }
    for name, (a, b) in pairs.items():
        counts = torch.bincount((a >> 12) * 16 + (b >> 12), minlength=256).double()
        expected = count / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 255 - 6 * 22.6 < chi_square < 255 + 6 * 22.6, name  # 22.6: its standard deviation


def rounded(backend: str, values: Tensor, seed: int) -> Tensor:
    """``values`` after a step that rounds them and does nothing else."""
    ema, out = torch.zeros(values.shape, dtype=torch.bfloat16, device=DEVICE), values.new_empty(values.shape[1])
    small = values.new_empty(len(values)), values.new_empty(len(values)), flags()
    op = backends.operators(backend).balance_
    op(ema, values, tensor(0.0), torch.tensor(seed, device=DEVICE), "none", 1.0, 1e-8, out, *small)
    return ema


def test_values_become_one_of_their_neighbours(backend: str, rng: np.random.Generator) -> None:
    values = tensor(random_rows(rng, 3, 4099))
    found = rounded(backend, values, SEED).float()
    toward_zero = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    away = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    up = found == away
    assert (up | (found == toward_zero)).all()
    assert 0.45 < float(up.double().mean()) < 0.55
    exact = values.bfloat16().float()
    assert torch.equal(rounded(backend, exact, SEED).float(), exact)


def test_rounding_is_unbiased(backend: str) -> None:
    """A value three tenths of the way to its neighbour goes up in three tenths of the cases; to nearest, in none."""
    value = 1 + 0.3 * 2**-7
    found = rounded(backend, torch.full((4, 2**16), value, device=DEVICE), 7).double()
    deviation = 2**-7 * (0.3 * 0.7 / found.numel()) ** 0.5
    assert abs(float(found.mean()) - value) < 5 * deviation
    assert set(found.unique().tolist()) == {1.0, 1 + 2**-7}


def test_small_updates_are_not_lost(backend: str) -> None:
    """A hundred steps each of a hundredth of what bfloat16 resolves; rounded to nearest, the EMA would not move."""
    P, steps, beta = 4096, 100, 0.99
    ema, grads = torch.ones(1, P, dtype=torch.bfloat16, device=DEVICE), torch.full((1, P), 1.0078125, device=DEVICE)
    nearest, op = ema.clone(), backends.operators(backend).balance_
    for k in range(steps):
        small = grads.new_empty(1), grads.new_empty(1), flags()
        seed = torch.tensor(k, device=DEVICE)
        op(ema, grads, tensor(beta), seed, "none", 1.0, 1e-8, grads.new_empty(P), *small)
        nearest = (beta * nearest.float() + (1 - beta) * grads).bfloat16()
    assert (nearest == 1).all()
    moved = (float(ema.double().mean()) - 1) / 2**-7
    assert abs(moved - (1 - beta**steps)) < 0.05


@pytest.mark.parametrize("sign", [1, -1])
def test_no_step_goes_beyond_the_limit(backend: str, sign: int) -> None:
    """Half a step below it is rounded to it or down; half a step above it is held back, although it could go down."""
    limit = sign * ENTRY_LIMIT[torch.float32]
    ema = torch.ones(1, 512, dtype=torch.bfloat16, device=DEVICE)
    result = run_balance(backend, ema, torch.full((1, 512), limit * (1 - 2.0**-9), device=DEVICE), 0.0)
    assert set(ema.unique().tolist()) == {limit, limit * (1 - 2.0**-8)}
    assert not result.found_inf
    ema.fill_(1)
    result = run_balance(backend, ema, torch.full((1, 512), limit * (1 + 2.0**-9), device=DEVICE), 0.0)
    assert (ema == 1).all()
    assert float(result.found_inf) == 1


def mismatches(actual: Tensor, expected: Tensor) -> float:
    return float((actual.view(torch.int16) != expected.view(torch.int16)).double().mean())


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_every_backend_draws_the_same(backend: str, rng: np.random.Generator, dtype: torch.dtype) -> None:
    ema, grads = tensor(random_rows(rng, 3, 9001), torch.bfloat16), tensor(random_rows(rng, 3, 9001), dtype)
    found = run_balance(backend, ema.clone(), grads, 0.7).ema
    assert_same_bits("ema", found, run_balance("reference", ema.clone(), grads, 0.7).ema)


def test_rows_of_both_ways_are_rounded_alike(backend: str, rng: np.random.Generator) -> None:
    """Row ``t`` of ``balance_`` takes ``seed + t``, columns count from the start of the row."""
    ema, grads = tensor(random_rows(rng, 3, 9001), torch.bfloat16), tensor(random_rows(rng, 3, 9001))
    expected = run_balance(backend, ema.clone(), grads, 0.75).ema
    segments = Segments.of([5000, 4001], align=1)
    first = Row(ema[0].clone(), segments).update(backend, list(grads[0].split([5000, 4001])))
    assert_same_bits("row", first.row, expected[0])
    assert mismatches(expected[1], expected[0]) > 0.5


@pytest.mark.parametrize("parts", [2, 5])
def test_rounding_does_not_depend_on_bucketing(backend: str, rng: np.random.Generator, parts: int) -> None:
    segments = Segments.of([100, 5000, 4096, 7, 300])
    grads = [tensor(rng.standard_normal(n)) for n in (100, 5000, 4096, 7, 300)]
    start = tensor(rng.standard_normal(segments.P), torch.bfloat16)
    expected = Row(start.clone(), segments).update(backend, grads).state()
    row = Row(start.clone(), segments)
    for slots in np.array_split(rng.permutation(5), parts):
        row.update(backend, [grads[slot] for slot in slots], slots.tolist())
    for name, values in row.state().items():
        assert_same_bits(name, values, expected[name])


@pytest.mark.parametrize("op", ["balance_", "ema_update_"])
def test_a_seed_belongs_to_bfloat16_state(backend: str, op: str) -> None:
    """Without one there would be nothing to draw from; with one, other state would silently not be rounded."""
    seed = torch.tensor(1, device="meta")
    for dtype, given in ((torch.bfloat16, None), (torch.float32, seed)):
        meta = {"dtype": dtype, "device": "meta"}
        scalar, vector = torch.empty((), device="meta"), torch.empty(3, device="meta")
        ema = torch.empty(3, 5, **meta)
        chunk = torch.empty(1, 3, dtype=torch.int64, device="meta")
        arguments = {
            "balance_": (ema, ema, scalar, given, "max", 1.0, 1e-8, torch.empty(5, device="meta"), vector, vector),
            "ema_update_": (ema[0], [ema[0]], [0], chunk, chunk, scalar, scalar, given, vector[:1], scalar, scalar),
        }[op]
        rest = (scalar,) if op == "balance_" else (scalar.int(), False)
        with pytest.raises(RuntimeError, match="seed must be given if and only if"):
            getattr(backends.operators(backend), op)(*arguments, *rest)
