"""Events reach the file whole, and all readers from there see the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.errors import TrainingError
from dstrain.log import logger
from dstrain.training.config import ReportingConfig
from dstrain.training.events import EventFile, read_events, scalars
from dstrain.training.reporting import Reporter, build_reporter

TRAIN = {
    "kind": "train", "step": 50, "time": 1.0, "epoch": 2, "steps": 50, "loss": 3.25, "nll": 3.0, "perplexity": 20.08,
    "learning_rate": 1.5e-3, "grad_norm": 0.75, "num_targets": 1000, "tokens_per_second": 2950.4, "seconds": 0.3,
    "cpu_seconds": 0.3, "skipped": 0, "eta_seconds": 3725.0,
}  # fmt: skip
VALID = {
    "kind": "valid", "step": 50, "time": 1.0, "weights": "trained", "epoch": 2, "seconds": 4.0, "loss": 3.0, "perplexity": 12.0,
    "bleu": 21.5, "best_score": 3.0, "best_step": 50,
}  # fmt: skip


def test_events_are_lines_with_time_kind_and_step(tmp_path: Path) -> None:
    reporter = Reporter(EventFile(tmp_path / "run" / "events.jsonl"))
    reporter.emit("train", 1, loss=0.1 + 0.2, worst=float("nan"), norm=float("inf"))
    assert len((tmp_path / "run" / "events.jsonl").read_text().splitlines()) == 1, "an event must not wait in a buffer"
    reporter.emit("end", 2)
    first, second = read_events(tmp_path / "run" / "events.jsonl")
    assert (first["kind"], first["step"], first["loss"], first["worst"], first["norm"]) == ("train", 1, 0.1 + 0.2, None, None)
    assert first["time"] <= second["time"]


def test_cutting_forgets_what_came_later_and_appending_goes_on_there(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events.jsonl")
    file.append({"kind": "train", "step": 1})
    length = file.sync()
    file.append({"kind": "train", "step": 2})
    file.close()
    again = EventFile(tmp_path / "events.jsonl")
    again.cut(length)
    again.append({"kind": "train", "step": 2, "second": True})
    assert read_events(tmp_path / "events.jsonl") == [{"kind": "train", "step": 1}, {"kind": "train", "step": 2, "second": True}]


def test_a_file_shorter_than_promised_is_named_and_goes_on_in_a_new_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    (tmp_path / "events.jsonl").write_text('{"kind": "train", "step": 1}')
    file = EventFile(tmp_path / "events.jsonl")
    file.cut(1000)
    file.append({"kind": "train", "step": 9})
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [1, 9]
    assert "has 28 bytes where 1000 were written" in caplog.text


@pytest.mark.parametrize("line", ["{", "[]", "\x00\x00", '{"step": 1}', '{"kind": "train"}', "\ud800"])
def test_damaged_lines_are_left_out_and_counted(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    path = tmp_path / "events.jsonl"
    whole = ['{"kind": "train", "step": 1}', '{"kind": "end", "step": 2}']
    path.write_bytes("\n".join([whole[0], line, whole[1], '{"kind": "tr']).encode(errors="surrogatepass"))
    assert [event["step"] for event in read_events(path)] == [1, 2]
    assert "events.jsonl: 2 of its lines are damaged and left out: 2, 4" in caplog.text


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    file = EventFile(tmp_path / "events.jsonl")
    with pytest.raises(TrainingError, match=r"cannot write .*events.jsonl.*No space left on device.*free some space"):
        file.append({"kind": "train", "step": 1})
    file.close()  # which would try to write once more, and hide that message


def test_scalars_are_the_numbers_of_training_and_validation() -> None:
    assert scalars(VALID) == {
        "valid/epoch": 2, "valid/seconds": 4.0, "valid/loss": 3.0, "valid/perplexity": 12.0, "valid/bleu": 21.5,
        "valid/best_score": 3.0, "valid/best_step": 50,
    }  # fmt: skip
    assert "train/eta_seconds" not in scalars({**TRAIN, "eta_seconds": None})
    assert scalars({"kind": "start", "step": 0, "time": 1.0, "world_size": 2}) == {}


def test_only_rank_0_reports(tmp_path: Path) -> None:
    silent = build_reporter(tmp_path, ReportingConfig(tensorboard=True), rank=1, total_steps=None, run_id="x")
    silent.emit("train", 1, loss=1.0)
    assert silent.sync() == 0
    silent.cut(0)
    silent.close()
    assert list(tmp_path.iterdir()) == []
