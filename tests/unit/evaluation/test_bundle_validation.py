"""A bundle's figures on prepared data equal those counted sentence by sentence with torch's own cross-entropy."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch.nn import functional as F

from dstrain.batch import Sequences
from dstrain.build.validation_options import ValidateOptions, generation_of
from dstrain.checkpoint.bundle import load_bundle, save_bundle
from dstrain.cli.main import main
from dstrain.data.config import DataConfig, GrammarText, JsonlText, PlainText
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tasks.config import Denoising, LanguageModeling, Mass, TextTask
from dstrain.data.tokenizers.config import TokenizerDirectory, TrainedSentencePiece
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.errors import DataError
from dstrain.evaluation.bundle_validation import tasks_of_split
from dstrain.evaluation.translation import Translation
from dstrain.generation.config import BeamSearchConfig, GenerationConfig, SamplingConfig
from dstrain.models.config import EncoderDecoderConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import to_canonical
from dstrain.recipe import Recipe
from dstrain.recipe_file import load_recipe, recipe_tree

STACK = {"depth": 1, "num_heads": 2, "ffn_dim": 16}
MODEL = EncoderDecoderConfig(model_dim=16, encoder=STACK, decoder=STACK, dropout=0.5)


def prepared(directory: Path, vocab_size: int) -> Path:
    config = DataConfig(
        train=(GrammarText(split="train", num_pairs=60),),
        valid=(GrammarText(split="valid", num_pairs=7),),
        tokenizer=TrainedSentencePiece(vocab_size=vocab_size),
    )
    prepare(config, directory, workers=1, progress=False)
    return directory


def bundle_for(data: Path, directory: Path, *, tokenizers: bool = True, recipe: dict[str, Any] | None = None) -> Path:
    pair = load_tokenizers(data / "tokenizer")
    sizes = VocabularySizes(source=pair.source.vocab_size, target=pair.target.vocab_size)
    weights = to_canonical(build_model(MODEL, sizes, seed=3))
    chosen = pair if tokenizers else None
    save_bundle(directory, model_config=MODEL, vocabulary=sizes, weights=weights, tokenizers=chosen, recipe=recipe)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "data", 90)


@pytest.fixture(scope="module")
def bundle(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_for(data, tmp_path_factory.mktemp("bundle") / "bundle")


def scores_of(bundle: Path, data: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["validate", str(bundle), "--data", str(data), "--device", "cpu", *words]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def counted_by_hand(bundle: Path, data: Path, smoothing: float, *, average: str = "tokens") -> tuple[float, float, int]:
    """Loss and nll, one sentence at a time; smoothing as epsilon / V on every type, epsilon-weighted. average: of the loss."""
    model = load_bundle(bundle).model
    dataset = open_dataset(data, "valid")
    loss, nll, count = 0.0, 0.0, 0
    for row in range(len(dataset)):
        source, target = (torch.from_numpy(side.astype("int64"))[None] for side in dataset[row][:2])
        decoder_input = torch.cat([torch.full((1, 1), 2), target[:, :-1]], dim=1)
        lengths = torch.tensor([source.shape[1]]), torch.tensor([target.shape[1]])
        with torch.no_grad():
            hidden = model(Sequences(source, lengths[0]), Sequences(decoder_input, lengths[1])).hidden
            log_probs = F.log_softmax(model.project(hidden)[0].double(), dim=-1)
        own = F.nll_loss(log_probs, target[0], reduction="sum").item()
        spread = -log_probs.sum().item()
        share = smoothing / (log_probs.shape[-1] - 1)
        smoothed = (1 - smoothing - share) * own + share * spread
        loss += smoothed / target.shape[1] if average == "sentences" else smoothed
        nll += own
        count += target.shape[1]
    return loss / (len(dataset) if average == "sentences" else count), nll / count, count


def test_a_bundle_without_recipe_is_scored_by_plain_cross_entropy(
    bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = scores_of(bundle, data, capsys, "--no-generate", "--max-tokens", "40")
    _, nll, count = counted_by_hand(bundle, data, 0.0)
    assert scores["num_targets"] == count
    assert scores["loss"] == pytest.approx(nll, rel=1e-5)
    assert scores["nll"] == pytest.approx(nll, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert "bleu" not in scores


@pytest.mark.parametrize("average", ["tokens", "sentences"])
def test_a_bundle_is_scored_by_the_objective_of_its_recipe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], average: str
) -> None:
    """R-Drop is for training only: a bundle trained with it is scored by one pass."""
    objective = f"objective={{kind: cross_entropy, label_smoothing: 0.2, average: {average}, r_drop: {{alpha: 5}}}}"
    recipe = recipe_tree(load_recipe("translation/quickstart", [objective]))
    bundle = bundle_for(data, tmp_path / "bundle", recipe=recipe)
    scores = scores_of(bundle, data, capsys, "--no-generate")
    loss, nll, _ = counted_by_hand(bundle, data, 0.2, average=average)
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["nll"] == pytest.approx(nll, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert "kl" not in scores


def test_texts_are_scored_by_default(bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = scores_of(bundle, data, capsys, "--beam-size", "1")
    assert {"bleu", "chrf", "repetition"} <= set(scores)
    assert 0 <= scores["chrf"] <= 100
    assert "|case:mixed|eff:no|tok:13a|" in scores["signatures"]["bleu"]


def test_validate_takes_the_options_of_a_method(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The score of what `generate` writes by the same options."""
    options = ("--beam-size", "3", "--length-penalty", "0.2", "--min-length", "6", "--max-length-offset", "1")
    source, target, hypotheses = (tmp_path / name for name in ("source.txt", "target.txt", "hypotheses.txt"))
    assert main(["text", str(data), "--split", "valid", "--output", str(tmp_path)]) == 0
    assert main(["generate", str(bundle), "--input", str(source), "--output", str(hypotheses), *options]) == 0
    scores = scores_of(bundle, data, capsys, *options)
    expected = sacrebleu.corpus_chrf(hypotheses.read_text().splitlines(), [target.read_text().splitlines()])
    assert scores["chrf"] == pytest.approx(expected.score)
    assert scores["chrf"] != scores_of(bundle, data, capsys)["chrf"]


def test_rouge_compares_with_all_references(bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Among the references of every other pair is what the model generates; so its score is 100, that of the others as it is."""
    assert main(["text", str(data), "--split", "valid", "--output", str(tmp_path)]) == 0
    source, hypotheses = tmp_path / "source.txt", tmp_path / "hypotheses.txt"
    assert main(["generate", str(bundle), "--input", str(source), "--output", str(hypotheses), "--beam-size", "1"]) == 0
    sources, generated = source.read_text().splitlines(), hypotheses.read_text().splitlines()
    references = [["x y z", text + " word"] if row % 2 else ["no word"] for row, text in enumerate(generated)]
    pairs = [{"source": text, "target": own} for text, own in zip(sources, references, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    corpus = JsonlText(path=str(tmp_path / "pairs.jsonl"), target="target.0", references="target")
    tokenizer = TokenizerDirectory(path=str(data / "tokenizer"))
    config = DataConfig(train=(GrammarText(split="train", num_pairs=2),), valid=(corpus,), tokenizer=tokenizer)
    prepare(config, tmp_path / "data", workers=1, progress=False)
    scores = scores_of(bundle, tmp_path / "data", capsys, "--beam-size", "1", "--rouge", "plain")
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(text, line)["rougeL"].fmeasure for text in own) for own, line in zip(references, generated, strict=True)
    ]
    assert scores["rouge_l"] == pytest.approx(100 * sum(best) / len(best))
    assert scores["rouge_l"] > 25
    assert scores["signatures"]["rouge_l"].startswith("nrefs:var|refs:max|score:f1|")
    assert "nrefs:var|" in scores["signatures"]["bleu"]


def test_bleu_is_that_of_the_recipe_unless_options_change_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_tree(load_recipe("translation/quickstart", ["validation.tokenize=char", "validation.lowercase=true"]))
    bundle = bundle_for(data, tmp_path / "bundle", recipe=recipe)
    own = scores_of(bundle, data, capsys, "--beam-size", "1")
    changed = scores_of(bundle, data, capsys, "--beam-size", "1", "--tokenize", "intl", "--no-lowercase")
    assert "|case:lc|eff:no|tok:char|" in own["signatures"]["bleu"]
    assert "|case:lc|" in own["signatures"]["chrf"]
    assert "|case:mixed|eff:no|tok:intl|" in changed["signatures"]["bleu"]
    assert "|case:mixed|" in changed["signatures"]["chrf"]


def test_text_is_generated_as_in_training_unless_options_change_it() -> None:
    def chosen(recipe: Recipe | None, **options: Any) -> GenerationConfig | None:
        generate = options.pop("generate", None)
        return generation_of(recipe, ValidateOptions(bundle=Path("b"), data=Path("d"), generate=generate, method=options))

    own = "validation={metric: loss, generation: {kind: beam, beam_size: 2, min_length: 3}}"
    recipe = load_recipe("translation/quickstart", [own, "generation.beam_size=4"])
    assert chosen(recipe) == BeamSearchConfig(beam_size=2, min_length=3)
    assert chosen(recipe, beam_size=7) == BeamSearchConfig(beam_size=7, min_length=3)
    assert chosen(recipe, kind="sampling", top_k=4, min_length=None) == SamplingConfig(top_k=4, min_length=3)
    assert chosen(recipe, generate=False) is None
    silent = load_recipe("translation/quickstart", ["validation={metric: loss, generation: null}", "generation.beam_size=4"])
    assert chosen(silent) == BeamSearchConfig(beam_size=4)
    assert chosen(None) == BeamSearchConfig()


def test_another_precision_changes_the_figures_and_is_said(bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact, near = (scores_of(bundle, data, capsys, "--precision", name) for name in ("auto", "bf16"))
    assert (exact["precision"], near["precision"]) == ("fp32", "bf16")
    assert near["loss"] != exact["loss"]
    assert near["loss"] == pytest.approx(exact["loss"], rel=0.01)


def test_a_tokenization_that_cannot_be_used_is_said_first(
    bundle: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "MeCab", None)
    assert main(["validate", str(bundle), "--data", str(data), "--tokenize", "ja-mecab"]) == 1
    assert "BLEU tokenization 'ja-mecab' cannot be used here" in capsys.readouterr().err


def test_a_missing_package_of_rouge_is_said_before_anything_is_translated(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setattr(Translation, "translate", lambda *_: pytest.fail("translated first"))
    bundle = bundle_for(
        data, tmp_path / "bundle", recipe=recipe_tree(load_recipe("translation/quickstart", ["validation.rouge=plain"]))
    )
    for options in ([], ["--rouge", "stemmed"]):
        assert main(["validate", str(bundle), "--data", str(data), "--device", "cpu", *options]) == 1
        assert "ROUGE needs a package that cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "test"], "has no split 'test'; it holds train, valid"),
        (["--split", "train", "--generate"], "'train' keeps no raw text to compare with, so only losses are scored: leave --gen"),
        (["--split", "train", "--beam-size", "2"], "so only losses are scored: leave --generate and its options out"),
    ],
)
def test_mistakes(bundle: Path, data: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["validate", str(bundle), "--data", str(data), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_split_without_raw_text_is_scored_without_flags(bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(bundle), "--data", str(data), "--device", "cpu", "--split", "train"]) == 0
    captured = capsys.readouterr()
    assert {"bleu", "perplexity"} & set(json.loads(captured.out)) == {"perplexity"}
    assert "the split 'train' keeps no raw text to compare with: only losses are scored" in captured.err


def test_data_of_another_tokenizer_are_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = prepared(tmp_path / "other", 95)
    assert main(["validate", str(bundle), "--data", str(other)]) == 1
    assert "prepare the data with the tokenizer of" in capsys.readouterr().err


def test_a_bundle_without_tokenizer_cannot_be_compared(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = bundle_for(data, tmp_path / "bare", tokenizers=False)
    assert main(["validate", str(bare), "--data", str(data)]) == 1
    assert "has no tokenizer, so it is unknown whether the ids of" in capsys.readouterr().err


def test_an_encoder_decoder_bundle_has_nothing_to_read_in_text_without_a_source(
    data: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The girl sleeps.\n")
    tokenizer = TokenizerDirectory(path=str(data / "tokenizer"))
    config = DataConfig(train=(PlainText(path=str(text)),), valid=(PlainText(path=str(text)),), tokenizer=tokenizer)
    prepare(config, tmp_path / "data", workers=1, progress=False)
    assert main(["validate", str(bundle), "--data", str(tmp_path / "data"), "--device", "cpu", "--no-generate"]) == 1
    assert "the split 'valid' is text without a source: the encoder of" in capsys.readouterr().err


def test_text_is_read_as_the_recipe_of_the_bundle_reads_it() -> None:
    def text(task: TextTask) -> PlainText:
        return PlainText(path="text", task=task)

    pair, plain, other = GrammarText(split="train", num_pairs=1), text(LanguageModeling()), text(Denoising(mask=0.5))
    tokenizer = TrainedSentencePiece(user_symbols=("<mask>",))
    one = DataConfig(train=(pair, other), valid=(other,), tokenizer=tokenizer)
    several = DataConfig(train=(text(Mass()), other), valid=(other,), tokenizer=tokenizer)
    assert tasks_of_split([plain], "valid", None) == [LanguageModeling()]
    assert tasks_of_split([pair], "valid", several) == [None]
    assert tasks_of_split([plain], "valid", several) == [Denoising(mask=0.5)]
    assert tasks_of_split([plain, plain, pair], "valid", one) == [Denoising(mask=0.5), Denoising(mask=0.5), None]
    with pytest.raises(DataError, match="the bundle was trained by several tasks on text: mass, denoising; prepare data with"):
        tasks_of_split([plain, plain], "valid", several)
