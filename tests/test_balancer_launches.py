"""How many kernels a step launches beside the backward passes: a number that small problems on a GPU feel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from op_inputs import DEVICE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dbmtl_fused import DBMTL

T = 3
NO_KERNEL = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "slice",
    "unbind",
    "view",
}


class Launches(TorchDispatchMode):
    """Counts the operators that write something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        _, name, _ = str(func).split(".")
        if name not in NO_KERNEL:
            self.of[name] += 1
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[list[Tensor]], object], losses: list[Tensor]) -> Counter[str]:
    with Launches() as counted:
        run(losses)
    return counted.of


def bare_loop(losses: list[Tensor]) -> None:
    for loss in losses:
        loss.backward(retain_graph=True)


@pytest.mark.parametrize("bucket_bytes", [None, 1 << 20], ids=["from .grad", "buckets"])
def test_plain_step(native_backend: str, bucket_bytes: int | None) -> None:
    """``T + 1`` that touch ``P`` numbers, two that touch ``T``, and one that gives small gradients their own memory."""
    encoder = nn.Linear(8, 8, device=DEVICE)
    heads = [nn.Linear(8, 1, device=DEVICE) for _ in range(T)]
    balancer = DBMTL(encoder, num_tasks=T, bucket_bytes=bucket_bytes, backend=native_backend)

    def losses() -> list[Tensor]:
        for module in (encoder, *heads):
            module.zero_grad()
        features = encoder(torch.randn(4, 8, device=DEVICE))
        return [head(features).square().mean() for head in heads]

    balancer.backward(losses())
    own, bare = launches(balancer.backward, losses()), launches(bare_loop, losses())
    added = {name: count - bare[name] for name, count in own.items() if count > bare[name]}
    touch_all = {"ema_update_": T, "combine": 1}
    touch_few = {"cat": 1, "begin_step": 1, "_foreach_copy_": 1}
    assert added == touch_all | touch_few
    assert sum(added.values()) == T + 1 + 3
    assert own["add_"] == 0  # a bare loop's are those of gradients into .grad, which are not there now
    assert bare["ones_like"] - own["ones_like"] == T  # where each backward pass starts from
