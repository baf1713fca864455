"""The multilingual recipe at toy size: tags, shares, losses and scores of each direction, and generation toward one."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import pytest

from dstrain.api import (
    BundleModel,
    GenerateOptions,
    TrainOptions,
    ValidateOptions,
    generate_file,
    load,
    load_recipe,
    prepare,
    train,
    validate,
)
from dstrain.build.training_data import TrainingData
from dstrain.data.prepared.dataset import named_corpora, open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.errors import ArgumentError, RecipeError
from dstrain.training.events import read_events
from tests.unit.data.corpus import sentences, write_lines

RECIPE = "translation/multi30k_multilingual"
LANGUAGES = ("en", "de", "fr", "cs")
DIRECTIONS = [f"{one}-{other}" for one in LANGUAGES for other in LANGUAGES if one != other]
TOY = [
    "data.tokenizer.vocab_size=120",
    "batching={tokens_per_step: 200, max_tokens: 400, sampling: {kind: temperature, temperature: 5, examples_per_epoch: 240}}",
    "model.model_dim=16",
    "model.encoder={depth: 1, num_heads: 2, ffn_dim: 16}",
    "model.decoder={depth: 1, num_heads: 2, ffn_dim: 16}",
    "schedule.warmup_steps=5",
    "training={seed: 1, max_steps: 20}",
    "validation.unit=steps",
    "validation.every=10",
    "validation.corpus=en-de",
    "validation.patience=null",
    "validation.generation={kind: beam, beam_size: 1, max_length_ratio: 0, max_length_offset: 4}",
    "checkpoint.unit=steps",
    "checkpoint.every=20",
    "reporting.log_every=10",
]


class Trained(NamedTuple):
    data: Path
    run: Path
    model: BundleModel


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("multilingual")
    (folder / "multi30k").mkdir()
    for split, number in (("train", 40), ("val", 5), ("test_2016_flickr", 3)):
        for language in LANGUAGES:
            write_lines(folder / "multi30k" / f"{split}.{language}", sentences(number, suffix=language))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTRAIN_DATA", str(folder))
        recipe = load_recipe(RECIPE, TOY)
        prepare(recipe.data, folder / "data", workers=1, progress=False)
        assert train(recipe, TrainOptions(data=folder / "data", output=folder / "run", device="cpu")) == 0
        yield Trained(folder / "data", folder / "run", load(folder / "run/bundles/best"))


def test_losses_and_scores_of_every_direction_are_in_the_events(trained: Trained) -> None:
    events = read_events(trained.run / "events.jsonl")
    by_direction = [event for event in events if event["kind"] == "train"]
    assert by_direction
    assert all(f"nll/{name}" in event for event in by_direction for name in DIRECTIONS)
    valid = [event for event in events if event["kind"] == "valid"]
    assert [event["step"] for event in valid] == [10, 20]
    dataset = open_dataset(trained.data, "valid")
    corpora = named_corpora(load_manifest(trained.data), "valid", dataset)
    assert corpora is not None
    tokens = {
        name: sum(int(dataset.target_lengths[part.start : part.stop].sum()) for part in corpora.rows(name)) for name in DIRECTIONS
    }
    for event in valid:
        expected = sum(event[f"nll/{name}"] * count for name, count in tokens.items()) / sum(tokens.values())
        assert event["nll"] == pytest.approx(expected, rel=1e-6)
        for metric in ("bleu", "chrf"):
            assert event[metric] == pytest.approx(fmean(event[f"{metric}/{name}"] for name in DIRECTIONS))
        assert event["signatures"]["bleu"].startswith("mean of 12 corpora: nrefs:1|")
    best = max(event["bleu/en-de"] for event in valid)
    assert valid[-1]["best_score"] == best


def test_a_test_set_is_scored_by_direction(trained: Trained) -> None:
    options = ValidateOptions(bundle=trained.run / "bundles/best", data=trained.data, split="test_2016_flickr", device="cpu")
    scores = validate(options)
    assert scores is not None
    assert scores["bleu"] == pytest.approx(fmean(scores[f"bleu/{name}"] for name in DIRECTIONS))
    assert {f"nll/{name}" for name in DIRECTIONS} < scores.keys()


def test_a_direction_puts_its_tags_before_the_text(trained: Trained, tmp_path: Path) -> None:
    model, (line,) = trained.model, sentences(1, suffix="en")
    source = model.tokenizer.source
    assert model.direction_ids("en-de") == (tuple(source.encode(["__en__ __de__"])[0]), None)
    assert open_dataset(trained.data, "valid")[0].source.tolist() == [*source.encode([f"__en__ __de__ {line}"])[0], source.eos_id]
    scored = [model.score([line], ["the dog"], direction=name)[0].score for name in ("en-de", "en-fr")]
    assert scored[0] != scored[1]
    write_lines(tmp_path / "in.txt", [line, ""])
    files = {"input": str(tmp_path / "in.txt"), "output": str(tmp_path / "out.txt")}
    generate_file(GenerateOptions(bundle=trained.run / "bundles/best", direction="en-de", **files))
    answers = [hypotheses[0].text for hypotheses in model.generate([line, ""], direction="en-de")]
    assert (tmp_path / "out.txt").read_text().splitlines() == answers
    assert answers[1] == ""


@pytest.mark.parametrize(
    ("direction", "problem"),
    [
        (None, r"no direction is given \(--direction\), and .* translates in several"),
        ("en-xx", r"direction = en-xx \(--direction\) names no direction of .*"),
    ],
)
def test_a_direction_that_is_missing_or_unknown_is_an_error(trained: Trained, direction: str | None, problem: str) -> None:
    with pytest.raises(ArgumentError, match=f"{problem}; choose one of en-de, en-fr"):
        trained.model.generate(["a dog"], direction=direction)


def test_examples_are_drawn_by_shares(trained: Trained) -> None:
    """240 examples an epoch of 12 equal directions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTRAIN_DATA", "/nowhere")
        recipe = load_recipe(RECIPE, TOY)
    data = TrainingData(trained.data, recipe)
    plan = data.plan_steps(recipe)
    corpora = data.corpora("train")
    assert corpora is not None
    drawn = np.concatenate([step.examples for step in plan.epoch(1)])
    assert np.bincount(corpora.of(drawn)).tolist() == [20] * 12


@pytest.mark.parametrize(
    ("setting", "message", "mended"),
    [
        (
            "validation.corpus=en-xx",
            "validation.corpus: en-xx is no corpus of data.valid (en-de, en-fr",
            "validation.corpus=en-fr",
        ),
        (
            "batching.sampling={kind: weights, weights: {en-xx: 1}}",
            "batching.sampling.weights: en-xx is no corpus of data.train (en-de",
            f"batching.sampling={{kind: weights, weights: {{{', '.join(f'{name}: 1' for name in DIRECTIONS)}}}}}",
        ),
        (
            "batching.sampling={kind: weights, weights: {en-de: 1}}",
            "batching.sampling.weights lacks the corpus en-fr of data.train; give it a weight, 0 to leave it out",
            f"batching.sampling={{kind: weights, weights: {{{', '.join(f'{name}: 0' for name in DIRECTIONS[1:])}, en-de: 1}}}}",
        ),
        (
            "batching.sampling={kind: weights, weights: {en-de: 0}}",
            "weights add up to 0, so no example would be drawn",
            "batching.sampling=null",
        ),
    ],
)
def test_mistakes_in_names_and_weights(setting: str, message: str, mended: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(RECIPE, [setting])
    assert message in str(error.value)
    load_recipe(RECIPE, [mended])


def test_sampling_needs_names() -> None:
    sampling = "batching.sampling={kind: temperature}"
    with pytest.raises(RecipeError, match=r"batching.sampling draws from the corpora of data.train by name, and they have fewer"):
        load_recipe("translation/quickstart", [sampling])
    corpora = ", ".join(f"{{kind: grammar, split: train, num_pairs: 9, name: {name}}}" for name in "ab")
    load_recipe("translation/quickstart", [sampling, f"data.train=[{corpora}]"])


def test_own_directions_are_extends_and_data(tmp_path: Path) -> None:
    """Directions are replaced as a whole; of those that stay each must have a corpus."""
    entries = [f"{{kind: parallel, name: {name}, source: my.en, target: my.xx}}" for name in ("en-hi", "en-ta")]
    data = f"data:\n  train: [{', '.join(entries)}]\n  valid: [{', '.join(entries)}]\n  test: {{}}\n"
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {RECIPE}\n{data}")
    with pytest.raises(RecipeError, match=r"directions.en-de is no name of a corpus \(en-hi, en-ta\); correct it"):
        load_recipe(path)
    path.write_text(f"extends: {RECIPE}\n{data}  directions: {{en-hi: {{source_tags: [hin_Deva]}}}}\n")
    assert list(load_recipe(path).data.directions) == ["en-hi"]
