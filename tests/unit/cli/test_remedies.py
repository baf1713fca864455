"""What a message says to do can be done: each mistake or damage is followed by the remedy that its message names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstrain.cli.main import main
from tests.unit.cli.verbs import Verbs, bundle_for
from tests.unit.data.test_prepare_verb import recipe

Command = Sequence[str]
PREPARE = ("prepare", "recipe.yaml", "--output", "data", "--workers", "1")
WORK = ("--teacher", "teacher", "--data", "data", "--device", "cpu", "--max-tokens", "400")
LABEL = ("pseudo-label", *WORK, "--output", "labeled", "--max-repeats", "1000", "--beam-size", "1")
DUMP = ("dump-logits", *WORK, "--output", "logits")
GENERATE = ("generate", "teacher", "--input", "text", "--device", "cpu", "--beam-size", "2")
AVERAGE = ("average", "run", "--output", "mean")
VALIDATE = ("validate", "teacher", "--data", "data", "--device", "cpu")
NO_REMEDY: tuple[Command, ...] = ()


def flip(path: str) -> Callable[[], None]:
    def damage() -> None:
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 2] ^= 1
        Path(path).write_bytes(bytes(content))

    return damage


def write(path: str, text: str) -> Callable[[], None]:
    return lambda: (Path(path).write_text(text), None)[1]


@dataclass(frozen=True)
class Case:
    """words fail with `message` after `damage`; the commands of the remedy succeed, and then `afterwards`."""

    words: Command
    message: str
    remedy: tuple[Command, ...] = NO_REMEDY
    afterwards: Command = ()
    damage: Callable[[], None] = lambda: None


CASES = {
    "an altered shard": Case(
        ("inspect", "data"), "prepare the data again", (PREPARE,), ("inspect", "data"), flip("data/train/00000.arrow")
    ),
    "an altered shard of a split": Case(
        (*VALIDATE, "--no-generate"), "prepare the data again", (PREPARE,), VALIDATE, flip("data/valid/00000.arrow")
    ),
    "missing lengths": Case(
        ("inspect", "data"), "prepare the data again", (PREPARE,), ("inspect", "data"), Path("data/train/lengths.npy").unlink
    ),
    "a broken manifest": Case(
        ("inspect", "data"), "prepare the data again", (PREPARE,), ("inspect", "data"), write("data/manifest.json", "{")
    ),
    "an altered tokenizer": Case(
        ("inspect", "data"), "restore", (PREPARE,), ("inspect", "data"), flip("data/tokenizer/tokenizer.yaml")
    ),
    "an altered label shard": Case(
        ("inspect", "labeled"), "run `dstrain pseudo-label` again", (LABEL,), ("inspect", "labeled"),
        flip("labeled/train/00000.arrow"),
    ),
    "an altered copy beside labels": Case(
        ("inspect", "labeled"), "run `dstrain pseudo-label` again", (LABEL,), ("inspect", "labeled"),
        flip("labeled/valid/00000.arrow"),
    ),
    "an altered store": Case(
        ("inspect", "logits"), "dump this shard again with the same command", (DUMP,), ("inspect", "logits"),
        flip("logits/00000.arrow"),
    ),
    "a broken manifest of a store": Case(
        ("inspect", "logits"), "run `dstrain dump-logits --merge` again", (("dump-logits", "--merge", "logits"),),
        ("inspect", "logits"), write("logits/logits.json", "{"),
    ),
    "data of another recipe": Case(
        (*PREPARE, "--set", "data.filter.max_ratio=9"), "or --overwrite",
        afterwards=(*PREPARE, "--set", "data.filter.max_ratio=9", "--overwrite"),
    ),
    "a text that exists": Case(
        (*GENERATE, "--output", "other"), "add --overwrite", afterwards=(*GENERATE, "--output", "other", "--overwrite")
    ),
    "the text that is read": Case(
        (*GENERATE, "--output", "text", "--overwrite"), "choose another --output", afterwards=(*GENERATE, "--output", "new")
    ),
    "several answers in plain text": Case(
        (*GENERATE, "--num-best", "2"), "choose --format jsonl", afterwards=(*GENERATE, "--num-best", "2", "--format", "jsonl")
    ),
    "more bundles than there are": Case(
        (*AVERAGE, "--last", "9"), "lower --last to 2", afterwards=(*AVERAGE, "--last", "2")
    ),
    "a bundle that exists": Case(
        ("average", "run", "--output", "teacher"), "add --overwrite",
        afterwards=("average", "run", "--output", "teacher", "--overwrite"),
    ),
    "a bundle that is read": Case(
        ("average", "teacher", "run/bundles/step_00000010", "--output", "teacher", "--overwrite"), "choose another --output",
        afterwards=("average", "teacher", "run/bundles/step_00000010", "--output", "new"),
    ),
    "texts of a split without any": Case(
        (*VALIDATE, "--split", "train", "--generate"), "leave --generate", afterwards=(*VALIDATE, "--split", "train")
    ),
    "texts that exist": Case(
        ("text", "data", "--split", "valid", "--output", "."), "add --overwrite",
        afterwards=("text", "data", "--split", "valid", "--output", ".", "--overwrite"), damage=write("source.txt", "precious"),
    ),
    "labels where data are": Case(
        ("pseudo-label", *WORK, "--output", "data"), "choose another --output",
        afterwards=("pseudo-label", *WORK, "--output", "new", "--max-repeats", "1000", "--beam-size", "1"),
    ),
    "logits of another job": Case(
        (*DUMP, "--draws", "7"), "or --overwrite", afterwards=(*DUMP, "--draws", "7", "--overwrite")
    ),
    "labels of another job": Case(
        (*LABEL, "--keep-original"), "or --overwrite", afterwards=(*LABEL, "--keep-original", "--overwrite")
    ),
    "more entries than the vocabulary has": Case(
        ("dump-logits", *WORK, "--output", "new", "--method", "topk"), "lower --k",
        afterwards=("dump-logits", *WORK, "--output", "new", "--method", "topk", "--k", "8"),
    ),
    "a report that exists": Case(
        ("report", "run", "--output", "."), "add --overwrite", afterwards=("report", "run", "--output", ".", "--overwrite"),
        damage=write("report.html", "precious"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workspace")
    recipe(root, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(list(PREPARE)) == 0
        data = Path("data")
        bundle_for(data, Path("teacher"), seed=3, eos_scale=4.0)
        for seed in (10, 20):
            bundle_for(data, Path(f"run/bundles/step_{seed:08d}"), seed=seed)
        assert main(list(LABEL)) == 0
        assert main(list(DUMP)) == 0
        for name in ("text", "other"):
            Path(name).write_text("a b\n")
        events = [{"kind": "valid", "step": step, "loss": 1.0, "epoch": 1, "seconds": 1.0, "time": 0.0} for step in (1, 2)]
        Path("run/events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return root


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_can_be_followed(
    name: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, verbs = CASES[name], Verbs(capsys)
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "copy"))
    case.damage()
    before = Path("text").read_text()
    assert case.message in verbs.fail(*case.words)
    for command in case.remedy:
        verbs.succeed(*command)
    verbs.succeed(*case.afterwards)
    assert Path("text").read_text() == before


def test_a_missing_deepspeed_is_one_message_before_the_run_exists(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("dstrain.build.training_options.find_spec", lambda name: None)
    said = Verbs(capsys).fail("train", "recipe.yaml", "--data", "data", "--output", "new")
    assert "training needs DeepSpeed, which is not installed: pip install deepspeed" in said
    assert not Path("new").exists()


@pytest.mark.parametrize("held", [("--base", "new/bundles/best"), ("--teacher", "new/bundles/best")])
def test_a_run_that_holds_what_it_reads_is_refused(
    held: tuple[str, str], workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its bundles would be replaced by its own."""
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "copy"))
    shutil.copytree("teacher", "new/bundles/best")
    kind = ("--set", "objective={kind: distillation}") if held[0] == "--teacher" else ()
    said = Verbs(capsys).fail("train", "recipe.yaml", "--data", "data", "--output", "new", *held, *kind)
    assert f"--output new holds {held[0]}" in said
