"""The base of every configuration: frozen, and without room for unknown keys.

Torch-free, so that a recipe can be checked on a login node. Choices are enums or unions tagged by `kind`, never booleans
that come in pairs.
"""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen configuration that refuses unknown keys and values that do not convert to the declared type."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
