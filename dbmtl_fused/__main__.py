"""``python -m dbmtl_fused``: info, check, demo, bench."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from dbmtl_fused import backends

COMMANDS = {
    "info": ("dbmtl_fused.info", "which backends this machine has and, for each missing one, why"),
    "check": ("dbmtl_fused.check", "parity of every available backend against a float64 oracle, in seconds"),
    "demo": ("dbmtl_fused.demo", "train on overlaid handwritten digits and compare balancing methods"),
    "bench": ("benchmarks.run", "measure operators, steps and memory (from a checkout)"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dbmtl_fused",
        description=sys.modules["dbmtl_fused"].__doc__,
        epilog="\n".join(["commands:", *(f"  {name:7}{text}" for name, (_, text) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="see below; `COMMAND --help` shows its options")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments")
    parsed = parser.parse_args(arguments)
    try:
        backends.check_environment()
    except ValueError as error:
        parser.error(str(error))
    if parsed.command == "bench":
        checkout = Path(__file__).resolve().parents[1]
        if not (checkout / "benchmarks" / "run.py").exists():
            print(
                "bench needs a checkout of the repository: benchmarks/ is not installed with the package",
                file=sys.stderr,
            )
            return 2
        sys.path.insert(0, str(checkout))
    return importlib.import_module(COMMANDS[parsed.command][0]).main(parsed.arguments)


if __name__ == "__main__":
    sys.exit(main())
