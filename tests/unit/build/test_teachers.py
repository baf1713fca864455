"""Teachers from bundles: what does not fit is refused by name, and a permuted or larger vocabulary teaches the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.build.base import build_on_base
from dstrain.build.teachers import open_logits, plan_teachers, start_teachers
from dstrain.build.training_options import TeacherOptions
from dstrain.checkpoint.bundle import find_bundle, load_bundle, save_adapter_bundle, save_bundle
from dstrain.data.batching.loader import evaluation_loader
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers
from dstrain.distillation.config import DistillationConfig
from dstrain.distillation.signals import TeacherSignals
from dstrain.distillation.store.manifest import TopKMethod
from dstrain.errors import BundleError, DataError, RecipeError
from dstrain.model_output import ActivationCapture, Tap
from dstrain.models.config import VocabularySizes
from dstrain.models.weights import load_canonical, to_canonical
from dstrain.ops.teacher_signal import DenseSignal
from tests.unit.adapters.adapted import adapter_of, train
from tests.unit.distillation import toy_store
from tests.unit.distillation.toy_store import COLLATOR
from tests.unit.evaluation.test_bundle_validation import MODEL, bundle_for, prepared
from tests.unit.training.fakes import ONE_RANK


class Corpus:
    """Prepared data as the planning of teachers sees it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokenizers: TokenizerPair = load_tokenizers(directory / "tokenizer")
        self.sizes = VocabularySizes(source=self.tokenizers.source.vocab_size, target=self.tokenizers.target.vocab_size)
        self.train: Dataset = open_dataset(directory, "train")

    def plan(self, *bundles: Path, vocabulary_map: Path | None = None) -> list[Any]:
        options = TeacherOptions(bundles, vocabulary_map=vocabulary_map)
        return plan_teachers(options, self.tokenizers, self.sizes, self.train.lengths)

    def signal(
        self,
        *bundles: Path,
        vocabulary_map: Path | None = None,
        precision: str = "fp32",
        capture: ActivationCapture | None = None,
    ) -> DenseSignal:
        """What the teachers show of the first batch of `valid`."""
        planned = self.plan(*bundles, vocabulary_map=vocabulary_map)
        signals = TeacherSignals(start_teachers(planned, placement="sharded", precision=precision, mesh=ONE_RANK))
        batch = next(evaluation_loader(open_dataset(self.directory, "valid"), 200, COLLATOR))
        with signals.open(batch, capture) as signal:
            return signal

    def probabilities(self, *bundles: Path, vocabulary_map: Path | None = None) -> Tensor:
        signal = self.signal(*bundles, vocabulary_map=vocabulary_map)
        return (signal.features[0] @ signal.weights[0].T).softmax(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(prepared(tmp_path_factory.mktemp("data") / "data", 90))


@pytest.fixture(scope="module")
def teacher(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_for(corpus.directory, tmp_path_factory.mktemp("teacher") / "teacher")


def renamed(teacher: Path, directory: Path, positions: Tensor, size: int) -> Path:
    """The same teacher with the vector of each id moved to another place among `size`; the other places hold noise."""
    bundle = load_bundle(teacher)
    weights = dict(to_canonical(bundle.model))
    tables = [name for name, weight in weights.items() if len(weight) == len(positions)]
    assert len(tables) == 3
    for name in tables:
        table = torch.randn(size, weights[name].shape[1])
        table[positions] = weights[name]
        weights[name] = table
    sizes = VocabularySizes(source=size, target=size, pad_id=int(positions[1]), eos_id=int(positions[2]))
    save_bundle(directory, model_config=MODEL, vocabulary=sizes, weights=weights, tokenizers=None, recipe=None)
    return directory


def written(path: Path, **sides: Any) -> Path:
    path.write_text(json.dumps(sides))
    return path


def test_a_teacher_of_the_same_vocabulary_shows_what_its_bundle_computes(corpus: Corpus, teacher: Path) -> None:
    (planned,) = corpus.plan(teacher)
    assert planned.model.limits == MODEL.limits
    assert planned.vocabulary is None
    assert planned.model == MODEL
    signal = corpus.signal(teacher)
    model = load_bundle(teacher).model
    assert torch.equal(signal.weights[0], model.projection.weight)
    assert corpus.signal(teacher, precision="bf16").features[0].dtype == torch.bfloat16


def test_an_adapter_bundle_teaches_what_it_adapts(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    adapter, base = LoraConfig(rank=2, alpha=4, targets=("*",)), find_bundle(teacher)
    model, source = build_on_base(base, MODEL, adapter, seed=1)
    load_canonical(model, source)
    train(model)
    adapted = tmp_path / "adapted"
    save_adapter_bundle(adapted, adapter=adapter, base=base, weights=adapter_of(model), recipe=None, notes={})
    assert torch.equal(corpus.signal(adapted).weights[0], load_bundle(adapted).model.projection.weight)
    assert not torch.allclose(corpus.probabilities(adapted), corpus.probabilities(teacher), atol=1e-3)
    assert corpus.plan(adapted)[0].fingerprint != corpus.plan(teacher)[0].fingerprint


@pytest.mark.parametrize("size", [90, 95])
def test_a_permuted_or_larger_vocabulary_teaches_the_same(corpus: Corpus, teacher: Path, size: int, tmp_path: Path) -> None:
    positions = torch.randperm(size, generator=torch.Generator().manual_seed(1))[:90]
    other = renamed(teacher, tmp_path / "other", positions, size)
    vocabulary_map = written(tmp_path / "map.json", source=positions.tolist())
    expected, found = corpus.probabilities(teacher), corpus.probabilities(other, vocabulary_map=vocabulary_map)
    torch.testing.assert_close(found, expected)
    inside = (Tap("hidden_states", "encoder", 1), Tap("attention", "decoder", 1))
    records = ActivationCapture(inside), ActivationCapture(inside)
    corpus.signal(teacher, capture=records[0])
    corpus.signal(other, vocabulary_map=vocabulary_map, capture=records[1])
    for place in inside:
        torch.testing.assert_close(records[1].captured[place], records[0].captured[place])
    plain, mapped = corpus.plan(teacher), corpus.plan(other, vocabulary_map=vocabulary_map)
    assert len(plain[0].fingerprint) < len(mapped[0].fingerprint), "the map belongs to what taught"
    both = written(tmp_path / "both.json", source=positions.tolist(), target=positions.tolist())
    torch.testing.assert_close(corpus.probabilities(other, vocabulary_map=both), expected)


def test_another_vocabulary_is_refused_by_name(corpus: Corpus, tmp_path: Path) -> None:
    other_teacher = bundle_for(prepared(tmp_path / "data", 80), tmp_path / "other_teacher")
    nameless = bundle_for(corpus.directory, tmp_path / "nameless", tokenizers=False)
    with pytest.raises(
        BundleError, match=r"the teacher .*other_teacher has another vocabulary \(tokenizer [0-9a-f]{12}\) than the data"
    ):
        corpus.plan(other_teacher)
    with pytest.raises(BundleError, match=r"nameless has another vocabulary \(tokenizer none\).*--vocabulary-map FILE"):
        corpus.plan(nameless)


def test_no_bundle_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere is not a bundle: it has no model\.yaml"):
        corpus.plan(tmp_path / "nowhere")


def test_a_teacher_that_reads_too_little_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    sizes = corpus.sizes
    config = MODEL.model_copy(update={"max_target_length": 4})
    weights = to_canonical(load_bundle(bundle_for(corpus.directory, tmp_path / "long")).model)
    save_bundle(
        tmp_path / "short", model_config=config, vocabulary=sizes, weights=weights, tokenizers=corpus.tokenizers, recipe=None
    )
    with pytest.raises(BundleError, match=r"short reads 4 target tokens at most, but the training data has a pair of \d+"):
        corpus.plan(tmp_path / "short")


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"source": list(range(89))}, "source: 89 numbers, but the student has 90 ids; give one number for each"),
        ({"source": "all"}, "source: no list, but the student has 90 ids"),
        ({"source": [*range(89), 90]}, "source: 90 is no id of the teacher, which has 90"),
        ({"source": [*range(89), True]}, "source: True is no id of the teacher"),
        ({"source": [*range(89), 5]}, "source: the teacher's id 5 occurs twice"),
        (
            {"source": [0, 2, 1, *range(3, 90)]},
            "source: pad, eos and the start of a target must be mapped to the teacher's, (1, 2, 2), not (2, 1, 1)",
        ),
        ({"source": list(range(90)), "target": list(range(5))}, "target: 5 numbers, but the student has 90 ids"),
        ({"target": list(range(90))}, "must hold the lists `source` and, unless it is the same, `target`"),
        ({"source": list(range(90)), "sorce": []}, "must hold the lists `source` and"),
    ],
)
def test_a_map_that_is_none_is_refused(corpus: Corpus, sides: dict[str, Any], message: str, tmp_path: Path) -> None:
    other_teacher = bundle_for(corpus.directory, tmp_path / "other_teacher", tokenizers=False)
    with pytest.raises(DataError) as caught:
        corpus.plan(other_teacher, vocabulary_map=written(tmp_path / "map.json", **sides))
    assert message in str(caught.value)


def test_a_map_that_is_missing_or_not_needed_is_refused(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--vocabulary-map is not needed: every teacher has the vocabulary of the data"):
        corpus.plan(teacher, vocabulary_map=written(tmp_path / "map.json", source=list(range(90))))
    other_teacher = bundle_for(corpus.directory, tmp_path / "other_teacher", tokenizers=False)
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
        corpus.plan(other_teacher, vocabulary_map=tmp_path / "nowhere.json")


def test_the_fingerprint_is_that_of_the_weights(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    again = bundle_for(corpus.directory, tmp_path / "again")
    assert corpus.plan(teacher)[0].fingerprint == corpus.plan(again)[0].fingerprint
    bundle = load_bundle(teacher)
    weights = {name: weight + 1e-3 for name, weight in to_canonical(bundle.model).items()}
    save_bundle(
        again,
        model_config=MODEL,
        vocabulary=corpus.sizes,
        weights=weights,
        tokenizers=corpus.tokenizers,
        recipe=None,
        overwrite=True,
    )
    assert corpus.plan(teacher)[0].fingerprint != corpus.plan(again)[0].fingerprint


def test_dumped_logits_are_opened_as_the_recipe_wants_them(tmp_path: Path) -> None:
    data = toy_store.prepared(tmp_path / "data")
    teacher, batch = toy_store.teacher_for(data), toy_store.batch_of(open_dataset(data, "train"), [1, 2])
    toy_store.stored(data, tmp_path / "logits", TopKMethod(k=5), teacher=teacher)

    def tails(**keys: Any) -> Tensor:
        objective = DistillationConfig.model_validate(keys)
        return open_logits(tmp_path / "logits", data, load_manifest(data), objective).signal(batch).tail

    assert (tails() > 0.1).all()
    assert not tails(renormalize=True).any()
    with pytest.raises(RecipeError, match=r"objective\.temperature = 2, but the logits"):
        tails(temperature=2)
