"""Training on blocks: what a recipe and prepared data make of text, and which teachers read it."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from dstrain.api import TrainOptions, load_recipe, prepare
from dstrain.build.training_data import TrainingData
from dstrain.build.training_options import TeacherOptions, check_training
from dstrain.build.training_plan import plan_training
from dstrain.checkpoint.bundle import save_bundle
from dstrain.data.batching.collate import Collator, PackedSize
from dstrain.data.sources.grammar import sentence_pairs
from dstrain.errors import RecipeError
from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import to_canonical
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.recipe import Recipe
from dstrain.recipe_file import dump_recipe
from tests.paths import ROOT

TEACHER = "objective={kind: distillation}"


class Text:
    """Documents of eight lines each, a title first, prepared."""

    def __init__(self, directory: Path) -> None:
        english = [pair.english for pair, _ in zip(sentence_pairs("train", 1), range(140), strict=False)]
        for number in (1, 2):
            lines = [f"{'= ' if row % 8 == 0 else ''}{line}" for row, line in enumerate(english[70 * (number - 1) :][:70])]
            (directory / f"{number}.txt").write_text("\n".join(lines) + "\n")
        self.directory = directory
        self.data = directory / "data"
        prepare(self.recipe().data, self.data, workers=1, progress=False)

    def recipe(self, *overrides: str, packing: str = "{block_size: 40}") -> Recipe:
        corpora = [f"{{kind: text, name: n{n}, path: {self.directory}/{n}.txt, document_start: '= '}}" for n in (1, 2)]
        return load_recipe(
            "language_modeling/wikitext_tiny",
            [
                f"data.train=[{', '.join(corpora)}]",
                f"data.valid=[{{kind: text, path: {self.directory}/1.txt}}]",
                "data.tokenizer.vocab_size=90",
                "batching={tokens_per_step: 200, max_tokens: 120}",
                f"batching.packing={packing}",
                "model.model_dim=16",
                "model.decoder={depth: 1, num_heads: 2, num_kv_heads: 1, ffn_dim: 8}",
                *overrides,
            ],
        )

    def bundle(self, model: DecoderOnlyConfig | EncoderDecoderConfig) -> Path:
        """With the data's tokenizer."""
        tokenizers = TrainingData(self.data, self.recipe()).tokenizers
        sizes = VocabularySizes.of(tokenizers.source, tokenizers.target)
        weights = to_canonical(build_model(model, sizes, seed=1))
        directory = self.directory / model.kind
        save_bundle(directory, model_config=model, vocabulary=sizes, weights=weights, tokenizers=tokenizers, recipe=None)
        return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("way", ["cut", "complete_sentences", "complete_documents", "best_fit"])
@pytest.mark.parametrize("sampling", [None, "{kind: weights, weights: {n1: 1, n2: 3}}"])
def test_steps_are_made_of_blocks(text: Text, way: str, sampling: str | None) -> None:
    overrides = [] if sampling is None else [f"batching.sampling={sampling}"]
    recipe = text.recipe(*overrides, packing=f"{{block_size: 40, documents: {way}}}")
    data = TrainingData(text.data, recipe)
    steps = list(data.plan_steps(recipe).epoch(1))
    blocks = [block for step in steps for block in data.train_examples.read(1, step.examples)]
    lengths = [len(block.labels) for block in blocks]
    assert sum(lengths) == sum(step.num_targets for step in steps)
    assert max(lengths) <= 40 and all(block.sequences.sum() == len(block.labels) for block in blocks)
    assert data.blocks is not None and f"of up to 40 tokens ({way})" in data.blocks.describe()
    if sampling is None:
        assert sum(lengths) == data.train.target_lengths.sum()
    else:
        second = sum(length for block, length in zip(blocks, lengths, strict=True) if block.row >= 70)
        assert 0.6 < second / sum(lengths) < 0.9


def test_documents_are_those_of_the_text_and_lines_without_blocks(text: Text) -> None:
    """70 lines are nine documents."""
    data = TrainingData(text.data, text.recipe())
    assert data.train.document_starts is not None
    assert data.train.document_starts.tolist() == [*range(0, 70, 8), *range(70, 140, 8)]
    lines = TrainingData(text.data, text.recipe(packing="null"))
    assert (lines.blocks, lines.train_examples) == (None, lines.train)


def test_blocks_need_an_online_teacher_that_reads_them(text: Text, tmp_path: Path) -> None:
    recipe = text.recipe(TEACHER)

    def options(**teachers: object) -> TrainOptions:
        return TrainOptions(data=text.data, output=tmp_path / "run", teachers=TeacherOptions(**teachers), device="cpu")

    message = r"^batching\.packing makes examples of several lines, and --logits are of single ones: distill with --teacher"
    with pytest.raises(RecipeError, match=message):
        check_training(recipe, options(logits=tmp_path / "logits"))
    stack = {"depth": 1, "num_heads": 2, "ffn_dim": 8}
    other = text.bundle(EncoderDecoderConfig.model_validate({"model_dim": 16, "encoder": stack, "decoder": stack}))
    with pytest.raises(
        RecipeError, match=r"is an encoder-decoder, which cannot read blocks of text: set batching\.packing: null"
    ):
        plan_training(recipe, options(bundles=(other,)))
    plan_training(text.recipe(TEACHER, packing="null"), options(bundles=(other,)))
    assert isinstance(recipe.model, DecoderOnlyConfig)
    plan_training(recipe, options(bundles=(text.bundle(recipe.model),)))


@pytest.mark.parametrize(
    "objective", [{}, {"average": "sentences"}, {"r_drop": {"alpha": 1.0}}], ids=["tokens", "sentences", "r_drop"]
)
def test_blocks_have_their_losses_in_any_micro_batch_packed_or_padded(text: Text, objective: dict[str, object]) -> None:
    """With dropout, for every objective on labels."""
    recipe = text.recipe("model.dropout=0.3", packing="{block_size: 40, documents: best_fit}")
    data = TrainingData(text.data, recipe)
    (step,) = islice(data.plan_steps(recipe).epoch(1), 1)
    model = build_model(recipe.model, data.vocabulary, seed=1).double().train()
    loss = build_cross_entropy(CrossEntropyConfig.model_validate(objective))
    sums = []
    for groups, packed in (([step.examples], None), (step.examples[:, None], PackedSize(8)), ([step.examples], PackedSize(8))):
        collator = Collator("decoder_only", pad_id=1, eos_id=2, packed=packed)
        seed_masks(1, 2)
        batches = [collator(data.train_examples.read(1, group), group) for group in groups]
        assert sum(batch.num_targets for batch in batches) == step.num_targets
        assert sum(batch.size.num_sentences for batch in batches) == step.size.num_sentences == len(step.examples)
        sums.append(sum(loss(model, batch).loss_sum.item() for batch in batches))
    assert sums[1:] == pytest.approx([sums[0]] * 2, rel=1e-6)


def test_samples_of_blocks_are_refused_as_they_have_no_source(text: Text) -> None:
    with pytest.raises(RecipeError, match=r"on_policy.* but data\.train\.0 is text without a source"):
        text.recipe("objective={kind: distillation, on_policy: {fraction: 0.5}}")


@pytest.mark.slow
def test_the_bench_tells_real_tokens_and_speed_of_every_kind(text: Text) -> None:
    file = text.directory / "recipe.yaml"
    file.write_text(dump_recipe(text.recipe()))
    command = [sys.executable, ROOT / "tools" / "bench_packing.py", file, "--data", text.data, "--block-size", "40"]
    run = subprocess.run([*command, "--batches", "3", "--run", "1"], capture_output=True, text=True, check=True, timeout=280)
    lines = re.findall(
        r"^(\S.*?) +([\d.]+) % real tokens +[\d,]+ targets a CPU-second, ([\d.]+) of padded", run.stdout, re.MULTILINE
    )
    ways = ("cut", "complete_sentences", "complete_documents", "best_fit")
    assert [name for name, _, _ in lines] == [
        "padded",
        "packed",
        *(f"{way}, {attention}" for way in ways for attention in ("document, packed", "block, padded")),
    ]
    shares = {name: float(share) for name, share, _ in lines}
    assert shares["packed"] == shares["best_fit, document, packed"] == 100
    assert shares["padded"] < 100 and shares["cut, block, padded"] > 90
    assert all(float(speed) > 0 for _, _, speed in lines)
