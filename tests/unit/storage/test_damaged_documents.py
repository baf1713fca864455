"""Every document that dstrain reads back, damaged or hostile: one message with the file and the remedy, within a second.

Each case goes through the function that the verbs call; some go through the verb.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dstrain.adapters.config import LoraConfig
from dstrain.checkpoint.adapter_files import AdapterDescription, BaseReference
from dstrain.checkpoint.bundle import find_bundle, load_bundle
from dstrain.checkpoint.manifest import INDEX, FragmentEntry, FragmentIndex, Manifest, read_manifest, write_manifest
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.derived import LABELING, LabelJob
from dstrain.data.prepared.job import read_job
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.distillation.store.manifest import DUMP, SampleMethod, load_store_manifest
from dstrain.distillation.store.store import open_store
from dstrain.errors import CheckpointError, DstrainError
from dstrain.recipe_file import load_recipe
from dstrain.storage.document import DocumentFormat, FileRecord
from dstrain.storage.parsing import dump_yaml, parse_json, parse_yaml
from dstrain.storage.sharded_job import finished_shard
from dstrain.training.curves import write_report
from dstrain.training.run_directory import open_run
from tests.paths import ROOT
from tests.unit.cli.verbs import Verbs
from tests.unit.distillation.toy_store import prepared, stored, teacher_for
from tests.unit.storage.test_parsing import billion_laughs
from tests.unit.storage.yardstick import longest_reading
from tests.unit.training.fakes import ONE_PROCESS

RECIPE: dict[str, Any] = {"version": 1, "training": {"seed": 1}}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory with a sound document of every kind."""
    root = tmp_path_factory.mktemp("documents")
    data = prepared(root / "data", num_pairs=20)
    stored(data, root / "logits", SampleMethod(draws=3), teacher=teacher_for(data), tokens_per_shard=100)
    shutil.copytree(ROOT / "tests/golden/tiny_bundle", root / "bundle")
    (root / "bundle/recipe.yaml").write_text(dump_yaml({"version": 1, "description": "tiny", "generation": {"kind": "beam"}}))
    description = AdapterDescription(
        format=1,
        adapter=LoraConfig(rank=2, alpha=1, targets=("q_proj",)),
        base=BaseReference(path="../bundle", fingerprint="0" * 64),
        sha256="0" * 64,
    )
    (root / "adapted/adapter").mkdir(parents=True)
    (root / "adapted/adapter/adapter.yaml").write_text(dump_yaml(description.model_dump(mode="json")))
    open_run(root / "run", RECIPE, ONE_PROCESS, data="d1").close()
    (root / "run/checkpoints/step_00000001").mkdir(parents=True)
    (root / "run/events.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    job = LabelJob(
        teacher="t",
        original="o",
        generation={},
        max_ratio=None,
        max_repeats=3,
        keep_original=False,
        pairs=2,
        parts=1,
        pairs_per_part=2,
    )
    LABELING.start(_made(root / "labels"), job)
    return root


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


@dataclass(frozen=True)
class Kind:
    """A document under the root; what reads it; a field that it must have and one that holds text."""

    file: str
    read: Callable[[Path], object]
    required: str
    text: str


KINDS = {
    "manifest of data": Kind("data/manifest.json", lambda root: open_dataset(root / "data", "train"), "splits", "job"),
    "job of prepare": Kind("data/job.json", lambda root: read_job(root / "data"), "inputs", "fingerprint"),
    "tokenizer.yaml": Kind(
        "data/tokenizer/tokenizer.yaml", lambda root: load_tokenizers(root / "data/tokenizer"), "source", "fingerprint"
    ),
    "manifest of logits": Kind("logits/logits.json", lambda root: load_store_manifest(root / "logits"), "shards", "created_by"),
    "job of dump-logits": Kind("logits/parts.json", lambda root: DUMP.collect(root / "logits"), "rows", "teacher"),
    "job of pseudo-label": Kind("labels/parts.json", lambda root: LABELING.collect(root / "labels"), "pairs", "teacher"),
    "model.yaml": Kind("bundle/model.yaml", lambda root: load_bundle(root / "bundle"), "vocabulary", "sha256"),
    "adapter.yaml": Kind("adapted/adapter/adapter.yaml", lambda root: find_bundle(root / "adapted"), "base", "sha256"),
    "recipe of a bundle": Kind("bundle/recipe.yaml", lambda root: load_bundle(root / "bundle"), "", "description"),
    "run.json": Kind("run/run.json", lambda root: open_run(root / "run", RECIPE, ONE_PROCESS, data="d1"), "data", "run_id"),
    "recipe of a run": Kind("run/recipe.yaml", lambda root: open_run(root / "run", RECIPE, ONE_PROCESS, data="d1"), "", ""),
    "recipe of a report": Kind("run/recipe.yaml", lambda root: write_report(root / "run", root / "out"), "", ""),
    "recipe of a user": Kind("bundle/recipe.yaml", lambda root: load_recipe(str(root / "bundle/recipe.yaml")), "", "description"),
}


def _edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        as_json = path.suffix == ".json"
        tree = (parse_json if as_json else parse_yaml)(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree) if as_json else dump_yaml(tree))

    return edit


def _replaced(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _twice(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".json":
        path.write_text('{"a": 1, "a": 2,' + text.lstrip()[1:])
    else:
        path.write_text(f"a: 1\na: 2\n{text}")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (_replaced(""), "the file is empty"),
    "a directory": (_as_directory, "a directory, not a file"),
    "a pipe": (_as_pipe, "not a regular file"),
    "not UTF-8": (_replaced(b"a: \xff\xfe"), r"invalid UTF-8 \(byte 0xff\)"),
    "torn": (lambda path: path.write_text('{"a": [1, 2'), "not valid (JSON|YAML)"),
    "a list": (_replaced('["a"]'), r"mapping"),
    "100,000 levels": (_replaced("[" * 100_000), "nested deeper than 64 levels"),
    "50,000 levels in a field": (_replaced('{"a":' * 50_000), "nested deeper than 64 levels"),
    "a key twice": (_twice, "the key 'a' is given twice"),
    "a huge number": (_replaced('{"a": ' + "9" * 100_000 + "}"), "has 100000 digits, more than 64"),
    "many values": (_replaced('{"a": [' + "0," * 130_000 + "0" + ",{}" * 400_000 + "]}"), "larger than|more than"),
}


def fails(kind: Kind, root: Path, message: str) -> str:
    limit, start = longest_reading(), time.process_time()
    with pytest.raises(DstrainError, match=message) as caught:
        kind.read(root)
    assert time.process_time() - start < limit
    text = str(caught.value)
    assert Path(kind.file).name in text
    assert "; " in text, "a remedy"
    assert "\n  File" not in text
    assert len(text) < 1000
    return text


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "root", symlinks=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_document_is_one_message(kind: str, root: Path) -> None:
    path = root / KINDS[kind].file
    content = path.read_bytes()
    for act, message in DAMAGES.values():
        act(path)
        if kind == "recipe of a user" and not path.is_file():
            message = "no shipped recipe and no file of that name"
        fails(KINDS[kind], root, message)
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(content)
    if path.suffix == ".yaml":
        path.write_text(billion_laughs())
        fails(KINDS[kind], root, "more than 10,000 values, aliases expanded")


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.required])
def test_a_field_that_is_missing_or_mistyped_is_named(kind: str, root: Path) -> None:
    path, document = root / KINDS[kind].file, KINDS[kind]
    content = path.read_bytes()
    _edited(lambda tree: tree.pop(document.required))(path)
    fails(document, root, rf"{document.required}: missing; give it a value")
    path.write_bytes(content)
    _edited(lambda tree: tree.update({document.text: [1, 2]}))(path)
    fails(document, root, rf"{document.text}: input should be a valid string, not \[1, 2\]")
    path.write_bytes(content)
    _edited(lambda tree: tree.update({document.text: None, "flavor": "sweet"}))(path)
    fails(document, root, "flavor: unknown key")


def train(manifest: dict[str, Any]) -> dict[str, Any]:
    split: dict[str, Any] = manifest["splits"]["train"]
    return split


FIELDS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "pairs below 0": (
        "manifest of data",
        lambda t: t["splits"]["train"].update(pairs_read=-1),
        "or equal to 0, not -1",
    ),
    "pairs as text": ("manifest of data", lambda t: train(t).update(pairs_read="20"), "valid integer, not '20'"),
    "pairs as truth": ("manifest of data", lambda t: train(t).update(pairs_read=True), "valid integer, not true"),
    "pairs beyond 64 bits": (
        "manifest of data",
        lambda t: t["splits"]["train"].update(pairs_read=10**30),
        "less than 9223372036854775808",
    ),
    "a shard above": (
        "manifest of data",
        lambda t: train(t)["shards"][0].update(file="../secret"),
        "leads out",
    ),
    "an absolute shard": (
        "manifest of data",
        lambda t: train(t)["shards"][0].update(file="/etc/passwd"),
        "no relative path",
    ),
    "no checksum": (
        "manifest of data",
        lambda t: train(t)["lengths"].update(sha256="abc"),
        "lengths.sha256: string should",
    ),
    "another version": ("manifest of data", lambda t: t.update(format_version=9), "has format_version 9, this dstrain reads 1"),
    "a split that is a number": ("manifest of data", lambda t: t["splits"].update(train=1), r"splits\.train: input should be"),
    "an input of no size": ("job of prepare", lambda t: t.update(inputs=[{"path": "a"}]), r"inputs\.0\.size: missing"),
    "an unknown tokenizer": ("tokenizer.yaml", lambda t: t["source"].update(kind="bpe"), r"source\.kind: 'bpe' is unknown"),
    "a tokenizer above": (
        "tokenizer.yaml",
        lambda t: t["source"].update(model="../../model.yaml"),
        "leads out",
    ),
    "a tokenizer elsewhere": ("tokenizer.yaml", lambda t: t["target"].update(model="/etc/passwd"), "no relative path"),
    "a first row below 0": (
        "manifest of logits",
        lambda t: t["shards"][0].update(first_row=-3),
        r"0\.first_row: .* not -3",
    ),
    "a logit shard above": ("manifest of logits", lambda t: t["shards"][0]["record"].update(file="../x"), "leads out"),
    "no job": ("manifest of logits", lambda t: t.update(job=3), "has format_version None"),
    "rows in words": ("job of dump-logits", lambda t: t.update(rows="many"), "rows: input should be a valid integer, not 'many'"),
    "0 pairs": ("job of pseudo-label", lambda t: t.update(pairs=0), "pairs: input should be greater than 0, not 0"),
    "a depth below 0": ("model.yaml", lambda t: t["model"]["encoder"].update(depth=-1), r"encoder\.depth: .*, not -1"),
    "a width in words": ("model.yaml", lambda t: t["model"].update(model_dim="wide"), r"model_dim: .*, not 'wide'"),
    "a model of no kind": ("model.yaml", lambda t: t["model"].update(kind="rnn"), r"model\.kind: 'rnn' is unknown"),
    "a vocabulary of none": ("model.yaml", lambda t: t["vocabulary"].update(source=None), r"vocabulary\.source: .*, not null"),
    "a rank below 0": ("adapter.yaml", lambda t: t["adapter"].update(rank=-1), r"adapter\.rank: .*, not -1"),
    "a base that is a list": ("adapter.yaml", lambda t: t["base"].update(path=["a"]), r"base\.path: .* not \['a'\]"),
    "a generation that is a number": (
        "recipe of a bundle",
        lambda t: t.update(generation=5),
        "input should be an object, not 5",
    ),
    "data that is a list": ("recipe of a bundle", lambda t: t.update(data=[1]), "data: input should be an object"),
    "teachers in words": ("run.json", lambda t: t.update(teachers="t1"), "teachers: input should be a valid array"),
    "another run format": ("run.json", lambda t: t.update(format="one"), "has format 'one', this dstrain reads 1"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_value_is_named_with_its_field(name: str, root: Path) -> None:
    kind, change, message = FIELDS[name]
    _edited(change)(root / KINDS[kind].file)
    fails(KINDS[kind], root, message)


def _behind_link(path: Path, outside: Path) -> None:
    shutil.move(path, outside)
    path.symlink_to(outside)


LINKED = ["data/train/00000.arrow", "data/train/lengths.npy", "data/tokenizer/joint.model", "logits/00000.arrow"]


@pytest.mark.parametrize("file", LINKED)
def test_a_link_out_of_the_directory_is_refused_though_the_content_fits(file: str, root: Path, tmp_path: Path) -> None:
    _behind_link(root / file, tmp_path / "outside")
    with pytest.raises(DstrainError, match=r"leads out of .* through a symbolic link, to .*outside; "):
        open_dataset(root / "data", "train")
        open_store(root / "logits", data=root / "data", manifest=load_manifest(root / "data"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sidecar_means_that_its_shard_is_done_again(damage: str, root: Path) -> None:
    assert finished_shard(root / "logits", "00000.arrow", DUMP.sidecar) is not None
    DAMAGES[damage][0](root / "logits/00000.json")
    assert finished_shard(root / "logits", "00000.arrow", DUMP.sidecar) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_of_a_checkpoint_is_one_message(damage: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    DAMAGES[damage][0](tmp_path / "manifest.json")
    limit, start = longest_reading(), time.process_time()
    with pytest.raises(CheckpointError, match=r"manifest\.json .*; use another checkpoint"):
        read_manifest(tmp_path)
    assert time.process_time() - start < limit


HOSTILE = {
    "20 million values": '{"files": [' + "{}," * 20_000_000 + "{}]}",
    "a deep state": '{"state": ' + "[" * 8_000_000,
    "as many values as are read": '{"state": {"a": [' + "0," * 149_000 + "0]}}",
}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(("name", "read"), [("manifest.json", read_manifest), ("rank_00000.json", INDEX.read)])
def test_a_hostile_document_of_a_checkpoint_costs_little(
    name: str, read: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(HOSTILE[text])
    at = tmp_path if name == "manifest.json" else path
    limit, start = longest_reading(), time.process_time()
    with pytest.raises(CheckpointError, match=name):
        read(at)
    assert time.process_time() - start < limit
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read(at)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_the_documents_of_30_billion_parameters_on_1024_ranks_are_read(tmp_path: Path) -> None:
    """96 layers of 24 tensors, with masters, moments and moving average; every rank has a fragment of each."""
    names = [
        f"{kind}/decoder.layers.{n}.{t}.weight" for kind in ("master", "exp_avg", "ema") for n in range(96) for t in range(24)
    ]
    names += [name.replace("exp_avg/", "exp_avg_sq/") for name in names if name.startswith("exp_avg/")]
    entry = FragmentEntry(dtype="F32", shape=(28_672, 7_168), start=123_456_789, length=200_704)
    index = FragmentIndex(fragments=dict.fromkeys(names, entry))
    INDEX.write(tmp_path / "rank_00000.json", index)
    assert INDEX.read(tmp_path / "rank_00000.json") == index
    ranks = [f"rank_{rank:05d}.{kind}" for rank in range(1024) for kind in ("json", "safetensors")]
    files = [FileRecord(file=name, size=1 << 40, sha256="0" * 64) for name in ranks]
    manifest = Manifest(
        format=2, run_id="r", step=1, world_size=1024, layout="1024 ranks zero3 bf16", state={}, scalars={}, files=files
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize("kind", ["manifest of data", "manifest of logits", "model.yaml", "tokenizer.yaml"])
def test_the_verb_prints_the_message_and_no_trace(kind: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / KINDS[kind].file
    for damage in ("100,000 levels", "a huge number", "not UTF-8", "a list"):
        DAMAGES[damage][0](path)
        message = Verbs(capsys).fail("inspect", root / Path(KINDS[kind].file).parts[0])
        assert "Traceback" not in message
        assert len(message.strip().splitlines()) == 1
        assert path.name in message


@pytest.mark.parametrize("text", ["[" * 8_000_000, "[" + "{}," * 140_000 + "0]", '{"shards": [' + "{}," * 70_000 + "{}]}"])
def test_reading_takes_less_than_50_mb(text: str, root: Path) -> None:
    (root / "data/manifest.json").write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(DstrainError):
            load_manifest(root / "data")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert isinstance(DUMP.job, DocumentFormat)
