"""Foreign .pt files: what is read, what is refused by name, what is broken."""

import argparse
import os
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.safe_pickle import load_pickled


class CallsWhenRead:
    """Would run a command if it were unpickled freely."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("should-not-exist",)


def test_plain_checkpoints_with_namespaces_and_arrays(tmp_path: Path) -> None:
    content = {
        "cfg": {"model": argparse.Namespace(layers=2, arch="transformer")},
        "model": OrderedDict(weight=torch.arange(6.0).view(2, 3).half()),
        "extra_state": {"counts": np.arange(4), "bleu": np.float64(1.5), "score": np.float32(2.5), "none": None},
    }
    torch.save(content, tmp_path / "checkpoint.pt")
    read = load_pickled(tmp_path / "checkpoint.pt")
    assert read["cfg"]["model"] == argparse.Namespace(layers=2, arch="transformer")
    assert torch.equal(read["model"]["weight"], content["model"]["weight"])
    assert read["extra_state"]["counts"].tolist() == [0, 1, 2, 3]
    assert read["extra_state"]["bleu"] == 1.5


@pytest.mark.parametrize("zipped", [True, False])
def test_unknown_classes_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    module = types.ModuleType("fairseq_meters")
    module.AverageMeter = type("AverageMeter", (), {"__module__": "fairseq_meters"})
    monkeypatch.setitem(sys.modules, "fairseq_meters", module)
    torch.save({"model": module.AverageMeter()}, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ImportFormatError, match=r"checkpoint\.pt holds a pickled fairseq_meters\.AverageMeter, .* is refused"):
        load_pickled(tmp_path / "checkpoint.pt")


def test_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": CallsWhenRead()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ImportFormatError, match=r"holds a pickled (posix|nt)\.mkdir"):
        load_pickled(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "should-not-exist").exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path: Path, share: float) -> None:
    torch.save({"model": torch.randn(100, 100)}, tmp_path / "checkpoint.pt")
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImportFormatError, match=r"checkpoint\.pt is truncated or no torch checkpoint .*copy the file again"):
        load_pickled(tmp_path / "checkpoint.pt")


def test_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello\nworld\n")
    with pytest.raises(ImportFormatError, match=r"notes\.txt is truncated or no torch checkpoint"):
        load_pickled(tmp_path / "notes.txt")
    with pytest.raises(ImportFormatError, match=r"absent\.pt cannot be read: No such file or directory; check the path"):
        load_pickled(tmp_path / "absent.pt")
    with pytest.raises(ImportFormatError, match=r"cannot be read: Is a directory"):
        load_pickled(tmp_path)
