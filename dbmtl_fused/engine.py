"""Where the balancer meets autograd: a task's backward pass, and the loss whose backward pass is a whole step."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.autograd.graph import GradientEdge, get_gradient_edge

SECOND_PASS = "the balanced loss supports one backward pass, and this is a second one; call balancer(losses) again"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def entry_point(function: _Function) -> _Function:
    """Decorate a function through which the package is entered.

    ``torch.compile`` traces neither the function nor any that it calls, as with ``torch.compiler.disable``, whose
    import of the whole compiler is spared. The grad mode is the same afterwards, even if an interrupt hit
    ``torch.no_grad``.
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        grad_mode, compiler = torch.is_grad_enabled(), eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(grad_mode)
            eval_frame.set_eval_frame(compiler)

    wrapper._torchdynamo_disable = True  # type: ignore[attr-defined]
    # The wrapper itself is not worth a trace, nor the warnings that come with it.
    skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
    eval_frame.set_code_exec_strategy(wrapper.__code__, eval_frame._FrameExecStrategy(skip, default))
    return functools.update_wrapper(wrapper, function)  # type: ignore[return-value]


def _no_compiled_autograd() -> AbstractContextManager:
    """Return a context without compiled autograd, whose traces cannot hold hooks that take gradients away."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return nullcontext() if module is None else module._disable()


def _in_compiled_autograd() -> bool:
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.in_compiled_autograd_region


def backward_pass(
    roots: Tensor | GradientEdge | Sequence[Any],
    seeds: Tensor | Sequence[Tensor],
    *,
    retain_graph: bool,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """``torch.autograd.backward``, with a cure in the message where a compiled graph refuses a second pass."""
    try:
        with _no_compiled_autograd():
            torch.autograd.backward(roots, seeds, retain_graph=retain_graph, inputs=inputs)
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise RuntimeError(
            "a torch.compile'd part of the model gave its buffers away, so that it cannot run one backward pass per "
            "task; set torch._functorch.config.donated_buffer = False before the model is compiled"
        ) from error


class Pending(Protocol):
    """A step whose losses are known and whose backward passes are to run."""

    value: Tensor
    params: list[Tensor]

    def run(self, scale: Tensor, *, retain_graph: bool) -> None:
        """Run the step and accumulate into every ``.grad``."""

    def grads(self, scale: Tensor, *, retain_graph: bool, with_heads: bool) -> list[Tensor | None]:
        """Run the step and return the gradients of the shared parameters; heads get theirs only if ``with_heads``."""


def balanced_loss(pending: Pending) -> Tensor:
    """Return a 0-d tensor with the objective's value, whose backward pass is the step."""
    probe = torch.zeros((), device="cpu", requires_grad=True)
    return _BalancedLoss.apply(pending, probe, *pending.params)


class _BalancedLoss(torch.autograd.Function):
    """The shared parameters are inputs, so that ``autograd.grad`` and ``backward(inputs=...)`` get their gradients, and
    sums with other losses work. Heads are not inputs: the tasks' own backward passes accumulate theirs.

    A plain ``backward()`` writes the shared gradients as ``balancer.backward(losses)`` does, and returns none.
    """

    @staticmethod
    def forward(ctx: Any, pending: Pending, probe: Tensor, *params: Tensor) -> Tensor:
        ctx.pending = pending
        ctx.probe_node = get_gradient_edge(probe).node
        return pending.value

    @staticmethod
    @entry_point
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the balanced loss cannot be differentiated twice: create_graph=True is not supported")
        if ctx.pending is None:
            raise RuntimeError(SECOND_PASS)
        pending, keep_graph = ctx.pending, torch._C._autograd._get_current_graph_task_keep_graph()
        # The probe is a leaf nobody asks for by name: only a plain backward() reaches it, and only that may touch
        # heads.
        is_plain = torch._C._will_engine_execute_node(ctx.probe_node)
        if is_plain and not _in_compiled_autograd():  # which writes every .grad itself
            pending.run(scale, retain_graph=keep_graph)
            grads: list[Tensor | None] = [None] * len(pending.params)
        else:
            grads = pending.grads(scale, retain_graph=keep_graph, with_heads=is_plain)
        ctx.pending = None
        return None, None, *grads
