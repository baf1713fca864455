"""How often the examples of each corpus are drawn: shares of an epoch by weight, or by size and temperature. Torch-free.

Choice: shares change at an epoch, not at a step. An epoch is any number of examples, so a curriculum is as fine as it must be.
The number of a step is known only once all steps before it are planned, for a window of examples becomes as many steps as their
tokens fill; an order that depended on it could no longer be computed for any epoch from the seed alone, as resuming does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from dstrain.config_base import Config

CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
Weights = dict[CorpusName, NonNegativeFloat]


class Phase(NamedTuple):
    """The epochs from `from_epoch` on. shares: of the examples of an epoch, by corpus; they add up to 1."""

    from_epoch: int
    shares: dict[str, float]


class EpochSize(Config):
    """Shares decide how often an example comes, so an epoch is a number of examples."""

    examples_per_epoch: PositiveInt | None = Field(
        default=None, description="Examples of an epoch; null = as many as the training data has."
    )


class TemperatureSampling(EpochSize):
    """A corpus of n examples has a share in proportion to n^(1 / temperature): 1 = its size, infinity = all alike.

    The temperature of Arivazhagan et al. 2019, "Massively Multilingual Neural Machine Translation in the Wild".
    """

    kind: Literal["temperature"] = "temperature"
    temperature: float = Field(default=5.0, ge=1, description="Larger = small corpora come more often; 5 is common.")

    def tables(self) -> Iterator[tuple[str, Weights]]:
        """It has no tables of weights."""
        yield from ()

    def phases(self, sizes: Mapping[str, int]) -> list[Phase]:
        """The shares of corpora of so many examples."""
        return [Phase(1, _shares({name: max(size, 1) ** (1 / self.temperature) for name, size in sizes.items()}))]


class WeightChange(Config):
    """Other weights from an epoch on."""

    from_epoch: int = Field(
        ge=2, description="The first epoch, of `examples_per_epoch` examples, with these weights; epochs count from 1."
    )
    weights: Weights = Field(description="As `weights` of the section.")


class WeightedSampling(EpochSize):
    """A corpus has a share in proportion to its weight, whatever its size."""

    kind: Literal["weights"] = "weights"
    weights: Weights = Field(description="Weight of every corpus of `data.train` by its name; 0 leaves it out.")
    changes: tuple[WeightChange, ...] = Field(default=(), description="A curriculum: other weights from later epochs on.")

    def tables(self) -> Iterator[tuple[str, Weights]]:
        """Every table of weights, under its key."""
        yield "weights", self.weights
        for number, change in enumerate(self.changes):
            yield f"changes.{number}.weights", change.weights

    def phases(self, sizes: Mapping[str, int]) -> list[Phase]:
        """The shares in each part of the curriculum."""
        starts = [1, *(change.from_epoch for change in self.changes)]
        return [Phase(start, _shares(table)) for start, (_, table) in zip(starts, self.tables(), strict=True)]

    @field_validator("changes")
    @classmethod
    def _ascend(cls, changes: tuple[WeightChange, ...]) -> tuple[WeightChange, ...]:
        for before, after in pairwise(changes):
            if after.from_epoch <= before.from_epoch:
                raise ValueError(f"from_epoch = {after.from_epoch} after {before.from_epoch}; list the changes in their order")
        return changes

    @model_validator(mode="after")
    def _draws_something(self) -> WeightedSampling:
        for key, weights in self.tables():
            if not sum(weights.values()):
                raise ValueError(f"{key} add up to 0, so no example would be drawn; give a corpus a weight above 0")
        return self


MixtureConfig = Annotated[TemperatureSampling | WeightedSampling, Field(discriminator="kind")]


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
