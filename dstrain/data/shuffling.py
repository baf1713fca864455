"""How far an epoch's random order takes the examples from where they lie. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dstrain.config_base import Config


class ExampleShuffle(Config):
    """Any example may come at any time: a window of the plan reads from all shards."""

    kind: Literal["examples"] = "examples"


class ShardWindowShuffle(Config):
    """Shards come in random order, and an example stays near its shard: for data that the memory or the disk does not hold."""

    kind: Literal["shard_window"] = "shard_window"
    shards: int = Field(
        default=16,
        ge=2,
        description="An example moves by less than so many shards; of its corpus, in a mixture.",
    )


ShuffleConfig = Annotated[ExampleShuffle | ShardWindowShuffle, Field(discriminator="kind")]
