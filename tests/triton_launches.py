"""What Triton kernels would be launched with: the host's side on meta tensors, with kernels that only take notes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from dbmtl_fused._ops import compute_dtype
from dbmtl_fused.layout import FlatLayout
from dbmtl_fused.triton_kernels import balance, begin_step, combine, ema_update, gradients, gram

P = 10_000_384  # long enough for the launch parameters of large matrices; rows are aligned
MULTIPROCESSORS = 132

Launch = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, its parameters, options of the compiler


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            parameters = dict(zip(names, args, strict=False))
            parameters |= {name: kwargs.pop(name) for name in names if name in kwargs}
            self.launches.append((self.kernel, parameters, kwargs))

        return launch


def recording(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launch]:
    """``record(module, function, *args)``: the last launch of a kernel of ``module`` by ``function``."""
    for module in (balance, begin_step, combine, ema_update, gram):
        monkeypatch.setattr(module, "on_device", lambda tensor: nullcontext())
    monkeypatch.setattr(gradients, "current_stream", lambda device: 0)
    for module in (balance, gram):
        monkeypatch.setattr(module, "multiprocessors", lambda device: MULTIPROCESSORS)
    monkeypatch.setattr(balance, "target", lambda: "cuda")
    monkeypatch.setattr(balance, "barrier_words", lambda device: meta(2, dtype=torch.int32))

    def record(module: Any, function: Callable[..., None], *args: Any) -> Launch:
        (name,) = [name for name in vars(module) if name.endswith("_kernel")]
        recorder = Recorder(getattr(module, name))
        with monkeypatch.context() as patch:
            patch.setattr(module, name, recorder)
            function(*args)
        return recorder.launches[-1]

    return record


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def seed_for(state_dtype: torch.dtype) -> Tensor | None:
    return meta(dtype=torch.int64) if state_dtype is torch.bfloat16 else None


def begin_step_launch(
    record: Any,
    T: int,
    losses: torch.dtype,
    betas: torch.dtype,
    *,
    active: bool = False,
    beta: float = 0.9,
    beta_sigma: float = 0.5,
    micro_batches: int = 1,
    log_eps: float | None = 1e-8,
    accumulate: bool = False,
) -> Launch:
    inputs = meta(T, dtype=losses), meta(T, dtype=torch.bool) if active else None
    scalars = meta(dtype=losses), meta(dtype=torch.int64), beta, beta_sigma, micro_batches, log_eps, accumulate
    written = meta(T, dtype=losses), meta(T, dtype=betas), meta(dtype=betas), meta()
    return record(begin_step, begin_step.begin_step, *inputs, *scalars, *written)


def balance_launch(record: Any, T: int, state: torch.dtype, grads: torch.dtype, columns: int = P) -> Launch:
    ema, dtype = meta(T, columns, dtype=state), compute_dtype(state)
    outputs = meta(columns, dtype=grads), meta(T, dtype=dtype), meta(T, dtype=dtype), meta()
    inputs = ema, meta(T, columns, dtype=grads), meta(dtype=dtype), seed_for(state), "max", 1.0, 1e-8
    return record(balance, balance.balance_, *inputs, *outputs)


def combine_launch(
    record: Any, T: int, state: torch.dtype, out: torch.dtype, accumulate: bool = False, preference: bool = False
) -> Launch:
    dtype = compute_dtype(state)
    vectors = meta(T, dtype=dtype), meta(T, dtype=dtype) if preference else None
    inputs = meta(T, P, dtype=state), *vectors, meta(), meta(dtype=dtype), "max", 1.0, 1e-8, accumulate
    written = meta(P, dtype=out), meta(T, dtype=dtype), meta(T, dtype=dtype), meta(dtype=dtype), meta(dtype=dtype)
    return record(combine, combine.combine, *inputs, *written, meta(dtype=torch.int64), meta(dtype=torch.int32))


def gram_launch(record: Any, T: int, state: torch.dtype) -> Launch:
    ema, out = meta(T, P, dtype=state), meta(T, T, dtype=compute_dtype(state))
    return record(gram, gram.gram, ema, out, meta(dtype=torch.int32))


def ema_update_launch(record: Any, state: torch.dtype, *grads: torch.dtype) -> Launch:
    layout = FlatLayout([(str(i), torch.empty(64, 64, device="meta")) for i in range(len(grads))])
    dtype = compute_dtype(state)
    inputs = [meta(64, 64, dtype=grad) for grad in grads], range(len(grads)), layout.segments, layout.chunks
    scalars = meta(dtype=dtype), meta(dtype=dtype), seed_for(state)
    written = meta(layout.num_chunks, dtype=dtype), meta(dtype=dtype), meta(), meta(dtype=torch.int32)
    return record(ema_update, ema_update.ema_update_, meta(layout.P, dtype=state), *inputs, *scalars, *written, False)
