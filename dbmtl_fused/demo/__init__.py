"""``python -m dbmtl_fused demo``: multi-task training on real handwritten digits, in about a minute.

Importing this package is cheap; scikit-learn, matplotlib, tqdm and tabulate are imported once :func:`main` runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["main"]

_REQUIRED = ("sklearn", "matplotlib", "tqdm", "tabulate")


def main(argv: Sequence[str]) -> int:
    """Run the demo with the command line ``argv`` and return the exit status."""
    if missing := [name for name in _REQUIRED if find_spec(name) is None]:
        print(
            f"The demo also needs {', '.join(missing)}. Install with:\n    pip install 'dbmtl_fused[demo]'",
            file=sys.stderr,
        )
        return 1
    from dbmtl_fused.demo import cli  # here, for it imports what was checked for just now

    return cli.main(argv)
