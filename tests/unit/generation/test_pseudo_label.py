"""A teacher's outputs as training targets: filtered and counted, the same bytes by any share, whole or refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from dstrain.data.filtering import FilterConfig
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.derived import LabelJob, copy_original, label_shard_file, merge_labels
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.report import describe_data
from dstrain.errors import DataError
from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.generator import Generator
from dstrain.generation.hypothesis import Hypothesis
from dstrain.generation.pseudo_label import Labeler, LabelReport, repeats
from dstrain.storage.sharded_job import Worker
from tests.unit.distillation.toy_store import EOS, PAD, prepared, teacher_for

PAIRS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("prepared") / "data", num_pairs=PAIRS)


class Scripted:
    """Says the source backwards; but every tenth row nothing, a long text, or the same word again and again."""

    def __init__(self, longest: float = 9.0) -> None:
        self.calls: list[int] = []
        self.longest = longest

    def max_length(self, source_length: int) -> int:
        return int(self.longest * source_length)

    def translate_ids(
        self,
        sources: Sequence[Sequence[int]],
        *,
        starts: Sequence[int | None],
        first_line: int,
        progress: Callable[[int], object],
    ) -> list[list[Hypothesis]]:
        assert starts == [None] * len(sources)
        self.calls.append(first_line)
        progress(len(sources))
        return [[Hypothesis(self.answer(row, source), 0.0, [])] for row, source in enumerate(sources, first_line - 1)]

    def answer(self, row: int, source: Sequence[int]) -> list[int]:
        backwards = [*source[-2::-1], EOS]
        match row % 10:
            case 3:
                return [EOS]
            case 5:
                return [*range(10, 10 + 4 * len(source)), EOS]
            case 7:
                return [9, *[11, 12] * 5, EOS]
        return backwards


def job_for(data: Path, **changes: Any) -> LabelJob:
    contents: dict[str, Any] = {
        "teacher": "t" * 64,
        "original": load_manifest(data).job,
        "generation": {"beam_size": 5},
        "max_ratio": None,
        "max_repeats": 3,
        "keep_original": False,
        "pairs": PAIRS,
        "pairs_per_part": 16,
        "parts": 4,
    }
    return LabelJob(**{**contents, **changes})


def label(
    data: Path,
    output: Path,
    share: Worker,
    *,
    max_target_length: int = 1024,
    max_ratio: float | None = None,
    longest: float = 9.0,
    **changes: Any,
) -> LabelReport:
    job = job_for(data, **changes)
    limits = FilterConfig(max_target_length=max_target_length, max_ratio=max_ratio)
    labeler = Labeler(cast(Generator, Scripted(longest)), open_dataset(data, "train"), job, limits, (120, 120), (3, 3), output)
    report = labeler.run(share, lambda pairs: None)
    if share.index == 0:
        copy_original(data, output, job)
    return report


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def expected(original: Dataset, keep: Callable[[int], bool]) -> list[tuple[list[int], list[int]]]:
    script = Scripted()
    sources = [original[row].source.tolist() for row in range(len(original))]
    return [(source, script.answer(row, source)) for row, source in enumerate(sources) if keep(row)]


def pairs_of(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    return [(dataset[row].source.tolist(), dataset[row].target.tolist()) for row in range(len(dataset))]


def test_targets_are_the_teachers_and_all_else_stays(data: Path, tmp_path: Path) -> None:
    report = label(data, tmp_path / "labeled", Worker(0, 1))
    manifest = merge_labels(tmp_path / "labeled", "a test")
    original = load_manifest(data)
    labeled = open_dataset(tmp_path / "labeled", "train")
    assert pairs_of(labeled) == expected(open_dataset(data, "train"), lambda row: row % 10 not in (3, 7))
    assert manifest.splits["train"].dropped == {"empty": 6, "too long": 0, "ratio": 0, "repetition": 6, "unfinished": 0}
    assert dict(report.dropped) == manifest.splits["train"].dropped
    assert "dropped 12: empty 6, repetition 6" in report.line()
    assert manifest.splits["train"].pairs_read == PAIRS
    assert manifest.data == original.data
    assert manifest.job != original.job
    assert manifest.splits["valid"] == original.splits["valid"]
    valid, before = open_dataset(tmp_path / "labeled", "valid", verify=True), open_dataset(data, "valid")
    assert pairs_of(valid) == pairs_of(before)
    assert valid.target_text(3) == before.target_text(3)
    assert "outputs of teacher tttttttttttt" in describe_data(tmp_path / "labeled")[0]


def test_lengths_and_ratios_are_filtered_and_counted(data: Path, tmp_path: Path) -> None:
    label(data, tmp_path / "labeled", Worker(0, 1), max_target_length=30, max_ratio=2.5, max_repeats=None)
    merge_labels(tmp_path / "labeled", "a test")
    found = pairs_of(open_dataset(tmp_path / "labeled", "train"))

    def kept(pair: tuple[list[int], list[int]]) -> bool:
        sizes = sorted(map(len, pair))
        return sizes[0] > 1 and len(pair[1]) <= 30 and sizes[1] <= 2.5 * sizes[0]

    everything = expected(open_dataset(data, "train"), lambda row: True)
    assert found == [pair for pair in everything if kept(pair)]
    dropped = load_manifest(tmp_path / "labeled").splits["train"].dropped
    assert dropped["too long"] == sum(len(target) > 30 for _, target in everything)
    assert dropped["ratio"] > 0
    assert sum(dropped.values()) == PAIRS - len(found)


@pytest.mark.parametrize(("longest", "cut"), [(4.1, 0), (4.0, 6)])
def test_outputs_that_reach_the_length_limit_are_unfinished(longest: float, cut: int, data: Path, tmp_path: Path) -> None:
    """Every tenth output has four times the tokens of its source."""
    report = label(data, tmp_path / "labeled", Worker(0, 1), longest=longest)
    train = merge_labels(tmp_path / "labeled", "a test").splits["train"]
    assert train.dropped["unfinished"] == report.dropped["unfinished"] == cut
    assert train.rows == PAIRS - 12 - cut
    assert ("unfinished 6" in report.line()) == (cut > 0)


def test_a_search_that_is_cut_short_gives_no_targets_of_its_full_length(data: Path, tmp_path: Path) -> None:
    teacher, dataset = teacher_for(data, eos_scale=4.0), open_dataset(data, "train")
    config = BeamSearchConfig(beam_size=2, length_penalty=1.0, max_length_ratio=0.0, max_length_offset=5)
    generator = Generator(teacher, config, SpecialIds(pad=PAD, eos=EOS, unk=0), limits=teacher.config.limits)
    job = job_for(data, max_repeats=None)
    report = Labeler(generator, dataset, job, FilterConfig(), (120, 120), (3, 3), tmp_path / "labeled").run(
        Worker(0, 1), lambda n: None
    )
    found = generator.translate_ids([dataset[row].source.tolist() for row in range(PAIRS)])
    cut = sum(len(hypotheses[0].tokens) == 6 for hypotheses in found)
    assert 0 < cut < PAIRS
    assert report.dropped["unfinished"] == cut


def test_a_person_sees_checksums_being_compared(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label(data, tmp_path / "labeled", Worker(0, 1))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    merge_labels(tmp_path / "labeled", "a test")
    assert re.search(r"checking .*0/4 shards", capsys.readouterr().err)


def test_the_original_pairs_stay_on_request(data: Path, tmp_path: Path) -> None:
    label(data, tmp_path / "labeled", Worker(0, 1), keep_original=True)
    manifest = merge_labels(tmp_path / "labeled", "a test")
    original = open_dataset(data, "train")
    assert pairs_of(open_dataset(tmp_path / "labeled", "train")) == [
        *expected(original, lambda row: row % 10 not in (3, 7)),
        *pairs_of(original),
    ]
    assert manifest.splits["train"].rows == 2 * PAIRS - 12
    assert manifest.splits["train"].pairs_read == 2 * PAIRS


def test_labeled_data_can_be_labeled_again(data: Path, tmp_path: Path) -> None:
    label(data, tmp_path / "once", Worker(0, 1), keep_original=True)
    rows = merge_labels(tmp_path / "once", "a test").splits["train"].rows
    label(tmp_path / "once", tmp_path / "twice", Worker(0, 1), keep_original=True, pairs=rows, parts=-(-rows // 16))
    merge_labels(tmp_path / "twice", "a test")
    assert pairs_of(open_dataset(tmp_path / "twice", "train"))[-PAIRS:] == pairs_of(open_dataset(data, "train"))


def test_shares_make_the_same_bytes_and_mend_what_is_damaged(data: Path, tmp_path: Path) -> None:
    label(data, tmp_path / "whole", Worker(0, 1))
    whole = merge_labels(tmp_path / "whole", "a test")
    for index in (1, 0):
        label(data, tmp_path / "shares", Worker(index, 2))
    parts = tmp_path / "shares" / "train"
    (parts / "00001.arrow").unlink()
    (parts / "00002.json").write_text("")
    with pytest.raises(DataError, match=r"2 of 4 shards are missing or damaged \(1, 2\); run `dstrain pseudo-label` again"):
        merge_labels(tmp_path / "shares", "a test")
    assert label(data, tmp_path / "shares", Worker(0, 2)).shards == 1
    assert label(data, tmp_path / "shares", Worker(1, 2)).shards == 1
    assert "nothing to do" in label(data, tmp_path / "shares", Worker(1, 2)).line()
    assert merge_labels(tmp_path / "shares", "a test") == whole
    assert tree(tmp_path / "shares") == tree(tmp_path / "whole")


def test_what_is_unfinished_or_belongs_to_another_job_is_refused(data: Path, tmp_path: Path) -> None:
    label(data, tmp_path / "labeled", Worker(1, 2))
    with pytest.raises(DataError, match=r"2 of 4 shards are missing or damaged \(0, 2\)"):
        merge_labels(tmp_path / "labeled", "a test")
    with pytest.raises(
        DataError, match=r"manifest.json is missing: shards are not done or not merged; run `dstrain pseudo-label`"
    ):
        load_manifest(tmp_path / "labeled")
    with pytest.raises(DataError, match=r"was started with another job \(teacher: tttttttttttt -> uuuuuuuuuuuu\)"):
        label(data, tmp_path / "labeled", Worker(0, 2), teacher="u" * 64)
    with pytest.raises(DataError, match=r"was started with another job \(max_repeats: 3 -> 2\); give its options, choose"):
        label(data, tmp_path / "labeled", Worker(0, 2), max_repeats=2)
    with pytest.raises(DataError, match="did not make"):
        label(data, data, Worker(0, 1))
    with pytest.raises(DataError, match=r"was not written by `dstrain pseudo-label` \(it has no parts.json\)"):
        merge_labels(tmp_path / "nothing", "a test")
    label(data, tmp_path / "labeled", Worker(0, 2))
    copied = tmp_path / "labeled" / "valid" / "00000.arrow"
    content = copied.read_bytes()
    copied.unlink()  # it is a link to the original
    copied.write_bytes(content[:-1] + b"x")
    with pytest.raises(DataError, match=r"valid/00000.arrow: the SHA-256 differs .* run `dstrain pseudo-label --shard 0/N`"):
        merge_labels(tmp_path / "labeled", "a test")


def test_when_nothing_is_left_it_says_why(data: Path, tmp_path: Path) -> None:
    label(data, tmp_path / "labeled", Worker(0, 1), max_target_length=1)
    with pytest.raises(DataError, match=r"every output of the teacher was dropped \(empty 6, too long 54\); relax"):
        merge_labels(tmp_path / "labeled", "a test")


def test_files_are_copied_where_they_cannot_be_linked(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no links here")

    label(data, tmp_path / "linked", Worker(0, 1), keep_original=True)
    monkeypatch.setattr(os, "link", refuse)
    label(data, tmp_path / "copied", Worker(0, 1), keep_original=True)
    assert tree(tmp_path / "linked") == tree(tmp_path / "copied")


@pytest.mark.parametrize(
    ("tokens", "times"),
    [
        ([2], 1),
        ([5, 2], 1),
        ([5, 5, 2], 2),
        ([7, 7, 7, 7], 4),
        ([1, 2, 1, 2, 1, 2], 3),
        ([1, 2, 1, 2, 1], 2),
        ([9, 1, 2, 3, 4, 1, 2, 3, 4], 2),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], 1),
        ([1, 1, 2, 2, 2, 3], 3),
    ],
)
def test_repeats_count_groups_in_a_row(tokens: list[int], times: int) -> None:
    assert repeats(tokens) == times


def test_repeats_equal_a_plain_search() -> None:
    def plain(tokens: list[int]) -> int:
        most = 1
        for size in range(1, 5):
            for start in range(len(tokens)):
                group, times = tokens[start : start + size], 1
                while len(group) == size and tokens[start + times * size : start + (times + 1) * size] == group:
                    times += 1
                most = max(most, times)
        return most

    draw = random.Random(1)
    for _ in range(400):
        tokens = [draw.randrange(3) for _ in range(draw.randrange(1, 14))]
        assert repeats(tokens) == plain(tokens), tokens
    assert repeats(np.array([3, 3])) == 2  # type: ignore[arg-type]


def test_a_job_from_before_precisions_makes_the_same_data(data: Path, tmp_path: Path) -> None:
    label(data, tmp_path / "labeled", Worker(0, 1))
    job = tmp_path / "labeled" / "parts.json"
    merged = merge_labels(tmp_path / "labeled", "a test")
    fields = json.loads(job.read_text())
    assert fields.pop("precision") == "fp32"
    job.write_text(json.dumps(fields))
    assert merge_labels(tmp_path / "labeled", "a test") == merged
    known = f"{json.dumps(fields, separators=(',', ':'))} {merged.splits['train'].fingerprint}"
    assert merged.job == hashlib.sha256(known.encode()).hexdigest()


def test_part_names_sort() -> None:
    assert label_shard_file(3) == "train/00003.arrow"
