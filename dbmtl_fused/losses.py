"""Task losses: from what users pass to one root, one value and one seed per task."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


class TaskLosses:
    """The losses of one step, task by task.

    :param losses: A sequence in task order, a mapping by task name, or a tensor of shape ``(T,)``.
    :param task_names: The ``T`` task names.
    :param log_eps: ``eps`` of ``log(l + eps)``, or None if the loss itself is balanced.
    :param device: Where ``values`` and seeds are computed.
    :param need_graph: Whether backward passes will follow; if not, losses need not require grad.
    :raises TypeError: If ``losses`` is none of these or holds something else than floating-point tensors.
    :raises ValueError: If the number of losses, a name or a shape does not fit, a loss does not require grad, or (on
        CPUs, where looking costs nothing) a loss to be logged is negative.

    ``values``: detached losses, shape ``(T,)``, float32, or float64 if any loss is.
    """

    def __init__(
        self,
        losses: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
        task_names: Sequence[str],
        log_eps: float | None,
        device: torch.device,
        need_graph: bool = True,
    ) -> None:
        self.task_names = task_names
        self.log_eps = log_eps
        self._need_graph = need_graph
        self._stacked: Tensor | None = None  # a (T,) tensor that could not be peeled into its parts
        self._tensors: list[Tensor] = []  # the losses, or what stands for them in ``differentiable_value``
        self.roots: list[Tensor | GradientEdge] = []
        if isinstance(losses, Tensor):
            self._from_tensor(losses)
        else:
            self._from_tensors(_in_task_order(losses, task_names))
        dtype = torch.float64 if any(l.dtype == torch.float64 for l in self._tensors) else torch.float32
        detached = [l.detach().reshape(-1).to(device, dtype) for l in self._tensors]
        self.values = torch.cat(detached)
        if log_eps is not None and device.type == "cpu":
            self._check_not_negative()

    def _from_tensors(self, losses: list[Tensor]) -> None:
        for name, loss in zip(self.task_names, losses, strict=True):
            if not isinstance(loss, Tensor) or not loss.is_floating_point():
                kind = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"loss of task {name!r} must be a floating-point tensor, got {kind}")
            if loss.numel() != 1:
                raise ValueError(f"loss of task {name!r} must have one element, got shape {tuple(loss.shape)}")
            self._check_requires_grad(name, loss.requires_grad)
        self._tensors = losses
        self.roots = list(losses)

    def _from_tensor(self, losses: Tensor) -> None:
        T = len(self.task_names)
        if not losses.is_floating_point():
            raise TypeError(f"losses must be floating-point, got {losses.dtype}")
        if losses.shape != (T,):
            raise ValueError(f"losses as a tensor must have shape ({T},), one per task, got {tuple(losses.shape)}")
        self._check_requires_grad(", ".join(self.task_names), losses.requires_grad)
        self._tensors = [losses]
        if not self._need_graph:
            return
        # Backward through ``stack`` would run every head for every task, and hand one task's inf to all as 0 * inf.
        edges = losses.grad_fn.next_functions if losses.grad_fn and losses.grad_fn.name() == "StackBackward0" else ()
        if len(edges) == T:
            for name, (node, index) in zip(self.task_names, edges, strict=True):
                self._check_requires_grad(name, node is not None)
                self.roots.append(GradientEdge(cast(Node, node), index))
            return
        warnings.warn(
            "losses given as one tensor that is not a plain torch.stack of the task losses: every task's backward runs "
            "all heads, and a non-finite loss spoils the gradients of all tasks; pass a sequence or a dict of losses",
            stacklevel=4,
        )
        self._stacked = losses
        self.roots = [losses] * T

    def _check_requires_grad(self, name: str, requires_grad: bool) -> None:
        if self._need_graph and not requires_grad:
            raise ValueError(
                f"loss of task {name!r} must require grad; it has no graph (detached, or computed under no_grad?)"
            )

    def _check_not_negative(self) -> None:
        for name, value in zip(self.task_names, self.values.tolist(), strict=True):
            if value < 0:
                raise ValueError(
                    f"loss of task {name!r} must be >= 0 to take its log, got {value}; "
                    "shift it, or use log_losses=False"
                )

    def value(self) -> Tensor:
        """The objective, detached: ``sum_t log(l_t + eps)``, or ``sum_t l_t`` without the log; 0-d."""
        return (self.values if self.log_eps is None else (self.values + self.log_eps).log()).sum()

    def differentiable_value(self) -> Tensor:
        """The same as a differentiable function of the losses."""
        losses = torch.cat([l.reshape(-1).to(self.values) for l in self._tensors])
        return (losses if self.log_eps is None else (losses + self.log_eps).log()).sum()

    def seeds(self, scale: Tensor) -> list[Tensor]:
        """What each root's backward starts from: ``scale * d log(l_t + eps) / d l_t``, NaN where the loss is unusable.

        Bit for bit what autograd would compute through the log, ``scale / (l_t + eps)``, in at least float32.
        """
        derivative = scale.to(self.values).expand_as(self.values)
        if self.log_eps is not None:
            derivative = derivative / (self.values + self.log_eps)
        seeds = torch.where(self.unusable(), torch.nan, derivative)
        if self._stacked is not None:
            return list(torch.diag(seeds).to(self._stacked))
        return [
            seed.reshape(root.shape).to(root) if isinstance(root, Tensor) else seed  # the engine casts an edge's seed
            for seed, root in zip(seeds, self.roots, strict=True)
        ]

    def unusable(self) -> Tensor:
        """Which losses carry no gradient information: not finite, or negative under the log; shape ``(T,)``, bool."""
        unusable = ~self.values.isfinite()
        return unusable if self.log_eps is None else unusable | (self.values < 0)

    def shared_with_later(self) -> list[bool]:
        """Whether a task's graph has a node in common with a later task's: its buffers must outlive its backward."""
        seen: set[Node] = set()
        shared = [False] * len(self.roots)
        for task in reversed(range(len(self.roots))):
            own: set[Node] = set()
            pending = [_node(self.roots[task])]
            while pending:
                node = pending.pop()
                if node in seen:
                    shared[task] = True
                elif node not in own:
                    own.add(node)
                    # Leaves (no next functions) hold no buffers: sharing a parameter is not sharing a graph.
                    pending.extend(after for after, _ in node.next_functions if after and after.next_functions)
            seen |= own
        return shared


def _in_task_order(losses: Sequence[Tensor] | Mapping[str, Tensor], task_names: Sequence[str]) -> list[Tensor]:
    if isinstance(losses, Mapping):
        missing = [name for name in task_names if name not in losses]
        unknown = [name for name in losses if name not in task_names]
        if missing or unknown:
            raise ValueError(f"losses must have the keys {list(task_names)}; missing {missing}, unknown {unknown}")
        return [losses[name] for name in task_names]
    if not isinstance(losses, Iterable):
        raise TypeError(f"losses must be a sequence, a mapping or a tensor, got {type(losses).__name__}")
    ordered = list(cast(Iterable[Tensor], losses))
    if len(ordered) != len(task_names):
        raise ValueError(
            f"losses must hold one loss per task, {len(task_names)} ({', '.join(task_names)}), got {len(ordered)}"
        )
    return ordered


def _node(root: Tensor | GradientEdge) -> Node:
    return root.node if isinstance(root, GradientEdge) else torch.autograd.graph.get_gradient_edge(root).node
