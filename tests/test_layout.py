"""``FlatLayout`` places every parameter once, aligned, grouped by dtype and in its own memory order."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import torch
from hypothesis import given
from torch import Tensor, nn

from dbmtl_fused._ops import CHUNK, GRAD_DTYPES
from dbmtl_fused.layout import ALIGN, FlatLayout, is_dense, large_first, named_shared_parameters

shapes = st.lists(st.integers(0, 40), max_size=4).map(tuple)
parameters = st.lists(st.tuples(shapes, st.sampled_from(GRAD_DTYPES), st.booleans()), min_size=1, max_size=8)


def make(description: list[tuple[tuple[int, ...], torch.dtype, bool]]) -> list[tuple[str, Tensor]]:
    params = []
    for i, (shape, dtype, transposed) in enumerate(description):
        data = torch.zeros(shape, dtype=dtype)
        params.append((f"p{i}", nn.Parameter(data.transpose(0, -1) if transposed and data.dim() > 1 else data)))
    return params


@given(parameters)
def test_slots_are_aligned_disjoint_and_grouped(description: list[tuple[tuple[int, ...], torch.dtype, bool]]) -> None:
    named = make(description)
    layout = FlatLayout(large_first(named))
    assert sorted(slot.name for slot in layout.slots) == sorted(name for name, _ in named)
    stop = 0
    kinds = [(slot.dtype, slot.is_small) for slot in layout.slots]
    assert len(set(kinds)) == 1 + sum(a != b for a, b in itertools.pairwise(kinds)), "each kind in one stretch"
    blocks = layout.blocks(range(len(layout.slots)))
    assert [slot for block in blocks for slot in block.slots] == layout.slots
    for slot in layout.slots:
        assert slot.start % ALIGN == 0
        assert slot.start >= stop
        stop = slot.start + slot.numel
        (block,) = (block for block in blocks if slot in block.slots)
        assert block.dtype == slot.dtype
        assert block.start <= slot.start <= stop <= block.stop
    assert stop <= layout.P < stop + ALIGN
    assert layout.numel == sum(p.numel() for _, p in named)
    assert layout.state_dtype == (torch.float64 if torch.float64 in {p.dtype for _, p in named} else torch.float32)


@given(parameters)
def test_chunks_cover_every_column_once_and_never_two_parameters(
    description: list[tuple[tuple[int, ...], torch.dtype, bool]],
) -> None:
    layout = FlatLayout(make(description))
    chunk = 0
    for slot, (start, numel, first_chunk) in zip(layout.slots, layout.segments.tolist(), strict=True):
        assert (start, numel, first_chunk) == (slot.start, slot.numel, chunk)
        chunk += -(-numel // CHUNK)
    assert layout.num_chunks == chunk


@given(parameters)
def test_views_show_each_parameter_in_logical_order(
    description: list[tuple[tuple[int, ...], torch.dtype, bool]],
) -> None:
    named = dict(make(description))
    layout = FlatLayout(list(named.items()))
    buffer = torch.zeros(2, layout.P)
    for slot in layout.slots:
        view = slot.view(buffer)
        assert view.shape == (2, *named[slot.name].shape)
        if is_dense(named[slot.name]):
            assert slot.strides == named[slot.name].stride()
        view += 1
    assert buffer.sum() == 2 * layout.numel, "every column of a parameter once, padding untouched"
    assert set(buffer.unique().tolist()) <= {0.0, 1.0}


def test_gradients_in_the_parameters_order_are_not_copied() -> None:
    p = nn.Parameter(torch.zeros(8, 4, 1, 1).to(memory_format=torch.channels_last))
    layout = FlatLayout([("p", p)])
    for grad in (torch.ones(8, 4, 1, 1), torch.ones(8, 4, 1, 1).to(memory_format=torch.channels_last)):
        assert layout.as_columns(0, grad) is grad, "strides of dimensions of size 1 mean nothing"
    other = torch.arange(32.0).reshape(4, 8, 1, 1).transpose(0, 1)
    columns = layout.as_columns(0, other)
    assert columns is not other
    assert torch.equal(columns, other)
    assert columns.stride() == p.stride()


def test_is_dense() -> None:
    base = torch.zeros(4, 6)
    for tensor in (base, base.t(), base.reshape(4, 1, 6).transpose(0, 1), torch.zeros(()), torch.zeros(0, 3), base[1]):
        assert is_dense(tensor)
    for tensor in (base[:, ::2], base[:, :3], base[:1].expand(4, 6), torch.zeros(1).expand(3)):
        assert not is_dense(tensor)


def test_names_of_shared_parameters() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    assert named_shared_parameters([a, b, a]) == [("0", a), ("1", b)]
    assert named_shared_parameters(iter([("x", a), ("y", b), ("z", a)])) == [("x", a), ("y", b)]
    layer = nn.Linear(2, 3)
    assert [name for name, _ in named_shared_parameters(layer)] == ["weight", "bias"]
    assert [name for name, _ in named_shared_parameters(layer.named_parameters())] == ["weight", "bias"]
    assert [name for name, _ in named_shared_parameters(layer.parameters())] == ["0", "1"]
