"""Distillation through the command line: a teacher, a student beside it on two processes, resumed, validated; bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.bundle import load_bundle, save_bundle
from dstrain.models.weights import to_canonical
from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, Ranks, dstrain, events, fails, settings, succeeds

TEACHER = ("model.model_dim=48", "model.encoder={depth: 2, num_heads: 4, ffn_dim: 64}", "training.max_steps=40")
FEATURES = "[{kind: hidden_states, side: encoder}, {kind: attention, side: cross, weight: 0.5}]"
OBJECTIVE = (
    "objective={kind: distillation, temperature: 2.0, selection: {kind: global, rate: 0.5, queue_size: 900}, "
    f"features: {FEATURES}}}"
)
INSIDE = ("feature_encoder_hidden_states_mse", "feature_cross_attention_kl")

ON_POLICY = "objective.on_policy={fraction: 0.5, max_length_ratio: 2.0}"


def training(data: Path, output: Path, *words: str | Path, overrides: tuple[str, ...] = ()) -> list[str | Path]:
    recipe = settings(*SMALL_DATA, *SMALL_TRAINING, "model.dropout=0", *overrides)
    return ["train", RECIPE, "--data", data, "--output", output, *words, *recipe]


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider and deeper model, trained a little longer."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    succeeds(dstrain(*training(data, run, overrides=TEACHER)))
    return run / "bundles" / "last"


@pytest.fixture(scope="module")
def student(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student trained by one process."""
    run = tmp_path_factory.mktemp("student") / "run"
    succeeds(dstrain(*training(data, run, "--teacher", teacher, overrides=(OBJECTIVE,))))
    return run


def test_the_events_name_every_loss(student: Path) -> None:
    train = events(student, "train")
    assert len(train) == 14
    for event in train:
        assert event["loss"] > event["hard"] > 0 < event["kd"]
        assert 0 <= event["agreement"] <= 1
        assert 0.3 < event["selected"] < 0.9
    assert all(train[-1][name] < train[0][name] for name in ("kd", *INSIDE))
    valid = events(student, "valid")[-1]
    assert "kd" not in valid
    assert valid["perplexity"] > 1


def test_the_bundle_is_a_plain_student(student: Path, teacher: Path, data: Path) -> None:
    last = student / "bundles" / "last"
    size = [(bundle / "model.safetensors").stat().st_size for bundle in (last, teacher)]
    assert size[0] < size[1]
    checked = succeeds(dstrain("validate", last, "--data", data, "--no-generate"))
    assert json.loads(checked.stdout)["loss"] == pytest.approx(events(student, "valid")[-1]["loss"], rel=1e-5)


def test_two_processes_with_a_sharded_teacher_killed_and_resumed_give_the_same_curve(
    student: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = training(data, run, "--teacher", teacher, overrides=(OBJECTIVE,))
    ranks = Ranks(words, 2, tmp_path / "log")
    ranks.wait_until(lambda: len(events(run, "checkpoint")) > 1)
    ranks.kill()
    again = Ranks(words, 2, tmp_path / "again")
    assert again.wait() == [0, 0], again.output()
    names = ("step", "loss", "hard", "kd", *INSIDE, "agreement", "selected", "grad_norm")
    found, expected = ([[event[name] for name in names] for event in events(path, "train")] for path in (run, student))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert events(run, "resume")


def test_some_steps_are_on_the_students_own_samples(teacher: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeeds(dstrain(*training(data, run, "--teacher", teacher, overrides=(OBJECTIVE, ON_POLICY))))
    train = events(run, "train")
    own, given = ([event for event in train if event["on_policy"] == share] for share in (1, 0))
    assert len(own) > 3 < len(given)
    assert len(own) + len(given) == len(train) == 14
    for event in own:
        inside = event[INSIDE[0]] + 0.5 * event[INSIDE[1]]
        assert event["loss"] == pytest.approx(event["on_policy_kd"] + inside, rel=1e-5)
        assert 0 <= event["on_policy_agreement"] <= 1
        assert event["nll"] is event["perplexity"] is None
        assert "hard" not in event
        assert event["tokens_per_second"] == pytest.approx(event["num_targets"] / event["seconds"])
    assert max(event["num_targets"] for event in own) > 700, "samples of a student that knows little are longer than the data"
    assert own[-1]["on_policy_kd"] < 0.8 * own[0]["on_policy_kd"]
    for event in given:
        assert event["loss"] > event["hard"] > 0 < event["kd"]
        assert event["perplexity"] > 1
        assert event["num_targets"] <= 700


PLAIN = "objective={kind: distillation, temperature: 2.0, divergence: {kind: reverse_kl}}"


def first_steps(data: Path, run: Path, *words: str | Path) -> list[tuple[float, float, float]]:
    """The hard and the distillation loss and the agreement of two steps."""
    succeeds(dstrain(*training(data, run, *words, overrides=(PLAIN, "training={seed: 1, max_steps: 2}"))))
    return [(event["hard"], event["kd"], event["agreement"]) for event in events(run, "train")]


def test_every_way_to_run_a_teacher_teaches_the_same(teacher: Path, data: Path, tmp_path: Path) -> None:
    """One, the same twice, in CPU memory, and with other ids: the words in another order and some that the student has not."""
    expected = first_steps(data, tmp_path / "one", "--teacher", teacher)
    assert len(expected) == 2
    twice = first_steps(data, tmp_path / "twice", "--teacher", teacher, "--teacher", teacher)
    assert twice == [pytest.approx(step, rel=1e-5) for step in expected]
    offloaded = first_steps(data, tmp_path / "offloaded", "--teacher", teacher, "--teacher-placement", "offloaded")
    assert offloaded == [pytest.approx(step, rel=1e-6) for step in expected]
    foreign, ids = with_other_ids(teacher, tmp_path)
    for placement in ("replicated", "offloaded"):
        run = tmp_path / f"mapped_{placement}"
        mapped = first_steps(data, run, "--teacher", foreign, "--vocabulary-map", ids, "--teacher-placement", placement)
        assert mapped == [pytest.approx(step, rel=1e-5) for step in expected]
    fails(dstrain(*training(data, tmp_path / "run", "--teacher", foreign, overrides=(PLAIN,))), "has another vocabulary")


def with_other_ids(teacher: Path, directory: Path) -> tuple[Path, Path]:
    """The teacher with all ids but the special ones in reverse and seven more; the map from the student's ids to these."""
    bundle = load_bundle(teacher)
    special, size = 4, bundle.vocabulary.target
    ids = torch.cat([torch.arange(special), torch.arange(size + 6, special + 6, -1)])
    weights = {}
    for name, tensor in to_canonical(bundle.model).items():
        weights[name] = tensor
        if len(tensor) == size:
            weights[name] = torch.full((size + 7, *tensor.shape[1:]), 0.5)
            weights[name][ids] = tensor
    sizes = bundle.vocabulary.model_copy(update={"source": size + 7, "target": size + 7})
    save_bundle(
        directory / "foreign", model_config=bundle.model_config, vocabulary=sizes, weights=weights, tokenizers=None, recipe=None
    )
    (directory / "ids.yaml").write_text(json.dumps({"source": ids.tolist()}))
    return directory / "foreign", directory / "ids.yaml"


def test_every_mistake_gets_one_message(student: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "run"
    distil = (OBJECTIVE,)
    fails(
        dstrain(*training(data, fresh, overrides=distil)), "objective.kind = distillation needs a teacher: add --teacher BUNDLE"
    )
    fails(dstrain(*training(data, fresh, "--teacher", teacher)), "objective.kind = cross_entropy has no use for a teacher")
    fails(dstrain(*training(data, fresh, "--teacher", tmp_path, overrides=distil)), "is not a bundle: it has no model.yaml")
    fails(dstrain(*training(data, fresh, "--teacher-placement", "sharded")), "--teacher-placement and --vocabulary-map say how")
    fails(
        dstrain(*training(data, fresh, "--teacher", teacher, overrides=(*distil, "objective.temperature=0"))),
        "objective.temperature: input should be greater than 0, not 0",
    )
    fails(
        dstrain(*training(data, fresh, "--teacher", teacher, overrides=(*distil, "objective.on_policy={fraction: 1.5}"))),
        "objective.on_policy.fraction: input should be less than or equal to 1, not 1.5",
    )
    by_language = "objective.selection={kind: global_by_language, tags: [xx]}"
    fails(
        dstrain(*training(data, fresh, "--teacher", teacher, overrides=(*distil, by_language))),
        "the language tag 'xx' is no symbol",
    )
    deep = "objective.features=[{kind: hidden_states, side: encoder, layers: {1: 3}}]"
    fails(
        dstrain(*training(data, fresh, "--teacher", teacher, overrides=(*distil, deep))),
        "objective.features.0.layers names layer 3 of the teacher, whose encoder has 2; choose from 0 to 2",
    )
    fails(
        dstrain(*training(data, fresh, "--teacher", teacher, "--teacher", teacher, overrides=distil)),
        "objective.features needs the activations of one online teacher, but there are 2",
    )
    assert not fresh.exists()
    other = shutil.copytree(student / "bundles" / "last", tmp_path / "other", symlinks=False)
    fails(dstrain(*training(data, student, "--teacher", other, overrides=distil)), "was started with another teacher")
