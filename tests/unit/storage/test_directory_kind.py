"""A directory that was named in place of another is told by its files, and what was meant is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.checkpoint.directories import require_bundle
from dstrain.data.prepared.manifest import load_manifest
from dstrain.errors import BundleError, DataError
from dstrain.storage.directory_kind import instead_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The names that tell kinds apart, without content."""
    for name in (
        "run/events.jsonl",
        "run/bundles/step_00000009/model.yaml",
        "run/bundles/step_00000010/adapter/adapter.yaml",
        "run/checkpoints/step_00000010/manifest.json",
        "finished/events.jsonl",
        "finished/bundles/best/model.yaml",
        "data/manifest.json",
        "data/train/00000.arrow",
        "unfinished/job.json",
        "logits/logits.json",
        "thesis/chapter.tex",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("finished", "did you mean ROOT/finished/bundles/best?"),
        ("finished/bundles", "did you mean ROOT/finished/bundles/best?"),
        ("run", "did you mean ROOT/run/bundles/step_00000010?"),
        ("run/bundles/step_00000010/adapter", "did you mean ROOT/run/bundles/step_00000010?"),
        (
            "run/checkpoints/step_00000010",
            "it is a checkpoint; make a bundle of it: dstrain consolidate ROOT/run/checkpoints/step_00000010 --output BUNDLE",
        ),
        ("data", "it is prepared data; name a bundle"),
        ("logits", "it is dumped logits; name a bundle"),
        ("thesis", "name a bundle that dstrain has written"),
        ("thesis/chapter.tex", "it is a file; name the directory of a bundle"),
        ("none", "there is no such directory"),
    ],
)
def test_a_path_in_place_of_a_bundle(path: str, message: str, root: Path) -> None:
    with pytest.raises(BundleError) as caught:
        require_bundle(root / path)
    assert str(caught.value).endswith(f"is not a bundle: it has no model.yaml; {message.replace('ROOT', str(root))}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "unfinished",
            "manifest.json is missing: the preparation was not finished; run the same `dstrain prepare` again to go on",
        ),
        ("thesis", "thesis was never prepared: name prepared data that dstrain has written; `dstrain prepare RECIPE --output"),
        ("finished", "finished was never prepared: it is a run; name prepared data; `dstrain prepare RECIPE --output DATA`"),
        ("none", "none was never prepared: there is no such directory; `dstrain prepare RECIPE --output DATA` makes it"),
    ],
)
def test_data_that_was_never_prepared_is_told_from_unfinished(path: str, message: str, root: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_manifest(root / path)
    assert message in str(caught.value)


def test_a_bundle_in_place_of_its_run_or_a_run_in_place_of_a_checkpoint(root: Path) -> None:
    assert instead_of("a run", root / "finished/bundles/best") == f"did you mean {root}/finished?"
    assert instead_of("a run", root / "data") == "it is prepared data; name a run"
    assert instead_of("a checkpoint", root / "run") == f"did you mean {root}/run/checkpoints/step_00000010?"
