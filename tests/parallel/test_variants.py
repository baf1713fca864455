"""Sharded parameters change nothing, whatever parts a model is made of: random architectures under ZeRO-3 and ZeRO-0."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import run_ranks
from tests.parallel.variants import variant

SEEDS = [0, 10, 16, 22]
MORE_SEEDS = [1, 12, 20, 25, 38, 46, 48, 57]


def assert_stages_agree(seeds: list[int], directory: Path) -> None:
    """With every parameter in parts, however small."""
    file = directory / "every_parameter.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    for found in run_ranks("variant_curves", 2, directory, seeds=seeds, stages=["zero0", str(file)], steps=3):
        for seed, whole, sharded in zip(seeds, found["zero0"], found[str(file)], strict=True):
            for (loss, norm), (expected, expected_norm) in zip(sharded, whole, strict=True):
                assert loss == pytest.approx(expected, rel=1e-5), variant(seed)
                assert norm == pytest.approx(expected_norm, rel=1e-4), variant(seed)


def traits(seed: int) -> set[str]:
    config: Any = variant(seed)
    stack = config.decoder
    return {
        config.kind,
        f"{config.embedding.kind} {config.embedding.tie}",
        "stacked" if stack.unique_layers is not None and stack.unique_layers < stack.depth else "plain stack",
        "grouped" if stack.num_kv_heads is not None and stack.num_kv_heads < stack.num_heads else "own heads",
        stack.feed_forward,
        config.position.kind,
    }


def test_zero_3_equals_zero_0_with_random_parts(tmp_path: Path) -> None:
    covered = set().union(*map(traits, SEEDS))
    assert covered >= {"decoder_only", "encoder_decoder", "factorized all", "factorized decoder", "stacked", "grouped", "gated"}
    assert covered >= {"rotary", "alibi", "learned"}
    assert_stages_agree(SEEDS, tmp_path)


@pytest.mark.slow
def test_zero_3_equals_zero_0_with_more_random_parts(tmp_path: Path) -> None:
    assert_stages_agree(MORE_SEEDS, tmp_path)
