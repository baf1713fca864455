"""Training reads prepared data of the same content, however the recipe spells its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.build.same_data import moved_text, require_data_of
from dstrain.data.prepared import comparison
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.errors import DataError
from dstrain.recipe import Recipe
from dstrain.recipe_file import load_recipe

LINES = "".join(f"the {animal} sees {number} birds\n" for animal in ("dog", "cat", "fox", "owl") for number in range(10, 30))


def recipe(source: str, *overrides: str) -> Recipe:
    corpora = [f"data.{split}=[{{kind: parallel, source: {source}, target: {source}}}]" for split in ("train", "valid")]
    return load_recipe("translation/quickstart", [*corpora, "data.test={}", "data.tokenizer.vocab_size=60", *overrides])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to be in, with `text` and its prepared `data`."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(LINES)
    prepare(recipe("text").data, Path("data"), workers=1, progress=False)
    return tmp_path


def refusal(given: Recipe) -> str:
    with pytest.raises(DataError, match="data was prepared from another data section than this recipe's") as caught:
        require_data_of(given, Path("data"), load_manifest(Path("data")))
    return str(caught.value)


def test_spelling_places_and_test_sets_do_not_count(home: Path) -> None:
    manifest = load_manifest(Path("data"))
    expected = manifest.content
    Path("copy").write_text(LINES)
    news = "data.test={news: [{kind: tsv, path: nowhere.tsv}]}"
    for given in (recipe(str(home / "text")), recipe("copy"), recipe("/not/on/this/machine"), recipe("text", news)):
        require_data_of(given, Path("data"), manifest)
    assert moved_text(recipe("text", news), manifest) is None
    assert (moved_text(recipe("copy"), manifest) or "").startswith('data.train[0].source: "text" -> "copy"; ')
    prepare(recipe("copy", "data.test={more: [{kind: parallel, source: text, target: text}]}").data, Path("again"), workers=1)
    assert load_manifest(Path("again")).content == expected
    assert load_manifest(Path("again")).job != load_manifest(Path("data")).job


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.filter.max_target_length=50", "data.filter.max_target_length: 1024 -> 50"),
        ("data.tokenizer.vocab_size=61", "data.tokenizer.vocab_size: 60 -> 61"),
        ("data.train.0.kind=fairseq", 'data.train[0].kind: "parallel" -> "fairseq"'),
    ],
)
def test_settings_count(home: Path, override: str, line: str) -> None:
    more = [] if "fairseq" not in override else ["data.tokenizer={kind: fairseq_dictionaries, source: d}"]
    assert line in refusal(recipe("text", override, *more))


def test_other_text_counts_where_it_can_be_seen(home: Path) -> None:
    Path("longer").write_text(LINES + "one more\n")
    message = refusal(recipe("longer"))
    assert f"data.train.0: longer has {len(LINES) + 9:,} bytes, prepared was text of {len(LINES):,}" in message
    Path("corrected").write_text(LINES.replace("the cat sees 17", "the cat saw  17"))
    assert "data.train.0: corrected has another content than text, which was prepared" in refusal(recipe("corrected"))


def test_large_text_that_lies_elsewhere_is_known_by_its_size(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("corrected").write_text(LINES.replace("the cat sees 17", "the cat saw  17"))
    monkeypatch.setattr(comparison, "MAX_READ_BYTES", len(LINES) - 1)
    require_data_of(recipe("corrected"), Path("data"), load_manifest(Path("data")))


def test_another_tokenizer_counts_where_it_can_be_seen(home: Path, tmp_path: Path) -> None:
    def from_directory(name: str) -> Recipe:
        return recipe("text", f"data.tokenizer={{kind: tokenizer_directory, path: {name}}}")

    prepare(recipe("text", "data.tokenizer.vocab_size=50").data, Path("small"), workers=1, progress=False)
    prepare(from_directory("data/tokenizer").data, Path("own"), workers=1, progress=False)
    manifest = load_manifest(Path("own"))
    for name in ("own/tokenizer", "/nowhere"):
        require_data_of(from_directory(name), Path("own"), manifest)
    with pytest.raises(DataError, match=r"data\.tokenizer: \w{12} in the recipe, \w{12} made the ids"):
        require_data_of(from_directory("small/tokenizer"), Path("own"), manifest)
