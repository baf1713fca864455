"""`dstrain import fairseq`, through the command line."""

from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.bundle import load_bundle
from dstrain.cli.main import main
from dstrain.models.interop.fairseq import convert, read_fairseq_checkpoint
from dstrain.models.portable import to_portable
from tests.paths import GOLDEN, needs_golden

pytestmark = needs_golden


def test_a_bundle_with_weights_and_dictionaries(tmp_path: Path) -> None:
    checkpoint = GOLDEN / "ref/c_share_all/checkpoint.pt"
    words = [
        "import",
        "fairseq",
        str(checkpoint),
        "--dictionary",
        str(GOLDEN / "data/bin_joined"),
        "--output",
        str(tmp_path / "b"),
    ]
    assert main(words) == 0
    bundle = load_bundle(tmp_path / "b")
    config, vocabulary, weights = convert(read_fairseq_checkpoint(checkpoint))
    assert (bundle.model_config, bundle.vocabulary) == (config, vocabulary)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in to_portable(bundle.model).items())
    assert bundle.tokenizers.shared
    assert bundle.tokenizers.source.vocab_size == vocabulary.source
    assert bundle.notes["arch"] == "transformer"


@pytest.mark.parametrize(
    "case",
    [
        ("ref/a_base", None, "bin_sep has no dict.en.txt and no dict.txt; give the directory"),
        ("ref/c_share_all", "data/bin_sep", "has 192 rows, but the dictionary has 104 entries"),
    ],
)
def test_refusals_are_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    case: tuple[str, str | None, str],
) -> None:
    variant, dictionary, message = case
    monkeypatch.chdir(tmp_path)
    given = [] if dictionary is None else ["--dictionary", str(GOLDEN / dictionary)]
    assert main(["import", "fairseq", str(GOLDEN / variant / "checkpoint.pt"), *given, "--output", "b"]) == 1
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "b").exists()


def test_language_tags_are_symbols_of_the_dictionaries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "import",
        "fairseq",
        str(GOLDEN / "ref/c_share_all/checkpoint.pt"),
        "--dictionary",
        str(GOLDEN / "data/bin_joined"),
        "--output",
        str(tmp_path / "b"),
        "--language-tags",
    ]
    assert main([*words, "nowhere_*"]) == 1
    assert "neither dictionary has a symbol like the tag 'nowhere_*'" in capfd.readouterr().err
    assert main([*words, "s0[01]"]) == 0
    assert load_bundle(tmp_path / "b").tokenizers.source.tags == {"s00", "s01"}  # type: ignore[union-attr]
