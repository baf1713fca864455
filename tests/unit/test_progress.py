"""Bars on a terminal with the log above them, lines of the log elsewhere."""

from __future__ import annotations

import io
import itertools
import re
import sys
import time

import pytest

from dstrain import progress
from dstrain.log import logger, setup_logging
from dstrain.progress import Progress, join_fitting, terminal_width, with_progress


class Terminal(io.StringIO):
    """A terminal that remembers every byte."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What stood on it at any time, a line at a time, without colors and movements."""
        return [line.rstrip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.getvalue()))]


def start_terminal(monkeypatch: pytest.MonkeyPatch, width: int = 80) -> Terminal:
    """In the test itself: pytest sets `sys.stderr` anew between a fixture and its test."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    setup_logging()
    return terminal


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_bar_count_first_notes_and_time_left(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = start_terminal(monkeypatch, width)
    monkeypatch.setattr(progress, "SECONDS_UNTIL_INNER_BAR", 0.0)
    notes = ["loss 3.251", "2,950 tokens/s", "perplexity 25.8", "epoch 12", "learning rate 1.0e-03", "norm 0.53"]
    with Progress("training", 100_000, "steps") as bar:
        bar.move_to(1200, notes=notes, eta_seconds=3725)
        with Progress("valid", 500, "sentences") as inner:  # draws both
            inner.move_to(5, notes=[], say=True)
            assert terminal_width() == width
    drawn = [line for line in terminal.lines() if "1,200/100,000 steps" in line]
    assert drawn
    assert all("━━━━━━━━" in line and "loss 3.251" in line and line.endswith("ETA 1:02:05") for line in drawn)
    assert all(len(line) <= width for line in terminal.lines())
    assert any("2,950 tokens/s" in line for line in drawn)
    assert any("perplexity" in line for line in drawn) == (width == 120)
    assert any(re.fullmatch(r"valid +━+ +5/500 sentences.*", line) for line in terminal.lines())
    assert terminal_width() is None


def test_log_lines_and_what_libraries_print_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = start_terminal(monkeypatch)
    with Progress("reading", None, "lines") as bar:
        bar.advance(5)
        logger.info("a line of the log")
        print("printed", file=sys.stderr)
    lines = terminal.lines()
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d a line of the log", line) for line in lines)
    assert "printed" in lines
    assert sys.stderr is terminal


def test_a_process_that_is_killed_leaves_the_cursor_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = start_terminal(monkeypatch)
    with Progress("reading", 3, "lines"):
        assert "\x1b[?25l" not in terminal.getvalue()


def test_output_that_goes_into_a_file_stays_out_of_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = start_terminal(monkeypatch)
    with Progress("generating", 3, "lines"):
        print("an answer")
    assert capsys.readouterr().out == "an answer\n"
    assert "an answer" not in terminal.getvalue()


def test_an_error_takes_the_bars_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = start_terminal(monkeypatch)
    with pytest.raises(ValueError, match="fault"), Progress("reading", 3, "lines"), Progress("checking", 3, "files"):
        raise ValueError("fault")
    assert terminal_width() is None
    assert sys.stderr is terminal


def test_without_a_terminal_there_is_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=20.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    setup_logging()
    with Progress("dumping", 1_000, "tokens") as bar:
        for _ in range(7):
            bar.advance(100)
        with Progress("hidden", 10, "shards", shown=False) as hidden:
            for _ in range(7):
                hidden.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d,.]+ tokens/s  ETA [\d:]+", "...", line[9:]) for line in lines] == [
        "dumping: 300/1,000 tokens  ...",
        "dumping: 600/1,000 tokens  ...",
    ]


def test_short_work_writes_nothing_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    assert list(with_progress(range(3), "checking", "files")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_parts_that_fit() -> None:
    assert join_fitting(["abc", "de", "f"], None) == "abc  de  f"
    assert join_fitting(["abc", "de", "f"], 7) == "abc  de"
    assert join_fitting(["abc", "de", "f"], 6) == "abc"
    assert join_fitting(["abc"], 1) == "abc"
    assert progress.SECONDS_PER_LINE == 60


def test_from_a_warning_on_a_line_says_level_and_rank(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0)
    logger.info("one")
    logger.warning("two")
    setup_logging(rank=1)
    logger.info("three")
    logger.error("four")
    setup_logging()
    logger.error("five")
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["one", "[rank 0] WARNING two", "[rank 1] ERROR four", "ERROR five"]
