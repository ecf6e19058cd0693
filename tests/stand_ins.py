"""What stands in for a GPU in this process, if anything. Imported before the backends are listed."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton kernels run in Triton's interpreter."""

EMULATED = os.environ.get("DBMTL_FUSED_TEST_CUDA_EMU") == "1"
"""The CUDA sources run as C++, see ``cuda_emu``."""

if INTERPRETED:
    import triton_interpreter  # noqa: F401
if EMULATED:
    from cuda_emu.build import install

    install()
