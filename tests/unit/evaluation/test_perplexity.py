"""Perplexity of text: windows written out, values by brute force from the model's logits, the verb, its mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dstrain.api import BundleModel, PerplexityOptions, ValidateOptions, load, perplexity, prepare, validate
from dstrain.checkpoint.bundle import save_bundle
from dstrain.cli.main import main
from dstrain.data.config import DataConfig, PlainText
from dstrain.data.tokenizers.config import TokenizerDirectory
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.errors import ArgumentError, BundleError, DataError, DstrainError
from dstrain.evaluation.perplexity import TokenWindow, sliding_windows
from dstrain.models.config import DecoderOnlyConfig, DecoderOnlyStackConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.position_config import DecoderOnlyAlibiPosition, RotaryPosition
from dstrain.models.weights import to_canonical
from tests.unit.cli.test_generate import feed
from tests.unit.generation.small_bundle import WORDS, dictionary, make_bundle

LINES = ["eins zwei  drei", "", " ".join(WORDS), "hundert fünf", "\t", " ".join(WORDS[::-1] * 3), "sechs"]
TEXT = "".join(f"{line}\n" for line in LINES)
EOS, UNK = 2, 3


def language_model(directory: Path, position: RotaryPosition | DecoderOnlyAlibiPosition, *, max_length: int = 12) -> Path:
    """A model of German numbers with random weights, large enough that tokens differ in probability."""
    words = dictionary(WORDS)
    vocabulary = VocabularySizes.of(words, words)
    stack = DecoderOnlyStackConfig(depth=2, num_heads=2, ffn_dim=32)
    config = DecoderOnlyConfig(model_dim=16, decoder=stack, norm_order="pre", position=position, max_target_length=max_length)
    weights = {name: 2 * weight for name, weight in to_canonical(build_model(config, vocabulary, seed=3)).items()}
    pair = TokenizerPair(words, words)
    save_bundle(directory, model_config=config, vocabulary=vocabulary, weights=weights, tokenizers=pair, recipe=None)
    return directory


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("lm") / "bundle", RotaryPosition())


@pytest.fixture(scope="module")
def model(bundle: Path) -> BundleModel:
    return load(bundle)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def windows(tokens: Sequence[int], length: int, stride: int, piece: int = 3) -> list[tuple[list[int], list[int]]]:
    pieces = [tokens[start : start + piece] for start in range(0, len(tokens), piece)]
    return [(window.inputs, window.labels) for window in sliding_windows(pieces, 0, length=length, stride=stride)]


@pytest.mark.parametrize("piece", [1, 3, 20])
def test_windows_written_out(piece: int) -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert windows(tokens, 4, 2, piece) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([2, 3, 4, 5], [5, 6]),
        ([4, 5, 6, 7], [7, 8]),
        ([5, 6, 7, 8], [9]),  # the last begins earlier instead of being shorter
    ]
    assert windows(tokens, 4, 4, piece) == [([0, 1, 2, 3], [1, 2, 3, 4]), ([4, 5, 6, 7], [5, 6, 7, 8]), ([5, 6, 7, 8], [9])]
    assert windows(tokens, 9, 1, piece) == windows(tokens, 50, 7, piece) == [([0, 1, 2, 3, 4, 5, 6, 7, 8], tokens)]
    assert windows([7], 4, 2, piece) == [([0], [7])]


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (5, 1), (5, 2), (5, 5), (16, 7), (64, 64)])
@pytest.mark.parametrize("size", [1, 4, 5, 6, 37])
def test_every_token_is_scored_once_with_its_context(length: int, stride: int, size: int) -> None:
    tokens = list(range(1, size + 1))
    found = [TokenWindow(*window) for window in windows(tokens, length, stride)]
    assert [label for window in found for label in window.labels] == tokens
    for number, (inputs, labels) in enumerate(found):
        assert len(inputs) <= length
        assert inputs == list(range(labels[-1] - len(inputs), labels[-1]))
        assert number == 0 or len(inputs) - len(labels) >= length - stride


def brute_force(model: BundleModel, documents: Sequence[Sequence[int]], length: int, stride: int) -> float:
    """The sum of negative log-likelihoods, each token by a forward pass over its own window."""
    total = 0.0
    for document in documents:
        read = [EOS, *document]
        for position in range(1, len(read)):
            end = length + max(0, math.ceil((position - length) / stride)) * stride  # of the first window that scores it
            end = min(end, len(document))
            start = max(0, end - length)
            (logits,) = model.logits(None, [read[start:position]])
            total -= float(torch.from_numpy(logits[-1]).double().log_softmax(0)[read[position]])
    return total


@pytest.mark.parametrize(("length", "stride"), [(12, 5), (12, 12), (7, 1)])
@pytest.mark.parametrize("document", ["line", "file"])
def test_values_by_brute_force(
    *, document: str, length: int, stride: int, bundle: Path, model: BundleModel, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[*row, EOS] for row in model.tokenizer.target.encode(LINES) if row]
    documents = rows if document == "line" else [[token for row in rows for token in row]]
    nll, num_tokens = brute_force(model, documents, length, stride), sum(map(len, rows))
    words = ["--document", document, "--context-window", str(length), "--stride", str(stride), "--device", "cpu"]
    assert main(["perplexity", str(bundle), str(text), *words, "--max-tokens", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in found if name.startswith(("num", "unk", "blank"))} == {
        "num_tokens": num_tokens,
        "num_words": 3 + 12 + 2 + 36 + 1,
        "num_bytes": len(TEXT.encode()) - len("\n\t\n"),
        "num_lines": 5,
        "blank_lines": 2,
        "unknown_tokens": 1,
    }
    assert num_tokens == found["num_words"] + 5
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / num_tokens), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(nll / 54), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / found["num_bytes"], rel=1e-5)
    assert (found["context_window"], found["stride"], found["precision"]) == (length, stride, "fp32")


def test_context_of_other_lines_counts_only_if_the_file_is_one_document(bundle: Path, text: Path) -> None:
    by_line, whole = (
        perplexity(PerplexityOptions(bundle=bundle, file=str(text), document=document)) for document in ("line", "file")
    )
    assert by_line["nll"] != pytest.approx(whole["nll"], rel=1e-3)
    assert by_line["num_tokens"] == whole["num_tokens"]


def test_prepared_text_has_the_same_loss(tmp_path: Path, text: Path) -> None:
    """As `dstrain validate` computes it, which drops the same blank lines."""
    bundle = language_model(tmp_path / "bundle", RotaryPosition(), max_length=40)
    corpora, tokenizer = (PlainText(path=str(text)),), TokenizerDirectory(path=str(bundle / "tokenizer"))
    prepare(DataConfig(train=corpora, valid=corpora, tokenizer=tokenizer), tmp_path / "data", workers=1, progress=False)
    scores = validate(ValidateOptions(bundle=bundle, data=tmp_path / "data", device="cpu"))
    assert scores is not None
    figures = perplexity(PerplexityOptions(bundle=bundle, file=str(text)))
    assert figures["num_tokens"] == scores["num_targets"]
    assert figures["perplexity"] == pytest.approx(scores["perplexity"], rel=1e-5)


def test_the_verb_reads_a_pipe_and_prints_words_on_request(
    bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = perplexity(PerplexityOptions(bundle=bundle, file=str(text)))
    printed = {}
    for option in ([], ["--per-word"]):
        feed(monkeypatch, TEXT.encode())
        assert main(["perplexity", str(bundle), "-", "--device", "cpu", *option]) == 0
        printed[len(option)] = capsys.readouterr().out
    first, counts, window = printed[1].splitlines()
    assert first == (
        f"perplexity {expected['perplexity']:.6g} per token, {expected['word_perplexity']:.6g} per word; "
        f"{expected['bits_per_byte']:.4f} bits per byte"
    )
    assert counts == "59 tokens, 1 of them <unk>, 54 words, 296 bytes in 5 lines (2 blank ones left out)"
    assert window == "windows of 12 tokens, stride 6; each line a document; fp32"
    assert printed[0] == printed[1].replace(f", {expected['word_perplexity']:.6g} per word", "")


def test_a_window_over_the_limit_is_mended_by_a_smaller_one_or_an_extension(
    bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--document", "file", "--context-window", "30", "--device", "cpu"]
    assert main(["perplexity", str(bundle), str(text), *words]) == 1
    assert capsys.readouterr().err.endswith(
        f"context_window = 30, but {bundle} reads 12 tokens at most; lower --context-window, or extend it: "
        "`dstrain extend BUNDLE --factor 3 --kind yarn --output LONGER`\n"
    )
    longer = tmp_path / "longer"
    assert main(["extend", str(bundle), "--factor", "3", "--kind", "yarn", "--output", str(longer)]) == 0
    assert main(["perplexity", str(longer), str(text), *words]) == 0
    assert main(["perplexity", str(bundle), str(text), "--document", "file", "--context-window", "12", "--device", "cpu"]) == 0
    alibi = language_model(tmp_path / "alibi", DecoderOnlyAlibiPosition())
    with pytest.raises(ArgumentError, match=r"reads 12 tokens at most; lower --context-window$"):
        perplexity(PerplexityOptions(bundle=alibi, file=str(text), context_window=13))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"context_window": 8, "stride": 9},
            ArgumentError,
            "(--context-window), so that tokens between windows would have no score",
        ),
        ({"stride": 13}, ArgumentError, "stride = 13 (--stride) exceeds context_window = 12"),
        ({"stride": 0}, ArgumentError, "stride = 0 is not a number of tokens; choose one from 1 on"),
        ({"context_window": -1}, ArgumentError, "context_window = -1 is not a number of tokens; choose one from 1 on"),
        ({"file": "nowhere.txt"}, DataError, "nowhere.txt: No such file"),
        ({"document": "page"}, ArgumentError, "PerplexityOptions.document"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], kind: type[DstrainError], message: str, bundle: Path, text: Path) -> None:
    with pytest.raises(kind) as caught:
        perplexity(PerplexityOptions(**{"bundle": bundle, "file": str(text), **options}))  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize(("content", "blank"), [("", 0), ("\n \n", 2)])
def test_a_text_without_text_has_no_perplexity(content: str, blank: int, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(content)
    with pytest.raises(DataError, match=rf"empty has no line of text \({blank} blank ones\); name another file"):
        perplexity(PerplexityOptions(bundle=bundle, file=str(tmp_path / "empty")))


def test_an_encoder_decoder_has_no_perplexity_of_text(text: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is an encoder-decoder, whose targets depend on sources"):
        perplexity(PerplexityOptions(bundle=make_bundle(tmp_path / "bundle"), file=str(text)))
