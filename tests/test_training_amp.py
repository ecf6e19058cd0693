"""Shared parameters of several dtypes in one balancer, and ``.grad`` in another dtype than its parameter's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from op_inputs import DEVICE
from small_models import LOSS_SCALES, Algorithm1, flat, relative_error
from torch import Tensor, nn

from dbmtl_fused import DBMTL

Rng = np.random.Generator
SCALE = 64.0

captures = pytest.mark.parametrize("bucket_bytes", [None, 64], ids=["from .grad", "buckets"])


class Mixed(nn.Module):
    """Layers of the given dtypes, one after the other, and three heads in float32."""

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.ModuleList(nn.Linear(24, 24, dtype=dtype) for dtype in dtypes)
            self.heads = nn.ModuleList(nn.Linear(24, 2) for _ in LOSS_SCALES)
        self.to(DEVICE)

    def batch_losses(self, rng: Rng) -> list[Tensor]:
        x, target = (torch.from_numpy(rng.standard_normal((8, n))).to(DEVICE) for n in (24, 2))
        for layer in self.encoder:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return [
            scale * (head(x.float()) - target.float()).square().mean()
            for scale, head in zip(LOSS_SCALES, self.heads, strict=True)
        ]


def assert_grads_follow_algorithm1(
    net: Mixed, backend: str, bucket_bytes: int | None, rng: Rng, grad_dtypes: Sequence[torch.dtype]
) -> DBMTL:
    """Layer by layer, to what the dtype of ``.grad`` resolves.

    The oracle differentiates the scaled logs, as the balancer does: through 16-bit layers other seeds would round to
    other gradients.
    """
    shared: list[Tensor] = list(net.encoder.parameters())
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend, bucket_bytes=bucket_bytes)
    expected, scaler = Algorithm1(shared, log_losses=False), torch.amp.GradScaler(DEVICE.type, init_scale=SCALE)
    for _ in range(4):
        losses = net.batch_losses(rng)
        shared_grad = expected.step([SCALE * (loss + 1e-8).log() for loss in losses])
        net.zero_grad()
        balancer.backward(losses, scaler=scaler)
    assert balancer.step == 4
    per_layer = np.split(shared_grad, len(net.encoder))
    for layer, layer_grad, dtype in zip(net.encoder, per_layer, grad_dtypes, strict=True):
        params = list(layer.parameters())
        assert {p.grad.dtype for p in params} == {dtype}
        error = relative_error(flat([p.grad for p in params], params), layer_grad)
        assert error < max(torch.finfo(dtype).eps / 2, 1e-5)
    return balancer


@captures
@pytest.mark.parametrize("widest", [torch.float32, torch.float64], ids=str)
def test_layers_of_several_dtypes(backend: str, bucket_bytes: int | None, widest: torch.dtype, rng: Rng) -> None:
    dtypes = [torch.bfloat16, widest, torch.float16, torch.bfloat16]
    balancer = assert_grads_follow_algorithm1(Mixed(dtypes), backend, bucket_bytes, rng, dtypes)
    assert {m.dtype for m in balancer.ema.values()} == {widest}


@captures
def test_grad_dtype(backend: str, bucket_bytes: int | None, rng: Rng) -> None:
    """What is balanced is not rounded to the parameter's 16 bits."""
    net = Mixed([torch.bfloat16, torch.bfloat16])
    for p in net.encoder[1].parameters():
        p.grad_dtype = torch.float32
    assert_grads_follow_algorithm1(net, backend, bucket_bytes, rng, [torch.bfloat16, torch.float32])
    grad = net.encoder[1].weight.grad
    assert (grad != grad.bfloat16()).float().mean() > 0.9


@captures
def test_a_grad_dtype_set_later_makes_the_balancer_stale(backend: str, bucket_bytes: int | None, rng: Rng) -> None:
    net = Mixed([torch.bfloat16])
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend, bucket_bytes=bucket_bytes)
    net.encoder[0].weight.grad_dtype = torch.float32
    expected = (
        r"stale: shared parameter '0\.weight' was \(24, 24\) torch\.bfloat16 on .* and is \(24, 24\) torch\.float32"
    )
    with pytest.raises(RuntimeError, match=expected):
        balancer.backward(net.batch_losses(rng))
