"""What machine a GPU report was made on: ``python -m benchmarks.gpu_info --out FILE.json``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda_tools, report
from benchmarks.gpu import COMMIT
from dbmtl_fused import backends, info

_QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,clocks_throttle_reasons.active,"
    "power.draw,power.limit,temperature.gpu,utilization.gpu,memory.total,memory.used,ecc.mode.current,mig.mode.current"
)
SAMPLE_SECONDS = 5.0
_PACKAGES = ("numpy", "triton", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "pybind11", "ninja")


def main(argv: Sequence[str] | None = None) -> int:
    """Print, and write as JSON; 0 unless something raises."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_info", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    info.main([])
    found = {
        **environment(device),
        "device": device_facts(device),
        "why_not": {backend: backends.why_not(backend, device.type) for backend in backends.BACKENDS},
        "packages": {package: _version(package) for package in _PACKAGES},
        "nvidia_smi": nvidia_smi(device),
        "nvcc": _output("nvcc", "--version"),
    }
    print(f"\ndevice: {found['device']}\ncommit: {found['commit']}{' and changes' if found['dirty'] else ''}")
    print(f"packages: {found['packages']}\nnvidia-smi: {found['nvidia_smi']}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def environment(device: torch.device) -> dict[str, Any]:
    """That of all results; the commit, where git does not know it, as ``make gpu`` was told."""
    found = report.environment(torch.get_num_threads(), device)
    if found["commit"] is None:
        found |= {"commit": os.environ.get(COMMIT), "dirty": None}
    return found


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    if device.type != "cuda":
        return {"name": str(device)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def nvidia_smi(device: torch.device) -> dict[str, str] | str:
    """Clocks, power and driver of the first GPU as they are now, or why they are not known."""
    if device.type != "cuda":
        return "skipped: needs a GPU"
    output = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    values = [value.strip() for value in output.splitlines()[0].split(",")] if output else []
    names = _QUERY.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else f"no answer: {output!r}"


@contextlib.contextmanager
def sampled(device: torch.device, seconds: float = SAMPLE_SECONDS) -> Iterator[list[dict[str, str] | str]]:
    """A list that grows by what :func:`nvidia_smi` says every few seconds of the block: clocks before and after it are
    those of an idle GPU. Stays empty without a GPU."""
    found: list[dict[str, str] | str] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(seconds):
            found.append(nvidia_smi(device))

    thread = threading.Thread(target=sample, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        if device.type == "cuda":
            thread.join()


def _output(program: str, *arguments: str) -> str:
    if (path := cuda_tools.find(program)) is None:
        return ""
    try:
        return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> Any:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
