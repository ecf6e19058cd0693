"""What machine a GPU report was made on: ``python -m benchmarks.gpu_info --out FILE.json``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from dbmtl_fused import backends, info

_QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,clocks_throttle_reasons.active,"
    "power.draw,power.limit,temperature.gpu,memory.total,memory.used,ecc.mode.current,mig.mode.current"
)
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
        **report.environment(torch.get_num_threads()),
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


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def _version(package: str) -> Any:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
