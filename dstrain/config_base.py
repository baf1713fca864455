"""The base of every configuration: frozen, without unknown keys.

Torch-free, so that a recipe can be checked on a login node. Choices are enums or unions tagged by `kind`, never booleans
that come in pairs.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

Tree = dict[str, Any]
"""The plain values of a configuration, as a YAML file has them."""
Precision = Literal["fp32", "bf16", "fp16"]
"""The precision of a model's computation."""
Checkpointing = Literal["none", "selective", "full", "offload"]
"""What of the layers' activations is computed again in the backward pass."""
Compiling = Literal["none", "layers"]
"""What `torch.compile` fuses in training."""
DeviceChoice = Literal["auto", "cpu", "cuda"]
"""A kind of device that a user names; auto = a GPU if there is one."""
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
"""A precision that a user names; auto = bf16 on a GPU that has it, else fp32."""
BleuTokenization = Literal[
    "auto", "13a", "intl", "zh", "char", "none", "ja-mecab", "ko-mecab", "flores101", "flores200", "spBLEU-1K", "spm"
]
"""sacreBLEU's ways to cut text into words for BLEU; auto = zh or char for a script without spaces, else 13a."""
RougeWords = Literal["stemmed", "plain"]
"""The words that ROUGE compares: without their English endings (Porter's stemmer), or as they are."""


def _number_or_auto(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One message instead of one for each alternative."""
    try:
        return validate(value)
    except ValidationError as error:
        raise ValueError(f"input should be a whole number above 0, or auto, not {value!r}") from error


ChunkTokens = Annotated[PositiveInt | Literal["auto"], WrapValidator(_number_or_auto)]
"""Positions of a vocabulary loss whose logits exist at one time; auto = by `ops/chunk_size.py`."""


class Config(BaseModel):
    """A frozen configuration that refuses unknown keys and values that do not convert to the declared type."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ConfigErrors(ValueError):
    """Several mistakes that one validator has found; each is reported by itself."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


def upgrade_config(kind: type[Config], tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A resolved configuration as it would be written today: keys that came after it have their defaults.

    Unchanged if it is not valid today.
    """
    try:
        return kind.model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree
