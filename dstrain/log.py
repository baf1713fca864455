"""Messages for people: rank 0 speaks at INFO, the others only from WARNING up. Numbers for machines go to the event file."""

import logging
import sys

logger = logging.getLogger("dstrain")


def setup_logging(*, debug: bool = False, rank: int | None = None) -> None:
    """Send dstrain's messages to stderr, prefixed with the rank; rank: None for a single process."""
    prefix = "" if rank is None else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if debug else logging.INFO if not rank else logging.WARNING)
