"""Turns failures of machine or disk into one sentence: the fault, and which work is safe."""

from __future__ import annotations

import errno
from pathlib import Path

from dstrain.errors import TrainingError

LOST_RANK_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "connection refused",
    "remote process exited",
    "nccl communicator was aborted",
    "heartbeat",
)
"""Messages of gloo, NCCL and the rendezvous store after the loss of another process."""


def explained(error: BaseException, latest: Path | None) -> TrainingError | None:
    """The error in a user's words if another rank was lost or the disk is full; None if it is neither.

    latest: the last complete checkpoint.
    """
    safe = f"the last checkpoint is {latest}" if latest else "no checkpoint had been written yet"
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        where = f" at {error.filename}" if error.filename else ""
        return TrainingError(f"the disk is full{where}; {safe}; free some space, then start again to resume")
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(sign in text for sign in LOST_RANK_SIGNS):
        return TrainingError(
            f"another rank ended unexpectedly (its own message, if any, says why); {safe}; start again to resume"
        )
    return None
