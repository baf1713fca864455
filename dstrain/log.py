"""Messages for people: rank 0 speaks at INFO, the others only from WARNING up. Numbers for machines go to the event file."""

import logging
import os
import sys

logger = logging.getLogger("dstrain")


def setup_logging(*, debug: bool = False) -> None:
    """Send dstrain's messages to stderr, prefixed with the rank where there are several."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
    prefix = f"[rank {rank}] " if world_size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)
