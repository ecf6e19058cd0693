"""``python -m dbmtl_fused info``: versions, devices, backends and why one is missing."""

from __future__ import annotations

import argparse
import importlib
import platform

import torch

from dbmtl_fused import __version__, backends
from dbmtl_fused._ops import BACKENDS


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m dbmtl_fused info", description=__doc__).parse_args(arguments)
    print(f"dbmtl_fused {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for name, fact in build_facts().items():
        print(f"  {name}: {fact}")
    for device_type, description in devices().items():
        print(f"\n{device_type}: {description}")
        for backend in BACKENDS:
            reason = backends.why_not(backend, device_type)
            print(f"  {backend:10}{'yes' if reason is None else f'no: {reason}'}")
        try:
            chosen = backends.resolve("auto", torch.device(device_type))
        except RuntimeError as error:  # what the environment asks for cannot run
            chosen = f"none: {error}"
        print(f"  {'auto':10}{chosen}")
    return 0


def build_facts() -> dict[str, str]:
    """What the native modules were built with."""
    facts = {}
    for module in backends.native_modules():
        facts.update(
            {f"C++ extension, {name}": str(fact) for name, fact in importlib.import_module(module).build_info().items()}
        )
    return facts


def device(name: str) -> torch.device:
    """Parse the argument of ``--device``: a device that torch can use here."""
    here = list(devices())
    indices = range(torch.accelerator.device_count() if here[1:] else 0)
    names = [*here, *(f"{here[-1]}:{i}" for i in indices)]
    if name not in names:
        hint = "" if indices else f"; for a GPU: {backends.no_gpu()}"
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {name!r}{hint}")
    return torch.device(name)


def devices() -> dict[str, str]:
    """Device types to report on: the CPU, and the accelerator if there is one."""
    found = {
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    }
    if torch.accelerator.is_available():
        device_type = torch.accelerator.current_accelerator()
        assert device_type is not None
        found[device_type.type] = f"{torch.accelerator.device_count()} device(s)"
    return found
