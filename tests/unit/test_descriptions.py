"""Every field of every configuration is described, once."""

import importlib
import typing
from collections.abc import Iterator

import pytest

from dstrain.config_base import Config
from tests.paths import ROOT

MODULES = [
    "dstrain.recipe",
    *(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("dstrain/**/config.py")),
]


def configs() -> Iterator[type[Config]]:
    for name in sorted(MODULES):
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, Config) and value.__module__ == name:
                yield value


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.__name__)
def test_every_field_has_a_description_and_every_class_a_purpose(config: type[Config]) -> None:
    assert config.__doc__
    for name, field in config.model_fields.items():
        tag = name == "kind" and len(typing.get_args(field.annotation)) == 1
        assert tag != bool(field.description), f"{name}: describe it in Field(description=...); a tag is described by its class"
        assert f"{name}:" not in config.__doc__, f"{name} is described twice"
        assert tag or str(field.description).endswith("."), name
