"""Several reports of ``make gpu`` made one: ``python -m benchmarks.gpu_merge FOLDER ... --out benchmarks/results/gpu``.

Of a stage that ran more than once the last one counts. Only reports of one commit and one kind of GPU go together; what
git does not know on that machine, ``--commit`` of the run says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first report with the stages of all, in the order in which they run.

    :raises ValueError: If a report does not say of which commit and GPU it is, or they differ in that.
    """
    origins = {_origin(report) for report in reports}
    if len(origins) != 1 or any(origin is None or origin[0] is None for origin in origins):
        raise ValueError(f"reports must all be of one commit and GPU, which their stage info says, got {origins}")
    stages = {stage["name"]: stage for report in reports for stage in report["stages"] if stage["command"]}
    order = sorted(stages, key=list(gpu.STAGES).index)
    return {
        **reports[0],
        "written": reports[-1]["written"],
        "finished": all(report["finished"] for report in reports),
        "stages": [stages[name] for name in order],
    }


def _origin(report: dict[str, Any]) -> tuple[Any, ...] | None:
    for stage in report["stages"]:
        if stage["name"] == "info" and stage["data"]:
            found = stage["data"]
            return found["commit"], found["dirty"], found["device"]["name"]
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``gpu.json`` and, one text after the other, ``gpu.txt``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_merge", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="with gpu.json and gpu.txt each, the first run first")
    parser.add_argument("--out", type=Path, default=gpu.DEFAULT_OUT, help="folder to write (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        content = merged([json.loads((folder / "gpu.json").read_text()) for folder in options.folders])
    except ValueError as error:
        parser.error(str(error))
    text = "\n".join((folder / "gpu.txt").read_text() for folder in options.folders)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "gpu.txt").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
