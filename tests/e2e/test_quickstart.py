"""The quickstart: one command from a fresh checkout to a translator that has learned its language."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.support import environment
from tests.paths import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_learns_and_is_idempotent(tmp_path: Path) -> None:
    """`bash tools/quickstart.sh`, from another directory; the second time it finds everything done."""
    variables = environment({"DSTRAIN_VENV": sys.prefix})

    def quickstart() -> str:
        finished = subprocess.run(
            ["bash", str(ROOT / "tools" / "quickstart.sh"), str(tmp_path / "work")],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=1400,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    printed = quickstart()
    scores = [float(score) for score in re.findall(r"BLEU\D+(\d+\.\d+)", printed)]
    assert scores, printed
    assert scores[0] > 90
    assert printed.count("  translation ") == 10
    assert (tmp_path / "work" / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    again = quickstart()
    assert re.findall(r"BLEU\D+(\d+\.\d+)", again) == re.findall(r"BLEU\D+(\d+\.\d+)", printed)
