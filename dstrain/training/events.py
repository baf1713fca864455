"""RUN/events.jsonl: one JSON object a line, the source of truth for every number that training reports.

Every event has `time` (seconds since 1970), `kind` and `step`. Display, TensorBoard, wandb and `dstrain report` see the
same objects.

| kind | further fields |
|---|---|
| start | world_size, run_id, recipe |
| train | epoch, steps, loss, nll, perplexity, one number per further metric, learning_rate, grad_norm, num_targets, |
| | tokens_per_second, seconds, cpu_seconds, padding, skipped, eta_seconds |
| valid | weights (trained or ema), epoch, seconds, one number per score, signatures (of the scores of text), best_score, |
| | best_step |
| bundle | names |
| checkpoint | path, seconds |
| resume | path, world_size, layout (ranks, DeepSpeed file, precision), layout_before, changes of the recipe |
| failure | message: what ended training; of a step that failed also epoch, index, examples: its position and data set rows |
| end | reason, exit_code, elapsed_seconds, best_score, best_step |

`train` and `valid`: loss is in nats, the mean over target tokens or over sentences that the objective minimizes; nll, perplexity
and the objective's further metrics (kl: the divergence of R-Drop; hard and kd: the losses of a distillation on labels and on the
teacher before their weights; feature_...: its losses on the teacher's activations, by side, kind and loss, before its weight) are
per target token, whatever the loss is a mean over; agreement (with the teacher's most probable token), selected (to learn from
the teacher) and on_policy (sampled by the student) are shares of the target tokens. Steps on the student's own samples report
on_policy_nll, on_policy_kd and on_policy_agreement instead of their namesakes. Each such figure is a mean over the micro-batches
that report it; if none does, nll and perplexity are null and the others absent. Of a split whose corpora have several names,
nll/NAME, bleu/NAME and chrf/NAME are those of one corpus, and bleu and chrf the means of these.

`train`: means are over `steps` steps, tokens_per_second counts target tokens of all ranks, and seconds those spent in steps;
cpu_seconds and padding (a share of decoder positions) are rank 0's own; learning_rate and grad_norm are those of the last step. A
number that is not finite is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dstrain.errors import TrainingError
from dstrain.log import logger
from dstrain.storage.directory_kind import instead_of
from dstrain.storage.parsing import parse_json

Event = Mapping[str, Any]


class EventFile:
    """Appends events; each line is handed to the system at once, and to the disk by `sync`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def append(self, event: Event) -> None:
        """One more line. Raises TrainingError if the disk is full."""
        line = json.dumps({key: _finite(value) for key, value in event.items()}, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.path}: {error.strerror or error}; free some space, then start again to resume"
            ) from error

    def sync(self) -> int:
        """Force all lines to the disk; returns the length of the file in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, length: int) -> None:
        """Forget everything after `length` bytes: events of steps that the resumed run will repeat."""
        present = self.path.stat().st_size
        if present < length:
            logger.warning("%s has %d bytes where %d were written; some events are lost", self.path, present, length)
            if not self._ends_a_line(present):
                self._file.write(b"\n")
                self._file.flush()
            return
        os.truncate(self.path, length)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file; a line that the disk did not take has been reported by `append`."""
        with suppress(OSError):
            self._file.close()

    def _ends_a_line(self, length: int) -> bool:
        return length == 0 or self.path.read_bytes().endswith(b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a file. Damaged lines, such as the last one after a crash, are left out with a warning that counts them.

    Raises TrainingError if the file is missing.
    """
    if not path.is_file():
        raise TrainingError(
            f"{path} is missing: give the directory that `dstrain train --output` wrote; {instead_of('a run', path.parent)}"
        )
    lines = path.read_bytes().split(b"\n")
    events, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = parse_json(line.decode())
        except ValueError:
            event = None
        if isinstance(event, dict) and {"kind", "step"} <= event.keys():
            events.append(event)
        else:
            damaged.append(number)
    if damaged:
        some = ", ".join(map(str, damaged[:8])) + (", ..." if len(damaged) > 8 else "")
        logger.warning("%s: %d of its lines are damaged and left out: %s", path, len(damaged), some)
    return events


def scalars(event: Event) -> dict[str, float]:
    """`train/loss`, `valid/bleu`, ...: the numbers of a training or validation event."""
    if event["kind"] not in {"train", "valid"}:
        return {}
    hidden = {"time", "kind", "step"}
    return {
        f"{event['kind']}/{name}": value for name, value in event.items() if name not in hidden and isinstance(value, int | float)
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
