"""Messages for people: rank 0 speaks at INFO, the others only from WARNING up. Numbers for machines go to the event file."""

import logging
import sys
from collections.abc import Mapping

logger = logging.getLogger("dstrain")


def setup_logging(*, debug: bool = False, rank: int | None = None) -> None:
    """Send dstrain's messages to stderr; from WARNING up with level and rank. rank: None for a single process."""
    handler = _ToStderr()
    handler.setFormatter(_Format(rank))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if debug else logging.INFO if not rank else logging.WARNING)


def log_fields(fields: Mapping[str, object]) -> None:
    """One line a field, aligned; those that are None are left out."""
    for name, value in fields.items():
        if value is not None:
            logger.info("  %-9s %s", name, value)


class _ToStderr(logging.Handler):
    """Writes to what `sys.stderr` is at the time: while progress bars are shown, to the lines above them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Format(logging.Formatter):
    def __init__(self, rank: int | None) -> None:
        prefix = "" if rank is None else f"[rank {rank}] "
        super().__init__(f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S")
        self._information = logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        if record.name != logger.name:
            record = logging.makeLogRecord({**record.__dict__, "msg": f"{record.name}: {record.msg}"})
        return self._information.format(record) if record.levelno == logging.INFO else super().format(record)
