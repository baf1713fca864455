"""Tensor parallelism changes nothing: losses, norms, weights and generation of one process, for every variant and objective."""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import run_ranks

KD: dict[str, Any] = {"kind": "distillation", "teacher_weight": 0.7}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"clip_norm": 0.5, "ema": True, "objective": {"label_smoothing": 0.1}},
    "rotary": {"model": "rotary"},
    "alibi": {"model": "alibi"},
    "untied": {"model": "untied", "kind": "stable_adamw"},
    "r_drop": {"objective": {"r_drop": {"alpha": 1.0}}, "dropout": 0.2},
    "lora": {"model": "plain", "adapter": {}},
    "dora": {"model": "alibi", "adapter": {"dora": True, "bias": "all"}},
}


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for report, single in zip(result["reports"], expected["reports"], strict=True):
        assert report["loss"] == pytest.approx(single["loss"], rel=1e-6)
        assert report["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
    assert result["validated"] == pytest.approx(expected["validated"], rel=1e-6)
    assert result["shapes"] == expected["shapes"]
    assert result["logits"] == pytest.approx(expected["logits"], rel=1e-4, abs=1e-5)
    for name, (_, norm) in result["weights"].items():
        if name.endswith("k_proj.bias"):  # no key bias moves a softmax: its gradient is rounding, which Adam makes a step of
            continue
        assert norm == pytest.approx(expected["weights"][name][1], rel=1e-4, abs=1e-5), name


def test_two_tensor_ranks(tmp_path: Path) -> None:
    single = run_ranks("tensor_curves", 1, tmp_path, cases=list(CASES.values()))[0]
    stages = ["zero1", "zero3", "zero0", "zero2"]
    cases = [{**case, "tensor": 2, "deepspeed": stages[number % 4]} for number, case in enumerate(CASES.values())]
    for results in run_ranks("tensor_curves", 2, tmp_path, cases=cases):
        for name, result, expected in zip(CASES, results, single, strict=True):
            print(name)
            assert_same(result, expected)
