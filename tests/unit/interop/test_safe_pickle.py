"""Foreign .pt files: what is read, what is refused by name, what is broken."""

import argparse
import importlib
import os
import subprocess
import sys
import tarfile
import types
from collections import OrderedDict, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

from dstrain.errors import DataError, ImportFormatError
from dstrain.interop.fairseq.safe_pickle import StandIn, load_pickled
from tests.unit.interop.fairseq_checkpoints import AbsentModules


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
def test_other_classes_become_inert_objects(tmp_path: Path, modules: AbsentModules, zipped: bool) -> None:
    """Statistics of fairseq 0.6 to 0.12: objects, a dictionary of its own, an enumeration, paths and defaults."""
    average = modules.add("fairseq.meters.AverageMeter")()
    average.avg = 2.5
    by_name = modules.add("fairseq.logging.meters.MetersDict", OrderedDict)(train=average)
    choice = modules.add("fairseq.dataclass.constants.Choices", str)("c10d")
    content = {
        "args": argparse.Namespace(arch="transformer", save_dir=Path("checkpoints")),
        "model": {"weight": torch.ones(2)},
        "extra_state": {"train_meters": by_name, "counts": defaultdict(list, a=[1]), "backend": choice, "kinds": [int, ...]},
    }
    torch.save(content, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=zipped)
    modules.forget()
    read = load_pickled(tmp_path / "checkpoint.pt")
    assert torch.equal(read["model"]["weight"], torch.ones(2))
    assert read["args"] == argparse.Namespace(arch="transformer", save_dir=PurePosixPath("checkpoints"))
    stand_in = read["extra_state"]["train_meters"]["train"]
    assert isinstance(stand_in, StandIn)
    assert (stand_in.qualified_name, stand_in.state) == ("fairseq.meters.AverageMeter", {"avg": 2.5})
    assert read["extra_state"]["counts"] == {"a": [1]}
    assert not {"fairseq.meters", "fairseq.logging.meters"} & sys.modules.keys()


def test_reading_imports_no_module(tmp_path: Path, modules: AbsentModules, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": modules.add("harmful_plugin.Statistics")()}, tmp_path / "checkpoint.pt")
    modules.forget()
    (tmp_path / "harmful_plugin.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(load_pickled(tmp_path / "checkpoint.pt")["model"], StandIn)


class Calls:
    """Pickled as a call of a function, under any name."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def named(name: str) -> Any:
    """A function that is pickled as a name of a module that is not installed."""
    module, _, attribute = name.rpartition(".")
    function = types.FunctionType((lambda *_: None).__code__, {}, attribute)
    function.__module__, function.__qualname__ = module, attribute
    return function


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Calls(os.mkdir, "should-not-exist"), r"(posix|nt)\.mkdir"),
        (Calls(eval, "1"), r"(builtins\.)?eval"),
        (Calls(subprocess.Popen, ["touch", "should-not-exist"]), r"subprocess\.Popen"),
        (Calls(importlib.import_module, "antigravity"), r"importlib\.import_module"),
        (Calls(Path.write_text, Path("should-not-exist"), "x"), r"builtins\.getattr|pathlib\.Path\.write_text"),
        (Calls(named("pip._internal.main"), "install"), r"pip\._internal\.main"),
    ],
    ids=["mkdir", "eval", "popen", "import", "method", "package"],
)
@pytest.mark.parametrize("where", ["model", "statistics", "state", "key", "old"])
def test_calls_of_functions_are_refused_wherever_they_are(
    tmp_path: Path, modules: AbsentModules, call: Calls, name: str, where: str
) -> None:
    modules.monkeypatch.chdir(tmp_path)
    if name.startswith("pip"):
        modules.add("pip._internal.Other")
        sys.modules["pip._internal"].main = call.call[0]  # type: ignore[attr-defined]
    holder = modules.add("fairseq.meters.AverageMeter")()
    holder.value = call
    content = {"model": {"w": call}, "statistics": [call], "state": {"extra_state": holder}, "key": {"model": {call: 1}}}
    content["old"] = content["state"]
    torch.save(content[where], tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=where != "old")
    modules.forget()
    with pytest.raises(ImportFormatError, match=rf"holds a pickled ({name}), which could run code when read and is refused"):
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
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "notes.txt")
    with pytest.raises(ImportFormatError, match=r"model\.tar\.gz: compressed by gzip; decompress it first"):
        load_pickled(tmp_path / "model.tar.gz")
    with pytest.raises(ImportFormatError, match=r"absent\.pt cannot be read: No such file or directory; check the path"):
        load_pickled(tmp_path / "absent.pt")
    with pytest.raises(ImportFormatError, match=r"cannot be read: Is a directory"):
        load_pickled(tmp_path)


@pytest.mark.timeout(30)
def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: a stream is read only once, and this is read several times; write it to a file"):
        load_pickled(tmp_path / "pipe")


def test_another_protocol_is_named(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(2)}, tmp_path / "checkpoint.pt", pickle_protocol=4)
    with pytest.raises(ImportFormatError, match=r"is pickled in another way than torch\.save does by default \(protocol 2\)"):
        load_pickled(tmp_path / "checkpoint.pt")
