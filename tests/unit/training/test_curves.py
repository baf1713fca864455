"""The report shows what the events say and needs nothing beside it."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from dstrain.errors import TrainingError
from dstrain.training.curves import series, summary, write_report
from tests.unit.training.fakes import Setup


def train(step: int, **fields: Any) -> dict[str, Any]:
    usual = {"epoch": 1, "loss": 5.0 / step, "nll": 4.0 / step, "learning_rate": 0.001, "grad_norm": 1.0, "num_targets": 100}
    return {"kind": "train", "step": step, "tokens_per_second": 50.0, "seconds": 2.0, **usual, **fields}


def valid(step: int, loss: float, bleu: float) -> dict[str, Any]:
    return {"kind": "valid", "step": step, "loss": loss, "perplexity": 2**loss, "bleu": bleu}


EVENTS = [train(1), train(2, loss=None), valid(2, 3.0, 20.0), {"kind": "resume", "step": 2}, train(3), valid(3, 3.5, 25.0)]


def write(directory: Path, events: list[dict[str, Any]], tail: str = "") -> None:
    directory.mkdir(exist_ok=True)
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)


def test_a_real_run_is_drawn(tmp_path: Path) -> None:
    Setup(tmp_path).run()
    (tmp_path / "recipe.yaml").write_text("description: <b>ä & ö</b>\n")
    png, page = write_report(tmp_path, tmp_path / "out")
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000
    assert height > 500
    text = page.read_text()
    assert "description: &lt;b&gt;ä &amp; ö&lt;/b&gt;" in text
    assert "max_steps = 20" in text
    alt = 'alt="curves over the steps: loss, nats per target token; learning rate; gradient norm; target tokens per second"'
    assert alt in text


def test_features_share_a_panel(tmp_path: Path) -> None:
    write(tmp_path, [train(1, feature_cross_attention_kl=0.5, feature_encoder_hidden_states_mse=0.25)])
    _, page = write_report(tmp_path, tmp_path)
    assert "; target tokens per second; distances from inside the teacher" in page.read_text()


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    write(tmp_path, EVENTS)
    text = write_report(tmp_path, tmp_path)[1].read_text()
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text) == []
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)


def test_the_table_tells_progress_best_scores_and_end() -> None:
    assert summary(EVENTS) == {
        "last step": "3 (epoch 1)",
        "target tokens": "300",
        "target tokens per second": "50",
        "gradient norm": "last 1, largest 1",
        "best validation loss": "3 at step 2, last 3.5",
        "best validation perplexity": "8 at step 2, last 11.31",
        "best validation bleu": "25 at step 3, last 25",
        "resumes": "1",
        "ended by": "still running, or killed",
    }
    assert summary([*EVENTS, {"kind": "end", "step": 3, "reason": "max_steps = 3"}])["ended by"] == "max_steps = 3"
    assert summary([*EVENTS, {"kind": "failure", "step": 3, "message": "the loss is nan"}])["ended by"] == "the loss is nan"


def test_what_was_not_finite_breaks_the_curve() -> None:
    assert series(EVENTS, "train", "loss") == ([1, 3], [5.0, 5.0 / 3])


def test_a_run_cut_off_in_the_middle_of_a_line_is_drawn(tmp_path: Path) -> None:
    write(tmp_path, EVENTS, tail='{"kind": "tra')
    assert write_report(tmp_path, tmp_path)[0].is_file()


def test_no_run_and_no_step_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"nothing/events.jsonl is missing: give the directory that `dstrain train --output` wrote"
    ):
        write_report(tmp_path / "nothing", tmp_path)
    write(tmp_path / "young", [{"kind": "start", "step": 0}])
    with pytest.raises(TrainingError, match="has reported no step yet"):
        write_report(tmp_path / "young", tmp_path)
