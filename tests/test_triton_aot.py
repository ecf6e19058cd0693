"""Triton kernels compiled ahead of time, which needs no GPU: nothing spills, and memory is accessed 16 bytes at a time.

The host's side runs on meta tensors; what it would have launched is caught and compiled for each architecture, with the
launch parameters of ``triton_kernels/tuning.py`` and the specialisation that Triton would have chosen.

Which registers spill and which loads come first is the compiler's choice. Triton 3.6 to 3.9 have been seen to do what
is asked for below, but for ``EXCEPTIONS``; of another one only that is asked which cannot be chance: at most
``PUT_ASIDE`` bytes a thread on the stack, out of loops, and half of the loads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dbmtl_fused import backends

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton_launches import (  # noqa: E402
    Launch,
    balance_launch,
    begin_step_launch,
    combine_launch,
    ema_update_launch,
    gram_launch,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.bool: "u1",
    torch.int32: "i32",
    torch.int64: "i64",
}


def source_of(launch: Launch) -> Any:
    """The kernel with the types and hints that Triton derives from such arguments; all tensors are 16-byte aligned."""
    kernel, values, _ = launch
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value, place = values[parameter.name], (parameter.num,)
        hint = [["tt.divisibility", 16]]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
                attributes[place] = hint
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[place] = hint
    return ASTSource(kernel, signature, constants, attributes)


class Machine(NamedTuple):
    """The machine code of a kernel for one architecture."""

    architecture: str
    stack: int  # bytes a thread
    sass: str

    @classmethod
    def of(cls, launch: Launch, architecture: str, directory: Path) -> Machine:
        target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
        compiled = triton.compile(source_of(launch), target=target, options=launch[2])
        cubin = directory / f"{architecture}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", "--dump-sass", cubin]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
        assert found, listing[:1000]
        return cls(architecture, int(found[1]) + int(found[2]), listing)

    def count(self, instruction: str, before: str | None = None) -> int:
        text = self.sass if before is None else re.split(before, self.sass, maxsplit=1)[0]
        return len(re.findall(instruction, text))

    def addresses(self, instruction: str) -> list[int]:
        return [int(address, 16) for address in re.findall(rf"/\*([0-9a-f]{{4,}})\*/[^;]*{instruction}", self.sass)]

    def spills_in_loops(self) -> bool:
        branches = re.findall(r"/\*([0-9a-f]{4,})\*/[^;]*\bBRA\S* [^;]*\b0x([0-9a-f]+)", self.sass)
        loops = [(int(target, 16), int(end, 16)) for end, target in branches if int(target, 16) < int(end, 16)]
        return any(first <= spill <= end for spill in self.addresses(SPILL) for first, end in loops)


def machines_of(launch: Launch, directory: Path) -> Iterable[Machine]:
    """For every architecture, one after the other: Python 3.11 cannot parse in several threads at a time."""
    return (Machine.of(launch, architecture, directory) for architecture in ARCHITECTURES)


WIDE_LOAD, WIDE_STORE = r"LDG\.E\S*\.128", r"STG\.E\S*\.128"
PRODUCT = r"\b[FD]MUL"
BARRIER = r"\bBAR\."
SPILL = r"\b(?:LDL|STL)\b"

PUT_ASIDE = 32

SEEN = ("3.6", "3.7", "3.8", "3.9")
"""Versions of Triton whose choices are known."""

TRITON = ".".join(triton.__version__.split(".")[:2])


class Choice(NamedTuple):
    """What a compiler was seen to do instead of what is asked for."""

    stack: int | None = None
    loads: int | None = None


EXCEPTIONS = {
    # Four registers, put aside before the loop and taken back behind it.
    ("3.8", "sm_100", "combine T=64"): Choice(stack=16),
    ("3.8", "sm_80", "gram T=11"): Choice(loads=6),  # of eight; the other two behind the first products
}


def check(machine: Machine, name: str, loads: int, before: str) -> None:
    """Nothing spills; ``loads`` 16-byte loads are on their way before the first instruction that is like ``before``."""
    found = machine.count(WIDE_LOAD, before)
    if TRITON in SEEN:
        choice = EXCEPTIONS.get((TRITON, machine.architecture, name), Choice())
        assert machine.stack <= (choice.stack or 0), f"spills, {machine.architecture}"
        assert found >= (choice.loads or loads), machine.architecture
    else:
        assert machine.stack <= PUT_ASIDE, f"spills, {machine.architecture}"
        assert found >= loads / 2, machine.architecture
    assert not machine.spills_in_loops(), machine.architecture


F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# What to launch, and how many 16-byte loads must be on their way before the first 16-byte store.
LAUNCHES: dict[str, tuple[Callable[[Any], Launch], int]] = {
    **{
        f"balance T={T}": (lambda r, T=T: balance_launch(r, T, F32, F32), min(2 * T, 8))
        for T in (1, 2, 3, 8, 11, 12, 16)
    },
    "balance T=64": (lambda r: balance_launch(r, 64, F32, F32), 8),
    "balance T=3 small": (lambda r: balance_launch(r, 3, F32, F32, 65_536), 6),
    "balance T=3 bf16 gradients": (lambda r: balance_launch(r, 3, F32, BF16), 3),
    "balance T=3 bf16 state": (lambda r: balance_launch(r, 3, BF16, BF16), 4),
    "balance T=11 bf16 state": (lambda r: balance_launch(r, 11, BF16, BF16), 3),
    "balance T=16 bf16 state, fp32 gradients": (lambda r: balance_launch(r, 16, BF16, F32), 4),
    "balance T=3 fp64": (lambda r: balance_launch(r, 3, F64, F64), 6),
    "balance T=16 fp64": (lambda r: balance_launch(r, 16, F64, F64), 8),
    **{f"combine T={T}": (lambda r, T=T: combine_launch(r, T, F32, F32), min(T, 8)) for T in (1, 2, 3, 8, 11, 16, 64)},
    "combine T=3 bf16 state": (lambda r: combine_launch(r, 3, BF16, BF16), 3),
    "combine T=16 bf16 state": (lambda r: combine_launch(r, 16, BF16, F32), 8),
    "combine T=3 accumulate": (lambda r: combine_launch(r, 3, F32, F32, accumulate=True), 4),
    "combine T=3 fp64": (lambda r: combine_launch(r, 3, F64, F64), 4),
    "combine T=3 preference": (lambda r: combine_launch(r, 3, F32, F32, preference=True), 6),
    "ema_update": (lambda r: ema_update_launch(r, F32, F32), 8),
    "ema_update bf16 gradients": (lambda r: ema_update_launch(r, F32, BF16), 4),
    "ema_update mixed gradients": (lambda r: ema_update_launch(r, F32, F32, BF16, F16, F64), 8),
    "ema_update bf16 state": (lambda r: ema_update_launch(r, BF16, BF16), 4),
    "ema_update fp64": (lambda r: ema_update_launch(r, F64, F64), 8),
}


# Likewise, before the first product.
GRAM_LAUNCHES: dict[str, tuple[Callable[[Any], Launch], int]] = {
    "gram T=3": (lambda r: gram_launch(r, 3, F32), 3),
    "gram T=11": (lambda r: gram_launch(r, 11, F32), 8),
    "gram T=3 bf16 state": (lambda r: gram_launch(r, 3, BF16), 3),
    "gram T=11 fp64": (lambda r: gram_launch(r, 11, F64), 8),
}

BEGIN_LAUNCHES: dict[str, Callable[[Any], Launch]] = {
    "fp32": lambda r: begin_step_launch(r, 3, F32, F32),
    "fp32 no log": lambda r: begin_step_launch(r, 3, F32, F32, log_eps=None),
    "fp32 active": lambda r: begin_step_launch(r, 300, F32, F32, active=True, micro_batches=4, accumulate=True),
    "fp32 losses": lambda r: begin_step_launch(r, 3, F32, F64),
    "fp64 losses": lambda r: begin_step_launch(r, 3, F64, F32, active=True),
    "fp64": lambda r: begin_step_launch(r, 3, F64, F64),
}

needs_cuobjdump = pytest.mark.skipif(not os.access(CUOBJDUMP, os.X_OK), reason="this Triton brings no cuobjdump")


@needs_cuobjdump
@pytest.mark.parametrize("name", LAUNCHES)
def test_machine_code(record: Any, tmp_path: Path, name: str) -> None:
    launch, loads = LAUNCHES[name]
    for machine in machines_of(launch(record), tmp_path):
        assert machine.count(WIDE_STORE) > 0
        check(machine, name, loads, before=WIDE_STORE)


@needs_cuobjdump
@pytest.mark.parametrize("name", GRAM_LAUNCHES)
def test_machine_code_of_gram(record: Any, tmp_path: Path, name: str) -> None:
    launch, loads = GRAM_LAUNCHES[name]
    for machine in machines_of(launch(record), tmp_path):
        check(machine, name, loads, before=PRODUCT)


@needs_cuobjdump
@pytest.mark.parametrize("launch", BEGIN_LAUNCHES.values(), ids=BEGIN_LAUNCHES)
def test_machine_code_of_begin_step(record: Any, tmp_path: Path, launch: Callable[[Any], Launch]) -> None:
    """One warp, which waits for nobody; on every architecture it has registers to spare."""
    machine = Machine.of(launch(record), "sm_90", tmp_path)
    assert machine.stack == 0, "spills"
    assert machine.count(BARRIER) == 0


@needs_cuobjdump
def test_spills_in_loops_are_found(record: Any, tmp_path: Path) -> None:
    """Of a kernel that is given half of the registers it wants."""
    kernel, parameters, options = LAUNCHES["balance T=16"][0](record)
    starved = Machine.of((kernel, parameters, options | {"maxnreg": 48}), "sm_90", tmp_path)
    assert starved.stack > PUT_ASIDE
    assert starved.spills_in_loops()


@pytest.mark.parametrize(
    ("version", "stack", "loads", "passes"),
    [
        ("3.9", 0, 4, True),
        ("3.9", 16, 4, False),
        ("3.9", 0, 3, False),
        ("3.8", 16, 4, True),
        ("3.8", 0, 4, True),
        ("9.9", 16, 2, True),
        ("9.9", 48, 4, False),
        ("9.9", 0, 1, False),
    ],
)
def test_what_is_asked_of_a_compiler(
    monkeypatch: pytest.MonkeyPatch, version: str, stack: int, loads: int, passes: bool
) -> None:
    """One that is known does what it was seen to do; another one has some freedom, but not within loops."""
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "TRITON", version)
    monkeypatch.setattr(module, "EXCEPTIONS", {("3.8", "sm_90", "some"): Choice(stack=16)})
    lines = ["STL [R1], R2 ;"] * (stack > 0) + ["LDG.E.128 R4, desc[UR8][R2.64] ;"] * loads
    lines += ["STG.E.128 desc[UR8][R2.64], R4 ;", "@P0 BRA 0x0010 ;"]
    sass = "\n".join(f"/*{16 * i:04x}*/ {line}" for i, line in enumerate(lines))
    with nullcontext() if passes else pytest.raises(AssertionError):
        check(Machine("sm_90", stack, sass), "some", 4, before=WIDE_STORE)
    if stack:
        with pytest.raises(AssertionError):
            check(Machine("sm_90", stack, sass.replace("0x0010", "0x0000")), "some", 4, before=WIDE_STORE)


@pytest.mark.parametrize("launch", BEGIN_LAUNCHES.values(), ids=BEGIN_LAUNCHES)
def test_arithmetic_of_begin_step(record: Any, launch: Callable[[Any], Launch]) -> None:
    """Numbers of the host arrive in float64, divisions are rounded correctly, float32 subnormals count."""
    made = launch(record)
    code = triton.compile(source_of(made), target=GPUTarget("cuda", 90, 32), options=made[2]).asm["ptx"]
    assert code.count(".param .f64") == 3
    divisions = re.findall(r"\bdiv\.\S+", code)
    assert divisions
    assert set(divisions) <= {"div.rn.f32", "div.rn.f64"}
    assert not re.search(r"\b(?:add|mul|div|fma)\S*\.ftz|\b(?:rcp|lg2|ex2)\S*\.f32", code)


def test_begin_step_is_compiled_once_for_all_trainings(record: Any) -> None:
    launches = (
        begin_step_launch(record, 1, F32, F32, beta=0.0, beta_sigma=0.0, log_eps=1.0),
        begin_step_launch(record, 3, F32, F32),
        begin_step_launch(record, 64, F32, F32, beta=1.0, beta_sigma=1.0, micro_batches=16),
    )
    assert len({(source_of(made).hash(), *made[2].items()) for made in launches}) == 1


def test_compiles_for_rocm(record: Any) -> None:
    """Wavefronts of 64, no limit on registers; 16-byte accesses and no scratch memory there either."""
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton has no AMD backend")
    for launch in (
        balance_launch(record, 3, F32, F32),
        combine_launch(record, 3, F32, F32),
        ema_update_launch(record, F32, F32),
        gram_launch(record, 3, F32),
    ):
        options = {name: value for name, value in launch[2].items() if name != "maxnreg"}
        compiled = triton.compile(source_of(launch), target=GPUTarget("hip", "gfx942", 64), options=options)
        code = compiled.asm["amdgcn"]
        assert int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1]) == 0
        assert re.search(r"(global|buffer|flat)_load_dwordx4", code)
        if "gram" not in launch[0].__name__:  # which stores next to nothing
            assert re.search(r"(global|buffer|flat)_store_dwordx4", code)


def test_begin_step_compiles_for_rocm(record: Any) -> None:
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton has no AMD backend")
    for made in (begin_step_launch(record, 3, F32, F32), begin_step_launch(record, 3, F64, F64, active=True)):
        compiled = triton.compile(source_of(made), target=GPUTarget("hip", "gfx942", 64), options=made[2])
        code = compiled.asm["amdgcn"]
        assert re.findall(r"\.private_segment_fixed_size:\s*(\d+)", code) == ["0"], "scratch memory"
        assert re.findall(r"FloatMode:\s*(\d+)", code) == ["240"], "subnormals of all dtypes count"


def test_cooperative_launch_is_asked_for(record: Any) -> None:
    """One launch, whose grid of one block a multiprocessor fits whatever else is compiled in: registers are limited."""
    _, parameters, options = balance_launch(record, 3, F32, F32)
    assert parameters["PHASES"] == "both"
    assert options["launch_cooperative_grid"]
    assert options["num_warps"] * 32 * options["maxnreg"] <= 65_536


def test_backend_is_registered_for_every_kind_of_gpu() -> None:
    for device_type in ("cuda", "xpu"):
        assert backends.why_not("triton", device_type) is None
