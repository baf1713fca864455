"""What the followed remedies work on: prepared data, a teacher, a run of two bundles, labels and logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.cli.main import main
from tests.unit.cli.verbs import bundle_for
from tests.unit.data.test_prepare_verb import recipe

PREPARE = ("prepare", "recipe.yaml", "--output", "data", "--workers", "1")
WORK = ("--teacher", "teacher", "--data", "data", "--device", "cpu", "--max-tokens", "400")
LABEL = ("pseudo-label", *WORK, "--output", "labeled", "--max-repeats", "1000", "--beam-size", "1")
DUMP = ("dump-logits", *WORK, "--output", "logits")


def make_workspace(root: Path) -> Path:
    """Everything in `root`, named as the commands above name it."""
    recipe(root, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(list(PREPARE)) == 0
        data = Path("data")
        bundle_for(data, Path("teacher"), seed=3, eos_scale=4.0)
        for seed in (10, 20):
            bundle_for(data, Path(f"run/bundles/step_{seed:08d}"), seed=seed)
        assert main(list(LABEL)) == 0
        assert main(list(DUMP)) == 0
        for name in ("text", "other"):
            Path(name).write_text("a b\n")
        events = [{"kind": "valid", "step": step, "loss": 1.0, "epoch": 1, "seconds": 1.0, "time": 0.0} for step in (1, 2)]
        Path("run/events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return root
