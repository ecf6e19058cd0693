"""What ``dbmtl_fused`` costs, against other ways to do the same. Entry: ``python benchmarks/run.py --help``."""
