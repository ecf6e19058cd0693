"""The five training runs of ``examples/qm9.py``, if QM9 is here.

``python -m benchmarks.train --data FOLDER --out FILE.json``. FILE.json and FILE.txt are written anew after each method.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.molecule_model import GEOMETRY, TARGETS

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "qm9.py"
QUICK = ("--molecules", "390", "--epochs", "1", "--width", "8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or say what is missing; 0 unless something raises."""
    options = _parse(argv)
    if not all((options.data / name).is_file() for name in (GEOMETRY, TARGETS)):
        reason = f"needs QM9: {GEOMETRY} and {TARGETS} in data/qm9, or in a folder named by --data"
        print(reason)
        options.out.write_text(json.dumps({"skipped": reason}) + "\n")
        return 0
    folder = options.out.with_suffix("")
    for suffix, result in ((".json", "results.json"), (".txt", "results.md")):
        link = options.out.with_suffix(suffix)
        link.unlink(missing_ok=True)
        link.symlink_to(folder / result)
    size = QUICK if options.quick else ("--minutes", f"{options.seconds / 60:.2f}")
    arguments = ["--data", str(options.data), "--device", options.device, *size, "--out", str(folder)]
    status: int = runpy.run_path(str(EXAMPLE), run_name="qm9")["main"](arguments)
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of QM9")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="few molecules, one epoch: shows that everything runs")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all methods together (default: 600)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; the table goes into a .txt beside")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
