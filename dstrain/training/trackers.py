"""TensorBoard and Weights & Biases: readers of events beside the run's own files, and never a reason to stop a training.

A tracker that cannot start is a warning with its remedy, before data are planned if it shows that early. Weights & Biases follows
an explicit value of the recipe first, then the environment and the user's settings (`WANDB_MODE`, `WANDB_DISABLED`,
`WANDB_PROJECT`, `WANDB_DIR`, `wandb offline`, ...), then the defaults of dstrain.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dstrain.errors import ExtraError, TrainingError
from dstrain.extras import import_extra
from dstrain.log import logger
from dstrain.training.config import ReportingConfig, WandbConfig
from dstrain.training.events import Event, scalars

_OFF = {"1", "on", "true", "yes"}


class TensorBoardSink:
    """Scalars under RUN/tensorboard. The first event, a start or a resume, hides the later steps of an abandoned part."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def write(self, event: Event) -> None:
        """Write the event's scalars."""
        if self._writer is None:
            self._writer = _tensorboard().SummaryWriter(str(self._directory), purge_step=event["step"] + 1)
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event["step"], walltime=event["time"])

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """The same scalars in Weights & Biases, against the number of the step; files lie under RUN/wandb, or in WANDB_DIR."""

    def __init__(self, config: WandbConfig, directory: Path, run_id: str) -> None:
        own = {"WANDB_DIR": ("dir", str(directory)), "WANDB_RUN_ID": ("id", run_id), "WANDB_RESUME": ("resume", "allow")}
        defaults = dict(setting for variable, setting in own.items() if variable not in os.environ)
        self._run = _wandb().init(project=config.project, name=config.name, mode=config.mode, **defaults)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, event: Event) -> None:
        """Write the event's scalars; the start event brings the recipe."""
        if event["kind"] == "start":
            self._run.config.update(dict(event.get("recipe", {})), allow_val_change=True)
        values = scalars(event)
        if values:
            self._run.log({**values, "step": event["step"]})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class GuardedTracker:
    """A tracker whose failure is a warning, and its end. key: of the recipe."""

    def __init__(self, key: str, sink: TensorBoardSink | WandbSink) -> None:
        self._key = key
        self._sink: TensorBoardSink | WandbSink | None = sink

    def write(self, event: Event) -> None:
        """Hand the event on."""
        sink, self._sink = self._sink, None
        if sink is not None:
            with _failure_warns(self._key):
                sink.write(event)
                self._sink = sink

    def close(self) -> None:
        """Flush and close."""
        if self._sink is not None:
            with _failure_warns(self._key):
                self._sink.close()


def usable_trackers(config: ReportingConfig) -> ReportingConfig:
    """The same without the trackers that cannot start here, each with a warning; call it before anything long."""
    usable: dict[str, Any] = {"tensorboard": False, "wandb": None}
    if config.tensorboard:
        with _failure_warns("reporting.tensorboard"):
            _tensorboard()
            usable["tensorboard"] = True
    if config.wandb is not None and not _is_disabled(config.wandb):
        with _failure_warns("reporting.wandb"):
            _check_wandb(config.wandb)
            usable["wandb"] = config.wandb
    return config.model_copy(update=usable)


def start_trackers(config: ReportingConfig, directory: Path, run_id: str) -> list[GuardedTracker]:
    """Those of the configuration that start. run_id: lets Weights & Biases continue the same run after a resume."""
    trackers = []
    if config.tensorboard:
        trackers.append(GuardedTracker("reporting.tensorboard", TensorBoardSink(directory / "tensorboard")))
    if config.wandb is not None:
        with _failure_warns("reporting.wandb"):
            trackers.append(GuardedTracker("reporting.wandb", WandbSink(config.wandb, directory, run_id)))
    return trackers


@contextmanager
def _failure_warns(key: str) -> Iterator[None]:
    """A tracker fails for whatever reason: wandb's errors have no common class."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s. Training goes on without it; events.jsonl has every number", key, " ".join(str(error).split()))


def _is_disabled(config: WandbConfig) -> bool:
    """Whether `WANDB_DISABLED` of the environment, which wandb itself no longer reads, turns reporting off."""
    value = os.environ.get("WANDB_DISABLED", "")
    if config.mode is not None or value.lower() not in _OFF:
        return False
    logger.info("reporting.wandb: off, for the environment has WANDB_DISABLED=%s", value)
    return True


def _check_wandb(config: WandbConfig) -> None:
    """Raise ExtraError if wandb is not installed, TrainingError if it needs an account and has none."""
    for key, value in config.model_dump().items():
        variable = f"WANDB_{key.upper()}"
        if value is not None and os.environ.get(variable, value) != value:
            logger.warning("reporting.wandb.%s = %s of the recipe wins over %s=%s", key, value, variable, os.environ[variable])
    wandb = _wandb()
    if config.mode != "offline" and wandb.setup().settings.mode == "online" and not _has_account(wandb):
        raise TrainingError(
            "no account: log in with `wandb login`, set WANDB_API_KEY, or report offline by WANDB_MODE=offline or "
            "reporting.wandb.mode: offline"
        )


def _has_account(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # an older wandb cannot ask without a prompt; its `init` says what is missing
        return True


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ExtraError(f"the package wandb cannot be imported ({error}): pip install wandb, or remove the section") from error
    return wandb


def _tensorboard() -> Any:
    return import_extra("torch.utils.tensorboard", extra="tensorboard", purpose="TensorBoard")
