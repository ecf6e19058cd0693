"""Show that ``test_fuzz.py`` finds bugs: plant them one by one in a copy of the package and run it there.

    python tests/planted_bugs.py [WORD ...]        all of them, or those in whose name a word occurs

A bug is text to be replaced, which must occur exactly once. Where the code has moved on, adapt the table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES = 300
SECONDS = 300  # for one bug

Patch = tuple[str, str, str]
"""File, text, replacement."""

BUGS: dict[str, list[Patch]] = {
    # --- The EMA
    "the EMA decays with every micro-batch": [
        ("rows.py", "accumulate = accumulate or step.taken[task] > 0", "accumulate = bool(accumulate)")
    ],
    "the row of an absent task decays": [
        (
            "balancer.py",
            "step.leave_out(absent)",
            "step.leave_out(absent); [self._row_decays(t) for t in absent]",
        ),
        (
            "balancer.py",
            "    def _forget_results(self)",
            "    def _row_decays(self, t):\n"
            "        if isinstance(self._rows, EmaRows):\n"
            "            self._rows.buffer[t].mul_(0.9)\n\n"
            "    def _forget_results(self)",
        ),
    ],
    "beta is that of the next step": [
        (
            "rows.py",
            "            self.number,\n            *self._schedule,",
            "            self.number + 1,\n            *self._schedule,",
        )
    ],
    "parameters that a task does not reach do not decay": [
        ("capture.py", "missing = [i for i in range(len(self._params)) if i not in reached]", "missing = []")
    ],
    "a leaf that fires twice decays twice": [
        (
            "capture.py",
            "self._sink([index], [ordered], accumulate=True)",
            "self._sink([index], [ordered], accumulate=False)",
        )
    ],
    "the EMA is dropped a step early": [
        ("schedule.py", "return self.at_most >= self._last_step", "return self.at_most >= self._last_step - 1")
    ],
    "rounding draws the same in every step": [
        ("rows.py", "return (self.number * T + torch.arange", "return (0 * self.number + torch.arange")
    ],
    "rounding draws again what a neighbour drew": [
        ("rows.py", "return (self.number * T + torch.arange", "return (self.number + torch.arange")
    ],
    # --- Weights
    "preference is ignored in alpha": [
        ("reference.py", "if preference is None else preference != 0", "if preference is None else preference >= 0")
    ],
    "alpha min counts rows of zeros": [
        ("reference.py", "counts = counts & (norms != 0)", "counts = counts & (norms >= 0)")
    ],
    "norms are those before the update": [
        (
            "rows.py",
            "        self._step = step\n",
            "        self._step = step\n        self._before = self.sq_norms.clone()\n",
        ),
        ("rows.py", "            self.sq_norms[tasks],\n", "            self._before[tasks],\n"),
    ],
    "eps is left out": [("reference.py", "alpha_value / (norms + eps)", "alpha_value / norms")],
    "log_eps is added twice": [
        (
            "balancer.py",
            "call.tasks, losses.values, scale, **options",
            "call.tasks, losses.values + (self.log_eps or 0), scale, **options",
        )
    ],
    "absent tasks count in alpha": [("rows.py", "self.preference[task].zero_()", "self.preference[task].clone()")],
    "the mask is inverted": [("rows.py", ".where(active, 0)", ".where(~active, 0)")],
    "the mask is not that of the tasks that came": [
        ("balancer.py", "of_losses = torch.stack([active[task] for task in tasks])", "of_losses = active[: len(tasks)]")
    ],
    # --- Scales and windows
    "the scale is not divided out": [
        ("rows.py", "            step.inv_scale,\n", "            step.inv_scale.new_ones(()),\n")
    ],
    "the scale is applied twice": [
        (
            "rows.py",
            "self._combine(columns, out, slice(None), self._alpha, step.scale,",
            "self._combine(columns, out, slice(None), self._alpha, step.scale**2,",
        )
    ],
    "grad_norm is in the units of the scale": [("rows.py", ".sum().sqrt() / self.scale.abs()", ".sum().sqrt()")],
    "micro-batches are added up": [("rows.py", "            micro_batches,\n", "            1,\n")],
    "flush takes the mean over what came": [
        (
            "balancer.py",
            "            self._write(self._finish_step(self._window), overwrite)\n",
            "            for t, n in enumerate(self._window.taken):\n"
            "                if n and isinstance(self._rows, EmaRows):\n"
            "                    self._rows.buffer[t] *= self._window.size / n\n"
            "            self._write(self._finish_step(self._window), overwrite)\n",
        )
    ],
    # --- Overflow
    "weights of a flagged step are not NaN": [
        ("reference.py", "weights.copy_(balanced.masked_fill(found_inf != 0, torch.nan))", "weights.copy_(balanced)")
    ],
    "a step that overflowed counts": [("reference.py", "step += found_inf == 0", "step += 1")],
    "a later micro-batch clears the flag": [("rows.py", "            bool(self.betas),  #", "            False,  #")],
    # --- .grad
    "memory of a gradient is used again while it is held": [("grads.py", " and not _is_held_elsewhere(kept):", ":")],
    "overwrite is ignored": [("grads.py", "if overwrite or p.grad is None]", "if p.grad is None]")],
    "overwrite clears what gets nothing": [
        (
            "grads.py",
            "    pairs = [",
            "    for p, grad in zip(params, grads) if overwrite else ():\n        p.grad = grad\n    pairs = [",
        )
    ],
    "heads get weighted gradients": [
        (
            "balancer.py",
            "return losses.of_roots(step.take(begin_step, call.tasks, losses.values, scale, **options))",
            "seeds = step.take(begin_step, call.tasks, losses.values, scale, **options)\n"
            "        return losses.of_roots(seeds * self.weights[call.tasks].nan_to_num(1.0).to(seeds))",
        )
    ],
    "autograd.grad reaches heads": [
        ("balancer.py", "inputs = None if with_heads else [", "inputs = None if True else [")
    ],
    "a frozen parameter gets a gradient": [("balancer.py", "grad if self._params[i].requires_grad else None", "grad")],
    "gradients are taken in any memory order": [
        ("layout.py", "if strides == slot.strides or _same_order", "if True or _same_order")
    ],
    "channels_last gradients come contiguous": [
        ("layout.py", "strides = p.stride() if is_dense(p) else", "strides = p.stride() if p.is_contiguous() else")
    ],
    "gradients of parameters are swapped": [
        (
            "balancer.py",
            "for i, grad in zip(slots, balanced, strict=True):",
            "for i, grad in zip(slots[::-1], balanced, strict=True):",
        )
    ],
    # --- Graphs and failures
    "stacked losses are taken in reverse": [
        (
            "losses.py",
            "for name, (node, index) in zip(self.task_names, edges, strict=True):",
            "for name, (node, index) in zip(self.task_names, edges[::-1], strict=True):",
        )
    ],
    "a graph is freed before its last task": [("losses.py", "            seen |= own", "            seen = own")],
    "hooks act after a failure": [
        (
            "capture.py",
            "        self.is_running = False\n        self._start_task()\n        if self._set_aside",
            "        self._start_task()\n        if self._set_aside",
        ),
        ("capture.py", "            cell.collector = before", "            pass"),
    ],
    ".grad is not put back": [("capture.py", "        assign_grads(self._params, self._set_aside)\n", "")],
    "a failure is forgotten": [
        (
            "balancer.py",
            '                self._failure = "its last step did not finish"',
            '                self._failed = "its last step did not finish"',
        )
    ],
    # --- State
    "parameters reached are forgotten on load": [
        (
            "balancer.py",
            "self._reached = [slot.name in loaded.reached for slot in self.layout.slots]",
            "self._reached = [False] * len(self._params)",
        )
    ],
    "state_dict has no step": [("balancer.py", '"step": self.step,', '"step": torch.zeros_like(self.step),')],
    "load keeps the step": [("balancer.py", "        self._step.fill_(loaded.step)\n", "")],
    "load keeps old norms": [("balancer.py", "            rows.measure()\n", "")],
    "reset(task) clears another row": [
        (
            "balancer.py",
            "self._rows.clear(self.task_names.index(task))",
            "self._rows.clear(-1 - self.task_names.index(task))",
        )
    ],
    "reset(task) keeps the norm": [("rows.py", "        self.sq_norms[rows].zero_()\n", "")],
    "a copy shares the buffer": [
        (
            "balancer.py",
            "        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))\n",
            "        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))\n"
            "        copied._rows = self._rows\n",
        )
    ],
    "step is not a copy": [("balancer.py", "return self._step.clone()", "return self._step")],
}


def copy_package(folder: Path) -> None:
    """Copy what the test needs."""
    shutil.copytree(
        ROOT / "dbmtl_fused", folder / "dbmtl_fused", ignore=shutil.ignore_patterns("triton_kernels", "demo")
    )
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def plant(folder: Path, patches: list[Patch]) -> None:
    """Replace each text.

    :raises ValueError: If one does not occur exactly once.
    """
    for file, text, replacement in patches:
        path = folder / "dbmtl_fused" / file
        source = path.read_text()
        if source.count(text) != 1:
            raise ValueError(f"{file} must hold this once, it does {source.count(text)} times: {text!r}")
        path.write_text(source.replace(text, replacement))


def run_test(folder: Path) -> tuple[bool, str]:
    """Whether the test passes, and what it complained about."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "DBMTL_FUSED_TEST_SEQUENCES": str(SEQUENCES),
        "DBMTL_FUSED_TEST_SHRINK": "0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_fuzz.py"]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False, "does not end"
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    summary = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 0, summary[0].split(" - ")[-1] if summary else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    chosen = {name: bug for name, bug in BUGS.items() if not words or any(word in name for word in words)}
    missed = []
    for name, patches in {"": [], **chosen}.items():
        with tempfile.TemporaryDirectory() as folder:
            copy_package(Path(folder))
            begin = time.monotonic()
            try:
                plant(Path(folder), patches)
            except ValueError as error:
                print(f"       {name}: {error}")
                missed.append(name)
                continue
            passes, complaint = run_test(Path(folder))
        outcome = "passes" if passes else f"found: {complaint}"
        print(f"{time.monotonic() - begin:4.0f} s  {name or '(no bug)'}: {outcome}", flush=True)
        if not name and not passes:
            return 1
        if name and passes:
            missed.append(name)
    print(f"found {len(chosen) - len(missed)} of {len(chosen)}" + "".join(f"\n    missed: {name}" for name in missed))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
