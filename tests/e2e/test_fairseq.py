"""A user of fairseq: its binarized data and its command line, through the command line of dstrain."""

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.e2e.support import RECIPE, SMALL_TRAINING, curve, dstrain, events, fails, settings, succeeds
from tests.paths import GOLDEN, needs_golden

pytestmark = needs_golden
COMMAND = """
fairseq-train {data} --arch transformer_tiny --share-all-embeddings --encoder-layers 1 --decoder-layers 1 --dropout 0.1 \\
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 0.001 --lr-scheduler inverse_sqrt --warmup-updates 10 \\
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 200 --update-freq 2 --max-update 3 \\
    --eval-bleu --eval-bleu-args '{{"beam": 2, "max_len_a": 1, "max_len_b": 5}}' --log-interval 1 --no-epoch-checkpoints
"""


LANGUAGE_MODEL = """
fairseq-train {data} --task language_modeling --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 32 \\
    --decoder-input-dim 32 --decoder-output-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2 \\
    --share-decoder-input-output-embed --tokens-per-sample 64 --optimizer adam --lr 0.001 --max-tokens 200 --update-freq 2 \\
    --max-update 3 --log-interval 1 --no-epoch-checkpoints
"""


@pytest.mark.parametrize(("command", "data"), [(COMMAND, "bin_joined"), (LANGUAGE_MODEL, "bin_lm")], ids=["pairs", "text"])
def test_a_command_line_becomes_a_recipe_that_trains(command: str, data: str, tmp_path: Path) -> None:
    recipe, prepared, run = tmp_path / "recipe.yaml", tmp_path / "data", tmp_path / "run"
    said = succeeds(dstrain("import", "fairseq-args", command.format(data=GOLDEN / "data" / data), "--output", recipe)).stderr
    assert "batching.tokens_per_step = 200 (max_tokens) x 2 (update-freq) x 1 (processes) = 400" in said
    succeeds(dstrain("prepare", recipe, "--output", prepared))
    succeeds(dstrain("train", recipe, "--data", prepared, "--output", run, "--device", "cpu"))
    assert [step for step, *_ in curve(run)] == [1, 2, 3]
    scores = json.loads(succeeds(dstrain("validate", run / "bundles/last", "--data", prepared, "--split", "test")).stdout)
    assert scores["loss"] > 0
    assert command is LANGUAGE_MODEL or 0 <= scores["bleu"] <= 100


def test_imported_data_train_under_a_recipe_that_extends_their_section(tmp_path: Path) -> None:
    data, run, recipe = tmp_path / "data", tmp_path / "run", tmp_path / "recipe.yaml"
    printed = succeeds(dstrain("import", "fairseq-data", GOLDEN / "data/bin_sep", "--output", data)).stdout
    assert "# train: 400 pairs, 3,481 + 3,481 tokens; <unk> " in printed
    (tmp_path / "data.yaml").write_text(printed)
    quickstart = yaml.safe_load(succeeds(dstrain("show", RECIPE, *settings(*SMALL_TRAINING))).stdout)
    quickstart["model"]["embedding"]["tie"] = "decoder"
    del quickstart["data"]
    recipe.write_text(yaml.safe_dump({"extends": "data.yaml", **quickstart, "training": {"seed": 1, "max_steps": 3}}))
    succeeds(dstrain("train", recipe, "--data", data, "--output", run, "--device", "cpu"))
    assert [step for step, *_ in curve(run)] == [1, 2, 3]
    scores = json.loads(succeeds(dstrain("validate", run / "bundles/last", "--data", data, "--no-generate")).stdout)
    assert scores["loss"] > 0

    teacher, student = tmp_path / "teacher", tmp_path / "student"
    checkpoint = GOLDEN / "ref/toy_train/checkpoint_last.pt"
    succeeds(dstrain("import", "fairseq", checkpoint, "--dictionary", GOLDEN / "data/bin_sep", "--output", teacher))
    distil = ["--teacher", teacher, *settings("objective={kind: distillation}")]
    succeeds(dstrain("train", recipe, "--data", data, "--output", student, "--device", "cpu", *distil))
    teaching = events(student, "train")
    assert [event["step"] for event in teaching] == [1, 2, 3]
    knows = json.loads(succeeds(dstrain("validate", teacher, "--data", data, "--split", "train", "--no-generate")).stdout)
    uniform = math.log(yaml.safe_load((teacher / "model.yaml").read_text())["vocabulary"]["target"])
    assert 0.5 * (uniform - knows["nll"]) < teaching[0]["kd"] < 2 * uniform, "the teacher is sure, the student knows nothing"
    other = dstrain("train", recipe, "--data", data, "--output", tmp_path / "other", "--set", "data.filter.max_ratio=3")
    fails(other, "was prepared from another data section than this recipe's", "data.filter.max_ratio: null -> 3.0")


def test_an_imported_model_trains_on_by_its_own_recipe(tmp_path: Path) -> None:
    bundle, data, run = tmp_path / "bundle", tmp_path / "data", tmp_path / "run"
    checkpoint = GOLDEN / "ref/toy_train/checkpoint_last.pt"
    succeeds(dstrain("import", "fairseq", checkpoint, "--dictionary", GOLDEN / "data/bin_sep", "--output", bundle))
    succeeds(dstrain("prepare", bundle / "recipe.yaml", "--output", data))
    short = settings("training.max_steps=2", "reporting.log_every=1", "schedule.warmup_steps=1")
    started = ("--data", data, "--base", bundle, "--output", run, "--device", "cpu", *short)
    succeeds(dstrain("train", bundle / "recipe.yaml", *started))
    teaching = events(run, "train")
    assert [event["step"] for event in teaching] == [1, 2]
    uniform = math.log(yaml.safe_load((bundle / "model.yaml").read_text())["vocabulary"]["target"])
    assert teaching[0]["nll"] < 0.5 * uniform, "it starts from the imported weights"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fairseq-data", "nowhere", "--output", "d"), "nowhere is no directory"),
        (("fairseq-data", str(GOLDEN / "data/bin_sep"), "-t", "fr", "--output", "d"), "names no single language pair"),
        (
            ("fairseq-data", str(GOLDEN / "data/bin_sep"), "--sentencepiece", "a", "b", "c", "--output", "d"),
            "takes one model or two",
        ),
        (("fairseq-args", "fairseq-train d --arch lstm --max-tokens 1"), "--arch lstm is not known"),
    ],
)
def test_mistakes_are_one_message(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    fails(dstrain("import", *arguments, cwd=tmp_path), message)
