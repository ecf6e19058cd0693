"""Dual-balancing multi-task learning (DB-MTL, arXiv 2308.12029) with fused kernels for PyTorch."""

from dbmtl_fused._version import __version__
from dbmtl_fused.balancer import DBMTL
from dbmtl_fused.functional import balance_

__all__ = ["DBMTL", "__version__", "balance_"]
