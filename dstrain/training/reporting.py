"""One stream of events, many readers: the event file, the progress bar, and the trackers of `trackers`.

Only rank 0 reports; the other ranks hold a `Reporter` without readers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from dstrain.log import logger
from dstrain.training.config import ReportingConfig
from dstrain.training.events import Event, EventFile
from dstrain.training.trackers import start_trackers


class Sink(Protocol):
    """A reader of events."""

    def write(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class Reporter:
    """Gives every event its time and hands it to the event file and the sinks."""

    def __init__(self, file: EventFile | None = None, sinks: Sequence[Sink] = ()) -> None:
        self._file = file
        self._sinks = sinks

    def emit(self, kind: str, step: int, **fields: Any) -> None:
        """Report one event; the fields are those of `events`."""
        if self._file is None:
            return
        event = {"time": time.time(), "kind": kind, "step": step, **fields}
        self._file.append(event)
        for sink in self._sinks:
            sink.write(event)

    def sync(self) -> int:
        """Force the event file to the disk; its length in bytes, 0 if this rank has none."""
        return self._file.sync() if self._file else 0

    def cut(self, length: int) -> None:
        """Forget the events after `length` bytes."""
        if self._file:
            self._file.cut(length)

    def close(self) -> None:
        """Close file and sinks."""
        for sink in self._sinks:
            sink.close()
        if self._file:
            self._file.close()


def build_reporter(directory: Path, config: ReportingConfig, *, rank: int, total_steps: int | None, run_id: str) -> Reporter:
    """The reporter of a run; silent on ranks other than 0. run_id: lets wandb continue the same run after a resume."""
    if rank != 0:
        return Reporter()
    display: Sink = ProgressBar(total_steps) if sys.stderr.isatty() else LogLines(total_steps)
    return Reporter(EventFile(directory / "events.jsonl"), [display, *start_trackers(config, directory, run_id)])


class LogLines:
    """One line of text per event, for terminals that are none."""

    def __init__(self, total_steps: int | None) -> None:
        self._total = f"/{total_steps:,}" if total_steps else ""

    def write(self, event: Event) -> None:
        """Print what `describe` makes of it."""
        if event["kind"] in {"train", "valid"}:
            logger.info("%s step %s%s | %s", event["kind"], f"{event['step']:,}", self._total, describe(event))

    def close(self) -> None:
        """Nothing is held."""


class ProgressBar:
    """A tqdm bar on stderr that moves with the training events; validations stay above it as lines."""

    def __init__(self, total_steps: int | None) -> None:
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, file=sys.stderr)

    def write(self, event: Event) -> None:
        """Move the bar, or print a line above it."""
        if event["kind"] in {"train", "resume"}:
            self._bar.n = event["step"]
            if event["kind"] == "resume":
                self._bar.initial = event["step"]
            else:
                self._bar.set_postfix_str(describe(event), refresh=False)
            self._bar.refresh()
        elif event["kind"] == "valid":
            self._bar.write(f"valid step {event['step']:,} | {describe(event)}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar on the screen."""
        self._bar.close()


def describe(event: Event) -> str:
    """A training or validation event in one line."""
    if event["kind"] == "valid":
        names = [name for name in ("loss", "perplexity", "bleu", "chrf") if event.get(name) is not None]
        scores = " | ".join(f"{name} {event[name]:.4g}" for name in names)
        return f"epoch {event['epoch']} | {scores} | {event['seconds']:.1f} s"
    parts = [f"epoch {event['epoch']}"]
    for name, form in (
        ("loss", "loss {:.3f}"),
        ("perplexity", "ppl {:.2f}"),
        ("learning_rate", "lr {:.2e}"),
        ("grad_norm", "norm {:.2f}"),
    ):
        if name == "perplexity" and event.get("on_policy") == 1:
            continue  # there were no labels
        parts.append(form.format(event[name]) if event[name] is not None else f"{name} not finite")
    if event.get("kd") is not None:
        parts.append(f"kd {event['kd']:.3f} on {event['selected']:.0%} | agreement {event['agreement']:.1%}")
    if event.get("on_policy_kd") is not None:
        parts.append(f"on-policy kd {event['on_policy_kd']:.3f} | agreement {event['on_policy_agreement']:.1%}")
    parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if event["eta_seconds"] is not None:
        parts.append(f"ETA {timedelta(seconds=round(event['eta_seconds']))}")
    if event["skipped"]:
        parts.append(f"{event['skipped']} skipped")
    return " | ".join(parts)
