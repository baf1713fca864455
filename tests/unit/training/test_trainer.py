"""The loop with stand-ins below it: what is due when, what a resume repeats, how it ends."""

from pathlib import Path

from tests.unit.training.fakes import Setup


def test_a_run_reports_every_step_and_writes_what_is_due(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    assert setup.run() == 0
    assert [step for step, _ in setup.losses()] == list(range(1, 21))
    assert setup.validated == [5, 10, 15, 20]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000015", "step_00000020"]
    assert sorted(path.name for path in (tmp_path / "bundles").iterdir()) == ["best", "last", "step_00000020"]
    assert setup.events("end")[0]["reason"] == "max_steps = 20"
