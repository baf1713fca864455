"""Every variant of the architecture learns 64 sentence pairs by heart through the command line, and says them back.

Training and generation take different ways through a model: teacher forcing over whole sequences, and a cache that grows token by
token. A variant that is wrong in either does not come to a loss under 0.05, or does not say its targets back.

A case is one process that runs `train` and `generate`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import sacrebleu
import yaml

from dstrain.cli.main import main
from dstrain.parallel.launch_environment import leave
from dstrain.recipe_file import merge
from tests.e2e.support import environment
from tests.processes import Fork

Tree = dict[str, Any]
CORPUS = {"kind": "grammar", "split": "train", "num_pairs": 64}
STEPS = 300

STACK = {"depth": 1, "num_heads": 4, "ffn_dim": 128}
ENCODER_DECODER: Tree = {
    "kind": "encoder_decoder",
    "model_dim": 64,
    "encoder": STACK,
    "decoder": STACK,
    "norm_order": "pre",
    "embedding": {"kind": "plain", "tie": "all"},
    "dropout": 0.0,
}
DECODER_ONLY: Tree = {
    "kind": "decoder_only",
    "model_dim": 64,
    "decoder": STACK,
    "norm_order": "pre",
    "embedding": {"kind": "plain", "tie": "decoder"},
    "dropout": 0.0,
}


def both(**changes: Any) -> Tree:
    """The same change of encoder and decoder."""
    return {"encoder": changes, "decoder": changes}


def rotary(**scaling: Any) -> Tree:
    return {"position": {"kind": "rotary", "scaling": scaling or {"kind": "none"}}}


PARTS: dict[str, Tree] = {
    "rotary": rotary(),
    "linear": rotary(kind="linear", factor=2.0),
    "yarn": rotary(kind="yarn", original_length=8, factor=4.0),
    # What follows the length of a sequence turns otherwise in training, which sees it whole, than in generation, which sees it
    # grow; so these are learned within their original length.
    "ntk": rotary(kind="dynamic_ntk", original_length=64, factor=2.0),
    "dynamic_yarn": rotary(kind="dynamic_yarn", original_length=64),
    "late_rotary": {"position": {"kind": "rotary", "layout": "interleaved", "fraction": 0.5}},
    "alibi_symmetric": {"position": {"kind": "alibi", "encoder": "symmetric"}},
    "alibi_asymmetric": {"position": {"kind": "alibi", "encoder": "asymmetric"}},
    "learned": {"position": {"kind": "learned"}},
    "stacked": both(depth=2, unique_layers=1),
    "cycled": both(depth=3, unique_layers=2),
    "factorized": {"embedding": {"kind": "factorized", "dim": 32, "activation": "gelu", "tie": "none"}},
    "factorized_tied": {"embedding": {"kind": "factorized", "dim": 32, "tie": "all"}},
    "output_activation": {"decoder": {"output_activation": "gelu"}},
    "gqa": {"encoder": {"num_kv_heads": 2}, "decoder": {"num_kv_heads": 2, "num_cross_kv_heads": 2}},
    "mqa": {"encoder": {"num_kv_heads": 1}, "decoder": {"num_kv_heads": 1, "num_cross_kv_heads": 1}},
    "gated": {**both(feed_forward="gated"), "activation": "silu"},
    "rms_norm": {"norm": {"kind": "rms_norm"}},
    "post_norm": {"norm_order": "post"},
    "embedding_norm": {"embedding": {"norm": True}},
    "no_final_norm": both(final_norm="no"),
}
CONCATENATED = [
    ("rotary", "gated", "rms_norm"),
    ("yarn", "stacked"),
    ("alibi", "mqa", "stacked"),
    ("ntk", "factorized_tied", "cycled"),
    ("learned", "gqa", "output_activation"),
]


def encoder_decoder(*names: str) -> Tree:
    tree = ENCODER_DECODER
    for name in names:
        tree = merge({"model": tree}, {"model": PARTS[name]})["model"]
    return tree


def decoder_only(*names: str) -> Tree:
    tied = {"kind": "factorized", "dim": 32, "tie": "decoder"}
    parts = {**PARTS, "alibi": {"position": {"kind": "alibi"}}, "factorized_tied": {"embedding": tied}}
    tree = DECODER_ONLY
    for name in names:
        part = {key: value for key, value in parts[name].items() if key != "encoder"}
        tree = merge({"model": tree}, {"model": part})["model"]
    return {**tree, "decoder": {key: value for key, value in tree["decoder"].items() if key != "num_cross_kv_heads"}}


def independent(a: str, b: str) -> bool:
    """Whether the two parts change different things, so that a model can have both."""
    return a < b and encoder_decoder(a, b) == encoder_decoder(b, a)


FAST = ("stacked", "yarn")
PAIRS = sorted({FAST, *random.Random(5).sample([(a, b) for a in PARTS for b in PARTS if independent(a, b)], 8)})


def recipe(model: Tree, corpus: Tree, path: Path) -> Path:
    """A recipe that shows the whole corpus at every step; written to `path`."""
    tree = {
        "version": 1,
        "data": {"train": [corpus], "valid": [corpus], "tokenizer": {"kind": "sentencepiece", "vocab_size": 250}},
        "batching": {"tokens_per_step": 4000, "max_tokens": 8000},
        "model": model,
        "objective": {"kind": "cross_entropy", "label_smoothing": 0.0},
        "optimizer": {"kind": "adam", "learning_rate": 0.01, "betas": [0.9, 0.98]},
        "schedule": {"kind": "linear", "total_steps": STEPS, "warmup_steps": 10},
        "engine": {"deepspeed": "zero0"},
        "training": {"max_steps": STEPS},
        "validation": {"unit": "steps", "every": 10_000, "generation": None},
        "checkpoint": {"unit": "steps", "every": 10_000},
        "reporting": {"log_every": 1},
        "generation": {"kind": "beam", "beam_size": 1, "max_length_offset": 60},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def verbs(log: Path, commands: Sequence[Sequence[str | Path]]) -> None:
    """Run verbs one after the other in one process of their own, whose output goes to `log`."""
    process = Fork(
        _run_verbs, [[str(word) for word in command] for command in commands], env=environment(), stdout=log, stderr=log
    )
    try:
        assert process.wait(240) == 0, log.read_text()
    finally:
        process.kill()


def _run_verbs(commands: Sequence[Sequence[str]]) -> NoReturn:
    leave(max(main(words) for words in commands))


def learn(model: Tree, data: Path, corpus: Tree, directory: Path, *commands: Sequence[str | Path]) -> float:
    """Train, and run further verbs; returns the loss of the last step. The bundle is RUN/bundles/last in `directory`."""
    written, run = recipe(model, corpus, directory / "recipe.yaml"), directory / "run"
    train = ["train", written, "--data", data, "--output", run, "--device", "cpu"]
    verbs(directory / "log", [train, *commands])
    return [float(event["loss"]) for event in map(json.loads, (run / "events.jsonl").open()) if event["kind"] == "train"][-1]


def generate(directory: Path, source: Path, output: str, *options: str | Path) -> list[str | Path]:
    """The words of a command that answers `source`."""
    common = ["--input", source, "--output", directory / output, "--device", "cpu", "--threads", "1"]
    return ["generate", directory / "run" / "bundles" / "last", *common, *options]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 64 pairs, prepared; data/valid/source.txt and target.txt beside it."""
    directory = tmp_path_factory.mktemp("overfit")
    written = recipe(encoder_decoder(), CORPUS, directory / "recipe.yaml")
    assert main(["prepare", str(written), "--output", str(directory / "data"), "--workers", "1"]) == 0
    assert main(["text", str(directory / "data"), "--split", "valid", "--output", str(directory / "text")]) == 0
    return directory


def says_its_targets_back(model: Tree, data: Path, directory: Path) -> None:
    source, target = data / "text" / "source.txt", data / "text" / "target.txt"
    assert learn(model, data / "data", CORPUS, directory, generate(directory, source, "output.txt")) < 0.05
    found = (directory / "output.txt").read_text().splitlines()
    assert len(found) == 64
    assert sacrebleu.corpus_bleu(found, [target.read_text().splitlines()]).score == pytest.approx(100)


@pytest.mark.slow
@pytest.mark.parametrize("names", [(name,) for name in PARTS], ids="-".join)
def test_each_part(names: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    says_its_targets_back(encoder_decoder(*names), data, tmp_path)


@pytest.mark.parametrize(
    "names", [pytest.param(pair, marks=() if pair == FAST else pytest.mark.slow) for pair in PAIRS], ids="-".join
)
def test_pairs_of_parts(names: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    says_its_targets_back(encoder_decoder(*names), data, tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, id="-".join(names), marks=() if names == CONCATENATED[0] else pytest.mark.slow)
        for names in CONCATENATED
    ],
)
def test_decoder_only(names: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    says_its_targets_back(decoder_only(*names), data, tmp_path)


def beginning(line: str, others: Sequence[str]) -> str:
    """The first words of a line that no other line begins with."""
    words = line.split()
    starts = (" ".join(words[:count]) for count in range(1, len(words) + 1))
    return next(start for start in starts if sum(other.startswith(start) for other in others) == 1)


@pytest.mark.slow
def test_a_language_model_goes_on_from_what_its_text_begins_with(data: Path, tmp_path: Path) -> None:
    """Text without a source, blank lines in it: the beginning of each line, as input or as prefix, brings back the rest."""
    lines = (data / "text" / "target.txt").read_text().splitlines()
    text, started, empty = tmp_path / "text.txt", tmp_path / "started.txt", tmp_path / "empty.txt"
    text.write_text("\n \n".join(lines) + "\n\n")
    started.write_text("".join(beginning(line, lines) + "\n" for line in lines))
    empty.write_text("\n" * len(lines))
    corpus = {"kind": "text", "path": str(text)}
    model = decoder_only("rotary", "gqa", "gated", "rms_norm")
    written = recipe(model, corpus, tmp_path / "recipe.yaml")
    verbs(tmp_path / "prepared", [["prepare", written, "--output", tmp_path / "data", "--workers", "1"]])
    assert "train: 64 lines" in (tmp_path / "prepared").read_text()
    assert "dropped 64 of 128: empty 64" in (tmp_path / "prepared").read_text()
    continue_, force = generate(tmp_path, started, "continued.txt"), generate(tmp_path, empty, "forced.txt", "--prefix", started)
    validate = ["validate", tmp_path / "run" / "bundles" / "last", "--data", tmp_path / "data", "--device", "cpu"]
    learn(model, tmp_path / "data", corpus, tmp_path, continue_, force, validate)
    assert (tmp_path / "continued.txt").read_text().splitlines() == lines
    assert (tmp_path / "forced.txt").read_text().splitlines() == lines
    with pytest.raises(AssertionError, match="is text without a source to translate, so only losses are scored: leave"):
        verbs(tmp_path / "refused", [[*validate, "--generate"]])
