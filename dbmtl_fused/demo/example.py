"""The command line of the programs in ``examples``: a study of a data file that the user has fetched."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dbmtl_fused.demo import report
from dbmtl_fused.demo.study import add_arguments, run_study
from dbmtl_fused.demo.training import ALL_METHODS, METHODS, Problem, Settings


def run(
    argv: Sequence[str],
    *,
    description: str,
    file: str,
    load_problem: Callable[[Path, int], Problem],
    epochs: int,
    batch_size: int,
) -> int:
    """Compare methods on ``load_problem(path, seed)`` with the command line ``argv`` and return the exit status.

    :param file: What ``--data`` must be.
    :param epochs: The default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help=file)
    add_arguments(parser, epochs=epochs)
    parser.add_argument(
        "--methods", nargs="+", choices=ALL_METHODS, default=list(METHODS), help="default: all but db-mtl-bf16"
    )
    parser.add_argument("--beta", type=float, default=0.9, help="of methods with an EMA (default %(default)s)")
    parser.add_argument("--beta-sigma", type=float, default=0.5, help="likewise (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the table and all numbers (default: only print)")
    args = parser.parse_args(argv)
    if not args.data.is_file():
        parser.error(f"--data must be the file {file} (see the top of this script), got {str(args.data)!r}")
    torch.set_num_threads(args.threads)
    settings = Settings(
        epochs=args.epochs,
        batch_size=batch_size,
        learning_rate=1e-3,
        seed=args.seed,
        device=torch.device("cpu"),
        record_every=50,
    )
    ema_options = {"beta": args.beta, "beta_sigma": args.beta_sigma}
    methods = [ALL_METHODS[name] for name in args.methods]
    methods = [replace(method, options=ema_options | dict(method.options)) for method in methods]
    study = run_study(partial(load_problem, args.data), methods, settings, args.seeds, timing_rounds=100)
    print(f"\n{report.text(study, tasks_in_rows=True)}\n")
    if args.out:
        report.save(study, args.out, tasks_in_rows=True)
    return 0
