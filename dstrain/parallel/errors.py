"""Errors that every rank raises together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dstrain.errors import DstrainError

if TYPE_CHECKING:  # whose protocols name torch
    from dstrain.protocols import Ranks

_R = TypeVar("_R")


def raise_on_all_ranks(ranks: Ranks, kind: type[DstrainError], doing: str, action: Callable[[], _R]) -> _R:
    """Run `action` on every rank; if it fails on one, all raise the same error. Collective.

    Without this a rank with a full disk would leave, and the others would wait for it forever. Raises the failing rank's own
    DstrainError, or `kind` with a sentence that begins with `doing`.
    """
    problem: DstrainError | None = None
    try:
        result = action()
    except DstrainError as error:
        problem = error
    except (OSError, RuntimeError) as error:
        suffix = f" on rank {ranks.rank}" if ranks.size > 1 else ""
        problem = kind(f"{doing} failed{suffix}: {error}")
        problem.__cause__ = error
    if ranks.all_true(problem is None):
        return result
    reports = ranks.gather_objects((type(problem), str(problem)) if problem is not None else None)
    first, text = next(filter(None, reports))
    common = problem if problem is not None and str(problem) == text else first(text)
    common.on_all_ranks = True
    raise common
