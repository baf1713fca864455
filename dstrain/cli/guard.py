"""From what went wrong to one message and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time

from dstrain.errors import DstrainError, RecipeError
from dstrain.log import logger
from dstrain.parallel.launch_environment import is_first_of_machine, rank_for_messages


def guarded(args: argparse.Namespace) -> int:
    """Run the chosen verb. --debug prints stack traces; a defect of dstrain always does."""
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    except BrokenPipeError:
        _let_go_of_stdout()
        return 1
    except (DstrainError, OSError) as error:
        if args.debug:
            raise
        if _is_said_by_another_rank(error):
            time.sleep(1)  # a launcher ends all ranks once one has ended: the other one has time to speak
            return 1
        text = str(error) if isinstance(error, DstrainError) else _described(error)
        if isinstance(error, RecipeError) and rank_for_messages(os.environ):
            text = text.partition("\n")[0]  # rank 0 mostly finds the same mistakes, and lists them
        logger.error("%s", text)
        if isinstance(error, OSError):
            _let_go_of_stdout()
        return 1


def _is_said_by_another_rank(error: Exception) -> bool:
    """By the first rank what all raise together; by the first of a machine what is wrong before the ranks have met."""
    if not rank_for_messages(os.environ) or not isinstance(error, DstrainError):
        return False
    ranks_met = "dstrain.parallel.mesh" in sys.modules
    return error.on_all_ranks or not (ranks_met or is_first_of_machine(os.environ))


def _let_go_of_stdout() -> None:
    """Drop output that could not be written, so that the interpreter does not try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _described(error: OSError) -> str:
    """The refusal of the operating system, its path and the remedy."""
    from dstrain.storage.atomic import NO_SPACE

    if error.errno in NO_SPACE:
        # A file that is opened is named in the error of its writer; what is left is standard output.
        return f"{error.filename or 'standard output'}: {error.strerror}; free some space, or write elsewhere"
    path = f"{error.filename}: " if error.filename else ""
    return f"{path}{error.strerror or error}; check that the path exists and may be used"
