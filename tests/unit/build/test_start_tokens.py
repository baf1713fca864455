"""A start token for each direction: the same sentences in two directions, told apart by the first input of the decoder only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sacrebleu
import torch

from dstrain.api import (
    BundleModel,
    DumpOptions,
    GenerateOptions,
    GrowOptions,
    LabelOptions,
    ValidateOptions,
    dump_logits,
    generate_file,
    grow,
    load,
    load_recipe,
    prepare,
    pseudo_label,
    validate,
)
from dstrain.checkpoint.bundle import save_bundle
from dstrain.data.batching.collate import Collator
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.distillation.build import build_distillation
from dstrain.distillation.config import DistillationConfig, WordSelection
from dstrain.distillation.store.store import open_store
from dstrain.errors import DataError
from dstrain.models.config import (
    DecoderOnlyConfig,
    DecoderOnlyStackConfig,
    DecoderStackConfig,
    EncoderDecoderConfig,
    StackConfig,
    VocabularySizes,
)
from dstrain.models.factory import build_model
from dstrain.models.weights import to_canonical
from dstrain.recipe import Recipe
from dstrain.recipe_file import dump_recipe
from dstrain.training.events import read_events
from tests.batches import EOS, PAD
from tests.e2e.support import dstrain, succeeds
from tests.unit.data.corpus import parallel, sentences, write_lines
from tests.unit.generation.small_bundle import WORDS, dictionary

DIRECTIONS = {"en-xx": {"start_token": "__xx__"}, "en-yy": {"start_token": "__yy__"}}


def recipe_of(folder: Path, *settings: str) -> Recipe:
    """The same sources twice, with targets in two languages that share no word; no tags."""
    data: dict[str, list[Any]] = {"train": [], "valid": []}
    for split, number in (("train", 60), ("valid", 6)):
        for suffix in ("xx", "yy"):
            entry = parallel(folder, f"{split}_{suffix}", sentences(number), sentences(number, suffix=suffix))
            data[split].append(f"{{name: en-{suffix}, kind: parallel, source: {entry['source']}, target: {entry['target']}}}")
    toy = [
        *(f"data.{split}=[{', '.join(entries)}]" for split, entries in data.items()),
        "data.test={}",
        "data.directions={en-xx: {start_token: __xx__}, en-yy: {start_token: __yy__}}",
        "data.tokenizer.vocab_size=90",
        "batching={tokens_per_step: 400, max_tokens: 800}",
        "model={kind: encoder_decoder, model_dim: 32, dropout: 0.0, encoder: {depth: 1, num_heads: 2, ffn_dim: 16},"
        " decoder: {depth: 1, num_heads: 2, ffn_dim: 16}}",
        "optimizer.learning_rate=0.02",
        "schedule.warmup_steps=5",
        "training={seed: 1, max_steps: 60}",
        "validation={unit: steps, every: 60, generation: {kind: beam, beam_size: 2, max_length_offset: 6}}",
        "checkpoint={unit: steps, every: 60}",
        "generation={kind: beam, beam_size: 2, max_length_offset: 6}",
        "reporting.log_every=20",
    ]
    return load_recipe("translation/quickstart", [*toy, *settings])


class Trained(NamedTuple):
    folder: Path
    data: Path
    bundle: Path
    model: BundleModel


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("start")
    recipe = recipe_of(folder)
    prepare(recipe.data, folder / "data", workers=1, progress=False)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    succeeds(dstrain("train", folder / "recipe.yaml", "--data", folder / "data", "--output", folder / "run", "--device", "cpu"))
    bundle = folder / "run/bundles/last"
    yield Trained(folder, folder / "data", bundle, load(bundle))


def test_examples_name_their_start_and_ids_hold_none(trained: Trained) -> None:
    data, tokenizer = open_dataset(trained.data, "train"), trained.model.tokenizer.target
    assert tokenizer.tokens([data[0].start, data[119].start]) == ["\u2581__xx__", "\u2581__yy__"]
    assert all(example.start == data[0].start for example in data.read(1, np.arange(60)))
    np.testing.assert_array_equal(data[0].source, data[60].source)
    assert not any(data[0].start in example.target for example in data.read(1, np.arange(120)))


def test_a_few_steps_teach_the_direction(trained: Trained) -> None:
    """Targets share no word: under the other start token each is at least exp(0.5) times less likely by token."""
    lines = sentences(6)
    for own, other in (("xx", "yy"), ("yy", "xx")):
        targets = sentences(6, suffix=own)
        right, wrong = (trained.model.score(lines, targets, direction=f"en-{name}") for name in (own, other))
        assert all(one.score > two.score + 0.5 for one, two in zip(right, wrong, strict=True))
        texts = [hypotheses[0].text for hypotheses in trained.model.generate(lines, direction=f"en-{own}", beam_size=2)]
        assert all(own in text and other not in text for text in texts), texts


def test_validation_and_labels_are_those_of_each_direction(trained: Trained, tmp_path: Path) -> None:
    """Data paths know the start of a row, text paths that of --direction."""
    scores = validate(ValidateOptions(bundle=trained.bundle, data=trained.data, device="cpu"))
    assert scores is not None
    lines = write_lines(tmp_path / "in.txt", sentences(6))
    for suffix in ("xx", "yy"):
        output = tmp_path / f"{suffix}.txt"
        generate_file(GenerateOptions(bundle=trained.bundle, direction=f"en-{suffix}", input=str(lines), output=str(output)))
        bleu = sacrebleu.corpus_bleu(output.read_text().splitlines(), [sentences(6, suffix=suffix)])
        assert scores[f"bleu/en-{suffix}"] == pytest.approx(bleu.score)
    valid = [event for event in read_events(trained.folder / "run/events.jsonl") if event["kind"] == "valid"]
    assert valid[-1]["nll/en-yy"] == pytest.approx(scores["nll/en-yy"], rel=1e-5)

    options = LabelOptions(teacher=trained.bundle, data=trained.data, output=tmp_path / "labeled", max_repeats=50, beam_size=1)
    assert pseudo_label(options, report=lambda line: None) is not None
    labeled = open_dataset(tmp_path / "labeled", "train")
    starts = [example.start for example in labeled.read(1, np.arange(len(labeled)))]
    for suffix, own in (("xx", starts[0]), ("yy", starts[-1])):
        found = trained.model.generate(sentences(60), direction=f"en-{suffix}", beam_size=1)
        answers = [best[0].tokens for best in found]
        kept = [labeled[row].target.tolist() for row, start in enumerate(starts) if start == own]
        assert len(kept) > 30
        assert all(target in answers for target in kept)


def test_stored_logits_are_those_after_the_start_token(trained: Trained, tmp_path: Path) -> None:
    """The divergence of the teacher from what it said is 0, and is not if rows are read as of the other direction."""
    method = {"k": 90, "dtype": "float32"}
    options = DumpOptions(
        teacher=trained.bundle, data=trained.data, output=tmp_path / "logits", method="topk", method_options=method
    )
    assert dump_logits(options, report=lambda line: None) is not None
    store = open_store(tmp_path / "logits", data=trained.data, manifest=load_manifest(trained.data))
    distillation = build_distillation(DistillationConfig(selection=WordSelection()), store)
    data, rows = open_dataset(trained.data, "train"), np.array([3, 59, 60, 100])
    collator = Collator("encoder_decoder", pad_id=PAD, eos_id=EOS)
    examples = data.read(1, rows)
    own = distillation(trained.model.bundle.model, collator(examples, rows))
    assert float(own.loss_sum.detach()) == pytest.approx(0, abs=1e-3)
    swapped = [example._replace(start=examples[-1 - number].start) for number, example in enumerate(examples)]
    assert float(distillation(trained.model.bundle.model, collator(swapped, rows)).loss_sum.detach()) > 1


def test_a_direction_is_added_to_a_trained_bundle(trained: Trained, tmp_path: Path) -> None:
    """Grow, prepare with the grown tokenizer, train on: the new direction, into a known language, starts from what is known."""
    grown = tmp_path / "grown"
    grow(GrowOptions(bundle=trained.bundle, output=grown, tags=("__zz__",)))
    lines, larger = sentences(6), load(grown)
    for direction in ("en-xx", "en-yy"):
        answers = [[best[0].text for best in model.generate(lines, direction=direction)] for model in (trained.model, larger)]
        assert answers[0] == answers[1]

    entries = [
        f"data.{split}=[{{name: en-zz, kind: parallel, source: {entry['source']}, target: {entry['target']}}}]"
        for split, number in (("train", 60), ("valid", 6))
        for entry in (parallel(tmp_path, split, sentences(number), sentences(number, suffix="yy")),)
    ]
    recipe = recipe_of(
        trained.folder,
        *entries,
        "data.directions={en-zz: {start_token: __zz__}}",
        f"data.tokenizer={{kind: tokenizer_directory, path: {grown / 'tokenizer'}}}",
        "training.max_steps=10",
        "validation={unit: steps, every: 10}",
        "checkpoint={unit: steps, every: 10}",
        "reporting.log_every=1",
    )
    prepare(recipe.data, tmp_path / "data", workers=1, progress=False)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    place = ("--data", tmp_path / "data", "--output", tmp_path / "run", "--base", grown, "--device", "cpu")
    succeeds(dstrain("train", tmp_path / "recipe.yaml", *place))
    losses = [event["nll"] for event in read_events(tmp_path / "run/events.jsonl") if event["kind"] == "train"]
    assert losses[0] < 2, "a fresh model begins at log(91) = 4.5"
    answers = [best[0].text for best in load(tmp_path / "run/bundles/last").generate(lines, direction="en-zz")]
    assert all("yy" in answer and "xx" not in answer for answer in answers), answers


def bundle_of(directory: Path, kind: str) -> BundleModel:
    """Random weights, in which the start token matters."""
    words = dictionary([*WORDS, "__xx__", "__yy__"])
    stack = {"depth": 2, "num_heads": 2, "ffn_dim": 32}
    config: EncoderDecoderConfig | DecoderOnlyConfig
    if kind == "encoder_decoder":
        config = EncoderDecoderConfig(model_dim=16, encoder=StackConfig(**stack), decoder=DecoderStackConfig(**stack))
    else:
        config = DecoderOnlyConfig(model_dim=16, decoder=DecoderOnlyStackConfig(**stack))
    vocabulary = VocabularySizes.of(words, words)
    save_bundle(
        directory,
        model_config=config,
        vocabulary=vocabulary,
        weights=to_canonical(build_model(config, vocabulary, seed=3)),
        tokenizers=TokenizerPair(words, words),
        recipe={"data": {"train": [{"kind": "parallel", "name": "en-zz"}], "directions": DIRECTIONS}},
    )
    return load(directory)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_what_is_generated_has_the_scores_of_a_forward_pass(kind: str, tmp_path: Path) -> None:
    model = bundle_of(tmp_path / "bundle", kind)
    tokenizer, lines = model.tokenizer.target, ["eins zwei drei", "vier", "zehn neun acht"]
    starts = {"en-xx": tokenizer.encode(["__xx__"])[0][0], "en-yy": tokenizer.encode(["__yy__"])[0][0], "en-zz": tokenizer.eos_id}
    sources = [[*row, tokenizer.eos_id] for row in tokenizer.encode(lines)]
    found: dict[str, Any] = {}
    for direction, start in starts.items():
        for method in ({"beam_size": 3}, {"kind": "sampling", "seed": 4}):
            hypotheses = [best[0] for best in model.generate(lines, direction=direction, max_length_offset=3, **method)]
            logits = model.logits(sources, [[start, *hypothesis.tokens[:-1]] for hypothesis in hypotheses])
            for hypothesis, values in zip(hypotheses, logits, strict=True):
                expected = torch.from_numpy(values).log_softmax(1).gather(1, torch.tensor(hypothesis.tokens)[:, None])[:, 0]
                np.testing.assert_allclose(hypothesis.token_scores, expected.tolist(), rtol=1e-4, atol=1e-5)
        forced = model.score(lines, [hypothesis.text for hypothesis in hypotheses], direction=direction)
        found[direction] = [hypothesis.token_scores for hypothesis in forced]
    assert len({str(scores) for scores in found.values()}) == 3


def test_a_start_token_that_the_vocabulary_lacks_is_an_error(trained: Trained, tmp_path: Path) -> None:
    kept = f"data.tokenizer={{kind: tokenizer_directory, path: {trained.data / 'tokenizer'}}}"
    lacking = recipe_of(trained.folder, kept, "data.directions.en-xx.start_token=__zz__")
    with pytest.raises(
        DataError, match=r"data.directions.en-xx.start_token: '__zz__' is no entry of the vocabulary, which reads"
    ):
        prepare(lacking.data, tmp_path / "data", workers=1, progress=False)
    known = recipe_of(trained.folder, kept)
    prepare(known.data, tmp_path / "known", workers=1, progress=False)
