"""`dstrain import fairseq`, through the command line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.bundle import load_bundle
from dstrain.cli.main import main
from dstrain.interop.fairseq.checkpoint import convert, read_fairseq_checkpoint
from dstrain.models.weights import to_canonical
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
    assert all(torch.equal(tensor, weights[name]) for name, tensor in to_canonical(bundle.model).items())
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


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint_unmerged.pt", "crash.pt"])
def test_adapters_become_an_adapter_bundle_with_its_base_inside(name: str, tmp_path: Path) -> None:
    """Unmerged weights are known by the name crash.pt, or by an option."""
    folder = GOLDEN / "ref/j_lora_r4"
    checkpoint = folder / name
    if name == "crash.pt":
        checkpoint = tmp_path / name
        checkpoint.write_bytes((folder / "checkpoint_unmerged.pt").read_bytes())
    options = ["--unmerged"] if name == "checkpoint_unmerged.pt" else []
    output = tmp_path / "imported"
    words = ["import", "fairseq", str(checkpoint), "--dictionary", str(GOLDEN / "data/bin_sep"), "--output", str(output)]
    assert main([*words, *options]) == 0
    output.rename(tmp_path / "moved")
    adapted, base = load_bundle(tmp_path / "moved"), load_bundle(tmp_path / "moved" / "base")
    assert (adapted.adapters, base.adapters) == (1, 0)
    for bundle, original in ((adapted, "checkpoint.pt"), (base, "base_without_lora.pt")):
        stored = read_fairseq_checkpoint(folder / original)
        plain = {key: tensor for key, tensor in stored.weights.items() if "lora" not in key}
        settings = {key: value for key, value in stored.model.items() if key != "lora_args"}
        expected = convert(replace(stored, model=settings, weights=plain))[2]
        for key, tensor in to_canonical(bundle.model).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    assert adapted.tokenizers is not None
