import re
from fnmatch import fnmatch

import pytest

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.command import parse_command
from dstrain.interop.fairseq.command_line.flags import ALIASES, MAPPED, MAY_BE_BARE, SWITCHES, WITHOUT
from tests.paths import ROOT


def test_a_command_line_is_read_as_a_shell_reads_it() -> None:
    command = parse_command(
        """CUDA_VISIBLE_DEVICES=0,1 python /opt/fairseq/train.py data-bin/one:data-bin/two -s en --target_lang=de \\
        -a transformer --max-sentences 32 --fp16 --adam-betas '(0.9, 0.98)' --lr 5e-4,1e-4 --eval-bleu-remove-bpe --seed -1 \\
        --eval-bleu-args '{"beam": 4}' --update-freq [4,2] --lr 0.001"""
    )
    assert command.data == ("data-bin/one", "data-bin/two")
    assert command.before == ["CUDA_VISIBLE_DEVICES=0,1", "python"]
    assert (command.text("source-lang"), command.text("target-lang"), command.text("arch")) == ("en", "de", "transformer")
    assert (command.integer("batch-size"), command.integer("seed")) == (32, -1)
    assert command.has("fp16")
    assert command.text("fp16") is None
    assert command.numbers("adam-betas") == [0.9, 0.98]
    assert command.numbers("update-freq") == [4, 2]
    assert command.numbers("lr") == [0.001]
    assert command.json("eval-bleu-args") == {"beam": 4}
    assert command.has("eval-bleu-remove-bpe")
    assert command.text("eval-bleu-remove-bpe") is None
    assert list(command.rest()) == []


def test_the_program_may_be_left_out_and_options_asked_for_are_known() -> None:
    command = parse_command("data-bin --arch transformer --max-tokens 4096")
    assert command.text("arch") == "transformer"
    assert list(command.rest()) == ["max-tokens"]
    assert command.shown("max-tokens") == "--max-tokens 4096"


def test_unknown_options_are_kept_with_their_values_and_the_nearest_name() -> None:
    command = parse_command("data-bin --max-token 4096 --frobnicate a b --switch --lr 1")
    assert command.unknown == ["--max-token 4096 (did you mean --max-tokens?)", "--frobnicate a b", "--switch"]
    assert command.numbers("lr") == [1.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data-bin --arch 'transformer", r"cannot be split into words \(No closing quotation\); quote it as a whole"),
        ("data-bin --max-tokens", r"--max-tokens stands at the end without its value"),
        ("--max-tokens 4096", r"names one data directory .* found none"),
        ("one two", r"names one data directory \(several joined by ':'\), found one, two"),
        ("fairseq-hydra-train --config-dir x", r"fairseq-hydra-train reads a YAML tree"),
    ],
)
def test_malformed_command_lines_are_one_message(line: str, message: str) -> None:
    with pytest.raises(ImportFormatError, match=message):
        parse_command(line)


@pytest.mark.parametrize(
    ("words", "method", "message"),
    [
        ("--max-tokens many", "integer", r"--max-tokens many: not a whole number"),
        ("--dropout half", "number", r"--dropout half: not a number"),
        ("--lr fast", "numbers", r"--lr fast: not a list of numbers"),
        ("--adam-betas '(0.9'", "numbers", r"--adam-betas \(0\.9: not a list of numbers"),
        ("""--lora-args '{"bias": "none, "r": 8}'""", "json", r"--lora-args .*: not a JSON object in one pair of quotes"),
        ("--kd-args '[1]'", "json", r"--kd-args \[1\]: not a JSON object .*it is a list"),
    ],
)
def test_values_of_the_wrong_kind_name_option_and_value(words: str, method: str, message: str) -> None:
    command = parse_command(f"data-bin {words}")
    with pytest.raises(ImportFormatError, match=message):
        getattr(command, method)(words.split(maxsplit=1)[0].lstrip("-"))


def test_the_tables_agree() -> None:
    assert not set(MAPPED) & set(WITHOUT)
    assert set(MAPPED) | set(WITHOUT) >= SWITCHES | MAY_BE_BARE | set(ALIASES.values())


def test_the_readme_s_table_has_every_option() -> None:
    table = [
        line.split("|")[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(("| `--", "| `DIR`"))
    ]
    patterns = [pattern for cell in table for pattern in re.findall(r"`--([^`]+)`", cell)]
    lacking = [name for name in MAPPED if not any(fnmatch(name, pattern) for pattern in patterns)]
    assert not lacking
    assert all(any(fnmatch(name, pattern) for name in (*MAPPED, *WITHOUT)) for pattern in patterns)
