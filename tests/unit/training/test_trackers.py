"""TensorBoard and Weights & Biases see the events, heed the user's environment, and never stop a training."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from dstrain.log import logger
from dstrain.training.config import ReportingConfig, WandbConfig
from dstrain.training.reporting import build_reporter
from dstrain.training.trackers import TensorBoardSink, usable_trackers
from tests.unit.training.test_reporting import TRAIN, VALID


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="dstrain")
    return caplog


class FakeWandb:
    """Remembers every call. mode: what the environment and the user's settings say; account: whether there is one."""

    def __init__(self, *, mode: str = "online", account: bool = True, failure: Exception | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.settings = type("Settings", (), {"mode": mode})
        self.account = account
        self.failure = failure
        self.config = self

    def setup(self) -> FakeWandb:
        return self

    def login(self, **options: bool) -> bool:
        assert options == {"prompt": False, "verify": False}, "nobody answers a prompt in a job"
        return self.account

    def init(self, **settings: Any) -> FakeWandb:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("init", settings))
        return self

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.calls.append(("config", values))

    def define_metric(self, *names: str, **settings: str) -> None:
        self.calls.append(("metric", names))

    def log(self, values: dict[str, float]) -> None:
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("MODE", "DISABLED", "PROJECT", "NAME", "DIR", "RUN_ID", "RESUME", "API_KEY"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return monkeypatch


def reporting(**settings: Any) -> ReportingConfig:
    return ReportingConfig(wandb=WandbConfig(**settings))


def read_tensorboard(directory: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return [(point.step, point.value) for point in accumulator.Scalars(name)]


def test_tensorboard_has_the_same_numbers_and_a_resume_hides_the_abandoned_ones(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    first.write({"kind": "start", "step": 0, "time": 1.0})
    for step in (10, 20, 30):
        first.write({**TRAIN, "step": step, "loss": float(step)})
    first.close()
    second = TensorBoardSink(tmp_path)
    second.write({"kind": "resume", "step": 20, "time": 2.0})
    second.write({**TRAIN, "step": 30, "loss": 300.0})
    second.write({**VALID, "step": 30})
    second.close()
    assert read_tensorboard(tmp_path, "train/loss") == [(10, 10.0), (20, 20.0), (30, 300.0)]
    assert read_tensorboard(tmp_path, "valid/bleu") == [(30, 21.5)]


def test_wandb_gets_recipe_and_numbers_against_the_step(tmp_path: Path, no_environment: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    no_environment.setitem(sys.modules, "wandb", wandb)
    config = usable_trackers(reporting(project="p", mode="offline"))
    reporter = build_reporter(tmp_path, config, rank=0, total_steps=None, run_id="abc")
    reporter.emit("start", 0, recipe={"version": 1})
    reporter.emit("valid", 5, epoch=1, seconds=1.0, loss=2.0)
    reporter.close()
    expected = {"project": "p", "name": None, "mode": "offline", "dir": str(tmp_path), "id": "abc", "resume": "allow"}
    assert wandb.calls[0] == ("init", expected)
    assert ("config", {"version": 1}) in wandb.calls
    assert ("log", {"valid/epoch": 1, "valid/seconds": 1.0, "valid/loss": 2.0, "step": 5}) in wandb.calls
    assert wandb.calls[-1] == ("finish", None)


def test_the_environment_wins_over_defaults(tmp_path: Path, no_environment: pytest.MonkeyPatch) -> None:
    """What the recipe leaves open is not given to wandb, which then reads its own variables."""
    wandb = FakeWandb(mode="offline", account=False)
    no_environment.setitem(sys.modules, "wandb", wandb)
    no_environment.setenv("WANDB_DIR", "/elsewhere")
    no_environment.setenv("WANDB_RUN_ID", "mine")
    no_environment.setenv("WANDB_RESUME", "must")
    build_reporter(tmp_path, usable_trackers(reporting()), rank=0, total_steps=None, run_id="abc")
    assert wandb.calls[0] == ("init", {"project": None, "name": None, "mode": None})


def test_an_explicit_value_of_the_recipe_wins_over_the_environment_and_says_so(
    no_environment: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    no_environment.setitem(sys.modules, "wandb", FakeWandb(mode="offline"))
    no_environment.setenv("WANDB_PROJECT", "theirs")
    no_environment.setenv("WANDB_MODE", "offline")
    no_environment.setenv("WANDB_DISABLED", "true")
    assert usable_trackers(reporting(project="ours", mode="online")).wandb is not None
    assert "reporting.wandb.project = ours of the recipe wins over WANDB_PROJECT=theirs" in messages.text
    assert "reporting.wandb.mode = online of the recipe wins over WANDB_MODE=offline" in messages.text


@pytest.mark.parametrize(("value", "is_off"), [("true", True), ("1", True), ("false", False), ("", False)])
def test_wandb_is_off_where_the_environment_disables_it(
    value: str, is_off: bool, no_environment: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    no_environment.setitem(sys.modules, "wandb", FakeWandb())
    no_environment.setenv("WANDB_DISABLED", value)
    assert (usable_trackers(reporting(project="p")).wandb is None) == is_off
    assert (f"reporting.wandb: off, for the environment has WANDB_DISABLED={value}" in messages.text) == is_off


@pytest.mark.parametrize(
    ("modules", "config", "message"),
    [
        ({"wandb": None}, reporting(project="p"), "reporting.wandb: the package wandb cannot be imported"),
        ({"wandb": FakeWandb(account=False)}, reporting(project="p"), "reporting.wandb: no account: log in with `wandb login`"),
        (
            {"tensorboard": None, "torch.utils.tensorboard": None},
            ReportingConfig(tensorboard=True),
            "reporting.tensorboard: TensorBoard needs a package that cannot be imported",
        ),
    ],
)
def test_a_tracker_that_cannot_start_is_one_warning(
    modules: dict[str, Any],
    config: ReportingConfig,
    message: str,
    no_environment: pytest.MonkeyPatch,
    messages: pytest.LogCaptureFixture,
) -> None:
    for name, module in modules.items():
        no_environment.setitem(sys.modules, name, module)
    assert usable_trackers(config) == ReportingConfig()
    (warning,) = messages.records
    assert message in warning.getMessage()
    assert "Training goes on without it; events.jsonl has every number" in warning.getMessage()


def test_a_server_out_of_reach_is_a_warning(
    tmp_path: Path, no_environment: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    no_environment.setitem(sys.modules, "wandb", FakeWandb(failure=ConnectionError("no such host")))
    reporter = build_reporter(tmp_path, usable_trackers(reporting(project="p")), rank=0, total_steps=None, run_id="x")
    reporter.emit("valid", 5, epoch=1, seconds=1.0, loss=2.0)
    reporter.close()
    assert "reporting.wandb: no such host. Training goes on without it" in messages.text
    assert json.loads((tmp_path / "events.jsonl").read_text())["loss"] == 2.0


def test_a_tracker_that_fails_later_is_one_warning_and_left_alone(
    tmp_path: Path, no_environment: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where a directory should be")
    reporter = build_reporter(tmp_path, ReportingConfig(tensorboard=True), rank=0, total_steps=None, run_id="x")
    for step in (1, 2):
        reporter.emit("end", step)
    reporter.close()
    (warning,) = (record.getMessage() for record in messages.records if record.levelno == logging.WARNING)
    assert warning.startswith("reporting.tensorboard: ")
    assert "Training goes on without it" in warning
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


def test_wandb_offline_by_the_environment_works_without_an_account(tmp_path: Path, no_environment: pytest.MonkeyPatch) -> None:
    no_environment.setenv("WANDB_MODE", "offline")
    no_environment.setenv("WANDB_SILENT", "true")
    no_environment.setenv("HOME", str(tmp_path))
    config = usable_trackers(reporting(project="p"))
    reporter = build_reporter(tmp_path, config, rank=0, total_steps=None, run_id="abc")
    reporter.emit("start", 0, recipe={"version": 1})
    reporter.emit("valid", 5, epoch=1, seconds=1.0, loss=2.0)
    reporter.close()
    files = list((tmp_path / "wandb").glob("offline-run-*-abc/run-abc.wandb"))
    assert len(files) == 1
    assert files[0].stat().st_size > 0
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[1])["loss"] == 2.0
