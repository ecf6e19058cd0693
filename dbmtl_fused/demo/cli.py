"""The demo's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from dbmtl_fused import info
from dbmtl_fused.demo import digits, figure, report
from dbmtl_fused.demo.study import add_arguments, run_study
from dbmtl_fused.demo.training import EQUAL_WEIGHTING, METHODS, Settings


def argument_parser() -> argparse.ArgumentParser:
    """What the demo can be told."""
    result = argparse.ArgumentParser(
        prog="python -m dbmtl_fused demo",
        description="Multi-task training on overlaid pairs of real handwritten digits: single-task baselines, equal "
        "weighting, DB-MTL's two halves and DB-MTL. Prints a table; saves a figure and all numbers.",
    )
    add_arguments(result, epochs=6)
    result.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results (default %(default)s)")
    result.add_argument("--device", type=info.device, default="cpu", help="default %(default)s")
    result.add_argument("--quick", action="store_true", help="two short epochs, to see that everything works")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the demo with the command line ``argv`` and return the exit status."""
    args = argument_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    train_pairs, test_pairs, epochs, rounds = (640, 200, 2, 5) if args.quick else (16000, 2000, args.epochs, 100)
    load_problem = partial(digits.load_problem, train_pairs, test_pairs)
    settings = Settings(
        epochs=epochs, batch_size=64, learning_rate=1e-3, seed=args.seed, device=args.device, record_every=10
    )
    study = run_study(load_problem, list(METHODS.values()), settings, args.seeds, rounds)
    print(f"\n{report.text(study)}\n")

    report.save(study, args.out)
    shown = [EQUAL_WEIGHTING.name, METHODS["db-mtl"].name]
    histories = {name: history for name in shown if (history := study.results[name][0].history)}
    figure_path = args.out / "training.png"
    figure.draw(histories, train_pairs // settings.batch_size, args.seed, figure_path)
    print(f"Figure: {figure_path}")
    return 0
