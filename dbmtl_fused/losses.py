"""Task losses: from what users pass to one root, one value and one seed per task."""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from dbmtl_fused._ops import NEGATIVE_LOSS_TOLERANCE

_ASSEMBLING = ("torch::autograd::CopySlices", "CatBackward0", "StackBackward0")
"""Nodes that put losses of different heads into one tensor."""


class TaskLosses:
    """The losses of one call, task by task.

    :param losses: A list in the order of ``task_names``, or a tensor of shape ``(T,)``.
    :param task_names: The names of their ``T`` tasks.
    :param log_eps: ``eps`` of ``log(l + eps)``, or None if the loss itself is balanced.
    :param device: Where ``values`` and seeds are computed.
    :param active: Which of them count, shape ``(T,)``, bool, on ``device``; None: all.
    :param need_graph: Whether backward passes will follow; if not, losses need not require grad.
    :raises TypeError: If ``losses`` holds something else than floating-point tensors.
    :raises ValueError: If a shape does not fit, a loss does not require grad, or (on CPUs, where looking costs nothing)
        a loss to be logged is negative.

    ``values``: detached losses, shape ``(T,)``, float32, or float64 if any loss is; 1 where they do not count.
    ``active`` as given.
    """

    def __init__(
        self,
        losses: list[Tensor] | Tensor,
        task_names: Sequence[str],
        log_eps: float | None,
        device: torch.device,
        *,
        active: Tensor | None = None,
        need_graph: bool = True,
    ) -> None:
        self.task_names = task_names
        self.log_eps = log_eps
        self.active = active
        self._need_graph = need_graph
        self._stacked: Tensor | None = None  # a (T,) tensor that could not be peeled into its parts
        self._tensors: list[Tensor] = []  # the losses, or what stands for them in ``differentiable_value``
        self.roots: list[Tensor | GradientEdge] = []
        if isinstance(losses, Tensor):
            self._from_tensor(losses)
        else:
            self._from_tensors(losses)
        self.dtype = torch.float64 if any(l.dtype == torch.float64 for l in self._tensors) else torch.float32
        detached = [l.detach().reshape(-1).to(device, self.dtype) for l in self._tensors]
        self.values = self._counting(torch.cat(detached), 1)
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
        if self._need_graph and len(losses) > 1:
            self._replace_views()

    def _replace_views(self) -> None:
        """Peel losses that are views of one tensor, where that is a stack of them; else warn."""
        parents = [_viewed(loss) for loss in self._tensors]
        if len({parent for parent, _ in parents if parent}) != 1 or not all(parent for parent, _ in parents):
            return
        edges = [_stacked_edge(parent, index) for parent, index in parents]
        is_watched = any(loss._base is not None and _is_watched(loss._base) for loss in self._tensors)
        if all(edges) and not is_watched and all(loss.dim() == 0 for loss in self._tensors):
            self.roots = [GradientEdge(*edge) for edge in edges if edge]
        elif parents[0][0] is not None and parents[0][0].name() in _ASSEMBLING:
            _warn_of_one_tensor("that are views of one tensor, into which they were written")

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
        # Hooks of the stacked losses, and their ``.grad``, need that pass.
        is_stack = losses.grad_fn is not None and losses.grad_fn.name() == "StackBackward0"
        edges = losses.grad_fn.next_functions if is_stack and losses.grad_fn and not _is_watched(losses) else ()
        if len(edges) == T:
            for name, (node, index) in zip(self.task_names, edges, strict=True):
                self._check_requires_grad(name, node is not None)
                self.roots.append(GradientEdge(cast(Node, node), index))
            return
        _warn_of_one_tensor("given as one tensor that is not a plain torch.stack of the task losses")
        self._stacked = losses
        self.roots = [losses] * T

    def _check_requires_grad(self, name: str, requires_grad: bool) -> None:
        if self._need_graph and not requires_grad:
            raise ValueError(
                f"loss of task {name!r} must require grad; it has no graph (detached, or computed under no_grad?)"
            )

    def _check_not_negative(self) -> None:
        for name, value in zip(self.task_names, self.values.tolist(), strict=True):
            if value < -NEGATIVE_LOSS_TOLERANCE:
                raise ValueError(
                    f"loss of task {name!r} must be >= 0 to take its log, got {value}; "
                    "shift it, or use log_losses=False"
                )

    def _counting(self, per_task: Tensor, otherwise: float) -> Tensor:
        """``per_task``, and something else where a task does not count."""
        return per_task if self.active is None else per_task.where(self.active, otherwise)

    def value(self) -> Tensor:
        """The objective, detached: ``sum_t log(l_t + eps)``, or ``sum_t l_t`` without the log; 0-d."""
        return self._objective(self.values)

    def differentiable_value(self) -> Tensor:
        """The same as a differentiable function of the losses."""
        losses = torch.cat([l.reshape(-1).to(self.values) for l in self._tensors])
        return self._objective(self._counting(losses, 1))  # 1: nothing that its derivative could make a NaN of

    def _objective(self, losses: Tensor) -> Tensor:
        if self.log_eps is not None:
            # A loss just below zero counts as zero, and has the derivative of a loss of zero.
            below = (losses < 0) & (losses >= -NEGATIVE_LOSS_TOLERANCE)
            losses = (losses - losses.detach().where(below, 0) + self.log_eps).log()
        return self._counting(losses, 0).sum()

    def of_roots(self, seeds: Tensor) -> list[Tensor]:
        """``seeds`` of shape ``(T,)``, one for each loss, as what each root's backward pass starts from."""
        if self._stacked is not None:
            return list(torch.diag(seeds).to(self._stacked))
        return [
            seed.reshape(root.shape).to(root) if isinstance(root, Tensor) else seed  # the engine casts an edge's seed
            for seed, root in zip(seeds, self.roots, strict=True)
        ]

    def unreachable(self, nodes: Container[Node], params: Container[int]) -> str | None:
        """Return the name of a task whose graph cannot reach a shared parameter, or None.

        :param nodes: The AccumulateGrad nodes of the shared parameters.
        :param params: The ids of the shared parameters, for nodes that they no longer have.
        """
        for name, root in zip(
            self.task_names, self.roots[:1] if self._stacked is not None else self.roots, strict=False
        ):
            if not _reaches(_node(root), nodes, params):
                return name
        return None

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
                    pending.extend(after for after, _ in node.next_functions if after and not _holds_no_buffers(after))
            seen |= own
        return shared


def _holds_no_buffers(node: Node) -> bool:
    """Return whether a graph may share the node and all after it without sharing buffers: a leaf, or a leaf that was
    cast, as autocast does once for all graphs."""
    after = node.next_functions
    if node.name() == "ToCopyBackward0":
        return all(leaf is None or not leaf.next_functions for leaf, _ in after)
    return not after


def _reaches(root: Node, nodes: Container[Node], params: Container[int]) -> bool:
    """Return whether a graph may reach a shared parameter: it does, or it has a Python function, whose backward pass
    may run another one (reentrant checkpoints)."""
    seen, pending = {root}, [root]
    while pending:
        node = pending.pop()
        if node in nodes or isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        after = [following for following, _ in node.next_functions if following and following not in seen]
        if not after and id(getattr(node, "variable", None)) in params:
            return True
        seen.update(after)
        pending.extend(after)
    return False


def _is_watched(tensor: Tensor) -> bool:
    """Return whether a backward pass must go through the tensor: it has hooks, or gets a ``.grad``."""
    return bool(tensor._backward_hooks) or tensor.retains_grad


def _viewed(loss: Tensor) -> tuple[Node | None, int]:
    """Return the node that made the tensor of which a loss is an element, and its index; (None, 0) if it is none."""
    node = loss.grad_fn
    if node is None or _is_watched(loss):
        return None, 0
    if node.name() == "UnbindBackward0":
        return node.next_functions[0][0], loss.output_nr
    if node.name() == "SelectBackward0":
        index, size = node._saved_index, node._saved_self_sym_sizes[node._saved_dim]  # type: ignore[attr-defined]
        return node.next_functions[0][0], index % size if index < 2**63 else index - 2**64 + size
    return None, 0


def _stacked_edge(parent: Node | None, index: int) -> tuple[Node, int] | None:
    """Return the edge of entry ``index`` of a stack of scalars."""
    if parent is None or parent.name() != "StackBackward0" or index >= len(parent.next_functions):
        return None
    node, output = parent.next_functions[index]
    return None if node is None else (node, output)


def _warn_of_one_tensor(what: str) -> None:
    warnings.warn(
        f"losses {what}: every task's backward runs all heads, and a non-finite loss spoils the gradients of all "
        "tasks; pass a sequence or a dict of losses",
        stacklevel=6,
    )


def _node(root: Tensor | GradientEdge) -> Node:
    return root.node if isinstance(root, GradientEdge) else torch.autograd.graph.get_gradient_edge(root).node
