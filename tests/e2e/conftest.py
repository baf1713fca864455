"""Prepared data that the end-to-end tests share."""

from pathlib import Path

import pytest

from tests.e2e.support import RECIPE, SMALL_DATA, dstrain, settings, succeeds


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred grammar pairs, prepared through the command line."""
    directory = tmp_path_factory.mktemp("prepared") / "data"
    succeeds(dstrain("prepare", RECIPE, "--output", directory, "--workers", "1", *settings(*SMALL_DATA)))
    return directory
