"""Stochastic rounding to bfloat16, as every backend does it.

A float32 keeps the upper 16 of its bits; adding a random number below 2**16 to the bits first makes the magnitude go up
with a probability equal to what is cut off. The random number depends on nothing but ``(seed, column)``, so that every
backend draws the same, in whatever order, and so does a run that continues from a checkpoint::

    key    = mix(low(seed) ^ mix(high(seed) + 0x9e3779b9))        the two 32-bit halves of the seed
    random = mix(low(column) ^ high(column) ^ key) >> 16

``mix`` is a bijection of 32-bit words in which every bit of the input moves every bit of the output with a probability
near 1/2: two multiply-xorshift rounds with constants that C. Wellons found by search ("lowbias32").
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(word: Tensor) -> Tensor:
    """``word`` holds 32-bit words in int64; products wrap, and only their low half counts."""
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _WORD
    return word ^ (word >> 16)


def random_bits(seed: Tensor, columns: Tensor) -> Tensor:
    """Uniform in ``[0, 2**16)`` for each of ``columns``, int32.

    :param seed: int64; broadcasts with ``columns``.
    :param columns: int64, >= 0.
    """
    key = _mix((seed & _WORD) ^ _mix((((seed >> 32) & _WORD) + 0x9E3779B9) & _WORD))
    return (_mix((columns & _WORD) ^ (columns >> 32) ^ key) >> 16).int()


def round_to_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    """Finite float32 ``values``, rounded down or up in magnitude as ``random`` decides."""
    return ((values.view(torch.int32) + random) & ~0xFFFF).view(torch.float32).bfloat16()
