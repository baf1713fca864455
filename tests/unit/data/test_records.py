"""Pairs that are records: paths of fields, lists, and what is missing; the same in JSON lines, parquet and data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.data.config import DataConfig, JsonlText
from dstrain.data.sources.corpora import parse, parse_references
from dstrain.data.sources.text import TextBlock, scan_jsonl
from dstrain.errors import DataError


def pairs_of(record: dict[str, Any], **keys: Any) -> tuple[list[str], list[str]]:
    line = json.dumps(record) + "\n"
    return parse(JsonlText(path="/corpus.jsonl", **keys), TextBlock(4, 1, (line.encode(),)))


SUMMARY = {"source": ["First sentence.", "Second."], "target": ["One summary.", "Another summary of the same."]}


def test_a_path_leads_inside() -> None:
    record = {"translation": {"en": "one", "de": {"text": "eins"}}, "a.b": "dotted"}
    assert pairs_of(record, source="translation.en", target="translation.de.text") == (["one"], ["eins"])
    assert pairs_of(record, source="a.b", target="translation.en") == (["dotted"], ["one"])


def test_sentences_are_joined_on_request_and_one_of_several_references_is_chosen_by_number() -> None:
    assert pairs_of(SUMMARY, join=" ", target="target.0") == (["First sentence. Second."], ["One summary."])
    assert pairs_of(SUMMARY, source="source.1", target="target.1") == (["Second."], ["Another summary of the same."])
    assert pairs_of({"source": [], "target": "x"}, join=" ") == ([""], ["x"])


@pytest.mark.parametrize(
    ("record", "keys", "message"),
    [
        (
            SUMMARY,
            {},
            r"field 'source' holds a list, not a string; join its sentences \(join: ' '\), or name one item \(source\.0\)",
        ),
        (
            SUMMARY,
            {"source": "source.0", "target": "target.2"},
            r"no field 'target\.2'; 'target' holds a list of 2, counted from 0",
        ),
        ({"source": [["a"]], "target": ""}, {"join": " "}, "field 'source' holds a list of other things than strings"),
        ({"t": {"en": "a"}}, {"source": "t.en", "target": "t.de"}, r"no field 't\.de'; the fields of 't' are 'en'"),
        ({"t": "a"}, {"source": "t.en"}, r"no field 't\.en'; 't' holds a string"),
        ({"source": {"en": "a"}}, {}, "field 'source' holds an object, not a string; name another field or fix the file"),
        ({"source": 3}, {}, "field 'source' holds a number, not a string"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(record: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"/corpus\.jsonl:5: {message}"):
        pairs_of(record, **keys)


def references_of(record: dict[str, Any], **keys: Any) -> list[list[str]] | None:
    line = json.dumps(record) + "\n"
    return parse_references(JsonlText(path="/corpus.jsonl", **keys), TextBlock(4, 1, (line.encode(),)))


def test_all_references_are_read_if_the_recipe_names_them() -> None:
    assert references_of(SUMMARY, references="target") == [SUMMARY["target"]]
    assert references_of({"a": {"b": [["x", "y"]]}}, references="a.b.0") == [["x", "y"]]
    assert references_of(SUMMARY) is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([], "field 'target' lacks a reference or holds a blank one; fix the file, or leave the line out"),
        (["one", " "], "field 'target' lacks a reference or holds a blank one"),
        ("one", "field 'target' holds a string, not a list of references; name another field"),
        (["one", 2], "field 'target' holds a number, not a string"),
        (["one", ["two"]], "field 'target' holds a list, not a string"),
    ],
)
def test_a_missing_reference_is_named_by_its_line(target: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"/corpus\.jsonl:5: {message}"):
        references_of({"target": target}, references="target")


def test_references_that_nothing_is_compared_with_are_refused() -> None:
    plain = {"kind": "jsonl", "path": "x"}
    for split, unread in (("train", {"references": "target"}), ("valid", {"source": None, "references": "target"})):
        corpora = {"train": [plain], "valid": [plain], split: [{**plain, **unread}]}
        with pytest.raises(
            ValueError, match=rf"{split}\.0\.references has no effect: only pairs of evaluation splits are scored"
        ):
            DataConfig.model_validate(corpora)


def test_keys_of_older_recipes_are_read() -> None:
    old = JsonlText.model_validate({"path": "x", "source_field": "en", "target_field": "de"})
    assert old == JsonlText(path="x", source="en", target="de")
    with pytest.raises(ValueError, match="source_field"):
        JsonlText.model_validate({"path": "x", "source_field": "en", "source": "de"})


@pytest.mark.parametrize(("end", "lines"), [("", 2), ("\n", 2), ("\n\n \n\r\n", 2), ('\n\n{"a": 1}\n', 4)])
def test_blank_lines_at_the_end_do_not_count(tmp_path: Path, end: str, lines: int) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}' + end, newline="")
    assert scan_jsonl(tmp_path / "x.jsonl").lines == lines


@pytest.mark.parametrize("content", ['[{"source": "a"}]', '\ufeff\n[\n{"source": "a"},\n'])
def test_an_array_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x\.json: a JSON array, not one object a line; convert it: jq -c '\.\[\]' x\.json"):
        scan_jsonl(tmp_path / "x.json")
