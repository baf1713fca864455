"""The workspace of the followed remedies, made once in a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.remedy_workspace import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))
