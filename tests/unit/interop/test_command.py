import re
from fnmatch import fnmatch

import pytest

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.command import parse_command
from dstrain.interop.fairseq.command_line.flags import ALIASES, MAY_BE_BARE, SWITCHES, WITHOUT
from dstrain.interop.fairseq.options import OPTIONS, Settings
from tests.paths import ROOT


def test_a_command_line_is_read_as_a_shell_reads_it() -> None:
    command = parse_command(
        """CUDA_VISIBLE_DEVICES=0,1 python /opt/fairseq/train.py data-bin/one:data-bin/two -s en --target_lang=de \\
        -a transformer --max-sentences 32 --fp16 --adam-betas '(0.9, 0.98)' --lr 5e-4,1e-4 --eval-bleu-remove-bpe --seed -1 \\
        --eval-bleu-args '{"beam": 4}' --update-freq [4,2] --lr 0.001"""
    )
    assert command.data == ("data-bin/one", "data-bin/two")
    assert command.before == ["CUDA_VISIBLE_DEVICES=0,1", "python"]
    assert command.values == {
        **{"source_lang": "en", "target_lang": "de", "arch": "transformer"},
        **{"batch_size": 32, "seed": -1, "fp16": True, "adam_betas": [0.9, 0.98], "update_freq": [4, 2], "lr": [0.001]},
        **{"eval_bleu_args": {"beam": 4}, "eval_bleu_remove_bpe": True},
    }
    assert command.words["adam_betas"] == "(0.9, 0.98)"


def test_the_program_may_be_left_out_and_options_asked_for_are_known() -> None:
    command = parse_command("data-bin --arch transformer --max-tokens 4096")
    settings = Settings(command.values, decoder_only=False, words=command.words)
    assert settings["arch"] == "transformer"
    assert list(settings.unread()) == ["max_tokens"]
    assert settings.shown("max_tokens") == "--max-tokens 4096"


def test_an_option_is_explicit_then_of_the_architecture_then_inherited_then_the_default() -> None:
    settings = Settings(
        {"encoder_embed_dim": 64, "dropout": None, "rope_args": ""},
        decoder_only=False,
        arch={"encoder_embed_dim": 8, "dropout": 0.5},
    )
    names = ("encoder_embed_dim", "dropout", "decoder_output_dim", "encoder_layers", "rope_args", "share_all_embeddings")
    assert [settings[name] for name in names] == [64, 0.5, 64, 6, None, False]
    assert [settings.has(name) for name in names] == [True, False, False, False, False, False]


def test_unknown_options_are_kept_with_their_values_and_the_nearest_name() -> None:
    command = parse_command("data-bin --max-token 4096 --frobnicate a b --switch --lr 1")
    assert command.unknown == ["--max-token 4096 (did you mean --max-tokens?)", "--frobnicate a b", "--switch"]
    assert command.values == {"lr": [1.0]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data-bin --arch 'transformer", r"cannot be split into words \(No closing quotation\); quote it as a whole"),
        ("data-bin --max-tokens", r"--max-tokens is the last word and has no value"),
        ("--max-tokens 4096", r"names one data directory .* found none"),
        ("one two", r"names one data directory \(several joined by ':'\), found one, two"),
        ("fairseq-hydra-train --config-dir x", r"fairseq-hydra-train reads a YAML tree"),
    ],
)
def test_malformed_command_lines_are_one_message(line: str, message: str) -> None:
    with pytest.raises(ImportFormatError, match=message):
        parse_command(line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max-tokens many", r"--max-tokens many: not a whole number"),
        ("--dropout half", r"--dropout half: not a number"),
        ("--lr fast", r"--lr fast: not a list of numbers"),
        ("--adam-betas '(0.9'", r"--adam-betas \(0\.9: not a list of numbers"),
        ("""--lora-args '{"bias": "none, "r": 8}'""", r"--lora-args .*: not a JSON object in one pair of quotes"),
        ("--kd-args '[1]'", r"--kd-args \[1\]: not a JSON object .*it is a list"),
    ],
)
def test_values_of_the_wrong_kind_name_option_and_value(words: str, message: str) -> None:
    with pytest.raises(ImportFormatError, match=message):
        parse_command(f"data-bin {words}")


def test_the_tables_agree() -> None:
    assert not OPTIONS.keys() & WITHOUT.keys()
    assert OPTIONS.keys() | WITHOUT.keys() >= SWITCHES | MAY_BE_BARE | set(ALIASES.values())


def test_the_table_has_every_option() -> None:
    table = [
        line.split("|")[1]
        for line in (ROOT / "dstrain/interop/fairseq/README.md").read_text().splitlines()
        if line.startswith(("| `--", "| `DIR`"))
    ]
    patterns = [pattern for cell in table for pattern in re.findall(r"`--([^`]+)`", cell)]
    names = [name.replace("_", "-") for name in OPTIONS if name not in ALIASES]
    missing = [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]
    assert not missing
    names += [name.replace("_", "-") for name in WITHOUT]
    assert all(any(fnmatch(name, pattern) for name in names) for pattern in patterns)
