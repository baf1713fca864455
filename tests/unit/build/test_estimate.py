"""`dstrain estimate`, what it refuses, and the line that a training prints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dstrain.build import estimate as module
from dstrain.build.estimate import EstimateOptions, SentenceLengths, estimate, log_memory, longest_row, workload_of
from dstrain.build.training_options import TeacherOptions
from dstrain.cli.main import main
from dstrain.data.batching.plan import StepPlan
from dstrain.data.lengths import StoredLengths
from dstrain.engine.ds_config import find_ds_config
from dstrain.log import setup_logging
from dstrain.models.config import VocabularySizes
from dstrain.parallel.mesh import build_mesh
from dstrain.recipe_file import load_recipe

TINY = "translation/multi30k_tiny"
KD = "translation/multi30k_tiny_kd"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["estimate", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_has_both_layouts_and_says_its_rates(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, TINY, "--nodes", "2", "--gpus-per-node", "4", "--gemm-tflops", "250", "--set", "engine.precision=bf16"
    )
    assert code == 0
    lines = out.splitlines()
    assert "rates, stated and not measured: 250 TFLOP/s in products, 2,700 GB/s of memory" in out
    assert any(line.split()[-2:] == ["recipe", "recommended"] for line in lines)
    rows = {" ".join(line.split()[:-2]): line.split()[-2:] for line in lines if line.startswith("  ")}
    for part in ("parameters", "gradients", "optimizer", "moving average", "activations", "loss", "backward", "total"):
        assert part in rows, part
    assert lines[-1].startswith("recommended: --set engine.parallel.tensor=1 --set engine.parallel.sequence=1 --set ")
    assert rows["fits, in 72.0 of 80.0"] == ["yes", "yes"]


def test_plain_values_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, TINY, "--gpus-per-node", "2", "--json")
    tree = json.loads(out)
    assert code == 0
    assert tree["problem"] is None
    memory = tree["recipe"]["memory"]
    states = sum(memory[name] for name in ("parameters", "gradients", "optimizer", "moving average", "buffers", "teacher"))
    assert memory["total"] == pytest.approx(states + memory["activations"] + max(memory["loss"], memory["backward"]))
    parameters = tree["recipe"]["parameters"]
    assert memory["gradients"] == 4 * parameters
    assert {each["purpose"]: each["sent"] for each in tree["recipe"]["traffic"]}["gradients"] == 4 * parameters


def test_what_fits_nowhere_is_shown_and_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, TINY, "--gpu-memory", "0.01")
    assert code == 1
    assert out.splitlines()[-1].startswith("recommended: none; no layout on 8 GPUs fits: the smallest needs ")


FILES = ["--set", "data.tokenizer={kind: sentencepiece_files, source_model: no.model}"]
SHORT = ["--set", "data.filter.max_source_length=20", "--set", "data.filter.max_target_length=64"]
SLICED = ["--gpus-per-node", "3", "--set", "engine.parallel.tensor=2"]


@pytest.mark.parametrize(
    ("words", "message", "mended"),
    [
        (
            SLICED,
            "tensor = 2 times sequence = 1 does not divide the 3 GPUs of --nodes 1 --gpus-per-node 3; choose other numbers",
            [*SLICED, "--nodes", "2"],
        ),
        (
            FILES,
            "data.tokenizer.kind = sentencepiece_files does not say how many entries the vocabulary has; give --data DATA, which "
            "`dstrain prepare` wrote, or --vocab-size N",
            [*FILES, "--vocab-size", "900"],
        ),
        (
            ["--data", "no", "--vocab-size", "9"],
            "--vocab-size says what --data knows: leave one of them out",
            ["--vocab-size", "9"],
        ),
        (["--teacher", "no"], "objective.kind = cross_entropy has no use for a teacher: leave --teacher out", []),
        (
            ["--teacher-placement", "sharded"],
            "--teacher-placement says how a teacher works: add --teacher BUNDLE, or leave it out",
            [],
        ),
        (
            [*SHORT, "--length", "65"],
            "--length 65 is longer than the text that data.filter keeps, 64 tokens at most; lower it, or raise",
            [*SHORT, "--length", "64"],
        ),
        (["--set", "engine.deepspeed=zero9"], "engine.deepspeed: no DeepSpeed configuration 'zero9'", []),
        (["--set", "model.model_dim=7"], "num_heads", []),
        (["--data", "nowhere"], "nowhere/manifest.json is missing", []),
    ],
)
def test_mistakes_are_said_and_mended(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str, mended: list[str]
) -> None:
    code, _, err = run(capsys, TINY, *words)
    assert code == 1
    assert message in err
    assert run(capsys, TINY, *mended)[0] == 0


def test_tensor_groups_over_nodes_are_warned_about_and_wait_for_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    heads = ["encoder.num_heads=4", "decoder.num_heads=4", "model_dim=128", "encoder.ffn_dim=256", "decoder.ffn_dim=256"]
    four = [word for change in heads for word in ("--set", f"model.{change}")] + ["--set", "engine.parallel.tensor=4"]
    seconds = []
    for nodes, gpus in ((3, 4), (2, 6)):
        code, out, err = run(capsys, TINY, *four, "--nodes", str(nodes), "--gpus-per-node", str(gpus), "--json")
        assert code == 0
        seconds.append(json.loads(out)["recipe"]["seconds"]["communication"])
        assert ("engine.parallel.tensor = 4: groups of as many ranks reach over nodes of 6" in err) == (gpus == 6)
    assert seconds[1] > seconds[0], "the replicas are as fast as before, the tensor groups are slower"


def test_no_gpus_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["estimate", TINY, "--gpus-per-node", "0"])
    assert "argument --gpus-per-node: '0' is not a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize(("length", "sides"), [(None, "20 + 32"), (50, "20 + 50")])
def test_a_side_is_not_longer_than_the_filter_keeps(capsys: pytest.CaptureFixture[str], length: int | None, sides: str) -> None:
    words = [] if length is None else ["--length", str(length)]
    assert f"sentences of {sides} tokens" in run(capsys, TINY, *SHORT, *words)[1]


def test_what_a_recipe_trains() -> None:
    vocabulary, lengths = VocabularySizes(source=50, target=50), SentenceLengths(10, 11)
    decayed = load_recipe(TINY, ["optimizer.weight_decay=0.1", "objective.r_drop={alpha: 1}"])
    workload = workload_of(decayed, vocabulary, lengths, [])
    assert (workload.loss, workload.ema, workload.decay_groups, workload.passes) == ("r_drop", True, True, 2)
    assert workload_of(load_recipe(KD), vocabulary, lengths, []).loss == "sparse_distillation"
    text = load_recipe("language_modeling/wikitext_tiny")
    assert longest_row(text) == min(text.data.filter.max_target_length, text.model.limits.target)
    short = load_recipe(TINY, ["data.filter.max_source_length=70", "data.filter.max_target_length=90"])
    assert longest_row(short) == 90


def test_an_adapter_trains_little_and_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(find_ds_config("zero2").read_text())
    adapter = "adapter={rank: 4, alpha: 8, targets: ['*_proj']}"
    plain, adapted = (
        estimate(load_recipe(TINY, [f"engine.deepspeed={file}", *changes]), EstimateOptions(gpus_per_node=2)).recipe
        for changes in ([], [adapter])
    )
    assert plain.layout.sharding.stage == 2
    assert adapted.parameters.trained < 0.1 * plain.parameters.trained
    assert adapted.parameters.total - adapted.parameters.trained == plain.parameters.total
    assert adapted.memory.states.optimizer < 0.1 * plain.memory.states.optimizer


def said(capsys: pytest.CaptureFixture[str], *changes: str) -> str:
    """By a training on this process."""
    lengths = np.array([12, 14])
    recipe, data = load_recipe(TINY, changes), SimpleNamespace(vocabulary=VocabularySizes(source=8000, target=8000))
    steps = StepPlan(StoredLengths(lengths, lengths + 1), recipe.batching, seed=1)
    plan: Any = SimpleNamespace(recipe=recipe, data=data, objective=SimpleNamespace(models=()), steps=steps)
    mesh, start = build_mesh("cpu"), time.process_time()
    log_memory(plan, TeacherOptions(), mesh)
    assert time.process_time() - start < 0.3
    return capsys.readouterr().err


def test_a_training_says_its_memory_and_warns_unless_a_remedy_is_followed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_logging()
    plain = said(capsys)
    assert "  memory    about 0." in plain
    assert "WARNING" not in plain
    gib = float(plain.partition("about ")[2].split()[0])
    monkeypatch.setattr(module, "device_memory", lambda device: int(gib * 2**30))
    warned = said(capsys)
    assert (
        f"a rank needs about {gib:.3f} GiB, and its share of the machine has {gib:.3f}: lower batching.max_tokens = 4096"
        in warned
    )
    for remedy in ("batching.max_tokens=1024", "engine.activation_checkpointing=full"):
        assert "WARNING" not in said(capsys, remedy)


def test_the_memory_of_a_machine_is_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.device_memory(torch.device("cpu"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert module.device_memory(torch.device("cpu")) == whole // 4
