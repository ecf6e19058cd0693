"""Where CUDA's own programs are: many systems leave the profilers' folders out of PATH."""

from __future__ import annotations

import glob
import os
import shutil

FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")
"""Patterns; what CUDA_HOME names comes before them."""


def find(program: str) -> str | None:
    """Its path: as PATH has it, else in CUDA's folders, of several versions the last."""
    home = [os.path.join(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    folders = [folder for pattern in (*home, *FOLDERS) for folder in sorted(glob.glob(pattern), reverse=True)]
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(folders))
