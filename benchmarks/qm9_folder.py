"""Where QM9 is looked for. Only the standard library, as :mod:`benchmarks.gpu` has no torch to rely on."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "data" / "qm9", ROOT.parent / "shared" / "data" / "qm9")
"""In the checkout, where git ignores it, and beside it."""


def folder() -> Path:
    """The first that is there; if none is, the first, for messages to name."""
    return next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
