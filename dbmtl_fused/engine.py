"""Where the balancer meets autograd: a task's backward pass, and the loss whose backward pass is a whole step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dbmtl_fused.losses import TaskLosses


def backward_pass(
    roots: Tensor | GradientEdge | Sequence[Any],
    seeds: Tensor | Sequence[Tensor],
    *,
    retain_graph: bool,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """``torch.autograd.backward``, with a cure in the message where a compiled graph refuses a second pass."""
    try:
        torch.autograd.backward(roots, seeds, retain_graph=retain_graph, inputs=inputs)
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise RuntimeError(
            "a torch.compile'd part of the model gave its buffers away, so that it cannot run one backward pass per "
            "task; set torch._functorch.config.donated_buffer = False before the model is compiled"
        ) from error


class BalancedGrads(Protocol):
    """Runs a step and returns the gradients of all shared parameters; see ``DBMTL.balanced_grads``."""

    def __call__(
        self, losses: TaskLosses, scale: Tensor, *, retain_graph: bool, inputs: Sequence[Tensor] | None
    ) -> list[Tensor | None]: ...


def balanced_loss(balanced_grads: BalancedGrads, losses: TaskLosses, params: Sequence[Tensor]) -> Tensor:
    """A 0-d tensor with the objective's value, whose backward pass is ``balanced_grads`` of ``losses``."""
    probe = torch.zeros((), requires_grad=True)
    return _BalancedLoss.apply(balanced_grads, losses, probe, *params)


class _BalancedLoss(torch.autograd.Function):
    """The shared parameters are inputs and their gradients are returned, so that whatever else autograd does with
    gradients (sum them with those of a regulariser, hand them to ``autograd.grad``) works. Heads are not inputs: the
    tasks' own backward passes accumulate theirs.
    """

    @staticmethod
    def forward(ctx: Any, balanced_grads: BalancedGrads, losses: TaskLosses, probe: Tensor, *params: Tensor) -> Tensor:
        ctx.balanced_grads, ctx.losses, ctx.params = balanced_grads, losses, params
        ctx.probe_node = get_gradient_edge(probe).node
        return losses.value()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the balanced loss cannot be differentiated twice: create_graph=True is not supported")
        if ctx.losses is None:
            raise RuntimeError(
                "the balanced loss supports one backward pass, and this is a second one; call balancer(losses) again"
            )
        losses, ctx.losses = ctx.losses, None
        # The probe is a leaf nobody asks for by name: only a plain backward() reaches it, and only that may touch
        # heads.
        plain = torch._C._will_engine_execute_node(ctx.probe_node)
        grads = ctx.balanced_grads(
            losses,
            scale,
            retain_graph=torch._C._autograd._get_current_graph_task_keep_graph(),
            inputs=None if plain else [p for p in ctx.params if p.requires_grad],
        )
        return None, None, None, *grads
