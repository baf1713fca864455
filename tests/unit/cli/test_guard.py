"""Which rank prints an error."""

from __future__ import annotations

import argparse
import importlib
import sys
import time

import pytest

from dstrain.cli.guard import guarded
from dstrain.cli.main import main
from dstrain.errors import DataError, DstrainError
from dstrain.log import setup_logging
from dstrain.parallel.errors import raise_on_all_ranks
from tests.unit.checkpoint.ranks import ThreadRanks, on_ranks


def printed(
    error: Exception, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, local_rank: int
) -> str:
    for name, value in {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    setup_logging(rank=rank)

    def run(args: argparse.Namespace) -> int:
        raise error

    assert guarded(argparse.Namespace(run=run, debug=False)) == 1
    return capsys.readouterr().err[9:]


def test_an_error_that_all_ranks_share_is_printed_by_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(ranks: ThreadRanks) -> DstrainError:
        def action() -> None:
            if ranks.rank == 2:
                raise DataError("DATA is damaged")

        with pytest.raises(DataError) as caught:
            raise_on_all_ranks(ranks, DataError, "starting", action)
        return caught.value

    errors = [error for error in on_ranks(4, fail) if isinstance(error, DstrainError)]
    said = [printed(error, rank, monkeypatch, capsys, local_rank=rank % 2) for rank, error in enumerate(errors)]
    assert said == ["[rank 0] ERROR DATA is damaged\n", "", "", ""]


def test_an_error_of_one_rank_is_printed_by_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "dstrain.parallel.mesh", sys)  # the ranks have met
    assert printed(DataError("alone"), 3, monkeypatch, capsys, local_rank=1) == "[rank 3] ERROR alone\n"
    refusal = OSError(28, "No space left on device", "RUN")
    assert "[rank 3] ERROR RUN: No space left on device" in printed(refusal, 3, monkeypatch, capsys, local_rank=1)


def test_an_interruption_while_a_verb_is_imported_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    setup_logging()
    monkeypatch.setattr(importlib, "import_module", interrupt)
    assert main(["show", "translation/quickstart"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
