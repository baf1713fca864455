"""Checkpoints of another stage, and those that do not fit; that resume is exact is in test_engine.py, beside its fixture."""

from pathlib import Path

import pytest

from tests.parallel.launch import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), [("zero1", "zero2"), ("zero2", "zero1")])
def test_stages_1_and_2_read_each_other(writer: str, reader: str, tmp_path: Path) -> None:
    for rank in run_ranks("resumed", 2, tmp_path, shards=str(tmp_path), deepspeed=writer, reader=reader):
        for found, expected in zip(rank["found"], rank["expected"], strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_what_does_not_fit_is_refused_on_every_rank_in_words(tmp_path: Path) -> None:
    for said in run_ranks("refused", 2, tmp_path, shards=str(tmp_path)):
        path = f"{tmp_path}/checkpoints/step_00000000"
        remedy = "; resume with the recipe it was saved with, or start a new run from its last bundle"
        assert said["itself"] == ""
        assert said["average"].startswith(f"{path} does not fit this run: it lacks ema/")
        assert said["average"].endswith(f" more{remedy}")
        assert said["untied"] == (
            f"{path} does not fit this run: it lacks exp_avg/projection.weight, exp_avg/target_embedding.tokens.weight, "
            f"exp_avg_sq/projection.weight and 3 more{remedy}"
        )
        for case, problem in (
            ("step below 0", "optimizer_step: input should be greater than or equal to 0, not -1"),
            ("step as text", "step: input should be a valid integer, not '3'"),
            ("no scaler", "loss_scaler: input should be an object, not null"),
            ("a scale of 0", "loss_scaler.cur_scale: input should be greater than 0, not 0"),
        ):
            assert f"manifest.json is not a valid state of an engine: {problem}; resume with the version" in said[case]
        assert said["damaged"].startswith(f"no checkpoint in {tmp_path}/checkpoints is usable")
