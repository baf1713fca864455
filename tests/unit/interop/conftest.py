"""Fixtures for checkpoints of other tools."""

import pytest

from tests.unit.interop.fairseq_checkpoints import AbsentModules


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> AbsentModules:
    """Classes of modules that are not installed."""
    return AbsentModules(monkeypatch)
