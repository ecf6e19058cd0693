"""Triton kernels, installed as ``dbmtl_fused.triton_kernels``; none has landed yet."""
