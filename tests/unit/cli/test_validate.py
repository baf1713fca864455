"""The verb validate takes its generation options as generate does; its figures are proved in training/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dstrain.cli.main import main
from dstrain.recipe_file import load_recipe, recipe_tree
from tests.unit.evaluation.test_bundle_validation import prepared
from tests.unit.generation.small_bundle import make_bundle


def recipe(*overrides: str) -> dict[str, Any]:
    return recipe_tree(load_recipe("translation/quickstart", overrides))


@pytest.fixture(scope="module")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "data", 90)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("kind: beam, beam_size: 3, num_best: 3", "generation options: num_best = 3 exceeds beam_size = 2; raise beam_size"),
        ("kind: beam, beam_size: 3, groups: 3", "generation options: groups = 3 does not divide beam_size = 2"),
        ("kind: sampling, num_best: 3", "generation options: num_best = 3 exceeds beam_size = 2"),
    ],
)
@pytest.mark.parametrize(("verb", "section"), [("validate", "validation.generation"), ("generate", "generation")])
def test_a_beam_that_the_recipe_cannot_have_is_explained(
    tmp_path: Path,
    *,
    verb: str,
    section: str,
    chosen: str,
    message: str,
    prepared_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = make_bundle(tmp_path / "bundle", recipe=recipe(f"{section}={{{chosen}}}"))
    data = ["--data", str(prepared_data)] if verb == "validate" else []
    assert main([verb, str(bundle), "--device", "cpu", "--beam-size", "2", *data]) == 1
    assert message in capsys.readouterr().err
