"""A user's mistakes: each verb answers with one clear message and a non-zero exit, and nothing finished is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.e2e.support import (
    RECIPE,
    SMALL_DATA,
    SMALL_TRAINING,
    Ranks,
    dstrain,
    environment,
    events,
    fails,
    settings,
    succeeds,
)
from tests.paths import ROOT

GOOD = "ein kleiner Satz mit Wörtern\n"


def corpus(directory: Path, source: bytes, target: bytes) -> Path:
    """A recipe file over two text files of these contents."""
    (directory / "train.en").write_bytes(source)
    (directory / "train.de").write_bytes(target)
    valid = {"kind": "grammar", "split": "valid", "num_pairs": 5}
    train = {"kind": "parallel", "source": str(directory / "train.en"), "target": str(directory / "train.de")}
    recipe = {"extends": RECIPE, "data": {"train": [train], "valid": [valid], "test": {}, "tokenizer": {"vocab_size": 60}}}
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize(
    ("source", "target", "fragments"),
    [
        pytest.param(b"a b c\n" * 9, b"a b c\n" * 8, ("train.en", "9", "8"), id="unequal-sides"),
        pytest.param(b"a b c\nbad \xff byte\n", b"a\nb\n", ("train.en:2", "UTF-8"), id="invalid-utf8"),
        pytest.param(b"a b c\na\0b\n", b"a\nb\n", ("train.en:2", "NUL"), id="nul"),
        pytest.param(b"\n\n\n", b"\n\n\n", ("no words", "data.train"), id="everything-empty"),
    ],
)
def test_prepare_names_file_and_line(source: bytes, target: bytes, fragments: tuple[str, ...], tmp_path: Path) -> None:
    recipe = corpus(tmp_path, source, target)
    fails(dstrain("prepare", recipe, "--output", tmp_path / "data", "--workers", "1"), *fragments)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_prepare_counts_what_it_drops(tmp_path: Path) -> None:
    good = [f"{GOOD.strip()} {number}\n" for number in range(40)]
    source = "".join([*good, "\n", "x " * 100_000 + "\n"]).encode()
    target = "".join([*good, "y\n", "y\n"]).encode()
    recipe = corpus(tmp_path, source, target)
    words = ("prepare", recipe, "--output", tmp_path / "data", "--workers", "1")
    result = succeeds(dstrain(*words, *settings("data.tokenizer.vocab_size=45")))
    assert "dropped 2 of 42" in result.stdout + result.stderr


def test_a_vocabulary_larger_than_the_corpus_supports(tmp_path: Path) -> None:
    recipe = corpus(tmp_path, b"a b\nb a\na a\n", b"a b\nb a\na a\n")
    words = ("prepare", recipe, "--output", tmp_path / "data", "--workers", "1")
    fails(dstrain(*words, *settings("data.tokenizer.vocab_size=5000")), "vocab_size", "5000")


def test_missing_files_are_named(tmp_path: Path) -> None:
    recipe = corpus(tmp_path, b"a\n", b"a\n")
    (tmp_path / "train.de").unlink()
    fails(dstrain("prepare", recipe, "--output", tmp_path / "data"), "train.de")
    fails(dstrain("generate", tmp_path / "none", "--input", recipe, "--output", tmp_path / "out"), "is not a bundle")
    fails(dstrain("evaluate", "--hypothesis", tmp_path / "no.hyp", "--reference", recipe), "no.hyp")
    fails(dstrain("report", tmp_path / "norun"), "norun")
    fails(dstrain("train", RECIPE, "--data", tmp_path / "nodata", "--output", tmp_path / "run"), "nodata")
    fails(dstrain("train", RECIPE), "--data", code=2)


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="needs root to mount a full disk")
def test_a_full_disk_is_one_message_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        words = ("prepare", RECIPE, "--output", disk / "data", "--workers", "1", *settings(*SMALL_DATA))
        message = fails(dstrain(*words), str(disk))
        assert "No space left" in message or "full" in message
        assert not (disk / "data" / "manifest.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_standard_output_is_one_message() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "dstrain", "show", RECIPE]
        result = subprocess.run(
            command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    fails(result, "No space left on device")


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    """Prepared data that a test may damage."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def train_words(data: Path, run: Path, *overrides: str) -> list[str | Path]:
    chosen = settings(*SMALL_DATA, *SMALL_TRAINING, *overrides)
    return ["train", RECIPE, "--data", data, "--output", run, "--device", "cpu", *chosen]


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "altered", "missing"])
def test_a_damaged_shard_is_refused_before_training(damage: Callable[[Path], None], copied: Path, tmp_path: Path) -> None:
    damage(copied / "train" / "00000.arrow")
    fails(dstrain(*train_words(copied, tmp_path / "run")), "00000.arrow", "prepare the data again")


def test_data_of_another_tokenizer_or_recipe_is_refused(data: Path, copied: Path, tmp_path: Path) -> None:
    fails(
        dstrain(*train_words(data, tmp_path / "run", "data.tokenizer.vocab_size=160")), "data.tokenizer.vocab_size", "150", "160"
    )
    tokenizer = next((copied / "tokenizer").glob("*.model"))
    flip(tokenizer)
    fails(dstrain(*train_words(copied, tmp_path / "run")), "tokenizer")


def test_a_bad_deepspeed_file_names_the_nearest_key(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 1}, "gradient_cliping": 1.0}')
    fails(dstrain(*train_words(data, tmp_path / "run", f"engine.deepspeed={path}")), "gradient_cliping", "gradient_clipping")
    low = ("engine.deepspeed=zero0", "engine.precision=bf16")
    fails(dstrain(*train_words(data, tmp_path / "run", *low)), "zero1")
    assert not (tmp_path / "run").exists()


def test_a_broken_deepspeed_is_one_message_before_the_run_exists(data: Path, tmp_path: Path) -> None:
    package = tmp_path / "broken" / "deepspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('CUDA_HOME does not exist\\nand more')\n")
    command = [sys.executable, "-m", "dstrain", *map(str, train_words(data, tmp_path / "run"))]
    shadowed = environment({"PYTHONPATH": f"{package.parent}:{ROOT}"})
    result = subprocess.run(command, env=shadowed, capture_output=True, text=True, timeout=120, check=False)
    fails(result, "training needs DeepSpeed, which cannot be imported: RuntimeError: CUDA_HOME does not exist; install one")
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named(data: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        fails(dstrain(*train_words(data, tmp_path / "run"), variables=place), "MASTER_PORT", port)


def test_ranks_started_with_different_words_end_with_one_message(data: Path, tmp_path: Path) -> None:
    words = train_words(data, tmp_path / "run")
    ranks = Ranks(words, 2, tmp_path / "log", last=settings("optimizer.learning_rate=0.5"))
    assert ranks.wait(120) == [1, 1]
    said = ranks.output()
    assert "Traceback" not in said
    assert said.count("the ranks do not agree on what to train") == 1
    assert re.search(r"optimizer\.learning_rate: \S+ on rank 0 \(.+\), 0\.5 on rank 1 \(.+\)\n", said)
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_no_run_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    fails(dstrain(*train_words(data, tmp_path / "thesis")), "is no run")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"


def test_a_broken_bundle_is_named_by_its_fault(tmp_path: Path) -> None:
    from dstrain.checkpoint.bundle import save_bundle
    from dstrain.models.config import VocabularySizes
    from dstrain.models.factory import build_model
    from dstrain.models.weights import to_canonical
    from dstrain.recipe_file import load_recipe

    config = load_recipe(RECIPE).model
    vocabulary = VocabularySizes(source=60, target=60)
    bundle = tmp_path / "bundle"
    weights = to_canonical(build_model(config, vocabulary, seed=1))
    save_bundle(bundle, model_config=config, vocabulary=vocabulary, weights=weights, tokenizers=None, recipe=None)
    (tmp_path / "in").write_text("a\n")
    words = ("generate", bundle, "--input", tmp_path / "in", "--output", tmp_path / "out")
    fails(dstrain(*words), "tokenizer")
    file = bundle / "model.safetensors"
    kept = load_file(file)
    kept.pop(sorted(kept)[0])
    save_file(kept, file)
    fails(dstrain(*words), "model.safetensors", "altered")
    file.unlink()
    fails(dstrain(*words), "model.safetensors")


def test_two_trainings_in_one_run_are_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Ranks(train_words(data, run, "training.max_steps=4000"), 1, tmp_path / "log")
    try:
        first.wait_until(lambda: bool(events(run, "train")))
        fails(dstrain(*train_words(data, run, "training.max_steps=4000")), "another training is running")
    finally:
        first.kill()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["prepare", "generate", "interactive"])
def test_ctrl_c_leaves_quietly(verb: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeeds(dstrain(*train_words(data, run, "training.max_steps=2")))
    source = tmp_path / "source.txt"
    source.write_text("The girl sleeps.\n" * 60_000)
    words: dict[str, list[str | Path]] = {
        "prepare": ["prepare", RECIPE, "--output", tmp_path / "out", "--workers", "2"],
        "generate": ["generate", run / "bundles" / "last", "--input", source, "--output", tmp_path / "out"],
        "interactive": ["interactive", run / "bundles" / "last"],
    }
    command = [sys.executable, "-m", "dstrain", *map(str, words[verb])]
    process = subprocess.Popen(
        command,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(2 if verb == "prepare" else 6)  # preparation ends after five seconds
    os.killpg(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode in {130, 0 if verb == "interactive" else 130}, message
    assert "Traceback" not in message, message
