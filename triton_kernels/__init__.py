"""Triton kernels, installed as ``dbmtl_fused.triton_kernels``; importing this registers the ``triton`` overloads.

One module per operator: :mod:`.begin_step`, :mod:`.ema_update`, :mod:`.combine`, :mod:`.gram`, :mod:`.balance`. What
they share: :mod:`.device` (functions of kernels), :mod:`.tuning` (launch parameters), :mod:`.gradients` (where the
gradients are), :mod:`.launch` and :mod:`.checks` (the host's side).
"""

from __future__ import annotations

from dbmtl_fused._ops import _library
from dbmtl_fused.triton_kernels import balance, begin_step, combine, ema_update, gram
from dbmtl_fused.triton_kernels.launch import INTERPRETED

# "CUDA" is also the key of ROCm devices. The interpreter works on the host's memory.
for _key in ("CPU",) if INTERPRETED else ("CUDA", "XPU"):
    for _operator in (begin_step.begin_step, ema_update.ema_update_, combine.combine, gram.gram, balance.balance_):
        _library.impl(f"{_operator.__name__}.triton", _operator, _key)
