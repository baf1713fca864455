"""What dump-logits and inspect answer to a user's mistakes, and to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dstrain.cli.main import main
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.distillation.store.store import open_store
from tests.unit.cli.verbs import Verbs, bundle_for
from tests.unit.distillation.toy_store import batch_of, prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_for(data, tmp_path_factory.mktemp("teacher") / "bundle", seed=3)


def words(teacher: Path, data: Path, output: Path, *more: str) -> list[str]:
    given = ["dump-logits", "--teacher", str(teacher), "--data", str(data), "--output", str(output)]
    return [*given, "--device", "cpu", "--tokens-per-shard", "100", *more]


@pytest.fixture(scope="module")
def logits(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("logits") / "logits"
    assert main(words(teacher, data, output)) == 0
    return output


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def verbs(capsys: pytest.CaptureFixture[str]) -> Verbs:
    return Verbs(capsys)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "altered", "missing"])
def test_a_damaged_store_is_refused_and_mended(
    damage: Callable[[Path], None], logits: Path, tmp_path: Path, verbs: Verbs
) -> None:
    copy = Path(shutil.copytree(logits, tmp_path / "logits"))
    damage(copy / "00002.arrow")
    message = verbs.fail("inspect", copy)
    assert "00002.arrow" in message
    assert "dump this shard again" in message
    assert "(2)" in verbs.fail("dump-logits", "--merge", copy)


def test_mismatches_are_refused(data: Path, teacher: Path, logits: Path, tmp_path: Path, verbs: Verbs) -> None:
    other = prepared(tmp_path / "other", vocab_size=110)
    newer = bundle_for(data, tmp_path / "newer", seed=4)
    mute = bundle_for(data, tmp_path / "mute", seed=3, tokenizers=False)
    other_teacher = bundle_for(other, tmp_path / "other_teacher", seed=3)
    assert "ids would mean other words" in verbs.fail(*words(teacher, other, tmp_path / "new"))
    assert "has no tokenizer" in verbs.fail(*words(mute, data, tmp_path / "new"))
    assert "is not a bundle" in verbs.fail(*words(tmp_path / "none", data, tmp_path / "new"))
    message = verbs.fail(*words(newer, data, logits))
    assert "was started with another job (teacher:" in message
    angle = ("inspect", logits, "--device", "cpu")
    assert "are of another teacher" in verbs.fail(*angle, "--against-teacher", newer, "--data", data)
    assert "ids would mean other words" in verbs.fail(*angle, "--against-teacher", other_teacher, "--data", data)
    assert "ids would mean other words" in verbs.fail(*angle, "--against-teacher", teacher, "--data", other)
    assert "another vocabulary" in verbs.fail(*angle, "--against-teacher", teacher, "--data", data, "--student", other_teacher)
    assert "needs --data" in verbs.fail(*angle, "--against-teacher", teacher)
    assert "no tail" in verbs.fail(*angle, "--against-teacher", teacher, "--data", data, "--renormalize")
    assert not (tmp_path / "new").exists()


def test_text_that_a_task_makes_examples_of_is_refused(data: Path, teacher: Path, tmp_path: Path, verbs: Verbs) -> None:
    from dstrain.build.training_options import TeacherOptions, TrainOptions, check_training
    from dstrain.data.config import DataConfig, PlainText
    from dstrain.data.prepared.prepare import prepare
    from dstrain.data.tokenizers.config import TokenizerDirectory
    from dstrain.errors import RecipeError
    from dstrain.recipe_file import load_recipe

    (tmp_path / "text.txt").write_text("The girl sleeps.\n")
    text = (PlainText(path=str(tmp_path / "text.txt")),)
    config = DataConfig(train=text, valid=text, tokenizer=TokenizerDirectory(path=str(data / "tokenizer")))
    prepare(config, tmp_path / "text", workers=1, progress=False)
    message = verbs.fail(*words(teacher, tmp_path / "text", tmp_path / "logits"))
    assert "is text without a source: the encoder of" in message
    assert "in every epoch, for which only `train --teacher` has a signal" in message
    recipe = load_recipe("pretraining/wikitext_denoising_tiny", ["objective={kind: distillation}"])
    options = TrainOptions(data=data, output=tmp_path / "run", teachers=TeacherOptions(logits=tmp_path / "logits"))
    with pytest.raises(RecipeError, match=r"data\.train\.0\.task makes another example of a text in every epoch, and --logits"):
        check_training(recipe, options)


def test_other_sentences_are_refused(data: Path, teacher: Path, logits: Path, tmp_path: Path, verbs: Verbs) -> None:
    """The same tokenizer, other rows."""
    from dstrain.data.config import DataConfig, GrammarText
    from dstrain.data.prepared.prepare import prepare
    from dstrain.data.tokenizers.config import TokenizerDirectory

    config = DataConfig(
        train=(GrammarText(split="train", num_pairs=60, seed=2),),
        valid=(GrammarText(split="valid", num_pairs=7),),
        tokenizer=TokenizerDirectory(path=str(data / "tokenizer")),
    )
    prepare(config, tmp_path / "other", workers=1, progress=False)
    message = verbs.fail("inspect", logits, "--against-teacher", teacher, "--data", tmp_path / "other", "--device", "cpu")
    assert "are of other data" in message
    assert "was started with another job (data:" in verbs.fail(*words(teacher, tmp_path / "other", logits))


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("--draws", "0"), "--draws: '0' is not a whole number from 1 on", 2),
        (("--draws", "70000"), "--draws 70000", 1),
        (("--seed", "-1"), "--seed: '-1' is not a whole number from 0 on", 2),
        (("--precision", "fp8"), "--precision: 'fp8' is unknown", 2),
        (("--temperature", "0"), "--temperature: '0' is not a number above 0", 2),
        (("--temperature", "-1"), "is not a number above 0", 2),
        (("--temperature", "nan"), "is not a number above 0", 2),
        (("--method", "topk", "--k", "9999"), "k = 9999 exceeds the 120 entries of the vocabulary; lower --k", 1),
        (("--method", "topk", "--draws", "9"), "--draws does not go with --method topk; leave it out", 1),
        (("--method", "topk", "--dtype", "int3"), "--dtype int3", 1),
        (("--shard", "3/3"), "is no share I/N", 2),
        (("--split", "nothing"), "has no split 'nothing'", 1),
        (("--merge", "somewhere"), "or --merge LOGITS without them", 1),
        (("--device", "tpu"), "device 'tpu' is unknown", 2),
    ],
)
def test_options_that_cannot_be(
    options: tuple[str, ...], message: str, code: int, *, data: Path, teacher: Path, tmp_path: Path, verbs: Verbs
) -> None:
    assert message in verbs.fail(*words(teacher, data, tmp_path / "logits"), *options, code=code)
    assert not (tmp_path / "logits").exists()


def test_a_dump_without_arguments_says_what_it_takes(verbs: Verbs) -> None:
    assert "takes --teacher, --data and --output, or --merge" in verbs.fail("dump-logits")


def test_every_method_dumps_and_is_described(data: Path, teacher: Path, tmp_path: Path, verbs: Verbs) -> None:
    for method, fact in [("sample", "50 draws"), ("topk", "the 64 likeliest tokens in uint8"), ("dense", "in float16")]:
        output = tmp_path / method
        assert "is complete" in verbs.succeed(*words(teacher, data, output, "--method", method, "--temperature", "2"))
        text = verbs.succeed("inspect", output)
        assert fact in text
        assert "temperature 2" in text
        angle = verbs.succeed("inspect", output, "--against-teacher", teacher, "--data", data, "--tokens", "100")
        assert "norm ratio" in angle


def test_every_seed_from_0_on_is_a_seed(data: Path, teacher: Path, logits: Path, tmp_path: Path, verbs: Verbs) -> None:
    verbs.succeed(*words(teacher, data, tmp_path / "logits", "--seed", "0"))
    assert "(seed 0)" in verbs.succeed("inspect", tmp_path / "logits")
    assert (tmp_path / "logits" / "00000.arrow").read_bytes() != (logits / "00000.arrow").read_bytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_teacher_in_half_precision_says_nearly_the_same(
    precision: str, data: Path, teacher: Path, tmp_path: Path, verbs: Verbs
) -> None:
    """And what it says is another job than that of the same teacher in fp32."""
    signals = []
    for name in ("fp32", precision):
        verbs.succeed(
            *words(teacher, data, tmp_path / name, "--method", "topk", "--k", "120", "--dtype", "float32", "--precision", name)
        )
        assert f"in {name}, data" in verbs.succeed("inspect", tmp_path / name)
        signal = open_store(tmp_path / name, data=data, manifest=load_manifest(data)).signal(
            batch_of(open_dataset(data, "train"), range(60))
        )
        signals.append(torch.zeros_like(signal.probs).scatter_(1, signal.ids, signal.probs))
    exact, half = signals
    assert not torch.equal(exact, half)
    torch.testing.assert_close(half, exact, rtol=0.05, atol=1e-4)
    torch.testing.assert_close(half.sum(1), torch.ones(len(half)), rtol=0, atol=1e-5)
    message = verbs.fail(
        *words(teacher, data, tmp_path / "fp32", "--method", "topk", "--k", "120", "--dtype", "float32", "--precision", precision)
    )
    assert f"was started with another job (precision: fp32 -> {precision})" in message


def test_a_dump_from_before_precisions_is_in_fp32(data: Path, teacher: Path, logits: Path, tmp_path: Path, verbs: Verbs) -> None:
    copy = Path(shutil.copytree(logits, tmp_path / "logits"))
    for name in ("parts.json", "logits.json"):
        content = (copy / name).read_text().replace('"precision": "fp32"', "").replace(",\n  \n", "\n").replace(",\n    \n", "\n")
        assert "precision" not in content
        (copy / name).write_text(content)
    assert "in fp32, data" in verbs.succeed("inspect", copy)
    assert "nothing to do" in verbs.succeed(*words(teacher, data, copy))
