"""`dstrain generate --format fairseq` with an imported model prints what fairseq-generate printed (golden/ref/toy_train)."""

from __future__ import annotations

import pytest

from dstrain.checkpoint.bundle import save_bundle
from dstrain.cli.main import main
from dstrain.interop.fairseq.checkpoint import convert, read_dictionaries, read_fairseq_checkpoint
from tests.paths import GOLDEN, needs_golden

pytestmark = needs_golden

Lines = dict[str, list[str]]


def by_kind(text: str) -> Lines:
    """`H-7` -> the columns behind it, for S T H D P."""
    lines = [line.split("\t") for line in text.splitlines() if line[:2] in {"S-", "T-", "H-", "D-", "P-"}]
    return {name: columns for name, *columns in lines}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    directory = tmp_path_factory.mktemp("fairseq")
    checkpoint = read_fairseq_checkpoint(GOLDEN / "ref" / "toy_train" / "checkpoint_last.pt")
    tokenizers = read_dictionaries(GOLDEN / "data" / "bin_sep", checkpoint)
    config, vocabulary, weights = convert(checkpoint, tokenizers)
    save_bundle(
        directory / "bundle", model_config=config, vocabulary=vocabulary, weights=weights, tokenizers=tokenizers, recipe=None
    )
    raw = GOLDEN / "data" / "raw"
    words = ["--input", raw / "test.en", "--reference", raw / "test.de", "--output", directory / "out", "--format", "fairseq"]
    words += ["--beam-size", 4, "--max-length-ratio", 0, "--max-length-offset", 20, "--device", "cpu"]
    assert main(["generate", str(directory / "bundle"), *map(str, words)]) == 0
    return by_kind((directory / "out").read_text())


@pytest.fixture(scope="module")
def theirs() -> Lines:
    return by_kind((GOLDEN / "ref" / "toy_train" / "generate_beam4.out").read_text())


def test_every_line_is_answered_and_the_predecessor_lost_some(ours: Lines, theirs: Lines) -> None:
    lines = (GOLDEN / "data" / "raw" / "test.en").read_text().splitlines()
    assert sorted(ours) == sorted(f"{kind}-{number}" for kind in "STHDP" for number in range(len(lines)))
    assert set(theirs) < set(ours)


@pytest.mark.parametrize("kind", ["S", "T"])
def test_sources_and_references_are_the_same_but_for_unknown_words(kind: str, ours: Lines, theirs: Lines) -> None:
    compared = {name for name, columns in theirs.items() if name[0] == kind and "unk" not in columns[0]}
    assert len(compared) > 15
    assert {name: ours[name][0].split() for name in compared} == {name: theirs[name][0].split() for name in compared}


@pytest.mark.parametrize("kind", ["H", "D"])
def test_hypotheses_and_their_scores_in_base_two(kind: str, ours: Lines, theirs: Lines) -> None:
    names = [name for name in theirs if name[0] == kind]
    assert len(names) >= 20
    for name in names:
        assert ours[name][1] == theirs[name][1]
        assert float(ours[name][0]) == pytest.approx(float(theirs[name][0]), rel=1e-5)


def test_scores_of_tokens_to_four_decimals(ours: Lines, theirs: Lines) -> None:
    for name in (name for name in theirs if name[0] == "P"):
        one, other = ([float(value) for value in lines[name][0].split()] for lines in (ours, theirs))
        assert one == pytest.approx(other, abs=1.01e-4)
