"""Operators under torch's own tools: opcheck, FakeTensorMode, meta tensors, torch.compile without graph breaks.

What is called is always the compiled object, and its results are compared with eager ones bit for bit: the operator is
opaque to the compiler, so that only its surroundings are compiled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from op_inputs import ALPHA_CONSTANT, DEVICE, EPS, Row, Segments, arrivals, assert_same_bits, flags, random_rows, tensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dbmtl_fused
from dbmtl_fused import backends

Call = tuple[Callable, tuple[Any, ...]]

# Inductor imports parts of torch that warn about other parts of torch.
quiet_inductor = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def begin_step_call(backend: str, rng: np.random.Generator) -> Call:
    losses, active = tensor(rng.uniform(1, 2, 3)), tensor([1, 0, 1], torch.bool)
    outputs = losses.new_zeros(3), losses.new_zeros(3), losses.new_zeros(()), flags()
    step = tensor(4, torch.int64)
    given = losses, active, tensor(2.0), step, 0.9, 0.5, 2, 1e-8, True
    return backends.operators(backend).begin_step, (*given, *outputs)


def balance_call(backend: str, rng: np.random.Generator) -> Call:
    ema, grads = tensor(random_rows(rng, 3, 130)), tensor(random_rows(rng, 3, 130), torch.bfloat16)
    outputs = ema.new_zeros(130), ema.new_zeros(3), ema.new_zeros(3), flags()
    return backends.operators(backend).balance_, (ema, grads, tensor(0.7), None, "max", ALPHA_CONSTANT, EPS, *outputs)


def combine_call(backend: str, rng: np.random.Generator) -> Call:
    ema = tensor(random_rows(rng, 3, 130))
    outputs = ema.new_zeros(130), ema.new_zeros(3), ema.new_zeros(3), ema.new_zeros(()), ema.new_zeros(())
    inputs = ema, ema.square().sum(1), tensor([1.0, 0.0, 2.0]), flags(), tensor(2.0), "median", ALPHA_CONSTANT, EPS
    step = torch.tensor(7, device=DEVICE)
    return backends.operators(backend).combine, (*inputs, True, *outputs, step, arrivals())


def gram_call(backend: str, rng: np.random.Generator) -> Call:
    ema = tensor(random_rows(rng, 3, 130))
    return backends.operators(backend).gram, (ema, ema.new_zeros(3, 3), arrivals())


def ema_update_call(backend: str, rng: np.random.Generator) -> Call:
    segments = Segments.of([5000, 12, 7])
    row = Row(tensor(rng.standard_normal(segments.P)), segments)
    grads = [tensor(rng.standard_normal((50, 100))).t(), None, tensor(rng.standard_normal(7), torch.float16)]
    written = row.partials.zero_(), row.sq_norm.zero_(), row.found_inf, row.arrivals
    scalars = tensor(0.7), tensor(0.5), None
    return backends.operators(backend).ema_update_, (
        row.row,
        grads,
        [0, 1, 2],
        segments.table,
        segments.chunk_table,
        *scalars,
        *written,
        False,
    )


calls = pytest.mark.parametrize(
    "make",
    [begin_step_call, balance_call, combine_call, ema_update_call, gram_call],
    ids=lambda make: make.__name__.removesuffix("_call"),
)


def clone(args: Any) -> Any:
    """A deep copy of arguments, tensors included."""
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, args)


def tensors(args: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]


@calls
def test_opcheck(backend: str, rng: np.random.Generator, make: Callable[..., Call]) -> None:
    """The schema tells the truth about mutation and aliasing, and the fake about shapes."""
    op, args = make(backend, rng)
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}


@calls
def test_fake_tensors(backend: str, rng: np.random.Generator, make: Callable[..., Call]) -> None:
    op, args = make(backend, rng)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
        assert op(*fake) is None


@calls
def test_meta_tensors(backend: str, rng: np.random.Generator, make: Callable[..., Call]) -> None:
    op, args = make(backend, rng)
    assert op(*torch.utils._pytree.tree_map_only(Tensor, lambda values: values.to("meta"), args)) is None


@pytest.mark.parametrize(
    ("make", "position", "wrong", "message"),
    [
        (begin_step_call, 0, (3, 1), "losses must be 1-D, got 2-D"),
        (begin_step_call, 1, (2,), "active must have shape (3,), got (2,)"),
        (begin_step_call, 9, (4,), "seeds must have shape (3,), got (4,)"),
        (begin_step_call, 10, (1, 3), "betas must have shape (3,), got (1, 3)"),
        (balance_call, 1, (3, 129), "ema (3, 130) and grads (3, 129) must have the same shape"),
        (balance_call, 7, (129,), "out must have shape (130,), got (129,)"),
        (balance_call, 8, (4,), "norms must have shape (3,), got (4,)"),
        (balance_call, 9, (3, 1), "weights must have shape (3,), got (3, 1)"),
        (combine_call, 1, (2,), "sq_norms must have shape (3,), got (2,)"),
        (combine_call, 2, (4,), "preference must have shape (3,), got (4,)"),
        (combine_call, 9, (1, 130), "out must have shape (130,), got (1, 130)"),
        (gram_call, 1, (3, 130), "out must have shape (3, 3), got (3, 130)"),
        (ema_update_call, 0, (1, 5632), "row must be 1-D, got 2-D"),
    ],
)
def test_fake_refuses_wrong_shapes(
    backend: str,
    rng: np.random.Generator,
    make: Callable[..., Call],
    position: int,
    wrong: tuple[int, ...],
    message: str,
) -> None:
    """A mistake shows while tracing, not when the compiled code runs."""
    op, args = make(backend, rng)
    args = [*torch.utils._pytree.tree_map_only(Tensor, lambda values: values.to("meta"), args)]
    args[position] = torch.empty(wrong, device="meta")
    with pytest.raises(RuntimeError) as caught:
        op(*args)
    assert message in str(caught.value)


@calls
def test_lazily_negated_tensors(backend: str, rng: np.random.Generator, make: Callable[..., Call]) -> None:
    """The imaginary part of a conjugate, say, whose memory holds the opposite: read or written, alone or in a list."""
    op, args = make(backend, rng)
    expected = clone(args)
    op(*expected)
    leaves, structure = torch.utils._pytree.tree_flatten(args)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        lazy = clone(leaves)
        lazy[i] = torch._neg_view(-leaf)
        op(*torch.utils._pytree.tree_unflatten(lazy, structure))
        assert lazy[i].is_neg()
        for actual, values in zip(tensors(lazy), tensors(expected), strict=True):
            assert torch.equal(actual, values), f"argument {i} of {op}"


@pytest.mark.parametrize("make", [balance_call, ema_update_call])
def test_gradients_that_are_zeros_without_memory(
    backend: str, rng: np.random.Generator, make: Callable[..., Call]
) -> None:
    op, args = make(backend, rng)
    lazy, expected = list(clone(args)), list(clone(args))
    if make is balance_call:
        lazy[1], expected[1] = torch._efficientzerotensor(3, 130, device=DEVICE), torch.zeros(3, 130, device=DEVICE)
    else:
        lazy[1][0], expected[1][0] = torch._efficientzerotensor(5000, device=DEVICE), torch.zeros(5000, device=DEVICE)
    op(*lazy)
    op(*expected)
    for actual, values in zip(tensors(lazy), tensors(expected), strict=True):
        assert torch.equal(actual.clone(), values)


def compilers() -> list[Any]:
    reason = "inductor needs a C++ compiler" if DEVICE.type == "cpu" and not shutil.which("g++") else ""
    return ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(bool(reason), reason=reason))]


@quiet_inductor
@calls
@pytest.mark.parametrize("compiler", compilers())
def test_compile(backend: str, rng: np.random.Generator, make: Callable[..., Call], compiler: str) -> None:
    """One graph, one compilation, the same bits, and mutation seen both before and behind the operator."""
    op, args = make(backend, rng)
    target = next(i for i, argument in enumerate(op._schema.arguments) if argument.is_write)

    def step(*args: Any) -> Tensor:
        args[target].mul_(1.5)
        op(*args)
        return args[target] * 2

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    eager_args, compiled_args = clone(args), clone(args)
    compiled(*clone(args))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):  # the second step starts from what the first has left
            assert_same_bits("result", compiled(*compiled_args), step(*eager_args))
    for actual, expected in zip(tensors(compiled_args), tensors(eager_args), strict=True):
        assert torch.equal(actual, expected)


@quiet_inductor
@pytest.mark.parametrize("compiler", compilers())
def test_compile_balance_function(backend: str, rng: np.random.Generator, compiler: str) -> None:
    """The public function with all its checks; beta is a tensor that changes from step to step."""

    def step(ema: Tensor, grads: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return dbmtl_fused.balance_(ema, grads * 2, beta, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    ema = tensor(random_rows(rng, 3, 130))
    compiled(ema.clone(), ema.clone(), tensor(0.1))
    eager_ema = ema.clone()
    with torch.compiler.set_stance("fail_on_recompile"):
        for beta in (0.9, 0.5):
            grads = tensor(random_rows(rng, 3, 130))
            actual = compiled(ema, grads, tensor(beta))
            for values, expected in zip(actual, step(eager_ema, grads, tensor(beta)), strict=True):
                assert_same_bits("output", values, expected)
            assert_same_bits("ema", ema, eager_ema)
