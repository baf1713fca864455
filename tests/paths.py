"""Where tests find real text and golden values; both live outside the project and may be absent."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("DSTRAIN_DATA", ROOT.parent / "shared" / "data")).resolve()
GOLDEN = Path(os.environ.get("DSTRAIN_GOLDEN", ROOT.parent / "shared" / "golden")).resolve()

needs_data = pytest.mark.skipif(not (DATA / "multi30k").is_dir(), reason=f"no real text at {DATA}; set DSTRAIN_DATA")
needs_golden = pytest.mark.skipif(not (GOLDEN / "ref").is_dir(), reason=f"no golden values at {GOLDEN}; set DSTRAIN_GOLDEN")
