"""Twelve updates equal those that the predecessor recorded: learning rate, loss and gradient norm as printed, final weights.

The recorded losses and norms are its meters' running means since the first update, so running means are compared.
`golden/ref/trace/adam_sentence_avg` has no counterpart: it divides the sum over tokens by the number of
sentences, where dstrain takes the mean over tokens or over each sentence's mean. Of `adam_cosine`
the first nine updates have one; then the predecessor starts another, lower cycle.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.interop.fairseq.checkpoint import convert, read_fairseq_checkpoint
from tests.parallel.launch import run_ranks
from tests.paths import GOLDEN, needs_golden

pytestmark = needs_golden

INVERSE_SQRT = {"kind": "inverse_sqrt", "warmup_steps": 10}
RUNS: dict[str, dict[str, Any]] = {
    "adam_fixed_lr": {"optimizer": {"learning_rate": 0.002}, "schedule": {"kind": "constant"}},
    "adam_invsqrt": {"optimizer": {"learning_rate": 0.001}, "schedule": INVERSE_SQRT},
    "adam_invsqrt_clip1_wd0.01": {
        "optimizer": {"learning_rate": 0.001, "weight_decay": 0.01},
        "schedule": INVERSE_SQRT,
        "clip_norm": 1.0,
    },
    "adam_invsqrt_updatefreq2": {"optimizer": {"learning_rate": 0.001}, "schedule": INVERSE_SQRT, "accumulate": 2},
    "adam_polynomial": {
        "optimizer": {"learning_rate": 0.001},
        "schedule": {"kind": "polynomial", "warmup_steps": 3, "total_steps": 12, "final": 0.0001},
    },
    "adam_cosine": {
        "optimizer": {"learning_rate": 0.003},
        "schedule": {"kind": "cosine", "warmup_steps": 3, "warmup_init": 0.0001, "total_steps": 9, "final": 0.0001},
    },
}
COMPARABLE = {"adam_cosine": 9}
PRINTED = 0.000501
"""Half of the third decimal, and a float's breadth."""


@pytest.fixture(
    scope="module",
    params=[(1, "zero1"), pytest.param((2, "zero2"), marks=pytest.mark.slow), pytest.param((2, "zero3"), marks=pytest.mark.slow)],
    ids=lambda param: f"{param[1]}-{param[0]}",
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    world_size, name = request.param
    directory: Path = tmp_path_factory.mktemp(name)
    results = run_ranks("traces", world_size, directory, golden=str(GOLDEN), runs=RUNS, deepspeed=name)
    first: dict[str, Any] = results[0]
    return first


@pytest.mark.parametrize("run", RUNS)
def test_updates_equal_the_recorded_ones(found: dict[str, Any], run: str) -> None:
    recorded = json.loads((GOLDEN / "ref" / "trace" / f"{run}.json").read_text())["steps"]
    loss_sum, num_targets, norms = 0.0, 0, 0.0
    for number, (step, truth) in enumerate(zip(found[run]["steps"], recorded, strict=True), 1):
        loss_sum, num_targets = loss_sum + step["loss"] * step["num_targets"], num_targets + step["num_targets"]
        norms += step["grad_norm"]
        if number <= COMPARABLE.get(run, 12):
            assert step["learning_rate"] == pytest.approx(truth["lr_used"], rel=1e-12, abs=1e-15)
            assert loss_sum / num_targets / math.log(2) == pytest.approx(truth["loss_base2_per_token"], abs=PRINTED)
            assert norms / number == pytest.approx(truth["gnorm"], abs=PRINTED)


@pytest.mark.parametrize("run", [run for run in RUNS if run not in COMPARABLE])
def test_final_weights_equal_the_recorded_ones(found: dict[str, Any], run: str) -> None:
    """Within 0.5 % of how far each tensor moved: torch adds Adam's epsilon at another place.

    The keys' biases are left out. Their gradient is zero but for rounding, since softmax ignores what shifts all keys alike, and
    Adam makes steps of full size out of rounding.
    """
    start, end = (
        convert(read_fairseq_checkpoint(GOLDEN / "ref" / name))[2] for name in ("a_base/checkpoint.pt", f"trace/{run}.pt")
    )
    weights = found[run]["weights"]
    assert weights.keys() == end.keys()
    for name in end:
        if not name.endswith("k_proj.bias"):
            error, moved = (torch.tensor(weights[name]) - end[name]).norm(), (end[name] - start[name]).norm()
            assert error / moved < 0.005, name
