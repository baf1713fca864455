"""Which training pairs are kept, and how much of a long source."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from dstrain.config_base import Config


class FilterConfig(Config):
    """Which training pairs are dropped, by tokens including EOS; each drop is counted and reported, and so is each cut.

    For text without a source, only `max_target_length` counts.
    """

    max_source_length: PositiveInt = Field(default=1024, description="Longest source that is kept.")
    max_target_length: PositiveInt = Field(default=1024, description="Longest target that is kept.")
    long_sources: Literal["drop", "truncate"] = Field(
        default="drop",
        description="A source over `max_source_length`: drop its training pair, or cut the source at its end, which is usual for "
        "documents; evaluation splits, which drop nothing, are cut, too.",
    )
    max_ratio: float | None = Field(
        default=None, gt=1, description="Largest ratio of the longer side to the shorter that is kept; null = any."
    )
