"""The programs in the documentation run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()
PROGRAMS = {
    section.splitlines()[0]: program
    for section in PAGE.split("\n## ")[1:]
    for program in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
}


def test_every_section_has_a_program() -> None:
    assert len(PROGRAMS) == PAGE.count("\n## ")


@pytest.mark.parametrize("section", PROGRAMS)
def test_program(section: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAMS[section]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
