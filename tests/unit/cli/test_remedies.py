"""What a message says to do can be done: each mistake or damage is followed by the remedy that its message names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.unit.cli.remedy_messages import pattern
from tests.unit.cli.remedy_workspace import DUMP, LABEL, PREPARE, WORK
from tests.unit.cli.verbs import Verbs
from tests.unit.generation.small_bundle import make_decoder_only_bundle

Command = Sequence[str]
NEW_LABEL = ("pseudo-label", *WORK, "--output", "new", "--beam-size", "1")
NEW_DATA = ("prepare", "recipe.yaml", "--output", "new", "--workers", "1")
GENERATE = ("generate", "teacher", "--input", "text", "--device", "cpu", "--beam-size", "2")
AVERAGE = ("average", "run", "--output", "mean")
EXPORT = ("export", "teacher", "--format", "ctranslate2", "--output")
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


def replaced(path: str, old: str, new: str) -> Callable[[], object]:
    return lambda: Path(path).write_text(Path(path).read_text().replace(old, new, 1))


def bare() -> None:
    tree = yaml.safe_load(Path("recipe.yaml").read_text())
    del tree["model"]
    Path("bare.yaml").write_text(yaml.safe_dump(tree))


@dataclass(frozen=True)
class Case:
    """words fail with `message` after `damage`; after `mend`, the commands of the remedy succeed, and then `afterwards`."""

    words: Command
    message: str
    remedy: tuple[Command, ...] = NO_REMEDY
    afterwards: Command = ()
    damage: Callable[[], object] = lambda: None
    mend: Callable[[], object] = lambda: None
    code: int = 1


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
        ("inspect", "data"),
        "save the tokenizer again, or restore it from a copy",
        (PREPARE,),
        ("inspect", "data"),
        flip("data/tokenizer/tokenizer.yaml"),
    ),
    "an altered label shard": Case(
        ("inspect", "labeled"),
        "run `dstrain pseudo-label` again as before, which writes what is damaged",
        (LABEL,),
        ("inspect", "labeled"),
        flip("labeled/train/00000.arrow"),
    ),
    "an altered copy beside labels": Case(
        ("inspect", "labeled"),
        "run `dstrain pseudo-label` again as before, which writes what is damaged",
        (LABEL,),
        ("inspect", "labeled"),
        flip("labeled/valid/00000.arrow"),
    ),
    "an altered store": Case(
        ("inspect", "logits"),
        "dump this shard again with the same command",
        (DUMP,),
        ("inspect", "logits"),
        flip("logits/00000.arrow"),
    ),
    "a broken manifest of a store": Case(
        ("inspect", "logits"),
        "run `dstrain {} --merge` again",
        (("dump-logits", "--merge", "logits"),),
        ("inspect", "logits"),
        write("logits/logits.json", "{"),
    ),
    "data of another recipe": Case(
        (*PREPARE, "--set", "data.filter.max_ratio=9"),
        "belongs to another preparation ({}); choose another --output, or --overwrite",
        afterwards=(*PREPARE, "--set", "data.filter.max_ratio=9", "--overwrite"),
    ),
    "an export over another directory": Case(
        (*EXPORT, "data", "--overwrite"),
        "exists and is not {}, so it is not replaced; choose another --output",
        afterwards=(*EXPORT, "new"),
    ),
    "a text that exists": Case(
        (*GENERATE, "--output", "other"), "add --overwrite", afterwards=(*GENERATE, "--output", "other", "--overwrite")
    ),
    "the text that is read": Case(
        (*GENERATE, "--output", "text", "--overwrite"),
        "is the same as {}, which would be lost; choose another --output",
        afterwards=(*GENERATE, "--output", "new"),
    ),
    "logits of another version": Case(
        ("inspect", "logits"),
        "this dstrain reads {}; dump the logits again",
        (DUMP,),
        ("inspect", "logits"),
        replaced("logits/logits.json", '"format_version": 1', '"format_version": 9'),
    ),
    "logits whose shards do not follow": Case(
        ("inspect", "logits"),
        "begins at row {}, not {}; dump the logits again",
        (DUMP,),
        ("inspect", "logits"),
        replaced("logits/logits.json", '"first_row": 0', '"first_row": 1'),
    ),
    "logits of fewer tokens": Case(
        ("inspect", "logits"),
        "the job has {}, {} and {}; dump the logits again",
        (DUMP,),
        ("inspect", "logits"),
        replaced("logits/logits.json", '"rows": 60,', '"rows": 61,'),
    ),
    "several answers in plain text": Case(
        (*GENERATE, "--num-best", "2"), "choose --format jsonl", afterwards=(*GENERATE, "--num-best", "2", "--format", "jsonl")
    ),
    "more bundles than there are": Case((*AVERAGE, "--last", "9"), "lower --last to {}", afterwards=(*AVERAGE, "--last", "2")),
    "a bundle that exists": Case(
        ("average", "run", "--output", "teacher"),
        "add --overwrite",
        afterwards=("average", "run", "--output", "teacher", "--overwrite"),
    ),
    "a bundle that is read": Case(
        ("average", "teacher", "run/bundles/step_00000010", "--output", "teacher", "--overwrite"),
        "is the same as {}, which would be lost; choose another --output",
        afterwards=("average", "teacher", "run/bundles/step_00000010", "--output", "new"),
    ),
    "texts of a split without any": Case(
        (*VALIDATE, "--split", "train", "--generate"), "leave --generate", afterwards=(*VALIDATE, "--split", "train")
    ),
    "texts that exist": Case(
        ("text", "data", "--split", "valid", "--output", "."),
        "add --overwrite",
        afterwards=("text", "data", "--split", "valid", "--output", ".", "--overwrite"),
        damage=write("source.txt", "precious"),
    ),
    "labels where data are": Case(
        ("pseudo-label", *WORK, "--output", "run"),
        "did not make ({}); choose another --output",
        afterwards=("pseudo-label", *WORK, "--output", "new", "--max-repeats", "1000", "--beam-size", "1"),
    ),
    "logits of another job": Case(
        (*DUMP, "--draws", "7"),
        "was started with another job ({}); give its options, choose another --output, or --overwrite",
        afterwards=(*DUMP, "--draws", "7", "--overwrite"),
    ),
    "labels of another job": Case(
        (*LABEL, "--keep-original"),
        "was started with another job ({}); give its options, choose another --output, or --overwrite",
        afterwards=(*LABEL, "--keep-original", "--overwrite"),
    ),
    "more entries than the vocabulary has": Case(
        ("dump-logits", *WORK, "--output", "new", "--method", "topk"),
        "lower --k",
        afterwards=("dump-logits", *WORK, "--output", "new", "--method", "topk", "--k", "8"),
    ),
    "logits of another teacher": Case(
        ("inspect", "logits", "--against-teacher", "run/bundles/step_00000010", "--data", "data"),
        "dump them again with this teacher, or name the one that made them",
        (
            (*DUMP[:1], "--teacher", "run/bundles/step_00000010", *DUMP[3:], "--overwrite"),
            ("inspect", "logits", "--against-teacher", "run/bundles/step_00000010", "--data", "data"),
            (*DUMP, "--overwrite"),
        ),
        ("inspect", "logits", "--against-teacher", "teacher", "--data", "data"),
    ),
    "an output that cannot be written": Case(
        (*GENERATE, "--output", "/proc/new"),
        "cannot write {}: {}; free some space or choose another --output",
        afterwards=(*GENERATE, "--output", "new"),
    ),
    "a report that exists": Case(
        ("report", "run", "--output", "."),
        "add --overwrite",
        afterwards=("report", "run", "--output", ".", "--overwrite"),
        damage=write("report.html", "precious"),
    ),
    "a damaged job of a preparation": Case(
        PREPARE,
        "remove the directory and run `dstrain {verb}` again",
        (PREPARE,),
        ("inspect", "data"),
        write("data/job.json", "{"),
        lambda: shutil.rmtree("data"),
    ),
    "a damaged job of labels": Case(
        ("pseudo-label", "--merge", "labeled"),
        "remove the directory and run `dstrain {verb}` again, or choose another",
        (LABEL,),
        ("inspect", "labeled"),
        write("labeled/parts.json", "[]"),
        lambda: shutil.rmtree("labeled"),
    ),
    "a damaged job of logits": Case(
        DUMP,
        "remove the directory and run `dstrain {verb}` again, or choose another",
        (DUMP,),
        ("inspect", "logits"),
        write("logits/parts.json", "{"),
        lambda: shutil.rmtree("logits"),
    ),
    "labels without their copies": Case(
        ("pseudo-label", "--merge", "labeled"),
        "worker 0 did not finish; run `dstrain {} --shard 0/N` again",
        ((*LABEL, "--shard", "0/1"),),
        ("pseudo-label", "--merge", "labeled"),
        lambda: Path("labeled/original/manifest.json").unlink(),
    ),
    "labels with an altered copy": Case(
        ("pseudo-label", "--merge", "labeled"),
        "run `dstrain {} --shard 0/N` again",
        ((*LABEL, "--shard", "0/1"),),
        ("pseudo-label", "--merge", "labeled"),
        flip("labeled/valid/00000.arrow"),
    ),
    "labels that are not merged": Case(
        ("inspect", "labeled"),
        "run `dstrain pseudo-label` again, then with --merge",
        (("pseudo-label", "--merge", "labeled"),),
        ("inspect", "labeled"),
        lambda: Path("labeled/manifest.json").unlink(),
    ),
    "labels that are all dropped": Case(
        (*NEW_LABEL, "--max-ratio", "1.01", "--max-repeats", "1"),
        "relax --max-ratio and --max-repeats, or train it longer",
        ((*NEW_LABEL, "--max-repeats", "1000", "--overwrite"),),
        ("inspect", "new"),
    ),
    "a ratio that drops all": Case(
        (*LABEL, "--max-ratio", "0.9"),
        "choose a number above 1",
        afterwards=(*NEW_LABEL, "--max-repeats", "1000", "--max-ratio", "9"),
    ),
    "shards that are missing": Case(
        ("dump-logits", "--merge", "logits"),
        "run `dstrain {}` again, with the same --shard if it was interrupted",
        (DUMP,),
        ("dump-logits", "--merge", "logits"),
        lambda: Path("logits/00000.arrow").unlink(),
    ),
    "logits that are not merged": Case(
        ("inspect", "logits"),
        "run it again, then `dstrain {} --merge {}`",
        (DUMP, ("dump-logits", "--merge", "logits")),
        ("inspect", "logits"),
        lambda: Path("logits/logits.json").unlink(),
    ),
    "a merge of something else": Case(
        ("dump-logits", "--merge", "data"), "name its --output", afterwards=("dump-logits", "--merge", "logits")
    ),
    "a merge with options of the work": Case(
        ("dump-logits", "--merge", "logits", "--overwrite"),
        "leave --base and --overwrite out",
        afterwards=("dump-logits", "--merge", "logits"),
    ),
    "an option of another method": Case(
        ("dump-logits", *WORK, "--output", "new", "--k", "8"),
        "leave it out, or choose another method",
        (("dump-logits", *WORK, "--output", "new"),),
        ("dump-logits", *WORK, "--output", "other_new", "--k", "8", "--method", "topk"),
    ),
    "a preparation that was not finished": Case(
        ("inspect", "data"),
        "run the same `dstrain prepare` again to go on",
        (PREPARE,),
        ("inspect", "data"),
        lambda: Path("data/manifest.json").unlink(),
    ),
    "data that were never prepared": Case(
        ("validate", "teacher", "--data", "nowhere", "--device", "cpu"),
        "`dstrain prepare RECIPE --output DATA` makes it",
        (("prepare", "recipe.yaml", "--output", "nowhere", "--workers", "1"),),
        ("inspect", "nowhere"),
    ),
    "a preparation where something else is": Case(
        ("prepare", "recipe.yaml", "--output", "run"),
        "did not make; choose another --output",
        afterwards=("prepare", "recipe.yaml", "--output", "new", "--workers", "1"),
    ),
    "a filter that drops all": Case(
        ("prepare", "recipe.yaml", "--output", "new", "--workers", "1", "--set", "data.filter.max_source_length=1"),
        "relax data.filter and run again with --overwrite",
        afterwards=("prepare", "recipe.yaml", "--output", "new", "--overwrite"),
    ),
    "a tag that the tokenizer changes": Case(
        (*NEW_DATA, "--set", "data.tokenizer.tags=[ﬁ]"),
        "choose another tag",
        afterwards=(*NEW_DATA, "--set", "data.tokenizer.tags=[xx]"),
    ),
    "a symbol that is a special": Case(
        (*NEW_DATA, "--set", "data.tokenizer.user_symbols=[<pad>]"),
        "choose another symbol",
        afterwards=(*NEW_DATA, "--set", "data.tokenizer.user_symbols=[<x>]"),
    ),
    "fewer entries than characters": Case(
        (*NEW_DATA, "--set", "data.tokenizer.vocab_size=9"),
        "set it to more, or lower data.tokenizer.character_coverage",
        afterwards=(*NEW_DATA, "--set", "data.tokenizer.vocab_size=50"),
    ),
    "text without a word": Case(
        (*NEW_DATA, "--set", "data.train=[{kind: parallel, source: blank, target: blank}]"),
        "check data.train",
        afterwards=NEW_DATA,
        damage=write("blank", "\n" * 60),
    ),
    "perplexity of an encoder-decoder": Case(
        ("perplexity", "teacher", "text", "--device", "cpu"), "`dstrain validate BUNDLE --data DATA` gives", afterwards=VALIDATE
    ),
    "windows with gaps": Case(
        ("perplexity", "reader", "text", "--device", "cpu", "--context-window", "8", "--stride", "9"),
        "lower --stride to {}",
        afterwards=("perplexity", "reader", "text", "--device", "cpu", "--context-window", "8", "--stride", "8"),
        damage=lambda: make_decoder_only_bundle(Path("reader"), trained_on="text"),
    ),
    "texts where none are made": Case(
        (*VALIDATE, "--no-generate", "--beam-size", "2"), "leave one out", (VALIDATE,), (*VALIDATE, "--beam-size", "2")
    ),
    "the newest of bundles": Case(
        ("average", "teacher", "run/bundles/step_00000010", "--last", "1", "--output", "mean"),
        "not with bundles: leave it out",
        afterwards=("average", "teacher", "run/bundles/step_00000010", "--output", "mean"),
    ),
    "a bundle in place of a text": Case(
        ("average", "teacher", "--output", "text"),
        "is not a bundle, so it is not replaced; choose another --output",
        afterwards=("average", "teacher", "--output", "new"),
    ),
    "an output that holds an input": Case(
        ("dump-logits", *WORK, "--output", "."),
        "holds {} ({}), which would be lost; choose another --output",
        afterwards=("dump-logits", *WORK, "--output", "new"),
    ),
    "an output that is a directory": Case(
        (*GENERATE, "--output", "run"), "is a directory; name a file, such as {}", afterwards=(*GENERATE, "--output", "run/NAME")
    ),
    "an output that is part of an input": Case(
        (*GENERATE, "--output", "teacher/model.yaml", "--overwrite"),
        "is part of {} ({}), which would be lost; choose another --output",
        afterwards=(*GENERATE, "--output", "new"),
    ),
    "an output below a file": Case(
        (*GENERATE, "--output", "text/new"),
        "is a file, not a directory; choose another --output",
        afterwards=(*GENERATE, "--output", "new"),
    ),
    "an output that leads to itself": Case(
        (*GENERATE, "--output", "loop"),
        "is a link that leads back to itself; choose another --output",
        afterwards=(*GENERATE, "--output", "new"),
        damage=lambda: Path("loop").symlink_to("loop"),
    ),
    "a base of data": Case(
        ("inspect", "data", "--base", "teacher"),
        "is for an adapter bundle, which {} is not; leave it out",
        afterwards=("inspect", "data"),
    ),
    "a base of a bundle without one": Case(
        (*GENERATE, "--base", "teacher"), "so it rests on no other; leave --base out", afterwards=GENERATE
    ),
    "a base of a recipe with a model": Case(
        ("show", "recipe.yaml", "--base", "teacher"),
        "the recipe has a model of its own; leave --base out",
        afterwards=("show", "recipe.yaml"),
    ),
    "a recipe and its explanation": Case(
        ("show", "recipe.yaml", "--explain"),
        "leave RECIPE, --set and --base out, or --explain",
        (("show", "recipe.yaml"),),
        ("show", "--explain"),
    ),
    "nothing to show": Case(
        ("show",),
        "name one, or --explain [KEY] for the keys of all recipes",
        (("show", "recipe.yaml"),),
        ("show", "--explain", "model"),
    ),
    "a recipe that takes its model from a base": Case(
        ("show", "recipe.yaml", "--set", "model={from_base: true}"),
        "add --base BUNDLE",
        (("show", "recipe.yaml", "--set", "model={from_base: true}", "--base", "teacher"),),
        ("show", "recipe.yaml"),
    ),
    "a base that is not trusted": Case(
        ("show", "recipe.yaml", "--set", "model={from_base: 3}"),
        "input should be true, not {}; or leave it out",
        (("show", "recipe.yaml", "--set", "model={from_base: true}", "--base", "teacher"),),
        ("show", "recipe.yaml"),
    ),
    "a recipe without a model": Case(
        ("show", "bare.yaml"),
        "model: missing; give it a value",
        (("show", "bare.yaml", "--set", "model={preset: tiny}"),),
        ("show", "bare.yaml", "--base", "teacher"),
        bare,
    ),
    "a key as an option": Case(
        ("show", "recipe.yaml", "--max-steps", "3"),
        "is a key of the recipe; use --set {}={}",
        afterwards=("show", "recipe.yaml", "--set", "training.max_steps=3"),
        code=2,
    ),
    "diversity in one group": Case(
        (*GENERATE, "--diversity", "0.5"),
        "give groups (--groups) too, or leave it out",
        (GENERATE,),
        (*GENERATE, "--diversity", "0.5", "--groups", "2"),
    ),
    "an option of sampling": Case(
        (*GENERATE[:-2], "--top-k", "3"),
        "choose kind: sampling (--sampling)",
        afterwards=(*GENERATE[:-2], "--top-k", "3", "--sampling"),
    ),
    "an option of the beam": Case(
        (*GENERATE[:-2], "--sampling", "--groups", "2"),
        "choose kind: beam (by --beam-size, without --sampling)",
        afterwards=(*GENERATE, "--groups", "2", "--diversity", "0.5"),
    ),
    "nothing to score": Case(
        (*GENERATE[:-2], "--score-only"),
        "add --reference FILE",
        afterwards=(*GENERATE[:-2], "--score-only", "--reference", "text"),
    ),
    "no run to report": Case(
        ("report", "data"), "give the directory that `dstrain train --output` wrote", afterwards=("report", "run")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_can_be_followed(
    name: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, verbs = CASES[name], Verbs(capsys)
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "copy"))
    case.damage()
    before = Path("text").read_text()
    assert pattern(case.message).search(verbs.fail(*case.words, code=case.code))
    case.mend()
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
