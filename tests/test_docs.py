"""The programs in the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch._functorch.config as functorch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()
SECTIONS = {section.splitlines()[0]: section for section in re.split(r"\n##+ ", PAGE)[1:]}
PROGRAMS = {
    name: program
    for name, section in SECTIONS.items()
    for program in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
}


def test_every_section_has_a_program() -> None:
    assert len(PROGRAMS) == PAGE.count("```python\n")
    assert SECTIONS.keys() - PROGRAMS.keys() == {"Special cases"}  # whose parts have one each


@pytest.mark.parametrize("section", PROGRAMS)
def test_program(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setting = functorch.donated_buffer  # one program changes it for good
    # In this process: a start of its own would cost each program seconds.
    with torch.random.fork_rng(), functorch.patch(donated_buffer=setting):
        exec(compile(PROGRAMS[section], section, "exec"), {"__name__": "__main__"})
    assert functorch.donated_buffer is setting
