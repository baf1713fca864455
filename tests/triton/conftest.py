"""Triton's kernels by its interpreter, which it chooses when it is imported: so these tests have a process of their own.

TRITON_INTERPRET=1 pytest -m triton tests/triton
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reason = "triton is not installed" if find_spec("triton") is None else "" if interpreted else "TRITON_INTERPRET is not 1"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.triton)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
