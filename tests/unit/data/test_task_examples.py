"""Examples of prepared text: by the task of each corpus, the same on any number of ranks, in any batch, and after a resume."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from dstrain.data.batching.loader import Examples, TrainLoader, evaluation_loader
from dstrain.data.batching.plan import StepPlan
from dstrain.data.config import BatchingConfig, DataConfig, task_of_text
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tasks.build import build_examples
from dstrain.data.tasks.config import Denoising, LanguageModeling, PrefixLanguageModeling, SpanCorruption, TextTask
from dstrain.data.tasks.examples import TaskExamples
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers
from dstrain.errors import DataError
from dstrain.evaluation.validator import check_split
from dstrain.models.config import EncoderDecoderConfig
from tests.unit.data.corpus import parallel, sentences, write_lines

TASKS: list[TextTask] = [Denoising(insert=0.2), SpanCorruption(sentinels="<{}>"), PrefixLanguageModeling(), LanguageModeling()]
SYMBOLS = ["<mask>", "<0>", "<1>", "<2>"]
Batch = dict[int, tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Path]:
    """Four corpora of text and one of pairs; the first text has three sentences a line."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [" . ".join(group) + " ." for group in zip(*(sentences(40 + 40 * n)[-40:] for n in range(3)), strict=True)]
    texts = [lines, *(sentences(60) for _ in TASKS[1:])]
    train = [
        {"kind": "text", "path": str(write_lines(folder / f"{number}.txt", text)), "task": task.model_dump()}
        for number, (text, task) in enumerate(zip(texts, TASKS, strict=True))
    ]
    config = DataConfig.model_validate(
        {
            "train": [*train, parallel(folder, "train", sentences(50), sentences(50, suffix="en"))],
            "valid": train[:1],
            "tokenizer": {"kind": "sentencepiece", "vocab_size": 70, "user_symbols": SYMBOLS},
        }
    )
    prepare(config, folder / "data", workers=1, progress=False)
    return config, folder / "data"


def opened(prepared: tuple[DataConfig, Path], split: str = "train", seed: int = 1) -> tuple[Examples, Dataset, TokenizerPair]:
    config, directory = prepared
    dataset, tokenizers = open_dataset(directory, split), load_tokenizers(directory / "tokenizer")
    corpora = config.train if split == "train" else config.valid
    examples = build_examples(dataset, list(map(task_of_text, corpora)), tokenizers.target, split=split, seed=seed)
    return examples, dataset, tokenizers


class Recorder:
    """Stands in for a collator: a batch is the examples by row."""

    kind = "encoder_decoder"
    packed = None

    def __call__(self, examples: Sequence[tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> Batch:
        sides = [(source.tolist(), target.tolist()) for source, target, *_ in examples]
        return dict(zip(rows.tolist(), sides, strict=True))


def test_each_corpus_has_its_task(prepared: tuple[DataConfig, Path]) -> None:
    examples, dataset, tokenizers = opened(prepared)
    rows = np.arange(len(dataset))
    corpora = dataset.corpus_of(rows)
    assert np.bincount(corpora).tolist() == [40, 60, 60, 60, 50]
    lengths = examples.lengths.of(1, rows)
    found = [(source, target) for source, target, *_ in examples.read(1, rows)]
    eos = tokenizers.target.eos_id
    assert [len(target) for _, target in found] == lengths[1].tolist()
    assert all(len(source) <= most for (source, _), most in zip(found, lengths[0].tolist(), strict=True))
    assert all(side[-1] == eos and eos not in side[:-1] for pair in found for side in pair)
    for row, (source, target) in enumerate(found):
        stored, kind = dataset[row], corpora[row]
        if kind == 0:
            assert target.tolist() == stored.target.tolist()
        if kind == 2:
            assert [*source[:-1], *target] == stored.target.tolist()
        if kind in {3, 4}:
            assert (source.tolist(), target.tolist()) == (stored.source.tolist(), stored.target.tolist())
    spelled = " ".join(tokenizers.target.tokens(np.concatenate([source for source, _ in found[:100]]).tolist()))
    assert "<mask>" in spelled
    assert "<0>" in spelled
    assert examples.lengths.num_targets(1) == int(lengths[1].sum())


def test_lengths_bound_those_of_every_epoch(prepared: tuple[DataConfig, Path]) -> None:
    examples, dataset, _ = opened(prepared)
    rows = np.arange(len(dataset))
    of_epochs = [examples.lengths.of(epoch, rows) for epoch in range(1, 30)]
    sources, targets = (np.max([lengths[side] for lengths in of_epochs], axis=0) for side in (0, 1))
    assert sources.max() <= examples.lengths.longest("source").tokens <= sources.max() + 1
    assert examples.lengths.longest("target").tokens == targets.max()
    row, both = examples.lengths.longest("source and target")
    assert both == max(int((source.astype(int) + target - 1).max()) for source, target in of_epochs)
    assert dataset.target_lengths[row] == dataset.target_lengths.max()


def test_noise_depends_on_seed_and_epoch(prepared: tuple[DataConfig, Path]) -> None:
    rows = np.arange(40)

    def sources(seed: int, epoch: int) -> list[list[int]]:
        return [source.tolist() for source, *_ in opened(prepared, seed=seed)[0].read(epoch, rows)]

    assert sources(1, 1) == sources(1, 1)
    for other in (sources(2, 1), sources(1, 2)):
        assert sum(map(list.__eq__, sources(1, 1), other)) < 4


def test_the_same_noise_on_any_number_of_ranks_in_any_micro_batch_and_after_a_resume(prepared: tuple[DataConfig, Path]) -> None:
    examples, _, _ = opened(prepared)

    def steps(rank: int, ranks: int, max_tokens: int, start: tuple[int, int] = (1, 0)) -> list[list[Batch]]:
        config = BatchingConfig(tokens_per_step=300, max_tokens=max_tokens, shuffle_window=100)
        plan = StepPlan(examples.lengths, config, 1)
        with TrainLoader(examples, plan, Recorder(), data_rank=rank, data_size=ranks, start=start) as loader:
            return [batches for _, batches in islice(loader, 20 - start[1])]

    def joined(*batches: Batch) -> Batch:
        return {row: sides for batch in batches for row, sides in batch.items()}

    alone, shares = steps(0, 1, 600), [steps(rank, 2, 150) for rank in range(2)]
    assert [joined(*first, *second) for first, second in zip(*shares, strict=True)] == [joined(*step) for step in alone]
    assert len(shares[0][0]) > len(alone[0])
    assert steps(0, 1, 600, (1, 7)) == alone[7:]


def test_what_is_evaluated_is_always_the_same(prepared: tuple[DataConfig, Path]) -> None:
    config, directory = prepared
    dataset, tokenizer = open_dataset(directory, "valid"), load_tokenizers(directory / "tokenizer").target
    found = []
    for max_tokens in (100, 400):
        examples = build_examples(dataset, [task_of_text(config.valid[0])], tokenizer, split="valid")
        found.append(
            {row: sides for batch in evaluation_loader(examples, max_tokens, Recorder()) for row, sides in batch.items()}
        )
    assert found[0] == found[1]
    assert sum(source != target for source, target in found[0].values()) > 30


def test_a_text_that_becomes_longer_than_the_model_reads_is_named(prepared: tuple[DataConfig, Path]) -> None:
    examples, dataset, _ = opened(prepared)
    row, tokens = examples.lengths.longest("source")
    stack = {"depth": 1, "num_heads": 1, "ffn_dim": 8}
    limits = {"max_source_length": tokens - 1, "max_target_length": int(dataset.target_lengths.max())}
    model = EncoderDecoderConfig(model_dim=8, encoder=stack, decoder=stack, **limits)
    message = f"pair {row + 1} of the split 'train' has {tokens} source tokens, more than model.max_source_length = {tokens - 1}"
    with pytest.raises(DataError, match=message):
        check_split("train", examples.lengths, model)
    with pytest.raises(DataError, match=f"has {tokens} source tokens, over batching.max_tokens {tokens - 1}"):
        StepPlan(examples.lengths, BatchingConfig(tokens_per_step=100, max_tokens=tokens - 1), 1)


def test_a_mask_may_be_typed(prepared: tuple[DataConfig, Path]) -> None:
    """So a bundle that learned to restore text is asked by a line with masks in it."""
    _, _, tokenizers = opened(prepared)
    (mask,) = (number for number in range(tokenizers.source.vocab_size) if tokenizers.source.tokens([number]) == ["<mask>"])
    (typed,) = tokenizers.source.encode(["the <mask> dog"])
    assert typed.count(mask) == 1


def test_text_for_language_models_and_pairs_are_read_as_they_are_stored(prepared: tuple[DataConfig, Path]) -> None:
    _, dataset, tokenizers = opened(prepared)
    assert build_examples(dataset, [LanguageModeling(), None], tokenizers.target, split="train") is dataset


def test_data_that_does_not_know_its_corpora(prepared: tuple[DataConfig, Path]) -> None:
    _, dataset, tokenizers = opened(prepared)
    old = Dataset(dataset._shards, np.stack([dataset.source_lengths, dataset.target_lengths]))
    assert isinstance(build_examples(old, [Denoising()], tokenizers.target, split="train"), TaskExamples)
    with pytest.raises(DataError, match="did not note whose rows of train are: prepare it again for the tasks"):
        build_examples(old, [Denoising(), None], tokenizers.target, split="train")


def test_one_preparation_serves_any_task(prepared: tuple[DataConfig, Path], tmp_path: Path) -> None:
    config, directory = prepared
    before = (directory / "manifest.json").read_bytes()
    tree = config.model_dump(mode="json")
    for corpus in tree["train"][:4]:
        corpus["task"] = {"kind": "language_modeling"}
    changed = DataConfig.model_validate(tree)
    report = prepare(changed, directory, workers=1, progress=False)
    assert report.finished_before
    assert (directory / "manifest.json").read_bytes() == before
