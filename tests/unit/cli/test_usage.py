"""The command line answers a slip with the option, the verb or the recipe key that was meant, and completes words in a shell."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys

import pytest

from dstrain.cli.main import build_parser, main
from dstrain.cli.verbs import VERBS
from tests.paths import ROOT

TRAIN = ("train", "translation/quickstart", "--data", "d", "--output", "o")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--tokenize", "ZH"], "argument --tokenize: 'ZH' is unknown; did you mean zh?"),
        (["completion", "--lr"], "--lr is no option of dstrain completion; it has none"),
        (["trian"], "dstrain: error: argument VERB: 'trian' is unknown; did you mean train?"),
        (["--beam", "3"], "dstrain: error: --beam is no option of dstrain; it has --version, --debug"),
        (
            ["generate", "b", "--beem-size", "4"],
            "generate: error: --beem-size is no option of dstrain generate; did you mean --beam-size?",
        ),
        (["generate", "b", "--beam_size=4"], "--beam_size is no option of dstrain generate; did you mean --beam-size?"),
        (["report", "r", "-outptu", "x"], "-outptu is no option of dstrain report; did you mean --output?"),
        (["generate", "--beam-sise", "4", "b"], "did you mean --beam-size?"),
        (["train", "r", "--dat", "d", "--output", "o"], "--dat is no option of dstrain train; did you mean --data?"),
        ([*TRAIN, "--max-epochs", "3"], "train: error: --max-epochs is a key of the recipe; use --set training.max_epochs=3"),
        (["train", "--max_epochs=3", *TRAIN[1:]], "--max_epochs is a key of the recipe; use --set training.max_epochs=3"),
        (
            ["prepare", "r", "--training.seed=4", "--output", "o"],
            "--training.seed is a key of the recipe; use --set training.seed=4",
        ),
        (["show", "r", "--seed"], "--seed is a key of the recipe; use --set training.seed=VALUE"),
        ([*TRAIN, "--lr", "0.1"], "--lr is no option of dstrain train; it has --set, --base, --data, --output, "),
        ([*TRAIN, "--lr", "0.1", "--seed", "2"], "--device, --teacher"),
        (["import", "fairseq-dat"], "import: error: argument FORMAT: 'fairseq-dat' is unknown; did you mean fairseq-data?"),
        (
            ["import", "fairseq", "x", "--dict", "y"],
            "import fairseq: error: --dict is no option of dstrain import fairseq; did you mean --dictionary?",
        ),
        (["dump-logits", "--method", "topp"], "argument --method: 'topp' is unknown; did you mean topk?"),
        (["dump-logits", "--method", "zzz"], "argument --method: 'zzz' is unknown; choose one of sample, topk, dense"),
        (["generate", "b", "--length-penalty", "x"], "argument --length-penalty: 'x' is not a number"),
        (["generate", "b", "--min-length", "1.5"], "argument --min-length: '1.5' is not a whole number"),
        (["generate", "b", "--beam-size"], "generate: error: --beam-size lacks its value"),
        (["generate", "b", "--truncate=yes"], "argument --truncate: it takes no value, so leave 'yes' out"),
        (["generate", "b", "c"], "generate: error: c: not expected; dstrain generate takes no more words"),
        (["train", "r"], "train: error: the following arguments are required: --data, --output"),
    ],
)
def test_a_slip_ends_with_what_was_meant(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    usage, *_, last = capsys.readouterr().err.splitlines()
    assert message in last
    assert usage.startswith(f"usage: {last.partition(': error: ')[0]} [-h]")


@pytest.mark.parametrize("words", [[], ["import"], ["--debug"]])
def test_without_a_verb_there_is_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(f"usage: dstrain {'import ' if words == ['import'] else ''}[-h]")


def test_a_list_of_keys_may_have_spaces() -> None:
    words = ["train", "r", "--data", "d", "--output", "o", "--accept-changes", "schedule, optimizer.betas"]
    assert build_parser(["train"]).parse_args(words).accept_changes == ("schedule", "optimizer.betas")


def test_short_options_and_negative_numbers_are_values() -> None:
    words = ["import", "fairseq-data", "data-bin", "-sen", "-t", "de", "--output", "o"]
    args = build_parser(["import"]).parse_args(words)
    assert (args.source_lang, args.target_lang) == ("en", "de")
    assert build_parser(["generate"]).parse_args(["generate", "b", "--length-penalty", "-0.5"]).length_penalty == -0.5


def test_completion_knows_verbs_options_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for cut, expected in (
        ("dstrain trai", "train"),
        ("dstrain generate b --beam-s", "--beam-size"),
        ("dstrain train language_modeling/wikitext_t", "language_modeling/wikitext_tiny"),
        ("dstrain import fairseq-d", "fairseq-data"),
    ):
        *before, word = cut.split()
        line = f"COMP_WORDS=({cut}); COMP_CWORD={len(before)}; _shtab_dstrain dstrain '{word}' '{before[-1]}'"
        run = subprocess.run(
            [shutil.which("bash") or "bash", "-c", f'{script}\n{line}; echo "${{COMPREPLY[@]}}"'],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            cwd=ROOT / "tests",
        )
        assert run.stdout.split() == [expected], cut
    assert main(["completion", "zsh"]) == 0
    zsh = capsys.readouterr().out
    assert zsh.startswith("#compdef dstrain")
    assert all(f"\n    {verb}:'" in zsh for verb in VERBS)


def test_completion_without_its_package_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert 'pip install "dstrain[completion]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "standard output: No space left on device; free some space, or write els",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.txt"),
            "a.txt: No space left on device; free some space, or write els",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.txt"),
            "a.txt: Permission denied; check that the path exists and may",
        ),
    ],
)
def test_a_refusal_of_the_system_names_file_and_remedy(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> str:
        raise error

    monkeypatch.setattr("dstrain.cli.show.dump_recipe", fail)
    monkeypatch.setattr("dstrain.cli.guard._let_go_of_stdout", lambda: None)
    assert main(["show", "translation/quickstart"]) == 1
    assert message in capsys.readouterr().err
