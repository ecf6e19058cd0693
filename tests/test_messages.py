"""What a user is told where a backend, a device or an environment variable is not as it should be."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dbmtl_fused import __main__, backends

ROOT = Path(__file__).parents[1]
NO_GPU = "it needs a GPU; none is visible to torch (torch.cuda.is_available() is False)"
BUILD = "run `pip install --no-build-isolation .` in a checkout of dbmtl_fused"
NAMES = "('auto', 'cuda', 'triton', 'cpu', 'reference')"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend but the reference has kernels, and torch is a CUDA build that sees no GPU."""
    monkeypatch.setattr(backends, "_has_kernels", lambda backend, device_type: backend == "reference")
    monkeypatch.setattr(backends, "why_not", backends.why_not.__wrapped__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for device in (torch.cuda, torch.xpu):
        monkeypatch.setattr(device, "is_available", lambda: False)


@pytest.mark.usefixtures("elsewhere")
class TestDevices:
    @pytest.mark.parametrize("name", ["cuda", "triton"])
    def test_no_gpu(self, name: str) -> None:
        assert backends.why_not(name, "cpu") == NO_GPU

    @pytest.mark.parametrize("name", ["cuda", "triton"])
    def test_torch_without_cuda(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        cure = f"torch {torch.__version__} is a build without CUDA, install one with CUDA"
        assert backends.why_not(name, "cpu") == f"it needs a GPU; {cure}"

    @pytest.mark.parametrize("name", ["cuda", "triton"])
    def test_tensors_on_the_cpu(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        cure = "it works on GPU tensors; move the model to the GPU before its balancer is built"
        assert backends.why_not(name, "cpu") == cure

    def test_tensors_on_the_gpu(self) -> None:
        cure = "it works on CPU tensors; move the model to the CPU before its balancer is built"
        assert backends.why_not("cpu", "cuda") == cure

    def test_interpreted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_import_error", lambda module: None)
        assert backends.why_not("triton", "cuda") == (
            "its interpreter (TRITON_INTERPRET=1) works on CPU tensors; unset TRITON_INTERPRET"
        )

    @pytest.mark.parametrize("source", ["backend", backends.ENVIRONMENT_VARIABLE])
    def test_explicit_choice(self, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "DEFAULT", "cuda")
        cure = "use backend='auto'" if source == "backend" else f"unset {source}"
        with pytest.raises(RuntimeError) as caught:
            backends.resolve("cuda" if source == "backend" else "auto", torch.device("cpu"))
        assert str(caught.value) == (
            f"{source}='cuda' cannot run on cpu tensors here: {NO_GPU}; or {cure} for the fastest that can"
        )

    def test_info(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(backends, "DEFAULT", "cuda")
        assert __main__.main(["info"]) == 0
        out = capsys.readouterr().out
        assert f"  cuda      no: {NO_GPU}\n" in out
        assert (
            f"  auto      none: {backends.ENVIRONMENT_VARIABLE}='cuda' cannot run on cpu tensors here: {NO_GPU}" in out
        )

    def test_automatic_choice(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(backends, "_import_error", lambda module: f"no {module}")
        with caplog.at_level("WARNING", logger="dbmtl_fused"):
            assert backends._auto.__wrapped__("cuda") == "reference"
        assert caplog.messages == [
            "backend 'reference' for cuda tensors; no cuda: no dbmtl_fused._C_cuda; "
            "no triton: no dbmtl_fused.triton_kernels"
        ]


IMPORTS: dict[str, tuple[str, Exception, str]] = {
    "no build": (
        "dbmtl_fused._C",
        ModuleNotFoundError(name="dbmtl_fused._C"),
        f"dbmtl_fused._C is not there: its build did not run; put that right and {BUILD}",
    ),
    "no Triton kernels": (
        "dbmtl_fused.triton_kernels",
        ModuleNotFoundError(name="dbmtl_fused.triton_kernels"),
        f"dbmtl_fused.triton_kernels is not there: its build did not run; put that right and {BUILD}",
    ),
    "broken": (
        "dbmtl_fused._C",
        ImportError("undefined symbol: spam"),
        f"dbmtl_fused._C cannot be imported beside torch {torch.__version__}: undefined symbol: spam; {BUILD}",
    ),
    "no Triton": (
        "dbmtl_fused.triton_kernels",
        ModuleNotFoundError(name="triton"),
        "Triton is not installed; run `pip install triton`",
    ),
    "another Triton": (
        "dbmtl_fused.triton_kernels",
        AttributeError("no knobs"),
        f"dbmtl_fused.triton_kernels cannot be imported beside torch {torch.__version__}: no knobs; "
        "install another version of Triton",
    ),
}


@pytest.mark.parametrize(("module", "error", "message"), IMPORTS.values(), ids=IMPORTS)
def test_a_module_that_cannot_be_imported(
    module: str, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    assert backends._import_error.__wrapped__(module) == message


def test_the_record_of_a_build_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    (tmp_path / "_build_error_cuda.txt").write_text("there is no nvcc\n")
    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    assert backends._import_error.__wrapped__("dbmtl_fused._C_cuda") == (
        f"dbmtl_fused._C_cuda is not there: there is no nvcc; put that right and {BUILD}"
    )


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command writes that ends with status 2."""
    with pytest.raises(SystemExit) as caught:
        __main__.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err.split(" error: ")[1].rstrip()


@pytest.mark.parametrize("value", ["gpu", "cud"])
@pytest.mark.parametrize("command", __main__.COMMANDS)
def test_the_environment_names_no_backend(
    command: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "DEFAULT", value)
    assert complaint(capsys, command) == f"{backends.ENVIRONMENT_VARIABLE} must be one of {NAMES}, got {value!r}"


@pytest.mark.parametrize("command", ["check", "demo", "bench"])
@pytest.mark.parametrize("name", ["nonsense", "cuda", "meta", "cpu:7"])
def test_a_device_that_is_not_there(
    command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "no_gpu", lambda: "none today")
    expected = f"argument --device: must be one of cpu, got {name!r}; for a GPU: none today"
    assert complaint(capsys, command, "--device", name) == expected


def test_one_gpu_too_many(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    expected = "argument --device: must be one of cpu, cuda, cuda:0, cuda:1, got 'cuda:2'"
    assert complaint(capsys, "check", "--device", "cuda:2") == expected


def test_bench_from_an_installed_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(__main__, "__file__", str(tmp_path / "dbmtl_fused" / "__main__.py"))
    assert __main__.main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("bench needs a checkout of the repository")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_an_empty_variable_counts_as_unset_and_a_wrong_one_is_named() -> None:
    pytest.importorskip("dbmtl_fused._C", reason="the C++ extension is not there")
    result = run("-m", "dbmtl_fused", "info", DBMTL_FUSED_BACKEND="", DBMTL_FUSED_CPU_ISA="sse")
    assert result.returncode == 2
    assert result.stderr.endswith(" error: DBMTL_FUSED_CPU_ISA must be one of baseline avx2 avx512f, got sse\n")


@pytest.mark.parametrize("name", ["DBMTL_FUSED_CUDA", "DBMTL_FUSED_WERROR"])
def test_setup_with_a_switch_that_is_neither_on_nor_off(name: str) -> None:
    result = run("setup.py", "--version", **{name: "yes"})
    assert (result.returncode, result.stderr) == (1, f"{name} must be 0, 1 or unset, got 'yes'\n")


def test_setup_without_a_compiler(tmp_path: Path) -> None:
    """Each module's record says what its build needs, and what the environment asks for."""
    variables = {"CXX": "false", "TORCH_CUDA_ARCH_LIST": "nonsense", "DBMTL_FUSED_CUDA": "", "CUDA_HOME": str(tmp_path)}
    result = run("setup.py", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path), **variables)
    assert result.returncode == 0, result.stderr
    cpu, cuda = (tmp_path / "dbmtl_fused" / name for name in backends._BUILD_ERRORS.values())
    assert cpu.read_text().endswith(" (the build needs a C++17 compiler; its output says more)\n")
    expected = (
        f"torch {torch.__version__}, with which it was built, has no CUDA"
        if torch.version.cuda is None
        else "(the build needs a C++17 compiler, TORCH_CUDA_ARCH_LIST='nonsense'; its output says more)"
    )
    assert expected in cuda.read_text()
