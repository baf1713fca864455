import gzip
import os
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

SCRIPT = ROOT / "tools" / "get_multi30k.sh"
LINES = {"train": 29000, "val": 1014, "test_2016_flickr": 1000, "test_2017_flickr": 1000}
FILES = {
    f"{split}.{language}": lines
    for split, lines in LINES.items()
    for language in ("en", "de", "fr", "cs")
    if (split, language) != ("test_2017_flickr", "cs")
}


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """The corpus's directory with made-up lines."""
    (tmp_path / "mirror").mkdir()
    for name, lines in FILES.items():
        text = "".join(f"{name} {number}\n" for number in range(lines))
        (tmp_path / "mirror" / f"{name}.gz").write_bytes(gzip.compress(text.encode(), compresslevel=1))
    return tmp_path / "mirror"


def get(mirror: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MULTI30K_URL": f"file://{mirror}"}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], cwd=mirror.parent, env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_script_is_well_formed() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], timeout=60).returncode == 0


def test_everything_is_fetched_once(mirror: Path) -> None:
    first = get(mirror)
    assert first.returncode == 0, first.stderr
    corpus = mirror.parent / "data" / "multi30k"
    assert {path.name: len(path.read_text().splitlines()) for path in corpus.iterdir()} == FILES
    assert (corpus / "val.de").read_text().startswith("val.de 0\nval.de 1\n")
    assert first.stdout.count("fetching ") == len(FILES)
    assert first.stdout.endswith(f"export DSTRAIN_DATA={corpus.parent}\n")

    (corpus / "val.fr").unlink()
    (corpus / "val.cs").write_text("half a file\n")
    second = get(mirror, "data/multi30k")
    assert second.returncode == 0
    assert [line.split("/")[-1] for line in second.stdout.splitlines() if line.startswith("fetching ")] == ["val.fr", "val.cs"]
    assert {path.name: len(path.read_text().splitlines()) for path in corpus.iterdir()} == FILES


def damaged(mirror: Path, name: str) -> str:
    """What the script says; it must fail and leave no trace of the damaged file."""
    result = get(mirror, "out put")
    assert result.returncode == 1
    assert name.removesuffix(".gz") not in {path.name for path in (mirror.parent / "out put").iterdir()}
    assert not list((mirror.parent / "out put").glob(".part*"))
    return result.stderr


def test_a_file_that_is_not_there(mirror: Path) -> None:
    (mirror / "train.fr.gz").unlink()
    assert f"cannot fetch file://{mirror}/train.fr.gz; check the network, or set MULTI30K_URL" in damaged(mirror, "train.fr.gz")


def test_a_truncated_file(mirror: Path) -> None:
    whole = (mirror / "val.en.gz").read_bytes()
    (mirror / "val.en.gz").write_bytes(whole[: len(whole) // 2])
    assert "val.en.gz is not a whole gzip file; try again" in damaged(mirror, "val.en.gz")


def test_a_file_with_other_lines(mirror: Path) -> None:
    (mirror / "val.en.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert "val.en.gz has 2 lines instead of 1014; nothing was kept of it" in damaged(mirror, "val.en.gz")
